"""The fixture `fuzz`, which makes random examples until the time is up, and counts the calls."""

import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mnist_ext import _C

try:
    import hypothesis
except ImportError:  # it comes with the extra "dev"
    collect_ignore_glob = ["test_*"]


def pytest_ignore_collect(config: pytest.Config) -> bool | None:
    # Not part of `make test`: examples of another seed may find what is no fault of the change.
    return None if config.getoption("--fuzz-seconds") else True


@pytest.fixture
def fuzz(request: pytest.FixtureRequest) -> Callable[[Any, Callable[[Any], int], float], None]:
    """Return a function: check examples of a strategy for a share of --fuzz-seconds.

    check returns how many calls it has compared; what it raises is shrunk and shown.
    """
    seed = request.config.getoption("--fuzz-seed")
    seconds = request.config.getoption("--fuzz-seconds")
    settings = hypothesis.settings(
        max_examples=400,
        phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),  # explaining traces each line
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )

    def run(strategy: Any, check: Callable[[Any], int], share: float) -> None:
        counted = 0
        end = time.monotonic() + share * seconds

        @settings
        @hypothesis.given(strategy)
        def examples(example: Any) -> None:
            nonlocal counted, end
            if time.monotonic() > end:
                return
            try:
                counted += check(example)
            except Exception:
                end = math.inf  # until it is shrunk
                raise

        try:
            # Hypothesis remembers what it has tried: a new start costs less than a long memory.
            for piece in itertools.count(seed * 1_000_000):
                if time.monotonic() > end:
                    break
                hypothesis.seed(piece)(examples)()
        finally:
            request.node.user_properties.append(("fuzzed calls", counted))

    return run


@pytest.fixture(autouse=True)
def best_isa_again():
    """Examples choose among the instruction sets; they are too small for a second thread."""
    before, reason, threads = _C.active_isa(), _C.active_isa_reason(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    _C.set_isa(before, reason)
    torch.set_num_threads(threads)
