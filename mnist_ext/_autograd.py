"""The fused ops with their gradients, as ``torch.autograd.Function``s.

`linear`, `mlp` and `cross_entropy` call the op itself where no gradient is wanted, so that nothing
is kept. The Functions take the ``forward(ctx, ...)`` form: with a separate ``setup_context`` a call
costs five times as much. What that form cannot do (torch.func transforms) ``functional`` sends to
PyTorch's own ops. A backward that is itself recorded (``create_graph=True``) is built from
PyTorch's ops, so that it can be differentiated again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from mnist_ext import _torch_private
from mnist_ext._torch_private import is_batched, is_compiling

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

_is_grad_enabled = torch.is_grad_enabled


def _host_may_read(tensor: Tensor) -> bool:
    return tensor.is_cpu


# The compiler takes the answer as a constant: what it compiled is guarded by this very setting.
@_torch_private.constant_when_compiled
def _is_tf32_allowed() -> bool:
    return _torch_private.fp32_precision("cuda", "matmul") == "tf32"


def _may_use_tf32(tensor: Tensor) -> bool:
    # Asked before every product, as PyTorch does: the setting of the moment counts.
    return tensor.is_cuda and _is_tf32_allowed()


def _is_recorded() -> bool:
    # A backward that is itself recorded, or run by vmap for many grad_outputs at once, must consist
    # of PyTorch's own ops.
    return _is_grad_enabled() or _torch_private.are_transforms_active()


def _wanted(ctx: Any) -> Sequence[bool]:
    """Return for each input whether this backward is to make its gradient.

    ``torch.autograd.grad(loss, input)`` wants no gradient of a parameter, though all need one.
    """
    needs: Sequence[bool] = ctx.needs_input_grad
    if is_compiling():  # compiled autograd has no graph to ask
        return needs
    nodes = (node for node, _ in ctx.next_functions if node is not None)
    return [need and _torch_private.will_execute(next(nodes)) for need in needs]


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """Compute ``relu(input @ weight.T + bias)``, or without relu.

    Shapes: input [..., K], weight [N, K], bias [N] or None; returns [..., N].
    """
    if _is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return Linear.apply(input, weight, bias, relu)
    return _linear(input, weight, bias, relu, _may_use_tf32(input))


class Linear(Function):
    """`linear` where a gradient is wanted."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
        """Keep what the backward reads, and nothing else."""
        output = _linear(input, weight, bias, relu, _may_use_tf32(input))
        need_input, need_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(
            input if need_weight else None,
            weight if need_input else None,
            output if relu else None,
        )
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients that are wanted, None for the others."""
        want_input, want_weight, want_bias, _ = _wanted(ctx)
        input, weight, output = ctx.saved_tensors
        return *_linear_gradients(
            grad_output,
            input if want_weight else None,
            weight if want_input else None,
            output,
            want_bias,
        ), None


def _linear_gradients(
    grad_output: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    output: Tensor | None,
    want_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As the op `linear_backward`, and differentiable where the backward is recorded."""
    if not _is_recorded():
        return _linear_backward(
            grad_output, input, weight, output, want_bias, _may_use_tf32(grad_output)
        )
    if output is not None:
        grad_output = torch.where(output <= 0, 0, grad_output)
    rows = _as_matrix(grad_output)
    return (
        grad_output @ weight if weight is not None else None,
        rows.mT @ _as_matrix(input) if input is not None else None,
        rows.sum(0) if want_bias else None,
    )


