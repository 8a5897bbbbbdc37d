"""The tensor-core kernels of linear layers on the emulator: no GPU is needed, and none has run them.

First single instructions, whose fragments are stated here once more, then whole kernels against
float64, with threads in shuffled orders.
"""

import itertools

import emulated
import pytest
import torch

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32]
LAYOUTS = [("depth", "depth"), ("depth", "outer"), ("outer", "outer"), ("outer", "depth")]


@pytest.fixture(autouse=True)
def usual_device():
    yield
    emulated.set_seed(0)
    emulated.set_processors()


def name(dtype):
    return str(dtype).removeprefix("torch.")


LANE = torch.arange(32)
GROUP, IN_GROUP = (LANE // 4)[:, None], (LANE % 4)[:, None]


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
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


def operand(outer, depth, major, dtype, past_alignment=0, pitch=None):
    """Make a matrix with this index side by side in memory, and NaN all around it."""
    rows, columns = (outer, depth) if major == "depth" else (depth, outer)
    pitch = pitch or columns
    whole = torch.full((16 + past_alignment + rows * pitch + 16,), torch.nan, dtype=dtype)
    view = whole[16 + past_alignment : -16].view(rows, pitch)[:, :columns]
    view.copy_(torch.randn(rows, columns))
    return view if major == "depth" else view.T


def rounded_to_tf32(x):
    """To 11 significant bits, ties away from zero."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def assert_product(kernel, a, b, gate=None, bias=None, relu=False, row_sums=False):
    """Compare with float64: rounded once to the dtype, after sums in float32."""
    out, sums = emulated.linear_product(kernel, a, b, gate, bias, relu, row_sums)
    if gate is not None:
        a = torch.where(gate <= 0, 0, a)
    true_sums = a.double().sum(1)
    of_sums = torch.finfo(a.dtype).eps * true_sums.abs() + 2e-6 * a.double().abs().sum(1)
    if a.dtype == torch.float32:
        a, b = rounded_to_tf32(a.contiguous()), rounded_to_tf32(b.contiguous())
    a, b = a.double(), b.double()
    truth = a @ b.T + (0 if bias is None else bias.double())
    bound = torch.finfo(out.dtype).eps * truth.abs() + 1e-6 * (a.abs() @ b.abs().T + 1)
    if relu:
        truth = truth.relu()
    assert ((out.double() - truth).abs() <= bound).all()
    if row_sums:
        assert ((sums.double() - true_sums).abs() <= of_sums).all()
    return out, sums


def options(case, rows, columns, a_major, dtype, **where):
    """Walk through what a product may have besides: a gate, a bias, a ReLU, sums of rows."""
    gate = operand(rows, where.pop("depth"), a_major, dtype, **where) if case % 2 else None
    return {
        "gate": gate,
        "bias": torch.randn(columns).to(dtype) if case // 2 % 2 else None,
        "relu": bool(case // 4 % 2),
        "row_sums": bool((case // 2 + case // 4) % 2),
    }


# rows, columns, depth, multiprocessors: small tiles, inside and across their edges; one row and
# one column; the depth in parts, the last one shorter; large tiles, which one multiprocessor gets.
SHAPES = [
    (64, 128, 96, 132),
    (70, 65, 50, 132),
    (1, 1, 1, 132),
    (64, 10, 1352, 132),
    (10, 72, 1096, 132),
    (136, 130, 72, 1),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s[:3])))
class TestMma:
    @pytest.mark.parametrize("dtype", DTYPES, ids=name)
    def test_accurate(self, shape, layout, dtype):
        rows, columns, depth, processors = shape
        emulated.set_processors(processors)
        a, b = operand(rows, depth, layout[0], dtype), operand(columns, depth, layout[1], dtype)
        first = SHAPES.index(shape) + LAYOUTS.index(layout) * 2
        for case in (first, first + 1):
            emulated.set_seed(case)
            assert_product(
                "mma", a, b, **options(case, rows, columns, layout[0], dtype, depth=depth)
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
class TestMmaOperandsAnywhere:
    """Copies of 16 bytes, of 4 bytes, and element by element, in tiles of either major index."""

    @pytest.mark.parametrize(
        ("past_alignment", "pitch"), [(8, 144), (2, 142), (1, 141)], ids=["16", "4", "2"]
    )
    def test_alignment(self, layout, dtype, past_alignment, pitch):
        where = {"past_alignment": past_alignment, "pitch": pitch}
        a, b, gate = (operand(n, 70, m, dtype, **where) for n, m in zip((40, 50, 40), (*layout, layout[0])))
        assert_product("mma", a, b, gate, row_sums=True)

    def test_the_gate_has_other_strides_than_a(self, layout, dtype):
        a, b = operand(40, 70, layout[0], dtype), operand(50, 70, layout[1], dtype)
        gate = operand(40, 70, "outer" if layout[0] == "depth" else "depth", dtype)
        assert_product("mma", a, b, gate, row_sums=True)

    def test_no_unit_stride_and_strides_of_0(self, layout, dtype):
        a = operand(80, 140, layout[0], dtype)[::2, ::2]
        b = operand(1, 140, layout[1], dtype).expand(30, 140)[:, ::2]
        assert_product("mma", a, b, row_sums=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_mma_nothing_to_sum(dtype):
    a, b, bias = torch.empty(70, 0, dtype=dtype), torch.empty(9, 0, dtype=dtype), torch.randn(9)
    out, sums = emulated.linear_product("mma", a, b, None, bias.to(dtype), True, True)
    assert torch.equal(out, bias.to(dtype).relu().expand(70, 9))
    assert torch.equal(sums, torch.zeros(70, dtype=dtype))


def non_finite_product(kernel, dtype):
    """An infinite or NaN a behind a closed gate counts as 0; behind a gate that is NaN it counts."""
    a, b = torch.ones(16, 64, dtype=dtype), torch.ones(16, 64, dtype=dtype)
    gate = torch.ones(16, 64, dtype=dtype)
    a[0, 3], gate[0, 3] = torch.inf, 0
    a[1, 60], gate[1, 60] = torch.nan, -1
    a[2, 5], gate[2, 5] = torch.inf, torch.nan
    gate[3, 17] = -0.0
    return emulated.linear_product(kernel, a, b, gate, None, True, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_mma_gate_and_non_finite_elements(dtype):
    for result in (non_finite_product("mma", dtype)[0][:, 5], non_finite_product("mma", dtype)[1]):
        assert result[:4].tolist() == [63, 63, torch.inf, 63]
        assert (result[4:] == 64).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_mma_relu_keeps_nan(dtype):
    a, b = torch.ones(3, 8, dtype=dtype), torch.ones(3, 8, dtype=dtype)
    a[1, 2], b[2] = torch.nan, -1
    out, _ = emulated.linear_product("mma", a, b, relu=True)
    assert out[0].tolist() == [8, 8, 0]
    assert out[1].isnan().all()


@pytest.mark.parametrize("kernel", ["mma"])
def test_same_bits_in_any_order_of_threads(kernel):
    """A barrier or a wait that is missing shows here."""
    a, b = operand(70, 1100, "depth", torch.bfloat16, pitch=1104), operand(40, 1100, "outer", torch.bfloat16)
    first = emulated.linear_product(kernel, a, b, row_sums=True)
    for seed in (1, 2, 3):
        emulated.set_seed(seed)
        again = emulated.linear_product(kernel, a, b, row_sums=True)
        assert all(map(torch.equal, first, again))


def test_ldmatrix_without_bank_conflicts():
    before = emulated.bank_conflicts()
    for (a, b), dtype in itertools.product(LAYOUTS, (torch.bfloat16, torch.float32)):
        for processors in (1, 132):  # both sizes of tiles
            emulated.set_processors(processors)
            a_, b_ = operand(64, 64, a, dtype), operand(64, 64, b, dtype)
            emulated.linear_product("mma", a_, b_, a_)
    assert emulated.bank_conflicts() == before
