"""The fixture `device`: each test of tests/ops and tests/train_step runs on several devices.

Those are the CPU, the CUDA kernels on the emulator of tests/emulator, and a GPU where there is one.
A test that names the fixture runs on each instruction set of the CPU; the others on the best one.
"""

import contextlib
import inspect
from collections.abc import Iterator

import emulated
import pytest
import torch

from mnist_ext import _C

EMULATED = "emulated cuda"


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
    """Run the kernels of an instruction set, the emulated CUDA kernels, or those of a GPU."""
    if name == EMULATED:
        with emulated.kernels():
            yield
    elif name == "cuda":
        with torch.device("cuda"):  # where tensors are made
            yield
    else:
        before, reason = _C.active_isa(), _C.active_isa_reason()
        _C.set_isa(name)
        try:
            yield
        finally:
            _C.set_isa(before, reason)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = _C.available_isas()
    if "amx" in names:  # the kernels of AVX-512, but for large products: tests/cpu
        names.remove("amx")
    each = "device" in inspect.signature(metafunc.function).parameters
    if not each or metafunc.config.getoption("best_isa"):
        names = names[-1:]
    names.append(EMULATED)
    if torch.cuda.is_available():
        names.append(pytest.param("cuda", marks=pytest.mark.gpu))
    metafunc.parametrize("device", names, indirect=True)


def is_wanted(item: pytest.Item) -> bool:
    """Return whether this test, or set of parameters, concerns the device that it would run on."""
    name = item.callspec.params.get("device", "") if hasattr(item, "callspec") else ""
    return "cuda" not in name or item.get_closest_marker("cpu_only") is None


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Return whose kernels run: an instruction set, "emulated cuda" or "cuda"."""
    with use(request.param):
        yield request.param
