"""linear under autocast by the CUDA kernels: on the emulator everywhere, and on a GPU.

The tests of the CPU kernels once more, imported: their fixture `device` is another one here.
"""

import emulated
import pytest
from test_autocast import TestLinear  # noqa: F401


@pytest.fixture(params=emulated.KERNELS)
def device(request):
    """Run the test on CUDA kernels; give the device type that their tensors have."""
    for kernels in emulated.kernels(request):
        yield "cuda" if kernels == "gpu" else "cpu"
