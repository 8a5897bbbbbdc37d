"""The data sets as whole uint8 tensors, and an iterator over normalized batches of them.

MNIST and Fashion-MNIST are read by torchvision from the first of these folders that holds them:
the one given, ``$MNIST_EXT_DATA``, the cache folder. Where none does, they are downloaded. The
files are checked before torchvision reads them, so that damage is reported by file name.

A much smaller set, 1,797 handwritten digits, is part of the package and always available.
"""

import math
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.datasets import MNIST, FashionMNIST

from mnist_ext.errors import UserError
from mnist_ext.folders import make_folders, remove_folders
from mnist_ext.settings import DATASETS

_TORCHVISION = {"mnist": MNIST, "fashion-mnist": FashionMNIST}
_TITLES = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST"}

# (images, labels) of the training and of the test set, as torchvision names them.
_IDX_FILES = (
    ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
)
# The first four bytes of an IDX file: 0, 0, the element type (8 = uint8), the number of dimensions.
_IDX_IMAGES = bytes([0, 0, 8, 3])
_IDX_LABELS = bytes([0, 0, 8, 1])

# Seconds that one network operation may take. Without a limit an unreachable mirror would block
# for minutes.
_NETWORK_TIMEOUT = 5.0

# The last 360 embedded digits, 20 % of them, are the test set. They are stored in random order.
_DIGITS_TEST_SIZE = 360


class DownloadError(UserError):
    """A data set was found nowhere and could not be downloaded."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images with their labels.

    Attributes:
        images: uint8 [N, 28, 28], contiguous; 0 is the background.
        labels: int64 [N]; class numbers from 0.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.labels)

    def to(self, device: torch.device) -> "Split":
        """Return this split with its tensors on ``device``."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test set.

    Attributes:
        name: ``mnist``, ``fashion-mnist`` or ``digits``.
        source: where the data were read from.
        train: the training set.
        test: the test set.
        mean: mean of the training pixels, on the scale 0 to 1.
        std: standard deviation of the training pixels, on the scale 0 to 1.
        class_names: the name of each class, by class number.
        notice: what a user should know about how this data set was chosen, if anything.
    """

    name: str
    source: str
    train: Split
    test: Split
    mean: float
    std: float
    class_names: tuple[str, ...]
    notice: str | None = None


def load(name: str = "auto", data_dir: str | Path | None = None) -> Dataset:
    """Load a data set.

    Args:
        name: one of ``DATASETS``. ``auto`` is MNIST where it is found or can be downloaded, and
            the embedded digits, with a notice, where it cannot.
        data_dir: a folder in torchvision's layout (``MNIST/raw/...``). It is searched first, and
            a download goes there rather than into the cache folder.

    Raises:
        UserError: the name is unknown, or the files found are incomplete or damaged.
        DownloadError: the data set was found nowhere and could not be downloaded.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: use one of {', '.join(DATASETS)}")
    if name == "digits":
        return _load_digits()
    if name != "auto":
        return _load_mnist(name, data_dir)
    try:
        return _load_mnist("mnist", data_dir)
    except DownloadError as error:
        return _load_digits(notice=f"{error}; using the 1,797 embedded digits instead")


def class_names(name: str) -> tuple[str, ...]:
    """Return the names of the classes of ``mnist``, ``fashion-mnist`` or ``digits``."""
    return tuple(_TORCHVISION.get(name, MNIST).classes)


def find(name: str, data_dir: str | Path | None = None) -> Path | None:
    """Return the folder that ``load`` would read ``name`` from, or None where it would download.

    Args:
        name: ``mnist`` or ``fashion-mnist``.
        data_dir: the folder to search first.

    Raises:
        UserError: the files found are incomplete or damaged.
    """
    for root in _search_folders(data_dir):
        raw = root / _TORCHVISION[name].__name__ / "raw"
        if any(_exists(raw / file) for pair in _IDX_FILES for file in pair):
            for images, labels in _IDX_FILES:
                _check_pair(raw / images, raw / labels)
            return root
    return None