def _as_matrix(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor.unsqueeze(0)


BIAS, RELU = 1, 2  # of a layer, as the ops take it


def mlp(input: Tensor, layers: list[int], params: list[Tensor]) -> Tensor:
    """Compute linear layers one after the other: what `linear` computes for each, in one call.

    Shapes: input [..., K]; returns [..., N] of the last layer.

    Args:
        input: of float32 or float64, on the CPU.
        layers: for each BIAS, RELU, both or neither.
        params: the weight of each layer, followed by its bias where it has one; either all need a
            gradient, or neither they nor input do.
    """
    if _is_grad_enabled() and params[0].requires_grad:
        return MLP.apply(input, layers, *params)
    return _mlp(input, params, layers, False)[0]


class MLP(Function):
    """`mlp` where the gradients of all params are wanted."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layers: list[int], *params: Tensor) -> Tensor:
        """Keep what the backward reads: not the biases, and the first weight only for input."""
        output, hidden = _mlp(input, params, layers, True)
        need_input = ctx.needs_input_grad[0]
        # The others are held without being watched: their values do not matter, and a change of
        # them is none of the backward's business.
        read = [p.dim() == 2 and (i > 0 or need_input) for i, p in enumerate(params)]
        ctx.layers = layers
        ctx.unread = [None if is_read else p for p, is_read in zip(params, read, strict=True)]
        ctx.save_for_backward(
            input,
            hidden,
            output if layers[-1] & RELU else None,
            *[p for p, is_read in zip(params, read, strict=True) if is_read],
        )
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of input and params that are wanted, None for the others."""
        want_input, _, *want_params = _wanted(ctx)
        input, hidden, output, *read = ctx.saved_tensors
        values = iter(read)
        params = [next(values) if p is None else p for p in ctx.unread]
        if (
            _is_recorded()
            or not all(want_params)
            or (not is_compiling() and is_batched(grad_output))
        ):
            grads = _mlp_gradients_by_layer(
                grad_output, input, hidden, output, params, ctx.layers, want_input, want_params
            )
            return grads[0], None, *grads[1:]
        grads = _mlp_backward(grad_output, input, hidden, output, params, ctx.layers, want_input)
        return (grads[0], None, *grads[1:]) if want_input else (None, None, *grads)


def _mlp_gradients_by_layer(
    grad_output: Tensor,
    input: Tensor,
    hidden: Tensor,
    output: Tensor | None,
    params: list[Tensor],
    layers: list[int],
    want_input: bool,
    want_params: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of input and params that are wanted, None for the others.

    For a backward that is recorded, for one that vmap runs (the op takes a list, which vmap does
    not), and for one that wants some gradients only, which ends at the first layer of these.
    """
    given = iter(zip(params, want_params, strict=True))
    inputs = _inputs_of_layers(input, hidden, params, layers)
    outputs = [*inputs[1:], output]
    weights: list[Tensor] = []
    wants: list[tuple[bool, bool]] = []
    for layer in layers:
        weight, want_weight = next(given)
        weights.append(weight)
        wants.append((want_weight, bool(layer & BIAS) and next(given)[1]))
    grads: list[Tensor | None] = []
    grad: Tensor | None = grad_output
    for i in reversed(range(len(layers))):
        grad_weight = grad_bias = None
        want_weight, want_bias = wants[i]
        want_lower = want_input or any(map(any, wants[:i]))
        if grad is not None:
            grad, grad_weight, grad_bias = _linear_gradients(
                grad,
                inputs[i] if want_weight else None,
                weights[i] if want_lower else None,
                outputs[i] if layers[i] & RELU else None,
                want_bias,
            )
        grads[:0] = [grad_weight, grad_bias] if layers[i] & BIAS else [grad_weight]
    return [grad, *grads]


def _inputs_of_layers(
    input: Tensor, hidden: Tensor, params: list[Tensor], layers: list[int]
) -> list[Tensor]:
    """Return what each layer was called with, connected to params and input where recorded."""
    given = iter(params)
    inputs = [input]
    rows, begin = input.shape[:-1], 0
    for layer in layers[:-1]:
        weight, bias = next(given), next(given) if layer & BIAS else None
        end = begin + inputs[-1].shape[:-1].numel() * weight.shape[0]
        kept = hidden[begin:end].view(*rows, weight.shape[0])
        begin = end
        if _is_grad_enabled():
            product = F.linear(inputs[-1], weight, bias)
            kept = _WithValue.apply(
                torch.where(kept <= 0, 0, product) if layer & RELU else product, kept
            )
        inputs.append(kept)
    return inputs


class _WithValue(Function):
    """The value that the forward kept, with the gradient of how it was computed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(product: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output, None


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: int,
) -> Tensor:
    """Compute softmax cross-entropy against class indices or probabilities.

    Shapes: see `functional.cross_entropy`. reduction: as the kernels number it.
    """
    options = ignore_index, label_smoothing, reduction
    if _is_grad_enabled() and (logits.requires_grad or target.requires_grad):
        return CrossEntropy.apply(logits, target, weight, *options)
    return _cross_entropy(logits, target, weight, *options)[0]


class CrossEntropy(Function):
    """`cross_entropy` where a gradient is wanted.

    The gradient of a mean or a sum is known but for a factor, grad_output, which nearly always is
    1: it is formed in the forward, while the logits are in the cache, and handed over to the first
    backward, which scales it. A second one, of a retained graph, and one under hooks of saved
    tensors, such as checkpointing, form it again from the logits: the same bits.
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
        """Form the gradient along with the loss, or keep what the backward makes it from."""
        options = ignore_index, label_smoothing, reduction
        needs = ctx.needs_input_grad
        ctx.options, ctx.gradient = options, None
        ctx.is_scaled = (
            needs[0]
            and not needs[1]
            and reduction != 0
            # bfloat16 would be rounded twice where grad_output is not 1; float16 would underflow
            # before grad_output, a loss scale, can prevent it.
            and logits.dtype.itemsize > 2
            and not is_compiling()
        )
        statistics: list[Tensor] = []
        # Hooks shall have a say in what is kept, and see nothing on ctx: without the gradient.
        if ctx.is_scaled and not _torch_private.are_saved_tensors_hooked():
            loss, ctx.gradient = _cross_entropy_with_gradient(logits, target, weight, *options)
        else:
            loss, *statistics = _cross_entropy(logits, target, weight, *options)
        ctx.save_for_backward(logits, target, weight, *([] if ctx.is_scaled else statistics))
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of logits and probabilities that are wanted, None for the rest."""
        grads: tuple[Tensor | None, Tensor | None]
        if _is_recorded():
            grads = _cross_entropy_gradients_recorded(ctx, grad_output)
        # What compiled autograd makes of this runs many times, and changes no ctx.
        elif ctx.is_scaled and not is_compiling() and _is_factor(grad_output):
            gradient, ctx.gradient = ctx.gradient, None
            if gradient is None:  # none was formed, or a backward has taken it
                _, gradient = _cross_entropy_with_gradient(*ctx.saved_tensors, *ctx.options)
            grads = _times_(ctx, gradient, grad_output), None
        else:
            grads = _cross_entropy_gradients(ctx, grad_output)
        return *grads, None, None, None, None


def _is_factor(grad_output: Tensor) -> bool:
    # A row that is ignored has gradient 0, also times inf or NaN.
    return not is_batched(grad_output) and (
        not _host_may_read(grad_output) or math.isfinite(grad_output.item())
    )


def _times_(ctx: Any, gradient: Tensor, grad_output: Tensor) -> Tensor:
    if not _host_may_read(grad_output):
        _cross_entropy_gradient_(gradient, grad_output, *ctx.saved_tensors, *ctx.options)
    elif grad_output.item() != 1:
        gradient.mul_(grad_output)
    return gradient


def _cross_entropy_gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None]:
    logits, target, weight, *statistics = ctx.saved_tensors
    if ctx.is_scaled:
        _, *statistics = _cross_entropy(logits, target, weight, *ctx.options)
    return _cross_entropy_backward(
        grad_output, logits, target, weight, *statistics, *ctx.options, *_wanted(ctx)[:2]
    )


def _cross_entropy_gradients_recorded(
    ctx: Any, grad_output: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    logits, target, weight = ctx.saved_tensors[:3]
    ignore_index, label_smoothing, reduction = ctx.options
    want_logits, want_target, *_ = _wanted(ctx)
    wanted = [t for t, want in ((logits, want_logits), (target, want_target)) if want]
    with torch.enable_grad():
        loss = torch.ops.aten.cross_entropy_loss(
            *for_pytorchs_op(logits, target, ignore_index),
            weight,
            reduction,
            ignore_index,
            label_smoothing,
        )
    recorded = _is_grad_enabled()
    grads = iter(torch.autograd.grad(loss, wanted, grad_output, create_graph=recorded))
    return next(grads) if want_logits else None, next(grads) if want_target else None


def for_pytorchs_op(input: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return logits and target so that PyTorch's cross_entropy means what ours means.

    That takes class indices of int64 only in some places, and lets the logits of an ignored row
    into the gradient, where NaN and inf are not 0 when multiplied by 0.
    """
    if target.is_floating_point():
        return input, target
    if target.dtype in (torch.int32, torch.uint8):
        target = target.long()
    dim = 1 if input.dim() > 1 else 0
    positions = input.shape[:dim] + input.shape[dim + 1 :]
    # Else PyTorch says what is wrong.
    if input.dim() > 0 and target.shape == positions and target.device == input.device:
        input = input.masked_fill((target == ignore_index).unsqueeze(dim), 0)
    return input, target
