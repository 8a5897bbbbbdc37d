"""Run the command line: ``mnist-ext``, or ``python -m mnist_ext``."""

import sys


def main() -> int:
    """Run the command line; return its exit code."""
    try:
        from mnist_ext.app.cli import interrupts

        interrupts.answer()
    except KeyboardInterrupt:  # in the milliseconds until then
        print("mnist-ext: interrupted", file=sys.stderr)
        return 130
    from mnist_ext.app.cli.main import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
