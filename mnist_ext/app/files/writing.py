"""Files that are whole at every moment, and what is written where the user wants it."""

import errno
import glob
import os
import stat
import sys
from contextlib import suppress
from pathlib import Path

from mnist_ext.app import UserError

# What file systems answer that cannot sync a folder, or let it be written but not be opened.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES)


def replace_file(path: Path, content: bytes, like: os.stat_result | None = None) -> None:
    """Replace ``path`` by ``content``: readers, also after a crash, see the old file or the new.

    The content goes to a file ``<path>.<process>-<random>.partial`` first, onto the disk, and is
    then renamed: of several writers the last one counts.

    Args:
        path: the file.
        content: what it shall hold.
        like: whose owner and mode it gets, where this process may give them.

    Raises:
        OSError: the file cannot be written; it is as it was then.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}-{os.urandom(3).hex()}.partial")
    try:
        with partial.open("wb") as file:
            if like is not None:
                with suppress(PermissionError):
                    os.fchown(file.fileno(), like.st_uid, like.st_gid)
                os.fchmod(file.fileno(), stat.S_IMODE(like.st_mode))
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """Wait until the names in a folder are on the disk, where its file system can do that."""
    try:
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def remove_partials(path: Path) -> None:
    """Remove what killed processes left of replacing ``path``; none may be replacing it now."""
    for partial in path.parent.glob(f"{glob.escape(path.name)}*.partial"):
        with suppress(OSError):
            partial.unlink()


def sync_file(path: Path) -> None:
    """Wait until what was written to ``path``, if it exists, is on the disk.

    Raises:
        OSError: the disk did not take it.
    """
    with suppress(FileNotFoundError), path.open("rb") as file:
        os.fsync(file.fileno())


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
