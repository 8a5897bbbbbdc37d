"""What ``mnist-ext train`` prints: lines and a bar for a person, or JSON for a program."""

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from mnist_ext.app.cli.streams import print_message, printable
from mnist_ext.app.training.trainer import EpochMetrics, StepMetrics

# Seconds between two looks at the loss for the bar: each makes a GPU wait.
_BAR_INTERVAL = 0.1
_BAR = "{desc} {percentage:3.0f}%|{bar}| {rate_fmt}, {remaining} left"


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
                dynamic_ncols=True,
                bar_format=_BAR,
            )
            self._move()
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove the bar, if any."""
        if self._bar is not None:
            self._bar.close()

    def start(self, facts: dict[str, str], details: dict[str, Any]) -> None:
        """Print a line for each fact."""
        self._print(*(f"{name:<10} {fact}" for name, fact in facts.items()))

    def steps(self, images: int, loss: Tensor, rows: list[StepMetrics]) -> None:
        """Move the bar."""
        self._pending += images
        now = time.monotonic()
        if self._bar is None or now - self._looked < _BAR_INTERVAL:
            return
        self._looked = now
        self._loss = f"  loss {loss.item():.4f}"
        self._move()

    def epoch(self, metrics: EpochMetrics) -> None:
        """Print a line."""
        self._accuracy = f"  accuracy {metrics.test_accuracy:.2f} %"
        if self._bar is not None:
            self._move()
        self._print(
            f"epoch {metrics.epoch}/{self._epochs}"
            f"  train loss {metrics.train_loss:.4f}"
            f"  test loss {metrics.test_loss:.4f}"
            f"  test accuracy {metrics.test_accuracy:.2f} %"
            f"  {metrics.samples_per_second:,.0f} images/s"
        )

    def end(self, metrics: EpochMetrics, path: Path | None) -> None:
        """Say where the run is."""
        self._print("dry run: nothing is written" if path is None else f"written to {path}")

    def finished(self, text: str) -> None:
        """Print it."""
        self._print(text)

    def print_message(self, text: str) -> None:
        """Print it, not on the bar's line."""
        with self._without_bar():
            super().print_message(text)

    def _move(self) -> None:
        self._bar.n += self._pending
        self._pending = 0
        epoch = min(self._bar.n // self._images_per_epoch + 1, self._epochs)
        text = f"epoch {epoch}/{self._epochs}{self._loss}{self._accuracy}"
        self._bar.set_description_str(text)

    def _print(self, *lines: str) -> None:
        # The bar is on the same terminal, as a rule.
        with self._without_bar():
            print("\n".join(map(printable, lines)), flush=True)

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
