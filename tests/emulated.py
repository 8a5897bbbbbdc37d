"""The CUDA kernels on a CPU: builds them on the emulator of tests/emulator and calls them.

`python tests/emulated.py` builds them, and says how long that took.
"""

import ctypes
import functools
import time
from pathlib import Path
from unittest import mock

import torch
from torch.utils import cpp_extension

from mnist_ext import _autograd, optim, train_step

ROOT = Path(__file__).parents[1]
EMULATOR = ROOT / "tests" / "emulator"
BUILD = ROOT / "build" / "emulator"

CROSS_ENTROPY = (
    "cross_entropy",
    "cross_entropy_with_gradient",
    "cross_entropy_gradient_",
    "cross_entropy_backward",
)
LINEAR = ("linear", "linear_backward")


@functools.cache
def library() -> ctypes.CDLL:
    """Build, where something changed, and load; registers torch.ops.mnist_ext_emulated."""
    folder = BUILD / torch.__version__
    folder.mkdir(parents=True, exist_ok=True)
    path = cpp_extension.load(
        "mnist_ext_emulated",
        [
            str(EMULATOR / "kernels.cpp"),
            str(EMULATOR / "library.cpp"),
            str(EMULATOR / "mistakes.cpp"),
            str(EMULATOR / "train_step_kernels.cpp"),
            str(ROOT / "csrc/ops/cuda/cross_entropy.cpp"),
            str(ROOT / "csrc/ops/cuda/linear.cpp"),
            str(ROOT / "csrc/ops/cuda/sgd.cpp"),
            str(ROOT / "csrc/ops/cuda/train_step.cpp"),
        ],
        # -O1: the kernels are small, and most of the time goes to switching threads.
        extra_cflags=["-std=c++20", "-O1", "-w", "-DTORCH_TARGET_VERSION=0x020a000000000000"],
        extra_include_paths=[str(EMULATOR)],
        build_directory=str(folder),
        with_cuda=False,
        is_python_module=False,
    )
    return ctypes.CDLL(path)


def set_seed(seed: int) -> None:
    """Choose the order in which threads and blocks run."""
    library().emulator_set_seed(seed)


def set_device(
    compute_capability_major: int = 9,
    shared_kilobytes: int = 227,
    multiprocessors: int = 132,
    largest_cluster: int = 8,
) -> None:
    """Choose the device that is played; an H200 unless told, with clusters of at most 8 blocks."""
    library().emulator_set_largest_cluster(largest_cluster)
    library().emulator_set_device(compute_capability_major, shared_kilobytes << 10, multiprocessors)


def linear_plan(rows: int, columns: int, depth: int) -> tuple[str, int]:
    """Return the tile, and the splits of the depth, by which a float32 product is made."""
    plan = library().emulator_linear_plan(*map(ctypes.c_int64, (rows, columns, depth)))
    return ("small", "medium", "large")[plan // 1000], plan % 1000


def launches() -> int:
    """Count the kernels started so far."""
    return library().emulator_launches()


def error_of(function: str) -> bytes:
    """Call one of tests/emulator/mistakes.cpp; return what it throws, or nothing."""
    error = library().emulator_error_of
    error.restype = ctypes.c_char_p
    return error(getattr(library(), function))


def patches() -> list:
    """Make mnist_ext run its CUDA kernels on the emulator, for CPU tensors."""
    library()
    ops = torch.ops.mnist_ext_emulated
    return [
        *(
            mock.patch.object(_autograd, f"_{n}", getattr(ops, n).default)
            for n in (*CROSS_ENTROPY, *LINEAR)
        ),
        mock.patch.object(_autograd, "_host_may_read", return_value=False),
        mock.patch.object(optim, "_sgd_step", ops.sgd_step.default),
        mock.patch.object(train_step, "_train_steps", ops.train_steps.default),
    ]


if __name__ == "__main__":
    start = time.perf_counter()
    library()
    print(f"{time.perf_counter() - start:.1f} s")
