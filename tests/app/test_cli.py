"""The command line: what it prints and writes, and how it ends."""

import csv
import io
import json
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from idx_files import FILES, write_mnist
from safetensors import safe_open
from safetensors.torch import load_file
from torchvision.datasets import MNIST

from mnist_ext.app import UserError
from mnist_ext.app.cli.commands import train_run
from mnist_ext.app.cli.main import main
from mnist_ext.app.data import datasets
from mnist_ext.app.runs.run import Run
from mnist_ext.app.training.models import mlp
from mnist_ext.app.training.settings import RECIPES, TrainConfig
from mnist_ext.app.training.trainer import EpochMetrics, Trainer, evaluate

DIGITS = ["train", "--dataset", "digits", "--epochs", "2", "--lr", "0.1"]
FILES_OF_A_RUN = ["checkpoint.safetensors", "config.json", "metrics.csv", "model.safetensors"]


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """Work in an empty folder, without the machine's own data, cache and network."""
    monkeypatch.delenv("MNIST_EXT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def the_run() -> Path:
    """Return the only run's folder."""
    (path,) = Path("runs").iterdir()
    return path


def read_metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def read_settings(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())["settings"]


def assert_one_line(err: str, *parts: str) -> None:
    assert err.startswith("mnist-ext: error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "mnist_ext", *args]


class TestTrain:
    def test_prints_plain_lines(self):
        result = subprocess.run(command(*DIGITS), capture_output=True, text=True, check=True)
        assert result.stderr == ""
        lines = result.stdout.splitlines()
        assert len(lines) == 7
        assert lines[0].startswith("dataset    digits: 1,437 training and 360 test images from ")
        assert lines[1] == "model      784-128-64-10, activation none, 109,386 parameters"
        assert "learning rate 0.1, batch size 64, seed 0" in lines[2]
        assert lines[3].startswith("impl       ext ")
        for epoch, line in enumerate(lines[4:6], start=1):
            assert line.startswith(f"epoch {epoch}/2  train loss ")
            for part in ("  test loss ", "  test accuracy ", " %  ", " images/s"):
                assert part in line
        assert lines[6] == f"written to {the_run()}"

    def test_shows_a_bar_on_a_terminal(self, capsys, monkeypatch):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        assert main(DIGITS) == 0
        captured = capsys.readouterr()
        assert "epoch 1/2   0%" in captured.err
        assert "loss " in captured.err
        assert "accuracy " in captured.err
        assert " images/s, 00:00 left" in captured.err
        assert "%|" not in captured.out

    @pytest.mark.parametrize(
        ("number", "options"),
        [(signal.SIGINT, []), (signal.SIGTERM, []), (None, ["--lr", "1e30"])],
    )
    def test_messages_stand_on_a_line_of_their_own(self, capsys, monkeypatch, number, options):
        rows_of = Trainer._rows

        def sends(self, losses, rates):
            if number is not None:
                signal.raise_signal(number)
            return rows_of(self, losses, rates)

        monkeypatch.setattr(Trainer, "_rows", sends)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        assert main([*DIGITS, *options]) in (1, 130, 143)
        before, _ = capsys.readouterr().err.split("mnist-ext: ")
        # The bar is overwritten, and the cursor is back at the start of its line.
        *_, bar, blanks, rest = before.split("\r")
        assert "images/s" in bar
        assert blanks == " " * len(bar)
        assert rest == ""

    def test_settings_and_environment_are_written(self):
        argv = [*DIGITS, "--seed", "5", "--hidden", "16", "--threads", "1"]
        assert main(argv) == 0
        config = json.loads((the_run() / "config.json").read_text())
        assert config["settings"]["epochs"] == 2
        assert config["settings"]["seed"] == 5
        assert config["settings"]["hidden"] == [16]
        assert config["settings"]["momentum"] == 0
        assert config["settings"].keys() == TrainConfig.__dataclass_fields__.keys()
        assert config["dataset"]["name"] == "digits"
        assert config["dataset"]["train_size"] == 1437
        assert config["environment"]["command"] == "mnist-ext " + " ".join(argv)
        assert config["environment"]["threads"] == 1
        assert config["environment"]["build"]["torch"] == torch.__version__
        assert config["started"].startswith("20")

    @pytest.mark.parametrize("impl", ["ext", "torch"])
    def test_the_model_reloads_with_the_accuracy_written(self, impl):
        assert main([*DIGITS, "--impl", impl, "--activation", "relu", "--hidden", "32,16"]) == 0
        assert sorted(path.name for path in the_run().iterdir()) == FILES_OF_A_RUN
        with safe_open(the_run() / "model.safetensors", "pt") as file:
            metadata = file.metadata()
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert metadata["dataset"] == "digits"
        assert metadata["epoch"] == "2"

        hidden = [int(width) for width in metadata["hidden"].split(",")]
        assert hidden == [32, 16]
        model = mlp(hidden, metadata["activation"])
        model.load_state_dict(state)
        loss, accuracy = evaluate(
            model,
            torch.nn.CrossEntropyLoss(),
            datasets.load("digits").test,
            float(metadata["mean"]),
            float(metadata["std"]),
        )
        last = read_metrics(the_run())[-1]
        assert accuracy == pytest.approx(float(last["test_accuracy"]))
        assert loss == pytest.approx(float(last["test_loss"]), rel=1e-5)

    def test_metrics_have_one_row_per_epoch(self, capsys):
        assert main(DIGITS) == 0
        rows = read_metrics(the_run())
        assert [row["epoch"] for row in rows] == ["1", "2"]
        assert list(rows[0]) == list(EpochMetrics.__dataclass_fields__)
        out = capsys.readouterr().out
        for row in rows:
            assert f"train loss {float(row['train_loss']):.4f}" in out
            assert f"test accuracy {float(row['test_accuracy']):.2f} %" in out

    @pytest.mark.parametrize("impl", ["ext", "torch"])
    def test_a_seed_determines_metrics_and_model(self, impl):
        for name in ("a", "b"):
            assert main([*DIGITS, "--impl", impl, "--seed", "7", "--name", name]) == 0
        first, second = Path("runs/a"), Path("runs/b")
        for before, after in zip(read_metrics(first), read_metrics(second), strict=True):
            for name in ("epoch", "train_loss", "test_loss", "test_accuracy", "lr"):
                assert before[name] == after[name]
        model, same_model = (load_file(run / "model.safetensors") for run in (first, second))
        assert model.keys() == same_model.keys()
        for name, parameter in model.items():
            assert torch.equal(parameter, same_model[name])

    def test_no_run_is_overwritten(self):
        for _ in range(3):
            assert main([*DIGITS, "--name", "mine", "--output-dir", "new/folder"]) == 0
        names = sorted(path.name for path in Path("new/folder").iterdir())
        assert names == ["mine", "mine-2", "mine-3"]

    def test_options_override_the_recipe(self):
        argv = ["train", "--dataset", "digits", "--recipe", "best", "--epochs", "1"]
        assert main([*argv, "--no-nesterov", "--momentum", "0"]) == 0
        settings = read_settings(the_run())
        expected = {**RECIPES["best"], "epochs": 1, "nesterov": False, "momentum": 0}
        assert {name: settings[name] for name in expected} == expected

    def test_without_a_network_auto_uses_the_digits(self, capsys):
        assert main(["train", "--epochs", "1"]) == 0
        captured = capsys.readouterr()
        assert captured.err.startswith("mnist-ext: note: MNIST was not found")
        assert captured.err.count("\n") == 1
        assert captured.out.startswith("dataset    digits: ")

    @pytest.mark.parametrize(("target", "code"), [("1", 0), ("99.9", 1)])
    def test_target_accuracy(self, capsys, target, code):
        assert main([*DIGITS, "--target-accuracy", target]) == code
        err = capsys.readouterr().err
        if code:
            assert_one_line(err, "is below the target of 99.9 %")
        else:
            assert err == ""
        assert sorted(path.name for path in the_run().iterdir()) == FILES_OF_A_RUN

    def test_divergence_ends_the_training(self, capsys):
        assert main([*DIGITS, "--lr", "1e30"]) == 1
        assert_one_line(capsys.readouterr().err, "loss is nan after epoch 1", "--lr")
        assert len(read_metrics(the_run())) == 1
        assert not (the_run() / "model.safetensors").exists()


class TestWrongUse:
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
            (["train", "--recipe", "worst"], ["--recipe", "'worst'"]),
            (["train", "--device", "gpu"], ["'gpu'", "cpu, cuda"]),
        ],
    )
    def test_one_line_names_the_mistake(self, capsys, argv, parts):
        if argv and argv[0] == "train" and "--dataset" not in argv:
            argv = [*argv, "--dataset", "digits"]
        assert main(argv) == 2
        captured = capsys.readouterr()
        assert_one_line(captured.err, *parts)
        assert captured.out == ""
        assert list(Path().iterdir()) == []

    def test_cuda_without_a_gpu(self, capsys, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert main([*DIGITS, "--device", "cuda"]) == 2
        assert_one_line(capsys.readouterr().err, "'cuda'", "--device cpu")

    @pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["doctor", "--help"]])
    def test_help(self, capsys, argv):
        with pytest.raises(SystemExit, match="0"):
            main(argv)
        assert "example" in capsys.readouterr().out


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def corrupt(path: Path) -> None:
    path.write_bytes(b"<html>" + path.read_bytes()[6:])


