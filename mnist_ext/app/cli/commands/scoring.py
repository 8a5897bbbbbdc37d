"""What ``eval`` and ``report`` have in common: a run, its model, and what that scores."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from mnist_ext.app import UserError
from mnist_ext.app.cli.options import path, whole_path
from mnist_ext.app.cli.streams import print_message
from mnist_ext.app.data import DATASETS

if TYPE_CHECKING:
    from mnist_ext.app.data.datasets import Dataset
    from mnist_ext.app.report.scores import Scores
    from mnist_ext.app.runs.trained import Trained


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the argument that says which run."""
    parser.add_argument(
        "run_folder", type=path, metavar="RUN", help="folder that 'train' has written"
    )


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which images to score a model on."""
    parser.add_argument(
        "--dataset",
        choices=DATASETS[1:],
        help="whose test set to take (default: that of the run's data set)",
    )
    parser.add_argument(
        "--data-dir",
        type=whole_path,
        metavar="DIR",
        help="folder that holds MNIST/raw, or MNIST's files themselves, or to download to "
        "(default: that of the run, then $MNIST_EXT_DATA, then the user's cache folder)",
    )


def score(args: argparse.Namespace) -> tuple["Trained", "Dataset", "Scores"]:
    """Load the run and the data set, and score the model on the test set.

    Raises:
        UserError: one of them cannot be loaded.
    """
    from mnist_ext.app.data import datasets
    from mnist_ext.app.report.scores import Scores, logits_of
    from mnist_ext.app.runs import trained
    from mnist_ext.app.training.trainer import at_chance

    model = trained.load(args.run_folder)
    name = args.dataset or model.dataset
    if name not in DATASETS[1:]:
        raise UserError(f"the run was trained on {name!r}, which is unknown here: use --dataset")
    dataset = datasets.load(name, args.data_dir or _folder_of_the_run(args.run_folder))
    logits = logits_of(model.model, dataset.test, model.mean, model.std)
    scores = Scores(logits, dataset.test.labels)
    how = trained.divergence(args.run_folder)
    if how is None and not math.isfinite(scores.loss):
        how = f"the loss is {scores.loss}"
    note = at_chance(scores.accuracy, dataset.test)
    if how is not None:
        note = f"the training diverged: {how}; this is the model of epoch {model.epoch}"
    if note is not None:
        print_message(f"note: {note}")
    return model, dataset, scores


def _folder_of_the_run(run: str) -> str | None:
    """Return the folder that the run's settings name for its data, if it is still there."""
    from mnist_ext.app.runs import trained

    try:
        folder = trained.load_record(run).config["settings"].get("data_dir")
    except UserError:
        return None  # the model alone was kept
    return folder if isinstance(folder, str) and Path(folder).is_dir() else None
