"""The example of a language model: both ways train the same model."""

import argparse
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "language_model.py"


def test_both_ways_are_the_same_training():
    example = runpy.run_path(str(SCRIPT))
    tokens = example["tokens_of"](SCRIPT.read_text())
    args = argparse.Namespace(steps=20, batch=256, features=16)
    results = [example["train"](way, tokens, args) for way in example["WAYS"]]
    assert results[0].last_loss == pytest.approx(results[1].last_loss, rel=1e-3)
    assert results[0].last_loss < 0.98 * results[0].first_loss
