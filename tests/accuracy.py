"""How the tests judge rounding: against the truth in float64, in units of PyTorch's own error."""

import torch
from torch import Tensor


def assert_as_accurate(ours, torchs, truth, factor: float = 2.0, floor: float = 2.0) -> None:
    """Assert that our largest error is at most `factor` times PyTorch's own: of a tensor, or each.

    Errors are relative to the largest magnitude of the truth. `floor`, in units of the dtype's
    epsilon, is the error that is always allowed: on tiny shapes PyTorch is sometimes exact by luck.
    """
    if not isinstance(ours, Tensor):
        for each in zip(ours, torchs, truth, strict=True):
            assert_as_accurate(*each, factor, floor)
        return
    assert ours.shape == torchs.shape
    assert ours.dtype == torchs.dtype
    if truth.numel() == 0:
        return
    scale = truth.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    error = ((ours.double() - truth).abs().max() / scale).item()
    torchs_error = ((torchs.double() - truth).abs().max() / scale).item()
    allowed = max(factor * torchs_error, floor * torch.finfo(ours.dtype).eps)
    assert error <= allowed, f"error {error:.3g}, PyTorch's {torchs_error:.3g}"
