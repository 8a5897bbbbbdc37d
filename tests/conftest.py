"""Fixtures for all tests: which instruction set runs, and where MNIST is."""

import os
from pathlib import Path

import emulated
import pytest
import torch
from run_folders import isolate, train_digits

import mnist_ext
from mnist_ext import _C, _decision


def pytest_report_header() -> str:
    info = mnist_ext.build_info()
    return (
        f"mnist_ext {info['version']}, torch {info['torch']} (built with "
        f"{info['torch_built_with']}), instruction sets {', '.join(info['cpu_isa_available'])}, "
        f"{info['openmp_threads']} threads"
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--best-isa", action="store_true", help="run the best instruction set alone, not each"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    # tests/test_cuda*.py run the same tests with an `isa` of their own.
    if "isa" in metafunc.fixturenames and not hasattr(metafunc.module, "isa"):
        isas = _C.available_isas()
        best_alone = metafunc.config.getoption("best_isa")
        metafunc.parametrize("isa", isas[-1:] if best_alone else isas, indirect=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_mnist = pytest.mark.skip(reason="needs MNIST: set MNIST_EXT_DATA to a torchvision root")
    no_gpu = pytest.mark.skip(reason="needs a CUDA device, and there is none")
    for item in items:
        if item.get_closest_marker("mnist") and not os.environ.get("MNIST_EXT_DATA"):
            item.add_marker(no_mnist)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)


@pytest.fixture
def isa(request: pytest.FixtureRequest):
    """Run the test once on each instruction set that this machine has."""
    before, reason = _C.active_isa(), _C.active_isa_reason()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before, reason)


@pytest.fixture
def emulator():
    """Send CPU tensors to the emulated CUDA kernels."""
    with emulated.kernels():
        yield


@pytest.fixture(autouse=True)
def every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the kernels in dtypes too for which PyTorch's own op is the faster one on this CPU."""
    monkeypatch.setattr(_decision, "LINEAR_DTYPES", _decision.DTYPES)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on the embedded digits; to be read only."""
    return train_digits(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder, without the machine's own data, cache, network and colours."""
    isolate(tmp_path, monkeypatch)
