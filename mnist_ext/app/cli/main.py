"""The command line: ``mnist-ext COMMAND``. Each command is a module of ``commands``.

Exit codes: 0 done; 1 the goal was missed: the training diverged, ended early or missed its target;
2 wrong use or bad input; 128 plus the number of a signal that ended it, as shells count them: 130
Ctrl-C, 143 SIGTERM, 129 SIGHUP, 138 SIGUSR1, 141 a closed pipe.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from mnist_ext import __version__
from mnist_ext.app import UserError
from mnist_ext.app.cli import interrupts, streams
from mnist_ext.app.cli.commands import COMMANDS
from mnist_ext.app.cli.options import Parser

_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: the arguments after the program's name; None takes the process's own.
    """
    code = _main(list(sys.argv[1:] if argv is None else argv))
    # Imported with torch, by who may have joined other processes.
    distributed = sys.modules.get("mnist_ext.app.training.distributed")
    if distributed is not None and distributed.joined():
        distributed.leave(code)
    return code


def _main(argv: list[str]) -> int:
    streams.prepare()
    try:
        try:
            return _run(argv)
        finally:
            sys.stdout.flush()  # here, where a failure can be reported
    except OSError as error:
        # A stream's error names no file.
        if error.filename is not None or not streams.lost(sys.stdout):
            raise
        if isinstance(error, BrokenPipeError):
            return _BROKEN_PIPE
        streams.print_message(f"error: cannot write to standard output: {error.strerror}")
        return 2


def _run(argv: list[str]) -> int:
    try:
        args = _parser().parse_args(argv)
        args.command_line = shlex.join(["mnist-ext", *argv])
        with interrupts.cleaning_up():
            code: int = args.run(args)
        return code
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        who = "" if rank == "0" else f"process {rank}: "
        streams.print_message(f"error: {who}{error}")
        return 2
    except KeyboardInterrupt:
        streams.print_message("interrupted")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mnist-ext",
        description="Train a small network on MNIST with hand-written PyTorch operators.",
        epilog="example: mnist-ext train --recipe best",
    )
    parser.add_argument("--version", action="version", version=f"mnist-ext {__version__}")
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=("bash", "zsh", "tcsh"),
        help="print the completion script of a shell; needs shtab: pip install "
        "'mnist-ext[completion]'",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


class _PrintCompletion(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        try:
            import shtab
        except ImportError:
            raise UserError(
                f"{option_string} needs shtab: pip install 'mnist-ext[completion]'"
            ) from None
        print(shtab.complete(parser, values))
        parser.exit()
