"""Random calls, most of them wrong in some way: each does or raises what PyTorch's does.

Shapes are tiny and often do not fit; dtypes and options are often of the wrong kind.
"""

import random

import pytest
import torch
import torch.nn.functional as F

from mnist_ext import functional

pytestmark = [
    pytest.mark.usefixtures("every_kernel"),
    pytest.mark.cpu_only("class indices out of range, each of which ends a CUDA kernel"),
]

CALLS_PER_SEED = 1500
FLOATS = [torch.float32] * 6 + [torch.float64, torch.bfloat16, torch.float16]
DTYPES = [*FLOATS, torch.int64, torch.complex64, torch.bool]
INDEX_DTYPES = [torch.int64] * 6 + [
    torch.uint8,
    torch.int32,
    torch.int16,
    torch.float32,
    torch.bool,
]


class Caller:
    """Makes random arguments."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def tensor(self, shape, dtypes) -> torch.Tensor:
        dtype = self.random.choice(dtypes)
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(shape).to(dtype)
        return torch.randint(0, 3, shape).to(dtype)

    def shape(self) -> tuple[int, ...]:
        dims = self.random.choice([0, 1, 2, 2, 2, 3, 4, 5])
        return tuple(self.random.choice([0, 1, 2, 3, 3, 3]) for _ in range(dims))

    def perhaps_wrong(self, shape) -> tuple[int, ...]:
        shape, chance = list(shape), self.random.random()
        if chance > 0.9:
            shape.append(self.random.choice([1, 2]))
        elif chance > 0.8 and shape:
            shape.pop()
        elif chance > 0.7 and shape:
            shape[self.random.randrange(len(shape))] = self.random.choice([0, 1, 2, 3])
        return tuple(shape)

    def linear(self):
        input = self.tensor(self.shape(), DTYPES)
        in_features = input.shape[-1] if input.dim() else 2
        dtypes = [input.dtype] * 7 + [torch.float64]
        shape = (self.random.choice([0, 1, 2, 3]), in_features)
        weight = self.tensor(self.perhaps_wrong(shape), dtypes)
        bias = None
        if self.random.random() < 0.6:
            bias = self.tensor(self.perhaps_wrong(weight.shape[:1]), dtypes)
        return [input, weight, bias], {"activation": self.random.choice(["none", "relu"])}

    def cross_entropy(self):
        choice = self.random.choice
        input = self.tensor(self.shape(), DTYPES)
        dims = input.dim()
        if self.random.random() < 0.3:
            dtypes = [input.dtype, input.dtype, torch.float32, torch.float64, torch.int64]
            target = self.tensor(self.perhaps_wrong(input.shape), dtypes)
        else:
            shape = input.shape[:1] + input.shape[2:] if dims > 1 else ()
            target = self.tensor(self.perhaps_wrong(shape), INDEX_DTYPES)
        weight = None
        if self.random.random() < 0.5:
            classes = input.shape[:1] if dims == 1 else input.shape[1:2]
            dtypes = [input.dtype] * 3 + [torch.float64]
            weight = self.tensor(self.perhaps_wrong(classes), dtypes)
        return [input, target, weight], {
            "ignore_index": choice([-100, -100, -1, 0, 1, 2]),
            "reduction": choice(["mean", "sum", "none"] * 4 + ["max"]),
            "label_smoothing": choice([0.0] * 3 + [0, 0.1, 0.1, 1, 1.0, 1.5, -0.5]),
        }


def torchs_linear(input, weight, bias, activation):
    output = F.linear(input, weight, bias)
    return torch.relu(output) if activation == "relu" else output


def torchs_cross_entropy(input, target, weight, **options):
    # Ours takes these index dtypes everywhere; with the same indices as int64 PyTorch does too.
    if target.dtype in (torch.int32, torch.uint8):
        target = target.long()
    return F.cross_entropy(input, target, weight, **options)


def outcome(function, tensors, options):
    """Return (error, results): the value and the gradients, or the error."""
    leaves = [
        t.clone().requires_grad_() if t is not None and t.is_floating_point() and i < 2 else t
        for i, t in enumerate(tensors)
    ]
    try:
        value = function(*leaves, **options)
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        grads = ()
        if value.requires_grad:
            grads = torch.autograd.grad(value, wanted, torch.ones_like(value), allow_unused=True)
    except (IndexError, NotImplementedError, RuntimeError, ValueError) as error:
        return error, []
    return None, [value.detach(), *grads]


@pytest.mark.filterwarnings("ignore")  # PyTorch's, of odd calls
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("op", "torchs"), [("linear", torchs_linear), ("cross_entropy", torchs_cross_entropy)]
)
def test_random_calls_do_what_pytorchs_do(op, torchs, seed):
    caller = Caller(seed)
    succeeded = 0
    for _ in range(CALLS_PER_SEED):
        tensors, options = getattr(caller, op)()
        error, ours = outcome(getattr(functional, op), tensors, options)
        torchs_error, expected = outcome(torchs, tensors, options)
        call = [None if t is None else (tuple(t.shape), t.dtype) for t in tensors], options
        assert type(error) is type(torchs_error), (call, error, torchs_error)
        succeeded += error is None
        for our, their in zip(ours, expected, strict=True):
            if their is None:
                assert our is None, call
                continue
            half = their.dtype.itemsize == 2
            torch.testing.assert_close(
                our,
                their,
                rtol=2e-2 if half else 1e-4,
                atol=2e-2 if half else 1e-5,
                equal_nan=True,
                msg=lambda text, call=call: f"{call}: {text}",
            )
    assert CALLS_PER_SEED / 10 < succeeded < CALLS_PER_SEED * 9 / 10
