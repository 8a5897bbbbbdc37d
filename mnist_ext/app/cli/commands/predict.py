"""``mnist-ext predict``: what the model of a run sees in image files."""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist_ext.app import UserError
from mnist_ext.app.cli import streams
from mnist_ext.app.cli.commands.scoring import add_run

if TYPE_CHECKING:
    from torch import Tensor

    from mnist_ext.app.cli.terminal import Terminal
    from mnist_ext.app.data.images import Prepared
    from mnist_ext.app.runs.trained import Trained

_BAR_WIDTH = 24
# Classes named where there is no room for the bars beside the picture.
_FEW = 3


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "predict",
        help="classify image files with the model of a run",
        description="Classify image files with the model of a run: scans, or photos of a page, of\n"
        "one digit or of several side by side, dark on light or light on dark. Each digit is\n"
        "cropped, scaled and centred as MNIST's were. Files that cannot be read are named, and\n"
        "the others are done.",
        epilog="example: mnist-ext predict runs/20261123-222716-mnist-ext seven.png photo.jpg\n\n"
        "exit codes: 0 done; 1 no digit found in one of the files; 2 wrong use or bad input, also\n"
        "if only one of several files is bad",
    )
    add_run(parser)
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="image file; - is standard input"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object a line and image: the number, class, probabilities and box of "
        "each digit, and what the image was taken for",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Classify every file."""
    from mnist_ext.app.cli.terminal import Terminal
    from mnist_ext.app.data.images import NothingFoundError, prepare
    from mnist_ext.app.runs import trained

    model = trained.load(args.run_folder)
    terminal = Terminal.of(sys.stdout)
    code = 0
    for number, file in enumerate(args.images):
        try:
            prepared = prepare(_content(file), model.dataset)
        except UserError as error:
            code = max(code, 1 if isinstance(error, NothingFoundError) else 2)
            streams.print_message(f"error: {file}: {error}")
            if args.json:
                print(json.dumps({"file": file, "error": str(error)}), flush=True)
            continue
        if prepared.notice:
            streams.print_message(f"note: {file}: {prepared.notice}")
        result = _result(file, classify(model, prepared), prepared)
        if args.json:
            print(json.dumps(result), flush=True)
        else:
            if number:
                print()
            print("\n".join(_lines(result, prepared, terminal)), flush=True)
    return code


def _content(file: str) -> bytes:
    if file == "-":
        if sys.stdin.isatty():
            raise UserError("standard input is a terminal: send an image, as in '< seven.png'")
        return sys.stdin.buffer.read()
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}") from error


def classify(model: "Trained", prepared: "Prepared") -> list[dict[str, Any]]:
    """Return what the model says of each digit: class, name, probability, probabilities, box.

    Probabilities are means over the digit and four copies of it, moved by a pixel: of scans of
    MNIST's digits, which are not placed quite as MNIST's are, 99.0 instead of 98.3 % are right.
    """
    import torch
    from torch.nn import functional as F

    from mnist_ext.app.data.datasets import Split, class_names
    from mnist_ext.app.report.scores import logits_of, short_names

    count, height, width = prepared.pixels.shape
    padded = F.pad(prepared.pixels, (1, 1, 1, 1))
    corners = (1, 1), (0, 1), (2, 1), (1, 0), (1, 2)
    moved = torch.cat([padded[:, y : y + height, x : x + width] for y, x in corners])
    split = Split(moved, moved.new_zeros(len(moved)).long())
    logits = logits_of(model.model, split, model.mean, model.std).double()
    means = logits.softmax(dim=1).view(len(corners), count, -1).mean(dim=0)
    names = short_names(class_names(model.dataset))
    digits = []
    for probabilities, box in zip(means, prepared.boxes, strict=True):
        best = int(probabilities.argmax())
        digits.append(
            {
                "class": best,
                "name": names[best],
                "probability": float(probabilities[best]),
                "probabilities": dict(zip(names, probabilities.tolist(), strict=True)),
                "box": box,
            }
        )
    return digits


def _result(file: str, digits: list[dict[str, Any]], prepared: "Prepared") -> dict[str, Any]:
    return {
        "file": file,
        "number": "".join(digit["name"] for digit in digits),
        "digits": digits,
        # Of a single one, which is the usual case, directly.
        **(digits[0] if len(digits) == 1 else {}),
        "width": prepared.size[0],
        "height": prepared.size[1],
        "mode": prepared.mode,
        "seen_as": "dark on light" if prepared.inverted else "light on dark",
        "notice": prepared.notice,
    }


def _lines(result: dict[str, Any], prepared: "Prepared", terminal: "Terminal") -> list[str]:
    """Return each digit as the model sees it, with its probabilities."""
    from mnist_ext.app.report.scores import sure

    file = "standard input" if result["file"] == "-" else streams.printable(result["file"])
    digits = result["digits"]
    # The number is right if every digit is.
    surely = f", {sure(math.prod(digit['probability'] for digit in digits))} sure"
    number = result["number"]
    about = f"{result['width']}x{result['height']} {result['mode']}, {result['seen_as']}"
    lines = [f"{terminal.bold(f'{file}: {number}')}{surely}", terminal.faint(about)]
    if terminal.fits(len(f"{file}: {number}{surely}  {about}")):
        lines = ["  ".join(lines)]
    for digit, pixels in zip(digits, prepared.pixels, strict=True):
        if len(digits) > 1:
            lines.append(terminal.bold(digit["name"]) + f", {sure(digit['probability'])} sure")
        lines += _digit_lines(digit["probabilities"], pixels, terminal)
    return lines


def _digit_lines(shares: dict[str, float], pixels: "Tensor", terminal: "Terminal") -> list[str]:
    """Return the picture with the bars beside it; where that is too wide, a few bars below it."""
    picture = terminal.picture(pixels)
    if terminal.fits(pixels.shape[1] + 2 + _width(shares, _BAR_WIDTH)):
        return _beside(picture, _bars(shares, terminal))
    likeliest = sorted(shares, key=shares.__getitem__, reverse=True)[:_FEW]
    few = {name: shares[name] for name in likeliest}
    return [*_trimmed([line.rstrip() for line in picture]), *_bars(few, terminal)]


def _width(shares: dict[str, float], bar: int) -> int:
    """Return how long the lines of ``_bars`` are."""
    return max(map(len, shares)) + len("   100.0 %") + bar


def _bars(shares: dict[str, float], terminal: "Terminal") -> list[str]:
    """Return a line for each class, the likeliest in bold."""
    name_width = max(map(len, shares))
    bar_width = _BAR_WIDTH
    while bar_width > 1 and not terminal.fits(_width(shares, bar_width)):
        bar_width -= 1
    lines = []
    for name, share in shares.items():
        text = f"{name:<{name_width}}  {terminal.bar(share, bar_width)} {100 * share:5.1f} %"
        lines.append(terminal.bold(text) if share == max(shares.values()) else text)
    return lines


def _beside(picture: list[str], bars: list[str]) -> list[str]:
    first = (len(picture) - len(bars)) // 2
    padded = [*[""] * first, *bars, *[""] * len(picture)]
    return _trimmed([f"{a}  {b}".rstrip() for a, b in zip(picture, padded, strict=False)])


def _trimmed(lines: list[str]) -> list[str]:
    """Return the lines without blank ones at either end."""
    shown = [i for i, line in enumerate(lines) if line]
    return lines[shown[0] : shown[-1] + 1]
