"""Fused linear and softmax cross-entropy for PyTorch, with hand-written kernels.

``functional`` holds the ops, ``nn`` the modules and ``swap``, which puts them into a model of
yours, ``optim`` an SGD with one native call per step, ``TrainStep`` a whole training step in one.
``build_info`` says what was built and what is in use.
"""

import os
import sys
from importlib import import_module

TYPE_CHECKING = False  # as typing's, which takes longer to import than the rest
if TYPE_CHECKING:
    from mnist_ext import functional, nn, optim
    from mnist_ext._build_info import build_info
    from mnist_ext._version import __version__
    from mnist_ext.train_step import TrainStep

__all__ = ["TrainStep", "__version__", "build_info", "functional", "nn", "optim"]

_HOMES = {"TrainStep": "train_step", "__version__": "_version", "build_info": "_build_info"}

# The command line answers Ctrl-C and --help before torch, which takes seconds to import; its names
# are imported when they are asked for.
_program = (getattr(sys, "argv", None) or [""])[0]
_is_command = os.path.splitext(os.path.basename(_program))[0] == "mnist-ext" or (
    _program == "-m" and "mnist_ext" in sys.orig_argv
)

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = import_module(f"{__name__}.{_HOMES.get(name, name)}")
        value = getattr(module, name) if name in _HOMES else module
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})

    if not _is_command:
        for _name in __all__:
            __getattr__(_name)
