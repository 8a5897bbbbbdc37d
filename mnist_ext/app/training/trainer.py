"""Training and evaluation: the loop that PyTorch's own tutorials teach."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mnist_ext import TrainStep, build_info, optim
from mnist_ext.app import UserError
from mnist_ext.app.data.augment import augmented
from mnist_ext.app.data.datasets import Dataset, Split, batches, draw_order, take
from mnist_ext.app.training.distributed import ALONE, Processes
from mnist_ext.app.training.models import mlp
from mnist_ext.app.training.settings import TrainConfig
from mnist_ext.nn import swap

# Images per batch in evaluation. It affects speed and memory only.
_EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class EpochMetrics:
    """What one epoch achieved.

    Attributes:
        epoch: its number, from 1.
        train_loss: mean loss over the training images, each as it was trained on.
        test_loss: mean loss over the test images after the epoch.
        test_accuracy: correctly classified test images after the epoch, in percent.
        samples_per_second: training images per second, evaluation excluded.
        seconds: duration of the epoch, evaluation included.
        lr: learning rate of the last step.
    """

    epoch: int
    train_loss: float
    test_loss: float
    test_accuracy: float
    samples_per_second: float
    seconds: float
    lr: float


@dataclass(frozen=True)
class StepMetrics:
    """What one step achieved.

    Attributes:
        epoch: the number of its epoch, from 1.
        step: its number in the run, from 1.
        loss: mean loss over its batch, before the update.
        lr: its learning rate.
    """

    epoch: int
    step: int
    loss: float
    lr: float


# Called after some steps of training with the images since the last call, the loss of the last
# batch (a tensor, as reading it makes a GPU wait) and the steps to be logged. Returns whether to
# stop.
Observer = Callable[[int, Tensor, list[StepMetrics]], bool]


def select_device(name: str, impl: str) -> torch.device:
    """Return the device called ``name``.

    Raises:
        UserError: there is no such device, or ``impl`` cannot use it.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"unknown device {name!r}: use cpu, cuda or cuda:N")
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"device {name!r}: PyTorch finds no CUDA GPU here; use --device cpu")
    if device.index is not None and device.index >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise UserError(f"device {name!r}: the last GPU here is cuda:{last}")
    if impl == "ext" and not build_info()["cuda"]:
        raise UserError(
            f"device {name!r}: this build of mnist_ext has no CUDA kernels; use --impl torch or "
            "--device cpu"
        )
    return device


def build(config: TrainConfig, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """Return the untrained model and the criterion, of the implementation asked for.

    The initial weights depend on ``config.seed`` alone, not on implementation or device.

    Raises:
        UserError: the model does not fit into memory.
    """
    torch.manual_seed(config.seed)
    try:
        model: nn.Module = mlp(config.hidden, config.activation).to(device)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"cannot build the model ({reason}); use a smaller --hidden") from error
    criterion: nn.Module = nn.CrossEntropyLoss()
    if config.impl == "ext":
        model, criterion = swap(model), swap(criterion)
    return model, criterion


