"""The CUDA kernels on a CPU: builds them on the emulator of tests/emulator and calls them.

`python tests/emulated.py` builds them, and says how long that took.
"""

import ctypes
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils import cpp_extension

from mnist_ext import _autograd, optim, train_step

ROOT = Path(__file__).parents[1]
EMULATOR = ROOT / "tests" / "emulator"
BUILD = ROOT / "build" / "emulator"

OPS = (  # that mnist_ext._autograd calls
    "linear",
    "linear_backward",
    "cross_entropy",
    "cross_entropy_with_gradient",
    "cross_entropy_gradient_",
    "cross_entropy_backward",
)


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
            str(EMULATOR / "instructions.cpp"),
            str(EMULATOR / "linear_mma.cpp"),
            str(EMULATOR / "linear_wgmma.cpp"),
            str(EMULATOR / "mistakes.cpp"),
            str(EMULATOR / "train_step_kernels.cpp"),
            str(ROOT / "csrc/ops/cuda/captured_step.cpp"),
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
) -> None:
    """Choose the device that is played; an H200 unless told."""
    library().emulator_set_device(compute_capability_major, shared_kilobytes << 10, multiprocessors)


def set_train_step_graphs(enabled: bool = True) -> None:
    """Choose whether TrainStep may make CUDA graphs, as mnist_ext._cuda does."""
    library().emulator_set_train_step_graphs(enabled)


def linear_plan(rows: int, columns: int, depth: int) -> tuple[str, int]:
    """Return the tile, and the splits of the depth, by which a float32 product is made."""
    plan = library().emulator_linear_plan(*map(ctypes.c_int64, (rows, columns, depth)))
    return ("small", "medium", "large")[plan // 1000], plan % 1000


def linear_product(
    a: torch.Tensor,
    strides: tuple[int, int],
    b: torch.Tensor,
    out: torch.Tensor,
    row_sums: torch.Tensor,
) -> None:
    """Make out = a' @ b.t() and the sums of a's rows; a' begins where a does, with its strides."""
    sizes = map(ctypes.c_int64, (*out.shape, b.shape[1]))
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (a, b, out, row_sums)]
    library().emulator_linear_product(
        *sizes, pointers[0], *map(ctypes.c_int64, strides), *pointers[1:]
    )


def launches() -> int:
    """Count the kernels started so far."""
    return library().emulator_launches()


def graph_launches() -> int:
    """Count the CUDA graphs started so far."""
    return library().emulator_graph_launches()


def refuse_graphs(refuse: bool) -> None:
    """Choose whether the driver that is played makes CUDA graphs."""
    library().emulator_refuse_graphs(refuse)


def captured(call: Callable[[], object]) -> int:
    """Call while the ops' stream is being captured; count what it would have started."""
    library().emulator_begin_capture()
    try:
        call()
    finally:
        started = library().emulator_end_capture()
    return started


class Product(ctypes.Structure):
    """mnist_ext::cuda::Product, for any dtype."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("depth", ctypes.c_int64),
        ("a", ctypes.c_void_p),
        ("a_strides", ctypes.c_int64 * 2),
        ("gate", ctypes.c_void_p),
        ("gate_strides", ctypes.c_int64 * 2),
        ("b", ctypes.c_void_p),
        ("b_strides", ctypes.c_int64 * 2),
        ("bias", ctypes.c_void_p),
        ("relu", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("row_sums", ctypes.c_void_p),
    )


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """Pass a tensor's elements to one of the library's functions."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _product(a, b, gate, bias, relu, out, sums) -> Product:
    pair = ctypes.c_int64 * 2
    return Product(
        *(len(a), len(b), a.shape[1]),
        *(pointer(a), pair(*a.stride())),
        *(pointer(gate), pair(*(gate.stride() if gate is not None else (0, 0)))),
        *(pointer(b), pair(*b.stride())),
        *(pointer(bias), relu, pointer(out), pointer(sums)),
    )


def wgmma_takes(a, b, tf32: bool, row_sums=False) -> bool:
    """Ask whether this float32 product is made by wgmma."""
    out = torch.empty(1)
    takes = library().emulator_wgmma_takes_float32
    takes.restype = ctypes.c_bool
    return takes(
        ctypes.byref(_product(a, b, None, None, False, out, out if row_sums else None)), tf32
    )


def tensor_core_product(kernel: str, a, b, gate=None, bias=None, relu=False, row_sums=False):
    """Call one of the kernels of linear layers: a [rows, depth] times b [columns, depth]^T.

    Returns out and row_sums, with what lies around them in memory checked.
    """

    def guarded(*shape):
        size = torch.Size(shape).numel()
        whole = torch.full((size + 32,), torch.nan, dtype=a.dtype)
        return whole, whole[16 : 16 + size].view(shape)

    whole_out, out = guarded(len(a), len(b))
    whole_sums, sums = guarded(len(a))
    product = _product(a, b, gate, bias, relu, out, sums if row_sums else None)
    function = getattr(library(), f"emulator_{kernel}_{str(a.dtype).removeprefix('torch.')}")
    function.restype = ctypes.c_char_p
    error = function(ctypes.byref(product))
    if error is not None:
        raise RuntimeError(error.decode())
    for whole in (whole_out, whole_sums):
        assert torch.cat((whole[:16], whole[-16:])).isnan().all(), "written beyond the result"
    return out, sums if row_sums else None


def bank_conflicts() -> int:
    """Count the bank conflicts of ldmatrix and load_word so far."""
    return library().emulator_bank_conflicts()


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
        *(mock.patch.object(_autograd, f"_{n}", getattr(ops, n).default) for n in OPS),
        mock.patch.object(_autograd, "_has_cuda_kernels", return_value=True),
        mock.patch.object(optim, "_sgd_step", ops.sgd_step.default),
        mock.patch.object(train_step, "_train_steps", ops.train_steps.default),
        mock.patch.object(train_step, "_new_step_graph", ops.new_step_graph.default),
        mock.patch.object(train_step, "_free_step_graph", ops.free_step_graph.default),
    ]


# For a fixture: the emulated kernels, or those on a GPU, for tensors made without a device.
KERNELS = ["emulated", pytest.param("gpu", marks=pytest.mark.gpu)]


def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test on request.param, one of KERNELS."""
    if request.param == "emulated":
        request.getfixturevalue("emulator")
        yield request.param
        return
    torch.set_default_device("cuda")
    yield request.param
    torch.set_default_device(None)


if __name__ == "__main__":
    start = time.perf_counter()
    library()
    print(f"{time.perf_counter() - start:.1f} s")
