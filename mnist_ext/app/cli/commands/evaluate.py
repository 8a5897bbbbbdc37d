"""``mnist-ext eval``: how good the model of a run is, class by class."""

import argparse
import json
import sys
from typing import TYPE_CHECKING

from mnist_ext.app.cli.commands.scoring import add_data_options, add_run, score
from mnist_ext.app.cli.options import number
from mnist_ext.app.cli.streams import print_message, printable

if TYPE_CHECKING:
    from mnist_ext.app.cli.terminal import Terminal
    from mnist_ext.app.report.scores import Scores


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "eval",
        help="score the model of a run on a test set",
        description="Score the model of a run on a test set: accuracy with its standard error\n"
        "sqrt(p (1 - p) / n), loss, precision and recall of each class, confusion matrix.",
        epilog="example: mnist-ext eval runs/20261123-222716-mnist-ext --plots\n\n"
        "exit codes: 0 done, 1 below --target-accuracy, 2 wrong use or bad input",
    )
    add_run(parser)
    add_data_options(parser)
    parser.add_argument(
        "--plots",
        action="store_true",
        help="write pictures into the run's folder: curves.png, confusion.png, mistakes.png, "
        "weights.png; needs matplotlib: pip install 'mnist-ext[plots]'",
    )
    parser.add_argument(
        "--target-accuracy",
        type=number(0, 100),
        metavar="PERCENT",
        help="exit with code 1 when the accuracy is below this (default: none)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object; shares are in percent"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Score, print and draw."""
    from mnist_ext.app.cli.terminal import Terminal
    from mnist_ext.app.report import plots
    from mnist_ext.app.report.scores import short_names
    from mnist_ext.app.runs import trained

    if args.plots:
        plots.require()
        epochs = trained.load_record(args.run_folder).epochs
    model, dataset, scores = score(args)
    names = short_names(dataset.class_names)
    pictures = []
    if args.plots:
        pictures = plots.draw(model.path, model, epochs, scores, dataset.test.images, names)
    if args.json:
        report = {
            "run": str(model.path),
            "epoch": model.epoch,
            "trained_on": model.dataset,
            "dataset": dataset.name,
            **scores.summary(names),
            "pictures": [str(path) for path in pictures],
        }
        print(json.dumps(report))
    else:
        widths = "-".join(map(str, (784, *model.hidden, 10)))
        print(
            f"model      {widths}, activation {model.activation}, trained on "
            f"{printable(model.dataset)}, epoch {model.epoch}\n"
            f"test set   {dataset.name}: {len(scores):,} images from {printable(dataset.source)}\n"
            f"accuracy   {scores.accuracy:.2f} %, standard error {scores.standard_error:.2f}, "
            f"{len(scores) - scores.right:,} wrong\n"
            f"loss       {scores.loss:.4f}\n"
        )
        terminal = Terminal.of(sys.stdout)
        print("\n".join(_class_table(scores, names)) + "\n")
        print("\n".join(_confusion_table(scores, names, terminal)))
        for path in pictures:
            print(f"written to {printable(str(path))}")
    if args.target_accuracy is not None and scores.accuracy < args.target_accuracy:
        print_message(
            f"error: accuracy {scores.accuracy:.2f} % is below the target of "
            f"{args.target_accuracy:g} %"
        )
        return 1
    return 0


def _class_table(scores: "Scores", names: tuple[str, ...]) -> list[str]:
    from mnist_ext.app.cli.terminal import table

    columns = zip(names, scores.support, scores.precision, scores.recall, strict=True)
    rows = [[name, f"{n:,}", _percent(p), _percent(r)] for name, n, p, r in columns]
    return table([["class", "images", "precision", "recall"], *rows])


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.2f} %"


def _confusion_table(scores: "Scores", names: tuple[str, ...], terminal: "Terminal") -> list[str]:
    """Rows: what it is; columns: what it was taken for, by number where the names are long."""
    from mnist_ext.app.cli.terminal import table

    heads = list(names)
    if max(map(len, names)) > 2:
        names = tuple(f"{i} {name}" for i, name in enumerate(names))
        heads = [str(i) for i in range(len(names))]
    counts = [
        [f"{count:,}" if count else "." for count in row] for row in scores.confusion.tolist()
    ]

    def style(row: int, column: int, text: str) -> str:
        if row == 0 or column == 0 or text.strip() == ".":
            return terminal.faint(text) if text.strip() == "." else text
        return text if row == column else terminal.bold(text)

    rows = [["is \\ taken for", *heads]]
    rows += [[name, *cells] for name, cells in zip(names, counts, strict=True)]
    return table(rows, style)
