"""Tables, bars and small pictures as text, in what the terminal can show."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TextIO

from torch import Tensor

_ASCII_SHADES = " .:-=+*#%@"
_HALVES = " ▀▄█"  # whether the upper half is full, plus twice whether the lower one is
_EIGHTHS = " ▏▎▍▌▋▊▉"
_FULL = 96  # the level from which a half block is full
_RESET = "\x1b[0m"


@dataclass(frozen=True)
class Terminal:
    """What a stream can show.

    Attributes:
        color: it obeys escape sequences.
        blocks: it has the block characters of Unicode; else plain ASCII is written.
        columns: how wide it is; None where that is nobody's concern, as in a file.
    """

    color: bool
    blocks: bool
    columns: int | None = None

    @classmethod
    def of(cls, stream: TextIO) -> "Terminal":
        """Say what ``stream`` can show.

        Colour only on a terminal, never where ``NO_COLOR`` is set (https://no-color.org) or
        ``TERM`` is ``dumb``.
        """
        color = (
            stream.isatty()
            and not os.environ.get("NO_COLOR")
            and os.environ.get("TERM", "dumb") != "dumb"
        )
        try:
            (_HALVES + _EIGHTHS).encode(stream.encoding or "ascii")
            blocks = True
        except (UnicodeEncodeError, LookupError):
            blocks = False
        return cls(color, blocks, columns(stream))

    def fits(self, width: int) -> bool:
        """Return whether a line of ``width`` characters does not wrap."""
        return self.columns is None or width <= self.columns

    def bold(self, text: str) -> str:
        """Return ``text`` in bold, where the terminal can."""
        return f"\x1b[1m{text}{_RESET}" if self.color else text

    def faint(self, text: str) -> str:
        """Return ``text`` less bright, where the terminal can."""
        return f"\x1b[2m{text}{_RESET}" if self.color else text

    def bar(self, share: float, width: int) -> str:
        """Return a bar of up to ``width`` characters, padded to it; ``share`` is from 0 to 1."""
        if not self.blocks:
            return ("#" * round(share * width)).ljust(width)
        eighths = round(share * width * 8)
        return ("█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()).ljust(width)

    def picture(self, pixels: Tensor) -> list[str]:
        """Draw an image, two rows of pixels in a line, as high as wide on most terminals.

        Args:
            pixels: uint8 [height, width] of an even height; 0 is black.
        """
        pairs = zip(pixels[0::2].tolist(), pixels[1::2].tolist(), strict=True)
        line = _shaded_line
        if self.blocks:
            line = _colored_line if self.color else _halved_line
        return [line(upper, lower) for upper, lower in pairs]


def columns(stream: TextIO) -> int | None:
    """Return the width of a terminal, or ``COLUMNS`` where that is set; None for other streams."""
    with suppress(KeyError, ValueError):
        return int(os.environ["COLUMNS"]) or None
    with suppress(OSError):
        return os.get_terminal_size(stream.fileno()).columns or None
    return None


def _shaded_line(upper: Sequence[int], lower: Sequence[int]) -> str:
    most = len(_ASCII_SHADES) - 1
    sums = (a + b for a, b in zip(upper, lower, strict=True))
    return "".join(_ASCII_SHADES[round(s / 510 * most)] for s in sums)


def _halved_line(upper: Sequence[int], lower: Sequence[int]) -> str:
    pairs = zip(upper, lower, strict=True)
    return "".join(_HALVES[(a >= _FULL) + 2 * (b >= _FULL)] for a, b in pairs)


def _colored_line(upper: Sequence[int], lower: Sequence[int]) -> str:
    parts, last = [], None
    for pair in zip(map(_gray, upper), map(_gray, lower), strict=True):
        if pair != last:
            parts.append(f"\x1b[38;5;{pair[0]};48;5;{pair[1]}m")
            last = pair
        parts.append("▀")
    return "".join(parts) + _RESET


def _gray(level: int) -> int:
    """Return the number, among 256 colours, of a grey: black, 24 steps, white."""
    step = round(level / 255 * 25)
    return 16 if step == 0 else 231 if step == 25 else 231 + step


def table(
    rows: Sequence[Sequence[str]],
    style: Callable[[int, int, str], str] = lambda row, column, text: text,
) -> list[str]:
    """Align cells, the first column to the left, the others to the right, under a header.

    Args:
        rows: equally many cells each; the first row is the header.
        style: returns what to print for the aligned text of a cell, given its row and column.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            style(i, j, cell.rjust(width) if j else cell.ljust(width))
            for j, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for i, row in enumerate(rows)
    ]
    lines.insert(1, "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return lines
