"""The fused ops with their gradients, as ``torch.autograd.Function``s.

`linear`, `mlp` and `cross_entropy` call the op itself where no gradient is wanted, so that nothing
is kept. The Functions take the ``forward(ctx, ...)`` form: with a separate ``setup_context`` a call
costs five times as much. What that form cannot do (torch.func transforms) ``functional`` sends to
PyTorch's own ops. A backward that is itself recorded (``create_graph=True``) is built from
PyTorch's ops, so that it can be differentiated again.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from mnist_ext import _library, _torch_private  # noqa: F401  (_library loads the ops)
from mnist_ext._decision import REDUCTIONS
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
BIAS, RELU = 1, 2  # of a layer, as the ops take it
FLAGS = {"none": 0, "relu": RELU}  # by the name of the activation
_OfBias = TypeVar("_OfBias")
_Options = tuple[int, float, int]  # ignore_index, label_smoothing, reduction as kernels number it


def _has_cuda_kernels(tensor: Tensor) -> bool:
    return tensor.is_cuda


# The compiler takes the answer as a constant: what it compiled is guarded by this very setting.
@_torch_private.constant_when_compiled
def _is_tf32_allowed() -> bool:
    return _torch_private.fp32_precision("cuda", "matmul") == "tf32"


def _may_use_tf32(tensor: Tensor) -> bool:
    # Asked before every product, as PyTorch does: the setting of the moment counts.
    return _has_cuda_kernels(tensor) and _is_tf32_allowed()


def _is_recorded() -> bool:
    # A backward that is itself recorded, or run by vmap for many grad_outputs at once, must consist
    # of PyTorch's own ops.
    return _is_grad_enabled() or _torch_private.are_transforms_active()


# What a backward is asked for beyond needs_input_grad costs some 2 us for each tensor to find out.
# It is asked where there are so many activations that a gradient takes 100 us and more.
_ASK_FROM = 1 << 15


def _wanted(ctx: Any, activations: int) -> Sequence[bool]:
    """Return for each input whether this backward is to make its gradient.

    ``torch.autograd.grad(loss, input)`` wants no gradient of a parameter, though all need one.
    """
    needs: Sequence[bool] = ctx.needs_input_grad
    if is_compiling() or activations < _ASK_FROM:  # compiled autograd has no graph to ask
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
        kept_input, kept_weight = input if need_weight else None, weight if need_input else None
        ctx.save_for_backward(kept_input, kept_weight, output if relu else None)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients that are wanted, None for the others."""
        want_input, want_weight, want_bias, _ = _wanted(ctx, grad_output.numel())
        input, weight, output = ctx.saved_tensors
        input, weight = input if want_weight else None, weight if want_input else None
        return *_linear_gradients(grad_output, input, weight, output, want_bias), None


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


def by_layer(biases: Iterable[_OfBias], layers: Sequence[int]) -> list[_OfBias | None]:
    """Return what belongs to the bias of each layer, None for a layer without one."""
    following = iter(biases)
    return [next(following) if layer & BIAS else None for layer in layers]


def mlp(
    input: Tensor, layers: list[int], weights: list[Tensor], biases: list[Tensor]
) -> Tensor | None:
    """Compute what `linear` computes for each of the layers, in one call.

    Shapes: input [..., K]; returns [..., N] of the last layer, or None, having done nothing: where
    the op does not take the tensors, or only some of the gradients are wanted. layers: for each
    BIAS, RELU, both or neither; biases: those that there are.
    """
    if _is_grad_enabled():
        return MLP.apply(input, layers, *weights, *biases)
    return _mlp(input, weights, biases, layers, False, _may_use_tf32(input))[0]


class MLP(Function):
    """`mlp` where the gradients of all weights and biases may be wanted."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layers: list[int], *params: Tensor) -> Tensor | None:
        """Keep what the backward reads: not the biases, and the first weight only for input."""
        count = len(layers)
        need_input, _, *need_params = ctx.needs_input_grad
        if not all(need_params) and (need_input or any(need_params)):
            return None  # the op makes all gradients or none
        weights, biases = params[:count], params[count:]
        output, hidden = _mlp(input, weights, biases, layers, need_params[0], _may_use_tf32(input))
        if output is None or not need_params[0]:
            return output
        first_read = 0 if need_input else 1
        # Held, but not watched: whoever writes to them in between does not change the gradients.
        ctx.unread = layers, weights[:first_read], biases
        kept = output if layers[-1] & RELU else None
        ctx.save_for_backward(input, hidden, kept, *weights[first_read:])
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of input and params that are wanted, None for the others."""
        input, hidden, output, *read = ctx.saved_tensors
        layers, first, biases = ctx.unread
        weights = [*first, *read]
        want_input, _, *want_params = _wanted(ctx, hidden.numel())
        if (
            _is_recorded()
            or not all(want_params)
            or (not is_compiling() and is_batched(grad_output))  # vmap takes no op with a list
        ):
            inputs = _inputs_of_layers(input, hidden, weights, biases, layers)
            outputs = [*inputs[1:], output]
            wants = want_input, want_params
            return _mlp_gradients_by_layer(grad_output, inputs, outputs, weights, layers, *wants)
        grads = _mlp_backward(
            grad_output,
            input,
            hidden,
            output,
            weights,
            biases,
            layers,
            want_input,
            _may_use_tf32(input),
        )
        return (grads[0], None, *grads[1:]) if want_input else (None, None, *grads)


