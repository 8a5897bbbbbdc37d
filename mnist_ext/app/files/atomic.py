"""Files that are whole at every moment, whatever happens to the process or the machine."""

import errno
import glob
import os
import stat
from contextlib import suppress
from pathlib import Path

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
