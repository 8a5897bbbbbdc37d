"""Every case of both ops, against PyTorch: values and gradients in every dtype, on every ISA."""

import pytest
import torch
from accuracy import assert_as_accurate
from op_cases import CASES, FLOATS, NARROW_INDICES, value_and_gradients


def random_grad_output(case, tensors) -> torch.Tensor:
    value = case.torchs(*tensors)
    torch.manual_seed(1)
    return torch.randn(value.shape)


@pytest.mark.usefixtures("every_kernel")
@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(device, case, dtype):
    """Our error against float64 is at most twice PyTorch's own; shapes and dtypes are PyTorch's.

    Four roundings are always allowed, of two ops in one eight: these sums are so short that PyTorch
    often makes none.
    """
    floor = 8 if case.op == "linear_cross_entropy" else 4
    tensors = case.tensors(dtype)
    grad_output = random_grad_output(case, tensors).to(dtype)
    ours = value_and_gradients(case.ours, case, tensors, grad_output)
    torchs = value_and_gradients(case.torchs, case, tensors, grad_output)
    doubles = [t.double() if t is not None and t.is_floating_point() else t for t in tensors]
    truth = value_and_gradients(case.torchs, case, doubles, grad_output.double())
    for our, their, true in zip(ours, torchs, truth, strict=True):
        assert our.dtype == their.dtype
        assert our.shape == their.shape
        assert_as_accurate(our, their, true, floor=floor)


@pytest.mark.parametrize("case", NARROW_INDICES, ids=str)
def test_int32_and_uint8_targets(device, case):
    """The same bits as with int64."""
    logits, target, weight = case.tensors(torch.float32)
    assert target.dtype in (torch.int32, torch.uint8)
    ours = value_and_gradients(case.ours, case, [logits, target, weight])
    wide = value_and_gradients(case.ours, case, [logits, target.long(), weight])
    assert all(torch.equal(a, b) for a, b in zip(ours, wide, strict=True))
