"""Run the command line: ``mnist-ext``, or ``python -m mnist_ext``."""

import sys

from mnist_ext import interrupts


def main() -> int:
    """Run the command line; Ctrl-C is answered from here on."""
    interrupts.answer()
    from mnist_ext.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
