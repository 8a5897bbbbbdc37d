"""The kernels of the instruction set "amx" on any CPU with AVX-512: their tiles in plain C++."""

import ctypes
import functools
import sys
from pathlib import Path

import emulated
import torch
from torch.utils import cpp_extension

from mnist_ext import _C

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import isa_flags  # noqa: E402

NAME = "model of amx"


@functools.cache
def register() -> str:
    """Build, where something changed, and return what `_C.set_isa` calls it."""
    folder = emulated.BUILD.parent / "amx_model" / torch.__version__
    folder.mkdir(parents=True, exist_ok=True)
    path = cpp_extension.load(
        "mnist_ext_amx_model",
        [
            str(ROOT / "tests/emulator/amx.cpp"),
            str(ROOT / "csrc/cpu/train_steps.cpp"),
            str(ROOT / "csrc/cpu/threads/scratch.cpp"),
        ],
        extra_cflags=[
            "-std=c++20",
            "-O2",
            "-w",
            "-fopenmp",
            "-fvisibility=hidden",
            "-ffp-contract=fast",
            "-DMNIST_EXT_ISA=amx_model",
            "-DMNIST_EXT_AMX",
            *isa_flags.FLAGS["avx512"],
            *emulated.MORE_FLAGS,
        ],
        extra_ldflags=emulated.MORE_FLAGS,
        build_directory=str(folder),
        with_cuda=False,
        is_python_module=False,
    )
    address = ctypes.CDLL(path).amx_model_kernel_table
    address.restype = ctypes.c_void_p
    _C.register_kernels(NAME, address())
    return NAME
