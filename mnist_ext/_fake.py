"""Shapes and dtypes of the ops without data, for torch.compile and fake or meta tensors."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.register_fake("mnist_ext::linear")
def _(input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


@torch.library.register_fake("mnist_ext::linear_backward")
def _(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    output: Tensor | None,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (
        input.new_empty(input.shape) if need_input else None,
        weight.new_empty(weight.shape) if need_weight else None,
        weight.new_empty(weight.shape[:1]) if need_bias else None,
    )


@torch.library.register_fake("mnist_ext::cross_entropy")
def _(
    logits: Tensor, target: Tensor, ignore_index: int, reduction: int
) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    loss = logits.new_empty((rows,) if reduction == 0 else ())
    return loss, logits.new_empty((2, rows)), logits.new_empty(())


@torch.library.register_fake("mnist_ext::cross_entropy_backward")
def _(
    grad_output: Tensor,
    logits: Tensor,
    target: Tensor,
    stats: Tensor,
    total_weight: Tensor,
    ignore_index: int,
    reduction: int,
) -> Tensor:
    return logits.new_empty(logits.shape)
