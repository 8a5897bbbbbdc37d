"""Random tensors: how their numbers lie in memory, and what the numbers are."""

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from mnist_ext import _C

INF, NAN = math.inf, math.nan
SIZES = [2, 3, 1, 0, 4, 5, 7, 8, 9, 16, 17, 33]
size = st.sampled_from([2, 3, 3, 5, *SIZES])
dtypes = st.sampled_from(
    [torch.float32, torch.float64, torch.float32, torch.bfloat16, torch.float16]
)
isas = st.sampled_from([name for name in reversed(_C.available_isas()) if name != "amx"])

# What the numbers of a tensor are. One call has finite ones, or those that are not with numbers of
# ordinary size: of infinity and what overflows, the order of additions makes infinity or NaN.
FINITE = st.sampled_from(["normal"] * 6 + ["integers", "large", "huge", "tiny", "zero"])
SPECIAL = st.sampled_from(["normal"] * 3 + ["integers", "zero", "special", "special", "special"])
values = st.one_of(FINITE, SPECIAL)


def numbers(count: int, kind: str, dtype: torch.dtype, random: torch.Generator) -> Tensor:
    """Return count numbers of a kind."""
    info = torch.finfo(dtype)
    normal = torch.randn(count, generator=random, dtype=torch.float64)
    if kind == "integers":
        return (normal * 1.5).round().to(dtype)
    if kind == "zero":
        return torch.zeros(count, dtype=dtype).copysign(normal.to(dtype))
    # The product of two huge numbers is none too large, nor are some dozens of them.
    huge = math.sqrt(info.max) / 16
    factor = {"large": 100.0, "huge": huge, "tiny": info.smallest_normal}.get(kind, 1.0)
    drawn = (normal * factor).to(dtype)
    if kind == "special" and count:
        choices = [INF, -INF, NAN, info.smallest_normal / 4, 0.0, -0.0]
        which = torch.randint(len(choices), (3,), generator=random)
        where = torch.randint(count, (3,), generator=random)
        drawn[where] = torch.tensor(choices, dtype=dtype)[which]
    return drawn


def _reversed(t: Tensor) -> Tensor:
    return t.permute(*range(t.dim())[::-1]).contiguous().permute(*range(t.dim())[::-1])


def _offset(t: Tensor) -> Tensor:
    return torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape)


def _within(t: Tensor, dim: int, step: int) -> Tensor:
    """Return t as a part of something larger, filled with NaN."""
    shape = list(t.shape)
    shape[dim] = shape[dim] * step + 2
    part = t.new_full(shape, NAN if t.is_floating_point() else 99).narrow(
        dim, 1, t.shape[dim] * step
    )
    part = part[(slice(None),) * (dim % t.dim()) + (slice(None, None, step),)]
    return part.copy_(t)


LAYOUTS = {
    "contiguous": lambda t: t,
    "offset": _offset,
    "reversed": _reversed,
    "last dimension first": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1),
    "classes last": lambda t: (
        t.movedim(min(1, t.dim() - 1), -1).contiguous().movedim(-1, min(1, t.dim() - 1))
    ),
    "every other column": lambda t: _within(t, -1, 2),
    "every other row": lambda t: _within(t, 0, 2),
    "cropped": lambda t: _within(t, -1, 1),
    "expanded rows": lambda t: t[:1].expand(t.shape),
    "expanded columns": lambda t: t[..., :1].expand(t.shape),
    "expanded": lambda t: t.flatten()[0].expand(t.shape),
    "overlapping": lambda t: t.flatten().as_strided(t.shape, (1,) * t.dim()),
}


def laid_out(t: Tensor, layout: str) -> Tensor:
    return LAYOUTS[layout](t) if t.numel() and t.dim() else t


layouts = st.sampled_from(["contiguous"] * 6 + [*LAYOUTS])


def tensor(shape, dtype, kind, layout, seed, makes="numbers") -> Tensor:
    """Return the same tensor each time.

    makes: "numbers", "positive" ones, or "probabilities" of classes; of other dtypes than floating
    ones small whole numbers.
    """
    random = torch.Generator().manual_seed(seed)
    if not dtype.is_floating_point:
        return laid_out(torch.randint(0, 3, shape, generator=random).to(dtype), layout)
    made = numbers(math.prod(shape), kind, dtype, random).view(shape)
    if makes == "positive":
        made = made.abs()
    elif makes == "probabilities" and made.dim():
        made = made.float().softmax(min(1, made.dim() - 1)).to(dtype)
    return laid_out(made, layout)
