"""Folders that can be removed again after a failure, and a lock on a folder."""

import errno
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mnist_ext.app import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_LOCK = "lock"


def make_folders(path: Path) -> list[Path]:
    """Create ``path`` and its missing parents.

    Args:
        path: the folder to create; it may exist already.

    Returns:
        The folders that this call created, innermost first.

    Raises:
        OSError: a folder cannot be created; those created before it are removed again.
    """
    missing = []
    folder = path
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    created: list[Path] = []
    try:
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            created.insert(0, folder)
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    except BaseException:
        remove_folders(created)
        raise
    return created


def remove_folders(created: Sequence[Path]) -> None:
    """Remove the folders that ``make_folders`` returned, except those that are in use by now."""
    for folder in created:
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the lock on a folder within this context.

    The system releases it when the process ends, however that ends: the file ``lock`` of a process
    that was killed locks nothing.

    Yields:
        Whether the lock is held: some file systems have none.

    Raises:
        UserError: another process holds it.
        OSError: the file cannot be opened.
    """
    path = folder / _LOCK
    file = None if fcntl is None else _lock(path)
    try:
        yield file is not None
    finally:
        if file is not None:
            _remove(path, file)


def _lock(path: Path) -> int | None:
    """Return the open file, or None where files cannot be locked."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(file, 1000, 0).decode(errors="replace").split()
            os.close(file)
            raise UserError(_in_use(path.parent, owner)) from None
        except OSError:
            _remove(path, file)
            return None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), path.stat()):
                break
        os.close(file)  # its owner has removed it meanwhile
    with suppress(OSError):  # a full disk; the lock is held all the same
        os.ftruncate(file, 0)
        os.write(file, f"{os.getpid()} {socket.gethostname()}\n".encode())
    return file


def _remove(path: Path, file: int) -> None:
    # In this order: who opens the name from now on makes a new file, and locks that.
    with suppress(OSError):
        path.unlink()
    os.close(file)


def _in_use(folder: Path, owner: list[str]) -> str:
    if len(owner) != 2:
        return f"{folder} is in use: another process trains it; wait until that has ended"
    process, host = owner
    where = "" if host == socket.gethostname() else f" on {host}"
    return (
        f"{folder} is in use: process {process}{where} trains it; wait until that has ended, or "
        f"end it with 'kill {process}'{where}, which saves a checkpoint"
    )
