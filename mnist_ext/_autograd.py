"""The fused ops with their gradients, as ``torch.autograd.Function``s.

`linear`, `mlp` and `cross_entropy` call the op itself where no gradient is wanted, so that nothing
is kept. The Functions take the ``forward(ctx, ...)`` form: with a separate ``setup_context`` a call
costs five times as much. What that form cannot do (torch.func transforms) ``functional`` sends to
PyTorch's own ops. A backward that is itself recorded (``create_graph=True``) is built from
PyTorch's ops, so that it can be differentiated again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

import mnist_ext._library  # noqa: F401  (before _C: it loads the ops, or says what is missing)
from mnist_ext import _C, _torch_private
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
_linear_cross_entropy = _ops.linear_cross_entropy.default
# On a device that the host must not wait for: this op decides there.
_cross_entropy_gradient_ = _ops.cross_entropy_gradient_.default

_is_grad_enabled = torch.is_grad_enabled
BIAS, RELU = 1, 2  # of a layer, as the ops take it
FLAGS = {"none": 0, "relu": RELU}  # by the name of the activation
_Options = tuple[int, float, int]  # ignore_index, label_smoothing, reduction as kernels number it
# softcap, 0 for none, z_loss, whether lse is wanted; () for none of them
Extension = tuple[float, float, bool] | tuple[()]


def has_cuda_kernels(tensor: Tensor) -> bool:
    return tensor.is_cuda


# The compiler takes the answer as a constant: what it compiled is guarded by this very setting.
@_torch_private.constant_when_compiled
def _is_less_than_float32_allowed(backend: str) -> bool:
    return _torch_private.fp32_precision(backend, "matmul") in ("tf32", "bf16")


# On the CPU the setting is for AMX alone, and asking costs 0.14 us.
_USES_AMX = _C.active_isa() == "amx"


def _may_use_tf32(tensor: Tensor) -> bool:
    # Asked before every product, as PyTorch does: the setting of the moment counts.
    if has_cuda_kernels(tensor):
        return _is_less_than_float32_allowed("cuda")
    return _USES_AMX and _is_less_than_float32_allowed("mkldnn")


def _is_recorded() -> bool:
    # A backward that is itself recorded, or run by vmap for many grad_outputs at once, must consist
    # of PyTorch's own ops.
    return _is_grad_enabled() or _torch_private.are_transforms_active()


# What a backward is asked for beyond needs_input_grad costs 2 us for each tensor to find out, and
# 25 us for one that autograd.grad returns, as the answer is an exception then. It is asked where a
# gradient has so many multiply-adds for each tensor, which take 400 us and more.
_ASK_FROM = 1 << 26


def _wanted(ctx: Any, multiply_adds: int) -> Sequence[bool]:
    """Return for each input whether this backward is to make its gradient.

    ``torch.autograd.grad(loss, input)`` wants no gradient of a parameter, though all need one.
    """
    needs: Sequence[bool] = ctx.needs_input_grad
    # Compiled autograd has no graph to ask.
    if is_compiling() or multiply_adds < _ASK_FROM * sum(needs):
        return needs
    nodes = (node for node, _ in ctx.next_functions if node is not None)
    return [need and _torch_private.will_execute(next(nodes)) for need in needs]


def linear(input: Tensor, weight: Tensor, bias: Tensor | None, relu: bool) -> Tensor:
    """As the op `linear`: input [..., K], weight [N, K], bias [N] or None; returns [..., N]."""
    if _is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return Linear.apply(input, weight, bias, relu)
    return _linear(input, weight, bias, relu, _may_use_tf32(input))


class Linear(Function):
    """`linear` where a gradient is wanted."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        relu: bool,
        output: Tensor | None = None,
    ) -> Tensor:
        """Compute output, unless it is known; keep what the backward reads, and nothing else."""
        if output is None:
            output = _linear(input, weight, bias, relu, _may_use_tf32(input))
        need_input, need_weight = ctx.needs_input_grad[:2]
        kept_input, kept_weight = input if need_weight else None, weight if need_input else None
        ctx.save_for_backward(kept_input, kept_weight, output if relu else None)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients that are wanted, None for the others."""
        input, weight, output = ctx.saved_tensors
        factor = input if weight is None else weight
        in_features = 0 if factor is None else factor.shape[-1]
        multiply_adds = grad_output.numel() * in_features
        want_input, want_weight, want_bias, *others = _wanted(ctx, multiply_adds)
        input, weight = input if want_weight else None, weight if want_input else None
        grads: tuple[Tensor | None, ...]
        if _is_recorded():
            if output is not None:
                grad_output = torch.ops.aten.threshold_backward(grad_output, output, 0)
            rows = _as_matrix(grad_output)
            grads = (
                grad_output @ weight if weight is not None else None,
                rows.mT @ _as_matrix(input) if input is not None else None,
                rows.sum(0) if want_bias else None,
            )
        else:
            allow_tf32 = _may_use_tf32(grad_output)
            grads = _linear_backward(grad_output, input, weight, output, want_bias, allow_tf32)
        return *grads, *[None for _ in others]


def _as_matrix(tensor: Tensor) -> Tensor:
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor.unsqueeze(0)


def by_layer(biases: Iterable[Tensor], layers: Sequence[int]) -> list[Tensor | None]:
    """Return the bias of each layer, None for a layer without one."""
    following = iter(biases)
    return [next(following) if layer & BIAS else None for layer in layers]


def mlp(
    input: Tensor, layers: list[int], weights: list[Tensor], biases: list[Tensor]
) -> Tensor | None:
    """As the op `mlp`, or None, having done nothing.

    That is where the op does not take the tensors, or only some of the gradients are wanted.
    layers: for each BIAS, RELU, both or neither; biases: those that there are.
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
        rows = grad_output.shape[:-1].numel()
        multiply_adds = rows * sum(weight.numel() for weight in weights)
        want_input, _, *want_params = _wanted(ctx, multiply_adds)
        grads: Sequence[Tensor | None]
        if (
            _is_recorded()
            or not all(want_params)
            or (not is_compiling() and is_batched(grad_output))  # vmap takes no op with a list
        ):
            function = functools.partial(_layer_by_layer, hidden, output, layers)
            tensors, wants = [input, *weights, *biases], [want_input, *want_params]
            grads = _gradients_of(function, tensors, wants, grad_output)
        else:
            allow_tf32 = _may_use_tf32(input)
            kept = hidden, output, weights, biases, layers
            grads = _mlp_backward(grad_output, input, *kept, want_input, allow_tf32)
            grads = grads if want_input else [None, *grads]
        return grads[0], None, *grads[1:]


