"""What the fused ops buy in training: the step of the ordinary loop, and a whole epoch.

    python benchmarks/training.py [--batch-size 1 64 1024] [--activation relu] [--no-epoch]
                                  [--data-dir DIR] [--csv FILE]

Step: zero_grad, forward, criterion, backward, step of the 784-128-64-10 model on batches that lie
ready in memory. Implementations: PyTorch eager; the same with model and loss under torch.compile,
also with max-autotune; JAX, a whole run of steps jit-compiled with lax.scan, its fastest form; the
model after `mnist_ext.nn.swap`, with `mnist_ext.optim.SGD`; and `mnist_ext.TrainStep`, one native
call per step, or with `epoch` one for many. All start from the same weights and see the same
batches; their losses are compared before anything is timed. They take turns; each turn gives one
ratio to the swapped model and one to TrainStep. The share of the limit: the step's arithmetic
against that of PyTorch's product of two 1024x1024 matrices, in the same turns. core_ns: how far
apart two cores were before these turns (in the CSV core_ns_after: and after them), see cores.py:
small steps on two threads are slower where that is 170 instead of 30.

Parts: where the time of a step goes, in eager and in ours; and in our kernels alone, called as ops
without modules, autograd and optimizer around them. Kernels: all of these together on one thread
against all threads, which is what "ratio" compares there.

Epoch: the tutorial's way (torchvision transforms in a DataLoader, eager ops) against
`mnist-ext train`, each with its evaluation of the test set, on MNIST, or on the embedded digits
where MNIST is not to be had.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import jax_peers
import torch
from cores import Cores
from PIL import Image
from provenance import describe, fields
from table import Table
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms

import mnist_ext
from mnist_ext.app.bench.baselines import LEARNING_RATE, OneCall, loop, step_arithmetic
from mnist_ext.app.bench.timing import percentiles, seconds, take_turns
from mnist_ext.app.data import datasets
from mnist_ext.app.training.models import mlp
from mnist_ext.app.training.settings import TrainConfig
from mnist_ext.app.training.trainer import Trainer, build
from mnist_ext.nn import swap

TURNS = 25
SECONDS_PER_TURN = 0.04
EPOCHS = 5

STEP_COLUMNS = {
    "batch": ">6",
    "activation": "<10",
    "implementation": "<20",
    "part": "<10",
    "us": ">9.1f",
    "p20": ">9.1f",
    "p80": ">9.1f",
    "ratio": ">7.2f",
    "ratio_p20": ">9.2f",
    "ratio_p80": ">9.2f",
    "to_one_call": ">11.2f",
    "of_limit": ">8.0%",
    "core_ns": ">7.0f",
}


class MatrixProduct:
    """What PyTorch reaches on matrices large enough: the limit."""

    side = 1024

    def __init__(self) -> None:
        self.a, self.b = torch.randn(2, self.side, self.side)

    def run(self, steps: int) -> None:
        torch.mm(self.a, self.b)


def time_step(table: Table, cores: Cores, batch_size: int, activation: str) -> None:
    torch.manual_seed(0)
    model = mlp(activation=activation)
    number = max(2, min(64, 16384 // batch_size))
    images = torch.randn(number, batch_size, 1, 28, 28)
    labels = torch.randint(0, 10, (number, batch_size))

    implementations = {
        "torch": loop(model, images, labels, ours=False),
        "torch.compile": loop(model, images, labels, ours=False, compiled={}),
        "compile max-autotune": loop(
            model, images, labels, ours=False, compiled={"mode": "max-autotune"}
        ),
        **jax_peers.training(model, images, labels, LEARNING_RATE),
        "ours": loop(model, images, labels, ours=True),
        "ours TrainStep": OneCall(model, images, labels, epoch=False),
        "ours epoch": OneCall(model, images, labels, epoch=True),
        "matrix product": MatrixProduct(),
    }
    expected = torch.tensor(implementations["torch"].run(30))
    for name, implementation in implementations.items():
        if name in ("torch", "matrix product"):
            continue
        found = torch.tensor([float(loss) for loss in implementation.run(30)])
        right = expected
        if name == "ours epoch":
            right = torch.stack([losses.mean() for losses in expected.split(len(images))])
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-4, msg=name)

    per_step = seconds(lambda: implementations["torch"].run(20), 1) / 20
    steps = max(1, round(SECONDS_PER_TURN / per_step))
    runs = {name: lambda c=c: c.run(steps) for name, c in implementations.items()}
    before = cores.nanoseconds()
    times = take_turns(runs, TURNS, seconds_per_turn=0)  # one call is a turn's worth
    after = cores.nanoseconds()
    products = steps * step_arithmetic(batch_size) / (2 * MatrixProduct.side**3)
    for name in implementations:
        if name == "matrix product":
            continue
        low, middle, high = (value / steps * 1e6 for value in times.percentiles(name))
        ratio = times.ratio(name, "ours")
        table.add(
            batch=batch_size,
            activation=activation,
            implementation=name,
            part="step",
            us=middle,
            p20=low,
            p80=high,
            ratio=ratio[1],
            ratio_p20=ratio[0],
            ratio_p80=ratio[2],
            to_one_call=times.ratio(name, "ours TrainStep")[1],
            of_limit=products * times.ratio("matrix product", name)[1],
            core_ns=before,
            core_ns_after=after,
        )


Part = tuple[str, Callable[[], None]]


def loop_parts(swapped: bool, batch_size: int, activation: str) -> list[Part]:
    """Return the parts of a step of the ordinary loop."""
    torch.manual_seed(0)
    model, criterion = mlp(activation=activation), nn.CrossEntropyLoss()
    if swapped:
        model, criterion = swap(model), swap(criterion)
    sgd = mnist_ext.optim.SGD if swapped else torch.optim.SGD
    optimizer = sgd(model.parameters(), lr=LEARNING_RATE)
    images, labels = torch.randn(batch_size, 1, 28, 28), torch.randint(0, 10, (batch_size,))
    results: dict[str, torch.Tensor] = {}

    def forward() -> None:
        results["logits"] = model(images)

    def loss() -> None:
        results["loss"] = criterion(results["logits"], labels)

    return [
        ("zero_grad", optimizer.zero_grad),
        ("forward", forward),
        ("loss", loss),
        ("backward", lambda: results["loss"].backward()),
        ("optimizer", optimizer.step),
    ]


def kernel_parts(batch_size: int, activation: str) -> list[Part]:
    """Return the same step as ops, without autograd and without the calls around them."""
    op = torch.ops.mnist_ext
    torch.manual_seed(0)
    layers = [m for m in mlp(activation=activation).modules() if isinstance(m, nn.Linear)]
    params = [p.detach() for m in layers for p in (m.weight, m.bias)]
    weights, biases = params[::2], params[1::2]
    images, labels = torch.randn(batch_size, 784), torch.randint(0, 10, (batch_size,))
    relu = [activation == "relu"] * (len(layers) - 1) + [False]
    values: list[torch.Tensor] = [images]
    grads: list[torch.Tensor] = []

    def forward() -> None:
        del values[1:]
        for weight, bias, activated in zip(weights, biases, relu, strict=True):
            values.append(op.linear.default(values[-1], weight, bias, activated))

    def loss() -> None:
        grads[:] = op.cross_entropy_with_gradient.default(values[-1], labels, None, -100, 0.0, 1)[
            1:
        ]

    def backward() -> None:
        grad = grads.pop()
        for i in reversed(range(len(layers))):
            output = values[i + 1] if relu[i] else None
            weight = weights[i] if i > 0 else None
            grad, *of_layer = op.linear_backward.default(grad, values[i], weight, output, True)
            grads[:0] = of_layer

    def step() -> None:
        op.sgd_step.default(params, grads, [], LEARNING_RATE, 0.0, 0.0, 0.0, False, False, False)

    return [("forward", forward), ("loss", loss), ("backward", backward), ("optimizer", step)]


def time_parts(table: Table, batch_size: int, activation: str) -> None:
    implementations = {
        "torch": loop_parts(False, batch_size, activation),
        "ours": loop_parts(True, batch_size, activation),
        "our kernels alone": kernel_parts(batch_size, activation),
    }
    clock = time.perf_counter
    seconds_of: dict[tuple[str, str], list[float]] = {}
    steps = max(5, round(SECONDS_PER_TURN / 5e-4 / max(1, batch_size / 64)))
    for turn in range(-1, TURNS):  # the first one warms
        for name, parts in implementations.items():
            sums = dict.fromkeys([part for part, _ in parts], 0.0)
            for _ in range(steps):
                started = clock()
                for part, function in parts:
                    function()
                    ended = clock()
                    sums[part] += ended - started
                    started = ended
            for part, total in sums.items():
                if turn >= 0:
                    seconds_of.setdefault((name, part), []).append(total / steps)
    for (name, part), turns in seconds_of.items():
        low, middle, high = (value * 1e6 for value in percentiles(turns))
        table.add(
            batch=batch_size,
            activation=activation,
            implementation=name,
            part=part,
            us=middle,
            p20=low,
            p80=high,
        )


def time_threads(table: Table, batch_size: int, activation: str) -> None:
    threads = torch.get_num_threads()
    if threads == 1:
        return
    parts = kernel_parts(batch_size, activation)

    def on_threads(number: int) -> Callable[[], None]:
        def run() -> None:
            torch.set_num_threads(number)
            for _, function in parts:
                function()

        return run

    all_threads = f"kernels, {threads} threads"
    runs = {"kernels, 1 thread": on_threads(1), all_threads: on_threads(threads)}
    times = take_turns(runs, TURNS)
    torch.set_num_threads(threads)
    for name in runs:
        low, middle, high = (value * 1e6 for value in times.percentiles(name))
        ratio = times.ratio(name, all_threads)
        table.add(
            batch=batch_size,
            activation=activation,
            implementation=name,
            part="kernels",
            us=middle,
            p20=low,
            p80=high,
            ratio=ratio[1],
            ratio_p20=ratio[0],
            ratio_p80=ratio[2],
        )


class TutorialDataset(torch.utils.data.Dataset):
    """Item by item what torchvision's MNIST does: a PIL image, then the transforms.

    Without `pil` the transforms get the pixels as an array, which spares them the image.
    """

    def __init__(self, split: datasets.Split, mean: float, std: float, pil: bool):
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
    config: TrainConfig, dataset: datasets.Dataset, pil: bool
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


def package_epochs(config: TrainConfig, dataset: datasets.Dataset) -> Iterator[tuple[float, float]]:
    """Train as `mnist-ext train` does; yield the seconds and the test accuracy of each epoch."""
    model, criterion = build(config, torch.device("cpu"))
    trainer = Trainer(model, criterion, config, dataset)
    while (metrics := trainer.train_epoch()) is not None:
        yield metrics.seconds, metrics.test_accuracy


def time_epoch(dataset: datasets.Dataset) -> None:
    config = TrainConfig(epochs=EPOCHS)
    ours = "mnist-ext train"
    implementations = {
        "torchvision's MNIST, DataLoader, eager ops": tutorial_epochs(config, dataset, pil=True),
        "the same without its PIL images": tutorial_epochs(config, dataset, pil=False),
        "mnist-ext train --impl torch: eager ops, our data": package_epochs(
            replace(config, impl="torch"), dataset
        ),
        ours: package_epochs(config, dataset),
    }
    epochs = [{name: next(run) for name, run in implementations.items()} for _ in range(EPOCHS)]
    accuracies = {name: accuracy for name, (_, accuracy) in epochs[-1].items()}
    if max(accuracies.values()) - min(accuracies.values()) > 5:
        raise SystemExit(f"the implementations do not learn the same: {accuracies}")
    for name in implementations:
        median = statistics.median(epoch[name][0] for epoch in epochs)
        ratio = statistics.median(epoch[name][0] / epoch[ours][0] for epoch in epochs)
        print(f"{name:<50}{median:8.2f} s  {ratio:6.2f}x the time of ours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 16, 64, 256, 1024, 4096])
    parser.add_argument("--activation", nargs="+", default=["relu", "none"])
    parser.add_argument("--no-epoch", action="store_true", help="only the steps")
    parser.add_argument("--data-dir", help="folder that holds MNIST/raw")
    parser.add_argument("--csv", type=Path, help="write the rows of the steps to this file")
    args = parser.parse_args()

    print(describe())
    print(jax_peers.notice())
    print(
        "\nOne step of the ordinary loop, 784-128-64-10, SGD; microseconds; "
        "ratio: how many times as long as ours"
    )
    table = Table(STEP_COLUMNS, fields())
    table.header()
    cores = Cores()
    for batch_size in args.batch_size:
        for activation in args.activation:
            time_step(table, cores, batch_size, activation)
            time_parts(table, batch_size, activation)
            time_threads(table, batch_size, activation)
    if args.csv:
        table.write(args.csv)
    if args.no_epoch:
        return

    dataset = datasets.load("auto", args.data_dir)
    if dataset.notice:
        print(f"\nnote: {dataset.notice}")
    print(
        f"\nOne epoch with evaluation, {dataset.name}, batch 64; seconds, median of {EPOCHS} epochs"
    )
    time_epoch(dataset)


if __name__ == "__main__":
    main()
