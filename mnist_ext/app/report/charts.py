"""Line charts as SVG for an HTML page, whose style sheet says colours and sizes of text."""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TypeVar

_T = TypeVar("_T")

_WIDTH, _HEIGHT = 480, 300
# Room for text of 17 units, with which the style sheet keeps it legible on a phone.
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 386, 64, 248
_LINE = 19
_MOST_POINTS = 200
_MOST_MARKED = 30


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
    along: str = "epoch",
    text: Callable[[float], str] = "{:.4g}".format,
) -> str:
    """Draw lines over epochs or steps, with the last value at the end of each.

    Args:
        title: stands above the chart and is read out in its place.
        x: the epochs or steps, ascending.
        series: for each line its name, which is also its class in the style sheet, and its values.
            Values that are not finite are left out.
        from_zero: the vertical axis starts at 0.
        along: what ``x`` counts.
        text: writes a value.

    Returns:
        An ``svg`` element.
    """
    finite = [v for values in series.values() for v in values if math.isfinite(v)]
    marks = ticks(0.0 if from_zero else min(finite, default=0), max(finite, default=1))
    low, high = marks[0], marks[-1]
    span = max(x[-1] - x[0], 1)

    def at(place: float, value: float) -> tuple[float, float]:
        across = (place - x[0]) / span if len(x) > 1 else 0.5
        up = (value - low) / (high - low)
        return _LEFT + across * (_RIGHT - _LEFT), _BOTTOM - up * (_BOTTOM - _TOP)

    parts = [f'<text class="title" x="0" y="18">{escape(title)}</text>']
    for mark in marks:
        y = at(x[0], mark)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text x="{_LEFT - 8}" y="{y + 5:.1f}" text-anchor="end">{_mark(mark, marks)}</text>'
        )
    for place in _marks_along(x):
        across = at(place, low)[0]
        parts.append(
            f'<text x="{across:.1f}" y="{_BOTTOM + 22}" text-anchor="middle">{place:,}</text>'
        )
    parts.append(
        f'<text x="{(_LEFT + _RIGHT) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{along}</text>'
    )
    described, ends = [], []
    for i, (name, values) in enumerate(series.items()):
        points = [(e, v) for e, v in zip(x, values, strict=True) if math.isfinite(v)]
        kind = escape(name)
        if len(series) > 1:
            legend = _LEFT + 140 * i
            parts.append(f'<line class="{kind}" x1="{legend}" x2="{legend + 32}" y1="42" y2="42"/>')
            parts.append(f'<text x="{legend + 40}" y="47">{kind}</text>')
        if not points:
            continue
        places = [at(*point) for point in thinned(points)]
        path = " ".join(f"{across:.1f},{y:.1f}" for across, y in places)
        parts.append(f'<polyline class="{kind}" points="{path}"/>')
        if len(points) <= _MOST_MARKED:
            parts += [
                f'<circle class="{kind}" cx="{a:.1f}" cy="{b:.1f}" r="3.5"/>' for a, b in places
            ]
        end = text(values[-1]) if math.isfinite(values[-1]) else "diverged"
        ends.append((places[-1][1], kind, end))
        described.append(
            f"{kind} from {text(points[0][1])} in {along} {points[0][0]} to {text(points[-1][1])} "
            f"in {along} {points[-1][0]}"
        )
    y = math.inf
    for height, kind, end in sorted(ends, reverse=True):
        y = min(height, y - _LINE)  # so that one does not cover the other
        parts.append(f'<text class="{kind}" x="{_RIGHT + 8}" y="{y + 5:.1f}">{end}</text>')
    label = f"{escape(title)}: {'; '.join(described)}"
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">\n'
        + "\n".join(parts)
        + "\n</svg>"
    )


def _mark(mark: float, marks: Sequence[float]) -> str:
    """Return a number of the vertical axis, with as many decimals as their distance asks for."""
    decimals = max(0, -math.floor(math.log10(marks[1] - marks[0]) + 1e-9))
    if decimals > 4 or max(map(abs, marks)) >= 1e5:
        return f"{mark:.3g}"
    return f"{mark:.{decimals}f}"


def _marks_along(x: Sequence[int]) -> list[int]:
    """Return whole numbers at even distances to name on the horizontal axis."""
    if len(x) == 1:
        return list(x)
    step, most = 1, 10
    while (x[-1] // step) - (x[0] - 1) // step > most:
        power = 10 ** (len(str(step)) - 1)
        step = {1: 2, 2: 5, 5: 10}[step // power] * power
        most = 6 if x[-1] > 999 else 8
    return [n for n in range(-(-x[0] // step) * step, x[-1] + 1, step)]
