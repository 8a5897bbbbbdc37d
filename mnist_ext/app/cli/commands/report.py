"""``mnist-ext report``: a run as one HTML page."""

import argparse
from pathlib import Path

from mnist_ext.app.cli.commands.scoring import add_data_options, add_run, score
from mnist_ext.app.cli.streams import printable
from mnist_ext.app.files.writing import write_output


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "report",
        help="write a run as one HTML page",
        description="Write settings, curves, confusion matrix, mistakes and environment of a run\n"
        "as one HTML page that needs no other file and no network,\n"
        "with a square to draw a digit in.",
        epilog="example: mnist-ext report runs/20261123-222716-mnist-ext\n\n"
        "exit codes: 0 done, 2 wrong use or bad input",
    )
    add_run(parser)
    add_data_options(parser)
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="where to write it; - is standard output (default: report.html in RUN)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Score the model and write the page."""
    from mnist_ext.app.report.page import page
    from mnist_ext.app.runs import trained

    record = trained.load_record(args.run_folder)
    model, dataset, scores = score(args)
    path = model.path / "report.html" if args.output is None else Path(args.output)
    content = page(model, record, dataset, scores).encode(errors="backslashreplace")
    if write_output(path, content, hint="; use --output"):
        print(f"written to {printable(str(path))}")
    return 0
