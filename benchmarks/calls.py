"""What one call costs, layer by layer, on shapes so small that the arithmetic costs nothing.

    python benchmarks/calls.py

Microseconds on one thread, the best of several turns. The floor at the end is what PyTorch's own
machinery costs without any work: no `torch.autograd.Function` can be called and differentiated in
less, nor can any op of PyTorch's.
"""

import copy
import timeit
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from provenance import describe

import mnist_ext
from mnist_ext import _autograd, functional

CALLS_PER_TURN = 5000
TURNS = 9


class Empty(torch.autograd.Function):
    """No work: a scalar that is there, and the gradient 1 that came."""

    @staticmethod
    def forward(ctx: Any, input: torch.Tensor) -> torch.Tensor:
        return input.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> torch.Tensor:
        return grad_output


def show(what: str, **implementations: Callable[[], object]) -> None:
    best = dict.fromkeys(implementations, float("inf"))
    for _ in range(TURNS):
        for name, function in implementations.items():
            seconds = timeit.timeit(function, number=CALLS_PER_TURN) / CALLS_PER_TURN
            best[name] = min(best[name], seconds * 1e6)
    cells = (f"{best[name]:8.2f}" if name in best else " " * 8 for name in ("ours", "torch"))
    print(f"{what:<52}{''.join(cells)}", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    print(describe())
    print(f"\n{'microseconds a call':<52}{'ours':>8}{'torch':>8}")

    op = torch.ops.mnist_ext
    input, target = torch.randn(2, 8), torch.tensor([0, 1])
    layer, torchs_layer = mnist_ext.nn.Linear(8, 4), torch.nn.Linear(8, 4)
    weight, bias = layer.weight, layer.bias
    detached = weight.detach(), bias.detach()
    grad_output = torch.ones(2, 4)

    show(
        "linear: op, no gradient",
        ours=lambda: op.linear.default(input, *detached, False),
        torch=lambda: F.linear(input, *detached),
    )
    show(
        "linear: function, no gradient",
        ours=lambda: functional.linear(input, *detached),
        torch=lambda: F.linear(input, *detached),
    )
    show(
        "linear: Function, with gradient",
        ours=lambda: _autograd.Linear.apply(input, weight, bias, False),
    )
    show(
        "linear: function, with gradient",
        ours=lambda: functional.linear(input, weight, bias),
        torch=lambda: F.linear(input, weight, bias),
    )
    show("linear: module", ours=lambda: layer(input), torch=lambda: torchs_layer(input))
    show(
        "linear: forward and backward",
        ours=lambda: torch.autograd.grad(
            functional.linear(input, weight, bias), (weight, bias), grad_output
        ),
        torch=lambda: torch.autograd.grad(
            F.linear(input, weight, bias), (weight, bias), grad_output
        ),
    )

    torchs_layers = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(3)])
    layers = mnist_ext.nn.swap(copy.deepcopy(torchs_layers))
    params, torchs_params = list(layers.parameters()), list(torchs_layers.parameters())
    weights, biases = params[::2], params[1::2]
    grad_outputs = torch.ones(2, 8)
    kept = [[param.detach() for param in group] for group in (weights, biases)]
    show(
        "three layers: op, no gradient",
        ours=lambda: op.mlp.default(input, *kept, [1, 1, 1], False),
    )
    show(
        "three layers: Function, with gradient",
        ours=lambda: _autograd.MLP.apply(input, [1, 1, 1], *weights, *biases),
    )
    show(
        "three layers: modules",
        ours=lambda: layers(input),
        torch=lambda: torchs_layers(input),
    )
    show(
        "three layers: forward and backward",
        ours=lambda: torch.autograd.grad(layers(input), params, grad_outputs),
        torch=lambda: torch.autograd.grad(torchs_layers(input), torchs_params, grad_outputs),
    )

    logits = torch.randn(2, 4, requires_grad=True)
    values = logits.detach()
    options = (None, -100, 0.0, 1)
    show(
        "cross_entropy: op, no gradient",
        ours=lambda: op.cross_entropy.default(values, target, *options),
        torch=lambda: F.cross_entropy(values, target),
    )
    show(
        "cross_entropy: function, no gradient",
        ours=lambda: functional.cross_entropy(values, target),
        torch=lambda: F.cross_entropy(values, target),
    )
    show(
        "cross_entropy: op, loss and gradient at once",
        ours=lambda: op.cross_entropy_with_gradient.default(values, target, *options),
    )
    show(
        "cross_entropy: Function, with gradient",
        ours=lambda: _autograd.CrossEntropy.apply(logits, target, *options),
    )
    show(
        "cross_entropy: function, with gradient",
        ours=lambda: functional.cross_entropy(logits, target),
        torch=lambda: F.cross_entropy(logits, target),
    )
    show(
        "cross_entropy: forward and backward",
        ours=lambda: torch.autograd.grad(functional.cross_entropy(logits, target), logits),
        torch=lambda: torch.autograd.grad(F.cross_entropy(logits, target), logits),
    )

    scalar = torch.ones((), requires_grad=True)
    show("floor: the gradient of a leaf", torch=lambda: torch.autograd.grad(scalar, scalar))
    show("floor: an empty Function", torch=lambda: Empty.apply(scalar))
    show(
        "floor: an empty Function, forward and backward",
        torch=lambda: torch.autograd.grad(Empty.apply(scalar), scalar),
    )
    show(
        "floor: logits.sum(), forward and backward",
        torch=lambda: torch.autograd.grad(logits.sum(), logits),
    )


if __name__ == "__main__":
    main()
