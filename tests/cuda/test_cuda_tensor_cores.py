"""The tensor-core kernels of linear layers, on the emulator: no GPU is needed; none has run them.

First single instructions, whose fragments are stated here once more, then whole kernels against
float64, with threads in shuffled orders.
"""

import itertools

import emulated
import pytest
import torch
from accuracy import assert_as_accurate

HALVES = [torch.bfloat16, torch.float16]
DTYPES = [*HALVES, torch.float32]
LAYOUTS = [("depth", "depth"), ("depth", "outer"), ("outer", "outer"), ("outer", "depth")]


@pytest.fixture(autouse=True)
def usual_device():
    yield
    emulated.set_seed(0)
    emulated.set_device()


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
    out, sums = emulated.tensor_core_product(kernel, a, b, gate, bias, relu, row_sums)
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


def options(case, rows, columns, depth, a_major, dtype):
    """Walk through what a product may have besides: a gate, a bias, a ReLU, sums of rows."""
    return {
        "gate": operand(rows, depth, a_major, dtype) if case % 2 else None,
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
        emulated.set_device(multiprocessors=processors)
        a, b = operand(rows, depth, layout[0], dtype), operand(columns, depth, layout[1], dtype)
        case = SHAPES.index(shape) * 3 + LAYOUTS.index(layout) * 2 + DTYPES.index(dtype)
        emulated.set_seed(case)
        assert_product("mma", a, b, **options(case, rows, columns, depth, layout[0], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
class TestMmaOperandsAnywhere:
    """Copies of 16 bytes, of 4 bytes, and element by element, in tiles of either major index."""

    @pytest.mark.parametrize(
        ("past_alignment", "pitch"), [(8, 144), (2, 142), (1, 141)], ids=["16", "4", "2"]
    )
    def test_alignment(self, layout, dtype, past_alignment, pitch):
        where = {"past_alignment": past_alignment, "pitch": pitch}
        a, gate = (operand(40, 70, layout[0], dtype, **where) for _ in range(2))
        b = operand(50, 70, layout[1], dtype, **where)
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
    out, sums = emulated.tensor_core_product("mma", a, b, None, bias.to(dtype), True, True)
    assert torch.equal(out, bias.to(dtype).relu().expand(70, 9))
    assert torch.equal(sums, torch.zeros(70, dtype=dtype))


KERNELS_AND_DTYPES = [*itertools.product(("mma", "wgmma"), DTYPES)]


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS_AND_DTYPES, ids=str)
def test_gate_and_non_finite_elements(kernel, dtype):
    """What lies behind a closed gate counts as 0, whatever it is; a gate that is NaN is open."""
    a, b, gate = (torch.ones(128, 128, dtype=dtype) for _ in range(3))
    a[0, 3], gate[0, 3] = torch.inf, 0
    a[1, 60], gate[1, 60] = torch.nan, -1
    a[2, 5], gate[2, 5] = torch.inf, torch.nan
    gate[3, 17] = -0.0
    gate[4, 127] = torch.finfo(dtype).smallest_normal
    gate[5, 127] = -torch.inf
    out, sums = emulated.tensor_core_product(kernel, a, b.T, gate, row_sums=True)
    for result in (out[:, 5], sums):
        assert result[:6].tolist() == [127, 127, torch.inf, 127, 128, 127]
        assert (result[6:] == 128).all()


@pytest.mark.parametrize("multiprocessors", [1, 132])  # the depth whole, and in parts
@pytest.mark.parametrize(("kernel", "dtype"), KERNELS_AND_DTYPES, ids=str)
def test_sums_of_long_rows(kernel, dtype, multiprocessors):
    """grad_bias of many examples, all of one sign: as accurate as PyTorch's sum."""
    emulated.set_device(multiprocessors=multiprocessors)
    a, b = torch.rand(128, 8192).to(dtype), torch.zeros(8192, 128, dtype=dtype)
    _, sums = emulated.tensor_core_product(kernel, a.T.contiguous().T, b.T, row_sums=True)
    assert_as_accurate(sums, a.sum(1), a.double().sum(1))


@pytest.mark.parametrize(("kernel", "dtype"), KERNELS_AND_DTYPES, ids=str)
def test_relu_keeps_nan(kernel, dtype):
    a, b = torch.ones(128, 128, dtype=dtype), torch.ones(128, 128, dtype=dtype)
    a[1, 2], b[2] = torch.nan, -1
    out, _ = emulated.tensor_core_product(kernel, a, b, relu=True)
    assert out[0].tolist() == [128, 128, 0, *[128] * 125]
    assert out[1].isnan().all()


@pytest.mark.parametrize(
    ("kernel", "rows", "columns", "depth", "layout", "row_sums"),
    [
        ("mma", 70, 40, 1104, ("depth", "outer"), True),
        ("wgmma", 200, 136, 520, ("depth", "depth"), False),
        ("wgmma", 200, 136, 520, ("depth", "outer"), True),
    ],
)
def test_same_bits_in_any_order_of_threads(kernel, rows, columns, depth, layout, row_sums):
    """A barrier or a wait that is missing shows here."""
    emulated.set_device(multiprocessors=8)
    a = operand(rows, depth, layout[0], torch.bfloat16)
    b = operand(columns, depth, layout[1], torch.bfloat16)
    first = emulated.tensor_core_product(kernel, a, b, row_sums=row_sums)
    for seed in range(1, 4):
        emulated.set_seed(seed)
        again = emulated.tensor_core_product(kernel, a, b, row_sums=row_sums)
        assert torch.equal(first[0], again[0])
        assert not row_sums or torch.equal(first[1], again[1])


# rows, columns, depth, multiprocessors: one tile; a cluster of two, and several columns of tiles;
# three tiles by single blocks, the depth in parts, the last one shorter; nine tiles by clusters,
# with one past the rows; wide tiles, two to a block, so that the ring of stages runs on from one to
# the next.
WGMMA_SHAPES = [
    (128, 128, 128, 132),
    (200, 200, 168, 132),
    (264, 128, 1096, 132),
    (1032, 128, 136, 132),
    (456, 264, 328, 2),
]
# a, b, and whether a goes through registers, for its gate and the sums of its rows.
WGMMA_LAYOUTS = [
    ("depth", "depth", False),
    ("depth", "outer", False),
    ("depth", "outer", True),
    ("outer", "outer", True),
]
# Of float32, whose b across the depth is copied first.
TF32_LAYOUTS = [*WGMMA_LAYOUTS, ("depth", "depth", True), ("outer", "depth", True)]
LAYOUTS_AND_DTYPES = [
    *itertools.product(WGMMA_LAYOUTS, HALVES),
    *itertools.product(TF32_LAYOUTS, [torch.float32]),
]


def round_to_tf32_(x):
    """Round what a copy will convert, in a direction that is not documented."""
    return x.copy_(rounded_to_tf32(x.contiguous()))


@pytest.mark.parametrize(("layout", "dtype"), LAYOUTS_AND_DTYPES, ids=str)
@pytest.mark.parametrize("shape", WGMMA_SHAPES, ids=lambda s: "x".join(map(str, s[:3])))
def test_wgmma_accurate(shape, layout, dtype):
    rows, columns, depth, processors = shape
    a_major, b_major, through_registers = layout
    case = WGMMA_SHAPES.index(shape) + LAYOUTS_AND_DTYPES.index((layout, dtype))
    emulated.set_device(multiprocessors=processors)
    emulated.set_seed(case)
    a, b = operand(rows, depth, a_major, dtype), operand(columns, depth, b_major, dtype)
    if dtype == torch.float32:
        round_to_tf32_(b)
        if not through_registers:
            round_to_tf32_(a)
    gate = operand(rows, depth, a_major, dtype) if through_registers and case % 3 else None
    assert_product(
        "wgmma",
        *(a, b, gate),
        bias=torch.randn(columns).to(dtype) if case % 2 else None,
        relu=case % 4 < 2,
        row_sums=through_registers and case % 3 != 1,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=name)
def test_wgmma_rows_apart(dtype):
    """Each operand is a part of a wider matrix, which is NaN elsewhere."""
    a, b, gate = (operand(136, 136, "depth", dtype, 8, 144) for _ in range(3))
    b_across = operand(136, 136, "outer", dtype, 8, 144)
    if dtype == torch.float32:
        for x in (a, b, b_across):
            round_to_tf32_(x)
    assert_product("wgmma", a, b)
    assert_product("wgmma", a, b_across, gate)


def test_wgmma_copies_b_from_any_address():
    """Floats across the depth; rows of the copy are longer than the depth, which is odd."""
    a = operand(130, 133, "outer", torch.float32, 4, 132)
    for past_alignment, pitch in ((1, 129), (3, 141)):
        b = round_to_tf32_(operand(129, 133, "outer", torch.float32, past_alignment, pitch))
        assert_product("wgmma", a, b, row_sums=True)


@pytest.mark.parametrize("layout", TF32_LAYOUTS, ids=str)
def test_wgmma_rounds_to_tf32(layout):
    """Each factor by less than its last bit, in whichever direction; sums of rows not at all."""
    a_major, b_major, through_registers = layout
    a, b = (operand(128, 160, major, torch.float32) for major in (a_major, b_major))
    out, sums = emulated.tensor_core_product("wgmma", a, b, row_sums=through_registers)
    a, b = a.double(), b.double()
    error = (out.double() - a @ b.T).abs() / (a.abs() @ b.abs().T)
    assert 1e-6 < error.max() < 2 * 2**-10
    if through_registers:
        assert ((sums.double() - a.sum(1)).abs() <= 1e-6 * a.abs().sum(1)).all()


def test_wgmma_takes_tf32_where_it_pays():
    """Only where torch allows TF32, and a copy of b only for many rows of the result."""

    def takes(rows, a_major, b_major, tf32=True, **options):
        a, b = (
            torch.empty(n, 256) if major == "depth" else torch.empty(256, n).T
            for n, major in ((rows, a_major), (512, b_major))
        )
        return emulated.wgmma_takes(a, b, tf32, **options)

    assert takes(128, "depth", "depth")
    assert not takes(128, "depth", "depth", tf32=False)
    for a_major in ("depth", "outer"):
        assert takes(2048, a_major, "outer", row_sums=True)
        assert not takes(1024, a_major, "outer", row_sums=True)
        assert takes(128, a_major, "depth", row_sums=True)
    emulated.set_device(10)
    assert not takes(128, "depth", "depth")


def test_wgmma_result_that_is_not_aligned():
    """333 columns: rows of the result begin anywhere, while b's rows may still be copied."""
    a = operand(136, 136, "depth", torch.bfloat16)
    b = operand(333, 136, "depth", torch.bfloat16)
    assert_product("wgmma", a, b, bias=torch.randn(333).bfloat16(), relu=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda a, b: (a[:100], b),  # for mma's smaller tiles
        lambda a, b: (a[:, 1:], b[:, 1:]),  # not aligned
        lambda a, b: (a[:, ::2], b[:, ::2]),  # no unit stride
        lambda a, b: (a[:1].expand(200, 400), b),  # rows that overlap
        lambda a, b: (a.T.contiguous().T, b),  # a layout that no product of a layer has
    ],
)
def test_wgmma_does_not_take(change):
    a, b = torch.ones(200, 400).bfloat16(), torch.ones(160, 400).bfloat16()
    emulated.tensor_core_product("wgmma", a, b)
    with pytest.raises(RuntimeError, match="not taken"):
        emulated.tensor_core_product("wgmma", *change(a, b))


def test_neither_is_taken_on_devices_that_cannot():
    a = torch.ones(128, 128).bfloat16()
    for kernel, major in (("wgmma", 8), ("wgmma", 10), ("mma", 7)):
        emulated.set_device(major)
        with pytest.raises(RuntimeError, match="not taken"):
            emulated.tensor_core_product(kernel, a, a)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=name)
def test_wgmma_fragments_without_bank_conflicts(dtype):
    before = emulated.bank_conflicts()
    for major in ("depth", "outer"):
        a = operand(128, 128, major, dtype)
        emulated.tensor_core_product("wgmma", a, operand(128, 128, "outer", dtype), a)
    assert emulated.bank_conflicts() == before


def test_mma_fragments_without_bank_conflicts():
    before = emulated.bank_conflicts()
    for (a, b), dtype in itertools.product(LAYOUTS, (torch.bfloat16, torch.float32)):
        for processors in (1, 132):  # both sizes of tiles
            emulated.set_device(multiprocessors=processors)
            a_, b_ = operand(64, 64, a, dtype), operand(64, 64, b, dtype)
            emulated.tensor_core_product("mma", a_, b_, a_)
    assert emulated.bank_conflicts() == before
