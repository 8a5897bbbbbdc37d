"""The fused ops as functions, with the signatures of ``torch.nn.functional``.

The kernels cover float32, float64, bfloat16 and float16, on the CPU and on CUDA. What they do not
cover runs PyTorch's own op, with its result at its speed: other devices, dtypes and layouts, tensor
subclasses, torch.func transforms, forward-mode derivatives, and on the CPU `linear` in bfloat16 or
float16 where oneDNN has the CPU's own instructions for it.
``docs/semantics.md`` lists every case.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from mnist_ext import (
    _fake,  # noqa: F401  (registers the shapes that torch.compile asks for)
    _library,
)
from mnist_ext._autograd import BIAS, MLP, RELU, CrossEntropy, Linear

Activation = Literal["none", "relu"]
Reduction = Literal["none", "mean", "sum"]

_RELU = {"none": False, "relu": True}
_FLAGS = {"none": 0, "relu": RELU}  # of a layer of `mlp`
_FLAGS_WITH_BIAS = {"none": BIAS, "relu": BIAS | RELU}
_REDUCTION = {"none": 0, "mean": 1, "sum": 2}  # as the kernels number them
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# For linear on the CPU without the half dtypes for which oneDNN has this CPU's own instructions:
# its products are faster then than float32 ones.
_LINEAR_DTYPES = tuple(
    dtype
    for dtype in _DTYPES
    if not (dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    and not (dtype is torch.float16 and torch.ops.mkldnn._is_mkldnn_fp16_supported())
)
_INDEX_DTYPES = (torch.int64, torch.int32, torch.uint8)
_TYPES = frozenset((Tensor, torch.nn.Parameter))


def _plain(tensor: Tensor) -> bool:
    # Subclasses bring their own ops; their type also says so without asking for __torch_function__.
    return type(tensor) in _TYPES and tensor.layout is torch.strided and not tensor.is_nested


def _is_built_for(capability: tuple[int, int], architectures: str) -> bool:
    # A GPU runs the code of an older one of its major number; newer ones compile the last one's.
    built = [tuple(map(int, name.split("."))) for name in architectures.split(";")]
    return capability >= built[-1] or any(
        major == capability[0] and minor <= capability[1] for major, minor in built
    )


@functools.cache
def _runs_kernels(device: torch.device) -> bool:
    if device.type == "cuda" and _library.cuda is not None:
        capability = torch.cuda.get_device_capability(device)
        return _is_built_for(capability, _library.cuda.architectures)
    return device.type == "cpu"


def _runs_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None
) -> bool:
    """Whether our kernels do this call, in this dtype instead of input's own."""
    dtype = dtype or input.dtype
    if input.is_cpu:
        fits = weight.is_cpu and (bias is None or bias.is_cpu)
        return fits and dtype in _LINEAR_DTYPES
    return (
        input.is_cuda
        and weight.device == input.device
        and (bias is None or bias.device == input.device)
        and dtype in _DTYPES
        and _runs_kernels(input.device)
    )


_is_autocast_enabled = torch.is_autocast_enabled
_is_compiling = torch.compiler.is_dynamo_compiling
_are_transforms_active = torch._C._are_functorch_transforms_active
_requires_grad = operator.attrgetter("requires_grad")


def _transformed() -> bool:
    # By torch.func, or for forward-mode derivatives.
    return _are_transforms_active() or forward_ad._current_level >= 0


_PYTORCHS_ERRORS = (IndexError, NotImplementedError, RuntimeError, ValueError)


def _explained(op: str, error: Exception, **arguments: Tensor | None) -> Exception:
    """Return PyTorch's error with what its message leaves out: the op, and what came."""
    got = ", ".join(
        f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in arguments.items()
        if isinstance(tensor, Tensor)
    )
    return type(error)(f"mnist_ext.{op}: {error} (got {got})")


def check_activation(activation: Activation) -> Activation:
    """Return activation, or raise ValueError if it is not one of those that can be fused."""
    if activation not in _RELU:
        raise ValueError(
            f"mnist_ext.linear: activation: expected one of {', '.join(_RELU)}, got {activation!r}"
        )
    return activation


def _is_cast(tensor: Tensor) -> bool:
    # By autocast: neither float64 nor what is no real number.
    return tensor.is_floating_point() and tensor.dtype is not torch.float64


