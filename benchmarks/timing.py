"""Paired timing: contestants take turns, so that a change of the machine's speed meets all of them.

Each turn gives one ratio between two contestants; medians of these ratios are what the tables
compare, never the quotient of two medians from different moments.
"""

import csv
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

TURNS = 15
SECONDS_PER_TURN = 0.02


def seconds(function: Callable[[], object], calls: int) -> float:
    """Return the seconds per call of so many calls in a row."""
    started = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - started) / calls


def percentiles(values: Iterable[float]) -> tuple[float, float, float]:
    """Return the 20th, 50th and 80th percentile."""
    cuts = statistics.quantiles(values, n=10)
    return cuts[1], cuts[4], cuts[7]


@dataclass(frozen=True)
class Times:
    """Seconds per call, by contestant: one for each turn."""

    turns: Mapping[str, list[float]]

    def percentiles(self, name: str) -> tuple[float, float, float]:
        """Return the 20th, 50th and 80th percentile of its seconds per call."""
        return percentiles(self.turns[name])

    def ratio(self, name: str, to: str) -> tuple[float, float, float]:
        """Return how many times as long `name` takes as `to`: 20th, 50th, 80th percentile."""
        pairs = zip(self.turns[name], self.turns[to], strict=True)
        return percentiles(a / b for a, b in pairs)


def take_turns(
    contestants: Mapping[str, Callable[[], object]],
    turns: int = TURNS,
    seconds_per_turn: float = SECONDS_PER_TURN,
) -> Times:
    """Time the contestants A B C, C B A, ...; a turn is as many calls as fill its time."""
    calls = {}
    for name, function in contestants.items():
        function()  # warm: code, caches, memory
        function()
        calls[name] = max(1, round(seconds_per_turn / max(seconds(function, 3), 1e-9)))
    results: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants)
    for turn in range(turns):
        for name in order if turn % 2 == 0 else reversed(order):
            results[name].append(seconds(contestants[name], calls[name]))
    return Times(results)


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
