"""torch.autocast: the dtypes of PyTorch's ops, by our kernels."""

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate
from op_cases import FEW, FLOATS, value_and_gradients, with_gradients

import mnist_ext
from mnist_ext import _decision, functional

pytestmark = pytest.mark.usefixtures("every_kernel")

LOW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", FEW, ids=str)
def test_autocast_gives_pytorchs_dtypes(case, dtype, low):
    ours, torchs = (
        value_and_gradients(under_autocast(function, low), case, case.tensors(dtype))
        for function in (case.ours, case.torchs)
    )
    torch.testing.assert_close(ours, torchs, atol=1e-2, rtol=2e-2)


def test_autocast_runs_the_fused_cross_entropy():
    logits = torch.randn(4, 3, dtype=torch.bfloat16, requires_grad=True)
    with autocast(torch.bfloat16):
        loss = mnist_ext.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0]))
    assert loss.dtype == torch.float32
    assert type(loss.grad_fn).__name__ == "CrossEntropyBackward"


def autocast(dtype=None, **options):
    """Switch on autocast of the kind of device where tensors are made."""
    return torch.autocast(torch.empty(0).device.type, dtype, **options)


def layer(*dtypes):
    """Return input, weight and bias."""
    shapes = [(33, 40), (24, 40), (24,)]
    return [torch.randn(shape).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=False)]


def results(function, tensors):
    """Return value and gradients; the backward runs outside of function's autocast."""
    leaves, wanted = with_gradients(tensors, range(len(tensors)))
    value = function(*leaves)
    grad_output = torch.linspace(0, 1, value.numel()).view(value.shape).to(value.dtype)
    return [value, *torch.autograd.grad(value, wanted, grad_output)]


def under_autocast(linear, dtype, **options):
    def run(*tensors):
        with autocast(dtype, **options):
            return linear(*tensors)

    return run


def assert_as_pytorch(around, tensors):
    """Compare with F.linear in the same contexts: dtypes, and errors against float64."""
    ours = results(around(functional.linear), tensors)
    torchs = results(around(F.linear), tensors)
    cast = [t.to(torchs[0].dtype) for t in tensors]  # what PyTorch's kernels get, too
    truth = results(F.linear, [t.double() for t in cast])
    assert_as_accurate(ours, torchs, truth)
    assert type(ours[0].grad_fn).__name__ == "LinearBackward"
    return ours


F32, F64 = torch.float32, torch.float64


class TestLinear:
    @pytest.mark.parametrize("low", LOW, ids=str)
    @pytest.mark.parametrize(
        "dtypes", [(F32, F32), (F32, F32, F32), (*LOW, F32), (F32, *LOW), (F64, F64, F64)], ids=str
    )
    def test_dtypes(self, dtypes, low):
        """All but float64 are cast, whatever they were; gradients come back in their dtypes."""
        found = assert_as_pytorch(lambda linear: under_autocast(linear, low), layer(*dtypes))
        assert [r.dtype for r in found] == [F64 if F64 in dtypes else low, *dtypes]

    def test_nested_and_switched_off(self):
        def inner(linear, **options):
            def run(*tensors):
                with autocast(torch.bfloat16), autocast(**options):
                    return linear(*tensors)

            return run

        float32 = layer(F32, F32, F32)
        off = assert_as_pytorch(lambda linear: inner(linear, enabled=False), float32)
        assert off[0].dtype == F32
        other = assert_as_pytorch(lambda linear: inner(linear, dtype=torch.float16), float32)
        assert other[0].dtype == torch.float16
        never = under_autocast(functional.linear, torch.bfloat16, enabled=False)
        assert all(torch.equal(a, b) for a, b in zip(results(never, float32), off, strict=True))

    def test_the_other_devices_autocast_changes_nothing(self):
        if torch.empty(0).is_cuda:
            other = "cpu"
        else:
            other = "cuda"
            torch.set_autocast_enabled("cuda", True)  # as torch.autocast does where there is a GPU
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled=other == "cpu"):
                assert functional.linear(*layer(F32, F32)).dtype == F32
        finally:
            torch.set_autocast_enabled("cuda", False)

    def test_second_derivatives(self):
        found = []
        for linear in (functional.linear, F.linear):
            leaves, wanted = with_gradients(layer(F32, F32), range(2))
            with autocast(torch.bfloat16):
                value = linear(*leaves)
            first = torch.autograd.grad(value.float().square().sum(), wanted, create_graph=True)
            second = torch.autograd.grad(sum(g.square().mean() for g in first), wanted)
            found.append([*first, *second])
            torch.manual_seed(0)
        torch.testing.assert_close(*found, rtol=5e-2, atol=5e-1)

    @pytest.mark.parametrize(
        "dtypes", [(F64, F32), (F32, F64), (torch.int64, F32), (F32, torch.complex64)], ids=str
    )
    def test_what_does_not_fit_together_raises(self, dtypes):
        for linear in (functional.linear, F.linear):
            with pytest.raises(RuntimeError):
                under_autocast(linear, torch.bfloat16)(*layer(*dtypes))


@pytest.mark.parametrize("inside", [False, True])
def test_compiled(inside):
    def forward(*tensors):
        if inside:
            with autocast(torch.bfloat16):
                return functional.linear(*tensors)
        return functional.linear(*tensors)

    tensors = layer(F32, F32, F32)
    eager = results(under_autocast(functional.linear, torch.bfloat16), tensors)
    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    run = compiled if inside else under_autocast(compiled, torch.bfloat16)
    torch.testing.assert_close(results(run, tensors), eager, rtol=0, atol=0)


def test_linear_runs_pytorchs_op_where_that_is_the_faster_one(monkeypatch):
    """As without autocast: on the CPU where oneDNN has instructions for the dtype."""
    monkeypatch.setattr(_decision, "LINEAR_DTYPES", (F32, F64))
    tensors = [t.requires_grad_() for t in layer(F32, F32)]
    value = under_autocast(functional.linear, torch.bfloat16)(*tensors)
    assert value.dtype == torch.bfloat16
    assert type(value.grad_fn).__name__ != "LinearBackward"
