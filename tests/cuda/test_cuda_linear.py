"""The CUDA kernels of linear: on the emulator of tests/emulator everywhere, and on a GPU.

First tests of the CPU kernels once more, imported: their fixture `isa` is another one here.
"""

import itertools
from dataclasses import dataclass

import emulated
import pytest
import torch
from accuracy import assert_as_accurate
from op_cases import FLOATS, LINEAR
from test_linear import (  # noqa: F401
    forward_and_gradients,
    reference,
    same_sign,
    test_any_strides,
    test_leading_dimensions,
    test_nan_and_inf_as_pytorch,
    test_relu_gradient_at_zero_is_zero,
)
from test_semantics import test_values_and_gradients as values_and_gradients
from torch import Tensor

from mnist_ext import _autograd, functional


@pytest.fixture(params=emulated.KERNELS)
def isa(request):
    """Run the test on CUDA kernels instead of on each instruction set."""
    yield from emulated.kernels(request)


# Every case in one dtype after the other.
@pytest.mark.parametrize(
    ("case", "dtype"), list(zip(LINEAR, itertools.cycle(FLOATS), strict=False)), ids=str
)
def test_values_and_gradients(isa, case, dtype):
    values_and_gradients(isa, case, dtype)


@dataclass(frozen=True)
class Shape:
    """A layer, and how its forward is made on a device of so many multiprocessors."""

    rows: int
    in_features: int
    out_features: int
    multiprocessors: int
    plan: tuple[str, int]

    def __str__(self) -> str:
        return f"{self.plan[0]}-{self.plan[1]}"

    def tensors(self, dtype=torch.float32) -> list[Tensor]:
        """Return input, weight, bias and grad_output."""
        tensors = [
            torch.randn(self.rows, self.in_features),
            torch.randn(self.out_features, self.in_features),
            torch.randn(self.out_features),
            torch.randn(self.rows, self.out_features),
        ]
        tensors[3] *= same_sign(*tensors[:3])
        return [t.to(dtype) for t in tensors]


# Each tile, whole and with split depth; none of the sizes fills its last tile, and all rows are
# multiples of 16 bytes but those of 57.
SHAPES = [
    Shape(30, 40, 60, 132, ("small", 1)),
    Shape(30, 500, 57, 132, ("small", 32)),
    Shape(60, 36, 124, 1, ("medium", 1)),
    Shape(120, 600, 60, 2, ("medium", 2)),
    Shape(250, 36, 248, 1, ("large", 1)),
    Shape(120, 1200, 120, 4, ("large", 4)),
]


@pytest.fixture(params=SHAPES, ids=str)
def shape(request):
    return request.param


def on_its_device(shape: Shape) -> None:
    emulated.set_device(multiprocessors=shape.multiprocessors)
    assert emulated.linear_plan(shape.rows, shape.out_features, shape.in_features) == shape.plan


def product(tensors, transposed=(), moved=()):
    """Return output and gradients with some operands lying the other way round, or misaligned."""
    operands = []
    for i, tensor in enumerate(tensors):
        if i in transposed:
            tensor = tensor.t().contiguous().t()
        if i in moved:
            base = torch.empty(tensor.numel() + 1)[1:].as_strided(tensor.shape, tensor.stride())
            tensor = base.copy_(tensor)
            assert tensor.data_ptr() % 16 != 0
        operands.append(tensor)
    *layer, grad_output = operands
    return forward_and_gradients(functional.linear, layer, grad_output, "relu")


# Which of input, weight, bias and grad_output lie the other way round; which are misaligned.
LAYOUTS = [
    ((0,), ()),
    ((1,), ()),
    ((0, 1), ()),
    ((3,), ()),
    ((), (0, 1, 2, 3)),
    ((0, 3), (0, 1)),
]


