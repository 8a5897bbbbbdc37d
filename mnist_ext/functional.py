"""The fused ops as functions, with the signatures of ``torch.nn.functional``.

The kernels cover float32, float64, bfloat16 and float16, on the CPU and on CUDA. What they do not
cover runs PyTorch's own op, with its result at its speed: other devices, dtypes and layouts, tensor
subclasses, torch.func transforms, forward-mode derivatives, and on the CPU `linear` in bfloat16 or
float16 where oneDNN has the CPU's own instructions for it.
``docs/semantics.md`` lists every case.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from types import TracebackType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import _reduction as _legacy_reduction

from mnist_ext import (
    _autograd,
    _fake,  # noqa: F401  (registers the shapes that torch.compile asks for)
    _library,
)
from mnist_ext._autograd import BIAS, RELU
from mnist_ext._torch_private import is_any_autocast_enabled, is_compiling, observer

Activation = Literal["none", "relu"]
Reduction = Literal["none", "mean", "sum"]

_RELU = {"none": False, "relu": True}
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


def _is_built_for(capability: tuple[int, int], architectures: str) -> bool:
    # A GPU runs the code of an older one of its major number; newer ones compile the last one's.
    built = [tuple(map(int, name.split("."))) for name in architectures.split(";")]
    return capability >= built[-1] or any(
        major == capability[0] and minor <= capability[1] for major, minor in built
    )


_builds_fit: dict[torch.device, bool] = {}  # CUDA devices whose capability has been asked for


def _runs_kernels(device: torch.device) -> bool:
    if device.type != "cuda":
        return device.type == "cpu"
    if _library.cuda is None:
        return False
    if device not in _builds_fit:
        capability = torch.cuda.get_device_capability(device)
        _builds_fit[device] = _is_built_for(capability, _library.cuda.architectures)
    return _builds_fit[device]


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
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device) if _is_cast(input) else None


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Gradients are cast back on their way. Each call casts its weight again: autocast keeps casts
    # for its own ops, and has no public way to share them.
    return tensor.to(dtype) if _is_cast(tensor) else tensor


def _against_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, autocast: torch.dtype | None = None
) -> str | None:
    """Return why this call of linear is PyTorch's, or None: our kernels do it.

    What is left to the op is an error in PyTorch, too: sizes and dtypes that do not fit together.
    """
    if (
        type(input) not in _TYPES
        or type(weight) not in _TYPES
        or not (bias is None or type(bias) in _TYPES)
    ):
        return "a tensor subclass"
    if who := observer():
        return who
    strided = torch.strided
    if (
        input.layout is not strided
        or input.is_nested
        or weight.layout is not strided
        or not (bias is None or bias.layout is strided)
    ):
        return "another layout"
    dtype = autocast or input.dtype
    if input.is_cpu:
        if not weight.is_cpu or not (bias is None or bias.is_cpu):
            return "devices that differ"
        if dtype not in _LINEAR_DTYPES:
            return "another dtype, or one for which oneDNN has this CPU's own instructions"
    elif (
        dtype not in _DTYPES
        or not _runs_kernels(input.device)
        or weight.device != input.device
        or not (bias is None or bias.device == input.device)
    ):
        return "another dtype or device, or devices that differ"
    if input.dim() == 0 or weight.dim() != 2:
        return "a vector as weight, or no features"
    if bias is not None and (bias.dim() != 1 or (bias.numel() == 1 and weight.size(0) != 1)):
        return "a bias that is broadcast"
    return None


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
    relu = _RELU[check_activation(activation)]
    autocast = None
    if is_any_autocast_enabled() and isinstance(input, Tensor):
        autocast = _autocast_dtype(input)
    if _against_linear(input, weight, bias, autocast) is None:
        if autocast is not None:
            input, weight = _cast(input, autocast), _cast(weight, autocast)
            bias = None if bias is None else _cast(bias, autocast)
        return _autograd.linear(input, weight, bias, relu)
    try:
        output = F.linear(input, weight, bias)
    except _PYTORCHS_ERRORS as error:
        if not _is_pytorchs(error):
            raise
        raise _explained("linear", error, input=input, weight=weight, bias=bias) from error
    return torch.relu(output) if relu else output


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
    weights, biases, flags = [], [], []
    for weight, bias, activation in layers:
        weights.append(weight)
        flags.append(RELU if _RELU[check_activation(activation)] else 0)
        if bias is not None:
            biases.append(bias)
            flags[-1] |= BIAS
    return linears(input, weights, biases, flags, together=observer() is None)


def linears(
    input: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    layers: list[int],
    *,
    together: bool,
) -> Tensor:
    """As `mlp`, told of the layers as the op is.

    Args:
        input: ``[..., in_features]``.
        weights: of each layer.
        biases: of each layer that has one.
        layers: for each BIAS, RELU, both or neither.
        together: no `observer` is there, who must see one layer after the other.
    """
    if (
        together
        and len(layers) > 1
        and type(input) in _TYPES
        and input.is_cpu
        and _TYPES.issuperset(map(type, weights + biases))
        and not is_compiling()
        and not is_any_autocast_enabled()
    ):
        # The op sees dtypes, sizes and devices of all of them in a fraction of the time.
        output = _autograd.mlp(input, layers, weights, biases)
        if output is not None:
            return output
    next_bias = iter(biases)
    for weight, layer in zip(weights, layers, strict=True):
        bias = next(next_bias) if layer & BIAS else None
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

    As ``torch.nn.functional.cross_entropy``. Formula and treatment of extreme logits are those of
    PyTorch's log_softmax: ``loss_i = -((x_t - max(x)) - log(sum(exp(x - max(x)))))``.

    Three differences: class indices may be int32 or uint8 throughout; a position that is ignored
    has gradient 0 even if its logits are NaN; and the gradient of a mean or sum is formed along
    with the loss. Where it is not (reduction "none", bfloat16, float16, probabilities with a
    gradient, hooks of saved tensors), and
    for a second backward, the logits themselves are kept (PyTorch keeps a copy of that size), so
    writing to them in between raises.

    Args:
        input: logits, ``[C]``, ``[N, C]`` or ``[N, C, d1, ...]``, any strides.
        target: class indices in ``[0, C)`` or ``ignore_index``, int64, int32 or uint8, of shape
            ``[]``, ``[N]`` or ``[N, d1, ...]``; or class probabilities, of the shape of input.
        weight: ``[C]``, of the dtype of input: a weight per class.
        size_average: deprecated, as PyTorch's: with ``reduce`` it sets reduction.
        ignore_index: class indices of this value count neither in the loss nor in the gradient.
        reduce: deprecated, see ``size_average``.
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
    if size_average is not None or reduce is not None:
        reduction = _legacy_reduction.legacy_get_string(size_average, reduce)  # type: ignore[assignment]
    # numpy's integers count as integers here, as in PyTorch.
    if not isinstance(ignore_index, (int, Tensor)) and hasattr(ignore_index, "__index__"):
        ignore_index = operator.index(ignore_index)
    if (
        _against_cross_entropy(input, target, weight, ignore_index, reduction, label_smoothing)
        is None
    ):
        if is_any_autocast_enabled() and torch.is_autocast_enabled(input.device.type):
            input, target = _in_float32(input), _in_float32(target)
            weight = None if weight is None else _in_float32(weight)
        return _autograd.cross_entropy(
            input, target, weight, ignore_index, label_smoothing, _REDUCTION[reduction]
        )
    if isinstance(input, Tensor) and isinstance(target, Tensor) and type(ignore_index) is int:
        input, target = _autograd.for_pytorchs_op(input, target, ignore_index)
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
        if not _is_pytorchs(error):
            raise
        raise _explained(
            "cross_entropy", error, input=input, target=target, weight=weight
        ) from error


def _against_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
) -> str | None:
    """Return why this call of cross_entropy is PyTorch's, or None: our kernels do it.

    Sparse and nested tensors, which PyTorch does not take either, are left to the op.
    """
    if type(input) not in _TYPES or type(target) not in _TYPES:
        return "a tensor subclass"
    if who := observer():
        return who
    if type(ignore_index) is not int or not -(2**63) <= ignore_index < 2**63:
        return "an ignore_index that is no integer of 64 bits"
    if type(label_smoothing) not in (float, int) or not 0 <= label_smoothing <= 1:
        return "label_smoothing outside [0, 1]"
    if type(reduction) is not str or reduction not in _REDUCTION:
        return "an unknown reduction"
    if not (
        (input.is_cpu and target.is_cpu)
        or (target.device == input.device and _runs_kernels(input.device))
    ):
        return "another device, or devices that differ"
    if input.dtype not in _DTYPES:
        return "another dtype"
    rows, *others = input.shape or (0, 0)
    classes = others[0] if others else rows
    if classes == 0:
        return "no classes"
    if target.dtype in _INDEX_DTYPES:
        if target.shape != ((rows, *others[1:]) if others else ()):
            return "class indices of another shape"
    # Probabilities of another dtype are promoted, which is left to PyTorch.
    elif target.dtype is not input.dtype or target.shape != input.shape:
        return "probabilities of another shape or dtype"
    if weight is not None and not _is_constant_per_class(weight, input):
        return "a weight that is not one constant for each class"
    return None


def _is_constant_per_class(weight: Tensor, input: Tensor) -> bool:
    return (
        type(weight) in _TYPES
        and weight.layout is torch.strided
        and not weight.requires_grad
        and weight.device == input.device
        and weight.dtype is input.dtype
        and weight.dim() == 1
        and weight.size(0) == input.size(1 if input.dim() > 1 else 0)
    )


def _in_float32(tensor: Tensor) -> Tensor:
    # What autocast does to the arguments of a loss: float64 and class indices stay.
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
