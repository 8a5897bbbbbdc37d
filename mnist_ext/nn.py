"""The fused ops as modules, ``swap``, which puts them into an existing model, and ``unswap``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.parametrize import is_parametrized

from mnist_ext import _fake, functional
from mnist_ext._autograd import BIAS, FLAGS, RELU
from mnist_ext._decision import against_looking_ahead, is_patched, is_watched

_Module = TypeVar("_Module", bound=torch.nn.Module)


class Linear(torch.nn.Linear):
    """``torch.nn.Linear`` with the activation, ``"none"`` or ``"relu"``, fused in."""

    # Of the class, so that `swap` changes nothing but the class.
    activation: functional.Activation = "none"

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
        if functional.check_activation(activation) != "none":
            self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[..., in_features]`` to ``[..., out_features]``; see `functional.linear`."""
        if self.activation == "none" and is_patched():
            return super().forward(input)
        return functional.linear(input, self.weight, self.bias, activation=self.activation)

    def extra_repr(self) -> str:
        """As torch's, and the activation where there is one."""
        activation = "" if self.activation == "none" else f", activation={self.activation!r}"
        return super().extra_repr() + activation


class Sequential(torch.nn.Sequential):
    """``torch.nn.Sequential`` that looks ahead and fuses what may be fused in this call.

    `Linear` and ``ReLU`` behind it are one op, and neighbouring such layers one native call
    (`functional.mlp`), with the same bits. ``Identity`` may lie between, and ``Flatten`` is done
    without a call of its module. Where anybody looks between the modules at that moment (hooks, a
    ``forward`` replaced, compiled modules, modes, tracing: ``docs/semantics.md``) each is called.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Call one module after the other."""
        if against_looking_ahead(input) is not None:
            return super().forward(input)
        weights: list[Tensor] = []  # of layers that wait for what comes behind them
        biases: list[Tensor] = []
        layers: list[int] = []
        module: Any
        for module in self._modules.values():
            kind = type(module)
            if (
                kind is Linear
                and len(module._parameters) == 2
                and module.activation in FLAGS
                and not is_watched(module)
            ):
                params = module._parameters
                weights.append(params["weight"])
                layers.append(FLAGS[module.activation])
                if (bias := params["bias"]) is not None:
                    biases.append(bias)
                    layers[-1] |= BIAS
                continue
            if layers:
                if kind in _FUSED and not is_watched(module):
                    layers[-1] |= _FUSED[kind]
                    continue
                input = functional.linears(input, weights, biases, layers, together=True)
                weights, biases, layers = [], [], []
            if kind is torch.nn.Flatten and not is_watched(module):
                input = input.flatten(module.start_dim, module.end_dim)
            else:
                input = module(input)
        if layers:
            input = functional.linears(input, weights, biases, layers, together=True)
        return input


_FUSED = {torch.nn.ReLU: RELU, torch.nn.Identity: 0}  # into the Linear before them


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss`` on the fused kernel; the same arguments."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Logits ``[N, C]`` and targets ``[N]`` to a loss; see `functional.cross_entropy`."""
        if is_patched():
            return super().forward(input, target)
        return functional.cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,  # type: ignore[arg-type]  # any str: checked there
            label_smoothing=self.label_smoothing,
        )


class LinearCrossEntropyLoss(torch.nn.Module):
    """``torch.nn.LinearCrossEntropyLoss``, of torch 2.13, on the fused kernel; the same arguments.

    Holds the last layer of a classifier as ``linear``, and the options of the loss; softcap and
    z_loss are those of `functional.linear_cross_entropy`.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: functional.Reduction = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        softcap: float | None = None,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        if weight is not None and weight.shape != (num_classes,):
            raise RuntimeError(
                "mnist_ext.nn.LinearCrossEntropyLoss: weight: expected shape "
                f"[{num_classes}], got {list(weight.shape)}"
            )
        if not 0 <= label_smoothing <= 1:
            raise RuntimeError(
                "mnist_ext.nn.LinearCrossEntropyLoss: label_smoothing: expected a number in "
                f"[0, 1], got {label_smoothing}"
            )
        self.num_classes, self.out_features = num_classes, tuple(out_features)
        rows = num_classes * math.prod(out_features)
        self.linear = torch.nn.Linear(in_features, rows, bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)
        self.weight: Tensor | None
        self.reduction, self.ignore_index = reduction, ignore_index
        self.label_smoothing, self.options = label_smoothing, options
        self.softcap, self.z_loss = softcap, z_loss

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Map ``[N, in_features]`` and a target to a loss."""
        outputs = self.num_classes, *self.out_features
        bias = self.linear.bias
        loss: Tensor = functional.linear_cross_entropy(
            input,
            self.linear.weight.unflatten(0, outputs),
            target,
            linear_bias=None if bias is None else bias.unflatten(0, outputs),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            softcap=self.softcap,
            z_loss=self.z_loss,
        )
        return loss


