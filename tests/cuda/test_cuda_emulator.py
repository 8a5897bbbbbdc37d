"""What the emulator of tests/emulator notices."""

import emulated
import pytest


@pytest.fixture(autouse=True)
def usual_order():
    yield
    emulated.reset()


def results(function, *arguments):
    """Call one of tests/emulator/mistakes.h in several orders of threads."""
    found = set()
    for seed in range(5):
        emulated.set_seed(seed)
        found.add(function(*arguments))
    return found


def test_a_missing_barrier():
    assert results(emulated.sum_of_neighbours, 1) == {64 * 63 // 2}
    assert len(results(emulated.sum_of_neighbours, 0)) > 1


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("deadlock", "barrier is not reached"),
        ("overflow", "beyond its 64 bytes"),
        ("misaligned", "not aligned"),
        ("misaligned_copy", "not aligned"),
        ("copy_beyond", "beyond shared memory"),
    ],
)
def test_what_cannot_be(mistake, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(emulated, mistake)()


def test_a_copy_that_is_not_waited_for():
    assert results(emulated.sum_of_copies, 1, 0) == {64 * 63 // 2}
    assert results(emulated.sum_of_copies, 0, 0) == {-64}


def test_a_missing_barrier_behind_a_copy():
    assert len(results(emulated.sum_of_copies, 1, 1)) > 1
