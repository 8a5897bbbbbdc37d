"""What a finished run left behind: its model, and its record of settings and metrics."""

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mnist_ext.app import UserError
from mnist_ext.app.runs import checkpoint
from mnist_ext.app.training.models import mlp
from mnist_ext.app.training.settings import ACTIVATIONS
from mnist_ext.app.training.trainer import EpochMetrics, StepMetrics
from mnist_ext.nn import swap

_MODEL = "model.safetensors"
_TRAIN_AGAIN = "train again, with a lower --lr"
_EXPECTED = "expected a folder that 'mnist-ext train' has written"


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained model.

    Attributes:
        path: the folder of its run.
        model: maps float32 images [n, 1, 28, 28] to logits [n, 10], with this package's ops; in
            evaluation mode.
        hidden: the width of each hidden layer.
        activation: one of ``ACTIVATIONS``.
        dataset: the name of the data set that it was trained on.
        mean: see ``mnist_ext.app.data.datasets.normalize``.
        std: see ``mnist_ext.app.data.datasets.normalize``.
        epoch: the number of epochs that it was trained for.
    """

    path: Path
    model: nn.Sequential
    hidden: tuple[int, ...]
    activation: str
    dataset: str
    mean: float
    std: float
    epoch: int


@dataclass(frozen=True, eq=False)
class Record:
    """What a run wrote down.

    Attributes:
        config: the content of ``config.json``: ``started``, ``settings``, ``dataset`` and
            ``environment``.
        epochs: the rows of ``metrics.csv``.
        steps: the rows of ``steps.csv``; none where no step was logged.
    """

    config: dict[str, Any]
    epochs: list[EpochMetrics]
    steps: list[StepMetrics]


def load(run: str | Path) -> Trained:
    """Load the model of a run.

    Nothing in the file is executed, and nothing of a size that the file only claims is allocated.

    Args:
        run: the folder of the run.

    Raises:
        UserError: the folder or its model is missing, damaged or not of this package.
    """
    folder = Path(run)
    path = _file(folder, _MODEL)
    try:
        with checkpoint.opened(path) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(
            f"{path} is damaged or not a safetensors file ({error}); train again, or restore it"
        ) from error
    try:
        hidden = tuple(_whole(metadata, "hidden", width) for width in _widths(metadata))
        activation = _text(metadata, "activation")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}")
        std = _number(metadata, "std")
        if std <= 0:
            raise ValueError(f"std {std} is not above 0")
        trained = Trained(
            path=folder,
            model=_model(hidden, activation, tensors),
            hidden=hidden,
            activation=activation,
            dataset=_text(metadata, "dataset"),
            mean=_number(metadata, "mean"),
            std=std,
            epoch=_whole(metadata, "epoch", _text(metadata, "epoch")),
        )
    except ValueError as error:
        raise UserError(f"{path} is not a model of 'mnist-ext train': {error}") from error
    for name, parameter in trained.model.named_parameters():
        if not parameter.isfinite().all():
            raise UserError(
                f"{path}: the training diverged ({divergence(folder) or 'as the model shows'}): "
                f"{name} holds values that are not finite; {_TRAIN_AGAIN}"
            )
    return trained


def divergence(run: str | Path) -> str | None:
    """Return which loss of a run's last epoch is not finite; None where none is known to be."""
    path = Path(run) / "metrics.csv"
    try:
        last = parse_epochs(path, _read(path))[-1]
    except UserError:
        return None  # the model alone was kept
    for name, loss in (("training", last.train_loss), ("test", last.test_loss)):
        if not math.isfinite(loss):
            return f"the {name} loss was {loss} after epoch {last.epoch}"
    return None


def load_record(run: str | Path) -> Record:
    """Load the settings and the metrics of a run.

    Raises:
        UserError: the folder or one of the files is missing, damaged or not of this package.
    """
    folder = Path(run)
    path = _file(folder, "config.json")
    try:
        config = json.loads(_read(path))
        for part in ("settings", "dataset", "environment"):
            if not isinstance(config[part], dict):
                raise TypeError
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged, or not of 'mnist-ext train': restore it") from error
    path = _file(folder, "metrics.csv")
    return Record(config, parse_epochs(path, _read(path)), _steps(folder / "steps.csv"))


