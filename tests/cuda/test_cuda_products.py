"""The products of CUDA, by each main loop, on the emulator of tests/emulator; on a GPU below.

The tests of linear run on these kernels too; here is what only a call past the op can reach.
"""

import itertools

import emulated
import pytest
import torch
from accuracy import assert_as_accurate

from mnist_ext import functional

HALVES = [torch.bfloat16, torch.float16]
FLOATS = [torch.float32, torch.float64]
TENSOR_CORES = [*HALVES, torch.float32]
MAIN_LOOPS = [
    *itertools.product(["simt"], [*FLOATS, torch.bfloat16]),
    *itertools.product(["mma"], TENSOR_CORES),
    *itertools.product(["wgmma"], HALVES),  # of float32 without masks and row sums: below
]
# Major indices of A and B: forward, grad_input, grad_weight, and one that no layer has.
LAYOUTS = [("k", "k"), ("k", "outer"), ("outer", "outer"), ("outer", "k")]


@pytest.fixture(autouse=True)
def usual_device():
    yield
    emulated.reset()


def name(value):
    return str(value).removeprefix("torch.")


def operand(outer, k, major, dtype, past_alignment=0, pitch=None):
    """Make a matrix whose major index is contiguous, with NaN all around it."""
    rows, columns = (outer, k) if major == "k" else (k, outer)
    pitch = pitch or columns
    whole = torch.full((16 + past_alignment + rows * pitch + 16,), torch.nan, dtype=dtype)
    view = whole[16 + past_alignment : -16].view(rows, pitch)[:, :columns]
    view.copy_(torch.randn(rows, columns))
    return view if major == "k" else view.T


