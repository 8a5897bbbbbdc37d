"""Optimizers with one native call per step."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd as _torchs_sgd

from mnist_ext import _library  # noqa: F401  (loads the ops)
from mnist_ext._torch_private import (
    has_callbacks,
    hooks_of_all_optimizers,
    is_compiling,
    set_grad_enabled,
)

_sgd_step = torch.ops.mnist_ext.sgd_step.default
_PLAIN = {Tensor, torch.nn.Parameter}
_OPTIONS = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")


class SGD(torch.optim.SGD):
    """``torch.optim.SGD`` with one native call per step and parameter group.

    The same arguments, the same ``state_dict``, and in float32 and float64 the same bits, on CPUs
    with fused multiply-add: each element goes through PyTorch's operations in its order. What the
    kernels do not take is left to PyTorch's functions: tensors that are not dense, not on the CPU
    or CUDA, or subclasses, parameters and buffers that share memory, which are updated one after
    the other, ``foreach``, ``fused``, ``differentiable``, ``torch.compile``, and a learning rate or
    weight decay that is a tensor with a gradient or not on the CPU.

    Raises:
        RuntimeError: a gradient is sparse or complex: use torch.optim.SGD.
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters from their gradients.

        Args:
            closure: computes the loss again and returns it; called once, before the update.

        Returns:
            What closure returns, or None.
        """
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
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or any(hooks_of_all_optimizers)
            or is_compiling()
            or has_callbacks()
        )

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
        if not group["momentum"]:
            self._update(group, params, [], first_step=False)
            return
        buffers = [self.state[p].get("momentum_buffer") for p in params]
        # Parameters in their first step have no buffer yet. In order: they may share memory.
        pairs = zip(params, buffers, strict=True)
        for is_first, run in itertools.groupby(pairs, lambda pair: pair[1] is None):
            of_run, buffers_of_run = map(list, zip(*run, strict=True))
            if not is_first:
                self._update(group, of_run, buffers_of_run, first_step=False)
                continue
            buffers_of_run = [torch.empty_like(p) for p in of_run]
            made = self._update(group, of_run, buffers_of_run, first_step=True)
            for param, buffer in zip(of_run, made, strict=True):
                self.state[param]["momentum_buffer"] = buffer

    def _update(
        self, group: dict[str, Any], params: list[Tensor], buffers: list[Any], first_step: bool
    ) -> list[Any]:
        """Update params and buffers; return the buffers."""
        grads: list[Any] = [p.grad for p in params]
        if _PLAIN.issuperset(map(type, params)) and all([type(g) is Tensor for g in grads]):
            try:
                refused = _sgd_step(
                    params,
                    grads,
                    buffers,
                    float(group["lr"]),
                    group["momentum"],
                    group["dampening"],
                    float(group["weight_decay"]),
                    group["nesterov"],
                    group["maximize"],
                    first_step,
                )
            except NotImplementedError:  # another device or layout
                refused = 0
            if refused < 0:
                torch.autograd.graph.increment_version(params + buffers)
                return buffers
        for grad in grads:
            if grad.layout is not torch.strided or grad.is_complex():
                raise RuntimeError(
                    "mnist_ext.optim.SGD: expected dense gradients of a real dtype, got "
                    f"{list(grad.shape)} {grad.dtype} of layout {grad.layout}: use torch.optim.SGD"
                )
        if first_step or not buffers:
            buffers = [None] * len(params)
        _torchs_sgd(
            params,
            grads,
            buffers,
            has_sparse_grad=False,
            foreach=False,
            fused=False,
            **{name: group[name] for name in _OPTIONS},
        )
        return buffers


def _is_torchs(group: dict[str, Any]) -> bool:
    lr, weight_decay = group["lr"], group["weight_decay"]
    return bool(
        group["differentiable"]
        or group["fused"]
        or group["foreach"]
        or (isinstance(lr, Tensor) and _is_not_to_be_read(lr))
        or (isinstance(weight_decay, Tensor) and _is_not_to_be_read(weight_decay))
    )


def _is_not_to_be_read(value: Tensor) -> bool:
    return value.requires_grad or not value.is_cpu  # to read it would be to wait
