"""Whether model, criterion and optimizer are what they were when they were parsed."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch import nn

from mnist_ext._decision import is_patched
from mnist_ext._torch_private import MODULE_HOOKS, hooks_of_all_modules, hooks_of_optimizer
from mnist_ext.train_step.model import Layers, Names, refuse
from mnist_ext.train_step.optimizer import read_settings

_flatten = itertools.chain.from_iterable


def check_hooks(names: Names, optimizer: torch.optim.Optimizer) -> None:
    """Refuse hooks of any kind; those of parameters are refused along with the layers."""
    for module, name in names.items():
        for hooks in MODULE_HOOKS:
            if getattr(module, hooks):
                refuse(
                    f"{name} ({type(module).__name__}) has {hooks[1:]}, which would not run: "
                    "remove them, or train with the ordinary loop"
                )
    if any(hooks_of_all_modules) or any(hooks_of_optimizer(optimizer)):
        refuse(
            "optimizer has step hooks, or hooks of all modules or optimizers are registered, which "
            "would not run: remove them, or train with the ordinary loop"
        )


class Guard:
    """The facts on which a parsed step rests, compared at each step in a few microseconds.

    Attributes are compared as they are in each module's ``__dict__``: an activation, a forward of
    the instance's own, whatever a forward may read. What changes without them (in place, or in a
    class or a function) is not seen: `TrainStep.refresh`.
    """

    def __init__(
        self,
        modules: list[nn.Module],
        criterion: nn.Module,
        optimizer: torch.optim.Optimizer,
        layers: Layers,
    ) -> None:
        self._modules, self._optimizer = modules, optimizer
        self._params, self._settings = layers.params, read_settings(optimizer)
        self._types = [type(module) for module in self._modules]
        self._dicts: list[dict[str, Any]] = [module.__dict__ for module in self._modules]
        self._hooks = [attributes[hooks] for attributes in self._dicts for hooks in MODULE_HOOKS]
        self._hooks += [*hooks_of_all_modules, *hooks_of_optimizer(optimizer)]
        self._dicts += [module._modules for module in self._modules]
        self._copies = [attributes.copy() for attributes in self._dicts]
        self._registered: list[Any] = [linear._parameters.values() for linear in layers.linears]
        self._registered += [criterion._parameters.values(), criterion._buffers.values()]
        self._tensors = [*self._all_tensors()]
        self._required = [param.requires_grad for param in self._params]
        self._step = optimizer.__dict__.get("step")

    def holds(self) -> bool:
        """Return whether all is as it was."""
        params, optimizer = self._params, self._optimizer
        try:
            same_attributes = self._dicts == self._copies
        except (RuntimeError, ValueError):  # of arrays that differ: another one is there
            return False
        return (
            same_attributes
            and [*map(type, self._modules)] == self._types
            and all(map(operator.is_, self._all_tensors(), self._tensors))
            and [param.requires_grad for param in params] == self._required
            and optimizer.__dict__.get("step") is self._step
            and read_settings(optimizer) == self._settings
            and not any(self._hooks)
            and not any([p._backward_hooks or p._post_accumulate_grad_hooks for p in params])
            and not is_patched()
        )

    def _all_tensors(self) -> Any:
        # The end is marked, so that one more or one less is seen.
        groups = [group["params"] for group in self._optimizer.param_groups]
        return itertools.chain(_flatten(self._registered), _flatten(groups), (nn.Module,))