def rounded_to_tf32(x):
    """To 11 significant bits, ties away from zero."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def round_to_tf32_(x):
    """Round what a copy will convert, in a direction that is not documented."""
    return x.copy_(rounded_to_tf32(x.contiguous()))


def assert_product(main_loop, a, b, mask=None, bias=None, relu=False, row_sums=False, c_mask=None):
    """Compare with float64: rounded once to the dtype, after sums in its compute type."""
    c, sums = emulated.product(main_loop, a, b, mask, bias, relu, row_sums, c_mask=c_mask)
    if mask is not None:
        a = torch.where(mask <= 0, 0, a)
    eps, eps_of_sums = torch.finfo(a.dtype).eps, 1e-15 if a.dtype == torch.float64 else 1e-6
    true_sums = a.double().sum(1)
    of_sums = eps * true_sums.abs() + 2 * eps_of_sums * a.double().abs().sum(1)
    if a.dtype == torch.float32 and main_loop != "simt":
        a, b = rounded_to_tf32(a.contiguous()), rounded_to_tf32(b.contiguous())
    a, b = a.double(), b.double()
    truth = a @ b.T + (0 if bias is None else bias.double())
    bound = eps * truth.abs() + eps_of_sums * (a.abs() @ b.abs().T + 1)
    if relu:
        truth = truth.relu()
    if c_mask is not None:
        truth = torch.where(c_mask <= 0, 0, truth)
    assert ((c.double() - truth).abs() <= bound).all()
    if row_sums:
        assert ((sums.double() - true_sums).abs() <= of_sums).all()
    return c, sums


def check(main_loop, dtype, M, N, K, layout, case, fragments=True):
    """Walk through what a product may have besides: masks of A and C, a bias, a ReLU, row sums."""
    emulated.set_seed(case)
    a, b = operand(M, K, layout[0], dtype), operand(N, K, layout[1], dtype)
    if main_loop == "wgmma" and dtype == torch.float32:
        round_to_tf32_(a), round_to_tf32_(b)
    mask = operand(M, K, layout[0], dtype) if fragments and case % 2 else None
    bias = torch.randn(N).to(dtype) if case // 2 % 2 else None
    row_sums = fragments and (mask is None or case // 4 % 2 == 1)
    c_mask = torch.randint(-1, 2, (M, N)).to(dtype) if case % 3 == 0 else None
    assert_product(main_loop, a, b, mask, bias, case // 8 % 2 == 1, row_sums, c_mask)


# M, N, K, multiprocessors, and the tile and splits that simt takes for float32: each of its tiles,
# and K split. Sizes inside and across tiles' edges; one row and one column; the last split shorter.
SHAPES = [
    ((64, 128, 96, 132), (0, 1)),
    ((1, 1, 1, 132), (0, 1)),
    ((10, 72, 1096, 132), (0, 14)),
    ((60, 124, 36, 1), (1, 1)),
    ((250, 248, 36, 1), (1, 1)),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
@pytest.mark.parametrize(("shape", "plan"), SHAPES, ids=name)
@pytest.mark.parametrize(
    ("main_loop", "dtype"), [each for each in MAIN_LOOPS if each[0] != "wgmma"], ids=name
)
def test_accurate(main_loop, dtype, shape, plan, layout):
    M, N, K, processors = shape
    emulated.set_device(multiprocessors=processors)
    case = SHAPES.index((shape, plan)) * 3 + LAYOUTS.index(layout) * 2 + len(name(dtype))
    check(main_loop, dtype, M, N, K, layout, case)
    a, b = torch.empty(M, K), torch.empty(N, K)
    if K % 4 == 0:
        assert emulated.plan(a, b) == ("simt", *plan)


# One tile; several, with edges; K split, the last split shorter; wide tiles, several to a block, so
# that the ring of stages runs on from one to the next.
WGMMA_SHAPES = [
    (128, 128, 128, 132),
    (200, 200, 168, 132),
    (264, 128, 1096, 132),
    (456, 264, 328, 2),
]
# Layouts, and whether A goes through registers, for its mask and row sums.
WGMMA_LAYOUTS = [
    ("k", "k", False),
    ("k", "outer", False),
    ("k", "outer", True),
    ("outer", "outer", True),
]
LAYOUTS_AND_DTYPES = [
    *itertools.product(WGMMA_LAYOUTS, HALVES),
    (WGMMA_LAYOUTS[0], torch.float32),
]


@pytest.mark.parametrize(("layout", "dtype"), LAYOUTS_AND_DTYPES, ids=str)
@pytest.mark.parametrize("shape", WGMMA_SHAPES, ids=name)
def test_wgmma_accurate(shape, layout, dtype):
    *sizes, processors = shape
    emulated.set_device(multiprocessors=processors)
    case = WGMMA_SHAPES.index(shape) + LAYOUTS_AND_DTYPES.index((layout, dtype))
    check("wgmma", dtype, *sizes, layout, case, fragments=layout[2])


def test_more_rows_than_tiles_run_side_by_side():
    """Tiles are dealt out in bands of eight rows of them; the last band is shorter."""
    a, b = torch.randn(1100, 9), torch.randn(130, 9)
    assert emulated.plan(a, b) == ("simt", 0, 1)
    assert_product("simt", a, b)


@pytest.mark.parametrize("dtype", FLOATS, ids=name)
@pytest.mark.parametrize(("shape", "plan"), SHAPES[2:], ids=name)
def test_simt_has_the_same_bits_in_every_layout(shape, plan, dtype):
    """And at every address: only the splits decide the order of the sums."""
    M, N, K, processors = shape
    emulated.set_device(multiprocessors=processors)
    a, b, mask = (torch.randn(n, K, dtype=dtype) for n in (M, N, M))
    first = emulated.product("simt", a, b, mask, row_sums=True)
    for a_major, b_major in LAYOUTS:
        for past_alignment in (0, 1):
            moved = [
                operand(*x.shape, major, dtype, past_alignment).copy_(x)
                for x, major in ((a, a_major), (b, b_major), (mask, a_major))
            ]
            again = emulated.product("simt", *moved, row_sums=True)
            assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize(("main_loop", "dtype"), MAIN_LOOPS[:6], ids=name)
@pytest.mark.parametrize("layout", LAYOUTS, ids="-".join)
class TestOperandsAnywhere:
    """Copies of 16 bytes and element by element, in tiles of either major index."""

    @pytest.mark.parametrize(("past_alignment", "pitch"), [(8, 144), (8, 141), (1, 141)])
    def test_alignment(self, layout, main_loop, dtype, past_alignment, pitch):
        where = {"past_alignment": past_alignment, "pitch": pitch}
        a, mask = (operand(40, 70, layout[0], dtype, **where) for _ in range(2))
        b = operand(50, 70, layout[1], dtype, **where)
        assert_product(main_loop, a, b, mask, row_sums=True)

    def test_the_mask_has_other_strides_than_a(self, layout, main_loop, dtype):
        a, b = operand(40, 70, layout[0], dtype), operand(50, 70, layout[1], dtype)
        mask = operand(40, 70, "outer" if layout[0] == "k" else "k", dtype)
        assert_product(main_loop, a, b, mask, row_sums=True)

    def test_no_unit_stride_and_strides_of_0(self, layout, main_loop, dtype):
        a = operand(80, 140, layout[0], dtype)[::2, ::2]
        b = operand(1, 140, layout[1], dtype).expand(30, 140)[:, ::2]
        assert_product(main_loop, a, b, row_sums=True)


@pytest.mark.parametrize("strides", [(-37, 1), (1, -37), (-1, 40), (0, -1), (2, -80)], ids=str)
@pytest.mark.parametrize("main_loop", ["simt", "mma"])
def test_negative_strides(main_loop, strides):
    """PyTorch has none; the contract of the kernels has."""
    M, K = 35, 33
    numbers = rounded_to_tf32(torch.randn(20_000))
    places = 10_000 + torch.arange(M)[:, None] * strides[0] + torch.arange(K) * strides[1]
    a, b = numbers[10_000:][: M * K].view(M, K), rounded_to_tf32(torch.randn(5, K))
    c, sums = emulated.product(main_loop, a, b, row_sums=True, a_strides=strides)
    torch.testing.assert_close(c, numbers[places] @ b.t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums, numbers[places].sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("main_loop", "dtype"), MAIN_LOOPS[:6], ids=name)
def test_nothing_to_sum(main_loop, dtype):
    a, b, bias = torch.empty(70, 0, dtype=dtype), torch.empty(9, 0, dtype=dtype), torch.randn(9)
    c, sums = emulated.product(main_loop, a, b, None, bias.to(dtype), True, True)
    assert torch.equal(c, bias.to(dtype).relu().expand(70, 9))
    assert torch.equal(sums, torch.zeros(70, dtype=dtype))


@pytest.mark.parametrize("dtype", [*FLOATS, *HALVES], ids=name)
@pytest.mark.parametrize("K", [40, 5000])  # whole, and split
def test_row_sums_alone(dtype, K):
    """The op asks for them where the weight has no gradient: B does not exist."""
    a, mask = torch.rand(70, K).to(dtype), torch.randn(70, K).to(dtype)
    _, sums = emulated.product("simt", a, torch.empty(9, K).to(dtype), mask, row_sums=True, c=False)
    exact = torch.where(mask <= 0, 0, a).double().sum(1)
    eps = max(torch.finfo(dtype).eps / 2, 1e-15)
    torch.testing.assert_close(sums.double(), exact, rtol=eps + 1e-7 * (eps > 1e-9), atol=0)


@pytest.mark.parametrize(
    ("log_k", "multiprocessors", "splits", "least", "most"),
    [(17, 132, 64, 0, 4), (13, 1, 1, 4, 40), (16, 1, 1, 16, 100)],
)
def test_error_of_long_sums(log_k, multiprocessors, splits, least, most):
    """Addends of one sign, in float32: in roundings. Only splits of K keep it small."""
    emulated.set_device(multiprocessors=multiprocessors)
    a, b = torch.rand(2, 2**log_k), torch.rand(3, 2**log_k)
    assert emulated.plan(a, b)[2] == splits
    c, _ = emulated.product("simt", a, b)
    truth = a.double() @ b.double().T
    error = ((c.double() - truth).abs().max() / truth.abs().max()) / torch.finfo(c.dtype).eps
    assert least <= error <= most


@pytest.mark.parametrize(("main_loop", "dtype"), MAIN_LOOPS, ids=name)
class TestEveryMainLoop:
    def test_mask_and_non_finite_elements(self, main_loop, dtype):
        """What lies behind a closed mask counts as 0, whatever it is; one that is NaN is open."""
        a, b, mask = (torch.ones(128, 128, dtype=dtype) for _ in range(3))
        a[0, 3], mask[0, 3] = torch.inf, 0
        a[1, 60], mask[1, 60] = torch.nan, -1
        a[2, 5], mask[2, 5] = torch.inf, torch.nan
        mask[3, 17] = -0.0
        mask[4, 127] = torch.finfo(dtype).smallest_normal
        mask[5, 127] = -torch.inf
        c, sums = emulated.product(main_loop, a, b.T, mask, row_sums=True)
        for result in (c[:, 5], sums):
            assert result[:6].tolist() == [127, 127, torch.inf, 127, 128, 127]
            assert (result[6:] == 128).all()

    @pytest.mark.parametrize("multiprocessors", [1, 132])  # K whole, and split
    def test_sums_of_long_rows(self, main_loop, dtype, multiprocessors):
        """grad_bias of many examples, all of one sign: as accurate as PyTorch's sum."""
        emulated.set_device(multiprocessors=multiprocessors)
        M, N = (128, 128) if main_loop == "wgmma" else (20, 8)
        a, b = torch.rand(M, 8192).to(dtype), torch.zeros(8192, N, dtype=dtype)
        _, sums = emulated.product(main_loop, a.T.contiguous().T, b.T, row_sums=True)
        assert_as_accurate(sums, a.sum(1), a.double().sum(1))

    def test_relu_keeps_nan(self, main_loop, dtype):
        a, b = torch.ones(128, 128, dtype=dtype), torch.ones(128, 128, dtype=dtype)
        a[1, 2], b[2] = torch.nan, -1
        c, _ = emulated.product(main_loop, a, b, relu=True)
        assert c[0].tolist() == [128, 128, 0, *[128] * 125]
        assert c[1].isnan().all()

    def test_same_bits_in_any_order_of_threads(self, main_loop, dtype):
        """A barrier or a wait that is missing shows here; with K split."""
        emulated.set_device(multiprocessors=8)
        a, b, mask = (operand(n, 520, "outer", dtype) for n in (200, 136, 200))
        first = emulated.product(main_loop, a, b, mask, row_sums=True)
        for seed in (1, 2):
            emulated.set_seed(seed)
            again = emulated.product(main_loop, a, b, mask, row_sums=True)
            assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=name)
