"""Folders that can be taken back: what a failed step made, it removes again."""

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path


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
