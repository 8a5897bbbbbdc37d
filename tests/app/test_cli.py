"""The command line: what it prints and writes, and how it ends."""

import io
import os
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from run_folders import assert_one_line, config_of, names_in, rows_of

from mnist_ext.app.cli.commands import train_run
from mnist_ext.app.cli.commands.train_output import Lines
from mnist_ext.app.cli.main import main
from mnist_ext.app.training.settings import TrainConfig
from mnist_ext.app.training.trainer import EpochMetrics, Trainer

DIGITS = ["train", "--dataset", "digits", "--epochs", "2", "--lr", "0.1"]
FILES_OF_A_RUN = ["checkpoint.safetensors", "config.json", "metrics.csv", "model.safetensors"]


def the_run() -> Path:
    """Return the only run's folder."""
    (path,) = Path("runs").iterdir()
    return path


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "mnist_ext", *args]


class TestTrain:
    def test_prints_plain_lines_and_writes_the_same_metrics(self, ran):
        out, err = ran(*DIGITS)
        assert err == ""
        lines = out.splitlines()
        assert len(lines) == 7
        assert lines[0].startswith("dataset    digits: 1,437 training and 360 test images from ")
        assert lines[1] == "model      784-128-64-10, activation none, 109,386 parameters"
        assert "learning rate 0.1, batch size 64, seed 0" in lines[2]
        assert lines[3].startswith("impl       ext ")
        rows = rows_of(the_run() / "metrics.csv")
        assert list(rows[0]) == list(EpochMetrics.__dataclass_fields__)
        for epoch, (line, row) in enumerate(zip(lines[4:6], rows, strict=True), start=1):
            assert row["epoch"] == str(epoch)
            assert line == (
                f"epoch {epoch}/2  loss {float(row['train_loss']):.4f}"
                f", test {float(row['test_loss']):.4f}"
                f"  accuracy {float(row['test_accuracy']):6.2f} %"
                f"  {float(row['samples_per_second']):7,.0f} images/s"
            )
        assert lines[6] == f"written to {the_run()}"

    def test_shows_a_bar_on_a_terminal(self, ran, monkeypatch):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        out, err = ran(*DIGITS)
        for part in ("epoch 1/2   0%", "loss ", "accuracy ", " images/s, 00:00 left"):
            assert part in err
        assert "%|" not in out

    @pytest.mark.parametrize("width", [80, 40])
    def test_nothing_wraps(self, ran, monkeypatch, width):
        """What does not fit continues below its text; in the bar, text gives way."""
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        out, err = ran(*DIGITS, "--recipe", "best", "--epochs", "10", "--name", "run")
        lines = out.splitlines()
        assert max(map(len, lines)) <= width
        assert sum(line.startswith(" " * 11) for line in lines) >= 1  # under the facts
        epochs = [line for line in lines if line.startswith("epoch ")]
        assert [line[6:11] for line in epochs] == [f"{epoch:2}/10" for epoch in range(1, 11)]
        assert all(line.endswith(" images/s") for line in epochs) == (width == 80)
        bars = [text for text in err.split("\r") if "%|" in text]
        assert max(map(len, bars)) <= width
        assert all(re.search(r"^epoch [ \d]+/10 .*%\|.{10,}\| .* left$", bar) for bar in bars)

    def test_a_loss_that_runs_away_is_short(self, capsys):
        metrics = EpochMetrics(1, 1.5e25, 2e24, 9.8, 1_234_567, 1, 0.1)
        Lines(10, 100, 0).epoch(metrics)
        expected = (
            "epoch  1/10  loss 1.50e+25, test 2.00e+24  accuracy   9.80 %  1,234,567 images/s\n"
        )
        assert capsys.readouterr().out == expected

    @pytest.mark.parametrize(
        ("number", "options", "code"),
        [(signal.SIGINT, [], 130), (signal.SIGTERM, [], 143), (None, ["--lr", "1e30"], 1)],
    )
    def test_messages_stand_on_a_line_of_their_own(self, ran, monkeypatch, number, options, code):
        rows_of_steps = Trainer._rows

        def sends(self, losses, rates):
            if number is not None:
                signal.raise_signal(number)
            return rows_of_steps(self, losses, rates)

        monkeypatch.setattr(Trainer, "_rows", sends)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        before, _ = ran(*DIGITS, *options, code=code).err.split("mnist-ext: ")
        # The bar is overwritten, and the cursor is back at the start of its line.
        *_, bar, blanks, rest = before.split("\r")
        assert "images/s" in bar
        assert blanks == " " * len(bar)
        assert rest == ""

    def test_settings_and_environment_are_written(self):
        argv = [*DIGITS, "--seed", "5", "--hidden", "16", "--threads", "1"]
        assert main(argv) == 0
        config = config_of(the_run())
        settings = config["settings"]
        assert settings.keys() == TrainConfig.__dataclass_fields__.keys()
        expected = {"epochs": 2, "seed": 5, "hidden": [16], "momentum": 0}
        assert {name: settings[name] for name in expected} == expected
        assert config["dataset"]["name"] == "digits"
        assert config["dataset"]["train_size"] == 1437
        assert config["environment"]["command"] == "mnist-ext " + " ".join(argv)
        assert config["environment"]["threads"] == 1
        assert config["environment"]["build"]["torch"] == torch.__version__
        assert config["started"].startswith("20")

    def test_no_run_is_overwritten(self):
        for _ in range(3):
            assert main([*DIGITS, "--name", "mine", "--output-dir", "new/folder"]) == 0
        assert names_in("new/folder") == ["mine", "mine-2", "mine-3"]

    def test_without_a_network_auto_uses_the_digits(self, ran):
        out, err = ran("train", "--epochs", "1")
        assert err.startswith("mnist-ext: note: MNIST was not found")
        assert err.count("\n") == 1
        assert out.startswith("dataset    digits: ")

    def test_target_accuracy(self, ran, refused):
        assert ran(*DIGITS, "--target-accuracy", "1").err == ""
        parts = ("is below the target of 99.9 %",)
        refused(*DIGITS, "--target-accuracy", "99.9", "--name", "x", parts=parts, code=1, out=True)
        assert names_in("runs/x") == FILES_OF_A_RUN


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        ([], ["COMMAND"]),
        (["predict"], ["predict"]),
        (["train", "--epoch", "3"], ["--epoch"]),
        (["train", "--epochs", "0"], ["--epochs", "'0'"]),
        (["train", "--epochs", "two"], ["--epochs", "'two'"]),
        (["train", "--batch-size", "-1"], ["--batch-size", "'-1'"]),
        (["train", "--batch-size", "1e3"], ["--batch-size", "'1e3'"]),
        (["train", "--lr", "-0.1"], ["--lr", "'-0.1'"]),
        (["train", "--lr", "nan"], ["--lr", "'nan'"]),
        (["train", "--lr", "inf"], ["--lr", "'inf'"]),
        (["train", "--momentum", "1.5"], ["--momentum", "'1.5'"]),
        (["train", "--weight-decay", "-1"], ["--weight-decay", "'-1'"]),
        (["train", "--nesterov"], ["--nesterov", "--momentum"]),
        (["train", "--resume", "nowhere"], ["nowhere", "checkpoint.safetensors"]),
        (["train", "--resume", ".", "--dry-run"], ["--resume", "--dry-run"]),
        (["train", "--resume", ".", "--config", "s.toml"], ["--resume", "--config"]),
        (["train", "--quiet", "--json"], ["--json", "--quiet"]),
        (["train", "--one-call", "--impl", "torch"], ["--one-call", "--impl ext"]),
        (["train", "--hidden", "128,,64"], ["--hidden", "'128,,64'"]),
        (["train", "--hidden", "0"], ["--hidden", "'0'"]),
        (["train", "--hidden", "2000000000,2000000000"], ["--hidden"]),
        (["train", "--seed", "-1"], ["--seed", "'-1'"]),
        (["train", "--threads", "0"], ["--threads", "'0'"]),
        (["train", "--name", "a/b"], ["--name", "'a/b'"]),
        (["train", "--name", ".."], ["--name", "'..'"]),
        (["train", "--target-accuracy", "101"], ["--target-accuracy", "'101'"]),
        (["train", "--dataset", "cifar"], ["--dataset", "'cifar'"]),
        (["train", "--dataset", "mnist"], ["could not be downloaded", "--data-dir"]),
        (["train", "--recipe", "worst"], ["--recipe", "'worst'"]),
        (["train", "--device", "gpu"], ["'gpu'", "cpu, cuda"]),
        (["train", "--config", "nowhere.toml"], ["cannot read nowhere.toml"]),
    ],
)
def test_one_line_names_the_mistake(refused, tmp_path, argv, parts):
    if argv and argv[0] == "train" and "--dataset" not in argv:
        argv = [*argv, "--dataset", "digits"]
    refused(*argv, parts=tuple(parts))
    assert names_in() == []
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ([], ["COMMAND", "predict", "example: "]),
        (["train"], ["data:", "model:", "training:", "output:", "(default: 100)", "examples:"]),
        (["doctor"], ["--json", "example: "]),
    ],
)
def test_help(capsys, command, parts):
    with pytest.raises(SystemExit, match="0"):
        main([*command, "--help"])
    out = capsys.readouterr().out
    assert [part for part in parts if part not in out] == []


