"""Which layers a model consists of, and why it is none that a step can train."""

from __future__ import annotations

import itertools
import operator
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import nn

from mnist_ext import _library
from mnist_ext import nn as _ours
from mnist_ext._decision import REDUCTIONS, is_patched
from mnist_ext._torch_private import has_hooks
from mnist_ext.functional import check_activation

_LINEARS = (nn.Linear, _ours.Linear)
_CRITERIA = (nn.CrossEntropyLoss, _ours.CrossEntropyLoss)

Names = dict[nn.Module, str]  # of all modules, for messages


def refuse(message: str) -> NoReturn:
    """Raise ValueError in the name of TrainStep."""
    raise ValueError(f"mnist_ext.TrainStep: {message}")


def loss_arguments(criterion: Any) -> dict[str, Any]:
    """Return the op's arguments that say what the loss is, or refuse criterion."""
    if type(criterion) not in _CRITERIA or "forward" in criterion.__dict__:
        refuse(f"criterion: expected torch.nn.CrossEntropyLoss, got {criterion}")
    reduction, weight = criterion.reduction, criterion.weight
    if reduction not in ("mean", "sum"):
        refuse(f'criterion: expected reduction "mean" or "sum", got {reduction!r}')
    if "weight" not in criterion._buffers or (weight is not None and weight.requires_grad):
        refuse("criterion: expected a weight that needs no gradient: call weight.detach()")
    return {
        "class_weight": weight,
        "ignore_index": criterion.ignore_index,
        "label_smoothing": criterion.label_smoothing,
        "reduction": REDUCTIONS[reduction],
    }


class Layers:
    """The layers of a model, in the order in which it calls them, or ValueError: why not."""

    def __init__(self, model: nn.Module, names: Names) -> None:
        if is_patched():
            refuse(
                "a function or forward of PyTorch's own layers was replaced, which would not run: "
                "restore it, or train with the ordinary loop"
            )
        self.flattens = False  # the images first
        self.linears: list[nn.Linear] = []  # one a layer
        self.relu: list[bool] = []  # whether a layer has one
        self._names = names
        calls = _calls_of(model, names)
        for call in calls:
            self._add(call)
        if not self.linears:
            refuse("model: expected at least one Linear, got none")
        self._check_features(calls)
        named = self._parameters()
        self.params = list(named.values())
        self.weights: list[Any] = [linear.weight for linear in self.linears]
        self.biases: list[Any] = [linear.bias for linear in self.linears]  # None where it has none
        _check_memory(named)

    def _add(self, call: _Call) -> None:
        where, module, _ = call
        if "forward" in module.__dict__:
            refuse(f"{where}: its forward was replaced: restore it")
        if type(module) is nn.Flatten and not self.linears:
            if (module.start_dim, module.end_dim) != (1, -1):
                refuse(f"{where}: expected Flatten(start_dim=1, end_dim=-1), got {module}")
            self.flattens = True
        elif isinstance(module, nn.Linear) and type(module) in _LINEARS:
            self.linears.append(module)
            self.relu.append(check_activation(getattr(module, "activation", "none")) == "relu")
        elif type(module) is nn.ReLU and self.linears:
            self.relu[-1] = True
        elif type(module) is not nn.Identity:
            hint = "remove it, or train with the ordinary loop"
            if nn.utils.parametrize.is_parametrized(module):
                hint = "it is parametrized: call remove_parametrizations first"
            refuse(f"{where}: expected Flatten first, then Linear and ReLU; {hint}")

    def _check_features(self, calls: list[_Call]) -> None:
        first = self.linears[0]
        for where, _, features in calls:
            if features not in (-1, first.in_features):
                refuse(
                    f"{where}: expected in_features of {self._names[first]}, {first.in_features}, "
                    f"got {features}"
                )
        for before, linear in itertools.pairwise(self.linears):
            if linear.in_features != before.out_features:
                refuse(
                    f"{self._names[linear]}: expected in_features to be the layer's before, "
                    f"{before.out_features}, got {linear.in_features}"
                )

    def _parameters(self) -> dict[str, nn.Parameter]:
        params: dict[str, nn.Parameter] = {}
        for linear in self.linears:
            for name in ("weight", "bias"):
                param = linear._parameters.get(name, False)
                if param is not None or name == "weight":
                    where = f"{self._names[linear]}.{name}"
                    if any(param is other for other in params.values()):
                        refuse(f"{where} is shared with another layer: give each layer its own")
                    params[where] = _checked(where, param, next(iter(params.values()), param))
        return params


def _checked(where: str, param: Any, first: Any) -> nn.Parameter:
    if type(param) is not nn.Parameter:
        refuse(f"{where}: expected a torch.nn.Parameter, got {type(param).__name__}")
    if (
        param.device.type not in ("cpu", "cuda")
        or param.device != first.device
        or param.dtype not in (torch.float32, torch.float64)
        or param.dtype is not first.dtype
        or not param.is_contiguous()
        or param.numel() == 0
    ):
        refuse(
            f"{where}: expected a contiguous tensor, not empty, of float32 or of float64, on the "
            f"CPU or on a CUDA device, as all others, got {list(param.shape)} {param.dtype} on "
            f"{param.device}"
        )
    if param.device.type == "cuda" and _library.cuda is None:
        refuse(f"{where} is on {param.device}, but: {_library.cuda_reason}")
    if has_hooks(param):
        refuse(f"{where} has hooks, which would not run: remove them")
    return param


