"""The fused ops as modules, and ``swap``, which puts them into an existing model."""

from __future__ import annotations

import operator
import warnings
from collections import Counter
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from mnist_ext import functional

_Module = TypeVar("_Module", bound=torch.nn.Module)


class Linear(torch.nn.Linear):
    """``torch.nn.Linear`` with the activation fused in; the same parameters and state_dict.

    Args:
        in_features: size of the input's last dimension.
        out_features: size of the output's last dimension.
        bias: whether to learn an additive bias.
        device: device of the parameters.
        dtype: dtype of the parameters.
        activation: ``"none"`` or ``"relu"``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        activation: functional.Activation = "none",
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.activation = functional.check_activation(activation)

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``; see `functional.linear`."""
        return functional.linear(input, self.weight, self.bias, activation=self.activation)

    def extra_repr(self) -> str:
        """As torch's, and the activation."""
        return f"{super().extra_repr()}, activation={self.activation!r}"


class Sequential(torch.nn.Sequential):
    """``torch.nn.Sequential`` that calls neighbouring `Linear` layers together.

    Where nobody looks between them (no hooks, of these or of all modules), `functional.mlp`
    computes them, with the same bits. ``Identity`` may lie between, and ``Flatten`` is done without
    a call of its module. Everything else is called as PyTorch's ``Sequential`` calls it.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Call one module after the other."""
        if (
            type(input) is not Tensor  # tracing, among others, shall see each module
            or any(_GLOBAL_HOOKS)
            or _is_compiling()
        ):
            return super().forward(input)
        linears: list[Linear] = []
        for module in self._modules.values():
            if type(module) is Linear and len(module._parameters) == 2 and not _is_watched(module):
                linears.append(module)
            elif type(module) is torch.nn.Flatten and not _is_watched(module):
                input = _through(linears, input).flatten(module.start_dim, module.end_dim)
                linears = []
            elif not (linears and type(module) is torch.nn.Identity and not _is_watched(module)):
                input = module(_through(linears, input))
                linears = []
        return _through(linears, input)


def _through(linears: list[Linear], input: Tensor) -> Tensor:
    if len(linears) < 2:
        return linears[0](input) if linears else input
    layers: list[Any] = []
    for linear in linears:
        params = linear._parameters
        layers.append((params["weight"], params["bias"], linear.activation))
    return functional.mlp(input, layers)


# Looked up once: every call asks them.
_is_compiling = torch.compiler.is_dynamo_compiling
_HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
_hooks_of = operator.itemgetter(*[f"_{hooks}" for hooks in _HOOKS])
_GLOBAL_HOOKS = [getattr(torch.nn.modules.module, f"_global_{hooks}") for hooks in _HOOKS]


def _is_watched(module: torch.nn.Module) -> bool:
    attributes = module.__dict__
    return any(_hooks_of(attributes)) or "forward" in attributes


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss`` on the fused kernel; the same arguments."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Logits ``[N, C]`` and targets ``[N]`` to a loss; see `functional.cross_entropy`."""
        return functional.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,  # type: ignore[arg-type]  # any str: checked there
            label_smoothing=self.label_smoothing,
        )


def swap(module: _Module) -> _Module:
    """Make every ``torch.nn.Linear`` and ``torch.nn.CrossEntropyLoss`` inside module one of ours.

    In a ``Sequential``, a ReLU right behind a Linear is fused into it and its place taken by an
    ``Identity``, so that names and state_dict stay as they are. Modules are changed in place, by
    their class: Parameter objects, hooks and references to them stay valid. Running it twice
    changes nothing more. A ``Sequential`` with several Linear layers becomes ours, too, which calls
    them together.

    Left alone, and named in one warning, are layers whose class is not exactly PyTorch's
    (subclasses, lazy layers that have not seen a batch, parametrized layers: swap first, then
    parametrize) and modules whose ``forward`` was replaced on the instance.

    A ReLU is not fused where somebody may look between the two: if either of them has forward or
    backward hooks, or if the Linear appears more than once in module. Code that takes a fused
    Linear out of its Sequential and calls it alone gets the ReLU with it.

    Args:
        module: a model, a loss, or a bare Linear.

    Returns:
        module itself.

    Warns:
        UserWarning: layers were left alone; which, and why.
    """
    uses = Counter(id(m) for _, m in module.named_modules(remove_duplicate=False))
    left_alone = []
    for name, child in module.named_modules():
        swapped = _SWAPPED.get(type(child))
        if reason := _reason_to_leave(child):
            left_alone.append(f"{name or 'module'} ({type(child).__name__}: {reason})")
        elif swapped is not None:
            child.__class__ = swapped
            if isinstance(child, Linear):
                child.activation = "none"
    for sequential in module.modules():
        if (
            isinstance(sequential, torch.nn.Sequential)
            and type(sequential).forward in (torch.nn.Sequential.forward, Sequential.forward)
            and not _has_own_forward(sequential)
        ):
            _fuse_relu(sequential, uses)
            if type(sequential) is torch.nn.Sequential:
                linears = [m for m in sequential if type(m) is Linear]
                if len(linears) > 1:
                    sequential.__class__ = Sequential
    if left_alone:
        warnings.warn(
            f"mnist_ext.nn.swap left alone: {', '.join(left_alone)}", UserWarning, stacklevel=2
        )
    return module


_SWAPPED = {torch.nn.Linear: Linear, torch.nn.CrossEntropyLoss: CrossEntropyLoss}


def _reason_to_leave(module: torch.nn.Module) -> str | None:
    if isinstance(module, (Linear, CrossEntropyLoss)) or not isinstance(module, tuple(_SWAPPED)):
        return None
    if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
        return "lazy: swap after the first batch"
    if is_parametrized(module):
        return "parametrized: swap first"
    if type(module) not in _SWAPPED:
        return "a subclass"
    return "its forward was replaced" if _has_own_forward(module) else None


def _fuse_relu(sequential: torch.nn.Sequential, uses: Counter[int]) -> None:
    for index in range(len(sequential) - 1):
        layer, following = sequential[index], sequential[index + 1]
        if (
            type(layer) is Linear
            and type(following) is torch.nn.ReLU
            and layer.activation == "none"
            and uses[id(layer)] == 1
            and not _has_hooks(layer)
            and not _has_hooks(following)
            and not _has_own_forward(following)
        ):
            layer.activation = "relu"
            sequential[index + 1] = torch.nn.Identity().train(following.training)


def _has_own_forward(module: torch.nn.Module) -> bool:
    # Wrappers that put a function of theirs in place of a module's forward.
    return "forward" in vars(module)


def _has_hooks(module: torch.nn.Module) -> bool:
    return any(_hooks_of(vars(module)))
