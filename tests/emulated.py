"""The CUDA kernels on a CPU: builds them on the emulator of tests/emulator and calls them.

`python tests/emulated.py` builds them, and says how long that took.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch.utils import cpp_extension

from mnist_ext import _C, _autograd

ROOT = Path(__file__).parents[1]
EMULATOR = ROOT / "tests" / "emulator"
# Another folder, and more flags than ours, where tools/sanitize.py says so.
BUILD = Path(os.environ.get("MNIST_EXT_BUILD", ROOT / "build")) / "emulator"
MORE_FLAGS = os.environ.get("MNIST_EXT_FLAGS", "").split()

MAIN_LOOPS = ("simt", "mma", "wgmma")


@functools.cache
def library() -> ModuleType:
    """Build, where something changed, and load."""
    folder = BUILD / torch.__version__
    folder.mkdir(parents=True, exist_ok=True)
    return cpp_extension.load(
        "mnist_ext_emulated",
        [str(EMULATOR / "library.cpp")],
        # -O1: the kernels are small, and most of the time goes to switching threads.
        extra_cflags=["-std=c++20", "-O1", "-w", "-fvisibility=hidden", *MORE_FLAGS],
        extra_ldflags=MORE_FLAGS,
        extra_include_paths=[str(EMULATOR)],
        build_directory=str(folder),
        with_cuda=False,
    )


def __getattr__(name: str) -> Callable[..., Any]:
    """Of the library: set_seed, set_device, launches and the others that it lists."""
    if name.startswith("_"):  # which Python and hypothesis ask of every module
        raise AttributeError(name)
    return getattr(library(), name)


def _always(_: torch.Tensor) -> bool:
    return True


@contextlib.contextmanager
def kernels() -> Iterator[None]:
    """Send CPU tensors to the emulated CUDA kernels, through the same ops."""
    before, reason = _C.active_isa(), _C.active_isa_reason()
    _C.register_kernels("emulated cuda", library().kernel_table_address())
    _C.set_isa("emulated cuda")
    try:
        with mock.patch.object(_autograd, "has_cuda_kernels", _always):  # a Mock is not compiled
            yield
    finally:
        _C.set_isa(before, reason)
        reset()


def reset() -> None:
    """Choose the usual order, device and driver again."""
    library().set_seed(0)
    library().set_device()
    library().refuse_graphs(False)
    library().fail_captured_launches(False)


def captured(call: Callable[[], object]) -> int:
    """Call while the current stream is being captured; count what it would have started."""
    library().begin_capture()
    try:
        call()
    finally:
        started = library().end_capture()
    return started


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
    arguments = _named(a, b, *wanted, relu_mask=mask, bias=bias, relu=relu, c_mask=c_mask)
    arguments["a_strides"] = a_strides or a.stride()
    library().make(arguments, MAIN_LOOPS.index(main_loop))
    for whole in (whole_c, whole_sums):
        assert torch.cat((whole[:16], whole[-16:])).isnan().all(), "written beyond the result"
    return wanted


def plan(a, b, tf32=False, row_sums=False) -> tuple[str, int, int]:
    """Return the main loop, its tile from small to large, and the splits of K of this product."""
    some = torch.empty(1)
    main_loop, tile, splits = library().plan(
        _named(a, b, some, some if row_sums else None, allow_tf32=tf32)
    )
    return MAIN_LOOPS[main_loop], tile, splits


def _named(a, b, c, row_sums, relu_mask=None, bias=None, relu=False, allow_tf32=True, c_mask=None):
    """Return these arguments by name, as the library takes them."""
    return {"a_strides": a.stride(), **locals()}


if __name__ == "__main__":
    start = time.perf_counter()
    library()
    print(f"{time.perf_counter() - start:.1f} s")
