"""Small data sets in MNIST's file format, for the tests to read and to damage."""

from pathlib import Path

import numpy as np

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
TRAIN_SIZE, TEST_SIZE = 50, 20


def idx_bytes(array: np.ndarray) -> bytes:
    """Return a uint8 array as the content of an IDX file."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, dtype=">u4").tobytes()
    return header + array.tobytes()


def write_mnist(root: Path, folder: str = "MNIST") -> Path:
    """Write random images and labels below ``root``; return the folder of the four files."""
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for index, size in ((0, TRAIN_SIZE), (2, TEST_SIZE)):
        images = random.integers(0, 256, (size, 28, 28), dtype=np.uint8)
        labels = random.integers(0, 10, size, dtype=np.uint8)
        (raw / FILES[index]).write_bytes(idx_bytes(images))
        (raw / FILES[index + 1]).write_bytes(idx_bytes(labels))
    return raw
