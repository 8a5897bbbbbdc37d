"""What the benchmarks compute from their times; not the times."""

import csv
import itertools
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import provenance
from table import Table

from mnist_ext.app.bench import timing
from mnist_ext.app.data import datasets
from mnist_ext.app.training.settings import TrainConfig

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def test_ratios_are_paired_turn_by_turn():
    """The machine slows down threefold halfway: ratios do not notice, medians do."""
    slow = [2.0] * 5 + [6.0] * 5
    fast = [1.0] * 5 + [3.0] * 5
    times = timing.Times({"slow": slow, "fast": fast})
    assert times.ratio("slow", to="fast") == (2.0, 2.0, 2.0)
    assert times.percentiles("fast")[1] == 2.0


def test_implementations_take_turns():
    called = []
    implementations = {name: lambda n=name: called.append(n) for name in "abc"}
    times = timing.take_turns(implementations, turns=3, seconds_per_turn=0)
    assert called[-9:] == list("abccbaabc")
    assert all(len(turns) == 3 for turns in times.turns.values())
    times = timing.take_turns(implementations, turns=1, seconds_per_turn=0, untimed=2)
    assert called[-9:] == list("aaabbbccc")
    assert all(len(turns) == 1 for turns in times.turns.values())


def test_a_machine_may_have_no_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commit() == "unknown"


def test_table_prints_and_writes_every_row(tmp_path, capsys):
    table = Table({"what": "<6", "us": ">8.1f"}, {"cpu": "a CPU"})
    table.header()
    table.add(what="x", us=1.25, more=3)
    table.add(what="y", us=None)
    lines = capsys.readouterr().out.splitlines()
    assert [line.rstrip() for line in lines] == ["what          us", "x            1.2", "y"]
    table.write(tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"what": "x", "us": "1.25", "more": "3", "cpu": "a CPU"},
        {"what": "y", "us": "", "more": "", "cpu": "a CPU"},
    ]


def test_implementations_of_linear_on_a_gpu_make_the_same_products():
    """On the CPU, where their logic can be tried: each within a few roundings of float64."""
    import gpu_linear

    operands = gpu_linear.operands(torch.float32, (9, 7, 5), "cpu")
    for what in (*gpu_linear.WHATS, "autograd"):
        if what == "autograd":
            operands = gpu_linear.with_leaves(operands)
        calls = gpu_linear.implementations(what, False)
        errors = gpu_linear.errors(what, calls, operands)
        assert errors.keys() == calls.keys()
        assert max(errors.values()) < 1e-6
        calls["ours"] = lambda o, eager=calls["eager"]: [t * 1.01 for t in eager(o)]
        with pytest.raises(SystemExit, match="ours is wrong"):
            gpu_linear.errors(what, calls, operands)


def test_unknown_groups_are_refused_by_name(monkeypatch, capsys):
    """JAX need not be installed for this, nor for anything else."""
    import kernels

    monkeypatch.setattr(sys, "argv", ["kernels.py", "nonsense"])
    with pytest.raises(SystemExit):
        kernels.main()
    assert (
        "unknown group nonsense: choose from linear, autograd, cross_entropy, head, sgd"
        in capsys.readouterr().err
    )


