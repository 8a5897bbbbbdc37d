"""The rows of a benchmark: printed as they come, and kept for a CSV file."""

import csv
from collections.abc import Mapping
from pathlib import Path

from mnist_ext.app.bench.timing import TURNS


class Table:
    """Rows printed as they come, and kept for a CSV file."""

    def __init__(
        self, columns: Mapping[str, str], provenance: Mapping[str, object], turns: int = TURNS
    ) -> None:
        self.turns = turns
        self.columns = dict(columns)  # name -> format, for example {"median": ">9.1f"}
        self.provenance = dict(provenance)
        self.rows: list[dict[str, object]] = []

    def _widths(self) -> dict[str, int]:
        return {name: int(form.strip("<>").split(".")[0]) for name, form in self.columns.items()}

    def header(self) -> None:
        aligned = (f"{name:{form[0]}{self._widths()[name]}}" for name, form in self.columns.items())
        print("  ".join(aligned), flush=True)

    def add(self, **row: object) -> None:
        self.rows.append(row)
        cells = []
        for name, form in self.columns.items():
            value = row.get(name)
            if value is None or isinstance(value, str):
                cells.append(f"{value or '':{form[0]}{self._widths()[name]}}")
            else:
                cells.append(f"{value:{form}}")
        print("  ".join(cells), flush=True)

    def write(self, path: Path) -> None:
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*names, *self.provenance])
            writer.writeheader()
            writer.writerows({**row, **self.provenance} for row in self.rows)
