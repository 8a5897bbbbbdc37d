"""Products of float32 on the matrix unit of a CPU, as planes of bfloat16: on AMX, and on a model.

Sizes are such that the unit is used: csrc/cpu/product/amx_gemm.h, use_amx.
"""

import amx_model
import devices
import pytest
import torch
from accuracy import assert_as_accurate
from torch.nn import functional as F

import mnist_ext
from mnist_ext import _C, _autograd
from mnist_ext.functional import linear


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    has = _C.available_isas()
    no_amx = pytest.mark.skipif("amx" not in has, reason="needs a CPU with AMX")
    no_avx512 = pytest.mark.skipif("avx512" not in has, reason="needs a CPU with AVX-512")
    metafunc.parametrize(
        "device",
        [pytest.param("amx", marks=no_amx), pytest.param("model", marks=no_avx512)],
        indirect=True,
    )


@pytest.fixture(autouse=True)
def device(request):
    name = amx_model.register() if request.param == "model" else request.param
    with devices.use(name):
        yield name


def test_registered_kernels_are_none_of_the_cpus(device):
    assert _C.active_isa() == device
    assert (device in _C.available_isas()) == (device == "amx")


def forward_and_gradients(function, input, weight, bias, grad_output):
    leaves = [t.detach().requires_grad_() for t in (input, weight, bias)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_output)]


def operands(batch, inputs, outputs, scale=1.0):
    made = (
        torch.randn(batch, inputs) * scale,
        torch.randn(outputs, inputs),
        torch.randn(outputs),
        torch.randn(batch, outputs),
    )
    return made, [t.double() for t in made]


@pytest.mark.parametrize("activation", ["none", "relu"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("batch", "inputs", "outputs"),
    [
        (128, 128, 128),
        (131, 200, 177),  # tails in each dimension
        (1100, 130, 161),  # several packed blocks of rows, several blocks of K in the gradients
        (150, 300, 129),
    ],
)
def test_at_least_as_accurate_as_pytorch(batch, inputs, outputs, transposed, activation):
    made, truth = operands(batch, inputs, outputs)
    if transposed:
        made = [t.t().contiguous().t() if t.dim() == 2 else t for t in made]
    activated = F.relu if activation == "relu" else lambda t: t
    ours = forward_and_gradients(lambda *t: linear(*t, activation=activation), *made)
    torchs = forward_and_gradients(lambda *t: activated(F.linear(*t)), *made)
    exact = forward_and_gradients(lambda *t: activated(F.linear(*t)), *truth)
    assert_as_accurate(ours, torchs, exact, factor=1.0, floor=2.0)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_less_than_float32_where_it_is_allowed(precision, monkeypatch):
    """Three products instead of six: 16 bits of each factor."""
    made, truth = operands(200, 300, 160)
    exact = forward_and_gradients(F.linear, *truth)
    monkeypatch.setattr(_autograd, "_USES_AMX", True)  # as with MNIST_EXT_ISA=amx
    torch.set_float32_matmul_precision(precision)
    try:
        ours = forward_and_gradients(linear, *made)
    finally:
        torch.set_float32_matmul_precision("highest")
    for got, true in zip(ours[:3], exact, strict=False):
        error = (got - true).abs().max() / true.abs().max()
        assert 2**-22 < error < 2**-17


def test_the_unit_is_used():
    """Else the other tests here would show nothing: its sums differ from those of AVX-512."""
    input, weight = torch.randn(200, 300), torch.randn(200, 300)
    by_amx = linear(input, weight)
    _C.set_isa("avx512")
    assert not torch.equal(by_amx, linear(input, weight))


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
@pytest.mark.parametrize(
    "special",
    [float("inf"), float("-inf"), float("nan"), 3.4e38, 1e37, 1e20, 1e-30, 1e-42, 0.0],
    ids=str,
)
def test_numbers_that_bfloat16_planes_do_not_hold(special, scale):
    """A row of them, and one among others: as in float32."""
    (input, weight, bias, _), _ = operands(160, 300, 160)
    input[3] = special
    input[70, 280] = special
    weight = weight.abs() * scale  # so that no order of summation adds inf to -inf
    ours = linear(input, weight, bias, activation="relu")
    torchs = F.linear(input, weight, bias).relu()
    exact = F.linear(input.double(), weight.double(), bias.double()).relu()
    assert torch.equal(ours.isnan(), torchs.isnan())
    assert torch.equal(ours.isinf(), torchs.isinf())
    for row in (3, 70, 100):
        finite = torchs[row].isfinite()
        assert_as_accurate(ours[row][finite], torchs[row][finite], exact[row][finite])


def test_rows_of_very_different_size():
    """A small row is as accurate, in its own units, as a large one."""
    (input, weight, _, _), _ = operands(160, 160, 160)
    input *= torch.logspace(-12, 12, 160).unsqueeze(1)
    ours, torchs = linear(input, weight), F.linear(input, weight)
    exact = F.linear(input.double(), weight.double())
    for rows in zip(ours, torchs, exact, strict=True):
        assert_as_accurate(*rows)


def test_bits_do_not_depend_on_threads():
    (input, weight, bias, grad), _ = operands(300, 260, 200)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            results.append(forward_and_gradients(linear, input, weight, bias, grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("batch", [160, 300])  # updates applied block by block, and from memory
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 1e-3, "nesterov": True}])
@pytest.mark.parametrize("tiny", [False, True])  # gradients that go by fused multiply-add
def test_train_step(batch, options, tiny):
    images, labels = torch.randn(batch, 200), torch.randint(10, (batch,))
    if tiny:
        images[:, 3] = 1e-30

    def weights(dtype, train_step):
        torch.manual_seed(1)
        layers = torch.nn.Linear(200, 160), torch.nn.ReLU(), torch.nn.Linear(160, 10)
        model = torch.nn.Sequential(*layers).to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **options)
        criterion = torch.nn.CrossEntropyLoss()
        x = images.to(dtype)
        step = mnist_ext.TrainStep(model, criterion, optimizer) if train_step else None
        for _ in range(3):
            if step:
                step(x, labels)
                continue
            optimizer.zero_grad()
            criterion(model(x), labels).backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    ours, torchs = weights(torch.float32, True), weights(torch.float32, False)
    assert_as_accurate(ours, torchs, weights(torch.float64, False))
