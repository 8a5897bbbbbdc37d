"""What a command writes where the user wants it: a file, a link, a device, a pipe, standard output."""

import os
import stat
import sys
from pathlib import Path

from mnist_ext.app import UserError
from mnist_ext.app.files.atomic import replace_file


def write_output(path: str | Path, content: bytes, hint: str = "") -> bool:
    """Write ``content`` to ``path``; ``-`` is standard output.

    A regular file is replaced as a whole, at the end of the links that lead to it, and keeps its
    mode and owner; into anything else, a device or a pipe, it is written.

    Args:
        path: where to.
        content: what.
        hint: what to do where that fails, as the end of the message.

    Returns:
        Whether standard output is free for a message.

    Raises:
        UserError: it cannot be written; a regular file is then as it was.
        OSError: it is standard output, and cannot be written.
    """
    if _is_stdout(path):
        sys.stdout.flush()
        sys.stdout.buffer.write(content)
        return False
    try:
        before = os.stat(path) if os.path.exists(path) else None
        if before is None or stat.S_ISREG(before.st_mode):
            replace_file(Path(os.path.realpath(path)), content, before)
        else:
            with open(path, "wb") as file:
                file.write(content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}{hint}") from error
    return True


def _is_stdout(path: str | Path) -> bool:
    """Return whether it is ``-``, or a name of what standard output goes to."""
    if str(path) == "-":
        return True
    try:
        return os.path.samestat(os.stat(path), os.fstat(sys.stdout.fileno()))
    except (OSError, ValueError):
        return False
