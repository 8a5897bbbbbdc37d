"""The data sets as whole uint8 tensors, and an iterator over normalized batches of them.

MNIST and Fashion-MNIST are read from the first of these folders that holds them: the one given,
``$MNIST_EXT_DATA``, the cache folder. Where none does, torchvision downloads them.

A much smaller set, 1,797 handwritten digits, is part of the package and always available.
"""

import os
import socket
import tempfile
from collections.abc import Iterable, Iterator
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

from mnist_ext.app import UserError
from mnist_ext.app.data import DATASETS, idx_files
from mnist_ext.app.files.folders import make_folders, remove_folders

_TORCHVISION = {"mnist": MNIST, "fashion-mnist": FashionMNIST}

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
        data_dir: a folder that holds the data set, see ``idx_files.locate``. It is searched
            first, and a download goes there rather than into the cache folder. Where it does not
            exist, it is made for a download of a data set that is asked for by name.

    Raises:
        UserError: the name is unknown, ``data_dir`` or ``$MNIST_EXT_DATA`` is no folder, or the
            files found are incomplete or damaged.
        DownloadError: the data set was found nowhere and could not be downloaded.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: use one of {', '.join(DATASETS)}")
    if name == "digits":
        return _load_digits()
    if name == "auto" and data_dir is not None and not _is_folder(Path(data_dir)):
        raise UserError(
            f"there is no folder {data_dir}: correct --data-dir, or pass --dataset mnist, too, to "
            "download MNIST into a new one"
        )
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
        UserError: the files found are incomplete or damaged, or of another data set.
    """
    if (found := _locate(name, _search_folders(data_dir))) is None:
        return None
    root, paths = found
    for _ in idx_files.read(paths):
        pass  # the checks are all that is wanted
    return root


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
    # A folder that was named, and is not there, is to be downloaded to: the same data from
    # elsewhere would hide that its name is misspelt.
    there = data_dir is None or _is_folder(Path(data_dir))
    found = _locate(name, _search_folders(data_dir, strict=True)) if there else None
    if found is None:
        root = _download(name, Path(data_dir) if data_dir is not None else _cache_folder())
        found = _locate(name, [root])
        assert found is not None
    root, paths = found
    train, test = (
        Split(torch.from_numpy(images), torch.from_numpy(labels).to(torch.int64))
        for images, labels in idx_files.read(paths)
    )
    return _dataset(
        name,
        source=os.path.abspath(root),
        train=train,
        test=test,
        class_names=class_names(name),
    )


def _locate(name: str, roots: Iterable[Path]) -> tuple[Path, idx_files.Paths] | None:
    """Return the first folder that holds the data set, with where its files lie."""
    for root in roots:
        if (paths := idx_files.locate(name, root)) is not None:
            return root, paths
    return None


def _load_digits(notice: str | None = None) -> Dataset:
    with (files("mnist_ext.app.data") / "digits.npz").open("rb") as file:
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


def _search_folders(data_dir: str | Path | None, strict: bool = False) -> Iterator[Path]:
    """Yield the folders to look in; where ``strict``, the one configured must be there."""
    if data_dir is not None:
        yield Path(data_dir)
    if configured := os.environ.get("MNIST_EXT_DATA"):
        if strict and not _is_folder(Path(configured)):
            raise UserError(
                f"$MNIST_EXT_DATA is {configured}, and there is no such folder: correct or unset it"
            )
        yield Path(configured)
    yield _cache_folder()


def _is_folder(path: Path) -> bool:
    """Return whether it is one; raise UserError where it is something else."""
    try:
        if path.is_dir():
            return True
        if not path.exists():
            return False
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the folder {str(path)[:100]!r}: {error}") from error
    raise UserError(
        f"{path} is a file; pass the folder that holds the data set, an archive unpacked"
    )


def _cache_folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "mnist_ext"


def _download(name: str, root: Path) -> Path:
    """Download a data set into ``root``, all of it or nothing, and return ``root``."""
    dataset_class = _TORCHVISION[name]
    folder = dataset_class.__name__
    created: list[Path] = []
    try:
        created = make_folders(root / folder)
        # Beside its destination, so that the rename stays on one file system.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as partial:
            with _network_timeout(_NETWORK_TIMEOUT):
                dataset_class(partial, download=True)
            # Another process may have been faster.
            if idx_files.locate(name, root) is None:
                _move(Path(partial) / folder / "raw", root / folder / "raw")
    except (OSError, RuntimeError, EOFError, HTTPException) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip("<>")
        raise DownloadError(
            f"{idx_files.TITLES[name]} was not found and could not be downloaded into {root} "
            f"({reason}); connect to a network, or put the four files into DIR/{folder}/raw and "
            "pass --data-dir DIR or set MNIST_EXT_DATA=DIR"
        ) from error
    finally:
        # Does nothing when the data set is there now.
        remove_folders(created)
    return root


def _move(source: Path, target: Path) -> None:
    """Make ``source`` the folder ``target``, whatever else lies there already."""
    try:
        os.rename(source, target)
    except OSError:
        if not target.is_dir():
            raise
        for file in source.iterdir():
            os.replace(file, target / file.name)


@contextmanager
def _network_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
