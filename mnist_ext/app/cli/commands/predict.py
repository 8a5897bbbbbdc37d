"""``mnist-ext predict``: what the model of a run sees in image files."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnist_ext.app import UserError
from mnist_ext.app.cli import streams
from mnist_ext.app.cli.commands.scoring import add_run

if TYPE_CHECKING:
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
        description="Classify image files with the model of a run. Each should show one digit on\n"
        "a plain background, dark on light or light on dark; it is cropped, scaled and centred\n"
        "as MNIST's digits were. Files that cannot be read are named, and the others are done.",
        epilog="example: mnist-ext predict runs/20261123-222716-mnist-ext seven.png photo.jpg\n\n"
        "exit codes: 0 done, 2 wrong use or bad input, also if only one of several files is bad",
    )
    add_run(parser)
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="image file; - is standard input"
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object a line and image: class, probabilities, and what the image was "
        "taken for",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Classify every file."""
    from mnist_ext.app.cli.terminal import Terminal
    from mnist_ext.app.data.images import prepare
    from mnist_ext.app.runs import trained

    model = trained.load(args.run_folder)
    terminal = Terminal.of(sys.stdout)
    failed = False
    for number, file in enumerate(args.images):
        try:
            prepared = prepare(_content(file), model.dataset)
        except UserError as error:
            failed = True
            streams.print_message(f"error: {file}: {error}")
            if args.json:
                print(json.dumps({"file": file, "error": str(error)}), flush=True)
            continue
        if prepared.notice:
            streams.print_message(f"note: {file}: {prepared.notice}")
        result = _classify(model, file, prepared)
        if args.json:
            print(json.dumps(result), flush=True)
        else:
            if number:
                print()
            print("\n".join(_lines(result, prepared, terminal)), flush=True)
    return 2 if failed else 0


def _content(file: str) -> bytes:
    if file == "-":
        if sys.stdin.isatty():
            raise UserError("standard input is a terminal: send an image, as in '< seven.png'")
        return sys.stdin.buffer.read()
    try:
        return Path(file).read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}") from error


def _classify(model: "Trained", file: str, prepared: "Prepared") -> dict[str, Any]:
    from mnist_ext.app.data.datasets import Split, class_names
    from mnist_ext.app.report.scores import logits_of, short_names

    split = Split(prepared.pixels[None], prepared.pixels.new_zeros(1).long())
    logits = logits_of(model.model, split, model.mean, model.std)
    probabilities = logits.double().softmax(dim=1)[0]
    names = short_names(class_names(model.dataset))
    best = int(probabilities.argmax())
    return {
        "file": file,
        "class": best,
        "name": names[best],
        "probability": float(probabilities[best]),
        "probabilities": dict(zip(names, probabilities.tolist(), strict=True)),
        "width": prepared.size[0],
        "height": prepared.size[1],
        "mode": prepared.mode,
        "seen_as": "dark on light" if prepared.inverted else "light on dark",
        "notice": prepared.notice,
    }


def _lines(result: dict[str, Any], prepared: "Prepared", terminal: "Terminal") -> list[str]:
    """Return the digit as the model sees it, with the probabilities beside it."""
    from mnist_ext.app.report.scores import sure

    file = "standard input" if result["file"] == "-" else streams.printable(result["file"])
    name, shares = result["name"], result["probabilities"]
    surely = f", {sure(result['probability'])} sure"
    about = f"{result['width']}x{result['height']} {result['mode']}, {result['seen_as']}"
    lines = [f"{terminal.bold(f'{file}: {name}')}{surely}", terminal.faint(about)]
    if terminal.fits(len(f"{file}: {name}{surely}  {about}")):
        lines = ["  ".join(lines)]
    picture = terminal.picture(prepared.pixels)
    if terminal.fits(prepared.pixels.shape[1] + 2 + _width(shares, _BAR_WIDTH)):
        return lines + _beside(picture, _bars(shares, terminal))
    likeliest = sorted(shares, key=shares.__getitem__, reverse=True)[:_FEW]
    return [*lines, *picture, *_bars({name: shares[name] for name in likeliest}, terminal)]


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
    """Return both side by side, without the blank lines above and below."""
    first = (len(picture) - len(bars)) // 2
    beside = [*[""] * first, *bars, *[""] * len(picture)]
    lines = [f"{a}  {b}".rstrip() for a, b in zip(picture, beside, strict=False)]
    while not lines[0]:
        del lines[0]
    while not lines[-1]:
        del lines[-1]
    return lines
