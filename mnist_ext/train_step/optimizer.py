"""What a step reads of the optimizer: parameter groups, their options, momentum buffers."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, nn

from mnist_ext import optim
from mnist_ext._torch_private import is_step_replaced
from mnist_ext.train_step.model import refuse

_OPTIMIZERS = (torch.optim.SGD, optim.SGD)
OPTIONS = ("momentum", "dampening", "weight_decay", "nesterov", "maximize")  # as the op takes them
_options_of = operator.itemgetter(*OPTIONS)
FROZEN = -1  # in place of a group


def read_options(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return the OPTIONS of each group: of this moment, as one may be a tensor."""
    return [float(value) for group in optimizer.param_groups for value in _options_of(group)]


def learning_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    """Return that of each group, of this moment."""
    return [float(group["lr"]) for group in optimizer.param_groups]


class Groups:
    """The parameter groups of an optimizer, and to which of them each parameter belongs.

    Attributes:
        of_params: for each parameter its group, or FROZEN: it stays as it is.
        options: the OPTIONS of each group, one group after the other.
        trained: the parameters that are not frozen.

    Raises:
        ValueError: the optimizer is refused; the message says why.
    """

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
        self.options = read_options(optimizer)
        self.of_params = [
            group_of.get(id(p), FROZEN) if p.requires_grad else FROZEN for p in params
        ]
        by_param = list(zip(params, self.of_params, strict=True))
        self.trained: list[Tensor] = [p for p, group in by_param if group != FROZEN]
        if not self.trained:
            refuse("model: every parameter is frozen or unknown to the optimizer")
        self._optimizer = optimizer
        momentum = self.options[:: len(OPTIONS)]
        # None in place of a parameter without momentum.
        self._moved = [p if group != FROZEN and momentum[group] else None for p, group in by_param]
        self._has_momentum = any(momentum)
        self._none = torch.empty(0, device=params[0].device)

    def momentum_buffers(self) -> tuple[list[Tensor], list[int]]:
        """Return the buffer of each parameter, and which of them are new and hold nothing yet.

        The buffers are empty for parameters without momentum; there is none if no group has one.
        """
        buffers: list[Tensor] = []
        new: list[int] = []
        if not self._has_momentum:
            return buffers, new
        state = self._optimizer.state
        for i, param in enumerate(self._moved):
            buffer = self._none if param is None else state[param].get("momentum_buffer")
            if buffer is None:
                buffer = torch.empty_like(param)
                new.append(i)
            buffers.append(buffer)
        return buffers, new

    def keep(self, buffers: list[Tensor], new: list[int]) -> None:
        """Give the optimizer the buffers that were new, and have been written."""
        for i in new:
            self._optimizer.state[self._moved[i]]["momentum_buffer"] = buffers[i]
