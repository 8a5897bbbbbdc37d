"""The rows of benchmarks/gpu.py about linear: each product, and layers through autograd.

Peers: PyTorch eager (cuBLAS, with the bias in cuBLASLt's epilogue), `torch._addmm_activation` (the
ReLU in the epilogue too) and torch.compile with max-autotune. "cold": each call has other operands,
more of them than the L2 cache holds; "warm": the same again and again. "error" is the largest one
against float64, in parts of the largest magnitude.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from graphs import MICROSECONDS_PER_GRAPH, graph_of
from table import Table
from torch import Tensor

from mnist_ext import functional
from mnist_ext.app.bench.timing import take_turns

Call = Callable[[dict[str, Tensor]], tuple[Tensor, ...]]

HALF = torch.bfloat16
# (dtype, precision of float32 products, (rows, in_features, out_features))
PRODUCTS = [
    *((HALF, "ieee", (n, n, n)) for n in (4096, 8192)),
    *((HALF, "ieee", (m, 4096, 4096)) for m in (16, 64, 256, 1024)),
    (HALF, "ieee", (357, 789, 333)),
    *((torch.float32, "tf32", (n, n, n)) for n in (4096, 8192)),
    (torch.float32, "tf32", (1024, 4096, 4096)),
    (torch.float32, "ieee", (4096, 4096, 4096)),
    (torch.float32, "ieee", (357, 789, 333)),
    (torch.float64, "ieee", (2048, 2048, 2048)),
]
QUICK_PRODUCTS = [PRODUCTS[0], PRODUCTS[6], PRODUCTS[7], PRODUCTS[10]]
LEAVES = ("x", "weight", "bias")  # in the order of linear's arguments
CALLS_TOGETHER = 50  # through autograd, between two waits
MNIST_LAYERS = [(784, 128), (128, 64), (64, 10)]


def operands(dtype: torch.dtype, shape: tuple[int, int, int], device: str) -> dict[str, Tensor]:
    """Return what the products of one layer are made of, at random."""
    rows, in_features, out_features = shape

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=device).to(dtype)

    x, weight = normal(rows, in_features), normal(out_features, in_features)
    bias = normal(out_features)
    y = torch.relu(F.linear(x, weight, bias))
    # Where rounding decides the sign before ReLU, gradients may rightly differ.
    clear = F.linear(*(t.double() for t in (x, weight, bias))).abs() > 1e-4
    dy = normal(rows, out_features) * clear
    return {"x": x, "weight": weight, "bias": bias, "y": y, "dy": dy}


def with_leaves(o: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the operands with a layer's arguments as leaves of autograd."""
    return {n: t.detach().requires_grad_() if n in LEAVES else t for n, t in o.items()}


def _masked(o: dict[str, Tensor]) -> Tensor:
    return torch.where(o["y"] <= 0, 0, o["dy"])


