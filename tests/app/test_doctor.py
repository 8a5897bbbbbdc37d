"""``mnist-ext doctor``: what it says of machines that are well, and of others."""

from typing import Any

import devices
import pytest
import torch
from idx_files import FILES, write_mnist

from mnist_ext import _C, _build_info, _library
from mnist_ext.app.cli import diagnosis
from mnist_ext.app.data import datasets


@pytest.fixture
def examine(ran):
    """Return a function that runs the command, with an exit code, and returns its report."""

    def run(code: int = 0) -> dict[str, Any]:
        (report,) = ran("doctor", "--json", code=code).objects
        return report

    return run


@pytest.fixture
def found_mnist(tmp_path, monkeypatch):
    """Have MNIST in a folder."""
    raw = write_mnist(tmp_path / "data")
    monkeypatch.setenv("MNIST_EXT_DATA", str(tmp_path / "data"))
    return raw


def test_all_is_well(examine, found_mnist, tmp_path):
    report = examine()
    assert report["problems"] == []
    assert report["next_step"].startswith("mnist-ext train")
    assert report["torch"] == torch.__version__
    assert report["cpu_isa"] in report["cpu_isa_available"]
    assert report["kernels_right"] == dict.fromkeys(report["cpu_isa_available"], True)
    assert report["data"] == {
        "mnist": {"folder": str(tmp_path / "data"), "problem": None},
        "fashion-mnist": {"folder": None, "problem": None},
    }
    assert report["packages"]["pillow"]


def test_table(ran, found_mnist, tmp_path):
    rows = [line.split(maxsplit=1) for line in ran("doctor").out.splitlines()]
    texts = dict(rows)
    assert texts["PyTorch"].startswith(torch.__version__)
    assert texts["mnist"] == str(tmp_path / "data")
    assert texts["fashion-mnist"].startswith("not found")
    assert "problem" not in texts
    assert rows[-1][0] == "next"


def test_damaged_data(ran, examine, found_mnist):
    path = found_mnist / FILES[0]
    path.write_bytes(path.read_bytes()[:-100])
    assert examine(code=1)["problems"][0].startswith(f"{path} is truncated")
    assert f"next step      {path} is truncated" in ran("doctor", code=1).out


@pytest.mark.parametrize(
    ("where", "name", "value", "problem"),
    [
        (_build_info, "openmp_runtimes", lambda: ["a/libgomp.so", "b/libomp.so"], "2 OpenMP runti"),
        (
            torch.nn.functional,
            "linear",
            lambda input, weight, bias: (input @ weight.t() + bias) * 1.01,
            f"the kernels for {', '.join(_C.available_isas())} give wrong results here",
        ),
        (_library, "cuda_reason", "mnist_ext._cuda cannot be loaded (x)", "mnist_ext._cuda cannot"),
        (
            diagnosis,
            "_version",
            lambda name: None if name == "tqdm" else "1.0",
            "tqdm missing: run pip install tqdm",
        ),
    ],
)
def test_a_problem(examine, monkeypatch, where, name, value, problem):
    monkeypatch.setattr(_library, "cuda", None)
    monkeypatch.setattr(where, name, value)
    report = examine(code=1)
    (found,) = report["problems"]
    assert found.startswith(problem)
    assert report["next_step"] == found


def test_another_instruction_set_is_hinted_at_and_stays(examine):
    with devices.use("baseline"):
        reason = _C.active_isa_reason()
        report = examine()
        assert (_C.active_isa(), _C.active_isa_reason()) == ("baseline", reason)
    hinted = any("unset MNIST_EXT_ISA" in hint for hint in report["hints"])
    assert hinted == (report["cpu_isa_available"] != ["baseline"])


def test_hints_without_mnist_and_with_too_many_threads(examine, monkeypatch):
    """And nothing is downloaded."""
    monkeypatch.setattr(diagnosis, "cpus", lambda: 0)
    monkeypatch.setattr(datasets, "_download", lambda *args: pytest.fail("downloads"))
    report = examine()
    for part in ("MNIST_EXT_DATA=DIR", "OMP_NUM_THREADS=0"):
        assert any(part in hint for hint in report["hints"])
