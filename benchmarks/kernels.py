"""Each kernel by itself, against PyTorch eager, torch.compile and JAX on the same work.

    python benchmarks/kernels.py [linear] [autograd] [cross_entropy] [head] [sgd]
                                 [--dtype float32] [--isa avx2 avx512] [--cold] [--quick]
                                 [--heads NxDxC ...] [--against NAME ...] [--turns N] [--csv FILE]

linear: forward, grad_input, grad_weight + grad_bias, called as ops on a grid of shapes, on the
instruction sets asked for. autograd: forward + backward of a layer as a model calls it, of square
layers on as many rows too.
cross_entropy: forward, and forward + backward through autograd; "ours as op" is the same kernel
without autograd and Python around it, "copy" a copy of the logits into new memory. head:
linear_cross_entropy, forward + backward; "chunked" is PyTorch's own with options, "ours, two ops"
our linear and cross_entropy, "products" the three products alone. sgd: one optimizer step.

Every implementation's result is compared with PyTorch eager's before anything is timed; a peer that
is wrong is left out, and named. Times are medians in microseconds; "ratio" is how many times as
long an implementation takes as ours, the median of the ratio of each turn, with its 20th and 80th
percentile. "rate" counts the FLOP of a product, or the bytes that must be read and written at
least; "limit" is its share of what this machine reached in the same run: FLOP/s of a large product
of PyTorch's, bytes/s of a large copy. "error": of a result with gradients, the root mean square of
what the gradients are off from float64's, as a share of theirs; the largest of them.

--cold: every call gets other tensors, as many in turns as no cache can hold.

To compare on AVX2 alone, hold PyTorch to it as well:
MNIST_EXT_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2
"""

import argparse
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax_peers
import torch
import torch.nn.functional as F
from provenance import describe, fields
from table import Table

import mnist_ext
from mnist_ext import _C, functional
from mnist_ext.app.bench.baselines import linear_products, relative_error
from mnist_ext.app.bench.machine import copy_bandwidth, matrix_peak
from mnist_ext.app.bench.timing import TURNS, take_turns

LAYERS = [(784, 128), (128, 64), (64, 10), (512, 512), (1024, 1024), (4096, 1024), (789, 333)]
ROWS = [1, 8, 64, 256, 1024, 4096]
MNIST_LAYERS = LAYERS[:3]
SQUARES = [32, 64, 128, 256, 512, 1024, 2048]
# Rows, features, classes; whose logits take 4 GB at most.
HEADS = [
    (64, 64, 10),
    (8192, 64, 1000),
    (4096, 256, 10000),
    (2048, 768, 50257),
    *(
        (rows, features, classes)
        for classes in (1000, 10000, 32000, 50257, 128256)
        for features in (64, 256, 768, 2048)
        for rows in (512, 4096)
        if rows * classes < 2**28
    ),
]
LOGITS = [(64, 10), (4096, 10), (4096, 1000), (2048, 32000), (512, 128256)]

# More than the caches hold.
COLD_BYTES = 256 * 2**20

COLUMNS = {
    "what": "<32",
    "shape": "<16",
    "dtype": "<8",
    "implementation": "<24",
    "us": ">10.1f",
    "p20": ">10.1f",
    "p80": ">10.1f",
    "ratio": ">7.2f",
    "ratio_p20": ">9.2f",
    "ratio_p80": ">9.2f",
    "rate": ">8.1f",
    "unit": "<8",
    "limit": ">6.2f",
    "error": ">8.1e",
}


def as_tensors(result) -> list[torch.Tensor]:
    """Return one result or several, of PyTorch or JAX, as a list."""
    parts = result if isinstance(result, (tuple, list)) else [result]
    return [torch.as_tensor(part) for part in parts]


def is_right(name: str, result, expected, dtype: torch.dtype) -> bool:
    """Compare, before the timing, what an implementation computes. Ours must be right."""
    tolerance = {torch.float32: 1e-3, torch.float64: 1e-9}.get(dtype, 5e-2)
    for found, true in zip(as_tensors(result), as_tensors(expected), strict=True):
        error = relative_error(found, true)
        if not error <= tolerance:
            message = f"{name} is wrong: relative error {error:.3g}"
            if "ours" in name:
                raise SystemExit(message)
            print(f"left out: {message}")
            return False
    return True


def only_right(
    what: str, implementations: dict[str, Callable[[], object]], expected, dtype: torch.dtype
) -> dict[str, Callable[[], object]]:
    """Return those implementations whose result is that of PyTorch eager."""
    return {
        name: function
        for name, function in implementations.items()
        if is_right(f"{what} of {name}", function(), expected, dtype)
    }


