"""Values and gradients of the fused linear layer."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate
from torch import Tensor

from mnist_ext import functional

# (rows, in_features, out_features). Zero and one: empty sums, single elements. 15, 16, 17 and 31,
# 33: a vector of any instruction set, less or more by one. 64 rows: the MNIST batch. 129 rows by 33
# and more columns: outer products, which pack, on every instruction set. 300 deep, 1100 wide: more
# than one block of each of their dimensions; 700 rows of 800: more than one block of dot products.
SHAPES = [
    *itertools.product((0, 1, 5), repeat=3),
    (1, 784, 10),
    (3, 17, 15),
    (15, 16, 17),
    (17, 31, 33),
    (64, 784, 128),
    (64, 128, 64),
    (64, 64, 10),
    (129, 33, 10),
    (129, 31, 35),
    (150, 300, 65),
    *(
        pytest.param(shape, marks=pytest.mark.cpu_only("blocks of the CPU's kernels"))
        for shape in ((1030, 300, 65), (700, 800, 3), (200, 64, 1100), (257, 1100, 19))
    ),
]
# Sums shorter than a vector; of one output the transpose is computed.
SHORT_SUMS = [(1100, 3, 1), (2, 3, 1100)]


def reference(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    output = F.linear(input, weight, bias)
    return torch.relu(output) if activation == "relu" else output


def forward_and_gradients(op, tensors, grad_output, activation):
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    output = op(*leaves, activation=activation)
    wanted = [t for t in leaves if t is not None]
    return [output.detach(), *torch.autograd.grad(output, wanted, grad_output)]


def ours_and_torchs(*arguments):
    return [forward_and_gradients(op, *arguments) for op in (functional.linear, reference)]


def same_sign(input, weight, bias):
    """Where rounding decides the sign before ReLU, the gradient may rightly differ: move away."""
    output = F.linear(input.double(), weight.double(), bias.double() if bias is not None else None)
    return output.abs() > 1e-4


def column_major(matrix: Tensor) -> Tensor:
    return matrix.t().contiguous().t()


@pytest.mark.parametrize(
    ("activation", "layout", "dtype"),
    [
        ("none", Tensor.contiguous, torch.float32),
        *itertools.product(
            ["relu"], [Tensor.contiguous, column_major], [torch.float32, torch.float64]
        ),
    ],
)
@pytest.mark.parametrize("shape", SHAPES + SHORT_SUMS, ids=lambda s: "x".join(map(str, s)))
def test_error_within_twice_pytorchs(device, shape, activation, layout, dtype):
    rows, in_features, out_features = shape
    input = layout(torch.randn(rows, in_features, dtype=dtype))
    weight = layout(torch.randn(out_features, in_features, dtype=dtype))
    bias = torch.randn(out_features, dtype=dtype)
    grad_output = torch.randn_like(input @ weight.t()) * same_sign(input, weight, bias)

    ours, torchs = ours_and_torchs((input, weight, bias), grad_output, activation)
    if dtype == torch.float64:  # which has no truth
        torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-11)
        return
    doubles = [t.double() for t in (input, weight, bias)]
    truth = forward_and_gradients(reference, doubles, grad_output.double(), activation)
    assert_as_accurate(ours, torchs, truth, floor=4)


@pytest.mark.cpu_only("sums far too long for the emulator, and CUDA's are not added in blocks")
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((2, 2**19, 3), Tensor.contiguous),
        ((2**19, 3, 2), Tensor.contiguous),
        ((2**19, 3, 2), column_major),  # dot products for the gradient of the weight
        ((2, 3, 2**19), Tensor.contiguous),
    ],
)
def test_error_does_not_grow_with_the_length_of_sums(device, shape, layout):
    """Of one sign, so that every addition to a long sum rounds at that sum's size."""
    rows, in_features, out_features = shape
    weight = layout(torch.rand(out_features, in_features))
    tensors = (layout(torch.rand(rows, in_features)), weight, torch.rand(out_features))
    grad_output = torch.rand(rows, out_features)
    ours = forward_and_gradients(functional.linear, tensors, grad_output, "none")
    doubles = [t.double() for t in tensors]
    truth = forward_and_gradients(reference, doubles, grad_output.double(), "none")
    for our, true in zip(ours, truth, strict=True):
        assert_as_accurate(our, our, true, factor=0, floor=4)


