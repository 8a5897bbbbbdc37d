"""What the options of the commands have in common: the parser, and types that check a value."""

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from mnist_ext.app import UserError

LARGEST_INT = 2**31 - 1
MOST_THREADS = 1024


class Parser(argparse.ArgumentParser):
    """Reports wrong use like every other mistake: in one line."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("allow_abbrev", False)
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        """Raise the UserError that stands for ``message``."""
        raise UserError(f"{message} (see '{self.prog} --help')")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help or version; argparse itself would pass over a failure."""
        (file or sys.stdout).write(message)


def integer(low: int, high: int = LARGEST_INT) -> Callable[[str], int]:
    """Return the type of a whole number ``low`` to ``high``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {low} to {high}")
        return value

    return parse


def number(low: float, high: float = math.inf) -> Callable[[str], float]:
    """Return the type of a finite number ``low`` to ``high``."""
    limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {limits}")
        return value

    return parse


def widths(text: str) -> tuple[int, ...]:
    """Parse a list of positive whole numbers such as ``128,64``."""
    try:
        values = tuple(int(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(1 <= value <= LARGEST_INT for value in values):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of positive whole numbers such as 128,64"
        )
    return values


def path(text: str) -> str:
    """Return a path with ``~`` expanded, which no shell does in ``--option=~/x`` or a TOML file."""
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        user = text.split("/")[0]
        raise argparse.ArgumentTypeError(
            f"{text!r}: there is no home folder {user}; ./{user} would be a folder of that name"
        )
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r} is no path: it holds a NUL character")
    return expanded


def whole_path(text: str) -> str:
    """Return a path from the root: a run that goes on elsewhere finds it again."""
    return os.path.abspath(path(text))


def folder_name(text: str) -> str:
    """Check that ``text`` names a folder, without a path to it."""
    if text in ("", ".", "..") or "\0" in text or Path(text).name != text:
        raise argparse.ArgumentTypeError(f"{text!r} is not a folder name; see --output-dir")
    return text
