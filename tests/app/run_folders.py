"""What a run has written, and what a command says where it fails."""

import csv
import json
from pathlib import Path
from typing import Any


def rows_of(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def config_of(run: Path) -> dict[str, Any]:
    """Return the content of a run's `config.json`."""
    return json.loads((run / "config.json").read_text())


def names_in(folder: Path | str = ".") -> list[str]:
    """Return the sorted names of what lies in a folder."""
    return sorted(path.name for path in Path(folder).iterdir())


def assert_one_line(err: str, *parts: str) -> None:
    assert err.startswith("mnist-ext: error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err