class TestBadInput:
    @pytest.mark.parametrize("dataset", ["mnist", "auto"])
    @pytest.mark.parametrize("file", FILES)
    @pytest.mark.parametrize("damage", [truncate, corrupt, Path.unlink])
    def test_a_damaged_file_is_named(self, capsys, tmp_path, dataset, file, damage):
        path = write_mnist(tmp_path / "data") / file
        damage(path)
        argv = ["train", "--dataset", dataset, "--data-dir", str(tmp_path / "data")]
        assert main(argv) == 2
        assert_one_line(capsys.readouterr().err, str(path))
        assert list(Path().iterdir()) == []

    def test_as_a_process(self, tmp_path):
        path = write_mnist(tmp_path / "data") / FILES[0]
        truncate(path)
        argv = command("train", "--data-dir", str(tmp_path / "data"))
        result = subprocess.run(argv, capture_output=True, text=True)
        assert result.returncode == 2
        assert_one_line(result.stderr, f"{path} is truncated")
        assert result.stdout == ""
        assert list(Path().iterdir()) == []

    def test_no_network(self, capsys, tmp_path):
        assert main(["train", "--dataset", "mnist"]) == 2
        assert_one_line(capsys.readouterr().err, "could not be downloaded", "--data-dir")
        assert list(Path().iterdir()) == []
        assert not (tmp_path / "cache").exists()

    @pytest.mark.parametrize("output", ["file", "file/below/it"])
    def test_an_output_folder_that_cannot_be_written(self, capsys, output):
        Path("file").touch()
        assert main([*DIGITS, "--output-dir", output]) == 2
        captured = capsys.readouterr()
        assert_one_line(captured.err, output, "--output-dir")
        assert "epoch" not in captured.out
        assert [path.name for path in Path().iterdir()] == ["file"]


