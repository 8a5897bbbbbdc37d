"""Optimizers with one native call per step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.sgd import sgd as _torchs_sgd

_sgd_step = torch.ops.mnist_ext.sgd_step.default
_TYPES = (Tensor, torch.nn.Parameter)


class SGD(torch.optim.SGD):
    """``torch.optim.SGD`` with one native call per step and parameter group.

    The same arguments, the same ``state_dict``, and in float32 and float64 the same bits, on CPUs
    with fused multiply-add: each element goes through PyTorch's operations in its order. What the
    kernels do not take is left to PyTorch's functions: tensors that are not dense, not on the CPU
    or subclasses, ``foreach``, ``fused``, ``differentiable``, ``torch.compile``, and a learning
    rate or weight decay that is a tensor with a gradient.

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
        if torch.compiler.is_compiling() or any(map(_is_torchs, self.param_groups)):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        # Parameters in their first step have no momentum buffer yet.
        params: list[Tensor] = []
        new: list[Tensor] = []
        state = self.state
        momentum = group["momentum"]
        for param in group["params"]:
            if param.grad is not None:
                has_buffer = not momentum or state[param].get("momentum_buffer") is not None
                (params if has_buffer else new).append(param)
        if params:
            buffers = [state[p]["momentum_buffer"] for p in params] if momentum else []
            self._update(group, params, buffers, first_step=False)
        if new:
            buffers = [torch.empty_like(p) for p in new]
            for param, buffer in zip(new, buffers, strict=True):
                state[param]["momentum_buffer"] = buffer
            self._update(group, new, buffers, first_step=True)

    def _update(
        self, group: dict[str, Any], params: list[Tensor], buffers: list[Tensor], first_step: bool
    ) -> None:
        grads: list[Any] = [p.grad for p in params]
        tensors = [*params, *grads, *buffers]
        if all(type(t) in _TYPES and t.layout is torch.strided and t.is_cpu for t in tensors):
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
            if refused < 0:
                torch.autograd.graph.increment_version([*params, *buffers])
                return
        for grad in grads:
            if grad.layout is not torch.strided or grad.is_complex():
                raise RuntimeError(
                    "mnist_ext.optim.SGD: expected dense gradients of a real dtype, got "
                    f"{list(grad.shape)} {grad.dtype} of layout {grad.layout}: use torch.optim.SGD"
                )
        torchs_buffers: list[Tensor | None] = [None] * len(params)
        if buffers and not first_step:
            torchs_buffers = [*buffers]
        _torchs_sgd(
            params,
            grads,
            torchs_buffers,
            has_sparse_grad=False,
            foreach=False,
            fused=False,
            **{name: group[name] for name in _OPTIONS},
        )
        if first_step:
            for param, buffer in zip(params, torchs_buffers, strict=True):
                self.state[param]["momentum_buffer"] = buffer


_OPTIONS = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")


def _is_torchs(group: dict[str, Any]) -> bool:
    return bool(
        group["differentiable"]
        or group["fused"]
        or group["foreach"]
        or _needs_grad(group["lr"])
        or _needs_grad(group["weight_decay"])
    )


def _needs_grad(value: float | Tensor) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
