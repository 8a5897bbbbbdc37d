"""Finds the CUDA toolkit that fits a torch; setup.py and the build backend ask."""

from __future__ import annotations

import glob
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Toolkit:
    """A folder with bin/nvcc and include/cuda.h, and its version, such as "13.0"."""

    home: Path
    version: str

    @property
    def libraries(self) -> Path:
        """The folder of the static runtime."""
        folders = [self.home / name for name in ("lib64", "lib", "targets/x86_64-linux/lib")]
        return next((f for f in folders if (f / "libcudart_static.a").exists()), folders[0])


def wanted(torch_cuda: str | None) -> tuple[bool, str]:
    """Return whether to build CUDA kernels, and why not; torch_cuda is torch.version.cuda."""
    if os.environ.get("MNIST_EXT_CUDA", "").strip() == "0":
        return False, "MNIST_EXT_CUDA=0 left them out when mnist_ext was built"
    if torch_cuda is None:
        return False, "mnist_ext was built with a torch without CUDA"
    return True, ""


def find(torch_cuda: str) -> Toolkit | None:
    """Find the first toolkit of torch's major version (a minor one may differ)."""
    major = torch_cuda.split(".")[0]
    for home in _homes(major):
        toolkit = _at(home)
        if toolkit is not None and toolkit.version.split(".")[0] == major:
            return toolkit
    return None


def requirements(torch_cuda: str) -> list[str]:
    """Name what brings a compiler from PyPI; there is none before CUDA 13."""
    if int(torch_cuda.split(".")[0]) < 13:
        return []
    version = ".".join(torch_cuda.split(".")[:2])
    packages = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime")
    return [f"{package}=={version}.*" for package in packages]


def architectures(toolkit_version: str, gpus: Sequence[tuple[int, int]] = ()) -> list[str]:
    """Name the compute capabilities to compile for, the newest last; gpus: of those that are here.

    All: A100, H100 and H200; B200 and RTX 50 where the toolkit knows them. A GPU of the same major
    number runs the code of the one before it, and a newer one compiles the last one's for itself.
    """
    asked = os.environ.get("MNIST_EXT_CUDA_ARCH", "").strip()
    if asked and asked != "all":
        try:
            return sorted(asked.split(";"), key=_numbers)
        except ValueError:
            raise SystemExit(
                "MNIST_EXT_CUDA_ARCH: expected all, or compute capabilities such as 8.0;9.0, got "
                f"{asked!r}"
            ) from None
    blackwell = _numbers(toolkit_version) >= (12, 8)
    known = ["8.0", "9.0", *(["10.0", "12.0"] if blackwell else [])]
    majors = {major for major, _ in gpus}
    here = [name for name in known if _numbers(name)[0] in majors]
    return here if here and not asked else known


def code_flags(architectures: Sequence[str], tensor_cores: bool) -> list[str]:
    """Return what nvcc is to make of the kernels of tensor cores, or of all others.

    Its front end, half of its time, makes a pass for each arch, from which the assembler makes code
    for several GPUs: the passes are those for which kernels differ. wgmma, the H100's and H200's
    own instruction of tensor cores, is in 9.0a alone; mma.sync is the same from 8.0 on. Clusters of
    blocks, which other kernels use, exist from 9.0 on. No later GPU runs code for 9.0a: the PTX,
    which is for those, is of another pass.
    """
    flags = []
    for number in (name.replace(".", "") for name in architectures):
        if not tensor_cores:
            flags.append((min(int(number) // 10 * 10, 90), f"sm_{number}"))
        elif number != "90":
            flags.append((80, f"sm_{number}"))
    newest = 80 if tensor_cores else flags[-1][0]
    flags.append((newest, f"compute_{newest}"))
    if tensor_cores and "9.0" in architectures:
        flags.append(("90a", "sm_90a"))
    return [f"-gencode=arch=compute_{arch},code={code}" for arch, code in flags]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _homes(major: str) -> Iterator[Path]:
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            yield Path(os.environ[name])
    if (home := _home_of_compiler()) is not None:
        yield home
    yield from map(Path, sorted(glob.glob("/usr/local/cuda*"), reverse=True))
    yield from (Path(folder) / "nvidia" / f"cu{major}" for folder in sys.path)


def _home_of_compiler() -> Path | None:
    """Ask the nvcc on PATH, which may be a script somewhere else, where its toolkit is."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    process = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
    found = re.search(r"^#\$ TOP=(.+)$", process.stderr, re.MULTILINE)
    return Path(found[1].strip()).resolve() if found else None


def _at(home: Path) -> Toolkit | None:
    headers = home / "include"
    needed = (home / "bin" / "nvcc", headers / "cuda.h", headers / "cuda_runtime.h")
    if not all(path.exists() for path in needed):
        return None
    found = re.search(r"#define CUDA_VERSION (\d+)", (headers / "cuda.h").read_text())
    if found is None:
        return None
    number = int(found[1])
    return Toolkit(home, f"{number // 1000}.{number % 1000 // 10}")
