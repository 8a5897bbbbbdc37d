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
from collections.abc import Callable

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
    """Item by item what torchvision's MNIST does: a PIL image, then the transforms."""

    def __init__(self, split: data.Split, mean: float, std: float):
        self.images = split.images
        self.labels = split.labels
        self.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize((mean,), (std,))]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        image = Image.fromarray(self.images[index].numpy())
        return self.transform(image), int(self.labels[index])


def tutorial_epoch(model, criterion, optimizer, train_loader, test_loader) -> float:
    for images, labels in train_loader:
        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
    correct = 0
    with torch.inference_mode():
        for images, labels in test_loader:
            correct += (model(images).argmax(1) == labels).sum().item()
    return 100 * correct / len(test_loader.dataset)


def time_epoch(dataset: data.Dataset) -> None:
    config = training.TrainConfig(epochs=EPOCHS)
    cpu = torch.device("cpu")
    results: dict[str, list[float]] = {"tutorial": [], "eager": [], "mnist_ext": []}
    accuracy = {}

    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr)
    loaders = [
        DataLoader(
            TutorialDataset(split, dataset.mean, dataset.std),
            batch_size=batch_size,
            shuffle=shuffle,
        )
        for split, batch_size, shuffle in (
            (dataset.train, config.batch_size, True),
            (dataset.test, 1000, False),
        )
    ]
    runs = {
        name: training.train(*training.build(training.TrainConfig(impl=impl), cpu), config, dataset)
        for name, impl in (("eager", "torch"), ("mnist_ext", "ext"))
    }
    for _ in range(config.epochs):
        started = time.perf_counter()
        accuracy["tutorial"] = tutorial_epoch(model, nn.CrossEntropyLoss(), optimizer, *loaders)
        results["tutorial"].append(time.perf_counter() - started)
        for name, run in runs.items():
            metrics = next(run)
            results[name].append(metrics.seconds)
            accuracy[name] = metrics.test_accuracy
    if max(accuracy.values()) - min(accuracy.values()) > 5:
        raise SystemExit(f"the contestants do not learn the same: {accuracy}")

    ours = results["mnist_ext"]
    for name, label in (
        ("tutorial", "torchvision transforms, DataLoader, eager ops"),
        ("eager", "mnist-ext train --impl torch: our data path, eager ops"),
        ("mnist_ext", "mnist-ext train"),
    ):
        ratio = statistics.median(t / o for t, o in zip(results[name], ours, strict=True))
        print(
            f"{label:<56}{statistics.median(results[name]):8.2f} s  {ratio:6.2f}x the time of ours"
        )


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
