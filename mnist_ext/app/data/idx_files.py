"""MNIST's and Fashion-MNIST's four files: where they lie, in which form, whether they are whole.

The files of both have the same names: only a folder's name, or the labels, say which they are.
"""

import gzip
import math
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mnist_ext.app import UserError

TITLES = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST"}
# As torchvision names the folders.
FOLDERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
# Other sets whose files have the same names.
_FOREIGN = ("kmnist", "emnist", "qmnist", "notmnist")
# (images, labels) of the training and of the test set, as torchvision names them.
_NAMES = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)
# The first four bytes of an IDX file: 0, 0, the element type (8 = uint8), the number of dimensions.
_IMAGES = bytes([0, 0, 8, 3])
_LABELS = bytes([0, 0, 8, 1])
_GZIP = b"\x1f\x8b"
# How the labels of the training set begin.
_FIRST_LABELS = {
    "mnist": bytes([5, 0, 4, 1, 9, 2, 1, 3, 1, 4]),
    "fashion-mnist": bytes([9, 0, 0, 3, 0, 2, 7, 2, 5, 5]),
}

Pair = tuple[NDArray[np.uint8], NDArray[np.uint8]]
Paths = list[tuple[Path, Path]]


def locate(name: str, root: Path) -> Paths | None:
    """Return where the files of a data set lie, or None where there are none of it.

    They may be in torchvision's layout below ``root``, in one of its folders, or right in ``root``,
    compressed or not, under torchvision's names or those with a dot, ``train-images.idx3-ubyte``.

    Args:
        name: ``mnist`` or ``fashion-mnist``.
        root: the folder to look in.

    Returns:
        The paths of images and labels of the training and of the test set; files that are missing
        under the names that they should have.

    Raises:
        UserError: a folder cannot be read, or the files in ``root`` are of another data set.
    """
    torchvisions = root / FOLDERS[name] / "raw"
    for folder in (torchvisions, torchvisions.parent, root / "raw", root):
        pairs = [(_form(folder, images), _form(folder, labels)) for images, labels in _NAMES]
        forms = [path for pair in pairs for path in pair if path is not None]
        # Compressed files alone, and not all: what a broken download has left.
        leftover = len(forms) < 4 and all(path.suffix == ".gz" for path in forms)
        if not forms or (folder == torchvisions and leftover):
            continue
        paths = [
            (images or folder / names[0], labels or folder / names[1])
            for (images, labels), names in zip(pairs, _NAMES, strict=True)
        ]
        if folder in (root, root / "raw"):
            _refuse_another(name, folder, paths[0][1])
        return paths
    return None


def _form(folder: Path, name: str) -> Path | None:
    """Return the path of a file in whichever form it is there."""
    dotted = name.replace("-idx", ".idx")
    forms = [name, dotted, f"{name}.gz", f"{dotted}.gz", f"{name}/{name}", f"{dotted}/{dotted}"]
    found = [folder / form for form in forms if _exists(folder / form)]
    # A folder of that name is no file, but may hold it.
    return next((path for path in found if path.is_file()), found[0] if found else None)


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return True


def _refuse_another(name: str, folder: Path, labels: Path) -> None:
    """Raise UserError where the files in a folder of the user's are those of another data set."""
    found = _set_of(folder)
    if found is None:
        try:
            first = _content(labels)[8:18]
        except UserError:
            return  # reading the files says what is wrong
        found = next((n for n, begin in _FIRST_LABELS.items() if begin == first), name)
    if found != name:
        use = f"pass --dataset {found}" if found in TITLES else "pass another folder"
        raise UserError(f"{folder} holds {TITLES.get(found, found)}, not {TITLES[name]}: {use}")


def _set_of(folder: Path) -> str | None:
    """Return the data set that the name of a folder says, if any."""
    folder = Path(os.path.abspath(folder))
    text = re.sub("[^a-z]", "", (folder.parent if folder.name == "raw" else folder).name.lower())
    if "fashion" in text:
        return "fashion-mnist"
    return text if text in ("mnist", *_FOREIGN) else None


def read(paths: Paths) -> Iterator[Pair]:
    """Read images, uint8 [N, 28, 28], and labels, uint8 [N], of each set.

    Raises:
        UserError: a file is missing or damaged, or two do not belong together.
    """
    for images_path, labels_path in paths:
        images, labels = _read(images_path, _IMAGES), _read(labels_path, _LABELS)
        count, height, width = images.shape
        if (height, width) != (28, 28) or count == 0:
            raise UserError(
                f"{images_path} holds {count:,} images of {height}x{width} pixels; "
                "at least one image of 28x28 is needed"
            )
        if len(labels) != count:
            raise UserError(
                f"{labels_path} holds {len(labels):,} labels for the {count:,} images of "
                f"{images_path.name}; replace both files by a matching pair"
            )
        if (worst := labels.max()) > 9:
            raise UserError(
                f"{labels_path} is damaged: it holds the label {worst}, but labels are 0 to 9; "
                "replace the file"
            )
        yield images, labels


def _read(path: Path, magic: bytes) -> NDArray[np.uint8]:
    """Return what an IDX file holds; raise UserError unless the file is whole."""
    content = _content(path)
    header_size = 4 + 4 * magic[3]
    if not content.startswith(magic) or len(content) < header_size:
        raise UserError(
            f"{path} is not a whole IDX file: it starts with {content[:4].hex() or 'nothing'}, "
            f"expected {magic.hex()}; replace the file"
        )
    shape = np.frombuffer(content[4:header_size], dtype=">u4").tolist()
    expected = header_size + math.prod(shape)
    if len(content) != expected:
        problem = "truncated" if len(content) < expected else "damaged"
        raise UserError(
            f"{path} is {problem}: it has {len(content):,} bytes where its header announces "
            f"{expected:,}; replace the file"
        )
    # A bytearray, as PyTorch's tensors can be written to.
    return np.frombuffer(content, dtype=np.uint8, offset=header_size).reshape(shape)


def _content(path: Path) -> bytearray:
    try:
        content = path.read_bytes()
        if content.startswith(_GZIP):
            content = gzip.decompress(content)
        return bytearray(content)
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing; add the file, unpacked or as .gz, or remove the others to have "
            "the data set downloaded again"
        ) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path} is a damaged gzip file ({str(error).splitlines()[0]}); replace the file"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
