"""What a step reads of the optimizer: parameter groups, their options, momentum buffers."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from mnist_ext import optim
from mnist_ext._torch_private import is_step_replaced
from mnist_ext.train_step.model import Layers, refuse

_OPTIMIZERS = (torch.optim.SGD, optim.SGD)
# As the op takes them, of each group.
_OPTIONS = {
    "momentum": float,
    "dampening": float,
    "weight_decay": float,
    "nesterov": bool,
    "maximize": bool,
}
_settings_of = operator.itemgetter(*_OPTIONS, "differentiable")
_FROZEN = -1  # in place of a group


def read_settings(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return those of each group, of this moment: one may be a tensor that is written in place."""
    return [float(value) for group in optimizer.param_groups for value in _settings_of(group)]


def learning_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return that of each group, of this moment."""
    return [float(group["lr"]) for group in optimizer.param_groups]


class Groups:
    """The parameter groups of an optimizer as the op takes them, or ValueError: why not."""

    def __init__(self, optimizer: torch.optim.Optimizer, layers: Layers) -> None:
        if type(optimizer) not in _OPTIMIZERS:
            refuse(f"optimizer: expected torch.optim.SGD, got {type(optimizer).__name__}")
        if is_step_replaced(optimizer.__dict__.get("step")):
            refuse("optimizer: its step was replaced: restore it")
        group_of: dict[int, int] = {}
        known = {id(p) for p in layers.params}
        for number, group in enumerate(optimizer.param_groups):
            if group["differentiable"]:
                refuse(f"optimizer: group {number} is differentiable: leave that off")
            for i, param in enumerate(group["params"]):
                group_of[id(param)] = number if param.requires_grad else _FROZEN
                if id(param) not in known:
                    refuse(
                        f"optimizer: parameter {i} of group {number}, {list(param.shape)}, belongs "
                        "to no layer of model: give the optimizer model.parameters()"
                    )
        self._optimizer = optimizer
        self.params: list[Tensor] = [*layers.weights, *(b for b in layers.biases if b is not None)]
        numbers = [group_of.get(id(p), _FROZEN) for p in self.params]
        grouped = list(zip(self.params, numbers, strict=True))
        self.trained: list[Tensor] = [p for p, number in grouped if number != _FROZEN]
        if not self.trained:
            refuse("model: every parameter is frozen or unknown to the optimizer")
        self.arguments: dict[str, Any] = {  # of the op
            name: [kind(group[name]) for group in optimizer.param_groups]
            for name, kind in _OPTIONS.items()
        }
        self.arguments["groups"] = numbers
        momentum = self.arguments["momentum"]
        self._moved = [p for p, number in grouped if number != _FROZEN and momentum[number]]

    def momentum_buffers(self) -> tuple[list[Tensor], list[bool]]:
        """Return those of the parameters that have momentum; whether they hold nothing yet."""
        buffers: list[Tensor] = []
        first_step: list[bool] = []
        state = self._optimizer.state
        for param in self._moved:
            buffer = state[param].get("momentum_buffer")
            first_step.append(buffer is None)
            buffers.append(torch.empty_like(param) if buffer is None else buffer)
        return buffers, first_step

    def keep(self, buffers: list[Tensor], first_step: list[bool]) -> None:
        """Give the optimizer the buffers that were new, and have been written."""
        for param, buffer, is_new in zip(self._moved, buffers, first_step, strict=True):
            if is_new:
                self._optimizer.state[param]["momentum_buffer"] = buffer
