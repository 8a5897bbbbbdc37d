"""Builds mnist_ext._C. Everything static about the package is in pyproject.toml.

The library uses PyTorch through its stable ABI only, so that a binary built here runs on every
torch from 2.10 on. Kernels are compiled once per instruction set; the best one that the CPU has is
picked at run time.
"""

import platform
import sys
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths

KERNELS = Path("csrc/kernels/cpu")

# The oldest torch that the binary runs on: 2.10, as major << 56 | minor << 48.
TORCH_TARGET_VERSION = "0x020a000000000000"

# Each kernels_<isa>.cpp, with the flags for it alone: code for one instruction set must not leak
# into another's.
ISA_FLAGS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA_FLAGS["avx512"] = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"]

# No fast-math: inf and NaN are part of the contract. Contracting a * b + c is not fast-math.
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=fast"]
# -Wpsabi warns of vector arguments of functions that are all inlined.
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi"]
# As system headers, so that the warnings are about our code.
INCLUDES = [f"-isystem{path}" for path in (pybind11.get_include(), *include_paths())]


def isa_source(isa: str) -> str:
    return str(KERNELS / f"kernels_{isa}.cpp")


class BuildWithIsaFlags(BuildExtension):
    """BuildExtension that compiles each kernels_<isa>.cpp with its instruction set's flags."""

    def build_extension(self, ext: Extension) -> None:
        print(
            f"mnist_ext: building the CPU library alone ({', '.join(ISA_FLAGS)}) against torch "
            f"{torch.__version__}: this version has no CUDA kernels",
            file=sys.stderr,
        )
        for isa, flags in ISA_FLAGS.items():
            flags = [*CXX_FLAGS, *WARNINGS, *flags]
            ext.extra_objects += self.compiler.compile(
                [isa_source(isa)],
                output_dir=self.build_temp,
                extra_postargs={"cxx": flags} if self.use_ninja else flags,
                depends=ext.depends,
            )
        super().build_extension(ext)


setup(
    ext_modules=[
        Extension(
            "mnist_ext._C",
            sources=[
                *sorted(str(path) for path in Path("csrc/ops").glob("*.cpp")),
                str(KERNELS / "dispatch.cpp"),
                str(KERNELS / "scratch.cpp"),
            ],
            depends=[*map(isa_source, ISA_FLAGS), *map(str, Path("csrc").rglob("*.h"))],
            library_dirs=library_paths(),
            libraries=["torch_cpu", "c10"],
            define_macros=[
                ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
                ("MNIST_EXT_TORCH_VERSION", f'"{torch.__version__}"'),
            ],
            extra_compile_args={"cxx": [*CXX_FLAGS, *WARNINGS, *INCLUDES]},
            extra_link_args=["-fopenmp"],
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildWithIsaFlags},
)
