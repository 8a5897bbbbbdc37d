"""A run as one HTML page that needs nothing else: no font, no request, no script but its own.

It is XML too, so that any parser can check it.
"""

import base64
import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from html import escape
from importlib.resources import files
from typing import Any

from PIL import Image
from torch import Tensor

from mnist_ext.app.data.datasets import Dataset
from mnist_ext.app.report.charts import line_chart, thinned
from mnist_ext.app.report.drawing import drawing, script_hash
from mnist_ext.app.report.scores import Scores, short_names, sure
from mnist_ext.app.report.texts import duration, loss_text
from mnist_ext.app.runs.trained import Record, Trained, divergence
from mnist_ext.app.training.settings import TrainConfig
from mnist_ext.app.training.trainer import StepMetrics

_MOST_MISTAKES = 24

# Should any text ever get past the escaping, it still could neither run nor load a thing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src '{}'"
_DEFAULTS = asdict(TrainConfig())


def page(trained: Trained, record: Record, dataset: Dataset, scores: Scores) -> str:
    """Return the page of a run.

    Args:
        trained: its model.
        record: its settings and metrics.
        dataset: the data set whose test set it was scored on.
        scores: the model's, on that test set.
    """
    name = trained.path.resolve().name
    names = short_names(dataset.class_names)
    style = (files("mnist_ext.app.report") / "page.css").read_text(encoding="utf-8")
    # What stands side by side where there is room.
    groups = [
        [("Training", _curves(record))],
        [
            ("Confusion matrix", _confusion(scores, names)),
            ("Class by class", _classes(scores, names)),
        ],
        [("The surest mistakes", _mistakes(scores, dataset.test.images, names))],
        [("Settings", _settings(record.config["settings"]))],
        [("Data set", _facts(record.config["dataset"]))],
        [("Environment", _facts(record.config["environment"]))],
    ]
    if square := drawing(trained, names):
        groups.insert(0, [("Draw a digit", square)])
    if resumed := record.config.get("resumed"):
        groups.append([("Resumed", _facts({"start": resumed}))])
    numbers = itertools.count(1)
    body = "\n".join(
        '<div class="group">\n'
        + "\n".join(_section(next(numbers), *section) for section in group)
        + "\n</div>"
        for group in groups
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta http-equiv="Content-Security-Policy" content="{_POLICY.format(script_hash())}"/>
<title>{escape(name)} - mnist_ext</title>
<style>
{style}</style>
</head>
<body>
<main>
<h1>{escape(name)}</h1>
{_summary(trained, record, dataset, scores)}
{body}
</main>
</body>
</html>
"""


def _section(number: int, title: str, content: str) -> str:
    return (
        f'<section aria-labelledby="s{number}">\n<h2 id="s{number}">{title}</h2>\n{content}\n'
        "</section>"
    )


def _summary(trained: Trained, record: Record, dataset: Dataset, scores: Scores) -> str:
    widths = "-".join(map(str, (784, *trained.hidden, 10)))
    last = record.epochs[-1]
    error = f"standard error {scores.standard_error:.2f}"
    seconds = duration(sum(e.seconds for e in record.epochs))
    parameters = sum(parameter.numel() for parameter in trained.model.parameters())
    tiles = [
        ("Test accuracy", f"{scores.accuracy:.2f} %", error),
        ("Test loss", loss_text(scores.loss), "mean cross-entropy"),
        ("Wrong", f"{len(scores) - scores.right:,}", f"of {len(scores):,} test images"),
        ("Training", seconds, f"{_epochs(last.epoch)}, with evaluation"),
        ("Speed", f"{last.samples_per_second:,.0f}", "images/s, last epoch"),
        ("Parameters", f"{parameters:,}", f"{len(trained.hidden) + 1} layers"),
    ]
    started = record.config.get("started", "")
    return (
        _alarm(trained, scores)
        + f'<p class="soft">{escape(widths)}, activation {escape(trained.activation)}, trained on '
        f"{escape(trained.dataset)} and tested on the test set of {escape(dataset.name)}; started "
        f"{escape(str(started).replace('T', ' '))}</p>\n"
        '<dl class="tiles">\n'
        + "\n".join(
            f"<div><dt>{escape(title)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd>"
            "</div>"
            for title, value, note in tiles
        )
        + "\n</dl>\n"
        '<p class="soft">Standard error: sqrt(p (1 - p) / n) in points of percent; it is of '
        "the choice of the test images, not of the training's seed.</p>"
    )


def _alarm(trained: Trained, scores: Scores) -> str:
    how = divergence(trained.path)
    if how is None and not math.isfinite(scores.loss):
        how = f"the test loss is {scores.loss}"
    if how is None:
        return ""
    return (
        f'<p class="alarm" role="alert"><strong>The training diverged:</strong> {escape(how)}. '
        f"The scores below are those of the model of epoch {trained.epoch}.</p>\n"
    )


def _epochs(number: int) -> str:
    return f"{number} epoch" + ("" if number == 1 else "s")


def _curves(record: Record) -> str:
    epochs = record.epochs
    numbers = [e.epoch for e in epochs]
    losses = {"training": [e.train_loss for e in epochs], "test": [e.test_loss for e in epochs]}
    charts = [
        line_chart("Loss (mean cross-entropy)", numbers, losses, from_zero=True, text=loss_text),
        line_chart(
            "Accuracy on the test set, percent",
            numbers,
            {"test": [e.test_accuracy for e in epochs]},
            text="{:.2f}".format,
        ),
    ]
    if record.steps:
        charts += _step_curves(record.steps)
    elif len({e.lr for e in epochs}) > 1:
        rates = {"rate": [e.lr for e in epochs]}
        charts.append(line_chart("Learning rate", numbers, rates, from_zero=True, text=_rate))
    header = ("epoch", "training loss", "test loss", "test accuracy, %", "learning rate", "time")
    rows = [
        (
            str(e.epoch),
            loss_text(e.train_loss),
            loss_text(e.test_loss),
            f"{e.test_accuracy:.2f}",
            f"{e.lr:.3g}",
            duration(e.seconds),
        )
        for e in thinned(epochs)
    ]
    part = "" if len(rows) == len(epochs) else f", {len(rows)} of {len(epochs):,} epochs"
    figures = "\n".join(f"<figure>{chart}</figure>" for chart in charts)
    return (
        f'<div class="charts">\n{figures}\n</div>\n'
        f"<details><summary>The figures{part}</summary>\n"
        f"{_table('Metrics by epoch', header, rows)}\n</details>"
    )


def _rate(value: float) -> str:
    return f"{value:.2g}"


def _step_curves(steps: Sequence[StepMetrics]) -> list[str]:
    few = thinned(steps)
    numbers = [s.step for s in few]
    title = "Loss of single batches"
    if len(few) < len(steps):
        title += f", {len(few)} of {len(steps):,} in steps.csv"
    return [
        line_chart(
            title,
            numbers,
            {"training": [s.loss for s in few]},
            from_zero=True,
            along="step",
            text=loss_text,
        ),
        line_chart(
            "Learning rate",
            numbers,
            {"rate": [s.lr for s in few]},
            from_zero=True,
            along="step",
            text=_rate,
        ),
    ]


def _confusion(scores: Scores, names: Sequence[str]) -> str:
    counts = scores.confusion.tolist()
    most = max((c for i, row in enumerate(counts) for j, c in enumerate(row) if i != j), default=0)
    lines = []
    for i, (name, row) in enumerate(zip(names, counts, strict=True)):
        cells = []
        for j, count in enumerate(row):
            if i == j:
                cells.append(f'<td class="right">{count:,}</td>')
            elif count:
                cells.append(f'<td style="--share:{0.55 * count / most:.2f}">{count:,}</td>')
            else:
                cells.append("<td></td>")
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    return (
        '<div class="wide" role="region" aria-label="Confusion matrix" tabindex="0">\n'
        '<table class="confusion">\n<caption>Rows: what it is. Columns: what it was taken for.'
        f'</caption>\n<thead><tr><th scope="col">is</th>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody>\n</table>\n</div>"
    )


def _classes(scores: Scores, names: Sequence[str]) -> str:
    columns = zip(names, scores.support, scores.precision, scores.recall, strict=True)
    rows = [(n, f"{s:,}", _percent(p), _percent(r)) for n, s, p, r in columns]
    header = ("class", "images", "precision, %", "recall, %")
    return (
        '<p class="soft">Precision: of the images taken for a class, those that are of it. Recall: '
        "of the images of a class, those that were taken for it.</p>\n"
        + _table("Class by class", header, rows)
    )


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f}"


def _mistakes(scores: Scores, images: Tensor, names: Sequence[str]) -> str:
    mistakes = scores.mistakes(_MOST_MISTAKES)
    if not mistakes:
        return "<p>There are none.</p>"
    items = []
    for mistake in mistakes:
        is_, taken = escape(names[mistake.label]), escape(names[mistake.prediction])
        items.append(
            f'<li><figure><img src="{_png(images[mistake.index])}" width="28" height="28" '
            f'alt="test image {mistake.index}: {is_}, seen as {taken}"/>'
            f"<figcaption>{is_} seen as {taken}<br/>{escape(sure(mistake.confidence))} sure"
            "</figcaption></figure></li>"
        )
    return (
        '<p class="soft">What it is, what the model took it for, and the probability that the '
        'model gave to that.</p>\n<ul class="mistakes">\n' + "\n".join(items) + "\n</ul>"
    )


def _png(pixels: Tensor) -> str:
    """Return a picture as an address that holds it."""
    file = io.BytesIO()
    Image.fromarray(pixels.cpu().numpy()).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _settings(values: Mapping[str, Any]) -> str:
    """Return the settings that differ from the defaults, and behind a click the others."""
    changed: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for name, value in values.items():
        default = _DEFAULTS.get(name)
        default = list(default) if isinstance(default, tuple) else default  # as JSON has it
        (others if name in _DEFAULTS and value == default else changed)[name] = value
    first = _facts(changed) if changed else "<p>All are the defaults.</p>"
    if not others:
        return first
    summary = "<summary>Those left at their defaults</summary>"
    return f"{first}\n<details>{summary}\n{_facts(others)}\n</details>"


def _facts(values: Mapping[str, Any]) -> str:
    rows = "\n".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(text)}</td></tr>'
        for name, text in _flat(values)
    )
    return f'<table class="facts">\n<tbody>\n{rows}\n</tbody>\n</table>'


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Yield names and texts; those of a mapping within follow one by one."""
    for key, value in values.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}: ")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            yield from _flat({str(i): item for i, item in enumerate(value, 1)}, f"{name} ")
        else:
            yield name, _text(value)


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_text, value)) or "none"
    return str(value)


def _table(label: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first column names the rows."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    lines = []
    for first, *rest in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    return (
        f'<div class="wide" role="region" aria-label="{escape(label)}" tabindex="0">\n<table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n"
        + "\n".join(lines)
        + "\n</tbody>\n</table>\n</div>"
    )
