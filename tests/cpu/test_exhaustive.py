"""exp, log, tanh and the conversions of bfloat16 and float16: some of the inputs of each range.

All of them: `make exhaustive`.
"""

import exhaustive
import pytest


@pytest.mark.parametrize("isa", exhaustive.isas())
def test_errors_are_within_their_bounds(isa, tmp_path):
    rows = exhaustive.measure(isa, tmp_path, step=1009)
    assert {row.what for row in rows} > set(exhaustive.BOUNDS)
    assert [row for row in rows if not row.is_right] == []