def swap(module: _Module) -> _Module:
    """Make the layers inside module ours, by their class and by nothing else; return module.

    Every ``torch.nn.Linear`` and ``torch.nn.CrossEntropyLoss`` becomes one of ours, and so does a
    ``Sequential`` in which a Linear has a neighbour to be fused with: another Linear or a ReLU.
    Parameter objects, hooks, names, the state_dict and references to the modules stay valid, and
    `unswap` undoes it. Left alone, and named in one warning, are subclasses, lazy layers that have
    not seen a batch, parametrized layers (swap first), and modules whose ``forward`` was replaced
    on the instance. Out of reach is ``F.cross_entropy`` in a forward: call `functional`'s there.
    """
    _fake.register_flops()
    # The out_proj of a MultiheadAttention is called by nobody: only its parameters are read.
    never_called = {
        m.out_proj for m in module.modules() if isinstance(m, torch.nn.MultiheadAttention)
    }
    left_alone = []
    for name, child in module.named_modules():
        if child in never_called:
            continue
        if reason := _reason_to_leave(child):
            left_alone.append(f"{name or 'module'} ({type(child).__name__}: {reason})")
        elif type(child) in _SWAPPED:
            child.__class__ = _SWAPPED[type(child)]
    for child in module.modules():
        if type(child) is torch.nn.Sequential and not _is_replaced(child) and _has_pair(child):
            child.__class__ = Sequential
    if left_alone:
        _warn("swap left alone", left_alone)
    return module


def unswap(module: _Module) -> _Module:
    """Undo `swap`: every layer of ours inside module becomes PyTorch's; return module.

    For tools that pass over other classes than PyTorch's without a word, such as
    ``quantize_dynamic``, ``fuse_modules`` and FLOP counters by module: unswap, use the tool, and
    swap again what is left. A `Linear` with an activation of its own, which no swap made, is left
    alone and named in a warning: PyTorch has no such class.
    """
    left_alone = []
    for name, child in module.named_modules():
        if type(child) is Linear and child.activation != "none":
            left_alone.append(f"{name or 'module'} (Linear with activation={child.activation!r})")
        elif type(child) in _UNSWAPPED:
            child.__class__ = _UNSWAPPED[type(child)]
            child.__dict__.pop("activation", None)  # pickled by 0.1.0
    if left_alone:
        _warn("unswap left alone", left_alone)
    return module


_Types = Mapping[type, type]
_SWAPPED: _Types = {torch.nn.Linear: Linear, torch.nn.CrossEntropyLoss: CrossEntropyLoss}
_UNSWAPPED: _Types = {Sequential: torch.nn.Sequential} | {v: k for k, v in _SWAPPED.items()}


def _warn(what: str, names: list[str]) -> None:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    warnings.warn(f"mnist_ext.nn.{what}: {', '.join(names[:3])}{more}", UserWarning, stacklevel=3)


def _reason_to_leave(module: torch.nn.Module) -> str | None:
    if isinstance(module, (Linear, CrossEntropyLoss)) or not isinstance(module, tuple(_SWAPPED)):
        return None
    if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
        return "lazy: swap after the first batch"
    if is_parametrized(module):
        return "parametrized: swap first"
    if type(module) not in _SWAPPED:
        return "a subclass"
    return "its forward was replaced" if _is_replaced(module) else None


def _is_replaced(module: torch.nn.Module) -> bool:
    # Wrappers that put a function of theirs in place of a module's forward.
    return "forward" in vars(module)


def _has_pair(sequential: torch.nn.Sequential) -> bool:
    fused = [type(m) for m in sequential if type(m) in (Linear, torch.nn.ReLU)]
    return len(fused) > 1 and Linear in fused
