"""What the recipe `best` reaches on MNIST: three seeds, their mean, and the time.

python benchmarks/accuracy.py [--impl ext] [--seeds 0 1 2] [--data-dir DIR]
"""

import argparse
import statistics
import time

import torch
from provenance import describe

from mnist_ext.app.data import datasets
from mnist_ext.app.training import settings
from mnist_ext.app.training.trainer import Trainer, build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--impl", choices=settings.IMPLEMENTATIONS, default="ext")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data-dir", help="folder that holds MNIST/raw")
    args = parser.parse_args()

    print(describe())
    dataset = datasets.load("mnist", args.data_dir)
    accuracies = []
    for seed in args.seeds:
        config = settings.TrainConfig(impl=args.impl, seed=seed, **settings.RECIPES["best"])
        started = time.perf_counter()
        trainer = Trainer(*build(config, torch.device("cpu")), config, dataset)
        *_, last = (trainer.train_epoch() for _ in range(config.epochs))
        accuracies.append(last.test_accuracy)
        print(
            f"seed {seed}: {last.test_accuracy:.2f} % after {last.epoch} epochs, "
            f"{time.perf_counter() - started:.1f} s with evaluation",
            flush=True,
        )
    print(f"mean of {len(accuracies)} seeds: {statistics.mean(accuracies):.2f} %")


if __name__ == "__main__":
    main()
