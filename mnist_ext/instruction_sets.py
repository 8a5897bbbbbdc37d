"""The instruction sets that this CPU can run."""

from collections.abc import Iterator

import mnist_ext._library  # noqa: F401  (before _C: it says what to do where that is missing)
from mnist_ext import _C


def in_turn() -> Iterator[str]:
    """Have the kernels use each in turn, until the next one is asked for; then that of before."""
    before, reason = _C.active_isa(), _C.active_isa_reason()
    try:
        for isa in _C.available_isas():
            _C.set_isa(isa)
            yield isa
    finally:
        _C.set_isa(before, reason)