class TestEveryTile:
    def test_accurate_in_every_layout(self, emulator, shape):
        """And the same bits in each: only the splits decide the order of the sums."""
        on_its_device(shape)
        tensors = shape.tensors()
        torchs = forward_and_gradients(reference, tensors[:3], tensors[3], "relu")
        doubles = [t.double() for t in tensors]
        truth = forward_and_gradients(reference, doubles[:3], doubles[3], "relu")
        first = product(tensors)
        for our, their, true in zip(first, torchs, truth, strict=True):
            assert_as_accurate(our, their, true, factor=3)
        for transposed, moved in LAYOUTS:
            for a, b in zip(first, product(tensors, transposed, moved), strict=True):
                assert torch.equal(a, b)

    def test_results_do_not_depend_on_the_order_of_threads(self, emulator, shape):
        """A barrier that is missing, or a copy that is not waited for, shows here."""
        on_its_device(shape)
        tensors = shape.tensors()
        first = product(tensors)
        for seed in (1, 2):
            emulated.set_seed(seed)
            for a, b in zip(first, product(tensors), strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("sizes", [(64, 130, 33), (7, 300, 10)], ids=str)
def test_error_within_pytorchs(isa, dtype, sizes):
    tensors = Shape(*sizes, 132, ("small", 1)).tensors(dtype)
    ours = forward_and_gradients(functional.linear, tensors[:3], tensors[3], "relu")
    torchs = forward_and_gradients(reference, tensors[:3], tensors[3], "relu")
    doubles = [t.double() for t in tensors]
    truth = forward_and_gradients(reference, doubles[:3], doubles[3], "relu")
    for our, their, true in zip(ours, torchs, truth, strict=True):
        assert_as_accurate(our, their, true, factor=2, floor=4 if dtype is torch.float64 else 2)


@pytest.mark.parametrize("wanted", list(itertools.product((False, True), repeat=3)), ids=str)
@pytest.mark.parametrize("relu", [False, True])
def test_each_gradient_alone(isa, wanted, relu):
    """The bias's gradient comes with the weight's, or from a kernel that makes nothing else."""
    need_input, need_weight, need_bias = wanted
    grad_output, input, weight = torch.randn(70, 13), torch.randn(70, 9), torch.randn(13, 9)
    output = torch.randn(70, 13).relu() if relu else None
    got = _autograd._linear_backward(
        grad_output,
        input if need_weight else None,
        weight if need_input else None,
        output,
        need_bias,
        False,
    )
    dy = grad_output.double()
    if relu:
        dy = torch.where(output <= 0, 0, dy)
    truth = dy @ weight.double(), dy.t() @ input.double(), dy.sum(0)
    for g, t, need in zip(got, truth, wanted, strict=True):
        assert (g is not None) == need
        if need:
            torch.testing.assert_close(g.double(), t, rtol=1e-5, atol=1e-5)


def test_sum_of_many_rows_is_exact_but_for_one_rounding(isa):
    """grad_bias is summed in double: no error grows with the batch."""
    grad_output = torch.rand(5000, 3)
    _, _, grad_bias = _autograd._linear_backward(grad_output, None, None, None, True, False)
    exact = grad_output.double().sum(0)
    torch.testing.assert_close(grad_bias.double(), exact, rtol=6e-8 + 1e-7, atol=0)


def test_what_lies_beside_the_operands_is_not_read(isa):
    """NaN all around them: whatever was read beyond an edge would spread."""
    wide = torch.full((41, 47), float("nan"))
    input, weight = wide.clone(), wide.clone()
    input[3:33, 5:42] = torch.randn(30, 37)
    weight[3:40, 5:42] = torch.randn(37, 37)
    tensors = input[3:33, 5:42], weight[3:40, 5:42], torch.randn(37)
    grad_output = wide.clone()
    grad_output[3:33, 5:42] = torch.randn(30, 37)
    for result in forward_and_gradients(
        functional.linear, tensors, grad_output[3:33, 5:42], "relu"
    ):
        assert result.isfinite().all()


@pytest.mark.parametrize("strides", [(-37, 1), (1, -37), (-1, 40), (0, -1), (2, -80)], ids=str)
def test_negative_strides(emulator, strides):
    """PyTorch has none; the contract of the kernels has."""
    rows, columns, depth = 35, 5, 33
    a = torch.randn(20_000)
    outer, inner = strides
    places = 10_000 + torch.arange(rows)[:, None] * outer + torch.arange(depth) * inner
    b, out = torch.randn(columns, depth), torch.empty(rows, columns)
    sums = torch.empty(rows)
    emulated.linear_product(a[10_000:], strides, b, out, sums)
    torch.testing.assert_close(out, a[places] @ b.t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums, a[places].sum(1), rtol=1e-5, atol=1e-5)


def test_launches(emulator):
    """One for the output, one for each product of the backward, one more where depth is split."""
    for sizes in ((64, 64, 10), (64, 784, 128)):
        rows, in_features, out_features = sizes
        products = [
            (rows, out_features, in_features),
            (rows, in_features, out_features),
            (out_features, in_features, rows),
        ]
        split = [emulated.linear_plan(*p)[1] > 1 for p in products]
        assert split == [in_features == 784, False, False]
        expected = [1 + split[0], 2]
        tensors = Shape(*sizes, 132, ("small", 1)).tensors()
        leaves = [t.requires_grad_() for t in tensors[:3]]
        before = emulated.launches()
        output = functional.linear(*leaves, activation="relu")
        between = emulated.launches()
        torch.autograd.grad(output, leaves, tensors[3])
        assert [between - before, emulated.launches() - between] == expected


class TestTf32:
    """torch's setting reaches the kernels, in forward and backward, as it is at that moment."""

    @pytest.fixture
    def told(self, emulator):
        """List what the ops were told, in their order."""
        told = []

        def listening(op):
            def run(*args):
                told.append(args[-1])
                return op(*args)

            return run

        matmul = torch.backends.cuda.matmul
        before = matmul.fp32_precision
        # Not the fixture monkeypatch, which is undone after `emulator` and would put its ops back.
        with pytest.MonkeyPatch.context() as patch:
            for name in ("_linear", "_linear_backward"):
                patch.setattr(_autograd, name, listening(getattr(_autograd, name)))
            yield told
        matmul.fp32_precision = before

    def test_the_setting_of_the_moment(self, told):
        input, weight = (torch.randn(n, 3, requires_grad=True) for n in (2, 4))
        settings = [
            lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", False),
            lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
            lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee"),
            lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
            lambda: torch.set_float32_matmul_precision("highest"),
            lambda: torch.set_float32_matmul_precision("high"),
        ]
        for strict, tf32 in zip(settings[::2], settings[1::2], strict=True):
            for first, second in ((strict, tf32), (tf32, strict)):
                first()
                output = functional.linear(input, weight)
                second()
                output.sum().backward()
                assert told[-2:] == [first is tf32, second is tf32]


def test_a_layer_in_tf32(emulator):
    """Many rows, on a device with wgmma: grad_input's weight is copied first, in one more launch.

    grad_weight has few rows here, so that mma.sync makes it, in parts of the depth.
    """
    sizes = 2048, 128, 136
    input, weight, bias, grad_output = Shape(*sizes, 132, ("small", 1)).tensors()
    before = emulated.launches()
    output = _autograd._linear(input, weight, bias, True, True)
    assert emulated.launches() - before == 1
    gradients = _autograd._linear_backward(grad_output, input, weight, output, True, True)
    assert emulated.launches() - before == 1 + 2 + 2
    x, w, b = (t.double() for t in (input, weight, bias))
    dy = torch.where(output <= 0, 0, grad_output).double()
    truth = torch.relu(x @ w.t() + b), dy @ w, dy.t() @ x, dy.sum(0)
    sizes = x.abs() @ w.abs().t(), dy.abs() @ w.abs(), dy.abs().t() @ x.abs()
    for result, true, size in zip((output, *gradients), truth, sizes, strict=False):
        assert ((result.double() - true).abs() <= 2**-9 * size).all()
        assert not torch.equal(result.double(), true)
    torch.testing.assert_close(gradients[2].double(), truth[3], rtol=1e-6, atol=1e-6)


# What only a device can show.


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "sizes", [(64, 784, 128), (64, 64, 10), (357, 789, 333), (2048, 1024, 1024)], ids=str
)
class TestOnGpu:
    def make(self, sizes, dtype):
        rows, in_features, out_features = sizes
        return [
            torch.randn(shape, device="cuda").to(dtype)
            for shape in (
                (rows, in_features),
                (out_features, in_features),
                (out_features,),
                (rows, out_features),
            )
        ]

    def run(self, tensors):
        return forward_and_gradients(functional.linear, tensors[:3], tensors[3], "relu")

    def test_the_host_never_waits(self, sizes, dtype):
        tensors = self.make(sizes, dtype)
        self.run(tensors)
        torch.cuda.set_sync_debug_mode("error")
        try:
            self.run(tensors)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_cuda_graph(self, sizes, dtype):
        tensors = self.make(sizes, dtype)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            self.run(tensors)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = self.run(tensors)
        tensors[0].copy_(torch.randn_like(tensors[0]))
        graph.replay()
        for a, b in zip(results, self.run(tensors), strict=True):
            assert torch.equal(a, b)

    def test_deterministic(self, sizes, dtype):
        tensors = self.make(sizes, dtype)
        first = self.run(tensors)
        for a, b in zip(first, self.run(tensors), strict=True):
            assert torch.equal(a, b)

    def test_error_within_cublas(self, sizes, dtype):
        tensors = self.make(sizes, dtype)
        tensors[3] *= same_sign(*tensors[:3])
        torchs = forward_and_gradients(reference, tensors[:3], tensors[3], "relu")
        doubles = [t.double() for t in tensors]
        truth = forward_and_gradients(reference, doubles[:3], doubles[3], "relu")
        for our, their, true in zip(self.run(tensors), torchs, truth, strict=True):
            assert_as_accurate(our, their, true, factor=1.1)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("sizes", [(357, 789, 333), (512, 512, 512), (2304, 1024, 2304)], ids=str)
def test_tf32_error_within_cublas(sizes, activation):
    """By mma.sync, by wgmma, and by that with operands copied first, where the GPU has it."""
    tensors = [t.cuda() for t in Shape(*sizes, 132, ("small", 1)).tensors()]
    doubles = [t.double() for t in tensors]
    # Where rounding to TF32 decides the sign before ReLU, gradients may rightly differ.
    tensors[3] *= reference(*doubles[:3], "none").abs() > 0.5
    doubles[3] = tensors[3].double()
    truth = forward_and_gradients(reference, doubles[:3], doubles[3], activation)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        ours, torchs = (
            forward_and_gradients(function, tensors[:3], tensors[3], activation)
            for function in (functional.linear, reference)
        )
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    for our, their, true in zip(ours, torchs, truth, strict=True):
        assert_as_accurate(our, their, true, factor=1.1)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements_on_gpu():
    input = torch.randn(2**31 // 4096 + 3, 4096, dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(16, 4096, dtype=torch.bfloat16, device="cuda")
    output = functional.linear(input, weight)
    expected = input[-4:].float() @ weight.float().t()
    torch.testing.assert_close(output[-4:].float(), expected, rtol=1e-2, atol=1e-1)