def test_wgmma_rows_apart(dtype):
    """Each operand is a part of a wider matrix, which is NaN elsewhere."""
    a, b, mask = (operand(136, 136, "k", dtype, 8, 144) for _ in range(3))
    if dtype == torch.float32:
        round_to_tf32_(a), round_to_tf32_(b)
    assert_product("wgmma", a, b)
    if dtype == torch.bfloat16:
        assert_product("wgmma", a, operand(136, 136, "outer", dtype, 8, 144), mask)


def test_wgmma_rounds_to_tf32():
    """Each factor by less than its last bit, in whichever direction."""
    a, b = (operand(128, 160, "k", torch.float32) for _ in range(2))
    c, _ = emulated.product("wgmma", a, b)
    a, b = a.double(), b.double()
    error = (c.double() - a @ b.T).abs() / (a.abs() @ b.abs().T)
    assert 1e-6 < error.max() < 2 * 2**-10


def test_main_loop_of_float32():
    """Tensor cores only where torch allows TF32; those of wgmma read floats along K only."""

    def chosen(a_major, b_major, tf32=True, **options):
        a, b = (
            operand(n, 256, major, torch.float32) for n, major in ((128, a_major), (512, b_major))
        )
        return emulated.plan(a, b, tf32, **options)[0]

    assert chosen("k", "k") == "wgmma"
    assert chosen("k", "k", tf32=False) == "simt"
    assert chosen("k", "k", row_sums=True) == "mma"
    assert chosen("k", "outer") == "mma"
    assert chosen("outer", "outer", row_sums=True) == "mma"
    emulated.set_device(10)
    assert chosen("k", "k") == "mma"
    emulated.set_device(7)
    assert chosen("k", "k") == "simt"


