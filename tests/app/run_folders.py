"""A small run for the tests of the commands that read one, and a place to run them in."""

from pathlib import Path

import pytest

from mnist_ext.app.cli.main import main


def train_digits(folder: Path, name: str = "run") -> Path:
    """Train on the embedded digits for two epochs; return the run's folder."""
    options = ["--dataset", "digits", "--recipe", "best", "--epochs", "2", "--hidden", "32"]
    assert main(["train", *options, "--output-dir", str(folder), "--name", name]) == 0
    return folder / name


def isolate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder, without the machine's own data, cache, network and colours."""
    for name in ("MNIST_EXT_DATA", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)


def assert_one_line(err: str, *parts: str) -> None:
    assert err.startswith("mnist-ext: error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err
