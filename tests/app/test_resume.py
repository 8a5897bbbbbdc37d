"""A run that was interrupted and resumed is, in every bit, the run that was not."""

import csv
import errno
import os
import shlex
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from run_folders import assert_same_runs, config_of, metrics_of, names_in
from safetensors.torch import load_file

from mnist_ext.app.cli.main import main
from mnist_ext.app.files.folders import locked
from mnist_ext.app.runs import checkpoint
from mnist_ext.app.runs import run as run_module
from mnist_ext.app.runs.run import Run
from mnist_ext.app.training.trainer import Trainer

# 15 steps an epoch, the last of 37 images.
DIGITS = ["train", "--dataset", "digits", "--batch-size", "100", "--threads", "1", "--quiet"]
RUN = Path("runs/run")
CHECKPOINT = RUN / checkpoint.FILE_NAME
RESUME = ["train", "--resume", str(RUN), "--quiet"]


def train(*options: str, name: str = "run") -> int:
    return main([*DIGITS, *options, "--name", name])


@contextmanager
def a_signal(steps: int = 0, epochs: int = 0, number: int = signal.SIGINT) -> Iterator[None]:
    """Send this process a signal in a step of the run or at the end of an epoch."""

    def counting(method, count, moment):
        seen = 0

        def counted(self, first, *rest):
            nonlocal seen
            seen += count(first)
            if seen == moment:
                os.kill(os.getpid(), number)
            return method(self, first, *rest)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_rows", counting(Trainer._rows, len, steps))
        patch.setattr(Run, "record", counting(Run.record, lambda metrics: 1, epochs))
        yield


@pytest.mark.parametrize("scheduler", ["onecycle", "cosine"])
@pytest.mark.parametrize("impl", [[], ["--impl", "torch"], ["--one-call"], ["--augment"]], ids=str)
def test_interrupted_and_resumed(monkeypatch, ran, impl, scheduler):
    """In the first step, within a later epoch, and in the evaluation of one."""
    options = ["--recipe", "best", "--epochs", "4", "--log-interval", "7"]
    options += ["--scheduler", scheduler, *impl]
    if impl == ["--one-call"]:  # few steps to a native call, as on a slow machine
        monkeypatch.setattr("mnist_ext.train_step.epoch._SECONDS_PER_CALL", 1e-9)
    assert train(*options, name="whole") == 0
    start = [*DIGITS, *options, "--name", "run"]
    for moment, done in (({"steps": 1}, 1), ({"steps": 20}, 21), ({"epochs": 2}, 45)):
        with a_signal(**moment):
            err = ran(*start, code=130).err
        assert err.endswith("; continue with: mnist-ext train --resume runs/run\n")
        _, values = checkpoint.read(CHECKPOINT)
        assert values["epoch"] * 15 + values["step"] == done
        start = RESUME
    assert main(RESUME) == 0
    assert_same_runs(Path("runs/whole"), RUN)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_other_signals_save_too_and_do_what_they_did_afterwards(capsys, number):
    before = signal.getsignal(number)
    with a_signal(steps=3, number=number):
        assert train() == 128 + number
    assert signal.getsignal(number) == before
    assert "interrupted after step 3 of epoch 1" in capsys.readouterr().err
    assert checkpoint.read(CHECKPOINT)[1]["step"] == 3


def test_ctrl_c_in_the_last_evaluation(capsys):
    with a_signal(epochs=1):
        assert train("--epochs", "1") == 130
    assert capsys.readouterr().err == (
        "mnist-ext: interrupted after epoch 1, the last one; written to runs/run\n"
    )
    assert main(RESUME) == 0


class TestTwoProcesses:
    """The second one on a run; here the first is this process too."""

    @pytest.fixture(autouse=True)
    def a_run(self):
        with a_signal(epochs=1):
            assert train("--epochs", "2") == 130

    def test_a_run_in_use_is_left_alone(self, refused):
        before = (RUN / "config.json").read_bytes()
        ends = f" {os.getpid()} trains it; wait until that has ended, or end it with 'kill "
        with locked(RUN):
            refused(*RESUME, parts=("error: runs/run is in use: process ", ends))
        assert (RUN / "config.json").read_bytes() == before
        assert main(RESUME) == 0

    def test_a_run_is_in_use_from_its_start_to_its_end(self, monkeypatch):
        codes = []
        record = Run.record

        def second_process(self, metrics):
            codes.append(main(["train", "--resume", str(self.path), "--quiet"]))
            record(self, metrics)

        monkeypatch.setattr(Run, "record", second_process)
        assert train("--epochs", "1", name="new") == 0
        assert main(RESUME) == 0
        assert codes == [2, 2]
        for name in ("new", "run"):
            assert not Path("runs", name, "lock").exists()

    def test_what_a_killed_process_leaves(self):
        (RUN / "lock").write_text("1 here\n")
        for name in ("model.safetensors", "config.json"):
            (RUN / f"{name}.1.partial").touch()
        assert main(RESUME) == 0
        assert not list(RUN.glob("*.partial"))

    def test_a_file_system_without_locks(self, monkeypatch):
        monkeypatch.setattr("fcntl.flock", failing(errno.ENOLCK))
        assert main(RESUME) == 0

    def test_epochs_that_do_not_ascend(self, refused):
        path = RUN / "metrics.csv"
        text = path.read_text()
        path.write_text(text + text.splitlines(keepends=True)[-1])
        change_checkpoint(lambda _, v: v["log_sizes"].update({path.name: path.stat().st_size}))
        for command in (RESUME, ["report", RUN]):
            refused(*command, parts=("metrics.csv is damaged: epoch 1 stands after epoch 1",))