def _check_memory(params: dict[str, nn.Parameter]) -> None:
    placed = sorted((p.data_ptr(), p.nbytes, name) for name, p in params.items())
    for (begin, size, name), (following, _, other) in itertools.pairwise(placed):
        if following < begin + size:
            refuse(f"{other} shares memory with {name}: give each parameter its own")


class _Tracer(torch.fx.Tracer):
    """Follows its own thread: torch.fx replaces methods of Module for the others as well."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: Any) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in _LINEARS or super().is_leaf_module(m, module_qualified_name)


class _Call(NamedTuple):
    where: str  # for messages
    module: nn.Module  # what is called, or what does the same as the function that is called
    features: int = -1  # that a view names


_FLATTENS = (torch.flatten, "flatten")
_VIEWS = (torch.reshape, "reshape", "view")
_RELUS = (F.relu, torch.relu, torch.relu_, "relu", "relu_")


def _calls_of(model: nn.Module, names: Names) -> list[_Call]:
    """Return what model calls, one after the other, or refuse it."""
    for module, name in names.items():
        where = f"{name} ({type(module).__name__})"
        # Tracing follows the class's forward of model, and no forward of a Sequential.
        traced_past = module is model or isinstance(module, nn.Sequential)
        if traced_past and "forward" in module.__dict__:
            refuse(f"{where}: its forward was replaced: restore it")
        if type(module).__call__ is not nn.Module.__call__:
            refuse(f"{where}: its class has a __call__ of its own: leave that to forward")
    where = f"model ({type(model).__name__})"
    if type(model) in (*_LINEARS, nn.Flatten, nn.ReLU):
        return [_Call(where, model)]
    try:
        nodes = list(_Tracer().trace(model).nodes)
    except Exception as error:
        raise ValueError(
            f"mnist_ext.TrainStep: {where}: expected a forward that calls Flatten, Linear and ReLU "
            f"one after the other; following it failed: {error}"
        ) from error
    calls: list[_Call] = []
    before = nodes[0]
    for node in nodes[1:]:
        if _reads_sizes(node):
            continue
        call = None
        if node.args and node.args[0] is before:
            if node.op == "output":
                return calls
            call = _call_of(node, model, names)
        if call is None:
            refuse(
                f"{where}: expected a forward that calls Flatten, Linear and ReLU (or "
                "torch.flatten(x, 1), x.view(x.size(0), -1), F.relu) one after the other, for "
                f"batches of any size, and does nothing else, found {_in_words(node)}"
            )
        calls.append(call)
        before = node
    return calls


def _call_of(node: torch.fx.Node, model: nn.Module, names: Names) -> _Call | None:
    if node.op == "call_module":
        if len(node.args) > 1 or node.kwargs:
            return None
        module = model.get_submodule(str(node.target))
        return _Call(f"{names[module]} ({type(module).__name__})", module)
    where = f"{_in_words(node)} in the forward of {type(model).__name__}"
    if node.target in _RELUS:
        return _Call(where, nn.ReLU())
    if node.target in _FLATTENS and {"start_dim", "end_dim"}.issuperset(node.kwargs):
        dims: dict[str, Any] = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False))
        return _Call(where, nn.Flatten(**{"start_dim": 0, **dims, **node.kwargs}))
    if node.target in _VIEWS and not node.kwargs:
        sizes: Any = node.args[1:]
        if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
            sizes = sizes[0]
        # The number of rows must be that of the batch, whatever it is. That -1 comes to it is seen
        # when the images come: each must have so many numbers.
        if len(sizes) == 2 and isinstance(sizes[1], int):
            rows, features = sizes
            if _is_batch_size(rows) or (type(rows) is int and rows == -1 and features != -1):
                return _Call(where, nn.Flatten(), features)
    return None


def _reads_sizes(value: Any) -> bool:
    """Whether value is ``x.shape``, ``x.size(...)`` or one of their elements."""
    if not isinstance(value, torch.fx.Node):
        return False
    if value.op == "call_method":
        return value.target == "size"
    if value.target is getattr:
        return bool(value.args[1] == "shape")
    return value.target is operator.getitem and _reads_sizes(value.args[0])


def _is_batch_size(value: Any) -> bool:
    """Whether value is ``x.size(0)``, ``x.shape[0]`` or ``x.size()[0]``."""
    if not _reads_sizes(value):
        return False
    index = (*value.args[1:], *value.kwargs.values())
    of: Any = value.args[0]  # the tensor, or all of its sizes
    reads_all = not _reads_sizes(of) or of.target is getattr or len(of.args) == 1
    return bool(reads_all and index == (0,))


def _in_words(node: torch.fx.Node) -> str:
    name = getattr(node.target, "__name__", node.target)
    given = [*map(str, node.args), *[f"{key}={value}" for key, value in node.kwargs.items()]]
    return f"{name}({', '.join(given)})"
