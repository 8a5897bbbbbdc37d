"""What was built, what is in use, and why."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

import mnist_ext._library  # noqa: F401  (before _C: it says what to do where that is missing)
from mnist_ext import _C, _library
from mnist_ext._version import __version__


def openmp_runtimes() -> list[str]:
    """Files of the OpenMP runtimes in this process (Linux; elsewhere an empty list).

    More than one slows every parallel region down: their thread pools fight for the cores.
    """
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return []
    paths = {line.split(maxsplit=5)[-1].strip() for line in maps.read_text().splitlines()}
    return sorted(p for p in paths if Path(p).name.startswith(("libgomp", "libomp", "libiomp")))


def build_info() -> dict[str, Any]:
    """Describe the library and what it runs with, in a dict that JSON can hold.

    Its keys are ``version``, ``python``, ``platform``, ``torch`` (running), ``torch_built_with``,
    ``cpu_isa`` (the instruction set in use), ``cpu_isa_reason``, ``cpu_isa_available``,
    ``openmp_threads``, ``openmp_runtimes`` (files), ``cuda`` (list of architectures built for, or
    None), ``cuda_reason`` and ``next_step`` (None if all is well).
    """
    runtimes = openmp_runtimes()
    cuda = _library.cuda
    next_step = None
    if len(runtimes) > 1:
        next_step = (
            f"{len(runtimes)} OpenMP runtimes are loaded and will slow each other down: "
            "import torch before any other library that brings one"
        )
    return {
        "version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": str(torch.__version__),
        "torch_built_with": _C.torch_built_with,
        "cpu_isa": _C.active_isa(),
        "cpu_isa_reason": _C.active_isa_reason(),
        "cpu_isa_available": _C.available_isas(),
        "openmp_threads": torch.get_num_threads(),
        "openmp_runtimes": runtimes,
        "cuda": cuda.architectures.split(";") if cuda else None,
        "cuda_reason": f"built with CUDA {cuda.toolkit}" if cuda else _library.cuda_reason,
        "next_step": next_step,
    }
