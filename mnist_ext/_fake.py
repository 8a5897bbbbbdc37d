"""What the ops would return and cost, without data: from shapes.

The first for torch.compile and fake or meta tensors, the second, as ``torch.utils.flop_counter``
counts its own: 2 for each multiply-add of a product.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import register_fake

from mnist_ext import _library  # noqa: F401  (loads the ops)
from mnist_ext._decision import REDUCTIONS
from mnist_ext._torch_private import check, check_value

_Shape = Sequence[int]


@register_fake("mnist_ext::linear")
def _(input: Tensor, weight: Tensor, *_: Any) -> Tensor:
    register_flops()
    check(weight.dim() == 2, lambda: "mnist_ext.linear: weight: expected 2 dimensions")
    check(
        input.dim() >= 1 and input.shape[-1] == weight.shape[1],
        lambda: (
            f"mnist_ext.linear: input: expected its last dimension to be in_features of weight "
            f"{list(weight.shape)}, got shape {list(input.shape)}"
        ),
    )
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


@register_fake("mnist_ext::linear_backward")
def _(
    grad_output: Tensor, input: Tensor | None, weight: Tensor | None, *args: Any
) -> tuple[Tensor | None, ...]:
    _, need_bias, *_ = args
    *rows, outputs = grad_output.shape
    new = grad_output.new_empty
    return (
        None if weight is None else new((*rows, weight.shape[1])),
        None if input is None else new((outputs, input.shape[-1])),
        new((outputs,)) if need_bias else None,
    )


@register_fake("mnist_ext::mlp")
def _(input: Tensor, weights: list[Tensor], *args: Any) -> tuple[Tensor, Tensor]:
    _, layers, keep_hidden, *_ = args
    check(0 < len(weights) == len(layers), lambda: "mnist_ext.mlp: weights: expected one per layer")
    features = [weight.shape[0] for weight in weights]
    output = input.new_empty((*input.shape[:-1], features[-1]))
    rows = math.prod(input.shape[:-1]) if keep_hidden else 0
    return output, input.new_empty((rows * sum(features[:-1]),))


@register_fake("mnist_ext::mlp_backward")
def _(grad_output: Tensor, input: Tensor, *args: Any) -> list[Tensor]:
    _, _, weights, biases, _, need_input, *_ = args
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


@register_fake("mnist_ext::cross_entropy")
def _(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    positions = _positions(logits, target)
    loss = logits.new_empty(positions if options[-1] == REDUCTIONS["none"] else ())
    dtype = torch.float32 if logits.dtype.itemsize == 2 else logits.dtype
    statistics = logits.new_empty((2, *positions), dtype=dtype)
    return loss, statistics, logits.new_empty((), dtype=dtype)


@register_fake("mnist_ext::cross_entropy_with_gradient")
def _(logits: Tensor, target: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    _positions(logits, target)
    return logits.new_empty(()), _gradient(logits, target)


@register_fake("mnist_ext::cross_entropy_gradient_")
def _(gradient: Tensor, grad_output: Tensor, logits: Tensor, target: Tensor, *_: Any) -> None:
    _positions(logits, target)


@register_fake("mnist_ext::cross_entropy_backward")
def _(_: Tensor, logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor | None, ...]:
    return tuple(_gradient(logits, target) if need else None for need in options[-2:])


@register_fake("mnist_ext::linear_cross_entropy")
def _(
    input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None, target: Tensor, *args: Any
) -> tuple[Tensor | None, ...]:
    *_, reduction, grad_output, need_input, need_weight, need_bias = args[:8]
    need_lse = len(args) > 11 and args[11]
    positions = (*input.shape[:-1], *linear_weight.shape[1:-1])
    loss = input.new_empty(positions if reduction == REDUCTIONS["none"] else ())
    wanted = zip(
        (input, linear_weight, linear_bias), (need_input, need_weight, need_bias), strict=True
    )
    return (
        loss if grad_output is None else None,
        *(t.new_empty(t.shape) if t is not None and want else None for t, want in wanted),
        input.new_empty(positions) if need_lse else None,
    )


def _flops(input: _Shape, *weights: _Shape) -> int:
    """Count those of the products of input with each of weights."""
    return sum(2 * math.prod(input[:-1]) * math.prod(weight) for weight in weights)


def _mlp_backward_flops(*args: Any, **_: Any) -> int:
    input, weights, need_input = args[1], args[4], args[7]
    return _flops(input, *weights, *(weights if need_input else weights[1:]))


def _linear_cross_entropy_flops(*args: Any, **_: Any) -> int:
    input, weight, need_input, need_weight = args[0], args[1], args[9], args[10]
    return _flops(input, *[weight] * (1 + need_input + need_weight))


def _train_steps_flops(*args: Any, **_: Any) -> int:
    images, order, params = args[1], args[3], args[6]
    weights = [shape for shape in params if len(shape) == 2]
    return _flops((*(order or images[:1]), 0), *weights, *weights, *weights[1:])


# Called on the arguments of the ops, a shape for a tensor, and out_val.
_FORMULAS = {
    "linear": lambda input, weight, *_, **__: _flops(input, weight),
    "linear_backward": lambda grad, input, weight, *_, **__: _flops(
        grad, *[(grad[-1], t[-1]) for t in (input, weight) if t is not None]
    ),
    "mlp": lambda input, weights, *_, **__: _flops(input, *weights),
    "mlp_backward": _mlp_backward_flops,
    "linear_cross_entropy": _linear_cross_entropy_flops,
    "train_steps": _train_steps_flops,
}


def register_flops() -> None:
    """Register the formulas, if anybody has imported torch.utils.flop_counter.

    That takes longer to import than all of ours. Asked wherever the ops get into a program anew: on
    import, by `nn.swap`, and when torch.compile asks for the shapes of an op.
    """
    flop_counter = sys.modules.get("torch.utils.flop_counter")
    if flop_counter is None or not hasattr(flop_counter, "register_flop_formula"):
        return
    for name, formula in _FORMULAS.items():
        op = getattr(torch.ops.mnist_ext, name)
        if op not in flop_counter.flop_registry:
            flop_counter.register_flop_formula(op)(formula)


register_flops()
