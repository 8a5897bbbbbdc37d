"""Every private name of PyTorch's that this library uses, and why.

What is called is looked up once, on import: a torch that no longer has it fails here, and says
which. ``tests/test_torch_private.py`` asks for each name, and finds those that are not listed.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

_Function = TypeVar("_Function", bound=Callable[..., Any])

MODULE_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_HOOKS = {
    "torch.nn.Module": MODULE_HOOKS,
    "torch.nn.modules.module": tuple(f"_global{hooks}" for hooks in MODULE_HOOKS),
    "torch.Tensor": ("_backward_hooks", "_post_accumulate_grad_hooks"),
    "torch.optim.Optimizer": ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"),
    "torch.optim.optimizer": ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks"),
}
_OBSERVERS = "who must be shown PyTorch's own ops; a public question is slower or does not exist"
_ONEDNN = "whether oneDNN has this CPU's own instructions"
_CONTENTS = "what is registered in a module, without a generator at each call"

# With what each is for: those that are not called, or only in other files; `_take` adds the others.
# Those of Module, Tensor and Optimizer, and of what a call returns, are attributes of objects.
NAMES = {
    **{
        f"{owner}.{name}": "nothing public says whether there are hooks"
        for owner, names in _HOOKS.items()
        for name in names
    },
    "torch.autograd.forward_ad._current_level": _OBSERVERS,
    "torch.utils._device.DeviceContext": "set_default_device is a mode too, of no concern to an op",
    "torch.compiler.assume_constant_result()._dynamo_marked_constant": (
        "the function imports the compiler, which takes seconds"
    ),
    "torch.nn.Module._modules": _CONTENTS,
    "torch.nn.Module._parameters": _CONTENTS,
    "torch.nn.Module._buffers": _CONTENTS,
    "torch.nn.Module._call_impl": "tools replace it to see each call of a module",
    "torch.nn.Module._compiled_call_impl": "what module.compile() leaves behind",
    "torch.optim.Optimizer._opt_called": "a scheduler warns where no step has set it",
    "torch.optim.Optimizer.step._wrapped_by_lr_sched": "the wrapper of a scheduler",
    "torch.autograd._profiler_enabled": "where the symbol at::hasCallbacks is not to be found",
}


def find(name: str) -> Any:
    """Look up one of NAMES that is no attribute of an object; an ImportError names it."""
    try:
        owner, _, attribute = name.rpartition(".")
        modules = sys.modules  # torch.optim hides some of its modules
        holder = modules.get(owner) or functools.reduce(getattr, owner.split(".")[1:], torch)
        return getattr(holder, attribute)
    except AttributeError as error:
        raise ImportError(
            f"mnist_ext: torch {torch.__version__} has no {name}, which it takes for: {NAMES[name]}"
        ) from error


def _take(name: str, reason: str) -> Any:
    NAMES[name] = reason
    return find(name)


are_transforms_active = _take("torch._C._are_functorch_transforms_active", _OBSERVERS)
_function_modes = _take("torch._C._len_torch_function_stack", _OBSERVERS)
_dispatch_modes = _take("torch._C._len_torch_dispatch_stack", _OBSERVERS)
_tracing_state = _take("torch._C._get_tracing_state", _OBSERVERS)
_stack_of_function_modes = _take("torch.overrides._get_current_function_mode_stack", _OBSERVERS)
is_batched = _take("torch._C._functorch.is_legacy_batchedtensor", "is_grads_batched=True's vmap")
_top_hooks = _take("torch._C._autograd._top_saved_tensors_default_hooks", "those of checkpointing")
_will_execute = _take("torch._C._will_engine_execute_node", "what is asked for (pytorch#174017)")
is_any_autocast_enabled = _take("torch._C._is_any_autocast_enabled", "all devices, in less time")
set_grad_enabled = _take("torch._C._set_grad_enabled", "a fifth of what no_grad() costs")
fp32_precision = _take(
    "torch._C._get_fp32_precision_getter", "allow_tf32 raises where the newer one was set"
)
has_bfloat16_instructions = _take("torch.ops.mkldnn._is_mkldnn_bf16_supported", _ONEDNN)
has_float16_instructions = _take("torch.ops.mkldnn._is_mkldnn_fp16_supported", _ONEDNN)
reduction_of_legacy = _take("torch.nn._reduction.legacy_get_string", "with PyTorch's warning")
check = _take("torch._check", "an error of shapes that torch.compile understands")
check_value = _take("torch._check_value", "the same, a ValueError")
is_compiling: Callable[[], bool] = torch.compiler.is_dynamo_compiling

hooks_of_all_modules = [
    find(f"torch.nn.modules.module.{name}") for name in _HOOKS["torch.nn.modules.module"]
]
hooks_of_all_optimizers = [
    find(f"torch.optim.optimizer.{name}") for name in _HOOKS["torch.optim.optimizer"]
]


def hooks_of_optimizer(optimizer: torch.optim.Optimizer) -> list[Any]:
    """Return the dicts of hooks of its step, its own and those of all optimizers."""
    own = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    return [*own, *hooks_of_all_optimizers]


def has_hooks(tensor: torch.Tensor) -> bool:
    """Return whether hooks are registered for tensor's gradient."""
    return bool(tensor._backward_hooks or tensor._post_accumulate_grad_hooks)


def is_step_replaced(step: Any) -> bool:
    """Return whether step, an optimizer's own attribute or None, is not PyTorch's."""
    return step is not None and not hasattr(step, "_wrapped_by_lr_sched")


def count_step(optimizer: torch.optim.Optimizer) -> None:
    """Let schedulers see that the optimizer's step was done."""
    optimizer._opt_called = True  # type: ignore[attr-defined]


def _find_has_callbacks() -> Callable[[], bool]:
    """Return PyTorch's own test of whether a profiler or observer of any kind or thread is on."""
    try:
        has_callbacks = ctypes.PyDLL(torch._C.__file__)._ZN2at12hasCallbacksEv
    except (AttributeError, OSError):  # this one sees those of this thread
        return find("torch.autograd._profiler_enabled")
    has_callbacks.restype = ctypes.c_bool
    return has_callbacks


has_callbacks = _find_has_callbacks()


def constant_when_compiled(function: _Function) -> _Function:
    """As ``torch.compiler.assume_constant_result``."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _is_default_device(mode: Any) -> bool:
    from torch.utils._device import DeviceContext

    return type(mode) is DeviceContext


def observer() -> str | None:
    """Return who must be shown PyTorch's own ops at this moment, or None.

    A custom op is opaque to all of these: they would raise an exception, or count and record
    nothing. torch.compile is none of them: it takes the ops into its graph.
    """
    if are_transforms_active() or forward_ad._current_level >= 0:
        return "torch.func or forward-mode derivatives"
    if is_compiling():
        return None
    if _dispatch_modes():
        return "a TorchDispatchMode"
    if _function_modes() and not all(map(_is_default_device, _stack_of_function_modes())):
        return "a TorchFunctionMode"
    if _tracing_state() is not None:
        return "torch.jit.trace"
    return None


def are_saved_tensors_hooked() -> bool:
    """Return whether hooks decide what becomes of the tensors that a backward will read."""
    return _top_hooks(True) is not None


def will_execute(node: Any) -> bool:
    """Return whether the backward at hand wants the gradient that goes to this node."""
    try:
        return _will_execute(node)
    except RuntimeError:
        # "Not supported" is PyTorch's answer for a leaf whose gradient autograd.grad returns. The
        # gradients of other leaves are answered with False.
        return True
