"""One description of the ops, from which the tests of their meaning are made.

A case is one way to call an op: which tensors, of which shapes, layouts and kinds, and which
options. `ours` and `torchs` make the same call to us and to PyTorch.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mnist_ext import functional

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
REDUCTIONS = ["mean", "sum", "none"]


@dataclass(frozen=True)
class Case:
    """One way to call an op."""

    name: str
    op: str  # "linear", "mlp", "cross_entropy" or "linear_cross_entropy"
    make: Callable[[torch.dtype], list[Tensor | None]] = field(repr=False)
    options: dict[str, Any]
    differentiable: tuple[int, ...]  # which of the tensors can have a gradient

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"

    def tensors(self, dtype: torch.dtype) -> list[Tensor | None]:
        """Make the arguments; the same seed gives the same ones."""
        torch.manual_seed(0)
        return self.make(dtype)

    def layers(self, *tensors: Tensor | None) -> list[tuple[Any, Any, Any]]:
        """Of an mlp: the weight, bias and activation of each."""
        return list(zip(tensors[1::2], tensors[2::2], self.options["activations"], strict=True))

    def ours(self, *tensors: Tensor | None) -> Tensor:
        if self.op == "mlp":
            return functional.mlp(tensors[0], self.layers(*tensors))
        if self.op == "linear_cross_entropy":
            *tensors, linear_bias, weight = tensors
            head = {"linear_bias": linear_bias, "weight": weight}
            return functional.linear_cross_entropy(*tensors, **head, **self.options)
        return getattr(functional, self.op)(*tensors, **self.options)

    def torchs(self, *tensors: Tensor | None) -> Tensor:
        if self.op == "cross_entropy":
            return F.cross_entropy(*tensors, **self.options)
        if self.op == "linear_cross_entropy":
            input, linear_weight, target, linear_bias, weight = tensors
            bias = None if linear_bias is None else linear_bias.flatten()
            logits = F.linear(input, linear_weight.flatten(0, -2), bias)
            logits = logits.unflatten(-1, linear_weight.shape[:-1])
            options = {key: value for key, value in self.options.items() if value is not None}
            return F.cross_entropy(logits, target, weight, **options)
        if self.op == "linear":
            layers = [(*tensors[1:], self.options["activation"])]
        else:
            layers = self.layers(*tensors)
        output = tensors[0]
        for weight, bias, activation in layers:
            output = F.linear(output, weight, bias)
            output = torch.relu(output) if activation == "relu" else output
        return output


def subsets(of: Iterable[int]) -> Iterator[tuple[int, ...]]:
    """Yield those of every size, from none to all."""
    of = tuple(of)
    for size in range(len(of) + 1):
        yield from itertools.combinations(of, size)


def with_gradients(tensors: list[Tensor | None], differentiable: tuple[int, ...]):
    """Detach the tensors, keeping their strides; return them and those that want a gradient."""
    leaves = [None if t is None else t.detach() for t in tensors]
    wanted = [leaves[i].requires_grad_() for i in differentiable if leaves[i] is not None]
    return leaves, wanted


def value_and_gradients(function, case: Case, tensors, grad_output: Tensor | None = None):
    """Return the value and the gradient of each differentiable tensor."""
    leaves, wanted = with_gradients(tensors, case.differentiable)
    value = function(*leaves)
    if grad_output is None:
        grad_output = torch.ones_like(value)
    return [value.detach(), *torch.autograd.grad(value, wanted, grad_output.to(value.dtype))]


# How the logits lie. Classes are 5, so that a vector of any instruction set holds some of them and
# nothing else; 21 positions, so that there is a rest behind whole vectors of all but the widest.
def _positions_last(*shape: int) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: (torch.randn(shape) * 2).to(dtype)


def _classes_last(dtype: torch.dtype) -> Tensor:
    return (torch.randn(2, 3, 7, 5) * 2).to(dtype).movedim(-1, 1)


def _cropped(dtype: torch.dtype) -> Tensor:  # d1 and d2 cannot be taken as one dimension
    return (torch.randn(2, 5, 3, 9) * 2).to(dtype)[..., 1:-1]


def _every_other_class(dtype: torch.dtype) -> Tensor:  # the kernels read it with its own strides
    return (torch.randn(2, 10, 3, 7) * 2).to(dtype)[:, ::2]


def _transposed(dtype: torch.dtype) -> Tensor:
    return (torch.randn(5, 9) * 2).to(dtype).t()


LOGITS = {
    "[C]": _positions_last(5),
    "[N,C]": _positions_last(9, 5),
    "[N,C] transposed": _transposed,
    "[N,C,1]": _positions_last(4, 5, 1),
    "[N,C,d]": _positions_last(2, 5, 21),
    "[N,C,d,d]": _positions_last(2, 5, 3, 7),
    "[N,C,d,d,d]": _positions_last(2, 5, 2, 3, 3),
    "[N,C,d,d] channels last": _classes_last,
    "[N,C,d,d] cropped": _cropped,
    "[N,C,d,d] every other class": _every_other_class,
}


def _index_target(shape: torch.Size, ignore_index: int) -> Tensor:
    if len(shape) == 1:
        return torch.tensor(3)
    target = torch.randint(0, 5, shape[:1] + shape[2:])
    target.flatten()[::4] = ignore_index  # a view: randint's result is contiguous
    return target


def _loss(weighted, smoothing, ignore_index, reduction) -> tuple[str, dict[str, Any]]:
    """Return a name for these options of a loss, and those that are not tensors."""
    name = "-weight" if weighted else ""
    name += f"-smoothing_{smoothing}" if smoothing else ""
    name += f"-ignore_{ignore_index}" if ignore_index not in (-100, None) else ""
    options = {"label_smoothing": smoothing, "ignore_index": ignore_index, "reduction": reduction}
    return f"{name}-{reduction}", options


def _cross_entropy_case(layout, kind, weighted, smoothing, ignore_index, reduction) -> Case:
    def make(dtype):
        logits = LOGITS[layout](dtype)
        if kind == "probabilities":
            target = torch.rand(logits.shape).softmax(0 if logits.dim() == 1 else 1).to(dtype)
        else:
            target = _index_target(logits.shape, ignore_index).to(getattr(torch, kind))
        return [logits, target, (torch.rand(5) + 0.1).to(dtype) if weighted else None]

    name, options = _loss(weighted, smoothing, ignore_index, reduction)
    return Case(
        name=f"{layout.replace(' ', '_')}-{kind}{name}",
        op="cross_entropy",
        make=make,
        options=options,
        differentiable=(0, 1) if kind == "probabilities" else (0,),
    )


CROSS_ENTROPY = [
    _cross_entropy_case(layout, kind, weighted, smoothing, ignore_index, reduction)
    for layout, kind, weighted, smoothing, ignore_index, reduction in itertools.product(
        LOGITS, ("int64", "probabilities"), (False, True), (0.0, 0.3), (-100, -1, 2, 50), REDUCTIONS
    )
    # The default or -1; a class or none.
    if (ignore_index in (-1, 50) if weighted else ignore_index in (-100, 2))
    and not (kind == "probabilities" and ignore_index >= 0)
]

# PyTorch wants int64 (in places uint8): these are compared with the same indices as int64.
NARROW_INDICES = [
    _cross_entropy_case(layout, kind, weighted, smoothing, 2, "mean")
    for layout, kind, weighted, smoothing in itertools.product(
        ("[C]", "[N,C]", "[N,C,d,d]", "[N,C,d,d] channels last"),
        ("int32", "uint8"),
        (False, True),
        (0.0, 0.3),
    )
]


def _joined(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


def _tensor(sizes: tuple[int, ...], dtype: torch.dtype, strided: bool) -> Tensor:
    """Return random numbers; strided: with the dimensions laid out the other way round."""
    if strided:
        return torch.randn(sizes[::-1]).to(dtype).permute(*range(len(sizes))[::-1])
    return torch.randn(sizes).to(dtype)


def _linear_case(shape, bias, activation, strided) -> Case:
    def make(dtype):
        columns = 40 if shape[0] == 140 else 4
        return [
            _tensor(shape, dtype, strided),
            _tensor((columns, shape[-1]), dtype, strided),
            torch.randn(columns).to(dtype) if bias else None,
        ]

    name = f"{_joined(shape)}{'-bias' if bias else ''}-{activation}"
    return Case(
        name=f"{name}-strided" if strided else name,
        op="linear",
        make=make,
        options={"activation": activation},
        differentiable=(0, 1, 2),
    )


# 140 rows and 40 columns take the outer products, which pack; the others the dot products.
LINEAR = [
    _linear_case(shape, bias, activation, strided)
    for shape, bias, activation, strided in itertools.product(
        [(3,), (6, 3), (140, 3), (2, 3, 3), (2, 1, 2, 3, 3), (0, 3), (2, 0, 3), (5, 0)],
        (False, True),
        ("none", "relu"),
        (False, True),
    )
]


def _mlp_case(shape, features, biases, activations, strided=False) -> Case:
    def make(dtype):
        tensors = [_tensor(shape, dtype, strided)]
        for inputs, outputs, bias in zip((shape[-1], *features), features, biases, strict=False):
            tensors.append(_tensor((outputs, inputs), dtype, strided) / inputs**0.5)
            tensors.append(torch.randn(outputs).to(dtype) if bias else None)
        return tensors

    name = "-".join([_joined(shape), _joined(features), *activations])
    return Case(
        name=f"{name}-strided" if strided else name,
        op="mlp",
        make=make,
        options={"activations": activations},
        differentiable=tuple(range(2 * len(features) + 1)),
    )


MLP = [
    _mlp_case((6, 3), (4, 5, 2), (True, True, True), ("relu", "relu", "none")),
    _mlp_case((3,), (4, 2), (False, True), ("none", "none")),
    _mlp_case((2, 3, 3), (4, 1, 2), (True, False, True), ("relu", "none", "relu"), strided=True),
    _mlp_case((140, 3), (40, 37), (True, True), ("relu", "relu")),
    _mlp_case((0, 3), (4, 2), (True, True), ("relu", "none")),
    _mlp_case((5, 0), (4, 2), (True, True), ("relu", "none")),
    _mlp_case((9, 7), (40, 3, 64, 5, 9, 2), (True,) * 6, ("relu",) * 6),
]


def _head_case(shape, outputs, kind, bias, weighted, smoothing, ignore_index, reduction) -> Case:
    def make(dtype):
        weight = torch.randn(*outputs, shape[-1]).to(dtype)
        rows = shape[:-1]
        if kind == "probabilities":
            target = torch.rand(*rows, *outputs).softmax(len(rows)).to(dtype)
        else:
            target = torch.randint(0, outputs[0], (*rows, *outputs[1:]), dtype=getattr(torch, kind))
            target.flatten()[1::4] = 2 if ignore_index is None else ignore_index
        return [
            torch.randn(shape).to(dtype),
            weight,
            target,
            torch.randn(outputs).to(dtype) if bias else None,
            (torch.rand(outputs[0]) + 0.1).to(dtype) if weighted else None,
        ]

    name, options = _loss(weighted, smoothing, ignore_index, reduction)
    return Case(
        name=f"{_joined(shape)}-{_joined(outputs)}-{kind}{'-bias' if bias else ''}{name}",
        op="linear_cross_entropy",
        make=make,
        options=options,
        differentiable=(0, 1, 2, 3) if kind == "probabilities" else (0, 1, 3),
    )


# 140 rows are many blocks on the emulated CUDA kernels.
HEADS = [
    _head_case(shape, outputs, kind, bias, weighted, smoothing, ignore_index, reduction)
    for (shape, outputs), kind, (bias, weighted), smoothing, reduction in itertools.product(
        [((6, 3), (5,)), ((3,), (5,)), ((140, 7), (40,)), ((7, 3), (4, 2, 3)), ((5, 0), (4,))],
        ("int64", "probabilities"),
        ((False, False), (True, True)),
        (0.0, 0.3),
        REDUCTIONS,
    )
    for ignore_index in [None if kind == "probabilities" or bias else 2]
]

CASES = [*LINEAR, *MLP, *CROSS_ENTROPY, *HEADS]

# For what takes long, and depends on the Python around the kernels more than on every combination:
# each layout, kind, option and activation at least once.
FEW = [
    _linear_case((6, 3), True, "relu", False),
    _linear_case((3,), False, "none", False),
    _linear_case((2, 3, 3), True, "none", True),
    *MLP[:3],
    *HEADS[1:49:7],
    *HEADS[74:96:10],
    *CROSS_ENTROPY[::29],
]
