"""The autograd Functions: gradcheck, second derivatives, and torch's transforms and compilers."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from mnist_ext import functional


def double(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [6, 135])  # dot products; packed outer products
def test_linear_gradcheck(isa, rows, bias, activation):
    """Gradcheck draws a random grad_output by itself and checks every input."""
    arguments = (double(rows, 4), double(3, 4), double(3) if bias else None)
    assert gradcheck(lambda *a: functional.linear(*a, activation=activation), arguments)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, 1])
def test_cross_entropy_gradcheck(isa, ignore_index, reduction):
    target = torch.tensor([0, 4, 1, 1, 3, 2, 0])
    options = {"ignore_index": ignore_index, "reduction": reduction}
    assert gradcheck(lambda x: functional.cross_entropy(x, target, **options), (double(7, 5),))


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("bias", [False, True])
def test_linear_gradgradcheck(bias, activation):
    arguments = (double(2, 3, 4), double(3, 4), double(3) if bias else None)
    assert gradgradcheck(lambda *a: functional.linear(*a, activation=activation), arguments)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_gradgradcheck(reduction):
    target = torch.tensor([0, 4, -100, 1])
    op = functional.cross_entropy
    assert gradgradcheck(lambda x: op(x, target, reduction=reduction), (double(4, 5),))


def test_backward_twice_with_retain_graph():
    input, weight, bias = double(8, 5), double(4, 5), double(4)
    target = torch.randint(0, 4, (8,))
    loss = functional.cross_entropy(
        functional.linear(input, weight, bias, activation="relu"), target
    )
    first = torch.autograd.grad(loss, (input, weight, bias), retain_graph=True)
    second = torch.autograd.grad(loss, (input, weight, bias))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def loss_of(op, weight, bias, input, target):
    hidden = op.linear(input, weight, bias)
    return op.cross_entropy(hidden, target)


def test_functorch_transforms_agree():
    weight, bias = torch.randn(4, 5), torch.randn(4)
    inputs, targets = torch.randn(3, 6, 5), torch.randint(0, 4, (3, 6))
    for transform in (
        lambda f: torch.func.vmap(f, (None, None, 0, 0)),
        lambda f: torch.func.vmap(torch.func.grad(f), (None, None, 0, 0)),
    ):
        ours, torchs = (
            transform(lambda *a, op=op: loss_of(op, *a))(weight, bias, inputs, targets)
            for op in (functional, F)
        )
        torch.testing.assert_close(ours, torchs)


def test_autocast_gives_pytorchs_dtypes():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert functional.linear(torch.randn(2, 3), torch.randn(4, 3)).dtype == torch.bfloat16


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_break(dynamic):
    """Traced by AOTAutograd, forward and backward; the inductor code generator is not needed."""

    def loss(input, weight, bias, target):
        hidden = functional.linear(input, weight, bias, activation="relu")
        return functional.cross_entropy(hidden, target)

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (8, 9):
        arguments = [torch.randn(rows, 5), torch.randn(4, 5), torch.randn(4)]
        arguments = [t.requires_grad_() for t in arguments]
        target = torch.randint(0, 4, (rows,))
        ours, eager = compiled(*arguments, target), loss(*arguments, target)
        assert torch.equal(ours, eager)
        for a, b in zip(
            torch.autograd.grad(ours, arguments), torch.autograd.grad(eager, arguments), strict=True
        ):
            assert torch.equal(a, b)


OP_CALLS = [
    ("linear", lambda: (torch.randn(3, 5), torch.randn(4, 5), torch.randn(4), True)),
    ("linear", lambda: (torch.randn(2, 3, 5), torch.randn(4, 5), None, False)),
    *(
        (
            "linear_backward",
            lambda which=which, relu=relu: (
                torch.randn(3, 4),
                torch.randn(3, 5) if which[0] else None,
                torch.randn(4, 5) if which[1] else None,
                torch.randn(3, 4).relu() if relu else None,
                which[2],
            ),
        )
        for which, relu in itertools.product([(1, 1, True), (0, 1, False), (0, 0, True)], [0, 1])
    ),
    *(
        (
            "cross_entropy",
            lambda r=r: (torch.randn(3, 5), torch.tensor([0, 4, -100]), -100, r),
        )
        for r in (0, 1, 2)
    ),
    *(
        (
            "cross_entropy_backward",
            lambda r=r: (
                torch.randn(3) if r == 0 else torch.randn(()),
                torch.randn(3, 5),
                torch.tensor([0, 4, -100]),
                torch.randn(2, 3),
                torch.tensor(2.0),
                -100,
                r,
            ),
        )
        for r in (0, 1, 2)
    ),
]


@pytest.mark.parametrize(("name", "make"), OP_CALLS, ids=lambda p: p if isinstance(p, str) else "")
def test_opcheck(name, make):
    torch.library.opcheck(getattr(torch.ops.mnist_ext, name).default, make())


def test_forward_mode_derivatives_agree():
    input, weight, tangent = torch.randn(4, 3), torch.randn(5, 3), torch.randn(4, 3)
    target = torch.tensor([0, 4, 2, 2])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(input, tangent)
        ours, torchs = (
            torch.autograd.forward_ad.unpack_dual(
                op.cross_entropy(op.linear(dual, weight), target)
            ).tangent
            for op in (functional, F)
        )
    torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("shape", [(3, 0, 4), (3, 4, 0), (0, 4, 5)], ids=str)
def test_recorded_backward_of_empty_layers(shape):
    rows, in_features, out_features = shape
    input, weight = double(rows, in_features), double(out_features, in_features)
    output = functional.linear(input, weight, double(out_features))
    grads = torch.autograd.grad(output.sum(), (input, weight), create_graph=True)
    assert [g.shape for g in grads] == [input.shape, weight.shape]


def test_fake_tensors_refuse_wrong_shapes():
    op = torch.ops.mnist_ext
    with torch._subclasses.FakeTensorMode():
        with pytest.raises(RuntimeError, match="in_features"):
            op.linear(torch.randn(2, 3), torch.randn(4, 5), None, False)
        with pytest.raises(ValueError, match="target"):
            op.cross_entropy(torch.randn(2, 3), torch.zeros(4, dtype=torch.int64), -100, 1)