def _mlp_gradients_by_layer(
    grad_output: Tensor,
    inputs: list[Tensor],
    outputs: list[Tensor | None],
    weights: list[Tensor],
    layers: list[int],
    want_input: bool,
    want_params: list[bool],
) -> tuple[Tensor | None, ...]:
    """Return what the backward of `MLP` returns, layer by layer down to the lowest one needed."""
    count = len(layers)
    want_biases = by_layer(want_params[count:], layers)
    wanted = [i for i in range(count) if want_params[i] or want_biases[i]]
    lowest = -1 if want_input else min(wanted)
    grad: Any = grad_output
    grad_weights: list[Tensor | None] = [None] * count
    grad_biases: list[Tensor | None] = [None] * count
    for i in reversed(range(max(lowest, 0), count)):
        grad, grad_weights[i], grad_biases[i] = _linear_gradients(
            grad,
            inputs[i] if want_params[i] else None,
            weights[i] if i > lowest else None,
            outputs[i] if layers[i] & RELU else None,
            bool(want_biases[i]),
        )
    of_biases = [grad for grad, layer in zip(grad_biases, layers, strict=True) if layer & BIAS]
    return grad, None, *grad_weights, *of_biases


def _inputs_of_layers(
    input: Tensor,
    hidden: Tensor,
    weights: list[Tensor],
    biases: Sequence[Tensor],
    layers: list[int],
) -> list[Tensor]:
    """Return what each layer was called with, connected to the params and input where recorded."""
    inputs = [input]
    rows, begin = input.shape[:-1], 0
    of_layers = zip(weights, by_layer(biases, layers), layers, strict=True)
    for weight, bias, layer in itertools.islice(of_layers, len(layers) - 1):
        end = begin + rows.numel() * weight.shape[0]
        kept = hidden[begin:end].view(*rows, weight.shape[0])
        begin = end
        if _is_grad_enabled():
            product = F.linear(inputs[-1], weight, bias)
            if layer & RELU:
                product = torch.where(kept <= 0, 0, product)
            kept = _WithValue.apply(product, kept)
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
    logits: Tensor, target: Tensor, weight: Tensor | None, options: _Options
) -> Tensor:
    """Compute softmax cross-entropy against class indices or probabilities.

    Shapes: see `functional.cross_entropy`.
    """
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
        ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, *options: Any
    ) -> Tensor:
        """Form the gradient along with the loss, or keep what the backward makes it from."""
        need_logits, need_target, *_ = ctx.needs_input_grad
        ctx.options, ctx.gradient = options, None
        ctx.is_scaled = (
            need_logits
            and not need_target
            and options[2] != REDUCTIONS["none"]
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
        elif ctx.is_scaled and not is_compiling() and not is_batched(grad_output):
            grads = _scaled_gradient(ctx, grad_output), None
        else:
            grads = _cross_entropy_gradients(ctx, grad_output)
        return *grads, None, None, None, None


def _scaled_gradient(ctx: Any, grad_output: Tensor) -> Tensor | None:
    scale = None if _has_cuda_kernels(grad_output) else grad_output.item()
    if scale is not None and not math.isfinite(scale):  # 0 for a row that is ignored, all the same
        return _cross_entropy_gradients(ctx, grad_output)[0]
    gradient, ctx.gradient = ctx.gradient, None
    if gradient is None:  # none was formed, or a backward has taken it
        _, gradient = _cross_entropy_with_gradient(*ctx.saved_tensors, *ctx.options)
    if scale is None:
        _cross_entropy_gradient_(gradient, grad_output, *ctx.saved_tensors, *ctx.options)
    elif scale != 1:
        gradient.mul_(scale)
    return gradient


def _cross_entropy_gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None]:
    logits, target, weight, *statistics = ctx.saved_tensors
    if ctx.is_scaled:
        _, *statistics = _cross_entropy(logits, target, weight, *ctx.options)
    return _cross_entropy_backward(
        grad_output, logits, target, weight, *statistics, *ctx.options, *ctx.needs_input_grad[:2]
    )


def _cross_entropy_gradients_recorded(
    ctx: Any, grad_output: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    logits, target, weight = ctx.saved_tensors[:3]
    ignore_index, label_smoothing, reduction = ctx.options
    want_logits, want_target = ctx.needs_input_grad[:2]
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
    # A trace would keep the comparison of shapes as a constant, and warn. Where something does not
    # fit, PyTorch says what.
    fits = input.dim() > 0 and target.device == input.device
    if not torch.jit.is_tracing():
        fits = fits and target.shape == input.shape[:dim] + input.shape[dim + 1 :]
    if fits:
        input = input.masked_fill((target == ignore_index).unsqueeze(dim), 0)
    return input, target
