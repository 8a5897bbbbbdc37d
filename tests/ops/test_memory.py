"""Where the memory of large results comes from."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu_only("memory of the CPU")

# In a process of its own: elsewhere so much may be free already that the allocator maps nothing.
SCRIPT = """
import re
import torch
from mnist_ext import functional

def flags_at(address):
    "The kernel's flags of the mapping that the address lies in."
    inside = False
    for line in open("/proc/self/smaps"):
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no mapping at {address:#x}")

for rows in (2**16, 2**8):
    logits = torch.zeros(rows, 128, requires_grad=True)
    functional.cross_entropy(logits, torch.zeros(rows, dtype=torch.int64)).backward()
    print("hg" in flags_at(logits.grad.data_ptr() + logits.grad.nbytes // 2))
"""


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without huge pages"
)
def test_large_results_ask_for_huge_pages():
    """Small ones do not: their memory is shared with what others allocate."""
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True", "False"]
