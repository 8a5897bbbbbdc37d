"""Line charts as SVG for an HTML page, whose style sheet says the colours."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TypeVar

_T = TypeVar("_T")

_WIDTH, _HEIGHT = 480, 290
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 468, 64, 248
_MOST_POINTS = 200


def thinned(values: Sequence[_T], most: int = _MOST_POINTS) -> list[_T]:
    """Return all values, or so many of them at even distances, the first and the last included."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers that cover low to high: steps of 1, 2 or 5 times a power of ten.

    Args:
        low: finite.
        high: finite, at least low.
        most: so many steps at most.
    """
    if high <= low:
        half = abs(low) * 0.05 or 0.5
        low, high = low - half, high + half
    raw = (high - low) / (most - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def line_chart(
    title: str,
    x: Sequence[int],
    series: Mapping[str, Sequence[float]],
    from_zero: bool = False,
) -> str:
    """Draw lines over epochs.

    Args:
        title: stands above the chart and is read out in its place.
        x: the epochs, ascending.
        series: for each line its name, which is also its class in the style sheet, and its values.
            Values that are not finite are left out.
        from_zero: the vertical axis starts at 0.

    Returns:
        An ``svg`` element.
    """
    finite = [v for values in series.values() for v in values if math.isfinite(v)]
    marks = ticks(0.0 if from_zero else min(finite, default=0), max(finite, default=1))
    low, high = marks[0], marks[-1]
    digits = max(0, -math.floor(math.log10(marks[1] - marks[0]) + 1e-9))
    span = max(x[-1] - x[0], 1)

    def at(epoch: float, value: float) -> tuple[float, float]:
        across = (epoch - x[0]) / span if len(x) > 1 else 0.5
        up = (value - low) / (high - low)
        return _LEFT + across * (_RIGHT - _LEFT), _BOTTOM - up * (_BOTTOM - _TOP)

    parts = [f'<text class="title" x="0" y="16">{escape(title)}</text>']
    for mark in marks:
        y = at(x[0], mark)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{mark:.{digits}f}</text>'
        )
    for epoch in _epoch_marks(x):
        across = at(epoch, low)[0]
        parts.append(
            f'<text x="{across:.1f}" y="{_BOTTOM + 20}" text-anchor="middle">{epoch}</text>'
        )
    parts.append(
        f'<text x="{(_LEFT + _RIGHT) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">epoch</text>'
    )
    described = []
    for i, (name, values) in enumerate(series.items()):
        points = [(e, v) for e, v in zip(x, values, strict=True) if math.isfinite(v)]
        text = escape(name)
        legend = _LEFT + 130 * i
        parts.append(f'<line class="{text}" x1="{legend}" x2="{legend + 32}" y1="40" y2="40"/>')
        parts.append(f'<text x="{legend + 40}" y="44">{text}</text>')
        if not points:
            continue
        path = " ".join("{:.1f},{:.1f}".format(*at(*point)) for point in thinned(points))
        if len(points) == 1:  # a line of one point would not be seen
            across, y = at(*points[0])
            path = f"{across - 6:.1f},{y:.1f} {across + 6:.1f},{y:.1f}"
        parts.append(f'<polyline class="{text}" points="{path}"/>')
        described.append(
            f"{text} from {points[0][1]:.4g} in epoch {points[0][0]} to {points[-1][1]:.4g} in "
            f"epoch {points[-1][0]}"
        )
    label = f"{escape(title)}: {'; '.join(described)}"
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">\n'
        + "\n".join(parts)
        + "\n</svg>"
    )


def _epoch_marks(x: Sequence[int]) -> list[int]:
    """Return whole epochs to name on the axis: the first one, and round ones."""
    if len(x) == 1:
        return list(x)
    marks = {round(mark) for mark in ticks(x[0], x[-1], most=8)}
    apart = (x[-1] - x[0]) / 12  # so that two numbers do not touch
    return [x[0], *sorted(mark for mark in marks if x[0] + apart < mark <= x[-1])]
