"""What is asked of PyTorch beyond its public API, and why; looked up once, as every call asks.

A torch that no longer has one of these names fails here, on import, and says which.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Who must be shown PyTorch's own ops. The public questions cost several times as much, or do not
# exist (the lengths of the stacks of modes).
are_transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
_function_modes: Callable[[], int] = torch._C._len_torch_function_stack
_dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack
_tracing_state: Callable[[], Any] = torch._C._get_tracing_state
_stack_of_function_modes = torch.overrides._get_current_function_mode_stack

# One question for all devices; is_autocast_enabled(device) takes three times as long.
is_any_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled

# The node of a graph that torch.autograd.grad(..., is_grads_batched=True) runs under vmap.
is_batched: Callable[[torch.Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor

# Hooks for all saved tensors, such as those of checkpointing and save_on_cpu.
_saved_tensors_hooks: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks

# Whether a backward will run a node of the graph: needs_input_grad tells what requires a gradient,
# not what torch.autograd.grad was asked for (pytorch#174017).
_will_execute: Callable[[Any], bool] = torch._C._will_engine_execute_node

# torch.backends.cuda.matmul.fp32_precision, in a form that can be read whichever of the older
# allow_tf32 and this was set.
fp32_precision: Callable[[str, str], str] = torch._C._get_fp32_precision_getter

is_compiling: Callable[[], bool] = torch.compiler.is_dynamo_compiling


def constant_when_compiled(function: _Function) -> _Function:
    """As ``torch.compiler.assume_constant_result``, which takes seconds to import the compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _is_default_device(mode: Any) -> bool:
    # torch.set_default_device is a mode, too, of no concern to an op whose tensors exist.
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
    return _saved_tensors_hooks(True) is not None


def will_execute(node: Any) -> bool:
    """Return whether the backward at hand wants the gradient that goes to this node."""
    try:
        return _will_execute(node)
    except RuntimeError:
        # "Not supported" is PyTorch's answer for a leaf whose gradient autograd.grad returns. The
        # gradients of other leaves are answered with False.
        return True
