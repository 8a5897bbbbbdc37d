"""Values and gradients of the fused softmax cross-entropy."""

import math

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate

from mnist_ext import functional

# (rows, classes): empty, single; ten classes as MNIST has; a vector of any instruction set, less
# or more by one; a row of several blocks (2,048 logits each) with and without a rest. Then with
# positions behind the classes: several vectors of them, and a rest.
SHAPES = [
    (0, 3),
    (1, 1),
    (7, 1),
    (64, 10),
    (5, 7),
    (5, 8),
    (5, 15),
    (5, 16),
    (5, 17),
    (3, 2048),
    (3, 2049),
    (4, 10_000),
    pytest.param((2000, 33), marks=pytest.mark.cpu_only("rows of the CPU's threads")),
    (2, 5, 103),
]
REDUCTIONS = ["mean", "sum", "none"]


def loss_and_gradient(op, logits, target, grad_output=None, **options):
    leaf = logits.detach().requires_grad_()
    loss = op(leaf, target, **options)
    grad_output = torch.ones_like(loss) if grad_output is None else grad_output.to(loss.dtype)
    (gradient,) = torch.autograd.grad(loss, leaf, grad_output)
    return loss.detach(), gradient


def ours_and_torchs(logits, target, **options):
    ops = functional.cross_entropy, F.cross_entropy
    return [loss_and_gradient(op, logits, target, **options) for op in ops]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_error_within_twice_pytorchs(device, shape, reduction, dtype):
    rows, classes, *positions = shape
    logits = torch.randn(shape, dtype=dtype) * 5
    target = torch.randint(0, classes, (rows, *positions))
    target[::3] = -100
    grad_output = torch.randn(target.shape) if reduction == "none" else torch.randn(())
    if rows == 0 and reduction == "mean":
        grad_output = torch.ones(())
    arguments = {"grad_output": grad_output, "reduction": reduction}
    ours, torchs = ours_and_torchs(logits, target, **arguments)
    if dtype == torch.float64:  # which has no truth
        tolerance = {"rtol": 1e-13, "atol": 1e-14, "equal_nan": True}
        torch.testing.assert_close(ours, torchs, **tolerance)
        return
    truth = loss_and_gradient(F.cross_entropy, logits.double(), target, **arguments)
    for our, their, true in zip(ours, torchs, truth, strict=True):
        if true.isnan().any():  # the mean over no target
            assert torch.equal(our.isnan(), true.isnan())
        else:
            assert_as_accurate(our, their, true)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(37, 10), (3, 50), (2, 5, 37)], ids=str)
