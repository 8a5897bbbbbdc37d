"""``mnist-ext doctor``: what is built, what is missing, what is wrong, and what to do about it."""

import argparse
import json

from mnist_ext.app.cli.streams import printable


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "doctor",
        help="show what is built, what is missing, what is wrong, and what to do",
        description="Show what is built and in use and why, what is missing, what is wrong, and\n"
        "what to do. Runs the kernels of each instruction set and compares them with PyTorch's.",
        epilog="example: mnist-ext doctor --json\n\n"
        "exit codes: 0 all that is there works (hints may say what else could be had),\n"
        "1 something is wrong: the lines that start with 'problem'",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Examine and print."""
    from mnist_ext.app.cli import diagnosis

    report = diagnosis.examine()
    if args.json:
        print(json.dumps(report))
    else:
        for label, text in diagnosis.rows(report):
            print(f"{label:<14} {printable(text)}")
    return 1 if report["problems"] else 0
