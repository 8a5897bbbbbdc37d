"""What ``mnist-ext train`` prints: lines and a bar for a person, or JSON for a program."""

import json
import math
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from mnist_ext.app.cli.streams import print_message, printable
from mnist_ext.app.cli.terminal import columns
from mnist_ext.app.report.texts import loss_text
from mnist_ext.app.training.trainer import EpochMetrics, StepMetrics

# Seconds between two looks at the loss for the bar: each makes a GPU wait.
_BAR_INTERVAL = 0.1
_BAR = "{desc} {percentage:3.0f}%|{bar}| {remaining} left"
_BAR_WITH_RATE = "{desc} {percentage:3.0f}%|{bar}| {rate_fmt}, {remaining} left"
# What a narrow bar keeps: " 100%|", ten characters of bar, "| 00:00 left".
_LEAST_BAR = 28
_RATE = len("99.9k images/s, ")


class Output:
    """Prints nothing; what the other kinds of output have in common.

    Used as a context manager, it leaves no bar behind.
    """

    def __enter__(self) -> "Output":
        """Return the output itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove the bar, if any."""

    def start(self, facts: dict[str, str], details: dict[str, Any]) -> None:
        """Show what begins: ``facts`` in words, ``details`` as values."""

    def steps(self, images: int, loss: Tensor, rows: list[StepMetrics]) -> None:
        """Show that so many more images have been trained on; see ``training.Observer``."""

    def epoch(self, metrics: EpochMetrics) -> None:
        """Show what an epoch achieved."""

    def stopped(self, epoch: int, path: Path | None, command: str | None) -> None:
        """Show that the run was interrupted, and how to go on."""

    def end(self, metrics: EpochMetrics, path: Path | None) -> None:
        """Show that the run is complete."""

    def finished(self, text: str) -> None:
        """Show that the run was complete before, and how to train on."""

    def note(self, text: str) -> None:
        """Print what is worth knowing on standard error, if this kind of output prints at all."""
        if type(self) is not Output:
            self.print_message(f"note: {text}")

    def print_message(self, text: str) -> None:
        """Print what must be known, an error above all, on standard error."""
        print_message(text)


class Lines(Output):
    """Lines on standard output, and a bar on standard error where that is a terminal."""

    def __init__(self, epochs: int, images_per_epoch: int, images_done: int) -> None:
        self._epochs, self._images_per_epoch = epochs, images_per_epoch
        self._epoch_width = len(str(epochs))
        self._accuracy, self._loss = "", ""
        self._pending, self._looked = 0, 0.0
        self._images_done = images_done
        self._bar: Any = None

    def __enter__(self) -> "Output":
        """Show the bar."""
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=self._epochs * self._images_per_epoch,
                initial=self._images_done,
                unit=" images",
                unit_scale=True,
                leave=False,
                delay=1e-9,  # not before it has its text
            )
            self._move()
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove the bar, if any."""
        if self._bar is not None:
            self._bar.close()

    def start(self, facts: dict[str, str], details: dict[str, Any]) -> None:
        """Print a line for each fact."""
        lines = (printable(f"{name:<10} {fact}") for name, fact in facts.items())
        self._print("\n".join(self._wrapped(line, indent=11) for line in lines))

    def steps(self, images: int, loss: Tensor, rows: list[StepMetrics]) -> None:
        """Move the bar."""
        self._pending += images
        now = time.monotonic()
        if self._bar is None or now - self._looked < _BAR_INTERVAL:
            return
        self._looked = now
        self._loss = f"loss {loss_text(loss.item())}"
        self._move()

    def epoch(self, metrics: EpochMetrics) -> None:
        """Print a line."""
        self._accuracy = f"accuracy {metrics.test_accuracy:.2f} %"
        if self._bar is not None:
            self._move()
        parts = (
            f"loss {loss_text(metrics.train_loss)}, test {loss_text(metrics.test_loss)}",
            f"accuracy {metrics.test_accuracy:6.2f} %",
            f"{metrics.samples_per_second:7,.0f} images/s",
        )
        start = f"epoch {metrics.epoch:{self._epoch_width}}/{self._epochs}"
        # A part stays whole where the line wraps.
        line = "  ".join([start, *(part.replace(" ", "\0") for part in parts)])
        self._print(self._wrapped(line, indent=len(start) + 2).replace("\0", " "))

    def end(self, metrics: EpochMetrics, path: Path | None) -> None:
        """Say where the run is."""
        self._print(
            "dry run: nothing is written" if path is None else f"written to {printable(str(path))}"
        )

    def finished(self, text: str) -> None:
        """Print it."""
        self._print(printable(text))

    def print_message(self, text: str) -> None:
        """Print it, not on the bar's line."""
        with self._without_bar():
            super().print_message(text)

    def _move(self) -> None:
        self._bar.n += self._pending
        self._pending = 0
        epoch = min(self._bar.n // self._images_per_epoch + 1, self._epochs)
        # Where it is narrow, text gives way before the bar, its percentage and the time left.
        self._bar.ncols = columns(sys.stderr)
        room = (self._bar.ncols or sys.maxsize) - _LEAST_BAR
        text = f"epoch {epoch:{self._epoch_width}}/{self._epochs}"
        for part in (self._loss, self._accuracy):
            if part and len(f"{text}  {part}") <= room:
                text += f"  {part}"
        self._bar.bar_format = _BAR_WITH_RATE if len(text) + _RATE <= room else _BAR
        self._bar.set_description_str(text)

    def _wrapped(self, line: str, indent: int) -> str:
        """Return a line as lines that fit the terminal, the others indented."""
        width = columns(sys.stdout)
        if width is None or len(line) <= width:
            return line
        return textwrap.fill(
            line,
            max(width, indent + 1),
            subsequent_indent=" " * indent,
            break_long_words=False,  # a path
            break_on_hyphens=False,
        )

    def _print(self, text: str) -> None:
        # The bar is on the same terminal, as a rule.
        with self._without_bar():
            print(text, flush=True)

    @contextmanager
    def _without_bar(self) -> Iterator[None]:
        if self._bar is not None:
            self._bar.clear()
        yield
        if self._bar is not None:
            self._bar.refresh()


class Json(Output):
    """One JSON object a line on standard output."""

    def start(self, facts: dict[str, str], details: dict[str, Any]) -> None:
        """Print the details."""
        self._print("start", details)

    def steps(self, images: int, loss: Tensor, rows: list[StepMetrics]) -> None:
        """Print the steps to be logged."""
        for row in rows:
            self._print("step", asdict(row))

    def epoch(self, metrics: EpochMetrics) -> None:
        """Print the metrics."""
        self._print("epoch", asdict(metrics))

    def stopped(self, epoch: int, path: Path | None, command: str | None) -> None:
        """Print how to go on."""
        self._print(
            "stopped",
            {"epoch": epoch, "run": None if path is None else str(path), "resume": command},
        )

    def end(self, metrics: EpochMetrics, path: Path | None) -> None:
        """Print where the run is, and its last metrics."""
        self._print("end", {"run": None if path is None else str(path), **asdict(metrics)})

    def _print(self, event: str, values: dict[str, Any]) -> None:
        # JSON has neither NaN nor infinity.
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        print(json.dumps({"event": event, **finite}), flush=True)