def _layer_by_layer(
    hidden: Tensor, output: Tensor | None, layers: list[int], input: Tensor, *params: Tensor
) -> Tensor:
    """Return what `mlp` has computed, with a node of the graph for each layer."""
    count = len(layers)
    weights, biases = params[:count], by_layer(params[count:], layers)
    shapes = [(*input.shape[:-1], weight.shape[0]) for weight in weights]
    kept = hidden.split([math.prod(shape) for shape in shapes[:-1]])
    # Nothing reads the value of a last layer without ReLU.
    kept = *kept, input.new_empty(shapes[-1]) if output is None else output
    values = [value.view(shape) for value, shape in zip(kept, shapes, strict=True)]
    for weight, bias, layer, value in zip(weights, biases, layers, values, strict=True):
        relu = bool(layer & RELU)
        if _torch_private.are_transforms_active():  # which take no Function of this form
            input = F.linear(input, weight, bias)
            input = input.relu() if relu else input
        else:
            input = Linear.apply(input, weight, bias, relu, value)
    return input


def _gradients_of(
    function: Callable[..., Any],
    tensors: Iterable[Tensor | None],
    wants: Sequence[bool],
    grad_output: Tensor | tuple[Tensor, ...],
) -> list[Tensor | None]:
    """Return the gradients of function(*tensors) that are wanted, recorded as the backward is.

    grad_output: one for each tensor that function returns.
    """
    recorded = _is_grad_enabled()
    with torch.enable_grad():
        # The hooks of the tensors themselves are called by the backward at hand. What is detached
        # gets no gradient.
        views = [
            None
            if tensor is None
            else tensor.view_as(tensor)
            if want or recorded
            else tensor.detach()
            for tensor, want in zip(tensors, wants, strict=True)
        ]
        output = function(*views)
    wanted = [v for v, want in zip(views, wants, strict=True) if want and v is not None]
    grads = iter(torch.autograd.grad(output, wanted, grad_output, create_graph=recorded))
    return [next(grads) if want else None for want in wants]


def cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, options: _Options
) -> Tensor:
    """As the op `cross_entropy`: the loss."""
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
        grads: Sequence[Tensor | None]
        if _is_recorded():
            logits, target, weight = ctx.saved_tensors[:3]
            function = functools.partial(_of_pytorchs_op, weight, ctx.options)
            wants = ctx.needs_input_grad[:2]
            grads = _gradients_of(function, (logits, target), wants, grad_output)
        # What compiled autograd makes of this runs many times, and changes no ctx.
        elif ctx.is_scaled and not is_compiling() and not is_batched(grad_output):
            grads = _scaled_gradient(ctx, grad_output), None
        else:
            grads = _cross_entropy_gradients(ctx, grad_output)
        return *grads, None, None, None, None


def _scaled_gradient(ctx: Any, grad_output: Tensor) -> Tensor | None:
    scale = None if has_cuda_kernels(grad_output) else grad_output.item()
    if scale is not None and not math.isfinite(scale):  # 0 for a row that is ignored, all the same
        return _cross_entropy_gradients(ctx, grad_output)[0]
    gradient, ctx.gradient = ctx.gradient, None
    # Once, as checkpointing forms them again; and not where nothing of them is read.
    saved = ctx.saved_tensors if gradient is None or scale is None else ()
    if gradient is None:  # none was formed, or a backward has taken it
        _, gradient = _cross_entropy_with_gradient(*saved, *ctx.options)
    if scale is None:
        _cross_entropy_gradient_(gradient, grad_output, *saved, *ctx.options)
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


def linear_cross_entropy(tensors: list[Any], options: _Options, extension: Extension) -> Any:
    """As the op `linear_cross_entropy`: the loss, or (loss, lse).

    tensors: input, linear_weight, linear_bias or None, target, weight or None.
    """
    args = *tensors, *options, extension
    needs = [tensor is not None and tensor.requires_grad for tensor in args[:3]]
    if _is_grad_enabled() and any(needs):
        return LinearCrossEntropy.apply(*args)
    loss, *_, lse = _linear_cross_entropy_with_gradients(args, (False,) * 3)
    return loss if lse is None else (loss, lse)


def _linear_cross_entropy_with_gradients(args: Sequence[Any], needs: Sequence[bool]) -> Any:
    allow_tf32 = _may_use_tf32(args[0])
    return _linear_cross_entropy(*args[:8], None, *needs, allow_tf32, *args[8])


class LinearCrossEntropy(Function):
    """`linear_cross_entropy` where a gradient is wanted.

    As in `CrossEntropy`, the gradients of a mean or a sum are formed in the forward: three products
    instead of the four that forming the logits again in the backward takes. Where lse has one, too,
    they are formed again.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        """Form the gradients along with the loss, where that is a mean or a sum."""
        ctx.save_for_backward(*args[:5])
        ctx.options, ctx.extension = args[5:8], args[8]
        ctx.set_materialize_grads(False)
        is_formed = (
            ctx.options[2] != REDUCTIONS["none"] and not _torch_private.are_saved_tensors_hooked()
        )
        needs = ctx.needs_input_grad[:3] if is_formed else (False,) * 3
        loss, *grads, lse = _linear_cross_entropy_with_gradients(args, needs)
        ctx.grads = grads if is_formed else None
        return loss if lse is None else (loss, lse)

    @staticmethod
    def backward(
        ctx: Any, grad_output: Tensor | None, grad_lse: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of input, linear_weight and linear_bias that are wanted."""
        grads: Sequence[Tensor | None] | None = None
        wants = ctx.needs_input_grad[:3]
        if grad_output is None:
            if grad_lse is None:
                return (None,) * 9
            is_none = ctx.options[2] == REDUCTIONS["none"]
            grad_output = grad_lse.new_zeros(grad_lse.shape if is_none else ())
        if _is_recorded():
            *tensors, target, weight = ctx.saved_tensors
            function = functools.partial(
                _linear_and_pytorchs_op, target, weight, ctx.options, ctx.extension
            )
            of_outputs: Any = grad_output
            if ctx.extension and ctx.extension[2]:
                shape = target.shape  # of lse: class indices at a single position
                of_outputs = (
                    grad_output,
                    grad_output.new_zeros(shape) if grad_lse is None else grad_lse,
                )
            grads = _gradients_of(function, tensors, wants, of_outputs)
        else:
            is_scaled = (
                ctx.options[2] != REDUCTIONS["none"]
                and grad_lse is None
                and not is_batched(grad_output)
            )
            grads, scale = None, math.nan  # on CUDA the host must not wait to see it
            if is_scaled:
                grads, ctx.grads = ctx.grads, None
                if not has_cuda_kernels(grad_output):
                    scale = grad_output.item()
                    # Infinity times the gradients of ignored rows, 0, is NaN; PyTorch's stay 0.
                    if not math.isfinite(scale):
                        is_scaled, grads = False, None
            if grads is None:  # none were formed, or a backward has taken them
                of_loss = None if is_scaled else grad_output
                args = *ctx.saved_tensors, *ctx.options, of_loss, *wants
                # Where the forward gave lse, so does this: with it, sums have another order.
                extension = (*ctx.extension, grad_lse) if ctx.extension else ()
                tf32 = _may_use_tf32(grad_output)
                _, *grads, _ = _linear_cross_entropy(*args, tf32, *extension)
            if is_scaled and scale != 1:
                for grad in grads:
                    if grad is not None:
                        grad.mul_(grad_output)
        return *grads, *(None,) * 6


