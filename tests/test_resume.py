"""A run that was interrupted and resumed is, in every bit, the run that was not."""

import csv
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mnist_ext import checkpoint, cli
from mnist_ext.runs import Run
from mnist_ext.training import Trainer

# 15 steps an epoch, the last of 37 images.
DIGITS = ["train", "--dataset", "digits", "--batch-size", "100", "--threads", "1", "--quiet"]


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    # What a shell starts in the background ignores Ctrl-C, and so would this.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)
    torch.set_num_threads(threads)


@contextmanager
def a_signal(steps: int = 0, epochs: int = 0, number: int = signal.SIGINT) -> Iterator[None]:
    """Send this process a signal in a step of the run or at the end of an epoch."""
    counts = {"steps": 0, "epochs": 0}
    rows_of, record = Trainer._rows, Run.record

    def counted_rows(self, losses, rates):
        counts["steps"] += len(losses)
        if counts["steps"] == steps:
            os.kill(os.getpid(), number)
        return rows_of(self, losses, rates)

    def counted_record(self, metrics):
        counts["epochs"] += 1
        if counts["epochs"] == epochs:
            os.kill(os.getpid(), number)
        record(self, metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_rows", counted_rows)
        patch.setattr(Run, "record", counted_record)
        yield


def metrics_of(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    timings = ("seconds", "samples_per_second")
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
    model, other = (load_file(run / "model.safetensors") for run in (first, second))
    assert all(torch.equal(model[name], other[name]) for name in model)


SETTINGS = {
    "ext": [],
    "torch": ["--impl", "torch"],
    "one-call": ["--one-call"],
}


@pytest.mark.parametrize("scheduler", ["onecycle", "cosine"])
@pytest.mark.parametrize("impl", SETTINGS)
@pytest.mark.parametrize("moment", [{"steps": 1}, {"steps": 20}, {"epochs": 2}], ids=str)
def test_interrupted_and_resumed(monkeypatch, capsys, impl, scheduler, moment):
    argv = [*DIGITS, "--recipe", "best", "--epochs", "4", "--log-interval", "7"]
    argv += ["--scheduler", scheduler, *SETTINGS[impl]]
    if impl == "one-call":  # few steps to a native call, as on a slow machine
        monkeypatch.setattr("mnist_ext.train_step._SECONDS_PER_CALL", 1e-9)
    assert cli.main([*argv, "--name", "whole"]) == 0
    with a_signal(**moment):
        assert cli.main([*argv, "--name", "parts"]) == 130
    err = capsys.readouterr().err
    assert err.endswith("; continue with: mnist-ext train --resume runs/parts\n")
    _, values = checkpoint.read(Path("runs/parts/checkpoint.safetensors"))
    done = values["epoch"] * 15 + values["step"]
    assert done == moment.get("steps", 15 * moment.get("epochs", 0))
    assert cli.main(["train", "--resume", "runs/parts", "--quiet"]) == 0
    assert_same_runs(Path("runs/whole"), Path("runs/parts"))


def test_sigterm_saves_too(capsys):
    with a_signal(steps=3, number=signal.SIGTERM):
        assert cli.main([*DIGITS, "--name", "run"]) == 143
    assert "interrupted after step 3 of epoch 1" in capsys.readouterr().err
    assert checkpoint.read(Path("runs/run/checkpoint.safetensors"))[1]["step"] == 3


def test_signals_are_as_before_afterwards():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert cli.main([*DIGITS, "--epochs", "1"]) == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


class TestWhatMayChange:
    @pytest.fixture(autouse=True)
    def a_run(self):
        assert cli.main([*DIGITS, "--epochs", "1", "--name", "run"]) == 0

    def refused(self, capsys, *argv: str) -> str:
        assert cli.main(["train", "--resume", "runs/run", *argv]) == 2
        err = capsys.readouterr().err
        assert err.startswith("mnist-ext: error: ")
        assert err.count("\n") == 1
        return err

    def test_more_epochs(self):
        assert cli.main([*DIGITS, "--epochs", "3", "--name", "whole"]) == 0
        assert cli.main(["train", "--resume", "runs/run", "--epochs", "3", "--quiet"]) == 0
        assert metrics_of(Path("runs/run")) == metrics_of(Path("runs/whole"))
        record = json.loads(Path("runs/run/config.json").read_text())
        assert record["settings"]["epochs"] == 3
        assert len(record["resumed"]) == 1

    def test_a_complete_run_has_nothing_to_do(self, capsys):
        assert cli.main(["train", "--resume", "runs/run"]) == 0
        assert capsys.readouterr().out.endswith("written to runs/run\n")
        assert cli.main(["train", "--resume", "runs/run", "--target-accuracy", "99.9"]) == 1

    def test_other_settings_are_refused_by_name(self, capsys):
        assert "--lr cannot change" in self.refused(capsys, "--lr", "0.5")
        assert "--batch-size cannot change" in self.refused(capsys, "-b", "64")

    def test_epochs_under_a_schedule(self, capsys):
        argv = [*DIGITS, "--epochs", "1", "--scheduler", "cosine", "--name", "cosine"]
        assert cli.main(argv) == 0
        assert cli.main(["train", "--resume", "runs/cosine", "--epochs", "2"]) == 2
        assert "--epochs cannot change" in capsys.readouterr().err

    def test_other_data(self, capsys, monkeypatch):
        path = Path("runs/run/checkpoint.safetensors")
        tensors, values = checkpoint.read(path)
        values["dataset"]["mean"] += 1e-9
        checkpoint.write(path, tensors, values)
        assert "other data: mean of digits" in self.refused(capsys)

    def test_a_shortened_log(self, capsys):
        Path("runs/run/metrics.csv").write_text("epoch\n")
        assert "metrics.csv is damaged" in self.refused(capsys)

    def test_a_checkpoint_that_does_not_fit(self, capsys):
        path = Path("runs/run/checkpoint.safetensors")
        tensors, values = checkpoint.read(path)
        tensors["model.1.weight"] = torch.zeros(3, 3)
        checkpoint.write(path, tensors, values)
        assert "does not fit" in self.refused(capsys)

    def test_a_damaged_checkpoint(self, capsys):
        path = Path("runs/run/checkpoint.safetensors")
        path.write_bytes(path.read_bytes()[:-1])
        assert "is damaged" in self.refused(capsys)
