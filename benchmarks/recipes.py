"""What a recipe reaches on MNIST: each seed, their mean, and the time.

python benchmarks/recipes.py best|augmented|tutorial [--impl ext] [--seeds 0 1 2] [--data-dir DIR]
                             [--hold-out 10000] [--set NAME=VALUE,VALUE ...]

The recipes' settings were chosen with --hold-out: the last images of the training set are not
trained on, and stand in for the test set. --set tries each combination of the values.
"""

import argparse
import itertools
import statistics
import time
from dataclasses import replace

import torch
from provenance import describe

from mnist_ext.app.data import datasets
from mnist_ext.app.training import settings
from mnist_ext.app.training.trainer import Trainer, build


def held_out(dataset: datasets.Dataset, count: int) -> datasets.Dataset:
    """Return the data set with the last images of its training set as its test set."""
    images, labels = dataset.train.images, dataset.train.labels
    return replace(
        dataset,
        train=datasets.Split(images[:-count], labels[:-count]),
        test=datasets.Split(images[-count:], labels[-count:]),
    )


def values_of(text: str) -> list[tuple[str, object]]:
    """Return the name of a setting with each of its values, of NAME=VALUE,VALUE."""
    name, _, values = text.partition("=")
    default = getattr(settings.TrainConfig, name)
    if isinstance(default, tuple):  # hidden=1024:512,512:256
        return [(name, tuple(map(int, value.split(":")))) for value in values.split(",")]
    if isinstance(default, bool):
        return [(name, value == "true") for value in values.split(",")]
    return [(name, type(default)(value)) for value in values.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", choices=settings.RECIPES)
    parser.add_argument("--impl", choices=settings.IMPLEMENTATIONS, default="ext")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data-dir", help="folder that holds MNIST/raw")
    parser.add_argument("--hold-out", type=int, default=0, metavar="N")
    parser.add_argument("--set", type=values_of, nargs="+", default=[], metavar="NAME=VALUE,VALUE")
    args = parser.parse_args()

    print(describe())
    dataset = datasets.load("mnist", args.data_dir)
    if args.hold_out:
        dataset = held_out(dataset, args.hold_out)
    print(f"trained on {len(dataset.train):,} images, judged by {len(dataset.test):,} others")
    for chosen in itertools.product(*args.set):
        accuracies = []
        for seed in args.seeds:
            values = {**settings.RECIPES[args.recipe], **dict(chosen)}
            config = settings.TrainConfig(impl=args.impl, seed=seed, **values)
            started = time.perf_counter()
            trainer = Trainer(*build(config, torch.device("cpu")), config, dataset)
            *_, last = (trainer.train_epoch() for _ in range(config.epochs))
            accuracies.append(last.test_accuracy)
            print(
                f"seed {seed}: {last.test_accuracy:.2f} % after {last.epoch} epochs, "
                f"{time.perf_counter() - started:.1f} s with evaluation",
                flush=True,
            )
        name = " ".join(f"{name}={value}" for name, value in chosen)
        mean = statistics.mean(accuracies)
        print(f"{args.recipe} {name}: mean of {len(accuracies)} seeds {mean:.2f} %", flush=True)


if __name__ == "__main__":
    main()
