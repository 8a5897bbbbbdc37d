"""TrainStep.epoch: the steps one after the other, in few native calls."""

import copy
import math
import os
import signal
import threading

import pytest
import torch
from torch import nn
from train_loops import assert_same_bits, assert_same_state, first_batch, pair, twins

from mnist_ext.app.training.models import mlp


@pytest.mark.parametrize("number", [1, 64, 65, 1000])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize(
    ("reduction", "normalize"), [("mean", None), ("sum", None), ("mean", (0.13, 0.3))]
)
def test_is_the_steps_one_after_the_other(number, permuted, reduction, normalize):
    images, labels = first_batch(1000, 100)
    images = images if normalize is None else (images.abs() * 80).to(torch.uint8)
    options = {"loss": {"reduction": reduction}, "sgd": {"momentum": 0.9, "lr": 0.001}}
    epoch, step = twins(mlp((20,), "relu", 100), normalize=normalize, **options)
    order = torch.randperm(1000)[:number] if permuted else torch.arange(number)
    if permuted:
        mean = epoch.epoch(images, labels, 64, order)
    else:
        mean = epoch.epoch(images[:number], labels[:number], 64)
    total = 0.0
    for chosen in order.split(64):
        loss = step(images[chosen], labels[chosen]).item()
        total += loss * (len(chosen) if reduction == "mean" else 1)
    assert_same_state(epoch, step)
    assert mean == pytest.approx(total / number, rel=1e-6)


@pytest.mark.parametrize("cycle_momentum", [False, True])
def test_scheduler(cycle_momentum):
    """Stepped after each batch, whether it moves the momentum or not."""
    images, labels = first_batch(1000, 100)
    epoch, step = twins(mlp((20,), "relu", 100), sgd={"lr": 0.1, "momentum": 0.9})
    first, second = (
        torch.optim.lr_scheduler.OneCycleLR(
            s._optimizer, 0.1, total_steps=40, cycle_momentum=cycle_momentum
        )
        for s in (epoch, step)
    )
    epoch.epoch(images, labels, 32, scheduler=first)
    for x, y in zip(images.split(32), labels.split(32), strict=True):
        step(x, y)
        second.step()
    assert_same_state(epoch, step)
    assert first.last_epoch == second.last_epoch == 32


@pytest.mark.parametrize("at", [1, 2, 7])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ArithmeticError])
@pytest.mark.usefixtures("interruptible")
def test_state_where_the_scheduler_is_interrupted_or_fails(at, error):
    """The batches that it has counted have been trained on, momentum included; no others."""

    class Scheduler:
        steps = 0

        def step(self):
            self.steps += 1
            if self.steps != at:
                return
            if error is KeyboardInterrupt:
                signal.raise_signal(signal.SIGINT)
            else:
                raise error

    images, labels = first_batch(200)
    step, twin = twins(mlp((20,)), sgd={"momentum": 0.9})
    scheduler = Scheduler()
    with pytest.raises(error):
        step.epoch(images, labels, 10, scheduler=scheduler)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    chosen = slice(10 * scheduler.steps)
    twin.epoch(images[chosen], labels[chosen], 10)
    assert_same_state(step, twin)


@pytest.mark.parametrize(
    ("tensor", "bad", "dtype", "message"),
    [
        ("order", -1, torch.int64, "permutation.*300 images, got -1"),
        ("order", 300, torch.int64, "permutation.*300 images, got 300"),
        # The ignore_index, -100, is 156 modulo 256.
        ("labels", 156, torch.uint8, r"labels: .*\[0, 10\).*got 156"),
    ],
)
def test_indices_out_of_range(tensor, bad, dtype, message):
    model = mlp((20,))
    before = copy.deepcopy(model)
    images, labels = first_batch(300)
    given = {"labels": labels, "order": torch.arange(300)}
    given[tensor][-1] = bad
    given[tensor] = given[tensor].to(dtype)
    with pytest.raises(IndexError, match=message):
        pair(model)[0].epoch(images, given["labels"], 64, given["order"])
    assert_same_bits(model, before)


def test_uint8_labels_among_more_classes_than_uint8_has():
    images, labels = first_batch(300, 20, classes=256)
    narrow, wide = twins(nn.Linear(20, 300))
    narrow.epoch(images, labels.to(torch.uint8), 64)
    wide.epoch(images, labels, 64)
    assert_same_bits(narrow._model, wide._model)


def test_batches_larger_than_anything():
    epoch, step = twins(mlp((20,)))
    images, labels = first_batch(10)
    epoch.epoch(images, labels, 2**64)
    step(images, labels)
    assert_same_bits(epoch._model, step._model)


@pytest.mark.cpu_only("an index out of range ends a CUDA kernel: tests/cuda")
def test_the_op_checks_indices_itself():
    step, _ = pair(mlp((20,)))
    images, labels = first_batch(10)
    with pytest.raises(IndexError, match=r"mnist_ext.train_steps: order.*got 10 at position 1"):
        step._run(images, labels, torch.tensor([0, 10]), 2, [0.1])


def test_no_image():
    step, _ = pair(mlp((20,)))
    assert math.isnan(step.epoch(torch.zeros(0, 784), torch.zeros(0, dtype=torch.int64), 64))


def test_wrong_calls():
    step, _ = pair(mlp((20,)))
    images, labels = first_batch(10)
    for arguments, message in (
        ((images, labels, 0), "batch_size: expected an integer of at least 1, got 0"),
        ((images, labels, 2.0), "batch_size: expected an integer of at least 1, got 2.0"),
        ((images, labels[:9], 4), r"labels: expected shape \[10\], got \[9\]"),
        ((images, labels, 4, torch.arange(10).int()), "permutation: expected indices of int64"),
    ):
        with pytest.raises(ValueError, match=message):
            step.epoch(*arguments)
    with pytest.raises(TypeError, match=r"permutation: expected a plain dense.*got list"):
        step.epoch(images, labels, 4, [0, 1])


@pytest.mark.cpu_only("minutes for the emulator")
@pytest.mark.usefixtures("interruptible")
def test_interrupt_comes_between_native_calls():
    """An epoch that would take minutes ends with Ctrl-C; what it did so far is kept."""
    model = mlp((256, 256), "relu")
    step, _ = pair(model, sgd={"lr": 1e-4})
    before = copy.deepcopy(model)
    images, labels = first_batch(1000)
    order = torch.randint(0, 1000, (20_000_000,))
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))

    class Scheduler:  # steps when all indices have been checked and training begins
        steps = 0

        def step(self):
            self.steps += 1
            if self.steps == 1:
                timer.start()

    scheduler = Scheduler()
    with pytest.raises(KeyboardInterrupt):
        step.epoch(images, labels, 64, order, scheduler)
    assert 0 < scheduler.steps < len(order) // 64
    assert not torch.equal(model[1].weight, before[1].weight)
