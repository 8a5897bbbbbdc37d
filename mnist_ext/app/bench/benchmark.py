"""The short benchmark of a machine: ours against PyTorch eager, in well under a minute.

What is compared is first checked to compute the same. Then both take turns; the gain is the median
of the gain of each turn. The limits that shares are of are measured in the same run: the FLOP/s of
a large matrix product and the bytes/s of a large copy.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_ext import functional
from mnist_ext.app.bench.baselines import (
    Loop,
    OneCall,
    linear_products,
    loop,
    relative_error,
    step_arithmetic,
)
from mnist_ext.app.bench.machine import copy_bandwidth, matrix_peak
from mnist_ext.app.bench.timing import SECONDS_PER_TURN, TURNS, seconds, take_turns
from mnist_ext.app.training.models import mlp

BATCH_SIZES = (1, 64, 1024)
LAYERS = ((784, 128), (128, 64), (64, 10))
LAYER_ROWS = 64
LOGITS = ((64, 10), (4096, 10), (4096, 1000), (1024, 32000))

_TOLERANCE = 1e-3
_CHECKED_STEPS = 30
_IMAGES = 16384  # in memory, so many batches as they make


class WrongResultError(Exception):
    """Ours does not compute what PyTorch computes."""


@dataclass(frozen=True)
class Limits:
    """The most that this machine does in a second.

    Attributes:
        flops: FLOP of a large matrix product.
        bytes: read and written by a large copy.
    """

    flops: float
    bytes: float

    @classmethod
    def measure(cls) -> "Limits":
        """Measure both."""
        return cls(matrix_peak(torch.float32), copy_bandwidth())


@dataclass(frozen=True)
class Result:
    """A comparison.

    Attributes:
        group: ``step``, ``linear`` or ``cross_entropy``.
        what: what was timed.
        shape: on what.
        ours: our way of it.
        torch_seconds: PyTorch's time of one call, the median.
        ours_seconds: our time of one call, the median.
        gain: PyTorch's time over ours: the median of the turns' ratios.
        gain_p20: their 20th percentile.
        gain_p80: their 80th percentile.
        limit: the share of the limit that ours reaches.
        limit_of: ``flops`` or ``bytes``.
    """

    group: str
    what: str
    shape: str
    ours: str
    torch_seconds: float
    ours_seconds: float
    gain: float
    gain_p20: float
    gain_p80: float
    limit: float
    limit_of: str


def measure(
    limits: Limits, turns: int = TURNS, seconds_per_turn: float = SECONDS_PER_TURN
) -> Iterator[Result]:
    """Time everything.

    Args:
        limits: of this machine.
        turns: so many of each implementation.
        seconds_per_turn: how long one lasts, at least one call.

    Yields:
        A comparison, as soon as it has been made.

    Raises:
        WrongResultError: before anything of it is timed.
    """
    torch.manual_seed(0)
    timed = partial(_compare, limits=limits, turns=turns, seconds_per_turn=seconds_per_turn)
    yield from _steps(timed)
    yield from _linear(timed)
    yield from _cross_entropy(timed)


def _compare(
    torchs: Callable[[], object],
    ours: dict[str, Callable[[], object]],
    work: float,
    limits: Limits,
    turns: int,
    seconds_per_turn: float,
    group: str,
    what: str,
    shape: str,
    calls: int = 1,
) -> Iterator[Result]:
    """Time our ways of it against PyTorch's; ``calls`` are made in one call of each function."""
    times = take_turns({"torch": torchs, **ours}, turns, seconds_per_turn)
    limit_of = "bytes" if group == "cross_entropy" else "flops"
    per_second = limits.bytes if group == "cross_entropy" else limits.flops
    for name in ours:
        low, middle, high = times.ratio("torch", to=name)
        taken = times.percentiles(name)[1] / calls
        yield Result(
            group=group,
            what=what,
            shape=shape,
            ours=name,
            torch_seconds=times.percentiles("torch")[1] / calls,
            ours_seconds=taken,
            gain=middle,
            gain_p20=low,
            gain_p80=high,
            limit=work / taken / per_second,
            limit_of=limit_of,
        )


def _check(what: str, found: object, true: object) -> None:
    founds, trues = (x if isinstance(x, (tuple, list)) else [x] for x in (found, true))
    for f, t in zip(founds, trues, strict=True):
        error = relative_error(f, t)
        if not error <= _TOLERANCE:
            raise WrongResultError(f"{what} is wrong here: relative error {error:.3g}")


def _steps(timed: Callable[..., Iterator[Result]]) -> Iterator[Result]:
    model = mlp(activation="relu")
    for batch_size in BATCH_SIZES:
        number = max(2, min(64, _IMAGES // batch_size))
        images = torch.randn(number, batch_size, 1, 28, 28)
        labels = torch.randint(0, 10, (number, batch_size))
        torchs = loop(model, images, labels, ours=False)
        ours: dict[str, Loop | OneCall] = {
            "swapped modules": loop(model, images, labels, ours=True),
            "TrainStep": OneCall(model, images, labels, epoch=False),
        }
        shape = f"batch {batch_size}"
        expected = torch.stack(torchs.run(_CHECKED_STEPS))
        for name, implementation in ours.items():
            losses = torch.tensor([float(x) for x in implementation.run(_CHECKED_STEPS)])
            _check(f"a training step, {name}, {shape}", losses, expected)
        # Many steps in a call, so that the timing itself costs nothing.
        calls = max(1, round(0.01 / seconds(partial(torchs.run, 5), 1) * 5))
        yield from timed(
            partial(torchs.run, calls),
            {name: partial(implementation.run, calls) for name, implementation in ours.items()},
            work=step_arithmetic(batch_size),
            group="step",
            what="training step",
            shape=shape,
            calls=calls,
        )


def _linear(timed: Callable[..., Iterator[Result]]) -> Iterator[Result]:
    for k, n in LAYERS:
        products = linear_products(LAYER_ROWS, k, n, torch.float32)
        for what, (ours, torchs, tensors) in products.items():
            shape = f"{LAYER_ROWS}x{k}x{n}"
            _check(f"linear {what}, {shape}", ours(*tensors), torchs(*tensors))
            yield from timed(
                partial(torchs, *tensors),
                {"op": partial(ours, *tensors)},
                work=2 * LAYER_ROWS * k * n,
                group="linear",
                what=f"linear {what}",
                shape=shape,
            )


def _cross_entropy(timed: Callable[..., Iterator[Result]]) -> Iterator[Result]:
    def gradient(loss: Callable[..., Tensor], logits: Tensor, target: Tensor) -> Tensor:
        return torch.autograd.grad(loss(logits, target), logits)[0]

    for rows, classes in LOGITS:
        logits = (torch.randn(rows, classes) * 3).requires_grad_()
        target = torch.randint(0, classes, (rows,))
        torchs = partial(gradient, F.cross_entropy, logits, target)
        ours = partial(gradient, functional.cross_entropy, logits, target)
        shape = f"{rows}x{classes}"
        _check(f"cross_entropy, {shape}", ours(), torchs())
        yield from timed(
            torchs,
            {"function": ours},
            work=2 * logits.nbytes,  # the logits are read, their gradient is written
            group="cross_entropy",
            what="cross_entropy, with gradient",
            shape=shape,
        )
