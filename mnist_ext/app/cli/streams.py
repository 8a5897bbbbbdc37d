"""Standard output and standard error, which may be closed, full, or poor in characters."""

import io
import os
import sys
from contextlib import suppress
from typing import TextIO


def prepare() -> None:
    """Let both take any text, and fail like other files where the shell has closed them (``>&-``).

    Without that, Python drops what is printed, and the next file that is opened is in their place.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # Every write fails, as nothing can be written to what is open for reading.
            unwritable = os.open(os.devnull, os.O_RDONLY)
            setattr(sys, name, open(unwritable, "w"))  # noqa: SIM115
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def printable(text: str) -> str:
    """Return ``text`` with what a terminal would obey, or could not show at all, as escapes.

    File names may hold such: control characters, and bytes that are not UTF-8.
    """
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # Python's way to keep a byte that is no character
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def print_message(text: str) -> None:
    """Print a message on standard error, in one line; where that takes nothing, go on."""
    try:
        print(f"mnist-ext: {printable(text)}", file=sys.stderr, flush=True)
    except OSError:
        lost(sys.stderr)


def lost(stream: TextIO) -> bool:
    """Return whether ``stream`` has failed to take something; if so, drop that.

    Python would try again when it exits, and complain.
    """
    try:
        stream.flush()
        # An unbuffered stream keeps nothing to fail with again.
        failed = getattr(stream, "write_through", False)
    except OSError:
        failed = True
    if failed:
        with suppress(OSError):  # a stream of a test's
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return failed
