"""
Builds mnist_ext._C. Everything static about the package is in pyproject.toml.

The library uses PyTorch through its stable ABI only, so that a binary built here runs on every torch from 2.10 on.
Kernels are compiled once per instruction set; the best one is picked at run time.
"""

import os
import platform
import sys
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

ROOT = Path(__file__).parent
KERNELS = Path("csrc/kernels/cpu")

# The oldest torch that the binary runs on: 2.10, as major << 56 | minor << 48.
TORCH_TARGET_VERSION = "0x020a000000000000"

# Each file kernels_<isa>.cpp, and the flags for it alone: code of one instruction set must not leak into another's.
ISA_FLAGS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma"]
    ISA_FLAGS["avx512"] = [
        *ISA_FLAGS["avx2"],
        *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"),
    ]

# No fast-math: inf and NaN are part of the contract. Contracting a * b + c to one fused operation is not fast-math.
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=fast"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi"]


def isa_source(isa: str) -> str:
    return str(KERNELS / f"kernels_{isa}.cpp")


class BuildWithIsaFlags(BuildExtension):
    """BuildExtension that compiles each kernels_<isa>.cpp with the flags of its instruction set."""

    def build_extension(self, ext: Extension) -> None:
        print(
            "mnist_ext: building the CPU library for "
            + ", ".join(ISA_FLAGS)
            + f" against torch {torch.__version__}; no CUDA library: this version has no CUDA kernels",
            file=sys.stderr,
        )
        for isa, flags in ISA_FLAGS.items():
            arguments = [*ext.extra_compile_args["cxx"], *flags]
            ext.extra_objects += self.compiler.compile(
                [isa_source(isa)],
                output_dir=self.build_temp,
                include_dirs=[str(ROOT)],
                extra_postargs={"cxx": arguments, "nvcc": []} if self.use_ninja else arguments,
                depends=ext.depends,
            )
        super().build_extension(ext)


extension = Extension(
    "mnist_ext._C",
    sources=[
        *sorted(str(path) for path in Path("csrc/ops").glob("*.cpp")),
        str(KERNELS / "dispatch.cpp"),
        str(KERNELS / "scratch.cpp"),
    ],
    depends=[isa_source(isa) for isa in ISA_FLAGS]
    + [str(path) for path in Path("csrc").rglob("*.h")],
    include_dirs=[pybind11.get_include(), *include_paths()],
    library_dirs=library_paths(),
    libraries=["torch_cpu", "c10"],
    define_macros=[
        ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
        ("MNIST_EXT_TORCH_VERSION", f'"{torch.__version__}"'),
    ],
    extra_compile_args={"cxx": [*CXX_FLAGS, *WARNINGS]},
    extra_link_args=["-fopenmp"],
    language="c++",
)

os.environ.setdefault(
    "MAX_JOBS",
    str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1),
)

setup(ext_modules=[extension], cmdclass={"build_ext": BuildWithIsaFlags})
