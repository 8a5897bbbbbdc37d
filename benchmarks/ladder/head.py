"""The ladder of a last layer and its loss, forward and backward, from calls that there are.

    python benchmarks/ladder/head.py [NxDxC] [--turns 5] [--markdown]

Every rung's gradients are compared with PyTorch's before anything is timed; the rungs take turns.
"MB" is what a rung has to move between memory and a core for weights, logits and their gradients,
by the formulas below: a cache that holds some of it moves less. "gain" and "in all" are as in
ladder.py.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from ladder import Markdown
from table import Table

from mnist_ext import functional
from mnist_ext.app.bench.baselines import relative_error
from mnist_ext.app.bench.machine import cpu_model
from mnist_ext.app.bench.timing import take_turns

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # input, weight, target
BLOCK_BYTES = 24 << 20  # of logits, as cpu::kBlockTraits has them


@dataclass(frozen=True)
class Rung:
    """A way to both gradients."""

    gradients: Callable[..., Tensors]
    threads: int
    weights: int  # passes over the weight or its gradient; in blocks, of each
    logits: int  # passes over all logits in memory, or their gradient


def with_autograd(loss: Callable[..., torch.Tensor]) -> Callable[..., Tensors]:
    def gradients(input, weight, target):
        input, weight = input.detach().requires_grad_(), weight.detach().requires_grad_()
        return torch.autograd.grad(loss(input, weight, target), (input, weight))

    return gradients


def pytorchs(input, weight, target):
    return F.cross_entropy(F.linear(input, weight), target)


def two_ops(input, weight, target):
    return functional.cross_entropy(functional.linear(input, weight), target)


def head_op(input, weight, target, grad_output, needs):
    arguments = input, weight, None, target, None, -100, 0.0, 1
    return torch.ops.mnist_ext.linear_cross_entropy(*arguments, grad_output, needs, needs, False)


def backward_apart(input, weight, target):
    head_op(input, weight, target, None, needs=False)
    return head_op(input, weight, target, torch.ones(()), needs=True)[1:3]


def gradient_in_forward(input, weight, target):
    return head_op(input, weight, target, None, needs=True)[1:3]


def rungs(threads: int) -> dict[str, Rung]:
    """Return the ladder, each rung by its name."""
    return {
        "pass_per_op": Rung(with_autograd(pytorchs), 1, weights=3, logits=9),
        "fused_ops": Rung(with_autograd(two_ops), 1, weights=3, logits=5),
        "rows_in_blocks": Rung(backward_apart, 1, weights=5, logits=0),
        "gradient_in_forward": Rung(gradient_in_forward, 1, weights=4, logits=0),
        "threads": Rung(gradient_in_forward, threads, weights=4, logits=0),
        "linear_cross_entropy": Rung(
            with_autograd(functional.linear_cross_entropy), threads, weights=4, logits=0
        ),
    }


def on_threads(rung: Rung, tensors: Tensors) -> Callable[[], Tensors]:
    def run() -> Tensors:
        torch.set_num_threads(rung.threads)
        return rung.gradients(*tensors)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", nargs="?", default="4096x256x10000", metavar="NxDxC")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--markdown", action="store_true", help="a table as in docs/ladder.md")
    args = parser.parse_args()
    rows, features, classes = map(int, args.shape.split("x"))
    weight = torch.randn(classes, features) / features**0.5
    tensors = torch.randn(rows, features), weight, torch.randint(0, classes, (rows,))
    logits_bytes = 4 * rows * classes
    blocks = -(-logits_bytes // BLOCK_BYTES)

    ladder = rungs(args.threads)
    implementations = {name: on_threads(rung, tensors) for name, rung in ladder.items()}
    truth = implementations["pass_per_op"]()
    for name, function in implementations.items():
        for ours, true in zip(function(), truth, strict=True):
            if not relative_error(ours, true) < 1e-4:
                raise SystemExit(f"{name} is wrong")

    print(f"{cpu_model()}, torch {torch.__version__}, {args.shape}\n")
    columns = {"rung": "<24", "threads": ">7", "ms": ">9.1f", "gain": ">6.2f", "in all": ">7.2f"}
    table = (Markdown if args.markdown else Table)(
        {**columns, "MB": ">9.0f", "GFLOP/s": ">8.0f"}, {}
    )
    table.header()
    times = take_turns(implementations, turns=args.turns)
    first = previous = next(iter(ladder))
    for name, rung in ladder.items():
        seconds = times.percentiles(name)[1]
        passes = rung.weights if rung.logits else rung.weights * blocks
        moved = passes * weight.nbytes + rung.logits * logits_bytes
        table.add(
            **{
                "rung": name,
                "threads": rung.threads,
                "ms": seconds * 1e3,
                "gain": times.ratio(previous, to=name)[1],
                "in all": times.ratio(first, to=name)[1],
                "MB": moved / 1e6,
                "GFLOP/s": 6 * rows * features * classes / seconds / 1e9,
            }
        )
        previous = name


if __name__ == "__main__":
    main()