def forward(o: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Make out as PyTorch does."""
    return (torch.relu(F.linear(o["x"], o["weight"], o["bias"])),)


def grad_input(o: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Make grad_input as PyTorch does."""
    return (_masked(o) @ o["weight"],)


def grad_weight(o: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """Make grad_weight and grad_bias as PyTorch does."""
    dy = _masked(o)
    return dy.t() @ o["x"], dy.sum(0)


def gradients(layer: Callable[..., Tensor]) -> Call:
    """Return what runs a layer forward and backward through autograd."""

    def run(o: dict[str, Tensor]) -> tuple[Tensor, ...]:
        leaves = [o[name] for name in LEAVES]
        return torch.autograd.grad(layer(*leaves), leaves, o["dy"])

    return run


def implementations(what: str, tf32: bool) -> dict[str, Call]:
    """Return ours, eager and what else makes the product without a compiler."""
    op = torch.ops.mnist_ext
    if what == "forward":
        return {
            "ours": lambda o: (op.linear(o["x"], o["weight"], o["bias"], True, tf32),),
            "eager": forward,
            "addmm_activation": lambda o: (
                torch._addmm_activation(o["bias"], o["x"], o["weight"].t()),
            ),
        }
    if what == "grad_input":
        return {
            "ours": lambda o: op.linear_backward(o["dy"], None, o["weight"], o["y"], False, tf32)[
                :1
            ],
            "eager": grad_input,
        }
    if what == "autograd":
        return {
            "ours": gradients(functools.partial(functional.linear, activation="relu")),
            "eager": gradients(lambda *layer: torch.relu(F.linear(*layer))),
        }
    return {
        "ours": lambda o: op.linear_backward(o["dy"], o["x"], None, o["y"], True, tf32)[1:],
        "eager": grad_weight,
    }


WHATS = ("forward", "grad_input", "grad_weight")


def error(results: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    """Return the largest error of all results, in parts of the largest magnitude of each."""
    return max(
        ((r.double() - t).abs().max() / t.abs().max()).item()
        for r, t in zip(results, truth, strict=True)
    )


def errors(what: str, calls: dict[str, Call], o: dict[str, Tensor]) -> dict[str, float]:
    """Return each implementation's error; exit where it is out of all proportion to eager's."""
    doubles = {name: t.detach().double() for name, t in o.items()}
    if what == "autograd":
        doubles = with_leaves(doubles)
    truth = implementations(what, False)["eager"](doubles)
    found = {name: error(call(o), truth) for name, call in calls.items()}
    for name, e in found.items():
        if not e <= max(4 * found["eager"], 4 * torch.finfo(o["x"].dtype).eps):
            raise SystemExit(f"{name} is wrong in {what}: {e:.3g}, eager: {found['eager']:.3g}")
    return found


@contextmanager
def fp32_precision(precision: str) -> Iterator[None]:
    """Set torch's precision of float32 products on CUDA for a while."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


def add_rows(table: Table, graphs: dict, calls: int, flops: float, found: dict, row: dict) -> None:
    """Time the graphs, each of so many calls, by turns; add a row for each."""
    times = take_turns(graphs, table.turns)
    for name in graphs:
        p20, median, p80 = (t / calls * 1e6 for t in times.percentiles(name))
        table.add(
            **row,
            implementation=name,
            us=median,
            p20=p20,
            p80=p80,
            ratio=times.ratio(name, to="ours")[1],
            rate=flops / median * 1e-6,
            unit="TFLOP/s",
            error=found.get(name),
        )


def products(table: Table, quick: bool) -> None:
    """Each product of a layer with ReLU, called as an op."""
    for dtype, precision, shape in QUICK_PRODUCTS if quick else PRODUCTS:
        with fp32_precision(precision):
            _products(table, dtype, precision, shape)
        torch.cuda.empty_cache()


def _products(table: Table, dtype: torch.dtype, precision: str, shape: tuple) -> None:
    flops = 2.0 * math.prod(shape)
    first = operands(dtype, shape, "cuda")
    size = sum(t.numel() * t.element_size() for t in first.values())
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    inputs = [first]
    while len(inputs) < min(1 + 2 * cache // size, 64):
        inputs.append(operands(dtype, shape, "cuda"))
    for what in WHATS:
        calls = implementations(what, precision == "tf32")
        torch._dynamo.reset()
        calls["max-autotune"] = torch.compile(
            calls["eager"], mode="max-autotune-no-cudagraphs", dynamic=False
        )
        found = errors(what, calls, first)
        for caches, used in (("cold", inputs), ("warm", inputs[:1])):
            repeats = max(1, math.ceil(MICROSECONDS_PER_GRAPH / (len(used) * (flops / 5e8 + 3))))
            graphs = {
                name: graph_of([lambda c=call, o=o: c(o) for o in used], repeats)
                for name, call in calls.items()
            }
            row = {
                "what": f"linear {what} {caches}",
                "shape": "x".join(map(str, shape)),
                "dtype": "tf32" if precision == "tf32" else str(dtype).split(".")[1],
            }
            add_rows(table, graphs, len(used) * repeats, flops, found, row)


def timed_together(call: Callable[[], object], calls: int) -> Callable[[], None]:
    """Return what makes so many calls, and waits for the last one."""

    def run() -> None:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()

    return run


def autograd(table: Table) -> None:
    """Forward and backward of each MNIST layer as a user calls them: with Python and launches."""
    calls = implementations("autograd", False)
    for rows in (64, 4096):
        for layer in MNIST_LAYERS:
            shape = rows, *layer
            o = with_leaves(operands(torch.float32, shape, "cuda"))
            found = errors("autograd", calls, o)
            timed = {
                name: timed_together(lambda c=call, o=o: c(o), CALLS_TOGETHER)
                for name, call in calls.items()
            }
            row = {
                "what": "linear autograd",
                "shape": "x".join(map(str, shape)),
                "dtype": "float32",
            }
            add_rows(table, timed, CALLS_TOGETHER, 6.0 * math.prod(shape), found, row)