def test_relu_of_a_long_sum_is_that_of_the_whole():
    """Of pieces whose sums have either sign."""
    input = torch.ones(1, 2**14)
    weight = torch.cat([torch.full((2, 2**13), -1.0), torch.full((2, 2**13), 2.0)], dim=1)
    weight[1].neg_()
    output = functional.linear(input, weight, activation="relu")
    assert output.tolist() == [[2.0**13, 0.0]]


# Matrices [rows, columns] of all kinds of strides.
STRIDED = {
    "transposed": lambda rows, columns: torch.randn(columns, rows).t(),
    "expanded rows": lambda rows, columns: torch.randn(columns).expand(rows, columns),
    "expanded columns": lambda rows, columns: torch.randn(rows, 1).expand(rows, columns),
    "every other column": lambda rows, columns: torch.randn(rows, 2 * columns)[:, ::2],
    "every other row": lambda rows, columns: torch.randn(2 * rows, columns)[::2],
    # A base address that is aligned to a single element.
    "offset": lambda rows, columns: torch.randn(rows * columns + 1)[1:].view(rows, columns),
    # A leading dimension larger than the row.
    "wide": lambda rows, columns: torch.randn(rows, columns + 3)[:, 1:-2],
}


@pytest.mark.parametrize("rows", [13, 140])
@pytest.mark.parametrize("kind", STRIDED)
@pytest.mark.parametrize("which", ["input", "weight", "bias", "grad_output"])
def test_any_strides(device, which, kind, rows):
    in_features, out_features = 37, 35

    def make(name, *shape):
        if name != which:
            return torch.randn(shape)
        return STRIDED[kind](*shape) if len(shape) == 2 else STRIDED[kind](1, *shape)[0]

    input, weight = make("input", rows, in_features), make("weight", out_features, in_features)
    bias, grad_output = make("bias", out_features), make("grad_output", rows, out_features)
    torch.testing.assert_close(
        *ours_and_torchs((input, weight, bias), grad_output, "relu"), rtol=1e-5, atol=2e-5
    )


@pytest.mark.usefixtures("every_kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_gradient_whose_rows_overlap(device, dtype, activation):
    """Both of its strides are 1: it lies as ReLU's output does, and as its transpose does."""
    tensors = [torch.randn(shape).to(dtype) for shape in ((9, 3), (2, 3), (2,))]
    overlapping = torch.randn(10).to(dtype).as_strided((9, 2), (1, 1))
    ours, same = [
        forward_and_gradients(functional.linear, tensors, grad_output, activation)
        for grad_output in (overlapping, overlapping.contiguous())
    ]
    torch.testing.assert_close(ours, same)


def test_column_major_operands_are_read_in_place(device):
    def copies(input, weight):
        input, weight = input.requires_grad_(), weight.requires_grad_()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            torch.autograd.grad(functional.linear(input, weight), (input, weight), torch.ones(9, 7))
        return sum(event.name == "aten::clone" for event in profile.events())

    assert copies(column_major(torch.randn(9, 5)), column_major(torch.randn(7, 5))) == 0
    # Neither way: each pass copies on the CPU; CUDA kernels read any two strides.
    expected = 0 if "cuda" in device else 2
    assert copies(torch.randn(9, 10)[:, ::2], torch.randn(7, 5)) == expected


@pytest.mark.parametrize("rows", [3, 140])
def test_nan_and_inf_as_pytorch(device, rows):
    """ReLU lets NaN through, and its gradient passes where its output is NaN."""
    input = torch.randn(rows, 8)
    input[0, 0], input[1, 1], input[2, 2] = float("nan"), float("inf"), -float("inf")
    weight, bias = torch.randn(40, 8), torch.randn(40)
    grad_output = torch.randn(rows, 40)
    torch.testing.assert_close(
        *ours_and_torchs((input, weight, bias), grad_output, "relu"),
        rtol=1e-5,
        atol=1e-5,
        equal_nan=True,
    )


def test_relu_gradient_at_zero_is_zero(device):
    input = torch.zeros(2, 3, requires_grad=True)
    weight = torch.ones(4, 3, requires_grad=True)
    functional.linear(input, weight, activation="relu").sum().backward()
    assert torch.equal(input.grad, torch.zeros(2, 3))


@pytest.mark.cpu_only("instructions of the CPU")
def test_half_dtypes_run_pytorchs_op_where_that_has_instructions_for_them():
    has_instructions = {
        torch.float32: False,
        torch.float64: False,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    for dtype, has in has_instructions.items():
        weight = torch.ones(4, 3, dtype=dtype, requires_grad=True)
        output = functional.linear(torch.ones(2, 3, dtype=dtype), weight)
        assert (type(output.grad_fn).__name__ == "LinearBackward") != has


def test_backward_op_with_overlapping_rows(device):
    """A grad_output whose rows overlap has two unit strides; its mask has one."""
    grad_output = torch.randn(40).as_strided((9, 21), (1, 1))
    input, weight, output = torch.randn(9, 5), torch.randn(21, 5), torch.randn(9, 21).relu()
    op = torch.ops.mnist_ext.linear_backward
    ours = op(grad_output, input, weight, output, True)
    torchs = op(grad_output.contiguous(), input, weight, output, True)
    torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("shape", [(), (1,), (1, 4), (2, 4)], ids=str)
def test_bias_that_is_broadcast_runs_pytorchs_op(shape):
    input, weight, bias = torch.randn(2, 3), torch.randn(4, 3), torch.randn(shape)
    assert torch.equal(functional.linear(input, weight, bias), F.linear(input, weight, bias))


@pytest.mark.parametrize("shape", [(2, 3), (2, 2, 3)], ids=str)
def test_bias_of_another_dtype_runs_pytorchs_op(shape):
    """That adds it to a product already made where input or bias is not contiguous."""
    input, weight = torch.randn(shape), torch.randn(4, 3)
    bias = torch.randn(8, dtype=torch.float64)[::2]
    if len(shape) == 2:
        with pytest.raises(RuntimeError, match="bias"):
            functional.linear(input, weight, bias)
    else:
        ours, torchs = functional.linear(input, weight, bias), F.linear(input, weight, bias)
        assert torch.equal(ours, torchs)
        assert ours.dtype is torchs.dtype is torch.float32


@pytest.mark.parametrize("layout", ["sparse", "sparse weight", "mkldnn", "nested"])
def test_other_layouts_run_pytorchs_op(layout):
    input, weight = torch.randn(2, 3), torch.randn(4, 3)
    if layout == "sparse":
        input = input.to_sparse()
    elif layout == "sparse weight":
        weight = weight.to_sparse()
    elif layout == "mkldnn":
        input, weight = input.to_mkldnn(), weight.to_mkldnn()
    else:
        input = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(1, 3)])
    ours, torchs = functional.linear(input, weight), F.linear(input, weight)
    assert ours.layout == torchs.layout
    if layout == "nested":
        torch.testing.assert_close(list(ours.unbind()), list(torchs.unbind()))
    else:
        torch.testing.assert_close(ours.to_dense(), torchs.to_dense())