@pytest.mark.parametrize("output", ["file", "file/below/it"])
def test_an_output_folder_that_cannot_be_written(refused, output):
    Path("file").touch()
    refused(*DIGITS, "--output-dir", output, parts=(output, "--output-dir"))
    assert names_in() == ["file"]


class TestStreams:
    """What takes nothing, or not every character."""

    @pytest.mark.parametrize("argv", [["--version"], ["train", "--help"], DIGITS])
    @pytest.mark.parametrize("unbuffered", [False, True])
    def test_standard_output_is_full(self, refused, monkeypatch, argv, unbuffered):
        with open("/dev/full", "wb", buffering=0) as full:
            raw = full if unbuffered else io.BufferedWriter(full)
            stream = io.TextIOWrapper(raw, write_through=unbuffered)
            monkeypatch.setattr(sys, "stdout", stream)
            refused(*argv, parts=("standard output: No space left on device",))
            stream.flush()  # as Python does when it exits

    @pytest.mark.parametrize("stream", [">/dev/full", ">&-", ">/dev/full 2>&1", ">&- 2>&-"])
    def test_as_a_process(self, stream, monkeypatch):
        monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
        line = f"{shlex.join(command('--version'))} {stream}"
        result = subprocess.run(["sh", "-c", line], stderr=subprocess.PIPE, text=True)
        assert result.returncode == 2
        if "2>" in stream:
            assert result.stderr == ""
        else:
            assert_one_line(result.stderr, "cannot write to standard output")

    def test_the_reader_goes_away(self, capsys, monkeypatch):
        reader, writer = os.pipe()
        stream = os.fdopen(writer, "w")
        monkeypatch.setattr(sys, "stdout", stream)

        def read_a_line() -> str:
            with os.fdopen(reader) as file:
                return file.readline()

        with ThreadPoolExecutor(1) as pool:
            line = pool.submit(read_a_line)
            try:
                assert main([*DIGITS, "--epochs", "100000", "--name", "run"]) == 141
            finally:
                stream.close()  # has nothing left to write
        assert line.result().startswith("dataset    digits")
        assert capsys.readouterr().err == ""
        assert Path("runs/run/checkpoint.safetensors").exists()

    def test_a_run_whose_name_cannot_be_shown(self, monkeypatch):
        stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", stream)
        assert main([*DIGITS, "--name", "\U0001f600\x1b[2J"]) == 0
        out = stream.buffer.getvalue().decode("ascii")
        assert out.endswith("written to runs/\\U0001f600\\x1b[2J\n")
        assert (Path("runs") / "\U0001f600\x1b[2J" / "model.safetensors").exists()


def test_ctrl_c_before_the_first_epoch_leaves_nothing(ran, monkeypatch):
    def interrupted(*args):
        assert the_run().exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(train_run, "_Session", interrupted)
    assert ran(*DIGITS, code=130).err == "mnist-ext: interrupted\n"
    assert names_in() == []
