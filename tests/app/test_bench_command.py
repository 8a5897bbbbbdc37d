"""``mnist-ext bench``: what it compares and prints; not how fast anything is."""

from dataclasses import fields

import pytest
import torch
from run_folders import assert_one_line

from mnist_ext import functional
from mnist_ext.app.bench import benchmark

LIMITS = benchmark.Limits(flops=1e11, bytes=1e10)


@pytest.fixture
def quick(monkeypatch):
    """Take one turn of one call each, on small shapes, against given limits."""
    monkeypatch.setattr(benchmark.Limits, "measure", classmethod(lambda cls: LIMITS))
    monkeypatch.setattr(benchmark, "BATCH_SIZES", (2,))
    monkeypatch.setattr(benchmark, "LOGITS", ((8, 10),))
    measure = benchmark.measure
    # Two turns: percentiles need them.
    monkeypatch.setattr(benchmark, "measure", lambda limits: measure(limits, 2, 0))


@pytest.mark.usefixtures("quick")
class TestBench:
    def test_json(self, ran):
        machine, *results = ran("bench", "--json").objects
        assert machine["limits"] == {"flops": 1e11, "bytes": 1e10}
        assert machine["torch"] == torch.__version__
        assert [r["group"] for r in results] == ["step"] * 2 + ["linear"] * 9 + ["cross_entropy"]
        for result in results:
            assert result.keys() == {f.name for f in fields(benchmark.Result)}
            assert result["gain_p20"] <= result["gain"] <= result["gain_p80"]
        forward = next(r for r in results if r["what"] == "linear forward")
        work = 2 * 64 * 784 * 128
        assert forward["limit"] == pytest.approx(work / forward["ours_seconds"] / 1e11)
        loss = results[-1]
        assert loss["limit"] == pytest.approx(2 * 8 * 10 * 4 / loss["ours_seconds"] / 1e10)

    def test_table(self, ran):
        out = ran("bench", "--threads", "1").out
        assert ", 1 thread on " in out
        assert "limits: 100 GFLOP/s" in out
        lines = out[out.index("what  ") :].splitlines()
        assert len(lines) == 1 + 12
        assert max(map(len, lines)) < 120

    def test_wrong_results_are_not_timed(self, ran, monkeypatch):
        right = functional.cross_entropy
        monkeypatch.setattr(functional, "cross_entropy", lambda *a, **o: right(*a, **o) * 1.01)
        out, err = ran("bench", code=1)
        assert_one_line(err, "a training step, swapped modules, batch 2 is wrong here: ")
        assert "training step" not in out
