"""Which op a call takes: one of ours, or PyTorch's own. The one place for such a rule.

``functional`` asks `against_linear`, `against_mlp` and `against_cross_entropy`; ``nn.Sequential``
asks `against_looking_ahead` and `is_watched`; ``TrainStep``, which has no other way to go, refuses
where `is_patched` or a hook is found. ``docs/semantics.md`` lists every case.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Linear, Module, Parameter, ReLU

from mnist_ext import _library
from mnist_ext._torch_private import (
    MODULE_HOOKS,
    has_bfloat16_instructions,
    has_float16_instructions,
    hooks_of_all_modules,
    is_any_autocast_enabled,
    is_compiling,
    observer,
)

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}  # as the kernels number them
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# For linear on the CPU without the half dtypes for which oneDNN has this CPU's own instructions:
# its products are faster then than float32 ones.
LINEAR_DTYPES = tuple(
    dtype
    for dtype in DTYPES
    if not (dtype is torch.bfloat16 and has_bfloat16_instructions())
    and not (dtype is torch.float16 and has_float16_instructions())
)
_INDEX_DTYPES = (torch.int64, torch.int32, torch.uint8)
_TYPES = frozenset((Tensor, Parameter))


def is_built_for(capability: tuple[int, int], architectures: str) -> bool:
    """Return whether a GPU runs what was built for architectures, such as "8.0;9.0"."""
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
        _builds_fit[device] = is_built_for(capability, _library.cuda.architectures)
    return _builds_fit[device]


def against_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, autocast: torch.dtype | None = None
) -> str | None:
    """Return why this call of linear is PyTorch's, or None: our kernels do it.

    What is left to the op is an error in PyTorch, too: sizes and dtypes that do not fit together.
    """
    other = weight if bias is None else bias
    if type(input) not in _TYPES or type(weight) not in _TYPES or type(other) not in _TYPES:
        return "a tensor subclass"
    if who := observer():
        return who
    if not (input.layout is weight.layout is other.layout is torch.strided) or input.is_nested:
        return "another layout"
    dtype = autocast or input.dtype
    if input.is_cpu:
        if not (weight.is_cpu and other.is_cpu):
            return "devices that differ"
        if dtype not in LINEAR_DTYPES:
            return "another dtype, or one for which oneDNN has this CPU's own instructions"
    elif dtype not in DTYPES or not _runs_kernels(input.device):
        return "another dtype or device"
    elif weight.device != input.device or other.device != input.device:
        return "devices that differ"
    if input.dim() == 0 or weight.dim() != 2:
        return "a vector as weight, or no features"
    if bias is not None and (bias.dim() != 1 or (bias.numel() == 1 and weight.size(0) != 1)):
        return "a bias that is broadcast"
    if (
        bias is not None
        and bias.dtype is not input.dtype
        and (autocast is None or bias.dtype is torch.float64)  # which autocast leaves as it is
    ):
        return "a bias of another dtype, which PyTorch takes at some strides and not at others"
    return None


def against_mlp(input: Tensor, params: list[Tensor]) -> str | None:
    """Return why layers are called one by one, or None: the op is asked for all of them at once.

    The op sees dtypes, sizes and devices in a fraction of the time. That nobody observes the call
    is for the caller to know: `observer`.
    """
    if type(input) not in _TYPES or not _TYPES.issuperset(map(type, params)):
        return "a tensor subclass"
    if not (input.is_cpu or _runs_kernels(input.device)):
        return "another device"
    if is_compiling() or is_any_autocast_enabled():
        return "torch.compile, which fuses by itself, or autocast"
    return None


def against_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    shape: Sequence[int] | None = None,
) -> str | None:
    """Return why this call of cross_entropy is PyTorch's, or None: our kernels do it.

    shape: of the logits, where they are not input but what a layer makes of it. Sparse and nested
    tensors, which PyTorch does not take either, are left to the op.
    """
    if type(input) not in _TYPES or type(target) not in _TYPES:
        return "a tensor subclass"
    if who := observer():
        return who
    if type(ignore_index) is not int or not -(2**63) <= ignore_index < 2**63:
        return "an ignore_index that is no integer of 64 bits"
    if type(label_smoothing) not in (float, int) or not 0 <= label_smoothing <= 1:
        return "label_smoothing outside [0, 1]"
    if type(reduction) is not str or reduction not in REDUCTIONS:
        return "an unknown reduction"
    if not (
        (input.is_cpu and target.is_cpu)
        or (target.device == input.device and _runs_kernels(input.device))
    ):
        return "another device, or devices that differ"
    if input.dtype not in DTYPES:
        return "another dtype"
    shape = input.shape if shape is None else shape
    rows, *others = shape or (0, 0)
    classes = others[0] if others else rows
    if classes == 0:
        return "no classes"
    if target.dtype in _INDEX_DTYPES:
        if target.shape != ((rows, *others[1:]) if others else ()):
            return "class indices of another shape"
    # Probabilities of another dtype are promoted, which is left to PyTorch.
    elif target.dtype is not input.dtype or target.shape != shape:
        return "probabilities of another shape or dtype"
    if weight is not None and not _is_constant_per_class(weight, input, classes):
        return "a weight that is not one constant for each class"
    return None


def against_linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
) -> str | None:
    """Return why a call of linear_cross_entropy is one of linear and one of cross_entropy.

    Or None: one op does both. The shapes of input, linear_weight and linear_bias fit together.
    """
    if why := against_linear(input, linear_weight.flatten(0, -2), linear_bias):
        return why
    if is_compiling():
        return "torch.compile, which fuses by itself"
    if is_any_autocast_enabled():
        return "autocast, which casts for one of them and back for the other"
    if input.dtype.itemsize == 2 and not input.is_cpu:
        return "a half dtype, whose products tensor cores make"
    if target.is_floating_point() and target.requires_grad and torch.is_grad_enabled():
        return "probabilities with a gradient"
    logits = (*input.shape[:-1], *linear_weight.shape[:-1])
    return against_cross_entropy(
        input, target, weight, ignore_index, label_smoothing, reduction, logits
    )


def against_extension(
    linear_weight: Tensor,
    target: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    extension: tuple[float, float, bool],
    on_cuda: bool,
) -> str | None:
    """Return why linear_cross_entropy's softcap, z_loss and lse take a call of each op; or None."""
    softcap, z_loss, _ = extension
    if on_cuda:
        return "CUDA, whose kernels have none of them"
    if linear_weight.dim() > 2 or linear_weight.size(0) == 0:
        return "K dimensions, or no class at all"
    if target.is_floating_point() or label_smoothing:
        return "a loss that kernels do not make of some classes after the others"
    if z_loss and weight is not None:
        return "two means, of which one counts the weights of classes"
    if type(softcap) not in (int, float) or type(z_loss) not in (int, float):
        return "a factor that is no number of Python's"
    return None