def _linear_and_pytorchs_op(
    target: Tensor,
    weight: Tensor | None,
    options: _Options,
    extension: Extension,
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None = None,
) -> Any:
    logits = F.linear(input, *as_one_layer(linear_weight, linear_bias))
    logits = logits.unflatten(-1, linear_weight.shape[:-1])
    if not extension:
        return _of_pytorchs_op(weight, options, logits, target)
    logits = capped(logits, extension[0])
    loss = _of_pytorchs_op(weight, options, logits, target)
    return extended(loss, logits, target, options, extension)


def capped(logits: Tensor, softcap: float) -> Tensor:
    """Return logits that are at most softcap, which is 0 for none."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def extended(
    loss: Tensor,
    logits: Tensor,
    target: Tensor,
    options: _Options,
    extension: tuple[float, float, bool],
) -> Any:
    """Return the loss of logits with its z_loss; and their log-sum-exps, if these are wanted."""
    _, z_loss, need_lse = extension
    if not (z_loss or need_lse):
        return loss
    classes = min(1, logits.dim() - 1)
    lse = torch.logsumexp(logits.float() if logits.dtype.itemsize == 2 else logits, classes)
    if z_loss:
        of_lse = _reduced_z_loss(z_loss * lse.square(), target, options)
        loss = (loss + of_lse).to(loss.dtype)
    # Hooks of lse see what comes from its own use, not from the loss: as where kernels make both.
    return (loss, lse.view_as(lse)) if need_lse else loss


def _reduced_z_loss(z_loss: Tensor, target: Tensor, options: _Options) -> Tensor:
    ignore_index, _, reduction = options
    counts: Tensor | None = None
    if not target.is_floating_point():
        counts = target.long() != ignore_index  # compared with uint8, -100 is 156
        z_loss = z_loss.masked_fill(~counts, 0)
    if reduction == REDUCTIONS["none"]:
        return z_loss
    if reduction == REDUCTIONS["sum"]:
        return z_loss.sum()
    return z_loss.sum() / (z_loss.numel() if counts is None else counts.sum())


def as_one_layer(linear_weight: Tensor, linear_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return a weight [C, d1, ..., in] as [C * d1 * ..., in], and its bias."""
    if linear_weight.dim() == 2:
        return linear_weight, linear_bias
    return linear_weight.flatten(0, -2), None if linear_bias is None else linear_bias.flatten()


def _of_pytorchs_op(
    weight: Tensor | None, options: _Options, logits: Tensor, target: Tensor
) -> Tensor:
    ignore_index, label_smoothing, reduction = options
    logits, target = for_pytorchs_op(logits, target, ignore_index)
    return torch.ops.aten.cross_entropy_loss(
        logits, target, weight, reduction, ignore_index, label_smoothing
    )


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
