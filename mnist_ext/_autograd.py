"""The ops as ``torch.autograd.Function``s.

All take the ``forward(ctx, ...)`` form: with a separate ``setup_context`` a call costs five times
as much. What that form cannot do (torch.func transforms) ``functional`` sends to PyTorch's own ops.
A backward that is itself recorded (``create_graph=True``) is built from PyTorch's ops, so that it
can be differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

_ops = torch.ops.mnist_ext
# The overloads, looked up once: a packet resolves its overload on every call.
_linear = _ops.linear.default
_linear_backward = _ops.linear_backward.default
_mlp = _ops.mlp.default
_mlp_backward = _ops.mlp_backward.default
_cross_entropy = _ops.cross_entropy.default
_cross_entropy_with_gradient = _ops.cross_entropy_with_gradient.default
_cross_entropy_backward = _ops.cross_entropy_backward.default
# On a device that the host must not wait for: this op decides there.
_cross_entropy_gradient_ = _ops.cross_entropy_gradient_.default


def _host_may_read(tensor: Tensor) -> bool:
    return tensor.is_cpu


# Looked up once, too.
_is_grad_enabled = torch.is_grad_enabled
_are_transforms_active = torch._C._are_functorch_transforms_active
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_is_compiling = torch.compiler.is_dynamo_compiling


# torch.backends.cuda.matmul.fp32_precision: unlike the older allow_tf32 it can be read whichever of
# the two was set.
_fp32_precision = torch._C._get_fp32_precision_getter


# The compiler takes the answer as a constant: what it compiled is guarded by this very setting.
@torch.compiler.assume_constant_result
def _is_tf32_allowed() -> bool:
    return _fp32_precision("cuda", "matmul") == "tf32"


def _may_use_tf32(tensor: Tensor) -> bool:
    # Asked before every product, as PyTorch does: the setting of the moment counts.
    return tensor.is_cuda and _is_tf32_allowed()


def _is_recorded() -> bool:
    # A backward that is itself recorded, or run by vmap for many grad_outputs at once, must consist
    # of PyTorch's own ops.
    return _is_grad_enabled() or _are_transforms_active()


class Linear(Function):
    """``relu(input @ weight.T + bias)``, or without relu."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool
    ) -> Tensor:
        """Shapes: input [..., K], weight [N, K], bias [N] or None; returns [..., N]."""
        output = _linear(input, weight, bias, relu, _may_use_tf32(input))
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
        arguments = grad_output, *ctx.saved_tensors, ctx.needs_input_grad[2]
        if _is_recorded():
            return *_linear_backward_differentiable(*arguments), None
        return *_linear_backward(*arguments, _may_use_tf32(grad_output)), None


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


BIAS, RELU = 1, 2  # of a layer, as the ops take it


class MLP(Function):
    """Linear layers one after the other: what `Linear` computes for each of them, in one call."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layers: list[int], *params: Tensor) -> Tensor:
        """Shapes: input [..., K]; params, which all need a gradient: see the op; returns [..., N].

        layers: for each BIAS, RELU, both or neither.
        """
        output, hidden = _mlp(input, params, layers)
        ctx.layers = layers
        ctx.save_for_backward(input, hidden, output if layers[-1] & RELU else None, *params)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of input, if it is needed, and of all params."""
        input, hidden, output, *params = ctx.saved_tensors
        need_input = ctx.needs_input_grad[0]
        arguments = grad_output, input, hidden, output, params, ctx.layers, need_input
        if _is_recorded():
            grads = _mlp_backward_by_layer(_linear_backward_differentiable, *arguments)
        elif _is_batched(grad_output):  # by is_grads_batched=True, which takes no op with a list
            grads = _mlp_backward_by_layer(_linear_backward, *arguments)
        else:
            grads = _mlp_backward(*arguments)
        return (grads[0], None, *grads[1:]) if need_input else (None, None, *grads)