@dataclass(frozen=True)
class Work:
    """What a call does at least, and the most of it that this machine does in a second."""

    amount: float
    per_second: float
    unit: str  # of a billion of it in a second

    def rate(self, seconds: float) -> dict[str, object]:
        return {
            "rate": self.amount / seconds / 1e9,
            "unit": self.unit,
            "limit": self.amount / seconds / self.per_second,
        }


def error_of(result, truth) -> float:
    """Return the largest root mean square error of the tensors, as a share of the true one's."""
    pairs = zip(as_tensors(result), as_tensors(truth), strict=True)
    return max(((t.double() - true).norm() / true.norm()).item() for t, true in pairs)


def compare(
    table: Table,
    implementations: dict[str, Callable[[], object]],
    best: str,
    work: Work | None = None,
    truth: object = None,
    **row: object,
) -> None:
    """Time the implementations and add their rows; ratios are to `best`, the time of ours.

    truth: all that the implementations return, in float64.
    """
    errors = {}
    if truth is not None:
        results = {name: function() for name, function in implementations.items() if name != "copy"}
        errors = {name: error_of(result, truth) for name, result in results.items()}
        del results
    # As in a training loop, where one call soon follows another: the memory of a large result comes
    # back as it was left. (A virtual machine hands it to its host after a while, and gets it back
    # slowly.)
    times = take_turns(implementations, turns=table.turns, untimed=1)
    for name in implementations:
        low, middle, high = times.percentiles(name)
        ratio = times.ratio(name, best)
        table.add(
            **row,
            implementation=name,
            us=middle * 1e6,
            p20=low * 1e6,
            p80=high * 1e6,
            ratio=ratio[1],
            ratio_p20=ratio[0],
            ratio_p80=ratio[2],
            **(work.rate(middle) if work else {}),
            error=errors.get(name),
        )


def in_turns(function: Callable, arguments: Sequence[tuple]) -> Callable[[], object]:
    """Return a function of no arguments that calls function with each tuple of them in turn."""
    if len(arguments) == 1:
        return partial(function, *arguments[0])
    turns = itertools.cycle(arguments)
    return lambda: function(*next(turns))


def copies(tensors: tuple[torch.Tensor, ...], cold: bool) -> list[tuple[torch.Tensor, ...]]:
    """Return the tensors once, or so many copies of them that no cache holds them all."""
    size = sum(t.nbytes for t in tensors)
    number = max(2, math.ceil(COLD_BYTES / size)) if cold else 1
    return [tensors, *(tuple(t.clone() for t in tensors) for _ in range(number - 1))]


