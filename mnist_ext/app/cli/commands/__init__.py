"""The commands of ``mnist-ext``, one module each.

A command has ``add_parser(commands)``, which describes its options and sets ``run``, a function
from the parsed arguments to the exit code. The modules are imported for ``--help`` too, so that
they import what takes long (torch, matplotlib) within ``run``.
"""

from mnist_ext.app.cli.commands import bench, doctor, evaluate, predict, report, train

# In the order of --help.
COMMANDS = (train, evaluate, predict, report, bench, doctor)