def normalize(images: Tensor, mean: float, std: float) -> Tensor:
    """Scale pixels to mean 0 and standard deviation 1.

    Args:
        images: uint8, any shape.
        mean: mean of the pixels, on the scale 0 to 1.
        std: standard deviation of the pixels, on the scale 0 to 1.

    Returns:
        ``(images / 255 - mean) / std``: float32, the shape of ``images``.
    """
    # One operation instead of a conversion and two more passes over the batch.
    shift = torch.tensor(-mean / std, dtype=torch.float32, device="cpu")
    return torch.add(shift, images, alpha=1 / (255 * std))


def batches(
    split: Split,
    batch_size: int,
    mean: float,
    std: float,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate over all of ``split`` once, in normalized batches; the last one may be smaller.

    Args:
        split: the images and labels, on any device.
        batch_size: images per batch.
        mean: see ``normalize``.
        std: see ``normalize``.
        generator: a CPU generator to draw this pass's order from; None keeps the stored order.

    Yields:
        float32 images [n, 1, 28, 28] and int64 labels [n], on the device of ``split``.
    """
    if generator is None:
        parts = zip(split.images.split(batch_size), split.labels.split(batch_size), strict=True)
        for images, labels in parts:
            yield normalize(images.unsqueeze(1), mean, std), labels
        return
    order = draw_order(split, generator)
    for chosen in order.split(batch_size):
        yield take(split, chosen, mean, std)


def draw_order(split: Split, generator: torch.Generator) -> Tensor:
    """Return the indices of all images, int64 [N], in random order, on the device of ``split``.

    Args:
        split: the images.
        generator: a CPU generator, so that a seed gives the same order on every device.
    """
    order = torch.randperm(len(split), generator=generator, device="cpu")
    return order.to(split.images.device)


def take(split: Split, chosen: Tensor, mean: float, std: float) -> tuple[Tensor, Tensor]:
    """Return the images of one batch, normalized, and their labels.

    Args:
        split: the images and labels, on any device.
        chosen: indices of images, int64 [n], on that device.
        mean: see ``normalize``.
        std: see ``normalize``.

    Returns:
        float32 images [n, 1, 28, 28] and int64 labels [n].
    """
    # Rows of pixels: index_select copies those fastest.
    images = split.images.flatten(1).index_select(0, chosen).view(-1, 1, *split.images.shape[1:])
    return normalize(images, mean, std), split.labels.index_select(0, chosen)


def _load_mnist(name: str, data_dir: str | Path | None) -> Dataset:
    root = find(name, data_dir)
    if root is None:
        root = _download(name, Path(data_dir) if data_dir is not None else _cache_folder())
        find(name, root)
    dataset_class = _TORCHVISION[name]
    try:
        train, test = (dataset_class(root, train=train) for train in (True, False))
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"cannot read {_TITLES[name]} in {root}: {error}") from error
    class_names = tuple(dataset_class.classes)
    for labels, (_, file) in zip((train.targets, test.targets), _IDX_FILES, strict=True):
        if (worst := int(labels.max())) >= len(class_names):
            path = root / dataset_class.__name__ / "raw" / file
            raise UserError(
                f"{path} is damaged: it holds the label {worst}, but labels are 0 to 9; "
                "replace the file"
            )
    return _dataset(
        name,
        source=str(root),
        train=Split(train.data, train.targets),
        test=Split(test.data, test.targets),
        class_names=class_names,
    )


def _load_digits(notice: str | None = None) -> Dataset:
    with (files("mnist_ext") / "assets" / "digits.npz").open("rb") as file:
        stored = np.load(file)
        images = torch.from_numpy(stored["images"])  # uint8 [1797, 8, 8], 0 to 16
        labels = torch.from_numpy(stored["labels"]).to(torch.int64)
    # As in MNIST, a digit fills 20x20 pixels in the middle of a 28x28 image, so that a model
    # trained on one set can be tried on the other.
    large = F.interpolate(images[:, None] * (255 / 16), size=(20, 20), mode="bilinear")
    images = F.pad(large.round().to(torch.uint8), (4, 4, 4, 4)).squeeze(1)
    train_size = len(labels) - _DIGITS_TEST_SIZE
    return _dataset(
        "digits",
        source="the mnist_ext package",
        train=Split(images[:train_size], labels[:train_size]),
        test=Split(images[train_size:], labels[train_size:]),
        class_names=tuple(MNIST.classes),
        notice=notice,
    )


def _dataset(
    name: str,
    source: str,
    train: Split,
    test: Split,
    class_names: tuple[str, ...],
    notice: str | None = None,
) -> Dataset:
    # A histogram gives the exact statistics without a float copy of 47 million pixels.
    counts = torch.bincount(train.images.flatten(), minlength=256).double()
    levels = torch.linspace(0, 1, 256, dtype=torch.float64, device="cpu")
    mean = float(counts @ levels / counts.sum())
    std = float((counts @ (levels - mean).square() / counts.sum()).sqrt())
    if std == 0:
        raise UserError(f"the training images in {source} are blank; replace the files")
    return Dataset(name, source, train, test, mean, std, class_names, notice)


def _search_folders(data_dir: str | Path | None) -> list[Path]:
    given = [] if data_dir is None else [Path(data_dir)]
    configured = os.environ.get("MNIST_EXT_DATA")
    return [*given, *([Path(configured)] if configured else []), _cache_folder()]


def _cache_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "mnist_ext"


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return True


def _check_pair(images: Path, labels: Path) -> None:
    """Raise UserError unless both files are whole and belong together."""
    count, *size = _check_idx(images, _IDX_IMAGES)
    (label_count,) = _check_idx(labels, _IDX_LABELS)
    if size != [28, 28] or count == 0:
        raise UserError(
            f"{images} holds {count:,} images of {size[0]}x{size[1]} pixels; "
            "at least one image of 28x28 is needed"
        )
    if label_count != count:
        raise UserError(
            f"{labels} holds {label_count:,} labels for the {count:,} images of {images.name}; "
            "replace both files by a matching pair"
        )


def _check_idx(path: Path, magic: bytes) -> list[int]:
    """Return the shape an IDX file declares; raise UserError unless the file is that long."""
    dimensions = magic[3]
    header_size = 4 + 4 * dimensions
    try:
        with path.open("rb") as file:
            header = file.read(header_size)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing; add the unpacked file, or remove the folder {path.parent.parent} "
            "to have the data set downloaded again"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if not header.startswith(magic) or len(header) < header_size:
        raise UserError(
            f"{path} is not a whole IDX file: it starts with {header[:4].hex() or 'nothing'}, "
            f"expected {magic.hex()}; replace the file"
        )
    shape = np.frombuffer(header, dtype=">u4", offset=4).tolist()
    expected = header_size + math.prod(shape)
    if size != expected:
        problem = "truncated" if size < expected else "damaged"
        raise UserError(
            f"{path} is {problem}: it has {size:,} bytes where its header announces "
            f"{expected:,}; replace the file"
        )
    return shape


def _download(name: str, root: Path) -> Path:
    """Download a data set into ``root``, all of it or nothing, and return ``root``."""
    dataset_class = _TORCHVISION[name]
    folder = dataset_class.__name__
    created: list[Path] = []
    try:
        created = make_folders(root)
        # Beside its destination, so that the rename stays on one file system.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as partial:
            with _network_timeout(_NETWORK_TIMEOUT):
                dataset_class(partial, download=True)
            try:
                os.rename(Path(partial) / folder, root / folder)
            except OSError:
                # Another process may have been faster.
                if find(name, root) is None:
                    raise
    except (OSError, RuntimeError, EOFError, HTTPException) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip("<>")
        raise DownloadError(
            f"{_TITLES[name]} was not found and could not be downloaded into {root} ({reason}); "
            f"connect to a network, or put the four unpacked files into DIR/{folder}/raw and "
            "pass --data-dir DIR or set MNIST_EXT_DATA=DIR"
        ) from error
    finally:
        # Does nothing when the data set is there now.
        remove_folders(created)
    return root


@contextmanager
def _network_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
