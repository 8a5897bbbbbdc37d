"""Fixtures for all tests: which instruction set runs, and where MNIST is."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import devices
import emulated
import pytest
import torch

import mnist_ext
from mnist_ext import _autograd, _decision


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
    parser.addoption(
        "--long", action="store_true", help="10,000 steps, 50 threads, 100 kills: make endure"
    )
    parser.addoption("--fuzz-seconds", type=float, default=0, help="run tests/fuzz, for so long")
    parser.addoption(
        "--fuzz-seed",
        type=int,
        help="of tests/fuzz and of the kills (default: another one each time, printed)",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--fuzz-seed") is None:  # pytest-xdist's processes are given this one
        config.option.fuzz_seed = time.time_ns() // 1000 % 2**31


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    reports = [r for kind in ("passed", "failed") for r in terminalreporter.getreports(kind)]
    properties = [value for r in reports for value in r.user_properties]
    calls = sum(count for name, count in properties if name == "fuzzed calls")
    if calls:
        seed = config.getoption("--fuzz-seed")
        terminalreporter.write_line(f"fuzz: {calls:,} calls with --fuzz-seed {seed}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_mnist = pytest.mark.skip(reason="needs MNIST: set MNIST_EXT_DATA to a torchvision root")
    no_gpu = pytest.mark.skip(reason="needs a CUDA device, and there is none")
    items[:] = filter(devices.is_wanted, items)
    for item in items:
        if item.get_closest_marker("mnist") and not os.environ.get("MNIST_EXT_DATA"):
            item.add_marker(no_mnist)
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(no_gpu)


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    """Whether the test is to take minutes."""
    return request.config.getoption("--long")


@pytest.fixture
def emulator():
    """Send CPU tensors to the emulated CUDA kernels."""
    with emulated.kernels():
        yield


@pytest.fixture
def every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the kernels in dtypes too for which PyTorch's own op is the faster one on this CPU."""
    monkeypatch.setattr(_decision, "LINEAR_DTYPES", _decision.DTYPES)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[tuple[Any, ...]]]:
    """Return a function that lists the arguments of each call of an op of _autograd, by name."""

    def record(name: str) -> list[tuple[Any, ...]]:
        calls: list[tuple[Any, ...]] = []
        op = getattr(_autograd, name)
        monkeypatch.setattr(_autograd, name, lambda *args: calls.append(args) or op(*args))
        return calls

    return record


@pytest.fixture(params=["fp32_precision", "allow_tf32", "set_float32_matmul_precision"])
def allow_tf32(request: pytest.FixtureRequest) -> Iterator[Callable[[bool], None]]:
    """Return a function that allows or forbids TF32 products, by each of torch's ways."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield {
        "fp32_precision": lambda yes: setattr(matmul, "fp32_precision", "tf32" if yes else "ieee"),
        "allow_tf32": lambda yes: setattr(matmul, "allow_tf32", yes),
        "set_float32_matmul_precision": (
            lambda yes: torch.set_float32_matmul_precision("high" if yes else "highest")
        ),
    }[request.param]
    matmul.fp32_precision = before


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Let Ctrl-C raise: what a shell starts in the background ignores it, and so would this."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