class TestRun:
    """Failures between two epochs."""

    METRICS = EpochMetrics(1, 2.0, 2.0, 50.0, 1e5, 1.0, 0.01)

    def new_run(self) -> Run:
        return Run(TrainConfig(name="run"), datasets.load("digits"), {})

    def test_metrics_that_cannot_be_written(self):
        run = self.new_run()
        (run.path / "metrics.csv").mkdir()
        with pytest.raises(UserError, match=r"cannot write runs.run.metrics\.csv"):
            run.record(self.METRICS)

    def test_a_model_that_cannot_be_written(self):
        run = self.new_run()
        (run.path / "model.safetensors").mkdir()
        with pytest.raises(UserError, match=r"cannot write runs.run.model\.safetensors"):
            run.save_model(mlp(), epoch=1)
        assert sorted(path.name for path in run.path.iterdir()) == [
            "config.json",
            "model.safetensors",
        ]

    def test_failure_before_the_first_epoch_leaves_nothing(self):
        with pytest.raises(ZeroDivisionError), self.new_run():
            raise ZeroDivisionError
        assert list(Path().iterdir()) == []

    def test_failure_after_the_first_epoch_leaves_the_run(self):
        with suppress(ZeroDivisionError), self.new_run() as run:
            run.record(self.METRICS)
            raise ZeroDivisionError
        assert read_metrics(run.path)[0]["train_loss"] == "2.0"

    def test_other_runs_are_left_alone(self):
        Path("runs/other").mkdir(parents=True)
        with pytest.raises(ZeroDivisionError), self.new_run():
            raise ZeroDivisionError
        assert [path.name for path in Path("runs").iterdir()] == ["other"]


