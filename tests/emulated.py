"""The CUDA kernels on a CPU: builds them on the emulator of tests/emulator and calls them.

`python tests/emulated.py` builds them, and says how long that took.
"""

import contextlib
import ctypes
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch.utils import cpp_extension

from mnist_ext import _C, _autograd

ROOT = Path(__file__).parents[1]
EMULATOR = ROOT / "tests" / "emulator"
BUILD = ROOT / "build" / "emulator"

MAIN_LOOPS = ("simt", "mma", "wgmma")


@functools.cache
def library() -> ctypes.CDLL:
    """Build, where something changed, and load."""
    folder = BUILD / torch.__version__
    folder.mkdir(parents=True, exist_ok=True)
    path = cpp_extension.load(
        "mnist_ext_emulated",
        [str(EMULATOR / f"{name}.cpp") for name in ("library", "mistakes")],
        # -O1: the kernels are small, and most of the time goes to switching threads.
        extra_cflags=["-std=c++20", "-O1", "-w", "-fvisibility=hidden"],
        extra_include_paths=[str(EMULATOR)],
        build_directory=str(folder),
        with_cuda=False,
        is_python_module=False,
    )
    return ctypes.CDLL(path)


def table_address() -> int:
    """Return the address of the CUDA kernels' KernelTable, for `_C.register_kernels`."""
    function = library().emulator_kernel_table
    function.restype = ctypes.c_void_p
    return function()


def set_seed(seed: int) -> None:
    """Choose the order in which threads and blocks run."""
    library().emulator_set_seed(seed)


def set_device(compute_capability_major: int = 9, multiprocessors: int = 132) -> None:
    """Choose the device that is played; an H200 unless told."""
    library().emulator_set_device(compute_capability_major, multiprocessors)


def refuse_graphs(refuse: bool = True) -> None:
    """Choose whether the driver that is played makes CUDA graphs."""
    library().emulator_refuse_graphs(refuse)


def _always(_: torch.Tensor) -> bool:
    return True


@contextlib.contextmanager
def kernels() -> Iterator[None]:
    """Send CPU tensors to the emulated CUDA kernels, through the same ops."""
    before, reason = _C.active_isa(), _C.active_isa_reason()
    _C.register_kernels("emulated cuda", table_address())
    _C.set_isa("emulated cuda")
    try:
        with mock.patch.object(_autograd, "has_cuda_kernels", _always):  # a Mock is not compiled
            yield
    finally:
        _C.set_isa(before, reason)
        reset()


def reset() -> None:
    """Undo what the three above have chosen."""
    set_seed(0)
    set_device()
    refuse_graphs(False)


def launches() -> int:
    """Count the kernels started so far."""
    return library().emulator_launches()


def graph_launches() -> int:
    """Count the CUDA graphs started so far."""
    return library().emulator_graph_launches()


def bank_conflicts() -> int:
    """Count the bank conflicts of ldmatrix and load_word so far."""
    return library().emulator_bank_conflicts()


def captured(call: Callable[[], object]) -> int:
    """Call while the current stream is being captured; count what it would have started."""
    library().emulator_begin_capture()
    try:
        call()
    finally:
        started = library().emulator_end_capture()
    return started


class Product(ctypes.Structure):
    """mnist_ext::Product, for any dtype."""

    _fields_ = (
        ("M", ctypes.c_int64),
        ("N", ctypes.c_int64),
        ("K", ctypes.c_int64),
        ("a", ctypes.c_void_p),
        ("a_strides", ctypes.c_int64 * 2),
        ("relu_mask", ctypes.c_void_p),
        ("mask_strides", ctypes.c_int64 * 2),
        ("b", ctypes.c_void_p),
        ("b_strides", ctypes.c_int64 * 2),
        ("bias", ctypes.c_void_p),
        ("relu", ctypes.c_int64),
        ("allow_tf32", ctypes.c_int64),
        ("c_mask", ctypes.c_void_p),
        ("c", ctypes.c_void_p),
        ("row_sums", ctypes.c_void_p),
    )


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """Pass a tensor's elements to one of the library's functions."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _product(a, b, mask, bias, relu, tf32, c, sums) -> tuple[bytes, ctypes.Structure]:
    pair = ctypes.c_int64 * 2
    product = Product(
        *(len(a), len(b), a.shape[1]),
        *(pointer(a), pair(*a.stride())),
        *(pointer(mask), pair(*(mask.stride() if mask is not None else (0, 0)))),
        *(pointer(b), pair(*b.stride())),
        *(pointer(bias), relu, tf32, None, pointer(c), pointer(sums)),
    )
    return str(a.dtype).removeprefix("torch.").encode(), product


def product(
    main_loop: str,
    a,
    b,
    mask=None,
    bias=None,
    relu=False,
    row_sums=False,
    c=True,
    c_mask=None,
    a_strides=None,
):
    """Make a [M, K] times b [N, K]^T by this main loop; a_strides: instead of those of a.

    Returns C and the row sums, with what lies around them in memory checked.
    """

    def guarded(*shape):
        size = torch.Size(shape).numel()
        whole = torch.full((size + 32,), torch.nan, dtype=a.dtype)
        return whole, whole[16 : 16 + size].view(shape)

    whole_c, made = guarded(len(a), len(b))
    whole_sums, sums = guarded(len(a))
    wanted = (made if c else None, sums if row_sums else None)
    dtype, arguments = _product(a, b, mask, bias, relu, True, *wanted)
    arguments.c_mask = pointer(c_mask)
    arguments.a_strides = (ctypes.c_int64 * 2)(*(a_strides or a.stride()))
    function = library().emulator_product
    function.restype = ctypes.c_char_p
    error = function(dtype, MAIN_LOOPS.index(main_loop), ctypes.byref(arguments))
    if error is not None:
        raise RuntimeError(error.decode())
    for whole in (whole_c, whole_sums):
        assert torch.cat((whole[:16], whole[-16:])).isnan().all(), "written beyond the result"
    return wanted


def plan(a, b, tf32=False, row_sums=False) -> tuple[str, int, int]:
    """Return the main loop, its tile from small to large, and the splits of K of this product."""
    chosen = (ctypes.c_int * 3)()
    some = torch.empty(1)
    dtype, arguments = _product(a, b, None, None, False, tf32, some, some if row_sums else None)
    library().emulator_plan(dtype, ctypes.byref(arguments), chosen)
    return MAIN_LOOPS[chosen[0]], chosen[1], chosen[2]


def error_of(function: str) -> bytes:
    """Call one of tests/emulator/mistakes.cpp; return what it throws, or nothing."""
    error = library().emulator_error_of
    error.restype = ctypes.c_char_p
    return error(getattr(library(), function)) or b""


if __name__ == "__main__":
    start = time.perf_counter()
    library()
    print(f"{time.perf_counter() - start:.1f} s")
