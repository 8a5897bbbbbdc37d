"""What this machine is, and the most it can do: the limits that shares are of."""

import os
import platform
from pathlib import Path

import torch

from mnist_ext.app.bench.timing import take_turns


def cpu_model() -> str:
    """Return the name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def cpus() -> int:
    """Return the number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def matrix_peak(dtype: torch.dtype) -> float:
    """Return the FLOP/s of a large matrix product of PyTorch's, the best of several."""
    size = 2048
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    out = torch.empty(size, size, dtype=dtype)
    times = take_turns({"mm": lambda: torch.mm(a, b, out=out)}, turns=5)
    return 2 * size**3 / min(times.turns["mm"])


def copy_bandwidth() -> float:
    """Return the bytes/s, read and written, of a large copy, the best of several.

    The memory that it writes to is there already.
    """
    source = torch.randn(64 * 2**20)
    target = torch.empty_like(source)
    times = take_turns({"copy": lambda: target.copy_(source)}, turns=5)
    return 2 * source.nbytes / min(times.turns["copy"])
