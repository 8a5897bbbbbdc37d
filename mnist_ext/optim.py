"""Optimizers with one native call per step."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd as _torchs_sgd

from mnist_ext import _library  # noqa: F401  (loads the ops)
from mnist_ext._torch_private import (
    has_callbacks,
    hooks_of_optimizer,
    is_compiling,
    set_grad_enabled,
)

_sgd_step = torch.ops.mnist_ext.sgd_step.default
_PLAIN = {Tensor, torch.nn.Parameter}
_OPTIONS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")  # in its order
_options_of = operator.itemgetter(*_OPTIONS)


class SGD(torch.optim.SGD):
    """``torch.optim.SGD`` with one native call per step and parameter group.

    The same arguments, the same ``state_dict``, and in float32 and float64 the same bits, on CPUs
    with fused multiply-add. Left to PyTorch's functions are tensors that are not dense, not on the
    CPU or CUDA, or subclasses; parameters and buffers that share memory, updated one after the
    other; ``foreach``, ``fused``, ``differentiable``, ``torch.compile``; and a learning rate or
    weight decay that is a tensor with a gradient or not on the CPU.

    Raises:
        RuntimeError: a gradient is sparse or complex: use torch.optim.SGD.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters from their gradients; return what closure returns, if given."""
        return (self._step_with_hooks if self._is_watched() else self._step)(closure)

    # PyTorch would wrap step so that hooks and profilers see it, which costs as much as the step.
    step.hooked = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's, without its entry in a profile where nobody profiles."""
        if not set_to_none or self._is_watched():
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None

    def _is_watched(self) -> bool:
        return bool(any(hooks_of_optimizer(self)) or is_compiling() or has_callbacks())

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        if is_compiling() or any(map(_is_torchs, self.param_groups)):
            step: Any = torch.optim.SGD.step
            if getattr(step, "hooked", False):  # the hooks have been called
                step = step.__wrapped__
            return step(self, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        recording = torch.is_grad_enabled()
        set_grad_enabled(False)
        try:
            for group in self.param_groups:
                self._step_group(group)
        finally:
            set_grad_enabled(recording)
        return loss

    _step_with_hooks = torch.optim.Optimizer.profile_hook_step(_step)

    def _step_group(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        grads: list[Any] = [p.grad for p in params]
        if not group["momentum"]:
            if not _is_updated(group, params, grads, [], first_step=False):
                _update_by_torch(group, params, grads, [None] * len(params))
            return
        buffers = [self.state[p].get("momentum_buffer") for p in params]
        new = [p for p, buffer in zip(params, buffers, strict=True) if buffer is None]
        # In the first step of some of them PyTorch's function makes their buffers.
        native = not new or len(new) == len(params)
        made = [torch.empty_like(p) for p in new] if native and new else buffers
        if native and _is_updated(group, params, grads, made, first_step=bool(new)):
            buffers = made
        else:
            _update_by_torch(group, params, grads, buffers)
        if new:
            for param, buffer in zip(params, buffers, strict=True):
                self.state[param]["momentum_buffer"] = buffer


def _is_updated(
    group: dict[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    first_step: bool,
) -> bool:
    """Update params and buffers, or return False, having done nothing."""
    if not (_PLAIN.issuperset(map(type, params)) and all([type(g) is Tensor for g in grads])):
        return False
    try:
        refused = _sgd_step(params, grads, buffers, *_options_of(group), first_step)
    except NotImplementedError:  # another device or layout
        return False
    if refused >= 0:
        return False
    torch.autograd.graph.increment_version(params + buffers)
    return True


def _update_by_torch(
    group: dict[str, Any], params: list[Tensor], grads: list[Tensor], buffers: list[Any]
) -> None:
    """Update params and buffers one after the other; make the buffers that are None."""
    for grad in grads:
        if grad.layout is not torch.strided or grad.is_complex():
            raise RuntimeError(
                "mnist_ext.optim.SGD: expected dense gradients of a real dtype, got "
                f"{list(grad.shape)} {grad.dtype} of layout {grad.layout}: use torch.optim.SGD"
            )
    options = {name: group[name] for name in _OPTIONS}
    _torchs_sgd(params, grads, buffers, foreach=False, fused=False, **options)


def _is_torchs(group: dict[str, Any]) -> bool:
    for value in (group["lr"], group["weight_decay"]):
        # To read it would be to wait, or to lose its gradient.
        if isinstance(value, Tensor) and (value.requires_grad or not value.is_cpu):
            return True
    return bool(group["differentiable"] or group["fused"] or group["foreach"])
