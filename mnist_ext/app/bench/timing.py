"""Paired timing: implementations take turns, so that a change of the machine's speed meets all.

Each turn gives one ratio between two implementations; medians of these ratios are what the tables
compare, never the quotient of two medians from different moments.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

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
    """Seconds per call, by implementation: one for each turn."""

    turns: Mapping[str, list[float]]

    def percentiles(self, name: str) -> tuple[float, float, float]:
        """Return the 20th, 50th and 80th percentile of its seconds per call."""
        return percentiles(self.turns[name])

    def ratio(self, name: str, to: str) -> tuple[float, float, float]:
        """Return how many times as long `name` takes as `to`: 20th, 50th, 80th percentile."""
        pairs = zip(self.turns[name], self.turns[to], strict=True)
        return percentiles(a / b for a, b in pairs)


def take_turns(
    implementations: Mapping[str, Callable[[], object]],
    turns: int = TURNS,
    seconds_per_turn: float = SECONDS_PER_TURN,
    untimed: int = 0,
) -> Times:
    """Time the implementations A B C, C B A, ...; a turn is as many calls as fill its time.

    Before them come so many untimed calls, which bring back what the others' turns have displaced.
    """
    calls = {}
    for name, function in implementations.items():
        function()  # warm: code, caches, memory
        one = seconds(function, 1)
        calls[name] = 1
        if one < seconds_per_turn:
            calls[name] = max(1, round(seconds_per_turn / max(seconds(function, 3), 1e-9)))
    results: dict[str, list[float]] = {name: [] for name in implementations}
    order = list(implementations)
    for turn in range(turns):
        for name in order if turn % 2 == 0 else reversed(order):
            for _ in range(untimed):
                implementations[name]()
            results[name].append(seconds(implementations[name], calls[name]))
    return Times(results)
