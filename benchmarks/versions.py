"""Times one version of mnist_ext against another: two checkouts, built in place, take turns.

    python benchmarks/versions.py OLD NEW --csv FILE

A process for each, which sleeps while the other one works; both call the public functions alone. A
ratio above 1 says that NEW takes longer. Results are compared before they are timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

TURNS = 21
SECONDS_PER_TURN = 0.02
PAUSE = 0.005  # until the threads of the other process have stopped spinning


def cases() -> dict[str, Callable[[], object]]:
    """Return what is timed, by name. Each call returns a tensor to compare, or None."""
    import torch
    from torch import nn

    import mnist_ext
    from mnist_ext import functional

    made: dict[str, Callable[[], object]] = {}
    dtypes = [torch.float32, torch.float64, torch.bfloat16]

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape).to(dtype)

    def backward(value: torch.Tensor, leaves: list[torch.Tensor]) -> torch.Tensor:
        return torch.autograd.grad(value, leaves, torch.ones_like(value))[-1]

    shapes = [(1, 784, 128), (16, 784, 128), (64, 784, 128), (64, 64, 10), (1024, 784, 128)]
    shapes += [(256, 1024, 1024), (4096, 64, 64)]
    for (m, k, n), dtype in itertools.product(shapes, dtypes):
        name = f"{m}x{k}x{n} {str(dtype).removeprefix('torch.')}"
        x, w, b = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype) / k**0.5, randn(n, dtype=dtype)
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        made[f"linear {name}"] = lambda x=x, w=w, b=b: functional.linear(x, w, b, activation="relu")
        made[f"linear, backward {name}"] = lambda leaves=leaves: backward(
            functional.linear(*leaves, activation="relu"), leaves
        )
    for (n, c), dtype in itertools.product(
        [(64, 10), (4096, 10), (512, 1000), (64, 32000)], dtypes
    ):
        name = f"{n}x{c} {str(dtype).removeprefix('torch.')}"
        logits, target = randn(n, c, dtype=dtype).requires_grad_(), torch.randint(c, (n,))
        detached = logits.detach()
        made[f"cross_entropy {name}"] = lambda x=detached, t=target: functional.cross_entropy(x, t)
        made[f"cross_entropy, backward {name}"] = lambda x=logits, t=target: backward(
            functional.cross_entropy(x, t, label_smoothing=0.1), [x]
        )
    images, labels = randn(8, 21, 64, 64).requires_grad_(), torch.randint(21, (8, 64, 64))
    made["cross_entropy, backward 8x21x64x64 float32"] = lambda: backward(
        functional.cross_entropy(images, labels), [images]
    )

    def model() -> nn.Sequential:
        layers = [nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)]
        return nn.Sequential(*layers)

    for batch, momentum in itertools.product([1, 16, 64, 256, 1024], [0.0, 0.9]):
        x, y = randn(batch, 784), torch.randint(10, (batch,))
        swapped = mnist_ext.nn.swap(model())
        criterion = mnist_ext.nn.CrossEntropyLoss()
        sgd = mnist_ext.optim.SGD(swapped.parameters(), lr=1e-3, momentum=momentum)

        def loop(net=swapped, criterion=criterion, sgd=sgd, x=x, y=y) -> None:
            sgd.zero_grad()
            criterion(net(x), y).backward()
            sgd.step()

        trained = model()
        step = mnist_ext.TrainStep(
            trained, nn.CrossEntropyLoss(), torch.optim.SGD(trained.parameters(), 1e-3, momentum)
        )
        name = f"batch {batch}, momentum {momentum}"
        made[f"swapped step, {name}"] = loop
        made[f"TrainStep, {name}"] = lambda step=step, x=x, y=y: step(x, y) and None
    pixels = torch.randint(256, (6400, 784), dtype=torch.uint8)
    labels_of_all, trained = torch.randint(10, (6400,)), model()
    step = mnist_ext.TrainStep(
        trained,
        nn.CrossEntropyLoss(),
        torch.optim.SGD(trained.parameters(), 1e-3),
        normalize=(0.13, 0.31),
    )
    made["TrainStep.epoch, 100 steps of 64"] = lambda: (
        step.epoch(pixels, labels_of_all, batch_size=64) and None
    )
    return made


def serve() -> None:
    """Time cases as they are asked for, a line each: name and number of calls."""
    import torch

    torch.manual_seed(0)
    made = cases()
    print(json.dumps(list(made)), flush=True)
    for line in sys.stdin:
        name, calls = json.loads(line)
        if calls == 0:
            result = made[name]()
            values = result.double().flatten()[:1000].tolist() if torch.is_tensor(result) else None
            print(json.dumps(values), flush=True)
            continue
        started = time.perf_counter()
        for _ in range(calls):
            made[name]()
        print(json.dumps((time.perf_counter() - started) / calls), flush=True)


class Version:
    """A process that times the cases with the package of one checkout."""

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout.resolve()
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            env={**os.environ, "PYTHONPATH": str(self.checkout)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.names = self._answer()

    def _answer(self):
        return json.loads(self._process.stdout.readline())

    def ask(self, name: str, calls: int):
        """Return the seconds per call, or for 0 calls the values that a call returns."""
        time.sleep(PAUSE)
        self._process.stdin.write(json.dumps([name, calls]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def commit(self) -> str:
        command = ["git", "-C", str(self.checkout), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path, nargs="?")
    parser.add_argument("new", type=Path, nargs="?")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--csv", type=Path, help="write the rows to this file")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve()

    from provenance import describe, fields
    from table import Table

    from mnist_ext.app.bench.timing import percentiles

    old, new = Version(args.old), Version(args.new)
    print(f"{describe()}\nold: {old.commit()}, new: {new.commit()}\n")
    columns = {"case": "<46", "old_us": ">9.1f", "new_us": ">9.1f", "ratio": ">6.3f"}
    columns |= {"p20": ">6.3f", "p80": ">6.3f"}
    table = Table(columns, {**fields(), "old": old.commit(), "new": new.commit()})
    table.header()
    for name in (n for n in new.names if args.only in n):
        values = [version.ask(name, 0) for version in (old, new)]
        if values[0] != values[1]:
            worst = max(abs(a - b) for a, b in zip(*values, strict=True))
            assert worst < 0.05 * max(1, *map(abs, values[0])), f"{name}: results differ by {worst}"
        calls = max(1, round(SECONDS_PER_TURN / max(old.ask(name, 3), 1e-7)))
        times: dict[Version, list[float]] = {old: [], new: []}
        for turn in range(TURNS):
            for version in (old, new) if turn % 2 == 0 else (new, old):
                times[version].append(version.ask(name, calls))
        p20, ratio, p80 = percentiles(b / a for a, b in zip(*times.values(), strict=True))
        medians = (1e6 * statistics.median(t) for t in times.values())
        row = dict(zip(columns, (name, *medians, ratio, p20, p80), strict=True))
        table.add(**row)
    if args.csv:
        table.write(args.csv)


if __name__ == "__main__":
    main()
