"""A training step of a multilayer perceptron in one native call.

``model`` says which layers a model consists of, ``optimizer`` what is read of an optimizer,
``guard`` whether both are still what they were, ``epoch`` makes several steps in one call.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mnist_ext._decision import TRACING
from mnist_ext._torch_private import count_step, is_any_autocast_enabled, set_grad_enabled
from mnist_ext.train_step.epoch import Epoch, Scheduler, check_indices, expect_tensor
from mnist_ext.train_step.guard import Guard, check_hooks
from mnist_ext.train_step.model import Layers, loss_arguments, refuse
from mnist_ext.train_step.optimizer import Groups, learning_rates

__all__ = ["Scheduler", "TrainStep"]

_train_steps = torch.ops.mnist_ext.train_steps.default
_new_train_step = torch.ops.mnist_ext.new_train_step.default
_free_train_step = torch.ops.mnist_ext.free_train_step.default
_REPLAYS_GRAPHS = True  # on CUDA; tests and benchmarks compare with launches alone
_increment_version = torch.autograd.graph.increment_version


class TrainStep:
    """One step of the ordinary training loop in one native call.

    ``loss = step(images, labels)`` does what these lines do, with the same numbers up to rounding::

        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()

    There is no autograd graph and no ``.grad``; parameters and momentum buffers are updated in
    place, in the tensors that model and optimizer hold: one may go on with the ordinary loop at any
    step. The optimizer's settings are read at each step, and changes of the model are noticed:
    other modules, parameters or attributes, frozen parameters, hooks. What cannot be seen so
    cheaply needs `refresh`. Frozen parameters, and those that the optimizer does not hold, stay as
    they are. A ``DistributedDataParallel`` is refused: nothing is exchanged with other processes.

    On a CUDA device nothing waits for the device in a step, and `epoch` waits a few times a second.
    A step that repeats the last one's sizes and tensors, but for images and labels, is one CUDA
    graph, which keeps up to 64 MiB of memory while this object lives. A capture of the caller's own
    takes the kernels. An index or label out of range ends with a device-side assertion there.

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
            would do, such as hooks; the message names it. At a step, too, once it has changed.
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
        self._normalize = normalize
        self._scale_and_shift = {"scale": 1.0, "shift": 0.0}  # of uint8 images
        if normalize is not None:
            mean, std = map(float, normalize)
            if not (math.isfinite(mean) and math.isfinite(std) and std > 0):
                refuse(f"normalize: expected a finite mean and std > 0, got {normalize}")
            self._scale_and_shift = {"scale": 1 / (255 * std), "shift": -mean / std}
        self.refresh()

    def __reduce__(self) -> Any:  # a copy parses its own model, and has a CUDA graph of its own
        make = functools.partial(type(self), normalize=self._normalize)
        return make, (self._model, self._criterion, self._optimizer)

    def refresh(self) -> None:
        """Look at model, criterion and optimizer again, or raise ValueError: why not.

        To be called after changes that a step does not notice: to what a forward reads besides the
        attributes and modules of its object (globals, closures, elements of a list or dict, numbers
        in a tensor), and to the forward of a class that is neither ``Linear`` nor ``ReLU``.
        """
        names = {module: name or "model" for name, module in self._model.named_modules()}
        names[self._criterion] = "criterion"
        check_hooks(names, self._optimizer)
        loss = loss_arguments(self._criterion)
        with TRACING:
            layers = Layers(self._model, names)
        groups = Groups(self._optimizer, layers)
        guard = Guard(list(names), self._criterion, self._optimizer, layers)
        self._layers, self._groups, self._guard = layers, groups, guard
        self._handle = _Handle(
            layers.params[0].device,
            relu=layers.relu,
            bias=[bias is not None for bias in layers.biases],
            **groups.arguments,
            **self._scale_and_shift,
            **loss,
        )

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Train on one batch; return the loss before the update, detached.

        Args:
            images: [n, ...] of the parameters' dtype, or of uint8 with ``normalize``, on the
                parameters' device; without a Flatten in the model [n, in_features]. Any strides.
            labels: class indices [n] of int64, int32 or uint8.

        Raises:
            IndexError: a label is neither a class nor ``ignore_index``; nothing has been updated.
            TypeError: images or labels are no plain dense tensor.
            ValueError: the shapes or dtypes do not fit, or the model is not as it was and cannot be
                taken any more; nothing has been updated.
        """
        self._check()
        self._check_images(images, labels)
        return self._run(images, labels, None, 0, learning_rates(self._optimizer))

    def epoch(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        permutation: Tensor | None = None,
        scheduler: Scheduler | None = None,
    ) -> float:
        """Train on all images once, many batches to a native call; return their mean loss.

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

        Raises:
            IndexError: a label or an index is out of range; nothing has been updated.
            TypeError, ValueError: as for a step, or batch_size is no positive integer.
        """
        return self._epoch(images, labels, batch_size, permutation).mean_loss(self, scheduler)

    def parts(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        permutation: Tensor | None = None,
        scheduler: Scheduler | None = None,
    ) -> Iterator[Tensor]:
        """As ``epoch``, but yield the losses [steps] of each native call, when it is done.

        Between two parts model, optimizer and scheduler agree, and one may stop for good.
        """
        return self._epoch(images, labels, batch_size, permutation).run(self, scheduler)

    def _epoch(
        self, images: Tensor, labels: Tensor, batch_size: int, permutation: Tensor | None
    ) -> Epoch:
        self._check()
        self._check_images(images, labels)
        if not isinstance(batch_size, int) or batch_size < 1:
            refuse(f"epoch: batch_size: expected an integer of at least 1, got {batch_size}")
        images = images.flatten(1)
        classes, ignored = self._layers.linears[-1].out_features, self._criterion.ignore_index
        check_indices(images, labels, permutation, classes, ignored)  # type: ignore[arg-type]
        return Epoch(images, labels, permutation, batch_size)

    def _run(
        self, images: Tensor, labels: Tensor, order: Tensor | None, batch_size: int, lr: list[float]
    ) -> Tensor:
        """Make the steps whose learning rates are given; return their losses."""
        groups = self._groups
        buffers, first_step = groups.momentum_buffers()
        recording = torch.is_grad_enabled()
        set_grad_enabled(False)
        try:
            losses = _train_steps(
                self._handle.number,
                images,
                labels,
                order,
                batch_size,
                lr,
                groups.params,
                buffers,
                first_step,
            )
        except ValueError:
            self.refresh()  # says it by name if it is the model, whose tensors were replaced
            raise
        finally:
            set_grad_enabled(recording)
        groups.keep(buffers, first_step)
        _increment_version(groups.trained + buffers)
        count_step(self._optimizer)
        return losses

    def _check(self) -> None:
        if not self._guard.holds():
            self.refresh()
        if torch.is_inference_mode_enabled():
            refuse("inference_mode is on, where nothing can be trained: leave it for TrainStep")
        if is_any_autocast_enabled() and torch.is_autocast_enabled(
            self._layers.params[0].device.type
        ):
            refuse("autocast is on, which would change the dtypes: leave it for TrainStep")

    def _check_images(self, images: Tensor, labels: Tensor) -> None:
        for name, tensor in (("images", images), ("labels", labels)):
            expect_tensor(name, tensor)
        param, flattens = self._layers.params[0], self._layers.flattens
        normalizes = self._normalize is not None
        device, dtype, dims = param.device, images.dtype, images.dim()
        if dtype is not (torch.uint8 if normalizes else param.dtype):
            dtypes = "uint8, as normalize is given" if normalizes else param.dtype
            hint = "" if normalizes else "; for uint8 give TrainStep normalize=(mean, std)"
            refuse(f"images: expected {dtypes}, got {dtype}{hint}")
        if dims != 2 and not (flattens and dims > 2):
            shape = "[n, ...]" if flattens else "[n, in_features], as model does not flatten"
            refuse(f"images: expected {shape}, got {list(images.shape)}")
        if images.device != device or images.requires_grad:
            refuse(
                f"images: expected a plain tensor on {device} that needs no gradient, got one on "
                f"{images.device}: call images.detach().to({str(device)!r})"
            )
        if labels.device != device:
            refuse(f"labels: expected a tensor on {device}, got one on {labels.device}")


class _Handle:
    """What stays the same between the steps, as the op has it; on CUDA also the graph of a step."""

    def __init__(self, device: torch.device, **settings: Any) -> None:
        like = torch.empty(0, device=device)
        self.number = _new_train_step(like, **settings, graph=_REPLAYS_GRAPHS)
        weakref.finalize(self, _free_train_step, like, self.number)