class TestStreams:
    """What takes nothing, or not every character."""

    @pytest.mark.parametrize("argv", [["--version"], ["train", "--help"], DIGITS])
    @pytest.mark.parametrize("unbuffered", [False, True])
    def test_standard_output_is_full(self, capsys, monkeypatch, argv, unbuffered):
        with open("/dev/full", "wb", buffering=0) as full:
            raw = full if unbuffered else io.BufferedWriter(full)
            stream = io.TextIOWrapper(raw, write_through=unbuffered)
            monkeypatch.setattr(sys, "stdout", stream)
            assert main(argv) == 2
            stream.flush()  # as Python does when it exits
        assert_one_line(capsys.readouterr().err, "standard output: No space left on device")

    @pytest.mark.parametrize("argv", [["--version"], ["doctor"]])
    def test_standard_output_is_closed(self, capsys, monkeypatch, argv):
        monkeypatch.setattr(sys, "stdout", None)
        assert main(argv) == 2
        assert_one_line(capsys.readouterr().err, "standard output: Bad file descriptor")

    def test_standard_error_takes_nothing(self, capsys, monkeypatch):
        monkeypatch.setattr(sys, "stderr", None)
        assert main(["--nothing"]) == 2
        assert capsys.readouterr().out == ""
        sys.stderr.flush()

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

    def test_a_run_whose_name_cannot_be_shown(self, monkeypatch):
        stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", stream)
        assert main([*DIGITS, "--name", "\U0001f600\x1b[2J"]) == 0
        out = stream.buffer.getvalue().decode("ascii")
        assert out.endswith("written to runs/\\U0001f600\\x1b[2J\n")
        assert (Path("runs") / "\U0001f600\x1b[2J" / "model.safetensors").exists()


class TestInterrupt:
    def test_ctrl_c_in_training(self):
        argv = command("train", "--dataset", "digits", "--epochs", "1000000")
        with subprocess.Popen(
            argv,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # What a shell starts in the background ignores Ctrl-C, and so would this.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process:
            for line in process.stdout:
                if line.startswith("epoch 2/"):
                    break
            process.send_signal(signal.SIGINT)
            _, err = process.communicate()
        assert process.returncode == 130
        assert err.startswith("mnist-ext: interrupted after ")
        assert err.endswith(f"; continue with: mnist-ext train --resume {the_run()}\n")
        assert err.count("\n") == 1
        assert len(read_metrics(the_run())) >= 1
        with safe_open(the_run() / "model.safetensors", "pt") as file:
            assert int(file.metadata()["epoch"]) >= 1

    def test_ctrl_c_before_the_first_epoch_leaves_nothing(self, capsys, monkeypatch):
        def interrupted(*args):
            assert the_run().exists()
            raise KeyboardInterrupt

        monkeypatch.setattr(train_run, "_Session", interrupted)
        assert main(DIGITS) == 130
        assert capsys.readouterr().err == "mnist-ext: interrupted\n"
        assert list(Path().iterdir()) == []

    def test_ctrl_c_in_the_download_leaves_nothing(self, capsys, tmp_path, monkeypatch):
        def interrupted(self):
            Path(self.raw_folder).mkdir(parents=True)
            raise KeyboardInterrupt

        monkeypatch.setattr(MNIST, "download", interrupted)
        assert main(["train"]) == 130
        assert capsys.readouterr().err == "mnist-ext: interrupted\n"
        assert not (tmp_path / "cache").exists()
