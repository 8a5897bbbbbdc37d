"""The fused ops as functions, with the signatures of ``torch.nn.functional``.

The kernels cover float32, float64, bfloat16 and float16, on the CPU and on CUDA. What they do not
cover runs PyTorch's own op, with its result at its speed: other devices, dtypes and layouts, tensor
subclasses, torch.func transforms, forward-mode derivatives, and on the CPU `linear` in bfloat16 or
float16 where oneDNN has the CPU's own instructions for it.
``docs/semantics.md`` lists every case.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_ext import _autograd, _fake  # noqa: F401  (_fake: the shapes for torch.compile)
from mnist_ext._autograd import BIAS, FLAGS, RELU, by_layer
from mnist_ext._decision import (
    REDUCTIONS,
    against_cross_entropy,
    against_extension,
    against_linear,
    against_linear_cross_entropy,
    against_mlp,
)
from mnist_ext._torch_private import is_any_autocast_enabled, observer, reduction_of_legacy

Activation = Literal["none", "relu"]
Reduction = Literal["none", "mean", "sum"]

_PYTORCHS_ERRORS = (IndexError, NotImplementedError, RuntimeError, ValueError)


def _is_pytorchs(error: Exception) -> bool:
    """Return whether PyTorch's function raised the error: not a hook or a mode that it called."""
    traceback: TracebackType | None = error.__traceback__
    while traceback is not None:
        module = traceback.tb_frame.f_globals.get("__name__", "")
        if not module.startswith(("torch.", "mnist_ext.")):
            return False
        traceback = traceback.tb_next
    return type(error) in _PYTORCHS_ERRORS  # a subclass may carry more than a message


def _pytorchs(
    op: str, function: Callable[..., Tensor], tensors: dict[str, Tensor | None], **options: Any
) -> Tensor:
    """Call PyTorch's function; its errors also say what their messages leave out: op and sizes."""
    try:
        return function(*tensors.values(), **options)
    except _PYTORCHS_ERRORS as error:
        if not _is_pytorchs(error):
            raise
        got = ", ".join(
            f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            for name, tensor in tensors.items()
            if isinstance(tensor, Tensor)
        )
        raise type(error)(f"mnist_ext.{op}: {error} (got {got})") from error


def check_activation(activation: Activation) -> Activation:
    """Return activation, or raise ValueError if it is not one of those that can be fused."""
    if activation not in FLAGS:
        raise ValueError(
            f"mnist_ext.linear: activation: expected one of {', '.join(FLAGS)}, got {activation!r}"
        )
    return activation


def _is_cast(tensor: Tensor) -> bool:
    # By autocast: neither float64 nor what is no real number.
    return tensor.is_floating_point() and tensor.dtype is not torch.float64