def test_every_rung_of_the_ladders_is_right():
    """Compiled and verified; a wrong result ends the program."""
    command = [sys.executable, BENCHMARKS / "ladder" / "ladder.py", "--check"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count("rungs verified") == 6


def test_every_rung_of_the_heads_ladder_is_right():
    ladder = Path(__file__).parents[1] / "benchmarks" / "ladder" / "head.py"
    command = [sys.executable, ladder, "8x4x12", "--turns", "2", "--markdown"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.count("| `") == 6


def test_whole_models_are_compared_and_timed(tmp_path):
    models, file = BENCHMARKS / "models.py", tmp_path / "rows.csv"
    command = [sys.executable, models, "512-256-10", "--turns", "2", "--csv", file]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    rows = list(csv.DictReader(file.open()))
    assert [row["implementation"] for row in rows] == ["torch", "swapped"] * 2
    assert all(float(row["ratio"]) > 0 for row in rows)


def test_memory_of_a_head_is_printed():
    memory = Path(__file__).parents[1] / "benchmarks" / "head_memory.py"
    command = [sys.executable, memory, "64x16x200000", "--of", "ours", "torch"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    ours, torchs = (float(line.split()[-1]) for line in process.stdout.splitlines()[-2:])
    assert ours <= 32
    assert torchs >= 64 * 200_000 * 4 / 2**20  # all logits


def test_epochs_and_recipes_train(monkeypatch, capsys):
    """The commands whose figures the README shows still go with the package, on little data."""
    digits = datasets.load("digits")
    split = digits.train
    few = replace(digits, train=datasets.Split(split.images[:300], split.labels[:300]))
    monkeypatch.setattr(datasets, "load", lambda *_: few)
    training = runpy.run_path(str(BENCHMARKS / "training.py"))
    epochs = training["package_epochs"](TrainConfig(batch_size=100), few)
    assert [0 <= accuracy <= 100 for _, accuracy in itertools.islice(epochs, 2)] == [True] * 2

    def output_of(program, *arguments):
        monkeypatch.setattr(sys, "argv", ["", *arguments])
        program["main"]()
        return capsys.readouterr().out

    recipes = runpy.run_path(str(BENCHMARKS / "recipes.py"))
    values = ["--set", "epochs=1,2", "hidden=8:4"]
    text = output_of(recipes, "augmented", "--seeds", "0", "1", "--hold-out", "100", *values)
    assert "trained on 200 images, judged by 100 others" in text
    assert text.count("mean of 2 seeds ") == 2
    assert "% after 2 epochs" in text

    time_to_98 = runpy.run_path(str(BENCHMARKS / "time_to_98.py"))
    time_to_98["main"].__globals__["seconds_from_cold"] = lambda *_: 2.0
    assert "mean of 2 seeds: " in output_of(time_to_98, "--seeds", "0", "1", "--sides", "20")
    assert output_of(time_to_98, "--seeds", "0", "--sides", "20", "--in-this-process") == ""
    values = ["--epochs", "1", "2", "--learning-rates", "0.3"]
    text = output_of(time_to_98, "--seeds", "0", "1", "--hold-out", "100", *values)
    assert "trained on 200 images, judged by 100 others" in text
    assert text.count("learning rate 0.3: ") == 4  # of two sides


def test_images_are_distorted_in_both_ways(monkeypatch, capsys):
    augmentation = runpy.run_path(str(BENCHMARKS / "augmentation.py"))
    monkeypatch.setattr(sys, "argv", ["", "--images", "200", "--turns", "2"])
    augmentation["main"]()
    assert capsys.readouterr().out.count(" images/s, ") == 3


def test_a_machine_is_drawn_from_its_rows(tmp_path):
    results, picture = BENCHMARKS / "results", tmp_path / "picture.svg"
    command = [sys.executable, BENCHMARKS / "plot_sweep.py", picture]
    command += ["--training", results / "2026-11-30-cpu-training-zen5.csv"]
    command += ["--kernels", results / "2026-11-30-cpu-kernels-zen5.csv"]
    command += ["--memory", results / "2026-11-30-head-memory-zen5.csv"]
    subprocess.run(command, check=True)
    drawn = picture.read_text()
    for text in ("mnist_ext.TrainStep", "PyTorch eager", "torch.compile", "JAX", "4096"):
        assert f"{text}</text>" in drawn


def test_commits_are_drawn_in_turn(tmp_path):
    rows = sorted((BENCHMARKS / "results").glob("*cpu-training-intel*.csv"))
    command = [sys.executable, BENCHMARKS / "plot.py", "--folder", tmp_path, "--commits", *rows]
    subprocess.run(command, check=True)
    drawn = (tmp_path / "commits.svg").read_text()
    commits = [drawn.index(commit) for commit in ("095399f", "25a5914", "2272e69")]
    assert commits == sorted(commits)
    assert drawn.count("095399f") == 2  # swapped, and TrainStep
    assert ">4096</text>" in drawn