def _is_constant_per_class(weight: Tensor, input: Tensor, classes: int) -> bool:
    return (
        type(weight) in _TYPES
        and weight.layout is torch.strided
        and not weight.requires_grad
        and weight.device == input.device
        and weight.dtype is input.dtype
        and weight.dim() == 1
        and weight.size(0) == classes
    )


def against_looking_ahead(input: Tensor) -> str | None:
    """Return why a Sequential calls each of its modules, or None: it may fuse what comes next."""
    if type(input) is not Tensor:
        return "a tensor subclass, or torch.fx, which shall see each module"
    if is_compiling():
        return "torch.compile, which fuses by itself"
    if any(hooks_of_all_modules):
        return "hooks of all modules"
    if who := observer():
        return who
    return "a function of PyTorch's that was replaced" if is_patched() else None


def _patchable() -> tuple[object, ...]:
    # What tools replace for all layers at once, to see or to change each of them.
    return (
        Module.__call__,
        Module._call_impl,
        Linear.forward,
        ReLU.forward,
        F.linear,
        F.relu,
        F.cross_entropy,
    )


_UNPATCHED = _patchable()
# Held while TrainStep follows a forward: torch.fx replaces Module.__call__ then, for all threads.
TRACING = threading.RLock()
_hooks_of = operator.itemgetter(*MODULE_HOOKS)


def is_patched() -> bool:
    """Return whether somebody replaced what every layer calls.

    Not what TrainStep replaces in another thread: the milliseconds until then are waited for.
    """
    if is_compiling() or _patchable() == _UNPATCHED:
        return False
    waited = TRACING.acquire(timeout=60)  # not forever: that forward may wait for this thread
    try:
        return _patchable() != _UNPATCHED
    finally:
        if waited:
            TRACING.release()


def is_watched(module: Module) -> bool:
    """Return whether a call of module does more than the forward of its class."""
    attributes: dict[str, Any] = module.__dict__
    return (
        any(_hooks_of(attributes))
        or "forward" in attributes
        or "_compiled_call_impl" in attributes  # module.compile()
    )
