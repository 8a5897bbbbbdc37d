"""Shapes and dtypes of the ops without data, for torch.compile and fake or meta tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mnist_ext import _flops, _library  # noqa: F401  (_library loads the ops)
from mnist_ext._decision import REDUCTIONS
from mnist_ext._torch_private import check, check_value

_flops.register()


@torch.library.register_fake("mnist_ext::linear")
def _(
    input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool, allow_tf32: bool = False
) -> Tensor:
    _flops.register()
    check(weight.dim() == 2, lambda: "mnist_ext.linear: weight: expected 2 dimensions")
    check(
        input.dim() >= 1 and input.shape[-1] == weight.shape[1],
        lambda: (
            f"mnist_ext.linear: input: expected its last dimension to be in_features of weight "
            f"{list(weight.shape)}, got shape {list(input.shape)}"
        ),
    )
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


@torch.library.register_fake("mnist_ext::linear_backward")
def _(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    output: Tensor | None,
    need_bias: bool,
    allow_tf32: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    out_features = grad_output.shape[-1]
    grad_input = grad_weight = grad_bias = None
    if weight is not None:
        grad_input = grad_output.new_empty((*grad_output.shape[:-1], weight.shape[1]))
    if input is not None:
        grad_weight = grad_output.new_empty((out_features, input.shape[-1]))
    if need_bias:
        grad_bias = grad_output.new_empty((out_features,))
    return grad_input, grad_weight, grad_bias


@torch.library.register_fake("mnist_ext::mlp")
def _(
    input: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    layers: list[int],
    keep_hidden: bool,
    allow_tf32: bool = False,
) -> tuple[Tensor, Tensor]:
    check(0 < len(weights) == len(layers), lambda: "mnist_ext.mlp: weights: expected one per layer")
    features = [weight.shape[0] for weight in weights]
    output = input.new_empty((*input.shape[:-1], features[-1]))
    rows = math.prod(input.shape[:-1]) if keep_hidden else 0
    return output, input.new_empty((rows * sum(features[:-1]),))


@torch.library.register_fake("mnist_ext::mlp_backward")
def _(grad_output: Tensor, input: Tensor, *args: Any) -> list[Tensor]:
    _, _, weights, biases, _, need_input = args[:6]
    grads = [input.new_empty(param.shape) for param in (*weights, *biases)]
    return [input.new_empty(input.shape), *grads] if need_input else grads


def _positions(logits: Tensor, target: Tensor) -> torch.Size:
    check(logits.dim() >= 1, lambda: "mnist_ext.cross_entropy: logits: expected [C] or [N, C, ...]")
    positions = logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else torch.Size()
    expected = logits.shape if target.is_floating_point() else positions
    check_value(
        target.shape == expected,
        lambda: (
            f"mnist_ext.cross_entropy: target: expected shape {list(expected)}, "
            f"got {list(target.shape)}"
        ),
    )
    return positions


def _gradient(logits: Tensor, target: Tensor) -> Tensor:
    if logits.dim() > 2 and not target.is_floating_point():
        classes_last = logits.movedim(1, -1)
        if classes_last.is_contiguous():
            return logits.new_empty(classes_last.shape).movedim(-1, 1)
    return logits.new_empty(logits.shape)


@torch.library.register_fake("mnist_ext::cross_entropy")
def _(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    positions = _positions(logits, target)
    loss = logits.new_empty(positions if options[-1] == REDUCTIONS["none"] else ())
    dtype = torch.float32 if logits.dtype.itemsize == 2 else logits.dtype
    statistics = logits.new_empty((2, *positions), dtype=dtype)
    return loss, statistics, logits.new_empty((), dtype=dtype)


@torch.library.register_fake("mnist_ext::cross_entropy_with_gradient")
def _(logits: Tensor, target: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    _positions(logits, target)
    return logits.new_empty(()), _gradient(logits, target)


@torch.library.register_fake("mnist_ext::cross_entropy_gradient_")
def _(gradient: Tensor, grad_output: Tensor, logits: Tensor, target: Tensor, *_: Any) -> None:
    _positions(logits, target)


@torch.library.register_fake("mnist_ext::cross_entropy_backward")
def _(
    grad_output: Tensor, logits: Tensor, target: Tensor, *options: Any
) -> tuple[Tensor | None, ...]:
    return tuple(_gradient(logits, target) if need else None for need in options[-2:])
