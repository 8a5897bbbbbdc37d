"""Files that are whole at every moment, whatever happens to the process or the machine."""

import os
from contextlib import suppress
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``: readers, also after a crash, see the old file or the new.

    The content goes to ``<path>.partial`` first, onto the disk, and is then renamed. One process
    may write a path at a time.

    Raises:
        OSError: the file cannot be written; it is as it was then.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    # The rename itself is on the disk only when the folder is.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sync_file(path: Path) -> None:
    """Wait until what was written to ``path``, if it exists, is on the disk.

    Raises:
        OSError: the disk did not take it.
    """
    with suppress(FileNotFoundError), path.open("rb") as file:
        os.fsync(file.fileno())
