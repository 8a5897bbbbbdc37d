"""The fused ops as functions, with the signatures of ``torch.nn.functional``.

The kernels cover float32 and float64 on the CPU. Every other call (another dtype, device or layout,
tensor subclasses, class weights, label smoothing, probability targets, more than two dimensions of
logits, autocast, torch.func transforms, forward-mode derivatives) runs PyTorch's own op: the result
is the same, the speed is PyTorch's.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from mnist_ext import _fake  # noqa: F401  (registers the shapes that torch.compile asks for)
from mnist_ext._autograd import CrossEntropy, Linear

Activation = Literal["none", "relu"]
Reduction = Literal["none", "mean", "sum"]

_RELU = {"none": False, "relu": True}
_REDUCTION = {"none": 0, "mean": 1, "sum": 2}  # as the kernels number them
_DTYPES = (torch.float32, torch.float64)
_TYPES = (Tensor, torch.nn.Parameter)


def _plain(tensor: Tensor) -> bool:
    # Subclasses bring their own ops; their type also says so without asking for __torch_function__.
    return (
        type(tensor) in _TYPES
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor.is_nested
    )


def _ordinary_call() -> bool:
    return (
        not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
    )


def check_activation(activation: Activation) -> Activation:
    """Return activation, or raise ValueError if it is not one of those that can be fused."""
    if activation not in _RELU:
        raise ValueError(
            f"mnist_ext.linear: activation: expected one of {', '.join(_RELU)}, got {activation!r}"
        )
    return activation


def _one_per_feature(bias: Tensor, weight: Tensor) -> bool:
    # A single element is broadcast, which is left to PyTorch; any other length is an error of ours.
    return bias.dim() == 1 and (bias.shape[0] != 1 or weight.shape[0] == 1)


def linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: Activation = "none"
) -> Tensor:
    """Compute ``activation(input @ weight.T + bias)`` in one pass.

    As ``torch.nn.functional.linear``, with the activation applied while the result is still in
    registers; the backward reads its mask from the output, so no extra tensor is kept.

    Args:
        input: ``[..., in_features]``, any strides.
        weight: ``[out_features, in_features]``, of the dtype of input.
        bias: ``[out_features]`` or None.
        activation: ``"none"`` or ``"relu"``.

    Returns:
        ``[..., out_features]``, contiguous, of the dtype of input. Sums are accumulated in that
        dtype (the bias gradient in float64).

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit together.
        ValueError: unknown activation.
    """
    relu = _RELU[check_activation(activation)]
    if (
        _plain(input)
        and input.dtype in _DTYPES
        and input.dim() > 0
        and _plain(weight)
        and weight.dim() == 2
        and (bias is None or (_plain(bias) and _one_per_feature(bias, weight)))
        and _ordinary_call()
    ):
        return Linear.apply(input, weight, bias, relu)
    output = F.linear(input, weight, bias)
    return torch.relu(output) if relu else output


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute the cross-entropy of softmax(input) against target.

    As ``torch.nn.functional.cross_entropy``. Formula and treatment of extreme logits are those of
    PyTorch's log_softmax: ``loss_i = -((x_t - max(x)) - log(sum(exp(x - max(x)))))``.

    Two differences: the logits themselves are kept for the backward (PyTorch keeps a copy of that
    size), so writing to them in between raises; and a row that is ignored has gradient 0 even if
    its logits are NaN.

    Args:
        input: logits, ``[N, C]`` (other shapes: see the module's docstring), any strides.
        target: ``[N]`` int64 class indices in ``[0, C)``, or ``ignore_index``.
        weight: ``[C]``, a weight per class.
        ignore_index: targets of this value count neither in the loss nor in the gradient.
        reduction: ``"mean"`` (over the targets that count; NaN if there are none), ``"sum"`` or
            ``"none"``.
        label_smoothing: in [0, 1].

    Returns:
        A scalar, or ``[N]`` for reduction ``"none"``, of the dtype of input. The sum over a row's
        classes runs in that dtype by blocks, everything beyond in float64.

    Raises:
        IndexError: a target that is neither a class nor ignore_index.
        ValueError: batch sizes that differ; unknown reduction.
        RuntimeError: dtypes or devices that do not fit together.
        NotImplementedError: logits of an integer dtype.
    """
    mode = _REDUCTION.get(reduction) if isinstance(reduction, str) else None
    if (
        weight is None
        and label_smoothing == 0.0
        and mode is not None
        and type(ignore_index) is int
        and -(2**63) <= ignore_index < 2**63
        and _plain(input)
        and input.dtype in _DTYPES
        and input.dim() == 2
        and _plain(target)
        and target.dim() > 0
        and not target.is_floating_point()
        and target.dtype is not torch.uint8
        and _ordinary_call()
    ):
        return CrossEntropy.apply(input, target, ignore_index, mode)
    if isinstance(input, Tensor) and not input.is_floating_point():
        raise NotImplementedError(
            "mnist_ext.cross_entropy: input: expected logits of a floating dtype, "
            f"got {input.dtype}"
        )
    return F.cross_entropy(
        input,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
