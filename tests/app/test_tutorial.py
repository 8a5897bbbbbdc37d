"""The tutorial runs to its end, and notices an operator that computes something else."""

import runpy
import sys
from pathlib import Path

import pytest

from mnist_ext import functional

SCRIPT = Path(__file__).parents[2] / "examples" / "tutorial.py"


@pytest.fixture
def tutorial(monkeypatch):
    """Return a function that runs the tutorial with some arguments."""
    main = runpy.run_path(str(SCRIPT))["main"]

    def run(*args: str) -> int:
        monkeypatch.setattr(sys, "argv", ["tutorial.py", *args])
        return main()

    return run


def test_on_the_digits(tutorial, capsys):
    assert tutorial("--dataset", "digits", "--epochs", "3") == 0
    out = capsys.readouterr().out
    assert "FAILED" not in out
    assert out.endswith("all checks passed\n")
    for section in range(1, 7):
        assert f"\n{section}. " in out


@pytest.mark.parametrize("operator", ["linear", "cross_entropy"])
def test_a_wrong_operator_fails(tutorial, capsys, monkeypatch, operator):
    right = getattr(functional, operator)
    monkeypatch.setattr(
        functional, operator, lambda *args, **kwargs: 1.001 * right(*args, **kwargs)
    )
    assert tutorial("--dataset", "digits", "--epochs", "1") == 1
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert "checks failed" in out.splitlines()[-1]


def test_missing_data(tutorial, capsys, tmp_path):
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").touch()
    assert tutorial("--data-dir", str(tmp_path)) == 2
    assert capsys.readouterr().err.startswith("tutorial: error: ")
