"""Pictures of a run, drawn by matplotlib: an optional dependency, the extra ``plots``.

Colours that the colour-blind can distinguish: blue and vermilion of Okabe and Ito, white to that
blue, and purple to orange around zero.
"""

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from mnist_ext.app import UserError
from mnist_ext.app.files.writing import write_output
from mnist_ext.app.report.scores import Scores, sure
from mnist_ext.app.report.texts import loss_text
from mnist_ext.app.runs.trained import Trained
from mnist_ext.app.training.trainer import EpochMetrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TRAINING, _TEST = "#0072b2", "#d55e00"
_MOST_MISTAKES = 24
_MOST_WEIGHTS = 128
_DOTS_PER_INCH = 120


def require() -> None:
    """Raise UserError where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"pictures need matplotlib ({error}): run pip install 'mnist-ext[plots]', or "
            "pip install matplotlib"
        ) from error


def draw(
    folder: Path,
    trained: Trained,
    epochs: Sequence[EpochMetrics],
    scores: Scores,
    images: Tensor,
    class_names: Sequence[str],
) -> list[Path]:
    """Draw all pictures of a run.

    Args:
        folder: where to write them; existing ones are replaced.
        trained: the model.
        epochs: the metrics of its training.
        scores: how good it is on a labelled set.
        images: those of that set, uint8 [N, 28, 28].
        class_names: short names of the classes.

    Returns:
        The files: ``curves.png``, ``confusion.png``, ``mistakes.png`` where there are any, and
        ``weights.png``.

    Raises:
        UserError: matplotlib is missing, or a file cannot be written.
    """
    require()
    pictures: dict[str, Callable[[], Figure]] = {
        "curves.png": lambda: curves(epochs),
        "confusion.png": lambda: confusion(scores, class_names),
        "mistakes.png": lambda: mistakes(scores, images, class_names),
        "weights.png": lambda: weights(next(trained.model.parameters())),
    }
    if scores.right == len(scores):
        del pictures["mistakes.png"]
    paths = []
    for name, make in pictures.items():
        write_output(folder / name, _png(make()))
        paths.append(folder / name)
    return paths


def _png(figure: "Figure") -> bytes:
    file = io.BytesIO()
    # Without matplotlib's version, so that the same run gives the same file.
    figure.savefig(file, format="png", dpi=_DOTS_PER_INCH, metadata={"Software": None})
    return file.getvalue()


def curves(epochs: Sequence[EpochMetrics]) -> "Figure":
    """Draw loss and accuracy by epoch."""
    figure = _figure(9, 3.6)
    left, right = figure.subplots(1, 2)
    numbers = [e.epoch for e in epochs]
    marker = "o" if len(epochs) <= 30 else ""
    losses = [e.train_loss for e in epochs], [e.test_loss for e in epochs]
    left.plot(numbers, losses[0], color=_TRAINING, marker=marker, ms=4)
    left.plot(numbers, losses[1], color=_TEST, marker=marker, ms=4, ls="--")
    left.legend(["training, as it went", "test, after the epoch"], frameon=False)
    left.set(title="Loss", xlabel="epoch", ylabel="mean cross-entropy")
    left.set_ylim(bottom=0)
    train_is_above = losses[0][-1] > losses[1][-1]
    _end(
        left,
        numbers[-1],
        losses[0][-1],
        loss_text,
        _TRAINING,
        "bottom" if train_is_above else "top",
    )
    _end(left, numbers[-1], losses[1][-1], loss_text, _TEST, "top" if train_is_above else "bottom")
    accuracies = [e.test_accuracy for e in epochs]
    right.plot(numbers, accuracies, color=_TEST, marker=marker, ms=4, ls="--")
    _end(right, numbers[-1], accuracies[-1], "{:.2f}".format, _TEST, "center")
    right.set(title="Accuracy on the test set", xlabel="epoch", ylabel="percent")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(right=numbers[-1])  # the values beside the ends stand beyond the axis
        for line in axes.lines:
            line.set_clip_on(False)
        axes.grid(alpha=0.3)
        axes.locator_params(axis="x", integer=True)
    return figure


def _end(
    axes: "Axes", x: float, y: float, text: Callable[[float], str], color: str, vertical: str
) -> None:
    """Write the value that a curve ends at beside its end."""
    if math.isfinite(y):
        axes.annotate(text(y), (x, y), (7, 0), textcoords="offset points", va=vertical, color=color)


def confusion(scores: Scores, class_names: Sequence[str]) -> "Figure":
    """Draw how many images of each class were taken for which; right ones are not coloured."""
    from matplotlib.colors import LinearSegmentedColormap

    counts = scores.confusion
    number = len(counts)
    figure = _figure(6.2, 6.2)
    axes = figure.subplots()
    errors = counts - counts.diag().diag()
    most = max(int(errors.max()), 1)
    colors = LinearSegmentedColormap.from_list("", ["white", _TRAINING])
    axes.imshow(errors.numpy(), cmap=colors, vmin=0, vmax=most)
    for place in range(1, number):
        axes.axhline(place - 0.5, color="#d5d9df", lw=0.8)
        axes.axvline(place - 0.5, color="#d5d9df", lw=0.8)
    for i in range(number):
        for j in range(number):
            count = int(counts[i, j])
            if count and i == j:
                _cell(axes, i, j, f"{count:,}", "#555555", "#eeeeee")
            elif count:
                color = "white" if count > 0.7 * most else "black"
                axes.text(j, i, str(count), ha="center", va="center", color=color)
    names = [str(name) for name in class_names]
    axes.set_xticks(range(number), names)
    if max(map(len, names)) > 2:
        for label in axes.get_xticklabels():
            label.set(rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(number), names)
    axes.set(
        xlabel="taken for",
        ylabel="what it is",
        title=f"{scores.accuracy:.2f} % of {len(scores):,} test images right, "
        f"{len(scores) - scores.right:,} wrong",
    )
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return figure


def _cell(axes: "Axes", row: int, column: int, text: str, color: str, background: str) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, color=background, lw=0))
    axes.text(column, row, text, ha="center", va="center", color=color)


def mistakes(scores: Scores, images: Tensor, class_names: Sequence[str]) -> "Figure":
    """Draw the wrong predictions that the model was surest of."""
    found = scores.mistakes(_MOST_MISTAKES)
    gap = "\n" if max(map(len, class_names)) > 2 else " "
    texts = [
        f"{class_names[m.label]}{gap}seen as {class_names[m.prediction]}\n{sure(m.confidence)} sure"
        for m in found
    ]
    columns = min(6, len(found))
    rows = -(-len(found) // columns)
    longest = max(len(line) for text in texts for line in text.split("\n"))
    width, height = 1.15 + 0.075 * longest, 1.15  # of one with its text, in inches
    figure = _figure(max(width * columns, 5), height * rows + 0.4, layout=None)
    figure.suptitle("The surest mistakes", y=1 - 0.1 / figure.get_figheight(), va="top")
    for i, (mistake, text) in enumerate(zip(found, texts, strict=True)):
        left, bottom = i % columns * width + 0.1, (rows - 1 - i // columns) * height + 0.1
        axes = _axes(figure, left, bottom, 0.95, 0.95)
        axes.imshow(images[mistake.index].numpy(), cmap="gray_r", interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_color("#999999")
        axes.text(1.08, 0.5, text, transform=axes.transAxes, va="center", fontsize=9)
    return figure


def weights(weight: Tensor) -> "Figure":
    """Draw what each neuron of the first layer looks for, as images of 28x28 pixels.

    Args:
        weight: [neurons, 784].
    """
    shown = weight[:_MOST_WEIGHTS].detach().reshape(-1, 28, 28)
    columns = min(16, len(shown))
    rows = -(-len(shown) // columns)
    # One picture of all, with a blank line between two: 128 axes take seconds.
    sheet = shown.new_full((rows * 29 + 1, columns * 29 + 1), float("nan"))
    for i, pixels in enumerate(shown):
        y, x = i // columns * 29 + 1, i % columns * 29 + 1
        sheet[y : y + 28, x : x + 28] = pixels
    # A few pixels in the corners may be far larger than all others.
    most = float(shown.abs().flatten().quantile(0.995))
    width = 0.6 * columns if columns > 8 else 1.2 * columns
    height = width * sheet.shape[0] / sheet.shape[1]
    figure = _figure(max(width, 5.5) + 0.2, height + 1.05, layout=None)
    axes = _axes(figure, 0.1, 0.65, width, height)
    most = most or 1.0
    image = axes.imshow(sheet.numpy(), cmap="PuOr", interpolation="nearest", vmin=-most, vmax=most)
    axes.axis("off")
    part = "" if len(shown) == len(weight) else f", the first {len(shown)} of {len(weight):,}"
    axes.set_title(f"Weights of the first layer, neuron by neuron{part}", loc="left")
    bar = _axes(figure, 0.1, 0.45, min(width, 4), 0.12)
    figure.colorbar(image, cax=bar, orientation="horizontal", extend="both")
    bar.text(1.05, 0.5, "weight of the pixel", transform=bar.transAxes, va="center")
    return figure


def _figure(
    width: float, height: float, layout: Literal["constrained"] | None = "constrained"
) -> "Figure":
    # Not pyplot: it would choose a window system and keep every figure.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def _axes(figure: "Figure", left: float, bottom: float, width: float, height: float) -> "Axes":
    """Add axes, placed in inches."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, height / up))