def make_scheduler(
    config: TrainConfig, optimizer: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler | None:
    """Return the scheduler asked for, to be stepped after each of so many batches, or None."""
    if config.scheduler == "onecycle":
        return torch.optim.lr_scheduler.OneCycleLR(
            optimizer, config.lr, total_steps=steps, cycle_momentum=False
        )
    if config.scheduler == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    return None


class Trainer:
    """The training of a model in place, on the device it is on.

    It can stop after any step, and go on in another process from there with the same bits: see
    ``state``. With several processes each trains on its share of every batch, and each image counts
    the same: the run is that of one process, up to rounding.

    Args:
        model: maps float32 images [n, 1, 28, 28] to logits [n, classes].
        criterion: maps logits and int64 labels [n] to the mean loss of the batch.
        config: the settings; ``batch_size`` is that of all processes together.
        dataset: the training and test set.
        processes: this process and the others.

    Attributes:
        epoch: how many epochs are complete.
        step: how many steps of the next epoch are.
        steps_per_epoch: steps of an epoch.
        images_per_epoch: images of an epoch.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module,
        config: TrainConfig,
        dataset: Dataset,
        processes: Processes = ALONE,
    ) -> None:
        self.model, self._criterion, self._config = model, criterion, config
        self._processes = processes
        self._device = next(model.parameters()).device
        self._train, self._test = dataset.train.to(self._device), dataset.test.to(self._device)
        self._normalization = dataset.mean, dataset.std
        self.images_per_epoch = len(self._train)
        if config.limit_batches is not None:
            limit = config.limit_batches * config.batch_size
            self.images_per_epoch = min(self.images_per_epoch, limit)
        self.steps_per_epoch = -(-self.images_per_epoch // config.batch_size)

        optimizer_class = optim.SGD if config.impl == "ext" else torch.optim.SGD
        self._optimizer = optimizer_class(
            model.parameters(),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )
        self._scheduler = make_scheduler(
            config, self._optimizer, self.steps_per_epoch * config.epochs
        )
        self._generator = torch.Generator().manual_seed(config.seed)
        # From here the order of the epoch is drawn, again when it goes on in its middle.
        self._epoch_start = self._generator.get_state()
        self._forward = model if processes.size == 1 else DistributedDataParallel(model)
        self.epoch, self.step = 0, 0
        self._lr = config.lr  # of the last step
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        self._seconds = 0.0

    def train_epoch(self, observe: Observer | None = None) -> EpochMetrics | None:
        """Train to the end of the epoch and evaluate.

        Args:
            observe: see ``Observer``.

        Returns:
            The metrics, or None where ``observe`` stopped the training before the end.
        """
        started = time.perf_counter()
        batch_size = self._config.batch_size
        self._generator.set_state(self._epoch_start)
        order = draw_order(self._train, self._generator)[: self.images_per_epoch]
        order = order[self.step * batch_size :]
        self.model.train()
        take_steps = self._native_steps if self._config.one_call else self._steps
        for losses, rates in take_steps(self._examples(), order):
            done = min((self.step + len(losses)) * batch_size, self.images_per_epoch)
            images = done - self.step * batch_size
            self._add_losses(losses, images)
            rows = self._rows(losses, rates)
            self.step += len(losses)
            self._lr = rates[-1]
            stop = observe is not None and observe(images, losses[-1], rows)
            if stop and self.step < self.steps_per_epoch:
                self._seconds += time.perf_counter() - started
                return None
        train_loss = self._loss_sum.item() / self.images_per_epoch
        trained = self._seconds + time.perf_counter() - started
        test_loss, test_accuracy = evaluate(
            self.model,
            self._criterion,
            self._test,
            *self._normalization,
            self._config.limit_batches,
            self._processes,
        )
        metrics = EpochMetrics(
            epoch=self.epoch + 1,
            train_loss=train_loss,
            test_loss=test_loss,
            test_accuracy=test_accuracy,
            samples_per_second=self.images_per_epoch / trained,
            seconds=self._seconds + time.perf_counter() - started,
            lr=self._lr,
        )
        self.epoch, self.step, self._seconds = self.epoch + 1, 0, 0.0
        self._loss_sum.zero_()
        self._epoch_start = self._generator.get_state()
        return metrics

    def fault(self, metrics: EpochMetrics | None = None) -> str | None:
        """Return which loss or parameter is not finite, or None where all are.

        Args:
            metrics: those of the epoch that is over; None within an epoch.
        """
        losses = {"training loss": self._loss_sum.item()}
        if metrics is not None:
            losses = {"training loss": metrics.train_loss, "test loss": metrics.test_loss}
        for name, loss in losses.items():
            if not math.isfinite(loss):
                return f"the {name} is {loss}"
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                return f"the parameter {name} is not finite"
        return None

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return all that the training depends on from here: tensors, and values for JSON.

        Where an exception left ``train_epoch``, that is the state after the last whole step.
        """
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        optimizer = self._optimizer.state_dict()
        for index, of_parameter in optimizer["state"].items():
            for name, value in of_parameter.items():
                if value is not None:
                    tensors[f"optimizer.{index}.{name}"] = value
        tensors["rng.order"] = self._epoch_start
        tensors["rng.torch"] = torch.get_rng_state()
        if self._device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(self._device)
        values = {
            "epoch": self.epoch,
            "step": self.step,
            "loss_sum": self._loss_sum.item(),
            "seconds": self._seconds,
            "lr": self._lr,
            "optimizer": optimizer["param_groups"],
            "scheduler": self._scheduler.state_dict() if self._scheduler else None,
        }
        return tensors, values

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Continue from what ``state`` returned, for the same settings and data.

        Raises:
            KeyError, RuntimeError, TypeError, ValueError: it is not the state of such a training.
        """
        of = {part: _part(tensors, part) for part in ("model", "optimizer", "rng")}
        self.model.load_state_dict(of["model"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in of["optimizer"].items():
            index, name = name.split(".")
            state.setdefault(int(index), {})[name] = value
        self._optimizer.load_state_dict({"state": state, "param_groups": values["optimizer"]})
        if self._scheduler is not None:
            self._scheduler.load_state_dict(values["scheduler"])
        self._epoch_start = of["rng"]["order"]
        torch.set_rng_state(of["rng"]["torch"])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(of["rng"]["cuda"], self._device)
        self.epoch, self.step = int(values["epoch"]), int(values["step"])
        self._loss_sum.fill_(values["loss_sum"])
        self._seconds, self._lr = float(values["seconds"]), float(values["lr"])

    def _examples(self) -> Split:
        """Return what this epoch trains on; the same again when it goes on in its middle."""
        if not self._config.augment:
            return self._train
        # So far apart, runs of neighbouring seeds share no copies.
        return augmented(self._train, (self._config.seed * 1_000_003 + self.epoch) % 2**63)

    def _steps(self, train: Split, order: Tensor) -> Iterator[tuple[Tensor, list[float]]]:
        """Take a step a batch of ``order``; yield its loss [1] and learning rate."""
        rank, size = self._processes.rank, self._processes.size
        for batch in order.split(self._config.batch_size):
            if len(batch) == 0:  # the epoch's steps are done; its evaluation is not
                return
            # Dealt out in turns, so that shares differ by one image at most. Where one is empty, an
            # image that counts nothing keeps the processes together.
            mine = batch[rank::size]
            images, labels = take(train, mine if len(mine) else batch[:1], *self._normalization)
            self._optimizer.zero_grad()
            loss = self._criterion(self._forward(images), labels)
            if size == 1:
                loss.backward()
                losses = loss.detach().reshape(1)
            else:
                # Gradients are averaged over the processes: weighted like this, that is the mean
                # over the whole batch.
                (loss * (len(mine) * size / len(batch))).backward()
                losses = loss.detach().double().reshape(1) * (len(mine) / len(batch))
                self._processes.sum(losses)
            rate = self._optimizer.param_groups[0]["lr"]
            self._optimizer.step()
            if self._scheduler is not None:
                self._scheduler.step()
            yield losses, [rate]

    def _native_steps(self, train: Split, order: Tensor) -> Iterator[tuple[Tensor, list[float]]]:
        """Take the steps of ``order``, many to a native call; yield those of each."""
        step = TrainStep(
            self.model, self._criterion, self._optimizer, normalize=self._normalization
        )
        rates = _Rates(self._optimizer, self._scheduler)
        order = order.to(self._device)
        for losses in step.parts(train.images, train.labels, self._config.batch_size, order, rates):
            yield losses, rates.take()

    def _add_losses(self, losses: Tensor, images: int) -> None:
        # One after the other: the sum does not depend on how many steps a native call had, nor on
        # where the training was interrupted.
        size = self._config.batch_size
        if len(losses) == 1:
            # On the device: reading every loss would make a GPU wait at every step.
            self._loss_sum.add_(losses[0], alpha=images)
            return
        total = self._loss_sum.item()
        for i, loss in enumerate(losses.tolist()):
            total += loss * min(size, images - i * size)
        self._loss_sum.fill_(total)

    def _rows(self, losses: Tensor, rates: list[float]) -> list[StepMetrics]:
        before = self.epoch * self.steps_per_epoch + self.step
        interval = self._config.log_interval
        first = interval - 1 - before % interval
        return [
            StepMetrics(self.epoch + 1, before + i + 1, losses[i].item(), rates[i])
            for i in range(first, len(losses), interval)
        ]


def _part(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    prefix = f"{part}."
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


class _Rates:
    """Steps the scheduler, if any, and keeps the learning rates of the steps."""

    def __init__(self, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        self._optimizer, self._scheduler = optimizer, scheduler
        self._rates: list[float] = []

    def step(self) -> None:
        self._rates.append(self._optimizer.param_groups[0]["lr"])
        if self._scheduler is not None:
            self._scheduler.step()

    def take(self) -> list[float]:
        """Return the rates since the last time."""
        rates, self._rates = self._rates, []
        return rates


def at_chance(accuracy: float, split: Split, limit_batches: int | None = None) -> str | None:
    """Return a note where an accuracy does not stand out from the same answer to every image.

    It does from two standard errors above the share of the most frequent class on.

    Args:
        accuracy: in percent.
        split: the images and labels.
        limit_batches: as for ``evaluate``.
    """
    share = int(split.labels.bincount().max()) / len(split)
    error = math.sqrt(share * (1 - share) / _evaluated(split, limit_batches))
    if accuracy > 100 * (share + 2 * error):
        return None
    return (
        f"an accuracy of {accuracy:.2f} % is at chance: the same answer to every image reaches "
        f"{100 * share:.2f} %; another --lr or more --epochs may help"
    )


def _evaluated(split: Split, limit_batches: int | None) -> int:
    return (
        len(split) if limit_batches is None else min(len(split), limit_batches * _EVALUATION_BATCH)
    )


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    criterion: nn.Module,
    split: Split,
    mean: float,
    std: float,
    limit_batches: int | None = None,
    processes: Processes = ALONE,
) -> tuple[float, float]:
    """Return the mean loss over ``split`` and the accuracy on it in percent.

    Args:
        model: maps float32 images [n, 1, 28, 28] to logits [n, classes].
        criterion: maps logits and int64 labels [n] to the mean loss of the batch.
        split: the images and labels, on the device of the model.
        mean: see ``mnist_ext.app.data.datasets.normalize``.
        std: see ``mnist_ext.app.data.datasets.normalize``.
        limit_batches: use so many batches only.
        processes: share the batches with these.
    """
    model.eval()
    device = split.labels.device
    images_used = _evaluated(split, limit_batches)
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # of the loss, of correct answers
    all_batches = batches(split, _EVALUATION_BATCH, mean, std)
    for images, labels in islice(all_batches, processes.rank, limit_batches, processes.size):
        logits = model(images)
        sums[0].add_(criterion(logits, labels), alpha=len(labels))
        sums[1] += (logits.argmax(dim=1) == labels).sum()
    processes.sum(sums)
    loss_sum, correct = sums.tolist()
    return loss_sum / images_used, 100 * correct / images_used
