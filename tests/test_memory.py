"""Where the memory of large results comes from."""

import re
from pathlib import Path

import pytest
import torch

from mnist_ext import functional

SMAPS = Path("/proc/self/smaps")


def flags_at(address: int) -> list[str]:
    """Return the kernel's flags of the mapping that the address lies in."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no mapping at {address:#x}")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without huge pages"
)
def test_large_results_ask_for_huge_pages():
    """Small ones do not: their memory is shared with what others allocate."""
    for rows, expected in ((2**16, True), (2**8, False)):
        logits = torch.zeros(rows, 128, requires_grad=True)
        functional.cross_entropy(logits, torch.zeros(rows, dtype=torch.int64)).backward()
        middle = logits.grad.data_ptr() + logits.grad.nbytes // 2
        assert ("hg" in flags_at(middle)) == expected