def _autocast_dtype(input: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast has linear run in; None where it is off or leaves input."""
    device = input.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device) if _is_cast(input) else None


def _cast(tensor: Any, dtype: torch.dtype) -> Any:
    # Gradients are cast back on their way. Each call casts its weight again: autocast keeps casts
    # for its own ops, and has no public way to share them.
    return tensor if tensor is None or not _is_cast(tensor) else tensor.to(dtype)


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: Activation = "none"
) -> Tensor:
    """Compute ``activation(input @ weight.T + bias)``, contiguous, in one pass.

    As ``torch.nn.functional.linear`` for input, weight and bias: tensors ``[..., in_features]`` of
    any strides, ``[out_features, in_features]`` and ``[out_features]``, all of one dtype, in which
    sums are accumulated: bfloat16 and float16 in float32, rounded once. ``activation="relu"`` is
    applied to the result in registers, and the backward reads its mask from the output. float32
    products on CUDA obey ``torch.backends.cuda.matmul.fp32_precision``. Under autocast the
    arguments are cast to its dtype first, as PyTorch's are; float64 ones stay.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit together.
        ValueError: activation is neither ``"none"`` nor ``"relu"``.
    """
    relu = FLAGS[check_activation(activation)] == RELU
    autocast = None
    if is_any_autocast_enabled() and isinstance(input, Tensor):
        autocast = _autocast_dtype(input)
    if against_linear(input, weight, bias, autocast) is None:
        if autocast is not None:
            input, weight, bias = [_cast(t, autocast) for t in (input, weight, bias)]
        return _autograd.linear(input, weight, bias, relu)
    output = _pytorchs("linear", F.linear, {"input": input, "weight": weight, "bias": bias})
    return torch.relu(output) if relu else output


def mlp(input: Tensor, layers: Sequence[tuple[Tensor, Tensor | None, Activation]]) -> Tensor:
    """Compute `linear` for each of layers: (weight, bias, activation), as it takes them.

    In float32 and float64 all of them are one native call, and so is their backward, with the same
    bits: the time between the kernels of small layers is saved. In other dtypes, on other devices
    than the CPU and CUDA, and where only some gradients are needed, `linear` is called for each.
    """
    weights, biases, flags = [], [], []
    for weight, bias, activation in layers:
        weights.append(weight)
        flags.append(FLAGS[check_activation(activation)])
        if bias is not None:
            biases.append(bias)
            flags[-1] |= BIAS
    return linears(input, weights, biases, flags, together=observer() is None)


def linears(
    input: Tensor, weights: list[Tensor], biases: list[Tensor], layers: list[int], *, together: bool
) -> Tensor:
    """As `mlp`, with weights, biases that there are, and layers (BIAS | RELU) as the op has them.

    together: nobody observes the call, who must see one layer after the other.
    """
    if together and len(layers) > 1 and against_mlp(input, weights + biases) is None:
        output = _autograd.mlp(input, layers, weights, biases)
        if output is not None:
            return output
    for weight, bias, layer in zip(weights, by_layer(biases, layers), layers, strict=True):
        input = linear(input, weight, bias, activation="relu" if layer & RELU else "none")
    return input


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute the cross-entropy of softmax(input) against target.

    As ``torch.nn.functional.cross_entropy``: arguments, shapes, results and the treatment of
    extreme logits, ``loss_i = -((x_t - max(x)) - log(sum(exp(x - max(x)))))``. Three differences:
    class indices may be int32 or uint8 throughout; a position that is ignored has gradient 0 even
    if its logits are NaN; and the gradient of a mean or sum is formed along with the loss. Where it
    is not (reduction "none", bfloat16, float16, probabilities with a gradient, hooks of saved
    tensors), and for a second backward, the logits themselves are kept (PyTorch keeps a copy of
    that size), so writing to them in between raises.

    input: logits ``[C]``, ``[N, C]`` or ``[N, C, d1, ...]``, of any strides; target: class indices
    ``[]``, ``[N]`` or ``[N, d1, ...]`` of int64, int32 or uint8, or probabilities of the shape of
    input; weight: ``[C]``, of the dtype of input. The result has the dtype of input: bfloat16 and
    float16 are computed in float32 and rounded once; under autocast it is float32, as PyTorch's is.

    Raises:
        IndexError: a class index that is neither a class nor ignore_index.
        ValueError: batch sizes that differ; unknown reduction.
        RuntimeError: shapes, dtypes or devices that do not fit together, label_smoothing above 1.
        NotImplementedError: logits of an integer dtype.
    """
    if size_average is not None or reduce is not None:
        reduction = reduction_of_legacy(size_average, reduce)
    # numpy's integers count as integers here, as in PyTorch.
    if not isinstance(ignore_index, (int, Tensor)) and hasattr(ignore_index, "__index__"):
        ignore_index = operator.index(ignore_index)
    against = against_cross_entropy(input, target, weight, ignore_index, label_smoothing, reduction)
    if against is None:
        if is_any_autocast_enabled() and torch.is_autocast_enabled(input.device.type):
            input, target, weight = [_cast(t, torch.float32) for t in (input, target, weight)]
        options = ignore_index, label_smoothing, REDUCTIONS[reduction]
        return _autograd.cross_entropy(input, target, weight, options)
    if isinstance(input, Tensor) and isinstance(target, Tensor) and type(ignore_index) is int:
        input, target = _autograd.for_pytorchs_op(input, target, ignore_index)
    return _pytorchs(
        "cross_entropy",
        F.cross_entropy,
        {"input": input, "target": target, "weight": weight},
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    return_lse: bool = False,
) -> Any:
    """Compute ``cross_entropy(linear(input, linear_weight, linear_bias), target)``.

    As ``torch.nn.functional.linear_cross_entropy``. Products, softmax and gradients are made for
    some rows after the others in one native call, so that the logits are never in memory as a
    whole; the gradients of a mean or a sum are formed in the forward. In float32 and float64, and
    on the CPU in bfloat16 and float16, for which float32 copies of the arguments are made. Under
    torch.compile and autocast, where a gradient of probabilities is wanted, and wherever `linear`
    is PyTorch's, it is one call of `linear` and one of `cross_entropy`; so it is for softcap,
    z_loss and return_lse on CUDA, with probabilities, label_smoothing or K dimensions, and for
    z_loss with weight.

    input: ``[in_features]`` or ``[N, in_features]``; linear_weight ``[C, in_features]`` or
    ``[C, d1, ..., in_features]``; linear_bias ``[C]`` or ``[C, d1, ...]``; target: class indices
    ``[]``, ``[N]`` or ``[N, d1, ...]`` of int64, int32 or uint8, or probabilities ``[C]`` or
    ``[N, C, d1, ...]``; weight ``[C]``. ignore_index: None is -100, and the only choice with
    probabilities. options: a ``torch.nn.LinearCrossEntropyOptions`` changes nothing here.

    Ours alone, with ``z = linear(...)``: softcap makes the logits ``softcap * tanh(z / softcap)``
    (Gemma 2, arXiv:2408.00118); z_loss adds ``z_loss * lse ** 2`` to the loss of each position that
    is not ignored, where lse is the log-sum-exp of its logits, and a mean divides that by the
    number of those positions (PaLM, arXiv:2204.02311); return_lse returns (loss, lse), lse of the
    shape of the loss without a reduction.

    Raises:
        IndexError: a class index that is neither a class nor ignore_index.
        ValueError: batch sizes that differ; unknown reduction; softcap that is not positive.
        RuntimeError: shapes, dtypes or devices that do not fit together, ignore_index with
            probabilities, label_smoothing above 1.
    """
    if misfit := _misfit(input, linear_weight, target, linear_bias, ignore_index):
        argument, expected, got = misfit
        raise RuntimeError(
            f"mnist_ext.linear_cross_entropy: {argument}: expected {expected}, got {got}"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(
            f"mnist_ext.linear_cross_entropy: softcap: expected a positive number, got {softcap}"
        )
    ignored = -100 if ignore_index is None else ignore_index
    extension = 0.0 if softcap is None else softcap, z_loss, return_lse
    linear_weight_rows, bias = _autograd.as_one_layer(linear_weight, linear_bias)
    is_extended = softcap is not None or z_loss or return_lse
    against = against_linear_cross_entropy(
        input, linear_weight, bias, target, weight, ignored, label_smoothing, reduction
    )
    if against is None and is_extended:
        on_cuda = _autograd.has_cuda_kernels(input)
        against = against_extension(
            linear_weight, target, weight, label_smoothing, extension, on_cuda
        )
    if against is None:
        dtype, numbers = input.dtype, (ignored, label_smoothing, REDUCTIONS[reduction])
        tensors: list[Any] = [input, linear_weight, linear_bias, target, weight]
        if dtype.itemsize > 2:
            return _autograd.linear_cross_entropy(
                tensors, numbers, extension if is_extended else ()
            )
        tensors = [t.float() if t is not None and t.dtype is dtype else t for t in tensors]
        result = _autograd.linear_cross_entropy(tensors, numbers, extension if is_extended else ())
        return (result[0].to(dtype), result[1]) if return_lse else result.to(dtype)
    logits = linear(input, linear_weight_rows, bias).unflatten(-1, linear_weight.shape[:-1])
    logits = _autograd.capped(logits, extension[0])
    loss = cross_entropy(
        logits,
        target,
        weight,
        ignore_index=ignored,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    options = ignored, label_smoothing, REDUCTIONS[reduction]
    return _autograd.extended(loss, logits, target, options, extension)


def _misfit(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    ignore_index: int | None,
) -> tuple[str, str, object] | None:
    """Return an argument of linear_cross_entropy, what was expected and what came, or None."""
    shape, outputs = linear_weight.shape, linear_weight.shape[:-1]
    if input.dim() not in (1, 2):
        return "input", "[in_features] or [N, in_features]", list(input.shape)
    if linear_weight.dim() < 2:
        return "linear_weight", "[C, in_features] or [C, d1, ..., in_features]", list(shape)
    if input.shape[-1] != shape[-1]:
        expected = f"its last dimension to be in_features of linear_weight {list(shape)}"
        return "input", expected, list(input.shape)
    if len(outputs) > 1 and input.dim() == 1:
        return "input", f"[N, in_features] for linear_weight {list(shape)}", list(input.shape)
    if linear_bias is not None and linear_bias.shape != outputs:
        return "linear_bias", f"shape {list(outputs)}", list(linear_bias.shape)
    if ignore_index is not None and target.shape == input.shape[:-1] + outputs:
        return "ignore_index", "None, as target holds probabilities", ignore_index
    return None
