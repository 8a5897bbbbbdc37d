"""What the emulator of tests/emulator notices, and single tensor-core instructions on it.

What each lane of a fragment holds is stated here once more, beside the emulator and the kernels.
"""

import emulated
import pytest
import torch

TENSOR_CORES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True)
def usual_order():
    yield
    emulated.reset()


def results(function, *arguments):
    """Call one of tests/emulator/mistakes.cpp in several orders of threads."""
    found = set()
    for seed in range(5):
        emulated.set_seed(seed)
        found.add(getattr(emulated.library(), function)(*arguments))
    return found


def test_a_missing_barrier():
    assert results("emulator_sum_of_neighbours", 1) == {64 * 63 // 2}
    assert len(results("emulator_sum_of_neighbours", 0)) > 1


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("deadlock", b"barrier is not reached"),
        ("overflow", b"beyond its 64 bytes"),
        ("misaligned", b"not aligned"),
        ("misaligned_copy", b"not aligned"),
        ("copy_beyond", b"beyond shared memory"),
    ],
)
def test_what_cannot_be(mistake, message):
    assert message in emulated.error_of(f"emulator_{mistake}")


def test_a_copy_that_is_not_waited_for():
    assert results("emulator_sum_of_copies", 1, 0) == {64 * 63 // 2}
    assert results("emulator_sum_of_copies", 0, 0) == {-64}


def test_a_missing_barrier_behind_a_copy():
    assert len(results("emulator_sum_of_copies", 1, 1)) > 1


def test_a_cluster_that_does_not_wait():
    assert results("emulator_sum_of_cluster", 1) == {4 * (0 + 1 + 2 + 3)}
    assert results("emulator_sum_of_cluster", 0) != {4 * (0 + 1 + 2 + 3)}


def test_a_block_far_behind_the_others():
    """They have hundreds of waits to do before they would get in its way."""
    assert results("emulator_sum_before_overtaking", 1) == {4 * 32}
    assert results("emulator_sum_before_overtaking", 0) != {4 * 32}


def name(dtype):
    return str(dtype).removeprefix("torch.")


LANE = torch.arange(32)
GROUP, IN_GROUP = (LANE // 4)[:, None], (LANE % 4)[:, None]


@pytest.mark.parametrize("dtype", TENSOR_CORES, ids=name)
def test_fragments_of_mma(dtype):
    """PTX ISA 9.7.14.5.8 (m16n8k16) and 9.7.14.5.6 (m16n8k8, TF32): d += a @ b."""
    if dtype == torch.float32:
        i = torch.arange(4)
        row_a, column_a = GROUP + 8 * (i % 2), IN_GROUP + 4 * (i // 2)
        row_b, column_b = IN_GROUP + 4 * torch.arange(2), GROUP.expand(32, 2)
        depth = 8
    else:
        i = torch.arange(8)
        row_a, column_a = GROUP + 8 * (i // 2 % 2), 2 * IN_GROUP + i % 2 + 8 * (i // 4)
        i = torch.arange(4)
        row_b, column_b = 2 * IN_GROUP + i % 2 + 8 * (i // 2), GROUP.expand(32, 4)
        depth = 16
    i = torch.arange(4)
    row_d, column_d = GROUP + 8 * (i // 2), 2 * IN_GROUP + i % 2

    a, b, d = (torch.randint(-8, 8, s).to(dtype) for s in ((16, depth), (depth, 8), (16, 8)))
    fragment = d.float()[row_d, column_d].contiguous()
    fragments = a[row_a, column_a].contiguous(), b[row_b, column_b].contiguous(), fragment
    one_mma = getattr(emulated.library(), f"emulator_one_mma_{name(dtype)}")
    one_mma(*(emulated.pointer(x) for x in fragments))
    result = torch.empty(16, 8)
    result[row_d, column_d] = fragment
    assert torch.equal(result, (d.double() + a.double() @ b.double()).float())


@pytest.mark.parametrize("transposed", [False, True])
def test_fragments_of_ldmatrix(transposed):
    """PTX ISA 9.7.14.5.15: lane 4 r + c gets elements 2 c and 2 c + 1 of row r, or of column r."""
    matrices = torch.randperm(256).to(torch.int16).view(4, 8, 8)
    parts = torch.empty(32, 4, 2, dtype=torch.int16)
    emulated.library().emulator_one_ldmatrix(
        transposed, emulated.pointer(matrices), emulated.pointer(parts)
    )
    read = matrices.mT if transposed else matrices
    assert torch.equal(parts, read.reshape(4, 32, 2).transpose(0, 1))
