"""A training step of a multilayer perceptron in one native call."""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as _global_hooks
from torch.optim import optimizer as _global_optimizer_hooks

from mnist_ext import _library, optim
from mnist_ext import nn as _ours

_train_steps = torch.ops.mnist_ext.train_steps.default
_new_captured_step = torch.ops.mnist_ext.new_captured_step.default
_free_captured_step = torch.ops.mnist_ext.free_captured_step.default
_set_grad_enabled = torch._C._set_grad_enabled
_increment_version = torch.autograd.graph.increment_version
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_OPTIONS = ("momentum", "dampening", "weight_decay", "nesterov", "maximize")
_settings_of = operator.itemgetter(*_OPTIONS, "differentiable")
_LINEARS = (nn.Linear, _ours.Linear)
_CRITERIA = (nn.CrossEntropyLoss, _ours.CrossEntropyLoss)
_OPTIMIZERS = (torch.optim.SGD, optim.SGD)
_BIAS, _RELU = 1, 2  # of a layer, as the op takes them
_FROZEN = -1  # in place of a group
_Chosen = tuple[Tensor, Tensor, Tensor | None]  # images, labels, their order
# Signals are seen between native calls. An epoch consists of calls of about this many seconds.
_SECONDS_PER_CALL = 0.03


class Scheduler(Protocol):
    """What `TrainStep.epoch` wants of a learning rate scheduler."""

    def step(self) -> None:
        """Set the optimizer's learning rates for the next step."""