def parse_epochs(path: Path, text: str) -> list[EpochMetrics]:
    """Return the rows of ``metrics.csv``.

    Args:
        path: its path, for messages.
        text: its content.

    Raises:
        UserError: it is damaged, or its epochs do not ascend.
    """
    try:
        epochs = [_epoch(row) for row in csv.DictReader(text.splitlines())]
        if not epochs:
            raise ValueError("no epochs")
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is damaged, or not of 'mnist-ext train': restore it") from error
    for before, after in pairwise(epochs):
        if after.epoch <= before.epoch:
            raise UserError(
                f"{path} is damaged: epoch {after.epoch} stands after epoch {before.epoch}, as if "
                "two processes had written it; restore it, or train again"
            )
    return epochs


def _steps(path: Path) -> list[StepMetrics]:
    if not path.exists():
        return []
    whole = _read(path).rpartition("\n")[0]  # a process that is killed may leave part of a row
    try:
        return [
            StepMetrics(int(row["epoch"]), int(row["step"]), float(row["loss"]), float(row["lr"]))
            for row in csv.DictReader(whole.splitlines())
        ]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is damaged, or not of 'mnist-ext train': restore it") from error


def _epoch(row: Mapping[str, str]) -> EpochMetrics:
    numbers: dict[str, Any] = {f.name: float(row[f.name]) for f in fields(EpochMetrics)}
    return EpochMetrics(**{**numbers, "epoch": int(row["epoch"])})


def _file(folder: Path, name: str) -> Path:
    """Return the path of a file of the run, or raise UserError that names what is there."""
    try:
        if (folder / name).is_file():
            return folder / name
        if not folder.exists():
            raise UserError(f"there is no {folder}: {_EXPECTED}")
        if not folder.is_dir():
            raise UserError(f"{folder} is a file: {_EXPECTED}")
        runs = [path for path in folder.iterdir() if (path / name).is_file()]
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}") from error
    if runs:
        newest = max(runs, key=lambda path: (path / name).stat().st_mtime)
        raise UserError(f"{folder} holds runs, but is none itself; its newest one is {newest}")
    if how := divergence(folder):
        raise UserError(f"{folder} has no {name}: the training diverged ({how}); {_TRAIN_AGAIN}")
    raise UserError(
        f"{folder} has no {name}: {_EXPECTED} and not stopped before its first epoch was over"
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _model(
    hidden: tuple[int, ...], activation: str, tensors: Mapping[str, Tensor]
) -> nn.Sequential:
    """Build the model around these tensors; raise ValueError where they do not fit."""
    if len(tensors) != 2 * (len(hidden) + 1):
        raise ValueError(f"it holds {len(tensors)} tensors for {len(hidden) + 1} layers")
    with torch.device("meta"):  # without memory, until the tensors are known to fit
        model = mlp(hidden, activation)
    expected = model.state_dict()
    if expected.keys() != tensors.keys():
        raise ValueError(
            f"it holds the tensors {_names(tensors)} where {_names(expected)} are expected"
        )
    for name, tensor in tensors.items():
        shape = tuple(expected[name].shape)
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            raise ValueError(
                f"{name} is {str(tensor.dtype).removeprefix('torch.')} of shape "
                f"{tuple(tensor.shape)} where float32 of shape {shape} is expected"
            )
    model.load_state_dict(tensors, assign=True)
    return swap(model).eval().requires_grad_(False)


def _names(tensors: Mapping[str, Tensor]) -> str:
    names = sorted(tensors)
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") if names else "none"


def _text(metadata: Mapping[str, str], name: str) -> str:
    if name not in metadata:
        raise ValueError(f"its metadata do not say {name!r}")
    return metadata[name]


def _widths(metadata: Mapping[str, str]) -> list[str]:
    return _text(metadata, "hidden").split(",")


def _whole(metadata: Mapping[str, str], name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ValueError(f"its metadata say {name} {_text(metadata, name)[:40]!r}")
    return int(text)


def _number(metadata: Mapping[str, str], name: str) -> float:
    text = _text(metadata, name)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"its metadata say {name} {text!r}")
    return value
