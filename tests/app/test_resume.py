"""A run that was interrupted and resumed is, in every bit, the run that was not."""

import csv
import errno
import json
import os
import shlex
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mnist_ext.app.cli.main import main
from mnist_ext.app.files.folders import locked
from mnist_ext.app.runs import checkpoint
from mnist_ext.app.runs import run as run_module
from mnist_ext.app.runs.run import Run
from mnist_ext.app.training.trainer import Trainer

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
    assert main([*argv, "--name", "whole"]) == 0
    with a_signal(**moment):
        assert main([*argv, "--name", "parts"]) == 130
    err = capsys.readouterr().err
    assert err.endswith("; continue with: mnist-ext train --resume runs/parts\n")
    _, values = checkpoint.read(Path("runs/parts/checkpoint.safetensors"))
    done = values["epoch"] * 15 + values["step"]
    assert done == moment.get("steps", 15 * moment.get("epochs", 0))
    assert main(["train", "--resume", "runs/parts", "--quiet"]) == 0
    assert_same_runs(Path("runs/whole"), Path("runs/parts"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_other_signals_save_too(capsys, number):
    with a_signal(steps=3, number=number):
        assert main([*DIGITS, "--name", "run"]) == 128 + number
    assert "interrupted after step 3 of epoch 1" in capsys.readouterr().err
    assert checkpoint.read(Path("runs/run/checkpoint.safetensors"))[1]["step"] == 3


def test_ctrl_c_in_the_last_evaluation(capsys):
    with a_signal(epochs=1):
        assert main([*DIGITS, "--epochs", "1", "--name", "run"]) == 130
    assert capsys.readouterr().err == (
        "mnist-ext: interrupted after epoch 1, the last one; written to runs/run\n"
    )
    assert main(["train", "--resume", "runs/run"]) == 0


def test_signals_are_as_before_afterwards():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    assert main([*DIGITS, "--epochs", "1"]) == 0
    assert [signal.getsignal(number) for number in numbers] == before


class TestTwoProcesses:
    """The second one on a run; here the first is this process too."""

    @pytest.fixture(autouse=True)
    def a_run(self):
        with a_signal(epochs=1):
            assert main([*DIGITS, "--epochs", "2", "--name", "run"]) == 130

    def resume(self) -> int:
        return main(["train", "--resume", "runs/run", "--quiet"])

    def test_a_run_in_use_is_left_alone(self, capsys):
        capsys.readouterr()
        before = Path("runs/run/config.json").read_bytes()
        with locked(Path("runs/run")):
            assert self.resume() == 2
            err = capsys.readouterr().err
        assert err.startswith("mnist-ext: error: runs/run is in use: process ")
        assert f" {os.getpid()} trains it; wait until that has ended, or end it with 'kill " in err
        assert err.count("\n") == 1
        assert Path("runs/run/config.json").read_bytes() == before
        assert self.resume() == 0

    def test_a_run_is_in_use_from_its_start_to_its_end(self, monkeypatch):
        codes = []
        record = Run.record

        def second_process(self, metrics):
            codes.append(main(["train", "--resume", str(self.path), "--quiet"]))
            record(self, metrics)

        monkeypatch.setattr(Run, "record", second_process)
        assert main([*DIGITS, "--epochs", "1", "--name", "new"]) == 0
        assert self.resume() == 0
        assert codes == [2, 2]
        for name in ("new", "run"):
            assert not Path("runs", name, "lock").exists()

    def test_what_a_killed_process_leaves(self):
        Path("runs/run/lock").write_text("1 here\n")
        left = [Path(f"runs/run/{name}.1.partial") for name in ("model.safetensors", "config.json")]
        for path in left:
            path.touch()
        assert self.resume() == 0
        assert not any(path.exists() for path in left)

    def test_a_file_system_without_locks(self, monkeypatch):
        def flock(file, operation):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr("fcntl.flock", flock)
        assert self.resume() == 0

    def test_epochs_that_do_not_ascend(self, capsys):
        path = Path("runs/run/metrics.csv")
        text = path.read_text()
        path.write_text(text + text.splitlines(keepends=True)[-1])
        tensors, values = checkpoint.read(Path("runs/run/checkpoint.safetensors"))
        values["log_sizes"]["metrics.csv"] = path.stat().st_size
        checkpoint.write(Path("runs/run/checkpoint.safetensors"), tensors, values)
        capsys.readouterr()
        assert self.resume() == 2
        assert "metrics.csv is damaged: epoch 1 stands after epoch 1" in capsys.readouterr().err
        assert main(["report", "runs/run"]) == 2
        assert "metrics.csv is damaged: epoch 1 stands after epoch 1" in capsys.readouterr().err


class TestDisk:
    def test_full_after_an_epoch(self, capsys, monkeypatch):
        replace_file = run_module.replace_file

        def full(path, content):
            if path.name == "model.safetensors" and path.exists():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            replace_file(path, content)

        with monkeypatch.context() as patch:
            patch.setattr(run_module, "replace_file", full)
            assert main([*DIGITS, "--epochs", "3", "--name", "a run"]) == 2
        err = capsys.readouterr().err
        assert err.startswith(
            "mnist-ext: error: cannot write runs/a run/model.safetensors: No space"
        )
        # The advice is obeyed word by word.
        command = err.split("; mend that, then continue with: mnist-ext ")[1]
        assert main([*shlex.split(command), "--quiet"]) == 0
        assert [row["epoch"] for row in metrics_of(Path("runs/a run"))] == ["1", "2", "3"]

    def test_full_before_the_first_epoch(self, capsys, monkeypatch):
        def full(path, content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(checkpoint, "replace_file", full)
        assert main([*DIGITS, "--name", "run"]) == 2
        assert "choose another folder with --output-dir" in capsys.readouterr().err
        assert not Path("runs").exists()

    @pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
    def test_folders_that_cannot_be_synced(self, monkeypatch, number):
        fsync = os.fsync

        def only_files(file):
            if stat.S_ISDIR(os.fstat(file).st_mode):
                raise OSError(number, os.strerror(number))
            fsync(file)

        monkeypatch.setattr(os, "fsync", only_files)
        assert main([*DIGITS, "--epochs", "1"]) == 0

    def test_files_that_cannot_be_synced(self, capsys, monkeypatch):
        def none(file):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

        monkeypatch.setattr(os, "fsync", none)
        assert main([*DIGITS, "--epochs", "1"]) == 2
        assert "cannot write runs/" in capsys.readouterr().err


class TestDivergence:
    def test_nothing_is_saved_of_it(self, capsys):
        # One step an epoch: the loss before the last step is finite, the one after it is not.
        argv = [*DIGITS, "--epochs", "4", "--name", "run", "--batch-size", "1437", "--lr", "1e5"]
        assert main(argv) == 1
        err = capsys.readouterr().err
        assert "the training diverged: the test loss is nan after epoch 2; use a lower --lr" in err
        assert err.endswith("; runs/run keeps model and checkpoint of epoch 1\n")
        _, values = checkpoint.read(Path("runs/run/checkpoint.safetensors"))
        assert values["epoch"] == 1
        assert [row["test_loss"] for row in metrics_of(Path("runs/run"))][-1] == "nan"
        model = load_file("runs/run/model.safetensors")
        assert all(value.isfinite().all() for value in model.values())
        assert main(["eval", "runs/run"]) == 0
        assert capsys.readouterr().err == (
            "mnist-ext: note: the training diverged: the test loss was nan after epoch 2; this is "
            "the model of epoch 1\n"
        )

    def test_a_parameter_alone(self, capsys, monkeypatch):
        rows_of = Trainer._rows

        def poisoned(self, losses, rates):
            self.model[1].bias.data[3] = -torch.inf  # ReLU hides it from the loss
            return rows_of(self, losses, rates)

        monkeypatch.setattr(Trainer, "_rows", poisoned)
        argv = [*DIGITS, "--epochs", "1", "--recipe", "best", "--name", "run"]
        assert main(argv) == 1
        err = capsys.readouterr().err
        assert "the training diverged: the parameter 1.bias is not finite after epoch 1" in err
        assert not Path("runs/run/model.safetensors").exists()

    def test_where_it_is_interrupted(self, capsys):
        assert main([*DIGITS, "--epochs", "1", "--name", "run"]) == 0
        good = Path("runs/run/checkpoint.safetensors").read_bytes()
        poisoned = Trainer.load_state

        def load_state(self, tensors, values):
            poisoned(self, tensors, values)
            self.model[1].bias.data[0] = torch.nan

        with pytest.MonkeyPatch.context() as patch, a_signal(steps=3):
            patch.setattr(Trainer, "load_state", load_state)
            assert main(["train", "--resume", "runs/run", "--epochs", "2"]) == 130
        err = capsys.readouterr().err
        assert "interrupted after step 3 of epoch 2; the training had diverged: " in err
        assert "runs/run keeps model and checkpoint of epoch 1" in err
        assert Path("runs/run/checkpoint.safetensors").read_bytes() == good

    def test_before_a_model_was_saved(self, capsys):
        assert main([*DIGITS, "--lr", "1e30", "--name", "run"]) == 1
        capsys.readouterr()
        assert main(["eval", "runs/run"]) == 2
        err = capsys.readouterr().err
        assert "the training diverged (the training loss was nan after epoch 1)" in err
        assert "--lr" in err

    def test_a_model_of_an_older_version(self, capsys):
        assert main([*DIGITS, "--epochs", "1", "--name", "run"]) == 0
        model = Path("runs/run/model.safetensors")
        with safe_open(model, "pt") as file:
            metadata = file.metadata()
        tensors = load_file(model)
        tensors["1.bias"][0] = torch.nan
        save_file(tensors, model, metadata)
        for command in ("eval", "report"):
            assert main([command, "runs/run"]) == 2
            err = capsys.readouterr().err
            assert "the training diverged" in err
            assert "1.bias holds values that are not finite; train again, with a lower --lr" in err

    @pytest.mark.parametrize("lr", ["0", "0.1"])
    def test_accuracy_at_chance(self, capsys, lr):
        argv = [word for word in DIGITS if word != "--quiet"]
        assert main([*argv, "--epochs", "2", "--lr", lr, "--name", "run"]) == 0
        assert main(["eval", "runs/run"]) == 0
        notes = capsys.readouterr().err.count("% is at chance: the same answer to every image ")
        assert notes == (2 if lr == "0" else 0)


class TestWhatMayChange:
    @pytest.fixture(autouse=True)
    def a_run(self):
        assert main([*DIGITS, "--epochs", "1", "--name", "run"]) == 0

    def refused(self, capsys, *argv: str) -> str:
        assert main(["train", "--resume", "runs/run", *argv]) == 2
        err = capsys.readouterr().err
        assert err.startswith("mnist-ext: error: ")
        assert err.count("\n") == 1
        return err

    def test_more_epochs(self):
        assert main([*DIGITS, "--epochs", "3", "--name", "whole"]) == 0
        assert main(["train", "--resume", "runs/run", "--epochs", "3", "--quiet"]) == 0
        assert metrics_of(Path("runs/run")) == metrics_of(Path("runs/whole"))
        record = json.loads(Path("runs/run/config.json").read_text())
        assert record["settings"]["epochs"] == 3
        assert len(record["resumed"]) == 1

    def test_a_complete_run_has_nothing_to_do(self, capsys):
        assert main(["train", "--resume", "runs/run"]) == 0
        out = capsys.readouterr().out
        assert "\nfinished: all 1 epochs of runs/run are done; for more: mnist-ext train " in out
        # The advice is obeyed word by word.
        command = out.split("for more: mnist-ext ")[1].splitlines()[0]
        assert main([*shlex.split(command), "--quiet"]) == 0
        assert [row["epoch"] for row in metrics_of(Path("runs/run"))] == ["1", "2"]
        assert main(["train", "--resume", "runs/run", "--target-accuracy", "99.9"]) == 1

    def test_a_complete_schedule(self, capsys):
        argv = [*DIGITS, "--epochs", "1", "--scheduler", "cosine", "--name", "cosine"]
        assert main(argv) == 0
        assert main(["train", "--resume", "runs/cosine"]) == 0
        assert "its cosine schedule ends there: train anew" in capsys.readouterr().out

    def test_fewer_epochs_than_are_done(self, capsys):
        assert main(["train", "--resume", "runs/run", "--epochs", "2", "--quiet"]) == 0
        err = self.refused(capsys, "--epochs", "1")
        assert "--epochs 1 is below what is done: the run has begun epoch 2; give 2 or more" in err
        with a_signal(steps=1):
            assert main(["train", "--resume", "runs/run", "--epochs", "4", "--quiet"]) == 130
        capsys.readouterr()
        assert "--epochs 2 is below what is done" in self.refused(capsys, "--epochs", "2")

    def test_other_settings_are_refused_by_name(self, capsys):
        assert "--lr cannot change" in self.refused(capsys, "--lr", "0.5")
        assert "--batch-size cannot change" in self.refused(capsys, "-b", "64")

    def test_epochs_under_a_schedule(self, capsys):
        argv = [*DIGITS, "--epochs", "1", "--scheduler", "cosine", "--name", "cosine"]
        assert main(argv) == 0
        assert main(["train", "--resume", "runs/cosine", "--epochs", "2"]) == 2
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
