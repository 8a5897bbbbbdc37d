"""Training and evaluation: the loop that PyTorch's own tutorials teach."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mnist_ext import build_info, optim
from mnist_ext.data import Dataset, Split, batches
from mnist_ext.errors import UserError
from mnist_ext.models import mlp
from mnist_ext.nn import swap
from mnist_ext.train_step import TrainStep

IMPLEMENTATIONS = ("ext", "torch")
SCHEDULERS = ("none", "onecycle")

# Images per batch in evaluation. It affects speed and memory only.
_EVALUATION_BATCH = 1000

Batch = tuple[Tensor, Tensor]
# Wraps the batches of one epoch, given also the epoch and their number, to show progress.
Progress = Callable[[Iterable[Batch], int, int], Iterable[Batch]]


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a training run.

    Attributes:
        dataset: one of ``mnist_ext.data.DATASETS``.
        data_dir: where to look for the data set first, and to download it to.
        recipe: the name of the recipe the settings started from; of no effect by itself.
        epochs: passes over the training set.
        batch_size: images per step.
        lr: learning rate; its peak under the ``onecycle`` scheduler.
        momentum: momentum of SGD.
        nesterov: use Nesterov momentum; needs a momentum above 0.
        weight_decay: L2 penalty of SGD.
        scheduler: ``none`` for a constant learning rate, or ``onecycle``.
        activation: one of ``mnist_ext.models.ACTIVATIONS``.
        hidden: the width of each hidden layer.
        impl: ``ext`` for the operators of this package, ``torch`` for PyTorch's.
        one_call: run many steps per native call, with ``mnist_ext.TrainStep``; needs ``ext``.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        seed: determines the initial weights and the order of the images.
        threads: CPU threads; None leaves PyTorch's choice.
        output_dir: the folder to create the run's folder in.
        name: name of the run's folder; None derives one from time, data set and implementation.
        target_accuracy: the test accuracy in percent that the run must reach, if any.
    """

    dataset: str = "auto"
    data_dir: str | None = None
    recipe: str = "tutorial"
    epochs: int = 5
    batch_size: int = 64
    lr: float = 0.01
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    scheduler: str = "none"
    activation: str = "none"
    hidden: tuple[int, ...] = (128, 64)
    impl: str = "ext"
    one_call: bool = False
    device: str = "cpu"
    seed: int = 0
    threads: int | None = None
    output_dir: str = "runs"
    name: str | None = None
    target_accuracy: float | None = None


RECIPES: dict[str, dict[str, Any]] = {
    # What a beginner's tutorial does: a linear model in three layers, plain SGD.
    "tutorial": {
        "epochs": 5,
        "batch_size": 64,
        "lr": 0.01,
        "momentum": 0.0,
        "nesterov": False,
        "weight_decay": 0.0,
        "scheduler": "none",
        "activation": "none",
    },
    # For accuracy in ten epochs, without augmented data. A higher learning rate gains nothing on
    # MNIST and diverges on the embedded digits.
    "best": {
        "epochs": 10,
        "batch_size": 128,
        "lr": 0.1,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 5e-4,
        "scheduler": "onecycle",
        "activation": "relu",
    },
}


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


class _Rates:
    """The learning rates of an epoch: steps the scheduler, if any; keeps the last step's rate."""

    def __init__(self, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        self._optimizer, self._scheduler = optimizer, scheduler
        self.last = 0.0

    def step(self) -> None:
        self.last = self._optimizer.param_groups[0]["lr"]
        if self._scheduler is not None:
            self._scheduler.step()


def train(
    model: nn.Module,
    criterion: nn.Module,
    config: TrainConfig,
    dataset: Dataset,
    progress: Progress | None = None,
) -> Iterator[EpochMetrics]:
    """Train ``model`` in place, on the device it is on.

    Args:
        model: maps float32 images [n, 1, 28, 28] to logits [n, classes].
        criterion: maps logits and int64 labels [n] to the mean loss of the batch.
        config: the settings.
        dataset: the training and test set.
        progress: wraps the batches of an epoch to show progress; not with ``one_call``.

    Yields:
        The metrics of each epoch, as soon as it is over.
    """
    device = next(model.parameters()).device
    train_split, test_split = dataset.train.to(device), dataset.test.to(device)
    steps = -(-len(train_split) // config.batch_size)

    optimizer_class = optim.SGD if config.impl == "ext" else torch.optim.SGD
    optimizer = optimizer_class(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
    )
    scheduler = None
    if config.scheduler == "onecycle":
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, config.lr, total_steps=steps * config.epochs, cycle_momentum=False
        )
    generator = torch.Generator().manual_seed(config.seed)
    normalize = dataset.mean, dataset.std
    step = TrainStep(model, criterion, optimizer, normalize=normalize) if config.one_call else None

    for epoch in range(1, config.epochs + 1):
        started = time.perf_counter()
        model.train()
        if step is not None:
            # The order that `batches` would draw.
            order = torch.randperm(len(train_split), generator=generator).to(device)
            rates = _Rates(optimizer, scheduler)
            train_loss = step.epoch(
                train_split.images, train_split.labels, config.batch_size, order, rates
            )
            lr = rates.last
        else:
            epoch_batches: Iterable[Batch] = batches(
                train_split, config.batch_size, dataset.mean, dataset.std, generator
            )
            if progress is not None:
                epoch_batches = progress(epoch_batches, epoch, steps)

            # Summed up on the device: reading every loss would make a GPU wait at every step.
            loss_sum = torch.zeros((), dtype=torch.float64, device=device)
            for images, labels in epoch_batches:
                optimizer.zero_grad()
                loss = criterion(model(images), labels)
                loss.backward()
                lr = optimizer.param_groups[0]["lr"]
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
                loss_sum.add_(loss.detach(), alpha=len(labels))
            train_loss = loss_sum.item() / len(train_split)
        trained = time.perf_counter()

        test_loss, test_accuracy = evaluate(model, criterion, test_split, dataset.mean, dataset.std)
        yield EpochMetrics(
            epoch=epoch,
            train_loss=train_loss,
            test_loss=test_loss,
            test_accuracy=test_accuracy,
            samples_per_second=len(train_split) / (trained - started),
            seconds=time.perf_counter() - started,
            lr=lr,
        )


@torch.inference_mode()
def evaluate(
    model: nn.Module, criterion: nn.Module, split: Split, mean: float, std: float
) -> tuple[float, float]:
    """Return the mean loss over ``split`` and the accuracy on it in percent.

    Args:
        model: maps float32 images [n, 1, 28, 28] to logits [n, classes].
        criterion: maps logits and int64 labels [n] to the mean loss of the batch.
        split: the images and labels, on the device of the model.
        mean: see ``mnist_ext.data.normalize``.
        std: see ``mnist_ext.data.normalize``.
    """
    model.eval()
    loss_sum = torch.zeros((), dtype=torch.float64, device=split.labels.device)
    correct = torch.zeros((), dtype=torch.int64, device=split.labels.device)
    for images, labels in batches(split, _EVALUATION_BATCH, mean, std):
        logits = model(images)
        loss_sum.add_(criterion(logits, labels), alpha=len(labels))
        correct += (logits.argmax(dim=1) == labels).sum()
    return loss_sum.item() / len(split), 100 * correct.item() / len(split)
