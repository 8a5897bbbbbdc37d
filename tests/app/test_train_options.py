"""Where the settings of a run come from, and the forms of output."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mnist_ext.app.cli.main import main

DIGITS = ["train", "--dataset", "digits", "--epochs", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def settings() -> dict:
    return json.loads(Path("runs/run/config.json").read_text())["settings"]


class TestConfigFile:
    def test_flags_override_the_file_and_the_file_the_recipe(self):
        Path("s.toml").write_text(
            'recipe = "best"\ndataset = "digits"\nepochs = 2\nbatch-size = 50\nlr = 0.3\n'
            'nesterov = false\nhidden = [20, 10]\nname = "run"\n'
        )
        assert main(["train", "--config", "s.toml", "--epochs", "1", "--wd", "0"]) == 0
        found = settings()
        assert found["recipe"] == "best"
        assert found["activation"] == "relu"  # the recipe's
        assert (found["batch_size"], found["lr"], found["nesterov"]) == (50, 0.3, False)
        assert found["hidden"] == [20, 10]
        assert (found["epochs"], found["weight_decay"]) == (1, 0)

    @pytest.mark.parametrize(
        ("text", "parts"),
        [
            ("epoch = 1", ["unknown key 'epoch'", "epochs"]),
            ("[train]\nepochs = 1", ["unknown key 'train'"]),
            ("epochs = 0", ["--epochs", "'0'"]),
            ("epochs = true", ["epochs", "True"]),
            ("nesterov = 1", ["nesterov", "true or false"]),
            ("lr = 1970-01-01", ["lr", "number or a text"]),
            ("lr = \nepochs = 1", ["no TOML file", "line 1"]),
            ('name = "a/b"', ["--name", "'a/b'"]),
            ('name = "a\\u0000b"', ["--name", "is not a folder name"]),
            ('output-dir = "a\\u0000b"', ["--output-dir", "NUL"]),
            ('output-dir = "~nobody-of-that-name/x"', ["--output-dir", "no home folder ~nobody"]),
            ("hidden = " + "[" * 5000 + "1" + "]" * 5000, ["no TOML file of settings", "nested"]),
            ("lr = " + "9" * 5000, ["no TOML file of settings", "too long"]),
            ("lr = 0x" + "9" * 5000, ["no TOML file of settings", "too long"]),
            ("lr" + ".a" * 5000 + " = 1", ["s.toml"]),
        ],
    )
    def test_one_line_names_the_mistake(self, capsys, text, parts):
        Path("s.toml").write_text(text)
        assert main(["train", "--config", "s.toml"]) == 2
        err = capsys.readouterr().err
        assert err.startswith("mnist-ext: error: s.toml")
        assert err.count("\n") == 1
        assert all(part in err for part in parts)

    def test_a_byte_order_mark(self):
        Path("s.toml").write_bytes(b"\xef\xbb\xbfname = 'run'")
        assert main([*DIGITS, "--config", "s.toml", "--quiet"]) == 0
        assert settings()["name"] == "run"

    @pytest.mark.parametrize("place", ["option", "file"])
    def test_home_is_expanded(self, monkeypatch, place):
        monkeypatch.setenv("HOME", str(Path("home").absolute()))
        Path("s.toml").write_text('output-dir = "~/runs"')
        given = ["--output-dir=~/runs"] if place == "option" else ["--config", "s.toml"]
        assert main([*DIGITS, *given, "--name", "run", "--quiet"]) == 0
        assert Path("home/runs/run/model.safetensors").exists()
        assert main(["train", "--resume=~/runs/run", "--data-dir=~/x", "--quiet"]) == 0
        config = json.loads(Path("home/runs/run/config.json").read_text())
        assert config["settings"]["data_dir"] == str(Path("home/x").absolute())
        assert main(["eval", "~/runs/run"]) == 0
        assert sorted(path.name for path in Path().iterdir()) == ["home", "s.toml"]

    def test_no_such_file(self, capsys):
        assert main(["train", "--config", "nowhere.toml"]) == 2
        assert "cannot read nowhere.toml" in capsys.readouterr().err


class TestOutput:
    def test_json(self, capsys):
        assert main([*DIGITS, "--name", "run", "--json", "--log-interval", "10"]) == 0
        events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [e["event"] for e in events] == ["start", "step", "step", "epoch", "end"]
        assert events[0]["settings"] == settings()
        assert [e["step"] for e in events[1:3]] == [10, 20]
        assert events[3]["test_accuracy"] == events[4]["test_accuracy"]
        assert events[4]["run"] == "runs/run"

    def test_json_has_no_nan(self, capsys):
        assert main([*DIGITS, "--json", "--lr", "1e30"]) == 1
        event = json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=pytest.fail)
        assert event["train_loss"] is None

    def test_quiet(self, capsys):
        assert main([*DIGITS, "--quiet"]) == 0
        captured = capsys.readouterr()
        assert captured.out == captured.err == ""

    def test_a_dry_run_writes_nothing(self, capsys):
        assert main([*DIGITS, "--dry-run", "--target-accuracy", "99"]) == 0
        out = capsys.readouterr().out
        assert "epoch 1/1" in out
        assert out.endswith("dry run: nothing is written\n")
        assert list(Path().iterdir()) == []

    def test_tensorboard_is_asked_for_by_name(self, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        assert main([*DIGITS, "--tensorboard"]) == 2
        assert "pip install 'mnist-ext[tensorboard]'" in capsys.readouterr().err
        assert list(Path().iterdir()) == []

    def test_completion_is_asked_for_by_name(self, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "shtab", None)
        assert main(["--print-completion", "bash"]) == 2
        assert "pip install 'mnist-ext[completion]'" in capsys.readouterr().err

    def test_a_closed_pipe(self):
        argv = [sys.executable, "-m", "mnist_ext", *DIGITS, "--epochs", "100000", "--name", "run"]
        with subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            for line in process.stdout:
                if line.startswith("epoch 1/"):
                    break
            process.stdout.close()
            err = process.stderr.read()
        assert process.returncode == 141
        assert err == ""
        assert Path("runs/run/checkpoint.safetensors").exists()

    def test_help_is_in_groups(self, capsys):
        with pytest.raises(SystemExit, match="0"):
            main(["train", "--help"])
        out = capsys.readouterr().out
        for group in ("data:", "model:", "training:", "output:", "(default: 100)"):
            assert group in out
