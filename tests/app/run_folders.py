"""What a run has written, and what a command says where it fails."""

import csv
import json
from pathlib import Path
from typing import Any

import torch

from mnist_ext.app.runs import checkpoint


def rows_of(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def config_of(run: Path) -> dict[str, Any]:
    """Return the content of a run's `config.json`."""
    return json.loads((run / "config.json").read_text())


def names_in(folder: Path | str = ".") -> list[str]:
    """Return the sorted names of what lies in a folder."""
    return sorted(path.name for path in Path(folder).iterdir())


def metrics_of(run: Path) -> list[dict[str, str]]:
    timings = ("seconds", "samples_per_second")
    rows = rows_of(run / "metrics.csv")
    return [{k: v for k, v in row.items() if k not in timings} for row in rows]


def assert_same_runs(first: Path, second: Path) -> None:
    (tensors, values), (others, other_values) = (
        checkpoint.read(run / checkpoint.FILE_NAME) for run in (first, second)
    )
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name
    for name in ("epoch", "step", "loss_sum", "optimizer", "scheduler", "lr"):
        assert values[name] == other_values[name], name
    assert metrics_of(first) == metrics_of(second)
    assert (first / "steps.csv").read_text() == (second / "steps.csv").read_text()
    first_model, second_model = (run / "model.safetensors" for run in (first, second))
    assert first_model.read_bytes() == second_model.read_bytes()


def assert_one_line(err: str, *parts: str) -> None:
    assert err.startswith("mnist-ext: error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err
