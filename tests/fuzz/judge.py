"""When two results count as the same: docs/semantics.md in numbers.

An error is measured against float64, in units of `magnitude`: what the result would be if nothing
cancelled, all terms of its sums being positive. So it says how much was rounded, whatever is left
of the sum. Ours may be twice PyTorch's own, and never needs to be less than some roundings: sums
here are so short that PyTorch often makes none.
"""

import torch
from torch import Tensor

FLOOR = 8.0  # roundings, in units of the dtype's epsilon


def is_same(a: Tensor, b: Tensor) -> Tensor:
    """Return where both are the same number, or both NaN."""
    return (a == b) | (a.isnan() & b.isnan())


def judge(ours, theirs, truth, magnitude, dtype=None, slack=0.0, is_any_infinity=False) -> None:
    """Assert that ours is as accurate as PyTorch's, inf and NaN in its places.

    dtype: in which sums are rounded, where that is not the result's, as under autocast. slack: of
    the smallest normal number, what underflow may cost. is_any_infinity: NaN is as good as inf.
    """
    assert type(ours) is type(theirs)
    if theirs is None:
        return
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    infos = torch.finfo(ours.dtype), torch.finfo(dtype or ours.dtype)
    eps, largest = max(i.eps for i in infos), min(i.max for i in infos)
    # Halves are computed in float32.
    normal = min(infos[0].smallest_normal, torch.finfo(torch.float32).smallest_normal)
    our, their = ours.double(), theirs.double()
    same = is_same(our, their)
    if same.all():
        return
    # Where nothing can have overflowed on the way, whatever the order of the additions.
    sure = magnitude < largest / 8
    our_error, their_error = (our - truth).abs(), (their - truth).abs()
    # PyTorch's in float64 is the truth itself, and makes as many roundings as ours.
    floor = FLOOR * eps * (2 if ours.dtype == torch.float64 else 1)
    relative = (their_error / magnitude)[sure & (magnitude > 0) & their_error.isfinite()]
    allowed = max(2 * relative.max().item(), floor) if relative.numel() else floor
    underflow = slack * normal + 2 * max(i.smallest_normal * i.eps for i in infos)
    good = our_error <= allowed * magnitude + underflow
    wrong = sure & ~(good | same | is_same(our, truth))
    assert not wrong.any(), f"{_some(wrong, ours, theirs, truth, magnitude)}, allowed {allowed:.2g}"
    # Elsewhere inf and NaN go in, and come out in the same places; or something overflows in one
    # order of additions and not in another.
    overflows = magnitude.isfinite() & ~sure
    near = our_error <= 256 * eps * _scale(truth)
    good = sure | overflows | same | near | is_same(our, truth)
    if is_any_infinity:
        good |= ~(our.isfinite() | their.isfinite())
    wrong = ~good
    assert not wrong.any(), _some(wrong, ours, theirs, truth, magnitude)


def judge_loosely(ours, theirs, truth, dtype=None, largest=0.0) -> None:
    """Assert the same without magnitudes: within many roundings of the largest number.

    largest: one of what went in that truth, where all cancels, does not show.
    """
    assert type(ours) is type(theirs)
    if theirs is None:
        return
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    if truth.numel() == 0:
        return
    if not ours.dtype.is_floating_point:
        assert torch.allclose(ours, theirs, rtol=1e-4, equal_nan=True)
        return
    our, their = ours.double(), theirs.double()
    scale = max(_scale(truth), largest)
    error = ((their - truth).abs().nan_to_num(0, 0, 0).max() / scale).item()
    allowed = max(
        4 * error, 256 * max(torch.finfo(d).eps for d in (ours.dtype, dtype or ours.dtype))
    )
    wrong = ~(is_same(our, their) | is_same(our, truth) | ((our - truth).abs() <= allowed * scale))
    assert not wrong.any(), f"{_some(wrong, ours, theirs, truth, truth)}, allowed {allowed:.2g}"


def _scale(truth: Tensor) -> float:
    return 1 + largest_of(truth)


def largest_of(tensor: Tensor) -> float:
    """Return the largest magnitude that is finite; 0 where there is none."""
    return tensor.abs().nan_to_num(0, 0, 0).max().item() if tensor.numel() else 0.0


def _some(where: Tensor, ours, theirs, truth, magnitude) -> str:
    index = tuple(where.nonzero()[0].tolist())
    values = [t[index].item() for t in (ours, theirs, truth, magnitude)]
    return "at {}: ours {!r}, PyTorch's {!r}, in float64 {!r}, magnitude {!r}".format(
        index, *values
    )
