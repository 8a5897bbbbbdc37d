"""The folder of a training run: its settings, metrics, model and checkpoint."""

import csv
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import nn

from mnist_ext.app import UserError
from mnist_ext.app.data.datasets import Dataset
from mnist_ext.app.files.folders import make_folders, remove_folders
from mnist_ext.app.files.writing import replace_file, sync_file
from mnist_ext.app.runs import checkpoint
from mnist_ext.app.runs.trained import parse_epochs
from mnist_ext.app.training.settings import TrainConfig
from mnist_ext.app.training.trainer import EpochMetrics, StepMetrics, Trainer

# Files that grow; a checkpoint says how long they were.
LOGS = ("metrics.csv", "steps.csv")
# Files that are replaced.
REPLACED = ("config.json", "model.safetensors", checkpoint.FILE_NAME)
_ELSEWHERE = "choose another folder with --output-dir"


class Run:
    """The folder that a training run is written to as it goes; docs/runs.md describes its files.

    Used as a context manager, it removes a new folder again where nothing of use was written.

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
        self._keep = False
        now = datetime.now().astimezone()
        output_dir = Path(config.output_dir)
        default_name = f"{now:%Y%m%d-%H%M%S}-{dataset.name}-{config.impl}"
        with _writing(output_dir, _ELSEWHERE):
            self._parents = make_folders(output_dir)
            try:
                self.path = _make_unused_folder(output_dir, config.name or default_name)
            except OSError:
                remove_folders(self._parents)
                raise
        record = {
            "started": now.isoformat(timespec="seconds"),
            "settings": asdict(config),
            "dataset": describe(dataset),
            "environment": environment,
        }
        try:
            self._replace("config.json", json.dumps(record, indent=2).encode() + b"\n")
        except BaseException:
            self._remove()
            raise

    @classmethod
    def reopen(
        cls,
        path: Path,
        config: TrainConfig,
        dataset: Dataset,
        environment: dict[str, Any],
        log_sizes: dict[str, int],
    ) -> "Run":
        """Continue the run in ``path``: drop what its logs say beyond the checkpoint.

        Args:
            path: the folder, locked.
            config: the settings from now on.
            dataset: the data set of the run.
            environment: of this process; ``config.json`` lists it under ``resumed``.
            log_sizes: what ``save_checkpoint`` put into the checkpoint as ``log_sizes``.

        Raises:
            UserError: a file is missing or damaged, or cannot be written.
        """
        run = cls.__new__(cls)
        run.path, run._config, run._dataset = path, config, dataset
        run._parents, run._keep = [], True
        file = path / "config.json"
        try:
            record = json.loads(file.read_bytes())
            resumed = [*record.get("resumed", []), _now_in(environment)]
        except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
            raise UserError(f"cannot read {file}: {error}") from error
        for name, size in log_sizes.items():
            run._cut(name, size)
        record = {**record, "settings": asdict(config), "resumed": resumed}
        run._replace("config.json", json.dumps(record, indent=2).encode() + b"\n")
        return run

    def __enter__(self) -> "Run":
        """Return the run itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove a new folder where no epoch was recorded and no progress saved."""
        if not self._keep:
            self._remove()

    def record_steps(self, steps: Sequence[StepMetrics]) -> None:
        """Append rows to ``steps.csv``.

        Raises:
            UserError: the file cannot be written.
        """
        if steps:
            self._append("steps.csv", [asdict(step) for step in steps])

    def record(self, metrics: EpochMetrics) -> None:
        """Append a row to ``metrics.csv``.

        Raises:
            UserError: the file cannot be written.
        """
        self._append("metrics.csv", [asdict(metrics)])
        self._keep = True

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
        self._replace("model.safetensors", checkpoint.to_bytes(tensors, metadata))

    def save_checkpoint(
        self, trainer: Trainer, metrics: EpochMetrics | None, keep: bool = True
    ) -> None:
        """Replace ``checkpoint.safetensors``, which is whole at every moment, by this state.

        Args:
            trainer: what to save.
            metrics: those of the last whole epoch, if any.
            keep: whether it is worth keeping the folder for.

        Raises:
            UserError: the file cannot be written.
        """
        path = self.path / checkpoint.FILE_NAME
        with self._writing(path.name):
            # What the checkpoint says of the logs is on the disk before it.
            for name in LOGS:
                sync_file(self.path / name)
            tensors, values = trainer.state()
            values["settings"] = asdict(self._config)
            values["dataset"] = describe(self._dataset)
            values["metrics"] = None if metrics is None else asdict(metrics)
            values["log_sizes"] = {name: _size(self.path / name) for name in LOGS}
            checkpoint.write(path, tensors, values)
        self._keep = self._keep or keep

    def _cut(self, name: str, size: int) -> None:
        path = self.path / name
        with self._writing(name):
            if size > (found := _size(path)):
                raise UserError(
                    f"{path} is damaged: it has {found:,} bytes, and had {size:,} when the "
                    "checkpoint was written"
                )
            if size and name == "metrics.csv":
                parse_epochs(path, path.read_bytes()[:size].decode(errors="replace"))
            if found:
                os.truncate(path, size)

    def _append(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        path = self.path / name
        with self._writing(name), path.open("a", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerows(rows)

    def _replace(self, name: str, content: bytes) -> None:
        with self._writing(name):
            replace_file(self.path / name, content)

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        advice = _ELSEWHERE
        if self._keep:
            command = f"mnist-ext train --resume {shlex.quote(str(self.path))}"
            advice = f"mend that, then continue with: {command}"
        with _writing(self.path / name, advice):
            yield

    def _remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        remove_folders(self._parents)


def describe(dataset: Dataset) -> dict[str, Any]:
    """Return what identifies a data set, as JSON values."""
    return {
        "name": dataset.name,
        "source": dataset.source,
        "train_size": len(dataset.train),
        "test_size": len(dataset.test),
        "mean": dataset.mean,
        "std": dataset.std,
    }


def _now_in(environment: dict[str, Any]) -> dict[str, Any]:
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"started": now, "environment": environment}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


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
def _writing(path: Path, advice: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; {advice}") from error