def on_isa(isa: str, function: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        _C.set_isa(isa)
        return function()

    return run


def linear_ops(table: Table, dtype: torch.dtype, grid, isas: list[str], cold: bool) -> None:
    """Time the three products of a layer as ops: no autograd, no Python around them."""
    peak = matrix_peak(dtype)
    print(f"\nlinear as ops; a large matrix product reaches {peak / 1e9:.0f} GFLOP/s")
    table.header()
    for rows, (k, n) in grid:
        for what, (ours, torchs, tensors) in linear_products(rows, k, n, dtype).items():
            arguments = copies(tensors, cold)
            implementations = {"torch": in_turns(torchs, arguments)}
            for isa in isas:
                implementations[f"ours {isa}"] = on_isa(isa, in_turns(ours, arguments))
            implementations = only_right(what, implementations, torchs(*tensors), dtype)
            compare(
                table,
                implementations,
                best=f"ours {isas[-1]}",
                work=Work(2 * rows * k * n, peak, "GFLOP/s"),
                what=f"linear {what}" + (", cold" if cold else ""),
                shape=f"{rows}x{k}x{n}",
                dtype=name_of(dtype),
            )
    _C.set_isa(_C.available_isas()[-1])


def linear_autograd(table: Table, dtype: torch.dtype, shapes) -> None:
    """Time forward and backward of layers as a model calls them; all three gradients."""
    peak = matrix_peak(dtype)
    print(
        f"\nlinear, forward + backward through autograd; a large product: {peak / 1e9:.0f} GFLOP/s"
    )
    table.header()
    for rows, k, n in shapes:
        ours = mnist_ext.nn.Linear(k, n, dtype=dtype)
        torchs = torch.nn.Linear(k, n, dtype=dtype)
        torchs.load_state_dict(ours.state_dict())
        input = torch.randn(rows, k, dtype=dtype, requires_grad=True)
        grad = torch.randn(rows, n, dtype=dtype)
        torch._dynamo.reset()
        compiled = torch.compile(torchs)
        tuned = torch.compile(torchs, mode="max-autotune")

        def run(layer, parameters, x=input, g=grad):
            return torch.autograd.grad(layer(x), [x, *parameters], g)

        implementations: dict[str, Callable[[], object]] = {
            "torch": partial(run, torchs, list(torchs.parameters())),
            "torch.compile": partial(run, compiled, list(torchs.parameters())),
            "compile max-autotune": partial(run, tuned, list(torchs.parameters())),
            "ours": partial(run, ours, list(ours.parameters())),
            **jax_peers.linear(input, *torchs.parameters(), grad),
        }
        expected = implementations["torch"]()
        implementations = only_right("linear forward + backward", implementations, expected, dtype)
        exact = grad.double(), input.detach().double(), torchs.weight.detach().double()
        compare(
            table,
            implementations,
            best="ours",
            work=Work(6 * rows * k * n, peak, "GFLOP/s"),
            truth=(exact[0] @ exact[2], exact[0].T @ exact[1], exact[0].sum(0)),
            what="linear forward + backward",
            shape=f"{rows}x{k}x{n}",
            dtype=name_of(dtype),
        )


def with_gradient(loss: Callable) -> Callable:
    def gradient(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss(logits, target), logits)[0]

    return gradient


def cross_entropy(table: Table, dtype: torch.dtype, shapes, cold: bool) -> None:
    """Time the loss of logits against class indices, and its gradient."""
    bandwidth = copy_bandwidth()
    print(f"\ncross_entropy of [N, C] logits; a large copy reaches {bandwidth / 1e9:.0f} GB/s")
    table.header()
    op = torch.ops.mnist_ext
    options = (None, -100, 0.0, 1)  # weight, ignore_index, label_smoothing, reduction "mean"
    for rows, classes in shapes:
        logits = (torch.randn(rows, classes) * 3).to(dtype)
        target = torch.randint(0, classes, (rows,))
        arguments = copies((logits, target), cold)
        leaves = [(x.clone().requires_grad_(), t) for x, t in arguments]
        torch._dynamo.reset()
        compiled = torch.compile(F.cross_entropy)

        losses = {"torch": F.cross_entropy, "torch.compile": compiled}
        losses["ours"] = functional.cross_entropy
        forward = {name: in_turns(loss, arguments) for name, loss in losses.items()}
        forward["ours as op"] = in_turns(
            lambda x, t: op.cross_entropy.default(x, t, *options)[0], arguments
        )
        backward = {name: in_turns(with_gradient(loss), leaves) for name, loss in losses.items()}
        backward["ours as op"] = in_turns(
            lambda x, t: op.cross_entropy_with_gradient.default(x, t, *options)[1], arguments
        )
        peers = jax_peers.cross_entropy(logits, target) if not cold else ({}, {})
        gradient = with_gradient(F.cross_entropy)(logits.double().requires_grad_(), target)
        for what, implementations, jax, passes, truth in (
            ("forward", forward, peers[0], 1, None),
            ("forward + backward", backward, peers[1], 2, gradient),
        ):
            expected = implementations["torch"]()
            implementations |= jax
            implementations = only_right(f"cross_entropy {what}", implementations, expected, dtype)
            compare(
                table,
                {**implementations, "copy": in_turns(lambda x, _: x.clone(), arguments)},
                best="ours",
                work=Work(passes * logits.nbytes, bandwidth, "GB/s"),
                truth=truth,
                what=f"cross_entropy {what}" + (", cold" if cold else ""),
                shape=f"{rows}x{classes}",
                dtype=name_of(dtype),
            )


def head_losses() -> dict[str, Callable[..., torch.Tensor]]:
    """Return functions of (input, linear_weight, target)."""

    def two_ops(linear, loss):
        return lambda x, w, t: loss(linear(x, w), t)

    torch._dynamo.reset()
    losses = {
        "torch": two_ops(F.linear, F.cross_entropy),
        "torch.compile": torch.compile(two_ops(F.linear, F.cross_entropy)),
        "ours, two ops": two_ops(functional.linear, functional.cross_entropy),
        "ours": functional.linear_cross_entropy,
    }
    if hasattr(F, "linear_cross_entropy"):  # from torch 2.13 on
        options = torch.nn.LinearCrossEntropyOptions()
        losses["chunked"] = partial(F.linear_cross_entropy, options=options)
    return losses


def head(table: Table, dtype: torch.dtype, shapes, against: Sequence[str] | None = None) -> None:
    """Time the last layer of a classifier and its loss, forward and backward."""
    peak = matrix_peak(dtype)
    print(f"\nlinear_cross_entropy; a large matrix product reaches {peak / 1e9:.0f} GFLOP/s")
    table.header()
    op = torch.ops.mnist_ext
    for rows, features, classes in shapes:
        input = torch.randn(rows, features, dtype=dtype, requires_grad=True)
        weight = (torch.randn(classes, features, dtype=dtype) / features**0.5).requires_grad_()
        target = torch.randint(0, classes, (rows,))

        def gradients(loss, x=input, w=weight, t=target):
            return torch.autograd.grad(loss(x, w, t), (x, w))

        def products(x, w):
            logits = op.linear(x, w, None, False)
            return op.linear_backward(logits, x, w, None, False)

        what = "linear_cross_entropy"
        implementations = {n: partial(gradients, f) for n, f in head_losses().items()}
        expected = implementations["torch"]()
        if against is not None:
            chosen = {*against, "ours"}
            implementations = {n: f for n, f in implementations.items() if n in chosen}
        implementations = only_right(what, implementations, expected, dtype)
        if against is None or "products" in against:
            implementations["products"] = partial(products, input.detach(), weight.detach())
        compare(
            table,
            implementations,
            best="ours",
            work=Work(6 * rows * features * classes, peak, "GFLOP/s"),
            what=what,
            shape=f"{rows}x{features}x{classes}",
            dtype=name_of(dtype),
        )


def sgd(table: Table) -> None:
    """Time one step over the parameters of the 784-128-64-10 model."""
    bandwidth = copy_bandwidth()
    print("\nSGD, one step over the parameters of 784-128-64-10")
    table.header()
    for momentum in (0.0, 0.9):
        implementations = {}
        results = {}
        for name, make in {
            "torch": torch.optim.SGD,
            "torch foreach": lambda p, **o: torch.optim.SGD(p, foreach=True, **o),
            "torch fused": lambda p, **o: torch.optim.SGD(p, fused=True, **o),
            "ours": mnist_ext.optim.SGD,
        }.items():
            torch.manual_seed(0)
            params = [p for k, n in MNIST_LAYERS for p in (torch.randn(n, k), torch.randn(n))]
            params = [torch.nn.Parameter(p) for p in params]
            for p in params:
                p.grad = torch.randn_like(p) * 1e-6
            optimizer = make(params, lr=0.01, momentum=momentum)
            optimizer.step()
            results[name] = [p.detach().clone() for p in params]
            implementations[name] = optimizer.step
        for name, result in results.items():
            is_right(f"SGD of {name}", result, results["torch"], torch.float32)
        compare(
            table,
            implementations,
            best="ours",
            # Parameter and gradient are read, the parameter is written; so is the momentum buffer.
            work=Work((5 if momentum else 3) * 4 * 109386, bandwidth, "GB/s"),
            what="SGD step" + (f", momentum {momentum}" if momentum else ""),
            shape="109386",
            dtype="float32",
        )


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    groups = ("linear", "autograd", "cross_entropy", "head", "sgd")
    parser.add_argument("groups", nargs="*", metavar="group", help=", ".join(groups))
    parser.add_argument("--dtype", default="float32", help="float32, float64, bfloat16, float16")
    parser.add_argument("--isa", nargs="+", default=[mnist_ext.build_info()["cpu_isa"]])
    parser.add_argument("--cold", action="store_true", help="other tensors in every call")
    parser.add_argument("--heads", nargs="+", metavar="NxDxC", help="shapes of group head")
    parser.add_argument("--against", nargs="+", metavar="NAME", help="peers in group head")
    parser.add_argument("--turns", type=int, help="of each implementation")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and turns")
    parser.add_argument("--csv", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    if unknown := set(args.groups) - set(groups):
        parser.error(f"unknown group {', '.join(unknown)}: choose from {', '.join(groups)}")
    chosen = args.groups or groups
    dtype = getattr(torch, args.dtype)

    print(describe())
    print(jax_peers.notice())
    table = Table(COLUMNS, fields(), turns=args.turns or (7 if args.quick else TURNS))
    if "linear" in chosen:
        shapes = [(64, layer) for layer in MNIST_LAYERS]
        grid = shapes if args.quick else [(rows, layer) for layer in LAYERS for rows in ROWS]
        linear_ops(table, dtype, grid, args.isa, args.cold)
    if "autograd" in chosen:
        shapes = [(64, *layer) for layer in MNIST_LAYERS]
        linear_autograd(table, dtype, shapes + [(s, s, s) for s in SQUARES if not args.quick])
    if "cross_entropy" in chosen:
        cross_entropy(table, dtype, LOGITS[:3] if args.quick else LOGITS, args.cold)
    if "head" in chosen:
        shapes = [tuple(map(int, shape.split("x"))) for shape in args.heads or ()]
        head(table, dtype, shapes or (HEADS[:3] if args.quick else HEADS), args.against)
    if "sgd" in chosen:
        sgd(table)
    if args.csv:
        table.write(args.csv)


if __name__ == "__main__":
    main()