def test_subclasses_are_asked():
    class Doubling(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return "mine" if function is F.linear else NotImplemented

    weight = torch.randn(4, 3).as_subclass(Doubling)
    assert functional.linear(torch.randn(2, 3), weight) == "mine"


def test_saves_only_what_the_backward_reads():
    """The weight may change after the forward if the input needs no gradient, and vice versa."""
    input, weight = torch.randn(5, 3), torch.randn(4, 3, requires_grad=True)
    output = functional.linear(input, weight)
    with torch.no_grad():
        weight.add_(1)
    output.sum().backward()
    torch.testing.assert_close(weight.grad, input.sum(0).expand(4, 3))

    input = torch.randn(5, 3, requires_grad=True)
    hidden = input * 1
    weight = torch.randn(4, 3)
    output = functional.linear(hidden, weight)
    hidden.detach().add_(1)
    output.sum().backward()
    torch.testing.assert_close(input.grad, weight.sum(0).expand(5, 3))


@pytest.mark.usefixtures("every_kernel")
@pytest.mark.cpu_only("conversions by the CPU's vectors; CUDA's are the compiler's")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("factor", [1.0, -1.171875, 0.33203125, 3.0e-3, 7.0e2], ids=str)
def test_half_dtypes_are_widened_and_rounded_exactly(device, dtype, factor):
    """Every bit pattern times a factor: exact in float32, so that one rounding is left."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    factor = torch.tensor([[factor]], dtype=dtype)
    zeros = torch.zeros(len(every), 1, dtype=dtype)
    product = (every.float() * factor.float()).to(dtype)
    for output, expected in [
        (functional.linear(every[:, None], factor).T, product),  # element by element
        (functional.linear(factor, every[:, None]), product),  # results in vectors
        (functional.linear(factor, zeros, every), every[None]),  # both ways in vectors
    ]:
        assert torch.equal(output.isnan(), expected.isnan())
        assert torch.equal(output.nan_to_num(0), expected.nan_to_num(0))
