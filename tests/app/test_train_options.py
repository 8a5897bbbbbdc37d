"""Where the settings of a run come from, and the forms of output."""

import json
import sys
from pathlib import Path

import pytest
from run_folders import config_of, names_in

from mnist_ext.app.cli.main import main
from mnist_ext.app.training.settings import RECIPES

DIGITS = ["train", "--dataset", "digits", "--epochs", "1", "--threads", "1", "--name", "run"]
RUN = Path("runs/run")


class TestConfigFile:
    def test_flags_override_the_file_and_the_file_the_recipe(self):
        Path("s.toml").write_text(
            'recipe = "best"\ndataset = "digits"\nepochs = 2\nbatch-size = 50\nlr = 0.3\n'
            'nesterov = false\nhidden = [20, 10]\nname = "run"\n'
        )
        assert main(["train", "--config", "s.toml", "--epochs", "1", "--wd", "0"]) == 0
        file = {"recipe": "best", "batch_size": 50, "lr": 0.3, "nesterov": False}
        expected = {**RECIPES["best"], **file, "hidden": [20, 10], "epochs": 1, "weight_decay": 0}
        settings = config_of(RUN)["settings"]
        assert {name: settings[name] for name in expected} == expected

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
    def test_one_line_names_the_mistake(self, refused, text, parts):
        Path("s.toml").write_text(text)
        err = refused("train", "--config", "s.toml", parts=tuple(parts))
        assert err.startswith("mnist-ext: error: s.toml")

    def test_a_byte_order_mark(self, ran):
        Path("s.toml").write_bytes(b"\xef\xbb\xbfseed = 4")
        assert ran(*DIGITS, "--config", "s.toml", "--quiet") == ("", "")
        assert config_of(RUN)["settings"]["seed"] == 4

    @pytest.mark.parametrize("place", ["option", "file"])
    def test_home_is_expanded(self, monkeypatch, place):
        monkeypatch.setenv("HOME", str(Path("home").absolute()))
        Path("s.toml").write_text('output-dir = "~/runs"')
        given = ["--output-dir=~/runs"] if place == "option" else ["--config", "s.toml"]
        assert main([*DIGITS, *given, "--quiet"]) == 0
        assert Path("home/runs/run/model.safetensors").exists()
        assert main(["train", "--resume=~/runs/run", "--data-dir=~/x", "--quiet"]) == 0
        settings = config_of(Path("home/runs/run"))["settings"]
        assert settings["data_dir"] == str(Path("home/x").absolute())
        assert main(["eval", "~/runs/run"]) == 0
        assert names_in() == ["home", "s.toml"]


class TestOutput:
    def test_json(self, ran):
        events = ran(*DIGITS, "--json", "--log-interval", "10").objects
        assert [e["event"] for e in events] == ["start", "step", "step", "epoch", "end"]
        assert events[0]["settings"] == config_of(RUN)["settings"]
        assert [e["step"] for e in events[1:3]] == [10, 20]
        assert events[3]["test_accuracy"] == events[4]["test_accuracy"]
        assert events[4]["run"] == "runs/run"

    def test_json_has_no_nan(self, capsys):
        assert main([*DIGITS, "--json", "--lr", "1e30"]) == 1
        event = json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=pytest.fail)
        assert event["train_loss"] is None

    def test_a_dry_run_writes_nothing(self, ran):
        out = ran(*DIGITS, "--dry-run", "--target-accuracy", "99").out
        assert "epoch 1/1" in out
        assert out.endswith("dry run: nothing is written\n")
        assert names_in() == []

    @pytest.mark.parametrize(
        ("package", "module", "argv"),
        [
            ("tensorboard", "torch.utils.tensorboard", [*DIGITS, "--tensorboard"]),
            ("completion", "shtab", ["--print-completion", "bash"]),
        ],
    )
    def test_what_is_not_installed_is_named(self, refused, monkeypatch, package, module, argv):
        monkeypatch.setitem(sys.modules, module, None)
        refused(*argv, parts=(f"pip install 'mnist-ext[{package}]'",))
        assert names_in() == []
