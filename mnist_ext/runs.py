"""The folder of a training run: its settings, its metrics and the trained model."""

import csv
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors.torch import save
from torch import nn

from mnist_ext.data import Dataset
from mnist_ext.errors import UserError
from mnist_ext.folders import make_folders, remove_folders
from mnist_ext.settings import TrainConfig
from mnist_ext.training import EpochMetrics


class Run:
    """A new folder that a training run is written to as it goes.

    - ``config.json``: the settings, the data set and the environment.
    - ``metrics.csv``: one row per epoch, with the fields of ``EpochMetrics``.
    - ``model.safetensors``: the parameters after the latest epoch, under the names they have in
      ``mnist_ext.models.mlp``; the metadata say how to build that model and normalize its input.

    Used as a context manager, it removes the folder again where no epoch was recorded.

    Attributes:
        path: the folder.
    """

    def __init__(self, config: TrainConfig, dataset: Dataset, environment: dict[str, Any]) -> None:
        """Create the folder, under a name that is not taken yet, and write ``config.json``.

        Args:
            config: the settings of the run.
            dataset: the data set it trains on.
            environment: what else affects the result, as JSON values.

        Raises:
            UserError: the folder or the file cannot be written; nothing is left behind then.
        """
        self._config = config
        self._dataset = dataset
        self._parents: list[Path] = []
        started = datetime.now().astimezone()
        output_dir = Path(config.output_dir)
        default_name = f"{started:%Y%m%d-%H%M%S}-{dataset.name}-{config.impl}"
        with _writing(output_dir):
            self._parents = make_folders(output_dir)
            try:
                self.path = _make_unused_folder(output_dir, config.name or default_name)
            except OSError:
                remove_folders(self._parents)
                raise
        self._metrics = self.path / "metrics.csv"
        record = {
            "started": started.isoformat(timespec="seconds"),
            "settings": asdict(config),
            "dataset": {
                "name": dataset.name,
                "source": dataset.source,
                "train_size": len(dataset.train),
                "test_size": len(dataset.test),
                "mean": dataset.mean,
                "std": dataset.std,
            },
            "environment": environment,
        }
        try:
            with _writing(self.path):
                (self.path / "config.json").write_text(json.dumps(record, indent=2) + "\n")
        except BaseException:
            self._remove()
            raise

    def __enter__(self) -> "Run":
        """Return the run itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove the folder where no epoch was recorded."""
        if not self._metrics.exists():
            self._remove()

    def record(self, metrics: EpochMetrics) -> None:
        """Append a row to ``metrics.csv``.

        Raises:
            UserError: the file cannot be written.
        """
        row = asdict(metrics)
        with _writing(self._metrics), self._metrics.open("a", newline="") as file:
            writer = csv.DictWriter(file, row, lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)

    def save_model(self, model: nn.Module, epoch: int) -> None:
        """Replace ``model.safetensors``, which is whole at every moment, by this state.

        Raises:
            UserError: the file cannot be written.
        """
        tensors = {name: value.contiguous().cpu() for name, value in model.state_dict().items()}
        metadata = {
            "hidden": ",".join(map(str, self._config.hidden)),
            "activation": self._config.activation,
            "dataset": self._dataset.name,
            "mean": repr(self._dataset.mean),
            "std": repr(self._dataset.std),
            "epoch": str(epoch),
        }
        path = self.path / "model.safetensors"
        partial = path.with_suffix(".partial")
        try:
            with _writing(path):
                partial.write_bytes(save(tensors, metadata))
                os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise

    def _remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        remove_folders(self._parents)


def _make_unused_folder(parent: Path, name: str) -> Path:
    path = parent / name
    attempt = 1
    while True:
        try:
            path.mkdir()
        except FileExistsError:
            attempt += 1
            path = parent / f"{name}-{attempt}"
        else:
            return path


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror}; choose another folder with --output-dir"
        ) from error
