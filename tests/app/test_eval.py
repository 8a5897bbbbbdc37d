"""``mnist-ext eval``: figures, pictures, and runs that cannot be read."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from idx_files import TEST_SIZE, write_mnist
from PIL import Image
from run_folders import config_of, rows_of
from safetensors import safe_open
from safetensors.torch import save_file

from mnist_ext.app import UserError
from mnist_ext.app.cli.terminal import Terminal, table
from mnist_ext.app.report import plots
from mnist_ext.app.report.scores import Scores
from mnist_ext.app.runs import trained


class TestScores:
    # Class 0: two right, one taken for 2; class 1: one taken for 0; class 2: one right.
    SCORES = Scores(
        logits=torch.tensor([[3.0, 0, 0], [2.0, 1, 0], [0.0, 0, 5], [1.0, 0.5, 0], [0.0, 0, 1]]),
        labels=torch.tensor([0, 0, 0, 1, 2]),
    )

    def test_figures_by_class_and_of_all(self):
        """Truth by row."""
        assert self.SCORES.confusion.tolist() == [[2, 0, 1], [1, 0, 0], [0, 0, 1]]
        assert self.SCORES.support == [3, 1, 1]
        assert self.SCORES.precision == [pytest.approx(200 / 3), None, 50]
        assert self.SCORES.recall == [pytest.approx(200 / 3), 0, 100]
        assert self.SCORES.accuracy == 60
        assert self.SCORES.standard_error == pytest.approx(100 * math.sqrt(0.6 * 0.4 / 5))

    def test_mistakes_come_with_the_surest_first(self):
        surest, other = self.SCORES.mistakes(9)
        assert (surest.index, surest.label, surest.prediction) == (2, 0, 2)
        assert surest.confidence == pytest.approx(math.exp(5) / (math.exp(5) + 2))
        assert (other.index, other.label, other.prediction) == (3, 1, 0)
        assert self.SCORES.mistakes(1) == [surest]


class TestEval:
    def test_json_agrees_with_the_training(self, ran, digits_run):
        (report,) = ran("eval", digits_run, "--json").objects
        assert report["epoch"] == 2
        last = rows_of(digits_run / "metrics.csv")[-1]
        assert report["accuracy"] == pytest.approx(float(last["test_accuracy"]))
        assert report["loss"] == pytest.approx(float(last["test_loss"]), rel=1e-5)
        assert report["images"] == sum(map(sum, report["confusion"])) == 360
        assert report["dataset"] == report["trained_on"] == "digits"
        assert [c["name"] for c in report["classes"]] == list("0123456789")

    def test_table(self, ran, own_run):
        """The model alone is enough."""
        for name in ("config.json", "metrics.csv"):
            (own_run / name).unlink()
        out, err = ran("eval", own_run)
        assert err == ""
        assert "\x1b" not in out
        accuracy = r"^accuracy   \d\d\.\d\d %, standard error \d\.\d\d, "
        assert re.search(accuracy, out, re.MULTILINE)
        lines = out.splitlines()
        start = lines.index(next(line for line in lines if line.startswith("is \\ taken for")))
        rows = [line.split() for line in lines[start + 2 :]]
        assert [row[0] for row in rows] == list("0123456789")
        assert {len(line) for line in lines[start + 1 :]} == {len(lines[start])}

    def test_the_data_folder_of_the_run_is_remembered(self, ran, own_run, tmp_path):
        write_mnist(tmp_path / "data")
        config = config_of(own_run)
        config["settings"]["data_dir"] = str(tmp_path / "data")
        (own_run / "config.json").write_text(json.dumps(config))
        (report,) = ran("eval", own_run, "--dataset", "mnist", "--json").objects
        assert report["images"] == TEST_SIZE

    def test_target_accuracy(self, ran, refused, digits_run):
        ran("eval", digits_run, "--target-accuracy", "10")
        argv = ["eval", digits_run, "--target-accuracy", "100"]
        refused(*argv, parts=("below the target of 100 %",), code=1, out=True)


class TestPlots:
    def test_pictures_are_written_into_the_run(self, ran, own_run, tmp_path):
        """And where links in it lead."""
        (own_run / "weights.png").symlink_to(tmp_path / "elsewhere.png")
        out = ran("eval", own_run, "--plots").out
        for name in ("curves.png", "confusion.png", "mistakes.png", "weights.png"):
            assert f"written to {own_run / name}\n" in out
            with Image.open(own_run / name) as image:
                assert image.format == "PNG"
                assert image.width > 300
                # Drawn on: neither blank nor of one colour.
                assert len(image.convert("RGB").getcolors(2**24)) > 20
        assert (own_run / "weights.png").is_symlink()
        assert (tmp_path / "elsewhere.png").is_file()

    def test_no_mistakes_no_picture_of_them(self, digits_run, tmp_path):
        logits = torch.eye(10) * 9
        scores = Scores(logits, torch.arange(10))
        model, record = trained.load(digits_run), trained.load_record(digits_run)
        images = torch.zeros(10, 28, 28, dtype=torch.uint8)
        paths = plots.draw(tmp_path, model, record.epochs, scores, images, list("0123456789"))
        assert [path.name for path in paths] == ["curves.png", "confusion.png", "weights.png"]

    def test_without_matplotlib_one_line_says_what_to_install(self, refused, own_run, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        parts = ("matplotlib", "pip install 'mnist-ext[plots]'")
        refused("eval", own_run, "--plots", parts=parts)

    def test_a_folder_that_cannot_be_written(self, refused, own_run):
        (own_run / "curves.png").mkdir()
        refused("eval", own_run, "--plots", parts=("cannot write", "curves.png"))


def rewrite(path: Path, metadata: dict[str, str | None], change=None) -> None:
    """Write the model again with other metadata, or other tensors."""
    with safe_open(path, "pt") as file:
        merged = {**file.metadata(), **metadata}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if change is not None:
        change(tensors)
    save_file(tensors, path, {k: v for k, v in merged.items() if v is not None})


def transpose(tensors: dict[str, torch.Tensor]) -> None:
    tensors["1.weight"] = tensors["1.weight"].t().contiguous()


def rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["first.weight"] = tensors.pop("1.weight")


def to_double(tensors: dict[str, torch.Tensor]) -> None:
    tensors["1.bias"] = tensors["1.bias"].double()


class TestDamagedRuns:
    @pytest.fixture
    def all_refuse(self, refused):
        """Return a function that runs all commands that read a run."""

        def run(folder: Path | str, *parts: str) -> None:
            for command in (["eval", folder], ["predict", folder, "a.png"], ["report", folder]):
                refused(*command, parts=parts)

        return run

    def test_no_run(self, all_refuse, digits_run):
        all_refuse("nothing", "there is no nothing", "'mnist-ext train'")
        Path("file").touch()
        all_refuse("file", "file is a file", "expected a folder")
        Path("empty").mkdir()
        all_refuse("empty", "empty has no ", "expected a folder")
        all_refuse(digits_run.parent, "holds runs", str(digits_run))

    @pytest.mark.parametrize("kept", [0, 4, 100, -1, None])
    def test_a_truncated_model_and_a_pickle(self, all_refuse, own_run, kept):
        path = own_run / "model.safetensors"
        if kept is None:
            torch.save({"1.weight": torch.zeros(1)}, path)
        else:
            path.write_bytes(path.read_bytes()[:kept])
        all_refuse(own_run, str(path), "is damaged or not a safetensors file")

    @pytest.mark.parametrize(
        ("metadata", "change", "part"),
        [
            ({"hidden": None}, None, "'hidden'"),
            ({"hidden": "32,x"}, None, "hidden '32,x'"),
            ({"hidden": "32,16"}, None, "4 tensors for 3 layers"),
            ({"hidden": "999999999"}, None, "1.bias is float32 of shape (32,)"),
            ({"hidden": "9" * 5000}, None, "hidden"),
            ({"activation": "tanh"}, None, "activation 'tanh'"),
            ({"activation": "none"}, None, "the tensors"),
            ({"std": "0"}, None, "std 0.0"),
            ({"mean": "nan"}, None, "mean 'nan'"),
            ({"epoch": "-1"}, None, "epoch '-1'"),
            (
                {},
                transpose,
                "1.weight is float32 of shape (784, 32) where float32 of shape (32, 784)",
            ),
            ({}, rename, "first.weight"),
            ({}, to_double, "1.bias is float64"),
        ],
    )
    def test_a_foreign_model(self, all_refuse, own_run, metadata, change, part):
        path = own_run / "model.safetensors"
        rewrite(path, metadata, change)
        all_refuse(own_run, f"{path} is not a model of 'mnist-ext train'", part)

    def test_weights_that_are_not_finite(self, all_refuse, own_run):
        """An older version saved them, too."""
        rewrite(own_run / "model.safetensors", {}, lambda t: t["1.bias"].fill_(torch.nan))
        part = "1.bias holds values that are not finite; train again, with a lower --lr"
        all_refuse(own_run, "the training diverged", part)

    def test_an_unknown_data_set(self, refused, own_run):
        rewrite(own_run / "model.safetensors", {"dataset": "cifar"})
        refused("eval", own_run, parts=("'cifar'", "--dataset"))

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("config.json", "{"),
            ("config.json", "[]"),
            ("config.json", '{"settings": {}}'),
            ("config.json", "[" * 100_000),
            ("metrics.csv", ""),
            ("metrics.csv", "epoch,train_loss\n1,2\n"),
            ("metrics.csv", "\0"),
        ],
    )
    def test_a_damaged_record(self, own_run, name, content):
        (own_run / name).write_text(content)
        with pytest.raises(UserError, match=rf"{name} is damaged"):
            trained.load_record(own_run)


class TestTerminal:
    def test_colour_only_where_it_is_wanted(self, monkeypatch):
        monkeypatch.setenv("TERM", "xterm-256color")
        assert not Terminal.of(sys.stdout).color
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        assert Terminal.of(sys.stdout).color
        monkeypatch.setenv("NO_COLOR", "1")
        assert not Terminal.of(sys.stdout).color
        monkeypatch.setenv("NO_COLOR", "")  # https://no-color.org: not an empty string
        assert Terminal.of(sys.stdout).color
        monkeypatch.setenv("TERM", "dumb")
        assert not Terminal.of(sys.stdout).color

    def test_bars(self):
        blocks, ascii = Terminal(False, True), Terminal(False, False)
        assert blocks.bar(1, 4) == "████"
        assert blocks.bar(0, 4) == "    "
        assert blocks.bar(0.5 + 1 / 32, 4) == "██▏ "
        assert ascii.bar(0.5, 4) == "##  "

    def test_pictures(self):
        pixels = torch.tensor([[0, 255, 0, 255], [0, 0, 255, 255]], dtype=torch.uint8)
        assert Terminal(False, True).picture(pixels) == [" ▀▄█"]
        assert Terminal(False, False).picture(pixels) == [" ==@"]
        greys = torch.tensor([[0, 128], [255, 128]], dtype=torch.uint8)
        colored = "\x1b[38;5;16;48;5;231m▀\x1b[38;5;244;48;5;244m▀\x1b[0m"
        assert Terminal(True, True).picture(greys) == [colored]

    def test_table(self):
        rows = [["a", "bb"], ["ccc", "1"]]
        assert table(rows) == ["a    bb", "-------", "ccc   1"]
        assert table(rows, lambda i, j, text: f"<{text}>" if i and j else text)[2] == "ccc  < 1>"
