"""What a step reads of the optimizer: parameter groups, their options, momentum buffers."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, nn

from mnist_ext import optim
from mnist_ext._torch_private import is_step_replaced
from mnist_ext.train_step.model import refuse

_OPTIMIZERS = (torch.optim.SGD, optim.SGD)
_OPTIONS = ("momentum", "dampening", "weight_decay", "nesterov", "maximize")  # as the op takes them
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

    def __init__(self, optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> None:
        if type(optimizer) not in _OPTIMIZERS:
            refuse(f"optimizer: expected torch.optim.SGD, got {type(optimizer).__name__}")
        if is_step_replaced(optimizer.__dict__.get("step")):
            refuse("optimizer: its step was replaced: restore it")
        group_of: dict[int, int] = {}
        known = {id(p) for p in params}
        for number, group in enumerate(optimizer.param_groups):
            if group["differentiable"]:
                refuse(f"optimizer: group {number} is differentiable: leave that off")
            for i, param in enumerate(group["params"]):
                group_of[id(param)] = number
                if id(param) not in known:
                    refuse(
                        f"optimizer: parameter {i} of group {number}, {list(param.shape)}, belongs "
                        "to no layer of model: give the optimizer model.parameters()"
                    )
        self.settings = read_settings(optimizer)
        self.options = [float(g[name]) for g in optimizer.param_groups for name in _OPTIONS]
        momentum = self.options[:: len(_OPTIONS)]
        self._has_momentum = any(momentum)
        self._optimizer = optimizer
        self._no_buffer = torch.empty(0, device=params[0].device)
        self.trained: list[Tensor] = []
        self._numbers: list[int] = []  # for each parameter its group, and 1 if its buffer is new
        self._moved: list[Tensor | None] = []  # None for a parameter without momentum
        for param in params:
            number = group_of.get(id(param), _FROZEN) if param.requires_grad else _FROZEN
            self._numbers += [number, 0]
            if number != _FROZEN:
                self.trained.append(param)
            self._moved.append(param if number != _FROZEN and momentum[number] else None)
        if not self.trained:
            refuse("model: every parameter is frozen or unknown to the optimizer")

    def momentum_buffers(self) -> tuple[list[Tensor], list[int], list[tuple[Tensor, Tensor]]]:
        """Return buffers, numbers of groups, and the buffers that hold nothing yet, by parameter.

        There is a buffer for each parameter, empty for one without momentum; or none at all.
        """
        buffers: list[Tensor] = []
        new: list[tuple[Tensor, Tensor]] = []
        if not self._has_momentum:
            return buffers, self._numbers, new
        numbers = self._numbers.copy()
        state = self._optimizer.state
        for i, param in enumerate(self._moved):
            buffer = self._no_buffer if param is None else state[param].get("momentum_buffer")
            if param is not None and buffer is None:
                buffer = torch.empty_like(param)
                new.append((param, buffer))
                numbers[2 * i + 1] = 1
            buffers.append(buffer)
        return buffers, numbers, new
