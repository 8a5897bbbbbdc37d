"""Loads the compiled libraries, or says what to run where that is not possible.

What calls the ops imports this module, which loads them.
"""

from __future__ import annotations

import re
from types import ModuleType

import torch

OLDEST_TORCH = (2, 10)

# mnist_ext._cuda where it was built and can be loaded, else None and why; load() sets them.
cuda: ModuleType | None = None
cuda_reason = ""


def load() -> None:
    """Import ``mnist_ext._C``, which registers ``torch.ops.mnist_ext``, and ``mnist_ext._cuda``.

    torch comes first: its OpenMP runtime is then in the process already, and ours resolves to it.
    An ImportError (a torch that is too old; not built; cannot be loaded) says what to run.
    """
    found = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if found is None or tuple(map(int, found.groups())) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise ImportError(
            f"mnist_ext needs torch >= {oldest}, found {torch.__version__}: "
            f"run `pip install 'torch>={oldest}'`"
        )
    try:
        from mnist_ext import _C
    except ImportError as error:
        raise ImportError(
            f"mnist_ext: cannot load the compiled library mnist_ext._C ({error}). "
            "If it has not been built, run `pip install .` in the source folder, or `make install` "
            "to work on it; after `pip install .`, start Python outside the source folder (this is "
            f"{__file__})"
        ) from error
    _load_cuda(_C)


def _load_cuda(cpu_library: ModuleType) -> None:
    global cuda, cuda_reason
    if torch.version.cuda is None:
        cuda_reason = "this torch has no CUDA"
        return
    cuda_reason = cpu_library.no_cuda_reason
    if cuda_reason:
        return
    try:
        from mnist_ext import _cuda
    except ImportError as error:
        cuda_reason = f"mnist_ext._cuda cannot be loaded ({error}): build mnist_ext again"
        return
    cuda = _cuda


load()