class TrainStep:
    """One step of the ordinary training loop in one native call.

    ``loss = step(images, labels)`` does what these lines do, with the same numbers up to rounding::

        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()

    There is no autograd graph and no ``.grad``; parameters and momentum buffers are updated in
    place, in the tensors that model and optimizer hold. State dicts, evaluation and checkpoints
    between steps see them, and one may go on with the ordinary loop at any step. The optimizer's
    settings are read at each step. Frozen parameters, and those that the optimizer does not hold,
    stay as they are. Nothing is exchanged with other processes: a ``DistributedDataParallel`` is
    refused, and the module in it is trained by itself.

    On a CUDA device nothing waits for the device in a step, and `epoch` waits a few times a second.
    A float32 model that is small enough stays in the shared memory of some multiprocessors for
    hundreds of steps (compute capability 9.0; docs/persistent-step.md). Other steps start some ten
    kernels each; where a step repeats the last one's sizes and tensors, but for images and labels,
    they become one CUDA graph, which keeps up to 64 MiB of memory while this object lives. A
    capture of the caller's own takes the kernels. On CUDA an index or label out of range that a
    step meets ends with a device-side assertion, as in PyTorch.

    Args:
        model: calls modules one after the other: optionally ``Flatten``, then ``Linear`` (PyTorch's
            or ours), each optionally followed by ``ReLU``. A ``Sequential``, or a module whose
            forward consists of such calls; ``torch.flatten(x, 1)``, ``x.view(x.size(0), -1)`` and
            ``x.view(-1, in_features)`` (or ``reshape``) count as Flatten, ``F.relu`` and
            ``torch.relu`` as ReLU. Parameters of float32 or of float64, on the CPU or on one CUDA
            device.
        criterion: ``CrossEntropyLoss`` (PyTorch's or ours), reduction ``"mean"`` or ``"sum"``.
        optimizer: ``torch.optim.SGD`` or ``mnist_ext.optim.SGD``, over parameters of model.
        normalize: (mean, std) of the pixels on the scale 0 to 1, for images of uint8: they count as
            ``(images / 255 - mean) / std``.

    Raises:
        ValueError: model, criterion or optimizer is none that it takes, or does more than the step
            would do, such as hooks; the message names it. Checked again whenever it has changed.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        normalize: tuple[float, float] | None = None,
    ) -> None:
        self._model, self._criterion, self._optimizer = model, criterion, optimizer
        self._scale, self._shift = 1.0, 0.0
        if normalize is not None:
            mean, std = map(float, normalize)
            if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
                _refuse(f"normalize: expected a finite mean and std > 0, got {normalize}")
            self._scale, self._shift = 1 / (255 * std), -mean / std
        self._normalizes = normalize is not None
        self._captured: _CapturedStep | None = None
        self._build()

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Train on one batch.

        Args:
            images: [n, ...] of the parameters' dtype, or of uint8 with ``normalize``, on the
                parameters' device; without a Flatten in the model [n, in_features]. Any strides.
                n may differ from call to call.
            labels: class indices [n] of int64, int32 or uint8.

        Returns:
            The loss before the update, detached.

        Raises:
            IndexError: a label is neither a class nor ``ignore_index``; nothing has been updated.
                On a CUDA device a device-side assertion instead.
            TypeError: images or labels are no plain dense tensor.
            ValueError: the shapes or dtypes do not fit, or the model is not as it was and cannot be
                taken any more; nothing has been updated.
        """
        self._check()
        self._check_images(images, labels)
        return self._run(images, labels, None, 0, [float(g["lr"]) for g in self._groups])

    def epoch(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        permutation: Tensor | None = None,
        scheduler: Scheduler | None = None,
    ) -> float:
        """Train on all images once, many batches to a native call.

        Ctrl-C interrupts between two batches, within 0.1 s unless one batch takes longer. Then
        parameters, momentum and scheduler are as the ordinary loop leaves them after a batch; so
        they are where the scheduler raises an exception.

        Args:
            images: [n, ...], as for a step.
            labels: class indices [n].
            batch_size: images per step; the last step may have fewer.
            permutation: indices of images, int64: the order in which they come; None: as they lie.
            scheduler: its ``step`` is called once for each batch, for those of one native call
                before they run.

        Returns:
            The mean loss over the images, each as it was trained on.

        Raises:
            IndexError: a label or an index is out of range; nothing has been updated.
            TypeError, ValueError: as for a step, or batch_size is no positive integer.
        """
        parts = self.parts(images, labels, batch_size, permutation, scheduler)
        examples = len(images) if permutation is None else len(permutation)
        if examples == 0:
            return math.nan
        batch_size = min(batch_size, examples)
        total, begin = 0.0, 0
        for losses in parts:
            end = min(begin + len(losses) * batch_size, examples)
            if self._reduction == 1:
                losses = losses.double()
                losses[:-1] *= batch_size
                losses[-1] *= end - begin - (len(losses) - 1) * batch_size
            total += losses.sum(dtype=torch.float64).item()
            begin = end
        return total / examples

    def parts(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        permutation: Tensor | None = None,
        scheduler: Scheduler | None = None,
    ) -> Iterator[Tensor]:
        """Train as ``epoch`` does, and hand over control after each native call, when it is done.

        Between two parts model, optimizer and scheduler agree, and one may stop for good.

        Args:
            images: [n, ...], as for a step.
            labels: class indices [n].
            batch_size: images per step; the last step may have fewer.
            permutation: see ``epoch``.
            scheduler: see ``epoch``.

        Yields:
            The loss of each batch of the native call, [steps].

        Raises:
            IndexError, TypeError, ValueError: as ``epoch``, before the first part.
        """
        self._check()
        self._check_images(images, labels)
        if not isinstance(batch_size, int) or batch_size < 1:
            _refuse(f"epoch: batch_size: expected an integer of at least 1, got {batch_size}")
        images = images.flatten(1)
        self._check_labels(images, labels, permutation)
        examples = len(images) if permutation is None else len(permutation)
        size = min(batch_size, max(examples, 1))
        return self._parts(images, labels, size, permutation, scheduler)

    def _parts(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        permutation: Tensor | None,
        scheduler: Scheduler | None,
    ) -> Iterator[Tensor]:
        examples = len(images) if permutation is None else len(permutation)
        begin, steps = 0, 1
        while begin < examples:
            lrs: list[list[float]] = []
            failure: Exception | None = None
            started = time.perf_counter()
            with _interrupts_wait():
                try:
                    lrs.extend(
                        self._schedule(scheduler, min(steps, -(-(examples - begin) // batch_size)))
                    )
                except Exception as error:  # of the scheduler, after a batch that it has counted
                    failure = error
                end = min(begin + len(lrs) * batch_size, examples)
                rates = [rate for of_step in lrs for rate in of_step]
                if permutation is None:
                    chosen: _Chosen = images[begin:end], labels[begin:end], None
                else:
                    chosen = images, labels, permutation[begin:end]
                losses = self._run(*chosen, batch_size, rates)
                if losses.is_cuda:
                    torch.cuda.current_stream(losses.device).synchronize()
            if failure is not None:
                raise failure
            steps = max(1, int(_SECONDS_PER_CALL * len(lrs) / (time.perf_counter() - started)))
            begin = end
            self._check()
            yield losses

    def _schedule(self, scheduler: Scheduler | None, steps: int) -> Iterator[list[float]]:
        """Yield the learning rates of each of so many steps, or of fewer if other options change.

        The options are those of the first step: `_run` uses them.
        """
        for _ in range(steps):
            yield [float(g["lr"]) for g in self._groups]
            if scheduler is None:
                continue
            self._optimizer._opt_called = True  # type: ignore[attr-defined]
            scheduler.step()
            if self._read_options() != self._options:
                return

    def _run(
        self, images: Tensor, labels: Tensor, order: Tensor | None, batch_size: int, lr: list[float]
    ) -> Tensor:
        params, buffers, groups = self._params, self._no_buffers, self._groups_of_params
        new: list[tuple[Tensor, Tensor]] = []
        if self._has_momentum:
            buffers, groups = [], groups.copy()
            for i, param in enumerate(params):
                group = groups[2 * i]
                if group == _FROZEN or not self._options[len(_OPTIONS) * group]:
                    buffers.append(self._empty)
                    continue
                buffer = self._optimizer.state[param].get("momentum_buffer")
                if buffer is None:
                    buffer = torch.empty_like(param)
                    new.append((param, buffer))
                    groups[2 * i + 1] = 1
                buffers.append(buffer)
        criterion = self._criterion
        recording = torch.is_grad_enabled()
        _set_grad_enabled(False)  # a quarter of what no_grad() costs
        try:
            loss = _train_steps(
                images,
                labels,
                order,
                batch_size,
                params,
                buffers,
                self._layers,
                groups,
                self._options,
                lr,
                self._scale,
                self._shift,
                criterion._buffers["weight"],
                criterion.ignore_index,
                criterion.label_smoothing,
                self._reduction,
                self._captured.number if self._captured else 0,
            )
        except ValueError:
            self._build()  # says it by name if it is the model, whose tensors were replaced
            raise
        finally:
            _set_grad_enabled(recording)
        for owner, buffer in new:
            self._optimizer.state[owner]["momentum_buffer"] = buffer
        _increment_version(self._trained + buffers)
        self._optimizer._opt_called = True  # type: ignore[attr-defined]  # for LRScheduler
        return loss

    # What follows is checked at each step, and cheaply: tests of what changes nothing but what is
    # computed, and a comparison with what the model was when it was parsed.

    def _check(self) -> None:
        if self._state() != self._parsed_state:
            self._build()
        self._groups = self._optimizer.param_groups
        if any(self._hooks):
            self._refuse_hooks()
        if torch.is_inference_mode_enabled():
            _refuse("inference_mode is on, where nothing can be trained: leave it for TrainStep")
        if torch.is_autocast_enabled(self._params[0].device.type):
            _refuse("autocast is on, which would change the dtypes: leave it for TrainStep")

    def _state(self) -> list[Any]:
        groups = self._optimizer.param_groups
        return [
            *map(type, self._modules),
            *map(len, self._dicts),  # a forward or step of the instance's own
            len(self._criterion._parameters),
            *[id(child) for children in self._children for child in children.values()],
            *[id(param) for params in self._param_dicts for param in params.values()],
            *[p.requires_grad for p in self._params],
            # Hooks of tensors have no dict before the first one.
            *[p._backward_hooks or p._post_accumulate_grad_hooks for p in self._params],
            *[linear.activation for linear in self._fused],
            self._model.training,
            self._criterion.reduction,
            self._optimizer.__dict__.get("step"),
            *[float(value) for group in groups for value in _settings_of(group)],
            *[id(param) for group in groups for param in group["params"]],
        ]

    def _read_options(self) -> list[float]:
        return [float(g[name]) for g in self._optimizer.param_groups for name in _OPTIONS]

    def _check_images(self, images: Tensor, labels: Tensor) -> None:
        for name, tensor in (("images", images), ("labels", labels)):
            if type(tensor) is not Tensor or tensor.layout is not torch.strided:
                _expect_tensor(name, tensor)
        dtype, dims = images.dtype, images.dim()
        if dtype is not (torch.uint8 if self._normalizes else self._params[0].dtype):
            dtypes = "uint8, as normalize is given" if self._normalizes else self._params[0].dtype
            hint = "" if self._normalizes else "; for uint8 give TrainStep normalize=(mean, std)"
            _refuse(f"images: expected {dtypes}, got {dtype}{hint}")
        if dims != 2 and not (self._flattens and dims > 2):
            shape = "[n, ...]" if self._flattens else "[n, in_features], as model does not flatten"
            _refuse(f"images: expected {shape}, got {list(images.shape)}")
        device = self._params[0].device
        if images.device != device or images.requires_grad:
            _refuse(
                f"images: expected a plain tensor on {device} that needs no gradient, got one on "
                f"{images.device}: call images.detach().to({str(device)!r})"
            )
        if labels.device != device:
            _refuse(f"labels: expected a tensor on {device}, got one on {labels.device}")

    def _check_labels(self, images: Tensor, labels: Tensor, permutation: Tensor | None) -> None:
        """Refuse what is wrong anywhere in the epoch, before its first step."""
        if labels.shape != images.shape[:1]:
            _refuse(f"labels: expected shape {[len(images)]}, got {list(labels.shape)}")
        chosen = labels
        if permutation is not None:
            _expect_tensor("permutation", permutation)
            if permutation.device != images.device:
                _refuse(
                    f"permutation: expected a tensor on {images.device}, got one on "
                    f"{permutation.device}"
                )
            if permutation.dtype is not torch.int64 or permutation.dim() != 1:
                _refuse(
                    "permutation: expected indices of int64 [examples], got "
                    f"{permutation.dtype} {list(permutation.shape)}"
                )
            wrong = (permutation < 0) | (permutation >= len(images))
            if wrong.any():
                raise IndexError(
                    f"mnist_ext.TrainStep: permutation: expected indices of {len(images)} images, "
                    f"got {permutation[wrong][0].item()}"
                )
            chosen = labels[permutation]
        chosen = chosen.long()  # a number beyond the labels' own dtype would wrap around
        classes = self._linears[-1].out_features
        wrong = (chosen < 0) | (chosen >= classes)
        wrong &= chosen != self._criterion.ignore_index
        if wrong.any():
            raise IndexError(
                f"mnist_ext.TrainStep: labels: expected class indices in [0, {classes}) or "
                f"ignore_index {self._criterion.ignore_index}, got {chosen[wrong][0].item()}"
            )

    def _build(self) -> None:
        """Parse model, criterion and optimizer, or refuse them."""
        self._modules = [*self._model.modules(), self._criterion]
        names = {m: name or "model" for name, m in self._model.named_modules()}
        self._names = {**names, self._criterion: "criterion"}
        self._dicts = [m.__dict__ for m in self._modules]
        self._children = [m._modules for m in self._modules if m._modules]
        self._hooks: list[Any] = [
            attributes[hooks] for attributes in self._dicts for hooks in _HOOKS
        ]
        self._hooks += [getattr(_global_hooks, f"_global{hooks}") for hooks in _HOOKS]
        self._hooks += [
            self._optimizer._optimizer_step_pre_hooks,
            self._optimizer._optimizer_step_post_hooks,
            _global_optimizer_hooks._global_optimizer_pre_hooks,
            _global_optimizer_hooks._global_optimizer_post_hooks,
        ]
        if any(self._hooks):
            self._refuse_hooks()
        self._check_criterion()
        self._parse_model()
        self._parse_optimizer()
        if self._captured is None and _can_capture(self._params[0]):
            self._captured = _CapturedStep()
        self._empty = torch.empty(0, device=self._params[0].device)
        self._no_buffers: list[Tensor] = []
        self._param_dicts = [linear._parameters for linear in self._linears]
        self._fused = [m for m in self._linears if isinstance(m, _ours.Linear)]
        self._parsed_state = self._state()

    def _refuse_hooks(self) -> NoReturn:
        for module in self._modules:
            for hooks in _HOOKS:
                if getattr(module, hooks):
                    _refuse(
                        f"{self._names[module]} ({type(module).__name__}) has {hooks[1:]}, which "
                        "would not run: remove them, or train with the ordinary loop"
                    )
        _refuse(
            "optimizer has step hooks, or hooks of all modules or optimizers are registered, which "
            "would not run: remove them, or train with the ordinary loop"
        )

    def _check_criterion(self) -> None:
        criterion = self._criterion
        if type(criterion) not in _CRITERIA or "forward" in criterion.__dict__:
            _refuse(f"criterion: expected torch.nn.CrossEntropyLoss, got {criterion}")
        if criterion.reduction not in ("mean", "sum"):
            _refuse(f'criterion: expected reduction "mean" or "sum", got {criterion.reduction!r}')
        weight = criterion.weight
        if "weight" not in criterion._buffers or (weight is not None and weight.requires_grad):
            _refuse("criterion: expected a weight that needs no gradient: call weight.detach()")
        self._reduction = 1 if criterion.reduction == "mean" else 2

    def _parse_model(self) -> None:
        self._flattens = False
        self._linears: list[nn.Linear] = []
        relus: list[bool] = []
        views: list[tuple[str, int]] = []  # those that name the number of features
        for where, module, features in _calls_of(self._model, self._names):
            if "forward" in module.__dict__:
                _refuse(f"{where}: its forward was replaced: restore it")
            if type(module) is nn.Flatten and not self._linears:
                if (module.start_dim, module.end_dim) != (1, -1):
                    _refuse(f"{where}: expected Flatten(start_dim=1, end_dim=-1), got {module}")
                self._flattens = True
                if features != -1:
                    views.append((where, features))
            elif isinstance(module, nn.Linear) and type(module) in _LINEARS:
                self._linears.append(module)
                relus.append(getattr(module, "activation", "none") == "relu")
            elif type(module) is nn.ReLU and self._linears:
                relus[-1] = True
            elif type(module) is not nn.Identity:
                hint = "remove it, or train with the ordinary loop"
                if torch.nn.utils.parametrize.is_parametrized(module):
                    hint = "it is parametrized: call remove_parametrizations first"
                _refuse(f"{where}: expected Flatten first, then Linear and ReLU; {hint}")
        if not self._linears:
            _refuse("model: expected at least one Linear, got none")
        for where, features in views:
            if features != self._linears[0].in_features:
                first = self._linears[0]
                _refuse(
                    f"{where}: expected in_features of {self._names[first]}, {first.in_features}, "
                    f"got {features}"
                )
        self._params: list[nn.Parameter] = []
        self._layers = []
        for i, linear in enumerate(self._linears):
            for name in ("weight", "bias"):
                self._add_parameter(linear, name)
            if i > 0 and linear.in_features != self._linears[i - 1].out_features:
                _refuse(
                    f"{self._names[linear]}: expected in_features to be the layer's before, "
                    f"{self._linears[i - 1].out_features}, got {linear.in_features}"
                )
            self._layers.append((linear.bias is not None) * _BIAS + relus[i] * _RELU)
        self._check_memory()

    def _check_memory(self) -> None:
        names = [
            f"{self._names[linear]}.{name}"
            for linear in self._linears
            for name in ("weight", "bias")
            if linear._parameters[name] is not None
        ]
        placed = sorted(
            (p.data_ptr(), p.nbytes, name) for p, name in zip(self._params, names, strict=True)
        )
        for (begin, size, name), (following, _, other) in itertools.pairwise(placed):
            if following < begin + size:
                _refuse(f"{other} shares memory with {name}: give each parameter its own")

    def _add_parameter(self, linear: nn.Linear, name: str) -> None:
        where = f"{self._names[linear]}.{name}"
        param = linear._parameters.get(name, False)
        if param is None and name == "bias":
            return
        if type(param) is not nn.Parameter:
            _refuse(f"{where}: expected a torch.nn.Parameter, got {type(param).__name__}")
        if any(param is other for other in self._params):
            _refuse(f"{where} is shared with another layer: give each layer its own")
        first = self._params[0] if self._params else param
        if (
            param.device.type not in ("cpu", "cuda")
            or param.device != first.device
            or param.dtype not in (torch.float32, torch.float64)
            or param.dtype is not first.dtype
            or not param.is_contiguous()
            or param.numel() == 0
        ):
            _refuse(
                f"{where}: expected a contiguous tensor, not empty, of float32 or of float64, on "
                "the CPU or on a CUDA device, as all others, got "
                f"{list(param.shape)} {param.dtype} on {param.device}"
            )
        if param.device.type == "cuda" and _library.cuda is None:
            _refuse(f"{where} is on {param.device}, but: {_library.cuda_reason}")
        if param._backward_hooks or param._post_accumulate_grad_hooks:
            _refuse(f"{where} has hooks, which would not run: remove them")
        self._params.append(param)

    def _parse_optimizer(self) -> None:
        optimizer = self._optimizer
        step = optimizer.__dict__.get("step")
        if type(optimizer) not in _OPTIMIZERS:
            _refuse(f"optimizer: expected torch.optim.SGD, got {type(optimizer).__name__}")
        if step is not None and not hasattr(step, "_wrapped_by_lr_sched"):
            _refuse("optimizer: its step was replaced: restore it")
        self._groups = optimizer.param_groups
        group_of: dict[int, int] = {}
        known = {id(p) for p in self._params}
        for number, group in enumerate(self._groups):
            if group["differentiable"]:
                _refuse(f"optimizer: group {number} is differentiable: leave that off")
            for i, param in enumerate(group["params"]):
                group_of[id(param)] = number
                if id(param) not in known:
                    _refuse(
                        f"optimizer: parameter {i} of group {number}, {list(param.shape)}, belongs "
                        "to no layer of model: give the optimizer model.parameters()"
                    )
        self._options = self._read_options()
        self._has_momentum = any(group["momentum"] for group in self._groups)
        self._groups_of_params: list[int] = []
        self._trained: list[Tensor] = []
        for param in self._params:
            of_param = group_of.get(id(param), _FROZEN) if param.requires_grad else _FROZEN
            self._groups_of_params += [of_param, 0]
            if of_param != _FROZEN:
                self._trained.append(param)
        if not self._trained:
            _refuse("model: every parameter is frozen or unknown to the optimizer")


def _can_capture(param: Tensor) -> bool:
    return param.is_cuda


class _CapturedStep:
    """Where the CUDA graph of a step stays between calls; goes with its TrainStep."""

    def __init__(self) -> None:
        self.number = _new_captured_step()
        weakref.finalize(self, _free_captured_step, self.number)

    def __reduce__(self) -> Any:  # a copy has one of its own
        return _CapturedStep, ()


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Let Ctrl-C come at the end: what has been scheduled is trained, and momentum is kept."""
    handler = signal.getsignal(signal.SIGINT)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if handler is None or not in_main_thread:  # no handler of Python's, or not of this thread's
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


class _Tracer(torch.fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in _LINEARS or super().is_leaf_module(m, module_qualified_name)


class _Call(NamedTuple):
    where: str  # for messages
    module: nn.Module  # what is called, or what does the same as the function that is called
    features: int = -1  # that a view names


_FLATTENS = (torch.flatten, "flatten")
_VIEWS = (torch.reshape, "reshape", "view")
_RELUS = (F.relu, torch.relu, torch.relu_, "relu", "relu_")


def _calls_of(model: nn.Module, names: dict[nn.Module, str]) -> list[_Call]:
    """Return what model calls, one after the other, or refuse it."""
    for module, name in names.items():
        where = f"{name} ({type(module).__name__})"
        # Tracing follows the class's forward of model, and no forward of a Sequential.
        traced_past = module is model or isinstance(module, nn.Sequential)
        if traced_past and "forward" in module.__dict__:
            _refuse(f"{where}: its forward was replaced: restore it")
        if type(module).__call__ is not nn.Module.__call__:
            _refuse(f"{where}: its class has a __call__ of its own: leave that to forward")
    if type(model) in (*_LINEARS, nn.Flatten, nn.ReLU):
        return [_Call(f"model ({type(model).__name__})", model)]
    where = f"model ({type(model).__name__})"
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
            _refuse(
                f"{where}: expected a forward that calls Flatten, Linear and ReLU (or "
                "torch.flatten(x, 1), x.view(x.size(0), -1), F.relu) one after the other, for "
                f"batches of any size, and does nothing else, found {_in_words(node)}"
            )
        calls.append(call)
        before = node
    return calls


def _call_of(node: torch.fx.Node, model: nn.Module, names: dict[nn.Module, str]) -> _Call | None:
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


def _expect_tensor(name: str, value: Any) -> None:
    if type(value) is Tensor and value.layout is torch.strided:
        return
    got = f"one of layout {value.layout}" if type(value) is Tensor else type(value).__name__
    raise TypeError(f"mnist_ext.TrainStep: {name}: expected a plain dense torch.Tensor, got {got}")


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"mnist_ext.TrainStep: {message}")
