"""Where the memory of large results comes from, and that nothing beyond a tensor is touched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mnist_ext import _C

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


PEAK = """
import resource, sys, torch
from mnist_ext import functional

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

torch.set_num_threads(2)
rows, features, classes = map(int, sys.argv[1:4])
options = {"softcap": 30.0, "z_loss": 1e-4} if "extended" in sys.argv else {}
input, weight = (torch.randn(n, features, requires_grad=True) for n in (rows, classes))
input.grad, weight.grad = torch.ones_like(input), torch.ones_like(weight)  # what remains
target = torch.randint(0, classes, (rows,))
functional.linear_cross_entropy(input[:1], weight[:9], target[:1] % 9).backward()
input.grad = weight.grad = None
spare = torch.ones_like(weight), torch.ones_like(input)
before = peak()
del spare
functional.linear_cross_entropy(input, weight, target, **options).backward()
print((peak() - before) >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks for the peak in KiB")
@pytest.mark.parametrize(
    "shape",
    [
        (4096, 16, 128256),
        (8192, 64, 16000),
        (256, 256, 128256),
        (4096, 16, 128256, "extended"),
    ],
)
def test_logits_are_never_in_memory(shape):
    """Of 2.1 GB at most, and as much for their gradient, at most 32 MiB.

    All but the second by blocks of classes; benchmarks/head_memory.py prints larger shapes.
    """
    command = [sys.executable, "-c", PEAK, *map(str, shape)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(run.stdout) <= 32


OUT_OF_MEMORY = """
import resource, sys, torch, mnist_ext
op = torch.ops.mnist_ext
x, weights = torch.randn(140, 200), [torch.randn(100, 200), torch.randn(9, 100)]
head = x, torch.randn(5000, 200), torch.zeros(140, dtype=torch.int64)  # 2.8 MB of logits
call = {
    "linear": lambda: op.linear(x, weights[0], None, False),  # outer products, which pack
    "mlp": lambda: op.mlp(x, weights, [], [2, 0], True),
    "linear_cross_entropy": lambda: mnist_ext.functional.linear_cross_entropy(*head),
}[sys.argv[1]]
torch.set_num_threads(2)
op.linear(torch.randn(64, 2000), torch.randn(1000, 2000), None, False)  # starts the threads
if sys.argv[1] == "mlp":
    torch.set_num_threads(1)
    call()  # this thread has its memory: the other, without, must not be waited for
    torch.set_num_threads(2)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 65536, resource.getrlimit(resource.RLIMIT_AS)[1]))
try:
    call()
except (MemoryError, RuntimeError) as error:
    print(type(error).__name__)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
@pytest.mark.parametrize("op", ["linear", "mlp", "linear_cross_entropy"])
def test_running_out_of_memory_in_a_parallel_region_is_a_memory_error(op):
    # Not in the checkout, whose mnist_ext would come before the installed one.
    command = [sys.executable, "-c", OUT_OF_MEMORY, op]
    process = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=60)
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "MemoryError"


@pytest.fixture(scope="module")
def guard_pages(tmp_path_factory):
    library = tmp_path_factory.mktemp("guard_pages") / "guard_pages.so"
    source = Path(__file__).with_name("guard_pages.c")
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", source, "-o", library], check=True)
    return library


@pytest.mark.skipif(sys.platform != "linux", reason="an allocator in place of glibc's")
@pytest.mark.parametrize("isa", _C.available_isas())
def test_nothing_beyond_a_tensor_is_read_or_written(isa, guard_pages):
    """Nor beyond scratch memory: all of them end, then begin, at an unmapped page."""
    command = [sys.executable, Path(__file__).with_name("guard_pages.py"), isa]
    environment = {**os.environ, "LD_PRELOAD": str(guard_pages)}
    process = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert process.returncode == 0, "\n".join(process.stderr.splitlines()[-30:])