def failing(number: int):
    """Return a function that fails as the system does."""

    def fail(*args) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return fail


def change_checkpoint(change) -> None:
    """Write the checkpoint again, with other tensors or values."""
    tensors, values = checkpoint.read(CHECKPOINT)
    change(tensors, values)
    checkpoint.write(CHECKPOINT, tensors, values)


class TestDisk:
    @pytest.mark.parametrize("file", ["model.safetensors", "metrics.csv"])
    def test_full_after_an_epoch(self, refused, monkeypatch, file):
        replace_file, writer = run_module.replace_file, csv.DictWriter

        def full_for_models(path, content):
            if path.name == file and path.exists():
                failing(errno.ENOSPC)()
            replace_file(path, content)

        def full_for_metrics(stream, *args, **options):
            if Path(stream.name).name == file and stream.tell():
                failing(errno.ENOSPC)()
            return writer(stream, *args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(run_module, "replace_file", full_for_models)
            patch.setattr(csv, "DictWriter", full_for_metrics)
            parts = (f"error: cannot write runs/a run/{file}: No space",)
            err = refused(*DIGITS, "--epochs", "3", "--name", "a run", parts=parts)
        # The advice is obeyed word by word.
        command = err.split("; mend that, then continue with: mnist-ext ")[1]
        assert main([*shlex.split(command), "--quiet"]) == 0
        assert [row["epoch"] for row in metrics_of(Path("runs/a run"))] == ["1", "2", "3"]

    @pytest.mark.parametrize("others", [[], ["other"]])
    def test_full_before_the_first_epoch(self, refused, monkeypatch, others):
        for name in others:
            Path("runs", name).mkdir(parents=True)
        monkeypatch.setattr(checkpoint, "replace_file", failing(errno.ENOSPC))
        refused(*DIGITS, parts=("choose another folder with --output-dir",))
        assert names_in() == ["runs"] * len(others)
        assert [path.name for path in Path("runs").glob("*")] == others

    def test_folders_that_cannot_be_synced(self, monkeypatch, refused):
        """Some file systems have no such thing; of files it is an error."""
        fsync = os.fsync
        for number in (errno.EINVAL, errno.ENOTSUP):

            def only_files(file, number=number):
                if stat.S_ISDIR(os.fstat(file).st_mode):
                    failing(number)()
                fsync(file)

            monkeypatch.setattr(os, "fsync", only_files)
            assert train("--epochs", "1") == 0
        monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
        refused(*DIGITS, "--epochs", "1", parts=("cannot write runs/",))


class TestDivergence:
    def test_nothing_is_saved_of_it(self, ran):
        # One step an epoch: the loss before the last step is finite, the one after it is not.
        options = ["--epochs", "4", "--batch-size", "1437", "--lr", "1e5", "--name", "run"]
        err = ran(*DIGITS, *options, code=1).err
        assert "the training diverged: the test loss is nan after epoch 2; use a lower --lr" in err
        assert err.endswith("; runs/run keeps model and checkpoint of epoch 1\n")
        assert checkpoint.read(CHECKPOINT)[1]["epoch"] == 1
        assert [row["test_loss"] for row in metrics_of(RUN)][-1] == "nan"
        model = load_file(RUN / "model.safetensors")
        assert all(value.isfinite().all() for value in model.values())
        assert ran("eval", RUN).err == (
            "mnist-ext: note: the training diverged: the test loss was nan after epoch 2; this is "
            "the model of epoch 1\n"
        )

    def test_a_parameter_alone(self, refused, monkeypatch):
        rows_of_steps = Trainer._rows

        def poisoned(self, losses, rates):
            self.model[1].bias.data[3] = -torch.inf  # ReLU hides it from the loss
            return rows_of_steps(self, losses, rates)

        monkeypatch.setattr(Trainer, "_rows", poisoned)
        argv = [*DIGITS, "--epochs", "1", "--recipe", "best", "--name", "run"]
        part = "the training diverged: the parameter 1.bias is not finite after epoch 1"
        refused(*argv, parts=(part,), code=1)
        assert not (RUN / "model.safetensors").exists()

    def test_where_it_is_interrupted(self, ran):
        assert train("--epochs", "1") == 0
        good = CHECKPOINT.read_bytes()
        load = Trainer.load_state

        def poisoned(self, tensors, values):
            load(self, tensors, values)
            self.model[1].bias.data[0] = torch.nan

        with pytest.MonkeyPatch.context() as patch, a_signal(steps=3):
            patch.setattr(Trainer, "load_state", poisoned)
            err = ran(*RESUME, "--epochs", "2", code=130).err
        assert "interrupted after step 3 of epoch 2; the training had diverged: " in err
        assert "runs/run keeps model and checkpoint of epoch 1" in err
        assert CHECKPOINT.read_bytes() == good

    def test_before_a_model_was_saved(self, refused):
        parts = ("loss is nan after epoch 1", "--lr")
        refused(*DIGITS, "--lr", "1e30", "--name", "run", parts=parts, code=1)
        assert len(metrics_of(RUN)) == 1
        assert not (RUN / "model.safetensors").exists()
        part = "the training diverged (the training loss was nan after epoch 1)"
        refused("eval", RUN, parts=(part, "--lr"))

    @pytest.mark.parametrize(("lr", "notes"), [("0", 2), ("0.1", 0)])
    def test_accuracy_at_chance(self, ran, lr, notes):
        argv = [word for word in DIGITS if word != "--quiet"]
        err = ran(*argv, "--epochs", "2", "--lr", lr, "--name", "run").err + ran("eval", RUN).err
        assert err.count("% is at chance: the same answer to every image ") == notes
        assert ran(*DIGITS, "--epochs", "2", "--lr", lr).err == ""  # quietly


class TestWhatMayChange:
    @pytest.fixture(autouse=True)
    def a_run(self):
        assert train("--epochs", "1") == 0

    def test_more_epochs(self):
        assert train("--epochs", "3", name="whole") == 0
        assert main([*RESUME, "--epochs", "3"]) == 0
        assert metrics_of(RUN) == metrics_of(Path("runs/whole"))
        record = config_of(RUN)
        assert record["settings"]["epochs"] == 3
        assert len(record["resumed"]) == 1

    def test_a_complete_run_has_nothing_to_do(self, ran):
        out = ran("train", "--resume", "runs/run").out
        assert "\nfinished: all 1 epochs of runs/run are done; for more: mnist-ext train " in out
        # The advice is obeyed word by word.
        command = out.split("for more: mnist-ext ")[1].splitlines()[0]
        assert main([*shlex.split(command), "--quiet"]) == 0
        assert [row["epoch"] for row in metrics_of(RUN)] == ["1", "2"]
        assert main([*RESUME, "--target-accuracy", "99.9"]) == 1

    def test_a_complete_schedule(self, ran, refused):
        assert train("--epochs", "1", "--scheduler", "cosine", name="cosine") == 0
        out = ran("train", "--resume", "runs/cosine").out
        assert "its cosine schedule ends there: train anew" in out
        argv = ["train", "--resume", "runs/cosine", "--epochs", "2"]
        refused(*argv, parts=("--epochs cannot change",))

    def test_fewer_epochs_than_are_done(self, refused):
        assert main([*RESUME, "--epochs", "2"]) == 0
        part = "--epochs 1 is below what is done: the run has begun epoch 2; give 2 or more"
        refused(*RESUME, "--epochs", "1", parts=(part,))
        with a_signal(steps=1):
            assert main([*RESUME, "--epochs", "4"]) == 130
        refused(*RESUME, "--epochs", "2", parts=("--epochs 2 is below what is done",))

    def test_other_settings_are_refused_by_name(self, refused):
        refused(*RESUME, "--lr", "0.5", parts=("--lr cannot change",))
        refused(*RESUME, "-b", "64", parts=("--batch-size cannot change",))

    @pytest.mark.parametrize(
        ("change", "part"),
        [
            (lambda _, v: v["dataset"].update(mean=0.1), "other data: mean of digits was 0.1, "),
            (lambda t, _: t.update({"model.1.weight": torch.zeros(3, 3)}), "does not fit"),
            (lambda _, v: v["settings"].update(speed=1), "of another version of mnist_ext"),
        ],
    )
    def test_another_checkpoint(self, refused, change, part):
        change_checkpoint(change)
        refused(*RESUME, parts=(part,))

    def test_a_shortened_log(self, refused):
        (RUN / "metrics.csv").write_text("epoch\n")
        refused(*RESUME, parts=("metrics.csv is damaged: it has 6 bytes",))
