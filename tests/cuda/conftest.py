"""Fixtures of the tests that are CUDA's alone."""

import pytest


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Return where to put tensors; those on the CPU go to the emulated CUDA kernels."""
    if request.param == "cpu":
        request.getfixturevalue("emulator")
    return request.param
