"""``mnist-ext doctor``: what it says of machines that are well, and of others."""

import json

import pytest
import torch
from idx_files import FILES, write_mnist

from mnist_ext import _C, _build_info, _library
from mnist_ext.app.cli import diagnosis
from mnist_ext.app.cli.main import main
from mnist_ext.app.data import datasets

pytestmark = pytest.mark.usefixtures("isolated")


def examine(capsys) -> tuple[int, dict]:
    code = main(["doctor", "--json"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return code, json.loads(out)


@pytest.fixture
def found_mnist(tmp_path, monkeypatch):
    """Have MNIST in a folder."""
    raw = write_mnist(tmp_path / "data")
    monkeypatch.setenv("MNIST_EXT_DATA", str(tmp_path / "data"))
    return raw


def test_all_is_well(capsys, found_mnist, tmp_path):
    code, report = examine(capsys)
    assert code == 0
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


def test_table(capsys, found_mnist, tmp_path):
    assert main(["doctor"]) == 0
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    texts = dict(rows)
    assert texts["PyTorch"].startswith(torch.__version__)
    assert texts["mnist"] == str(tmp_path / "data")
    assert texts["fashion-mnist"].startswith("not found")
    assert "problem" not in texts
    assert rows[-1][0] == "next"


def test_without_mnist_a_hint_says_where_to_put_it(capsys):
    code, report = examine(capsys)
    assert code == 0
    assert any("MNIST_EXT_DATA=DIR" in hint for hint in report["hints"])


def test_damaged_data(capsys, found_mnist):
    path = found_mnist / FILES[0]
    path.write_bytes(path.read_bytes()[:-100])
    code, report = examine(capsys)
    assert code == 1
    assert report["problems"][0].startswith(f"{path} is truncated")
    assert main(["doctor"]) == 1
    assert f"next step      {path} is truncated" in capsys.readouterr().out


def test_two_openmp_runtimes(capsys, monkeypatch):
    monkeypatch.setattr(_build_info, "openmp_runtimes", lambda: ["/a/libgomp.so", "/b/libomp.so"])
    code, report = examine(capsys)
    assert code == 1
    assert "2 OpenMP runtimes are loaded" in report["problems"][0]


def test_wrong_kernels(capsys, monkeypatch):
    linear = diagnosis.F.linear
    monkeypatch.setattr(diagnosis.F, "linear", lambda *args: linear(*args) + 0.01)
    code, report = examine(capsys)
    assert code == 1
    assert "give wrong results here" in report["problems"][0]
    assert not any(report["kernels_right"].values())


@pytest.fixture
def baseline():
    """Run on the baseline instruction set, and on the one before again afterwards."""
    before, reason = _C.active_isa(), _C.active_isa_reason()
    _C.set_isa("baseline", "a test asked for it")
    yield
    _C.set_isa(before, reason)


def test_the_instruction_set_in_use_stays(capsys, baseline):
    examine(capsys)
    assert (_C.active_isa(), _C.active_isa_reason()) == ("baseline", "a test asked for it")


def test_a_cuda_library_that_cannot_be_loaded(capsys, monkeypatch):
    monkeypatch.setattr(_library, "cuda", None)
    monkeypatch.setattr(_library, "cuda_reason", "mnist_ext._cuda cannot be loaded (x): build")
    code, report = examine(capsys)
    assert code == 1
    assert report["problems"] == ["mnist_ext._cuda cannot be loaded (x): build"]


def test_a_missing_package(capsys, monkeypatch):
    version = diagnosis._version
    monkeypatch.setattr(diagnosis, "_version", lambda n: None if n == "tqdm" else version(n))
    code, report = examine(capsys)
    assert code == 1
    assert report["problems"] == ["tqdm missing: run pip install tqdm"]


def test_another_instruction_set_is_hinted_at(capsys, baseline):
    code, report = examine(capsys)
    assert code == 0
    best = report["cpu_isa_available"][-1]
    assert (best == "baseline") or any("unset MNIST_EXT_ISA" in hint for hint in report["hints"])


def test_more_threads_than_cpus(capsys, monkeypatch):
    monkeypatch.setattr(diagnosis, "cpus", lambda: 0)
    assert any("OMP_NUM_THREADS" in hint for hint in examine(capsys)[1]["hints"])


def test_data_is_not_downloaded(capsys, monkeypatch):
    monkeypatch.setattr(datasets, "_download", lambda *args: pytest.fail("downloads"))
    assert examine(capsys)[0] == 0
