"""What the benchmarks time, ours and others': training loops and the products of a layer."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_ext import TrainStep, optim
from mnist_ext.nn import swap

LEARNING_RATE = 0.01


class Loop:
    """The ordinary training loop over batches in memory.

    Args:
        parameters: what it trains.
        loss: maps a batch of images and its labels to the loss.
        optimizer: the class of the optimizer.
        images: [batches, n, ...].
        labels: [batches, n].
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        loss: Callable[[Tensor, Tensor], Tensor],
        optimizer: type[torch.optim.Optimizer],
        images: Tensor,
        labels: Tensor,
    ) -> None:
        self._loss = loss
        self._batches = list(zip(images, labels, strict=True))
        self._optimizer: Any = optimizer(parameters, lr=LEARNING_RATE)  # type: ignore[call-arg]

    def run(self, steps: int) -> list[Tensor]:
        """Train for so many steps and return their losses."""
        losses = []
        for step in range(steps):
            images, labels = self._batches[step % len(self._batches)]
            self._optimizer.zero_grad()
            loss = self._loss(images, labels)
            loss.backward()
            self._optimizer.step()
            losses.append(loss.detach())
        return losses


def loop(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    ours: bool,
    compiled: Mapping[str, Any] | None = None,
) -> Loop:
    """Return the loop over a copy of ``model``.

    Args:
        model: maps images to logits.
        images: [batches, n, ...].
        labels: [batches, n].
        ours: after ``mnist_ext.nn.swap``, with ``mnist_ext.optim.SGD``; else all is PyTorch's.
        compiled: options of ``torch.compile``; None leaves it out.
    """
    model, criterion = copy.deepcopy(model), nn.CrossEntropyLoss()
    if ours:
        model, criterion = swap(model), swap(criterion)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return criterion(model(x), y)

    function = loss if compiled is None else torch.compile(loss, **compiled)
    sgd = optim.SGD if ours else torch.optim.SGD
    return Loop(list(model.parameters()), function, sgd, images, labels)


class OneCall:
    """The same with ``TrainStep`` over a copy of the model.

    Args:
        model: maps images to logits.
        images: [batches, n, ...].
        labels: [batches, n].
        epoch: one native call for many steps; else one for each.
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, epoch: bool) -> None:
        model = copy.deepcopy(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        self._step = TrainStep(model, nn.CrossEntropyLoss(), optimizer)
        self._batches = list(zip(images, labels, strict=True))
        self._images, self._labels = images.flatten(0, 1), labels.flatten()
        self._epoch = epoch

    def run(self, steps: int) -> list[Tensor] | list[float]:
        """Train and return the losses of the steps, or the mean loss of each pass over all."""
        number = len(self._batches)
        if not self._epoch:
            return [self._step(*self._batches[i % number]) for i in range(steps)]
        size = len(self._labels) // number
        means = []
        while steps > 0:
            images = min(steps, number) * size
            means.append(self._step.epoch(self._images[:images], self._labels[:images], size))
            steps -= number
        return means


def step_arithmetic(batch_size: int) -> float:
    """Return the FLOP of a training step of 784-128-64-10: no gradient of the images."""
    weights = [784 * 128, 128 * 64, 64 * 10]
    return 2.0 * batch_size * (3 * sum(weights) - weights[0])


def relative_error(found: Tensor, true: Tensor) -> float:
    """Return the largest difference, as a share of the largest true value."""
    scale = true.double().abs().max().clamp_min(1e-30)
    return ((found.double() - true.double()).abs().max() / scale).item()


# Ours, PyTorch's, and the tensors to call either with.
Product = tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]


def linear_products(rows: int, k: int, n: int, dtype: torch.dtype) -> dict[str, Product]:
    """Return the three products of a linear layer from k to n features, as ops, by name."""
    op = torch.ops.mnist_ext
    forward, backward = op.linear.default, op.linear_backward.default
    input = torch.randn(rows, k, dtype=dtype)
    weight = torch.randn(n, k, dtype=dtype) / k**0.5
    bias, grad = torch.randn(n, dtype=dtype), torch.randn(rows, n, dtype=dtype)
    return {
        "forward": (lambda i, w, b: forward(i, w, b, False), F.linear, (input, weight, bias)),
        "grad_input": (
            lambda g, w: backward(g, None, w, None, False)[0],
            lambda g, w: g @ w,
            (grad, weight),
        ),
        "grad_weight + grad_bias": (
            lambda g, i: backward(g, i, None, None, True)[1:],
            lambda g, i: (g.t() @ i, g.sum(0)),
            (grad, input),
        ),
    }
