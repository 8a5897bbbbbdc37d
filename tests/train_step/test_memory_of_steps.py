"""Training needs no more memory after thousands of steps than after a hundred, in each way.

10,000 steps: `make endure`.
"""

import ctypes
import gc
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
    pytest.mark.skipif(sys.platform != "linux", reason="asks glibc and /proc"),
]

WARM_UP = 100
# The last one of an epoch is smaller: buffers change their sizes at each turn.
SIZES = (64, 64, 17)
IMAGES, LABELS = (tensors[0] for tensors in batches(1, sum(SIZES)))
BATCHES = list(zip(IMAGES.split(64), LABELS.split(64), strict=True))


def cycled(step):
    """Take the next batch at each call."""

    def call(i):
        step(*BATCHES[i % len(BATCHES)])

    return call


def of_functions(*shapes):
    """Return parameters, and an optimizer of ours over them."""
    params = [torch.randn(shape).div_(28).requires_grad_() for shape in shapes]
    return params, mnist_ext.optim.SGD(params, lr=0.01, momentum=0.9)


def functional_ops():
    (a, b, c, d), optimizer = of_functions((40, 784), (30, 40), (30,), (10, 30))

    def step(images, labels):
        hidden = functional.linear(images, a, activation="relu")
        logits = functional.mlp(hidden, [(b, c, "relu"), (d, None, "none")])
        optimizer.zero_grad()
        functional.cross_entropy(logits, labels).backward()
        optimizer.step()

    return cycled(step)


def linear_cross_entropy():
    (weight, bias), optimizer = of_functions((300, 784), (300,))

    def step(images, labels):
        optimizer.zero_grad()
        head = {"linear_bias": bias, "z_loss": 1e-4, "return_lse": True}
        loss, _ = functional.linear_cross_entropy(images, weight, labels, **head)
        loss.backward()
        optimizer.step()

    return cycled(step)


def swapped(optimizer):
    model, criterion = swap(mlp((40, 30), "relu")), swap(nn.CrossEntropyLoss())
    sgd = optimizer.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return cycled(lambda images, labels: ordinary_step(model, criterion, sgd, images, labels))


def native_step():
    model = mlp((40, 30), "relu")
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
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def allocated() -> tuple[int, int]:
    """Return the bytes that glibc has given out, and the number of Python's small objects."""
    gc.collect()
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = MallocInfo
    info = mallinfo()
    return info.uordblks + info.hblkhd, sys.getallocatedblocks()


def resident(name: str) -> int:
    """Return the bytes in memory, VmRSS, or the most that were since the peak was reset, VmHWM."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


# Pages come and go in units of their own: an arena of Python's objects is 1 MiB, and malloc gives
# back the end of its heap where 128 KiB are free.
PAGES = 2 << 20


@pytest.mark.parametrize("way", WAYS)
def test_memory_does_not_grow_with_the_steps(way, long):
    """Nothing is kept of a step, nor of an epoch of three: half an object each is too much."""
    call = WAYS[way]()
    steps = 9_900 if long else 240
    allocated()  # what this makes, it makes once
    reset_peak()
    for i in range(WARM_UP):
        call(i)
    bytes_before, objects_before = allocated()
    pages_before, peak_before = resident("VmRSS"), resident("VmHWM")
    reset_peak()
    for i in range(WARM_UP, WARM_UP + steps):
        call(i)
    bytes_after, objects_after = allocated()
    calls = steps // len(BATCHES)
    print(
        f"{way}: after {WARM_UP} and {WARM_UP + steps} steps: {bytes_before:,} and {bytes_after:,} bytes from malloc, "
        f"{objects_before:,} and {objects_after:,} objects of Python, {pages_before >> 10:,} and "
        f"{resident('VmRSS') >> 10:,} KiB resident, peaks of {peak_before >> 10:,} and {resident('VmHWM') >> 10:,} KiB"
    )
    assert bytes_after - bytes_before < 16 * calls  # malloc's smallest piece has 32 bytes
    assert objects_after - objects_before < calls / 2
    assert resident("VmRSS") - pages_before < PAGES
    assert resident("VmHWM") - peak_before < PAGES