@pytest.mark.parametrize("first", [False, True])
def test_tf32_setting_of_the_moment(emulator, allow_tf32, first):
    """It reaches the kernels, in forward and backward: TF32 has no bits for 2**-12."""
    exact = 1 + 2**-12
    input = torch.full((2, 3), exact, requires_grad=True)
    allow_tf32(first)
    output = functional.linear(input, torch.ones(4, 3))
    allow_tf32(not first)
    (gradient,) = torch.autograd.grad(output, input, torch.full((2, 4), exact))
    assert (output == 3 * (1 if first else exact)).all()
    assert (gradient == 4 * (exact if first else 1)).all()


def test_wgmma_result_that_is_not_aligned():
    """333 columns: rows of the result begin anywhere, while B's rows may still be copied."""
    a = operand(136, 136, "k", torch.bfloat16)
    b = operand(333, 136, "k", torch.bfloat16)
    bias, c_mask = torch.randn(333).bfloat16(), torch.randn(136, 333).bfloat16()
    assert_product("wgmma", a, b, bias=bias, relu=True, c_mask=c_mask)


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
    emulated.product("wgmma", a, b)
    with pytest.raises(RuntimeError, match="not taken"):
        emulated.product("wgmma", *change(a, b))
    assert emulated.plan(*change(a, b))[0] == "mma"


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(400, 200).bfloat16().T,  # the other major index than a's
        torch.ones(200, 404).bfloat16()[:, 4:],  # not aligned
    ],
)
def test_wgmma_does_not_take_the_mask(mask):
    a, b = torch.ones(200, 400).bfloat16(), torch.ones(400, 160).bfloat16().T
    emulated.product("wgmma", a, b, a)
    with pytest.raises(RuntimeError, match="not taken"):
        emulated.product("wgmma", a, b, mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=name)
def test_fragments_without_bank_conflicts(dtype):
    before = emulated.bank_conflicts()
    for a_major, b_major in LAYOUTS:
        a, b = operand(128, 128, a_major, dtype), operand(128, 128, b_major, dtype)
        for processors in (1, 132):  # both sizes of tiles
            emulated.set_device(multiprocessors=processors)
            emulated.product("mma", a, b, a)
        if b_major == "outer" and dtype != torch.float32:
            emulated.product("wgmma", a, b, a)
    assert emulated.bank_conflicts() == before
