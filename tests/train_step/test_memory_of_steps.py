"""Training needs no more memory after thousands of steps than after hundreds, in each way.

10,000 against 100: `make endure`.
"""

import ctypes
import gc
import operator
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from train_loops import batches, ordinary_step

import mnist_ext
from mnist_ext import TrainStep, functional
from mnist_ext.app.training.models import mlp
from mnist_ext.nn import swap

pytestmark = [
    pytest.mark.cpu_only("memory of the CPU"),
    pytest.mark.skipif(
        sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"),
        reason="asks glibc (2.33 or newer) and /proc",
    ),
    pytest.mark.skipif(
        "fsanitize" in os.environ.get("MNIST_EXT_FLAGS", ""), reason="sanitizers keep what is freed"
    ),
]

FEATURES = 100
# The last one of an epoch is smaller: buffers change their sizes at each turn.
SIZES = (64, 64, 17)
IMAGES, LABELS = (tensors[0] for tensors in batches(1, sum(SIZES), FEATURES))
BATCHES = list(zip(IMAGES.split(64), LABELS.split(64), strict=True))


def cycled(step):
    """Take the next batch at each call."""

    def call(i):
        step(*BATCHES[i % len(BATCHES)])

    return call


def of_functions(*shapes):
    """Return parameters, and an optimizer of ours over them."""
    params = [torch.randn(shape).div_(10).requires_grad_() for shape in shapes]
    return params, mnist_ext.optim.SGD(params, lr=0.01, momentum=0.9)


def functional_ops():
    (a, b, c, d), optimizer = of_functions((40, FEATURES), (30, 40), (30,), (10, 30))

    def step(images, labels):
        hidden = functional.linear(images, a, activation="relu")
        logits = functional.mlp(hidden, [(b, c, "relu"), (d, None, "none")])
        optimizer.zero_grad()
        functional.cross_entropy(logits, labels).backward()
        optimizer.step()

    return cycled(step)


def linear_cross_entropy():
    (weight, bias), optimizer = of_functions((300, FEATURES), (300,))

    def step(images, labels):
        optimizer.zero_grad()
        head = {"linear_bias": bias, "z_loss": 1e-4, "return_lse": True}
        loss, _ = functional.linear_cross_entropy(images, weight, labels, **head)
        loss.backward()
        optimizer.step()

    return cycled(step)


def swapped(optimizer):
    model, criterion = swap(mlp((40, 30), "relu", FEATURES)), swap(nn.CrossEntropyLoss())
    sgd = optimizer.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return cycled(lambda images, labels: ordinary_step(model, criterion, sgd, images, labels))


def native_step():
    model = mlp((40, 30), "relu", FEATURES)
    sgd = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return TrainStep(model, nn.CrossEntropyLoss(), sgd)


def native_epochs():
    step, order = native_step(), torch.arange(len(IMAGES)).flip(0)

    def call(i):
        if i % len(BATCHES) == 0:  # as many steps as the others
            step.epoch(IMAGES, LABELS, SIZES[0], order)

    return call


WAYS = {
    "functional ops": functional_ops,
    "linear_cross_entropy": linear_cross_entropy,
    "swapped model": lambda: swapped(torch.optim),
    "swapped model, our SGD": lambda: swapped(mnist_ext.optim),
    "TrainStep": lambda: cycled(native_step()),
    "TrainStep.epoch": native_epochs,
}


class MallocInfo(ctypes.Structure):
    """What glibc's mallinfo2 returns."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def allocated() -> tuple[int, int]:
    """Return the bytes that malloc has given out, and the number of Python's own small pieces."""
    gc.collect()
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = MallocInfo
    info = mallinfo()
    return info.uordblks + info.hblkhd, sys.getallocatedblocks()


def resident() -> tuple[int, int]:
    """Return the bytes in memory, and the most that were since the last call."""
    status = Path("/proc/self/status").read_text()
    sizes = [int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) for name in ("VmRSS", "VmHWM")]
    Path("/proc/self/clear_refs").write_text("5")
    return sizes[0] << 10, sizes[1] << 10


@pytest.fixture(autouse=True)
def nothing_else():
    """Let the garbage collector look at this test's objects alone: all others take a second."""
    threads = torch.get_num_threads()
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


# Pages come and go by the arena of Python's objects (1 MiB) and the free end of malloc's heaps.
PAGES = 2 << 20


@pytest.mark.parametrize("way", WAYS)
def test_memory_does_not_grow_with_the_steps(way, long):
    """Not by half of malloc's least piece (32 bytes), or of Python's, for each call.

    That much is allowed as Python and torch keep a thousand things at most, fewer and fewer of
    them with each step, of which Python 3.12 makes the most.
    """
    call = WAYS[way]()
    first, last = (100, 10_000) if long else (600, 3_000)
    if not long:  # a second thread would be waited for wherever other tests have its core
        torch.set_num_threads(1)
    allocated(), resident()
    for i in range(first):
        call(i)
    before = *allocated(), *resident()
    for i in range(first, last):
        call(i)
    after = *allocated(), *resident()
    print(f"{way}: after {first} steps {before}, after {last} {after}")
    steps = last - first
    calls = steps // len(BATCHES) if way == "TrainStep.epoch" else steps
    allowed = {
        "bytes from malloc": 16 * calls,
        "pieces of Python's": calls // 2,
        "bytes in memory": PAGES,
        "the most of them": PAGES,
    }
    grown = dict(zip(allowed, map(operator.sub, after, before), strict=True))
    assert {name: more for name, more in grown.items() if more >= allowed[name]} == {}
