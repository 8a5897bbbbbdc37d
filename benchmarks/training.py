"""What the fused ops buy in training: the step of the ordinary loop, and a whole epoch.

    python benchmarks/training.py [--batch-size 1 64 1024] [--data-dir DIR]

Step: zero_grad, forward, criterion, backward, step of the 784-128-64-10 model on batches that lie
ready in memory; PyTorch eager against the same model after `mnist_ext.nn.swap`. Both start from the
same weights and see the same batches; their losses are compared before anything is timed. They run
in turns, so that a change of the machine's speed meets both; each turn gives one ratio.

Epoch: the tutorial's way (torchvision transforms in a DataLoader, eager ops) against
`mnist-ext train`, each with its evaluation of the test set, on MNIST, or on the embedded digits
where MNIST is not to be had.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from PIL import Image
from provenance import describe
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms

from mnist_ext import data, training
from mnist_ext.models import mlp
from mnist_ext.nn import swap

ROUNDS = 25
SECONDS_PER_TURN = 0.04
EPOCHS = 5


class Loop:
    """The ordinary training loop over batches in memory."""

    def __init__(self, model: nn.Module, criterion: nn.Module, images, labels):
        self.model, self.criterion = model, criterion
        self.batches = list(zip(images, labels, strict=True))
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def run(self, steps: int) -> list[torch.Tensor]:
        losses = []
        for step in range(steps):
            images, labels = self.batches[step % len(self.batches)]
            self.optimizer.zero_grad()
            loss = self.criterion(self.model(images), labels)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.detach())
        return losses


def seconds(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def percentiles(values: list[float]) -> tuple[float, float, float]:
    cuts = statistics.quantiles(values, n=10)
    return cuts[1], statistics.median(values), cuts[7]


def time_step(batch_size: int, activation: str) -> None:
    torch.manual_seed(0)
    model = mlp(activation=activation)
    number = max(2, min(64, 16384 // batch_size))
    images = torch.randn(number, batch_size, 1, 28, 28)
    labels = torch.randint(0, 10, (number, batch_size))
    eager = Loop(copy.deepcopy(model), nn.CrossEntropyLoss(), images, labels)
    fused = Loop(swap(model), swap(nn.CrossEntropyLoss()), images, labels)
    torch.testing.assert_close(fused.run(30), eager.run(30), rtol=1e-4, atol=1e-5)

    steps = max(1, round(SECONDS_PER_TURN / (seconds(lambda: eager.run(20)) / 20)))
    times: dict[str, list[float]] = {"eager": [], "mnist_ext": []}
    for turn in range(ROUNDS):
        contestants = [("eager", eager), ("mnist_ext", fused)]
        for name, loop in contestants if turn % 2 == 0 else reversed(contestants):
            times[name].append(seconds(lambda loop=loop: loop.run(steps)) / steps * 1e6)
    ratios = [e / f for e, f in zip(times["eager"], times["mnist_ext"], strict=True)]
    low, median, high = percentiles(ratios)
    for name, values in times.items():
        p20, p50, p80 = percentiles(values)
        row = f"{batch_size:>6}  {activation:<10}  {name:<10}  {p50:8.0f}  {p20:6.0f}..{p80:<6.0f}"
        print(row + (f"  {median:.2f}x ({low:.2f}..{high:.2f})" if name == "mnist_ext" else ""))


class TutorialDataset(torch.utils.data.Dataset):
    """Item by item what torchvision's MNIST does: a PIL image, then the transforms.

    Without `pil` the transforms get the pixels as an array, which spares them the image.
    """

    def __init__(self, split: data.Split, mean: float, std: float, pil: bool):
        self.images = split.images.numpy()
        self.labels = split.labels
        self.pil = pil
        self.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize((mean,), (std,))]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        image = self.images[index]
        return self.transform(Image.fromarray(image) if self.pil else image), int(
            self.labels[index]
        )


def tutorial_epochs(
    config: training.TrainConfig, dataset: data.Dataset, pil: bool
) -> Iterator[tuple[float, float]]:
    """Train as the tutorial does; yield the seconds and the test accuracy of each epoch."""
    torch.manual_seed(config.seed)
    model, criterion = mlp(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr)
    train_set, test_set = (
        TutorialDataset(split, dataset.mean, dataset.std, pil)
        for split in (dataset.train, dataset.test)
    )
    train_loader = DataLoader(train_set, batch_size=config.batch_size, shuffle=True)
    test_loader = DataLoader(test_set, batch_size=1000)
    while True:
        started = time.perf_counter()
        for images, labels in train_loader:
            optimizer.zero_grad()
            loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
        correct = 0
        with torch.inference_mode():
            for images, labels in test_loader:
                correct += (model(images).argmax(1) == labels).sum().item()
        yield time.perf_counter() - started, 100 * correct / len(test_set)


def package_epochs(
    config: training.TrainConfig, dataset: data.Dataset
) -> Iterator[tuple[float, float]]:
    """Train as `mnist-ext train` does; yield the seconds and the test accuracy of each epoch."""
    model, criterion = training.build(config, torch.device("cpu"))
    for metrics in training.train(model, criterion, config, dataset):
        yield metrics.seconds, metrics.test_accuracy


def time_epoch(dataset: data.Dataset) -> None:
    config = training.TrainConfig(epochs=EPOCHS)
    ours = "mnist-ext train"
    contestants = {
        "torchvision's MNIST, DataLoader, eager ops": tutorial_epochs(config, dataset, pil=True),
        "the same without its PIL images": tutorial_epochs(config, dataset, pil=False),
        "mnist-ext train --impl torch: eager ops, our data": package_epochs(
            replace(config, impl="torch"), dataset
        ),
        ours: package_epochs(config, dataset),
    }
    epochs = [{name: next(run) for name, run in contestants.items()} for _ in range(EPOCHS)]
    accuracies = {name: accuracy for name, (_, accuracy) in epochs[-1].items()}
    if max(accuracies.values()) - min(accuracies.values()) > 5:
        raise SystemExit(f"the contestants do not learn the same: {accuracies}")
    for name in contestants:
        median = statistics.median(epoch[name][0] for epoch in epochs)
        ratio = statistics.median(epoch[name][0] / epoch[ours][0] for epoch in epochs)
        print(f"{name:<50}{median:8.2f} s  {ratio:6.2f}x the time of ours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 16, 64, 256, 1024, 4096])
    parser.add_argument("--data-dir", help="folder that holds MNIST/raw")
    args = parser.parse_args()

    print(describe())
    print("\nOne step of the ordinary loop, 784-128-64-10, SGD; microseconds, speed-up per turn")
    print(
        f"{'batch':>6}  {'activation':<10}  {'ops':<10}  {'median':>8}  {'p20..p80':<14}  speed-up"
    )
    for batch_size in args.batch_size:
        for activation in ("relu", "none"):
            time_step(batch_size, activation)

    dataset = data.load("auto", args.data_dir)
    if dataset.notice:
        print(f"\nnote: {dataset.notice}")
    print(
        f"\nOne epoch with evaluation, {dataset.name}, batch 64; seconds, median of {EPOCHS} epochs"
    )
    time_epoch(dataset)


if __name__ == "__main__":
    main()
