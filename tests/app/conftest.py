"""Fixtures for the tests of the application: a trained run, and a place of one's own."""

from pathlib import Path

import pytest
from run_folders import isolate, train_digits


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on the embedded digits; to be read only."""
    return train_digits(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in an empty folder, without the machine's own data, cache, network and colours."""
    isolate(tmp_path, monkeypatch)
