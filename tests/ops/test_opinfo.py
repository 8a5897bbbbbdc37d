"""PyTorch's own sample calls of the two functions and modules, run on ours."""

import itertools

import pytest
import torch
from op_cases import FLOATS

import mnist_ext
from mnist_ext import functional

pytest.importorskip("expecttest", reason="torch's own samples import it")
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

pytestmark = pytest.mark.usefixtures("every_kernel")

OPS = {
    op.name: (op, getattr(functional, op.name.removeprefix("nn.functional.")))
    for op in op_db
    if op.name
    in (
        "nn.functional.linear",
        "nn.functional.cross_entropy",
        "nn.functional.linear_cross_entropy",  # from torch 2.13 on
    )
    and not op.variant_test_name
}
MODULES = {
    info.name: (info, getattr(mnist_ext.nn, info.name.removeprefix("nn.")))
    for info in module_db
    if info.name in ("nn.Linear", "nn.CrossEntropyLoss", "nn.LinearCrossEntropyLoss")
}


HEADS = ("nn.functional.linear_cross_entropy", "nn.LinearCrossEntropyLoss")


def place() -> str:
    return torch.empty(0).device.type


def value_and_gradients(function, tensors):
    """Return the value and the gradients of all tensors that want one, first and second."""
    value = function()
    wanted = [t for t in tensors if isinstance(t, torch.Tensor) and t.requires_grad]
    if not wanted:
        return [value]
    torch.manual_seed(0)
    grad_output = torch.randn_like(value)
    grads = torch.autograd.grad(value, wanted, grad_output, create_graph=True)
    again = [g for g in grads if g.requires_grad]
    second = torch.autograd.grad(
        again, wanted, [torch.randn_like(g) for g in again], allow_unused=True
    )
    return [value.detach(), *(g.detach() for g in grads), *second]


def assert_same(ours, torchs):
    for our, their in zip(ours, torchs, strict=True):
        assert (our is None) == (their is None)
        if our is not None:
            half = our.dtype.itemsize == 2
            tolerance = {"rtol": 3e-2, "atol": 3e-2} if half else {}
            torch.testing.assert_close(our, their, **tolerance, equal_nan=True)


def each_dtype(names):
    """Pair each name with each dtype, but for bfloat16 logits, which PyTorch alone rounds."""
    for name, dtype in itertools.product(names, FLOATS):
        if dtype != torch.bfloat16 or name not in HEADS:
            yield name, dtype


@pytest.mark.parametrize(("name", "dtype"), [*each_dtype(OPS)], ids=str)
def test_samples(device, name, dtype):
    op, ours = OPS[name]
    samples = list(op.sample_inputs(place(), dtype, requires_grad=True))
    assert len(samples) > 10
    for sample in samples:
        arguments = (sample.input, *sample.args)
        assert_same(
            *(
                value_and_gradients(
                    lambda f=f, s=sample: f(s.input, *s.args, **s.kwargs),
                    [*arguments, *sample.kwargs.values()],
                )
                for f in (ours, op.op)
            )
        )


@pytest.mark.cpu_only("modules call the functions above")
@pytest.mark.parametrize(("name", "dtype"), [*each_dtype(MODULES)], ids=str)
def test_module_samples(name, dtype):
    """The same arguments for constructor and forward."""
    info, ours = MODULES[name]
    inputs = info.module_inputs_func(
        info, device=place(), dtype=dtype, requires_grad=True, training=True
    )
    assert inputs
    for sample in inputs:
        if sample.constructor_input is None:
            continue
        if sample.constructor_input.kwargs.get("options"):  # PyTorch has no second gradient there
            continue
        results = []
        for cls in (ours, info.module_cls):
            torch.manual_seed(0)
            constructor, forward = sample.constructor_input, sample.forward_input
            module = cls(*constructor.args, **constructor.kwargs).to(dtype)
            results.append(
                value_and_gradients(
                    lambda m=module, f=forward: m(*f.args, **f.kwargs),
                    [*forward.args, *module.parameters()],
                )
            )
        assert_same(*results)
