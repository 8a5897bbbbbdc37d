"""The ops as ``torch.autograd.Function``s.

Both take the ``forward(ctx, ...)`` form: with a separate ``setup_context`` a call costs five times
as much. What that form cannot do (torch.func transforms) ``functional`` sends to PyTorch's own ops.
A backward that is itself recorded (``create_graph=True``) is built from PyTorch's ops, so that it
can be differentiated again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

_ops = torch.ops.mnist_ext
# The overloads, looked up once: a packet resolves its overload on every call.
_linear = _ops.linear.default
_linear_backward = _ops.linear_backward.default
_cross_entropy = _ops.cross_entropy.default
_cross_entropy_backward = _ops.cross_entropy_backward.default


class Linear(Function):
    """``relu(input @ weight.T + bias)``, or without relu."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool
    ) -> Tensor:
        """Shapes: input [..., K], weight [N, K], bias [N] or None; returns [..., N]."""
        output = _linear(input, weight, bias, relu)
        need_input, need_weight = ctx.needs_input_grad[:2]  # type: ignore[attr-defined]
        ctx.save_for_backward(
            input if need_weight else None,  # type: ignore[arg-type]
            weight if need_input else None,  # type: ignore[arg-type]
            output if relu else None,  # type: ignore[arg-type]
        )
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients that are needed, None for the others."""
        recorded = torch.is_grad_enabled()
        op: Any = _linear_backward_differentiable if recorded else _linear_backward
        return *op(grad_output, *ctx.saved_tensors, ctx.needs_input_grad[2]), None


def _linear_backward_differentiable(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    output: Tensor | None,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if output is not None:
        grad_output = torch.where(output <= 0, 0, grad_output)
    rows = _as_matrix(grad_output)
    return (
        grad_output @ weight if weight is not None else None,
        rows.mT @ _as_matrix(input) if input is not None else None,
        rows.sum(0) if need_bias else None,
    )


def _as_matrix(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor.unsqueeze(0)


class CrossEntropy(Function):
    """Softmax cross-entropy of [N, C] logits against class indices."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, logits: Tensor, target: Tensor, ignore_index: int, reduction: int
    ) -> Tensor:
        """Shapes: logits [N, C], target [N]; returns [] or, for reduction 0 (none), [N]."""
        loss, stats, total_weight = _cross_entropy(logits, target, ignore_index, reduction)
        ctx.save_for_backward(logits, target, stats, total_weight)
        ctx.ignore_index = ignore_index  # type: ignore[attr-defined]
        ctx.reduction = reduction  # type: ignore[attr-defined]
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the logits, [N, C], and None for the rest."""
        logits, target, stats, total_weight = ctx.saved_tensors
        if torch.is_grad_enabled():
            (grad,) = torch.autograd.grad(
                torch.ops.aten.cross_entropy_loss(
                    logits, target, None, ctx.reduction, ctx.ignore_index
                ),
                logits,
                grad_output,
                create_graph=True,
            )
        else:
            grad = _cross_entropy_backward(
                grad_output, logits, target, stats, total_weight, ctx.ignore_index, ctx.reduction
            )
        return grad, None, None, None