def _autocast_dtype(input: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast has linear run in; None where it is off or leaves input."""
    device = input.device.type
    if device not in ("cpu", "cuda") or not _is_autocast_enabled(device) or not _is_cast(input):
        return None
    return torch.get_autocast_dtype(device)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Gradients are cast back on their way. Each call casts its weight again: autocast keeps casts
    # for its own ops, and has no public way to share them.
    return tensor.to(dtype) if _is_cast(tensor) else tensor


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
        dtype (bfloat16 and float16 in float32, rounded once; the bias gradient more exactly). On
        CUDA float32 products obey ``torch.backends.cuda.matmul.fp32_precision``. Under autocast the
        arguments are cast to its dtype first, as PyTorch's are; float64 ones stay.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit together.
        ValueError: unknown activation.
    """
    relu = _RELU.get(activation)
    if (
        type(input) in _TYPES
        and type(weight) in _TYPES
        and (bias is None or type(bias) in _TYPES)
        and relu is not None
        and _runs_linear(input, weight, bias)
        and not _transformed()
        and not _is_autocast_enabled("cpu" if input.is_cpu else "cuda")
        and not _is_compiling()
    ):
        # Nearly every call. The op checks the rest, where that costs nothing.
        try:
            return Linear.apply(input, weight, bias, relu)
        except _PYTORCHS_ERRORS:
            pass
    relu = _RELU[check_activation(activation)]
    if (
        _plain(input)
        and _plain(weight)
        and (bias is None or _plain(bias))
        and _runs_linear(input, weight, bias, autocast := _autocast_dtype(input))
        and input.dim() > 0
        and weight.dim() == 2
        and (bias is None or _one_per_feature(bias, weight))
        and not _transformed()
    ):
        if autocast is not None:
            input, weight = _cast(input, autocast), _cast(weight, autocast)
            bias = None if bias is None else _cast(bias, autocast)
        return Linear.apply(input, weight, bias, relu)
    try:
        output = F.linear(input, weight, bias)
    except _PYTORCHS_ERRORS as error:
        if type(error) not in _PYTORCHS_ERRORS:
            raise  # a subclass may carry more than a message
        raise _explained("linear", error, input=input, weight=weight, bias=bias) from error
    return torch.relu(output) if relu else output


def _all_or_nothing(input: Tensor, params: list[Tensor]) -> bool:
    # The op makes the gradients of all parameters; without a graph it is not asked for any.
    return all(map(_requires_grad, params)) or not (
        any(map(_requires_grad, params)) or input.requires_grad
    )


def mlp(input: Tensor, layers: Sequence[tuple[Tensor, Tensor | None, Activation]]) -> Tensor:
    """Compute `linear` for each of layers, one after the other.

    On the CPU all of them are one native call, and so is their backward, with the same bits: the
    time between the kernels of small layers is saved. Elsewhere, in bfloat16 and float16, and where
    only some gradients are needed, it is one call of `linear` after the other.

    Args:
        input: ``[..., in_features]``, any strides.
        layers: (weight, bias, activation) of each, as `linear` takes them.

    Returns:
        ``[..., out_features]`` of the last layer.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit together.
        ValueError: unknown activation.
    """
    params: list[Tensor] = []
    flags: list[int | None] = []
    for weight, bias, activation in layers:
        params.append(weight)
        if bias is None:
            flags.append(_FLAGS.get(activation))
        else:
            params.append(bias)
            flags.append(_FLAGS_WITH_BIAS.get(activation))
    if (
        len(flags) > 1
        and not _is_compiling()
        and type(input) in _TYPES
        and input.is_cpu
        and input.dtype in (torch.float32, torch.float64)
        and _TYPES.issuperset(map(type, params))
        and _all_or_nothing(input, params)
        and None not in flags
        and not _transformed()
        and not _is_autocast_enabled("cpu")
    ):
        # The op checks the rest; where it finds fault, the layer concerned says so below.
        try:
            return MLP.apply(input, flags, *params)
        except _PYTORCHS_ERRORS:
            pass
    for weight, bias, activation in layers:
        input = linear(input, weight, bias, activation=activation)
    return input


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

    Three differences: class indices may be int32 or uint8 throughout; a position that is ignored
    has gradient 0 even if its logits are NaN; and the gradient of a mean or sum is formed along
    with the loss. Where it is not (reduction "none", float16, probabilities with a gradient), and
    for a second backward, the logits themselves are kept (PyTorch keeps a copy of that size), so
    writing to them in between raises.

    Args:
        input: logits, ``[C]``, ``[N, C]`` or ``[N, C, d1, ...]``, any strides.
        target: class indices in ``[0, C)`` or ``ignore_index``, int64, int32 or uint8, of shape
            ``[]``, ``[N]`` or ``[N, d1, ...]``; or class probabilities, of the shape of input.
        weight: ``[C]``, of the dtype of input: a weight per class.
        ignore_index: class indices of this value count neither in the loss nor in the gradient.
        reduction: ``"mean"`` (with class indices over the weights of the targets that count, NaN if
            there are none; with probabilities over ``N * d1 * ...``), ``"sum"`` or ``"none"``.
        label_smoothing: in [0, 1]: the share of the target that is spread evenly over the classes.

    Returns:
        A scalar, or for reduction ``"none"`` the shape of input without C, of the dtype of input.
        bfloat16 and float16 are computed in float32 and rounded once; under autocast the result is
        float32, as PyTorch's is.

    Raises:
        IndexError: a class index that is neither a class nor ignore_index.
        ValueError: batch sizes that differ; unknown reduction.
        RuntimeError: shapes, dtypes or devices that do not fit together, label_smoothing above 1.
        NotImplementedError: logits of an integer dtype.
    """
    mode = _REDUCTION.get(reduction) if isinstance(reduction, str) else None
    if (
        type(input) in _TYPES
        and type(target) in _TYPES
        and weight is None
        and mode is not None
        and type(ignore_index) is int
        and type(label_smoothing) in (float, int)
        and (
            (input.is_cpu and target.is_cpu)
            or (input.is_cuda and target.is_cuda and _runs_kernels(input.device))
        )
        and input.numel() > 0
        and target.dtype in _INDEX_DTYPES
        and not _transformed()
        and not _is_autocast_enabled("cpu" if input.is_cpu else "cuda")
        and not _is_compiling()
    ):
        # Nearly every call. The op checks the rest, where that costs nothing.
        try:
            return CrossEntropy.apply(input, target, None, ignore_index, label_smoothing, mode)
        except IndexError:
            raise
        except _PYTORCHS_ERRORS:
            pass
    if (
        mode is not None
        and type(ignore_index) is int
        and -(2**63) <= ignore_index < 2**63
        and type(label_smoothing) in (float, int)
        and _plain(input)
        and _runs_kernels(input.device)
        and input.dtype in _DTYPES
        and input.dim() > 0
        and _plain(target)
        and target.device == input.device
        and _fits(target, input)
        and (classes := input.size(1 if input.dim() > 1 else 0)) > 0
        and (weight is None or _is_constant_per_class(weight, classes, input))
        and 0 <= label_smoothing <= 1
        and not _transformed()
    ):
        if _is_autocast_enabled(input.device.type):
            input, target = _in_float32(input), _in_float32(target)
            weight = None if weight is None else _in_float32(weight)
        return CrossEntropy.apply(input, target, weight, ignore_index, label_smoothing, mode)
    if isinstance(target, Tensor) and target.dtype in (torch.int32, torch.uint8):
        target = target.long()
    try:
        return F.cross_entropy(
            input,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    except _PYTORCHS_ERRORS as error:
        if type(error) not in _PYTORCHS_ERRORS:
            raise  # a subclass may carry more than a message
        raise _explained(
            "cross_entropy", error, input=input, target=target, weight=weight
        ) from error


def _fits(target: Tensor, input: Tensor) -> bool:
    if target.dtype in _INDEX_DTYPES:
        if input.dim() == 2:
            return target.dim() == 1 and target.size(0) == input.size(0)
        return target.shape == (input.shape[:1] + input.shape[2:] if input.dim() > 1 else ())
    # Probabilities. Those of another dtype are promoted, which is left to PyTorch.
    return target.dtype is input.dtype and target.shape == input.shape


def _is_constant_per_class(weight: Tensor, classes: int, input: Tensor) -> bool:
    return (
        _plain(weight)
        and not weight.requires_grad
        and weight.device == input.device
        and weight.dtype is input.dtype
        and weight.dim() == 1
        and weight.size(0) == classes
    )


def _in_float32(tensor: Tensor) -> Tensor:
    # What autocast does to the arguments of a loss: float64 and class indices stay.
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
