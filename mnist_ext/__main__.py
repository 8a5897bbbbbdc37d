"""Run the command line as ``python -m mnist_ext``."""

import sys

from mnist_ext.cli import main

sys.exit(main())
