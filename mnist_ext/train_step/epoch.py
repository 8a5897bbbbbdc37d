"""Several steps in one native call: which images come when, and what is asked of them."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from mnist_ext._torch_private import count_step
from mnist_ext.train_step.model import refuse
from mnist_ext.train_step.optimizer import learning_rates, read_settings

if TYPE_CHECKING:
    from mnist_ext.train_step import TrainStep

# Signals are seen between native calls. An epoch consists of calls of about this many seconds.
_SECONDS_PER_CALL = 0.03


class Scheduler(Protocol):
    """What `TrainStep.epoch` wants of a learning rate scheduler."""

    def step(self) -> None:
        """Set the optimizer's learning rates for the next step."""


def expect_tensor(name: str, value: Any) -> None:
    """Raise TypeError if value is no plain dense tensor."""
    if type(value) is Tensor and value.layout is torch.strided:
        return
    got = f"one of layout {value.layout}" if type(value) is Tensor else type(value).__name__
    raise TypeError(f"mnist_ext.TrainStep: {name}: expected a plain dense torch.Tensor, got {got}")


def check_indices(
    images: Tensor, labels: Tensor, permutation: Tensor | None, classes: int, ignore_index: int
) -> None:
    """Refuse what is wrong anywhere in the epoch, before its first step."""
    if labels.shape != images.shape[:1]:
        refuse(f"labels: expected shape {[len(images)]}, got {list(labels.shape)}")
    if permutation is not None:
        _check_permutation(permutation, images)
        labels = labels[permutation]
    labels = labels.long()  # a number beyond the labels' own dtype would wrap around
    wrong = (labels < 0) | (labels >= classes)
    wrong &= labels != ignore_index
    if wrong.any():
        raise IndexError(
            f"mnist_ext.TrainStep: labels: expected class indices in [0, {classes}) or "
            f"ignore_index {ignore_index}, got {labels[wrong][0].item()}"
        )


def _check_permutation(permutation: Tensor, images: Tensor) -> None:
    expect_tensor("permutation", permutation)
    if permutation.device != images.device:
        refuse(
            f"permutation: expected a tensor on {images.device}, got one on {permutation.device}"
        )
    if permutation.dtype is not torch.int64 or permutation.dim() != 1:
        refuse(
            "permutation: expected indices of int64 [examples], got "
            f"{permutation.dtype} {list(permutation.shape)}"
        )
    wrong = (permutation < 0) | (permutation >= len(images))
    if wrong.any():
        raise IndexError(
            f"mnist_ext.TrainStep: permutation: expected indices of {len(images)} images, "
            f"got {permutation[wrong][0].item()}"
        )


class Epoch:
    """The examples of an epoch in their order, batch_size to a step; the last may have fewer."""

    def __init__(
        self, images: Tensor, labels: Tensor, permutation: Tensor | None, batch_size: int
    ) -> None:
        self._images, self._labels, self._order = images, labels, permutation
        self.examples = len(images) if permutation is None else len(permutation)
        self.batch_size = min(batch_size, max(self.examples, 1))

    def run(self, step: TrainStep, scheduler: Scheduler | None) -> Iterator[Tensor]:
        """Train; yield the loss of each step of a native call when the call is done."""
        begin, steps = 0, 1
        while begin < self.examples:
            steps = min(steps, -(-(self.examples - begin) // self.batch_size))
            lrs: list[list[float]] = []
            failure: Exception | None = None
            started = time.perf_counter()
            with _interrupts_wait():
                try:
                    lrs.extend(_schedule(step, scheduler, steps))
                except Exception as error:  # of the scheduler, after a batch that it has counted
                    failure = error
                end = min(begin + len(lrs) * self.batch_size, self.examples)
                rates = [rate for of_step in lrs for rate in of_step]
                losses = step._run(*self._examples(begin, end), self.batch_size, rates)
                if losses.is_cuda:
                    torch.cuda.current_stream(losses.device).synchronize()
            if failure is not None:
                raise failure
            steps = max(1, int(_SECONDS_PER_CALL * len(lrs) / (time.perf_counter() - started)))
            begin = end
            step._check()
            yield losses

    def mean_loss(self, step: TrainStep, scheduler: Scheduler | None) -> float:
        """Train; return the mean over the images, NaN if there are none."""
        parts = [*self.run(step, scheduler)]
        if not parts:
            return math.nan
        losses = torch.cat(parts).double()
        if step._criterion.reduction == "mean":
            losses[:-1] *= self.batch_size
            losses[-1] *= self.examples - (len(losses) - 1) * self.batch_size
        return losses.sum().item() / self.examples

    def _examples(self, begin: int, end: int) -> tuple[Tensor, Tensor, Tensor | None]:
        if self._order is None:
            return self._images[begin:end], self._labels[begin:end], None
        return self._images, self._labels, self._order[begin:end]


def _schedule(step: TrainStep, scheduler: Scheduler | None, steps: int) -> Iterator[list[float]]:
    """Yield the learning rates of each of so many steps, or of fewer if another setting changes.

    One native call uses the settings of its first step throughout.
    """
    optimizer = step._optimizer
    settings = read_settings(optimizer)
    for _ in range(steps):
        yield learning_rates(optimizer)
        if scheduler is None:
            continue
        count_step(optimizer)
        scheduler.step()
        if read_settings(optimizer) != settings:
            return


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Let Ctrl-C come at the end: what has been scheduled is trained, and momentum is kept."""
    handler = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if handler is None or not in_main_thread:  # no handler of Python's, or not of this thread's
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)
