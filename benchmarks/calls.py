"""What one call costs, layer by layer, on shapes so small that the arithmetic costs nothing.

    python benchmarks/calls.py

Each row is the best of several turns, ours and PyTorch's in turns, in microseconds on one thread.
"""

import timeit
from collections.abc import Callable

import torch
import torch.nn.functional as F
from provenance import describe

import mnist_ext
from mnist_ext import functional

CALLS_PER_TURN = 5000
TURNS = 9


def compare(what: str, ours: Callable[[], object], torchs: Callable[[], object]) -> None:
    best = [float("inf"), float("inf")]
    for _ in range(TURNS):
        for i, function in enumerate((ours, torchs)):
            seconds = timeit.timeit(function, number=CALLS_PER_TURN) / CALLS_PER_TURN
            best[i] = min(best[i], seconds * 1e6)
    print(f"{what:<44}{best[0]:8.2f}{best[1]:8.2f}")


def main() -> None:
    torch.set_num_threads(1)
    print(describe())
    print(f"\n{'microseconds a call':<44}{'ours':>8}{'torch':>8}")

    op = torch.ops.mnist_ext
    input, target = torch.randn(2, 8), torch.tensor([0, 1])
    layer, torchs_layer = mnist_ext.nn.Linear(8, 4), torch.nn.Linear(8, 4)
    weight, bias = layer.weight, layer.bias
    detached = weight.detach(), bias.detach()
    grad_output = torch.ones(2, 4)
    logits = torch.randn(2, 4, requires_grad=True)

    compare(
        "linear: the op, no gradient",
        lambda: op.linear.default(input, *detached, False),
        lambda: F.linear(input, *detached),
    )
    compare(
        "linear: function, with gradient",
        lambda: functional.linear(input, weight, bias),
        lambda: F.linear(input, weight, bias),
    )
    compare("linear: module", lambda: layer(input), lambda: torchs_layer(input))
    compare(
        "linear: forward and backward",
        lambda: torch.autograd.grad(
            functional.linear(input, weight, bias), (weight, bias), grad_output
        ),
        lambda: torch.autograd.grad(F.linear(input, weight, bias), (weight, bias), grad_output),
    )
    compare(
        "cross_entropy: function, with gradient",
        lambda: functional.cross_entropy(logits, target),
        lambda: F.cross_entropy(logits, target),
    )
    compare(
        "cross_entropy: forward and backward",
        lambda: torch.autograd.grad(functional.cross_entropy(logits, target), logits),
        lambda: torch.autograd.grad(F.cross_entropy(logits, target), logits),
    )


if __name__ == "__main__":
    main()
