"""Builds mnist_ext._C, and mnist_ext._cuda where torch has CUDA and a compiler for it is found.

Everything static about the package is in pyproject.toml. The libraries use PyTorch through its
stable ABI only, so that binaries built here run on every torch from 2.10 on. CPU kernels are
compiled once per instruction set; the best one that the CPU has is picked at run time. CUDA kernels
are compiled for several architectures; the driver picks one.

MNIST_EXT_CUDA=0 leaves CUDA out. CUDA kernels are for the GPUs that this machine has; where it has
none, or with MNIST_EXT_CUDA_ARCH=all, for all that they know. MNIST_EXT_CUDA_ARCH may also name
architectures: "9.0" or "8.0;9.0".

MNIST_EXT_FLAGS: more flags for the C++ compiler and for the linker, after ours
(tools/sanitize.py).
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools

sys.path.insert(0, str(Path(__file__).parent / "tools"))
import build_requirements

if missing := build_requirements.missing_packages(setuptools.__version__):
    sys.exit(missing)

import cuda_toolkit
import isa_flags
import pybind11
import torch
from setuptools import Extension, setup

CUDA_WANTED, NO_CUDA_REASON = cuda_toolkit.wanted(torch.version.cuda)
TOOLKIT = cuda_toolkit.find(torch.version.cuda) if CUDA_WANTED else None
if CUDA_WANTED and TOOLKIT is None:
    NO_CUDA_REASON = (
        f"no CUDA {torch.version.cuda.split('.')[0]} toolkit was found when mnist_ext was built: "
        "install one, or set CUDA_HOME to it, and build again"
    )
# torch's build tools take these from the environment when they are imported, and guess otherwise.
os.environ.pop("CUDA_HOME", None)
if TOOLKIT:
    os.environ["CUDA_HOME"] = str(TOOLKIT.home)

from torch.utils.cpp_extension import BuildExtension, include_paths, library_paths  # noqa: E402

# Compiled for each instruction set, with flags for it alone: code for one set must not leak into
# another's.
ISA_SOURCE = "csrc/cpu/kernels.cpp"

# The oldest torch that the binary runs on: 2.10, as major << 56 | minor << 48.
TORCH_TARGET_VERSION = "0x020a000000000000"

GPUS = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
ARCHITECTURES = cuda_toolkit.architectures(TOOLKIT.version, GPUS) if TOOLKIT else []

# No fast-math: inf and NaN are part of the contract. Contracting a * b + c is not fast-math.
CXX_FLAGS = ["-std=c++20", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=fast"]
MORE_FLAGS = os.environ.get("MNIST_EXT_FLAGS", "").split()
CXX_FLAGS += MORE_FLAGS
# -Wpsabi warns of vector arguments of functions that are all inlined.
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi"]
# As system headers, so that the warnings are about our code.
INCLUDES = [f"-isystem{path}" for path in (pybind11.get_include(), *include_paths())]
DEPENDS = [str(path) for pattern in ("*.h", "*.cuh") for path in Path("csrc").rglob(pattern)]


def sources(folder: str, pattern: str) -> list[str]:
    return sorted(str(path) for path in Path(folder).glob(pattern))


OP_SOURCES = sources("csrc/ops", "*.cpp")


def cpu_library() -> Extension:
    return Extension(
        "mnist_ext._C",
        sources=[
            "csrc/bindings/cpu.cpp",
            "csrc/cpu/dispatch.cpp",
            "csrc/cpu/train_steps.cpp",
            "csrc/cpu/threads/scratch.cpp",
        ],
        depends=[ISA_SOURCE, *OP_SOURCES, *DEPENDS],
        library_dirs=library_paths(),
        libraries=["torch_cpu", "c10"],
        define_macros=[
            ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
            ("MNIST_EXT_TORCH_VERSION", f'"{torch.__version__}"'),
            ("MNIST_EXT_NO_CUDA_REASON", f'"{NO_CUDA_REASON}"'),
        ],
        extra_compile_args={"cxx": [*CXX_FLAGS, *WARNINGS, *INCLUDES]},
        extra_link_args=["-fopenmp", *MORE_FLAGS],
        language="c++",
    )


CUDA_SOURCES = ["csrc/cuda/table.cu", *sources("csrc/cuda/instantiate", "*.cu")]
TENSOR_CORE_SOURCES = [path for path in CUDA_SOURCES if "tensor_cores" in path]


def nvcc_flags(tensor_cores: bool) -> list[str]:
    code = cuda_toolkit.code_flags(ARCHITECTURES, tensor_cores)
    return ["-std=c++20", "-O3", "-Xcompiler=-fvisibility=hidden", *code]


def cuda_library(toolkit: cuda_toolkit.Toolkit) -> Extension:
    return Extension(
        "mnist_ext._cuda",
        sources=[
            "csrc/bindings/cuda.cpp",
            *(path for path in CUDA_SOURCES if path not in TENSOR_CORE_SOURCES),
        ],
        depends=[*TENSOR_CORE_SOURCES, *DEPENDS],
        # The CUDA runtime is linked in, so that none needs to be found where this runs.
        library_dirs=[*library_paths(), str(toolkit.libraries)],
        libraries=["torch_cuda", "torch_cpu", "c10", "cudart_static", "dl", "rt", "pthread"],
        define_macros=[
            ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
            ("USE_CUDA", "1"),
            ("MNIST_EXT_CUDA_ARCHITECTURES", f'"{";".join(ARCHITECTURES)}"'),
            ("MNIST_EXT_CUDA_TOOLKIT", f'"{toolkit.version}"'),
        ],
        extra_compile_args={
            "cxx": [*CXX_FLAGS, *WARNINGS, *INCLUDES, f"-isystem{toolkit.home / 'include'}"],
            "nvcc": nvcc_flags(tensor_cores=False),
        },
        language="c++",
    )


class BuildWithIsaFlags(BuildExtension):
    """BuildExtension that compiles the CPU's kernels for each instruction set, with its flags.

    And CUDA's tensor cores for their architectures. The ops are compiled once, and linked into each
    library.
    """

    op_objects: list[str] | None = None

    def finalize_options(self) -> None:
        # One folder for setup.py, pip install and pip install -e (whose own is a temporary one):
        # each compiles only what has changed since the last of them.
        if self.build_temp is None:  # not asked for by --build-temp
            self.build_temp = os.path.join("build", "objects", sys.implementation.cache_tag)
        super().finalize_options()

    def build_extensions(self) -> None:
        if missing := build_requirements.missing_compiler():
            sys.exit(missing)
        if TOOLKIT:
            cuda = f"for {', '.join(ARCHITECTURES)}, with CUDA {TOOLKIT.version}"
        else:
            cuda = f"not built: {NO_CUDA_REASON}"
        print(
            f"mnist_ext: building against torch {torch.__version__}; CPU kernels: "
            f"{', '.join(isa_flags.FLAGS)}; CUDA kernels: {cuda}",
            file=sys.stderr,
        )
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "mnist_ext._C":
            # One file each, with flags of its own, which ninja takes for a whole call only.
            def kernels(isa: str) -> list[str]:
                flags = [*isa_flags.FLAGS[isa], f"-DMNIST_EXT_ISA={isa}"]
                return self.objects([ISA_SOURCE], flags, ext.depends, isa)

            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
                for objects in pool.map(kernels, isa_flags.FLAGS):
                    ext.extra_objects += objects
        else:
            ext.extra_objects += self.compiler.compile(
                TENSOR_CORE_SOURCES,
                output_dir=self.build_temp,
                extra_postargs={"cxx": [], "nvcc": nvcc_flags(tensor_cores=True)},
                depends=ext.depends,
            )
        if self.op_objects is None:
            flags = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", *INCLUDES]
            self.op_objects = self.objects(OP_SOURCES, flags, ext.depends)
        ext.extra_objects += self.op_objects
        super().build_extension(ext)

    def objects(
        self, sources: list[str], flags: list[str], depends: list[str], folder: str = ""
    ) -> list[str]:
        flags = [*CXX_FLAGS, *WARNINGS, *flags]
        compiled: list[str] = self.compiler.compile(
            sources,
            output_dir=os.path.join(self.build_temp, folder),
            extra_postargs={"cxx": flags} if self.use_ninja else flags,
            depends=depends,
        )
        return compiled


setup(
    ext_modules=[cpu_library(), *([cuda_library(TOOLKIT)] if TOOLKIT else [])],
    cmdclass={"build_ext": BuildWithIsaFlags},
)
