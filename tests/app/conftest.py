"""Fixtures for the tests of the application: a place of one's own, a trained run, refusals."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from run_folders import assert_one_line

from mnist_ext.app.cli.main import main


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruptible) -> Iterator[None]:
    """Work in an empty folder, without the machine's own data, cache, network and colours."""
    for name in ("MNIST_EXT_DATA", "NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on the embedded digits for two epochs; the run's folder is to be read only."""
    folder = tmp_path_factory.mktemp("runs")
    options = ["--dataset", "digits", "--recipe", "best", "--epochs", "2", "--hidden", "32"]
    assert main(["train", *options, "--output-dir", str(folder), "--name", "run"]) == 0
    return folder / "run"


@pytest.fixture
def own_run(digits_run: Path, tmp_path: Path) -> Path:
    """Copy the run, to be changed."""
    return Path(shutil.copytree(digits_run, tmp_path / "own"))


class Printed(NamedTuple):
    """What a command has printed."""

    out: str
    err: str

    @property
    def objects(self) -> list[dict[str, Any]]:
        """The JSON objects in the output, one a line."""
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def ran(capsys: pytest.CaptureFixture[str]) -> Callable[..., Printed]:
    """Return a function that runs a command, which succeeds, and returns what it printed."""

    def run(*argv: object, code: int = 0) -> Printed:
        capsys.readouterr()
        assert main(list(map(str, argv))) == code
        return Printed(*capsys.readouterr())

    return run


@pytest.fixture
def refused(ran: Callable[..., Printed]) -> Callable[..., str]:
    """Return a function that runs a command which fails in one line, and returns that."""

    def run(*argv: object, parts: tuple[str, ...] = (), code: int = 2, out: bool = False) -> str:
        printed = ran(*argv, code=code)
        assert_one_line(printed.err, *parts)
        assert out or printed.out == ""
        return printed.err

    return run