def test_losses_of_halves_are_those_of_float32_rounded(device, shape, dtype):
    logits = (torch.randn(shape) * 5).to(dtype)
    target = torch.randint(0, shape[1], shape[:1] + shape[2:])
    exact = functional.cross_entropy(logits.float(), target, reduction="none")
    for leaf in (logits, logits.clone().requires_grad_()):
        loss = functional.cross_entropy(leaf, target, reduction="none")
        torch.testing.assert_close(loss, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_nan_among_logits_without_a_maximum_yet(device):
    """All of a row's first block is -inf, but for a NaN; the others are numbers."""
    logits = torch.randn(2, 5000)
    logits[0, :2500] = -INF
    logits[0, 7] = math.nan
    loss = functional.cross_entropy(logits, torch.tensor([4000, 4000]), reduction="none")
    assert loss.isnan().tolist() == [True, False]


def test_exp_over_its_whole_range(device):
    """Where the other class takes all, the gradient is exp(x); what is subnormal may be 0."""
    for dtype, lowest, highest in ((torch.float32, -110.0, -20.0), (torch.float64, -760.0, -40.0)):
        x = torch.linspace(lowest, highest, 20_001, dtype=dtype)
        logits = torch.stack([x, torch.zeros_like(x)], 1)
        target = torch.ones(len(x), dtype=torch.int64)
        info = torch.finfo(dtype)
        exp = x.double().exp()
        subnormal = exp < info.smallest_normal
        for reduction in ("sum", "none"):  # with the forward, and after it
            _, gradient = loss_and_gradient(
                functional.cross_entropy, logits, target, reduction=reduction
            )
            got = gradient[:, 0].double()
            torch.testing.assert_close(got[~subnormal], exp[~subnormal], rtol=2 * info.eps, atol=0)
            assert ((got >= 0) & (got <= info.smallest_normal))[subnormal].all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", [0, 3])
def test_nothing_to_count(device, rows, reduction):
    """PyTorch's NaN for mean and 0 for sum, none; no gradient from ignored rows."""
    logits, target = torch.randn(rows, 4), torch.full((rows,), -100)
    loss, gradient = loss_and_gradient(
        functional.cross_entropy, logits, target, reduction=reduction
    )
    expected, _ = loss_and_gradient(F.cross_entropy, logits, target, reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    assert torch.equal(gradient, torch.zeros(rows, 4))


INF = math.inf


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "row",
    [
        [1.0, -INF, 2.0],
        [-INF, 1.0, -INF],
        [-INF, -INF, -INF],
        [INF, 1.0, 2.0],
        [1.0, INF, INF],
        [math.nan, 1.0, 2.0],
        [1.0, 2.0, math.nan],
        [-INF, math.nan, -INF],
        [INF, -INF, 0.0],
        [1e4, -1e4, 0.0],
        [88.0, 89.0, 710.0],
        [1e16, 1e16 + 2, 1e16 - 4],
        [-1e16, -1e16, -1e16],
        [3e38, -3e38, 0.0],
    ],
    ids=str,
)
def test_extreme_logits_as_pytorch(device, row, dtype, reduction):
    for wide in (1, 700):  # also in a row of many vectors, whose other logits do not matter
        logits = torch.tensor([row * wide], dtype=dtype)
        for target in (0, 1, 2):
            arguments = (logits, torch.tensor([target]))
            torch.testing.assert_close(
                *ours_and_torchs(*arguments, reduction=reduction), equal_nan=True
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [1, 2, 5, 37, 65])
@pytest.mark.parametrize("rows", [8, 41])
def test_rows_of_probabilities(device, rows, classes, dtype):
    """Short rows are transposed, a vector of them at a time."""
    logits = torch.randn(rows, classes).to(dtype)
    probabilities = torch.randn(rows, classes).softmax(1).to(dtype)
    for options in ({}, {"weight": torch.rand(classes).to(dtype), "label_smoothing": 0.1}):
        for wanted in ((True, False), (True, True)):  # the gradient with the forward, and after it
            results = []
            for op, to in ((functional.cross_entropy, dtype), (F.cross_entropy, torch.float64)):
                pair = [t.detach().to(to).requires_grad_() for t in (logits, probabilities)]
                arguments = {k: v.to(to) if k == "weight" else v for k, v in options.items()}
                loss = op(pair[0], pair[1] if wanted[1] else pair[1].detach(), **arguments)
                leaves = [leaf for leaf, want in zip(pair, wanted, strict=True) if want]
                results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
            for our, true in zip(*results, strict=True):
                torch.testing.assert_close(our, true.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad_output", [INF, -INF, math.nan])
def test_ignored_positions_have_gradient_0_whatever_the_loss_is_scaled_by(
    device, grad_output, dtype
):
    """As the gradient that came with the loss, and when it is formed in a second backward."""
    for shape in ((3, 5), (3, 70), (20, 5), (2, 5, 7)):
        for classes_last in (False, True):
            logits = torch.randn(shape).to(dtype)
            if classes_last:
                logits = logits.movedim(1, -1).contiguous().movedim(-1, 1)
            target = torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
            for ignored in (slice(0, None, 2), slice(None)):  # the first and others; all
                target.view(-1)[ignored] = -100
                for reduction, smoothing in (("none", 0.0), ("mean", 0.1), ("sum", 0.0)):
                    leaf = logits.detach().requires_grad_()
                    options = {"reduction": reduction, "label_smoothing": smoothing}
                    loss = functional.cross_entropy(leaf, target, **options)
                    for _ in range(2):
                        (gradient,) = torch.autograd.grad(
                            loss, leaf, torch.full_like(loss, grad_output), retain_graph=True
                        )
                        assert not gradient.movedim(1, -1)[target == -100].any()
                        assert not gradient.movedim(1, -1)[target != -100].isfinite().any()


@pytest.mark.parametrize("masked", [-INF, -95.0])
@pytest.mark.parametrize("kind", ["rows", "positions last", "classes last"])
def test_masked_classes_as_if_they_were_not_there(device, kind, masked):
    """In any lane, and in the last vector of any length; beside what fills it up."""
    rows = torch.arange(9)
    for classes in range(2, 71):
        logits = torch.randn(9, classes) + 100  # so that exp(0 - max) is nothing
        is_masked = torch.rand(classes) < 0.5
        is_masked[torch.randint(classes, ())] = False
        kept = (~is_masked).nonzero().flatten()
        logits[:, is_masked] = logits[:, kept].amax(1, keepdim=True) + masked
        target = kept[torch.randint(len(kept), (9,))]
        # By hand: PyTorch's op takes milliseconds for its threads where the cores are busy.
        log_p = logits.double() - logits[:, kept].double().logsumexp(1, keepdim=True)
        expected = log_p.exp()
        expected[rows, target] -= 1
        if kind == "rows":
            arguments = logits, target
        elif kind == "positions last":
            arguments = logits.t()[None], target[None]
        else:
            arguments = logits.view(1, 3, 3, classes).movedim(-1, 1), target.view(1, 3, 3)
        for reduction in ("sum", "none"):
            loss, gradient = loss_and_gradient(
                functional.cross_entropy, *arguments, reduction=reduction
            )
            assert loss.sum().item() == pytest.approx(-log_p[rows, target].sum().item(), rel=1e-5)
            difference = gradient.movedim(1, -1).reshape(9, classes) - expected
            assert difference.abs().max() < 1e-6


@pytest.mark.parametrize(("fill", "other"), [(math.nan, math.nan), (-INF, math.nan), (-INF, -INF)])
def test_a_block_without_a_finite_logit(device, fill, other):
    """Blocks are 2,048 logits: the first holds nothing finite, the second nothing else."""
    logits = torch.full((1, 2060), fill)
    logits[0, 2048:] = 1.0
    logits[0, 7] = other
    torch.testing.assert_close(*ours_and_torchs(logits, torch.tensor([2050])), equal_nan=True)


def test_gradient_of_the_target_survives_as_p_approaches_one(device):
    logits = torch.tensor([[13.0, 0.0]])
    target = torch.tensor([0])
    _, gradient = loss_and_gradient(functional.cross_entropy, logits, target)
    _, truth = loss_and_gradient(F.cross_entropy, logits.double(), target)
    assert -2.5e-6 < gradient[0, 0] < -2e-6
    torch.testing.assert_close(gradient.double(), truth, rtol=0, atol=6e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_loss_scale_comes_before_the_rounding(device, dtype):
    """What float16 cannot hold, it can hold 32,768 times as large: the point of a GradScaler."""
    logits = torch.tensor([[0.0, -18.0]], dtype=dtype)
    scale = torch.tensor(32768.0)
    _, gradient = loss_and_gradient(
        functional.cross_entropy, logits, torch.tensor([0]), grad_output=scale
    )
    expected = 32768 * math.exp(-18)
    assert gradient[0, 1].item() == pytest.approx(expected, rel=torch.finfo(dtype).eps * 2)


@pytest.mark.parametrize("kind", ["transposed", "every other", "expanded", "offset"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_any_strides(device, kind, reduction):
    logits = {
        "transposed": torch.randn(11, 40).t(),
        "every other": torch.randn(40, 22)[:, ::2],
        "expanded": torch.randn(11).expand(40, 11),
        "offset": torch.randn(40 * 12 + 1)[1:].view(40, 12)[:, :11],
    }[kind]
    target = torch.randint(0, 11, (80,))[::2]
    # The gradient of sum() is expanded: stride 0.
    grad_output = torch.tensor(1.5).expand(40) if reduction == "none" else torch.tensor(1.5)
    arguments = {"grad_output": grad_output, "reduction": reduction}
    torch.testing.assert_close(*ours_and_torchs(logits, target, **arguments))


@pytest.mark.parametrize("kind", ["rows", "positions last", "classes last"])
@pytest.mark.parametrize("fill", [math.nan, INF])
def test_ignored_rows_are_not_read(device, kind, fill):
    """Their gradient is 0 whatever they hold; in PyTorch it is NaN."""
    logits = torch.randn({"rows": (6, 5), "positions last": (2, 5, 3)}.get(kind, (2, 3, 5)))
    if kind == "classes last":
        logits = logits.movedim(-1, 1)
    target = torch.randint(0, 5, logits.shape[:1] + logits.shape[2:])
    target[0] = -100
    logits[0] = fill
    for smoothing in (0.0, 0.1):
        options = {"label_smoothing": smoothing}
        loss, gradient = loss_and_gradient(functional.cross_entropy, logits, target, **options)
        expected = loss_and_gradient(F.cross_entropy, logits[1:], target[1:], **options)
        torch.testing.assert_close(loss, expected[0])
        torch.testing.assert_close(gradient[1:], expected[1])
        assert torch.equal(gradient[0], torch.zeros_like(gradient[0]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weight", [[0.0, 0.0, 1.0], [1.0, -1.0, 2.0], [-1.0, -2.0, 0.5]], ids=str)
def test_total_weight_of_zero(device, weight, smoothing, reduction):
    """And below: nothing finite where PyTorch has NaN or infinity, or its negative loss."""
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
    options = {
        "weight": torch.tensor(weight),
        "label_smoothing": smoothing,
        "reduction": reduction,
    }
    ours, torchs = ours_and_torchs(logits, target, **options)
    for our, their in zip(ours, torchs, strict=True):
        finite = their.isfinite()
        assert torch.equal(our.isfinite(), finite)
        torch.testing.assert_close(our[finite], their[finite])


def test_gradient_of_class_weights():
    """With probabilities as PyTorch's; with indices PyTorch has none, and says so."""
    logits, probabilities = torch.randn(4, 3), torch.rand(4, 3).softmax(1)
    weight = torch.rand(3, requires_grad=True)
    ours, torchs = (
        torch.autograd.grad(op(logits, probabilities, weight), weight)
        for op in (functional.cross_entropy, F.cross_entropy)
    )
    torch.testing.assert_close(ours, torchs)
    with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'weight'"):
        functional.cross_entropy(logits, torch.tensor([0, 1, 2, 0]), weight)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(200, 300)[:, :250],
        lambda: torch.randn(4, 25, 30, 20),
        lambda: torch.randn(4, 50, 30, 20)[:, ::2],
        lambda: torch.randn(4, 30, 20, 25).movedim(-1, 1),
    ],
    ids=["rows", "positions last", "every other class", "classes last"],
)
def test_layouts_are_read_in_place(make):
    """No copy of the logits is made: the profiler sees no allocation of their size."""
    logits = make()
    target = torch.zeros(logits.shape[:1] + logits.shape[2:], dtype=torch.int64)
    with torch.profiler.profile(profile_memory=True) as profile:
        functional.cross_entropy(logits, target)
    allocated = [max(e.cpu_memory_usage, e.device_memory_usage) for e in profile.events()]
    size = logits.numel() * logits.element_size()
    assert max(allocated) < size / 2
    with torch.profiler.profile(profile_memory=True) as profile:
        functional.cross_entropy(logits.flip(0).mT.contiguous().mT, target)
    if logits.dim() == 2:  # transposed: copied, and that is seen
        assert max(event.cpu_memory_usage for event in profile.events()) >= size


@pytest.mark.cpu_only("minutes for the emulator; on a GPU: tests/cuda")
def test_more_than_two_to_the_31_logits():
    """Rows repeat by a stride of 0, so that they take no memory; a gradient would."""
    classes = 32_768
    row = torch.randn(classes)
    logits = row.expand(2**31 // classes + 3, classes)
    assert logits.numel() > 2**31
    target = torch.zeros(len(logits), dtype=torch.uint8)
    target[-1] = 7
    loss = functional.cross_entropy(logits, target, reduction="none")
    expected = F.cross_entropy(row.expand(2, classes), torch.tensor([0, 7]), reduction="none")
    torch.testing.assert_close(loss[-2:], expected)
    torch.testing.assert_close(loss[:-1], expected[0].expand(len(logits) - 1))


def test_arguments_by_position_and_deprecated_ones():
    logits, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    weight = torch.rand(3)
    ours = functional.cross_entropy(logits, target, weight, None, 1, None, "sum", 0.1)
    theirs = F.cross_entropy(logits, target, weight, None, 1, None, "sum", 0.1)
    torch.testing.assert_close(ours, theirs)
    for deprecated in ({"size_average": False}, {"reduce": False}):
        with pytest.warns(UserWarning, match="deprecated"):
            ours = functional.cross_entropy(logits, target, **deprecated)
        with pytest.warns(UserWarning, match="deprecated"):
            theirs = F.cross_entropy(logits, target, **deprecated)
        torch.testing.assert_close(ours, theirs)