def _mlp_backward_by_layer(
    linear_backward: Callable[..., tuple[Tensor | None, ...]],
    grad_output: Tensor,
    input: Tensor,
    hidden: Tensor,
    output: Tensor | None,
    params: list[Tensor],
    layers: list[int],
    need_input: bool,
) -> list[Tensor | None]:
    # What lies between the layers is no input of the Function: it is computed again from what is.
    # Where ReLU let nothing through in the forward, which may round differently, it does not here.
    given = iter(params)
    inputs, weights = [input], []
    outputs: list[Tensor | None] = []
    rows, begin = input.shape[:-1], 0
    for layer in layers:
        weights.append(next(given))
        product = F.linear(inputs[-1], weights[-1], next(given) if layer & BIAS else None)
        end = begin + product.numel()
        is_last = len(weights) == len(layers)
        kept = output if is_last else hidden[begin:end].view(*rows, product.shape[-1])
        outputs.append(kept if layer & RELU else None)
        inputs.append(product if outputs[-1] is None else torch.where(outputs[-1] <= 0, 0, product))
        begin = end
    grads: list[Tensor | None] = []
    grad: Any = grad_output
    for i in reversed(range(len(layers))):
        weight = weights[i] if i > 0 or need_input else None
        needs_bias = bool(layers[i] & BIAS)
        grad, *of_params = linear_backward(grad, inputs[i], weight, outputs[i], needs_bias)
        grads[:0] = of_params if needs_bias else of_params[:1]
    return [grad, *grads] if need_input else grads


class CrossEntropy(Function):
    """Softmax cross-entropy of logits against class indices or probabilities.

    The gradient of a mean or a sum is known but for a factor, grad_output, which nearly always is
    1: it is formed in the forward, while the logits are in the cache, and handed over to the first
    backward. A second one, of a retained graph, computes it again from the logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        reduction: int,
    ) -> Tensor:
        """Shapes: see `functional.cross_entropy`."""
        options = ignore_index, label_smoothing, reduction
        needs = ctx.needs_input_grad
        if (
            needs[0]
            and not needs[1]
            and reduction != 0
            # float16 would underflow before grad_output, a loss scale, can prevent it.
            and logits.dtype is not torch.float16
            and not _is_compiling()
        ):
            loss, gradient = _cross_entropy_with_gradient(logits, target, weight, *options)
            ctx.options, ctx.gradient = options, gradient
            ctx.save_for_backward(logits, target, weight)
            return loss
        loss, stats, total_weight = _cross_entropy(logits, target, weight, *options)
        ctx.options, ctx.gradient = options, None
        ctx.save_for_backward(logits, target, weight, stats, total_weight)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of logits and probabilities that are needed, None for the rest."""
        if _is_recorded():
            grads = _cross_entropy_backward_differentiable(
                grad_output, *ctx.saved_tensors[:3], *ctx.options, *ctx.needs_input_grad[:2]
            )
            return *grads, None, None, None, None
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None or not _can_be_scaled(gradient, grad_output):
            return *_cross_entropy_gradients(ctx, grad_output), None, None, None, None
        return _scaled(ctx, gradient, grad_output), None, None, None, None, None


def _can_be_scaled(gradient: Tensor, grad_output: Tensor) -> bool:
    if _is_batched(grad_output):
        return False
    if gradient.dtype is not torch.bfloat16 or not _host_may_read(gradient):
        return True
    return grad_output.item() == 1  # else rounded twice


def _scaled(ctx: Any, gradient: Tensor, grad_output: Tensor) -> Tensor:
    if not _host_may_read(gradient):
        _cross_entropy_gradient_(gradient, grad_output, *ctx.saved_tensors[:3], *ctx.options)
        return gradient
    return gradient if grad_output.item() == 1 else gradient.mul_(grad_output)


def _cross_entropy_gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None]:
    logits, target, weight, *statistics = ctx.saved_tensors
    if not statistics:  # the forward formed the gradient, which a backward has taken
        if _can_be_scaled(logits, grad_output):
            _, gradient = _cross_entropy_with_gradient(logits, target, weight, *ctx.options)
            return _scaled(ctx, gradient, grad_output), None
        _, *statistics = _cross_entropy(logits, target, weight, *ctx.options)
    return _cross_entropy_backward(
        grad_output,
        logits,
        target,
        weight,
        *statistics,
        *ctx.options,
        *ctx.needs_input_grad[:2],
    )


def _cross_entropy_backward_differentiable(
    grad_output: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
    need_logits: bool,
    need_target: bool,
) -> tuple[Tensor | None, Tensor | None]:
    if target.dtype in (torch.int32, torch.uint8):  # PyTorch's op takes only int64 throughout
        target = target.long()
    wanted = [t for t, need in ((logits, need_logits), (target, need_target)) if need]
    with torch.enable_grad():
        loss = torch.ops.aten.cross_entropy_loss(
            logits, target, weight, reduction, ignore_index, label_smoothing
        )
    recorded = torch.is_grad_enabled()
    grads = iter(torch.autograd.grad(loss, wanted, grad_output, create_graph=recorded))
    return next(grads) if need_logits else None, next(grads) if need_target else None
