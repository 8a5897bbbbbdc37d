"""The head of a classifier, linear and cross-entropy in one op, where it is more than both.

What it shares with every other op is tested from the cases of op_cases.py.
"""

import inspect

import pytest
import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate

import mnist_ext
from mnist_ext import functional

REDUCTIONS = ["mean", "sum", "none"]
head = functional.linear_cross_entropy


def two_ops(input, linear_weight, target, *, linear_bias=None, **options):
    return F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, **options)


def relative_errors(tensors, truth):
    return [
        (t.double() - true).norm() / true.norm() for t, true in zip(tensors, truth, strict=True)
    ]


def value_and_gradients(op, tensors, target, **options):
    """Of (input, linear_weight, linear_bias)."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    input, linear_weight, linear_bias = leaves
    loss = op(input, linear_weight, target, linear_bias=linear_bias, **options)
    torch.manual_seed(1)
    grad_output = torch.randn(loss.shape).to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, grad_output)]


def tensors_of(rows, features, classes, dtype=torch.float32):
    tensors = [
        torch.randn(rows, features),
        torch.randn(classes, features) / features**0.5,
        torch.randn(classes),
    ]
    return [t.to(dtype) for t in tensors], torch.randint(0, classes, (rows,))


@pytest.mark.cpu_only("blocks of the CPU's size; the emulated kernels' are small in every case")
@pytest.mark.parametrize(
    ("kind", "label_smoothing"), [("indices", 0.0), ("indices", 0.1), ("probabilities", 0.0)]
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_error_of_several_blocks(device, reduction, kind, label_smoothing):
    """On average PyTorch's and a tenth; in place, and with a place for each.

    Three tenths without fused multiply-adds, which PyTorch has.
    """
    tensors, target = tensors_of(2500, 24, 1100)
    target[::7] = -100
    if kind == "probabilities":
        target = torch.rand(2500, 1100).softmax(1)
    options = {"reduction": reduction, "label_smoothing": label_smoothing}
    ours = value_and_gradients(head, tensors, target, **options)
    torchs = value_and_gradients(two_ops, tensors, target, **options)
    true_target = target.double() if kind == "probabilities" else target
    truth = value_and_gradients(two_ops, [t.double() for t in tensors], true_target, **options)
    errors = [relative_errors(result, truth) for result in (ours, torchs)]
    factor = 1.3 if device == "baseline" else 1.1
    for error, torchs_error in zip(*errors, strict=True):
        assert error <= max(factor * torchs_error, 2e-7)


# 64 rows are two or more blocks of rows, and cheaper by classes. As many features as rows, whose
# logits are kept in the gradient of the weight; and half as many.
BY_CLASSES = [(64, 64, 120_000), (64, 32, 200_000)]


@pytest.mark.cpu_only("blocks of classes are the CPU's")
@pytest.mark.parametrize("shape", BY_CLASSES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_error_of_blocks_of_classes(reduction, shape):
    """On average PyTorch's and a tenth; targets in the first class, in the last, and ignored."""
    tensors, target = tensors_of(*shape)
    target[:3] = torch.tensor([0, shape[2] - 1, -100])
    weight = torch.rand(shape[2])
    results = [
        value_and_gradients(op, ts, target, reduction=reduction, weight=weight.to(ts[0].dtype))
        for op, ts in (
            (head, tensors),
            (two_ops, tensors),
            (two_ops, [t.double() for t in tensors]),
        )
    ]
    errors = [relative_errors(result, results[2]) for result in results[:2]]
    for error, torchs_error in zip(*errors, strict=True):
        assert error <= max(1.1 * torchs_error, 2e-7)
    with torch.no_grad():
        bias = {"linear_bias": tensors[2], "weight": weight}
        loss = head(*tensors[:2], target, reduction=reduction, **bias)
    assert torch.equal(loss, results[0][0])


@pytest.mark.cpu_only("blocks of classes are the CPU's")
@pytest.mark.parametrize("shape", BY_CLASSES)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_blocks_of_classes_form_what_is_wanted(wanted, shape):
    tensors, target = tensors_of(*shape)
    truth = value_and_gradients(two_ops, tensors, target)
    for i in wanted:
        tensors[i].requires_grad_()
    torch.manual_seed(1)
    head(*tensors[:2], target, linear_bias=tensors[2]).backward(torch.randn(()))
    for i, (tensor, true) in enumerate(zip(tensors, truth[1:], strict=True)):
        if i in wanted:
            assert (tensor.grad - true).norm() <= 2e-6 * true.norm()
        else:
            assert tensor.grad is None


@pytest.mark.cpu_only("blocks of classes are the CPU's")
def test_losses_of_blocks_of_classes_are_summed_before_they_are_overwritten():
    """Half of the rows' logits are kept, half are formed again: two sums in the same memory."""
    (input, weight, bias), target = tensors_of(4096, 2048, 10)
    threads = torch.get_num_threads()
    try:
        losses = []
        for count in (1, *[2] * 30):
            torch.set_num_threads(count)
            losses.append(head(input, weight, target, linear_bias=bias, z_loss=1e-4))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(loss, losses[0]) for loss in losses)


@pytest.mark.cpu_only("blocks of classes are the CPU's")
@pytest.mark.parametrize("value", [float("-inf"), float("inf"), float("nan"), -1e30, 1e30])
def test_blocks_of_classes_of_extreme_logits(value):
    """Of one block whole, of another one logit: what PyTorch makes of them."""
    tensors, target = tensors_of(*BY_CLASSES[1])
    target %= 1000
    tensors[2][50_000:60_000] = tensors[2][70_000] = value
    ours, torchs = (value_and_gradients(op, tensors, target) for op in (head, two_ops))
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)


@pytest.mark.cpu_only("too many rows for the emulator")
def test_error_does_not_grow_with_the_number_of_rows():
    tensors, target = tensors_of(1_000_000, 4, 8)
    ours = value_and_gradients(head, tensors, target)
    torchs = value_and_gradients(two_ops, tensors, target)
    truth = value_and_gradients(two_ops, [t.double() for t in tensors], target)
    assert_as_accurate(ours, torchs, truth)


@pytest.mark.parametrize("rows", [1, 48])
def test_one_block_is_the_bits_of_both_ops(rows):
    tensors, target = tensors_of(rows, 64, 10)

    def ours(input, linear_weight, target, *, linear_bias):
        logits = functional.linear(input, linear_weight, linear_bias)
        return functional.cross_entropy(logits, target)

    leaves = [t.requires_grad_() for t in tensors]
    losses = [op(*leaves[:2], target, linear_bias=leaves[2]) for op in (ours, head)]
    assert torch.equal(*losses)
    for a, b in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 3, 4), (5, 0, 4), (1, 3, 1)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_empty_and_small_ones_of_what_is_ours(reduction, shape):
    tensors, target = tensors_of(*shape)
    options = {"softcap": 5.0, "z_loss": 0.01, "reduction": reduction}
    tensors = [t.requires_grad_() for t in tensors]
    bias = {"linear_bias": tensors[2]}
    ours = head(*tensors[:2], target, **bias, **options, return_lse=True)
    theirs = extended(*tensors[:2], target, tensors[2], **options)
    torch.testing.assert_close(ours, theirs, equal_nan=True)
    grads = [torch.autograd.grad(loss.sum(), tensors) for loss, _ in (ours, theirs)]
    torch.testing.assert_close(*grads, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_dtypes_of_what_is_ours(dtype):
    """Lse is float32."""
    tensors, target = tensors_of(33, 8, 20, dtype)
    options = {"softcap": 5.0, "z_loss": 0.01, "reduction": "mean"}
    bias = {"linear_bias": tensors[2]}
    loss, lse = head(*tensors[:2], target, **bias, **options, return_lse=True)
    truth = extended(*[t.float() for t in tensors[:2]], target, tensors[2].float(), **options)
    assert (loss.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(loss.float(), truth[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(lse, truth[1], rtol=2e-2, atol=2e-2)


def test_weight_shared_with_an_embedding():
    weight = torch.randn(20, 8, requires_grad=True)
    tokens, target = torch.randint(0, 20, (33,)), torch.randint(0, 20, (33,))
    grads = [
        torch.autograd.grad(op(F.embedding(tokens, weight), weight, target), weight)[0]
        for op in (head, two_ops)
    ]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


@pytest.mark.cpu_only("CUDA: the host must not wait to see the factor")
@pytest.mark.parametrize("scale", [float("inf"), float("nan")])
def test_ignored_rows_get_no_gradient_from_a_loss_that_overflowed(device, scale):
    (input, weight, _), target = tensors_of(4, 3, 5)
    target[1] = -100
    grads = []
    for op in (head, two_ops):
        leaf = input.clone().requires_grad_()
        grads += torch.autograd.grad(op(leaf, weight, target) * scale, leaf)
    torch.testing.assert_close(*grads, equal_nan=True)
    assert not grads[0][1].any()


def extended(input, linear_weight, target, linear_bias, softcap, z_loss, reduction, ignored=-100):
    """Compute the definition of softcap and z_loss: the loss and the log-sum-exp."""
    logits = F.linear(input, linear_weight, linear_bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    lse = logits.logsumexp(1)
    loss = F.cross_entropy(logits, target, reduction=reduction, ignore_index=ignored)
    squares = z_loss * lse.square() * (target != ignored)
    if reduction == "mean":
        return loss + squares.sum() / (target != ignored).sum(), lse
    return loss + (squares.sum() if reduction == "sum" else squares), lse


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_softcap_z_loss_and_return_lse(softcap, z_loss, reduction):
    tensors, target = tensors_of(6, 3, 4, torch.float64)
    target[2] = -100
    options = {"softcap": softcap, "z_loss": z_loss, "reduction": reduction}

    def ours(input, linear_weight, linear_bias):
        bias = {"linear_bias": linear_bias}
        return head(input, linear_weight, target, **bias, **options, return_lse=True)

    expected = extended(*tensors[:2], target, tensors[2], **options)
    torch.testing.assert_close(ours(*tensors), expected)
    torch.testing.assert_close(
        head(*tensors[:2], target, linear_bias=tensors[2], **options), expected[0]
    )
    leaves = [t.requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(ours, leaves)
    assert torch.autograd.gradgradcheck(ours, leaves)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_hooks_of_lse_see_its_own_gradient(label_smoothing):
    """By kernels, and by PyTorch's ops, which make the loss from lse."""
    input, linear_weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    options = {"z_loss": 0.1, "return_lse": True, "label_smoothing": label_smoothing}
    loss, lse = head(input, linear_weight, torch.tensor([0, 1, 2]), **options)
    seen = []
    lse.register_hook(seen.append)
    (loss + lse.sum()).backward()
    assert torch.equal(seen[0], torch.ones(3))


def test_z_loss_of_a_class_of_uint8_that_is_ignore_index_modulo_256():
    """Class 156 is not -100. With a weight the z_loss is made by PyTorch's ops."""
    input, linear_weight = torch.randn(2, 4), torch.randn(200, 4)
    target = torch.tensor([156, 3])
    of_int64, of_uint8 = [
        head(input, linear_weight, t, weight=torch.ones(200), z_loss=0.1)
        for t in (target, target.to(torch.uint8))
    ]
    assert of_uint8 == of_int64


@pytest.mark.cpu_only("the CPU's kernels alone have them")
@pytest.mark.parametrize(
    ("shape", "scale"),
    [
        *[((33, 8, 20), scale) for scale in (1e-3, 1.0, 20.0)],
        *[(shape, 3.0) for shape in BY_CLASSES],
    ],
)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_error_of_softcap_z_loss_and_lse(reduction, shape, scale):
    """On average half as much again as PyTorch's ops; with and without a gradient of lse."""
    tensors, target = tensors_of(*shape)
    tensors = [scale * t for t in tensors]
    target[::7] = -100
    options = {"softcap": 5.0, "z_loss": 0.01, "reduction": reduction}

    def results(op, tensors):
        leaves = [t.detach().requires_grad_() for t in tensors]
        loss, lse = op(*leaves)
        torch.manual_seed(1)
        of_loss, of_lse = (torch.randn(t.shape).to(t.dtype) for t in (loss, lse))
        return [
            loss.detach(),
            lse.detach(),
            *torch.autograd.grad(loss, leaves, of_loss, retain_graph=True),
            *torch.autograd.grad((loss, lse), leaves, (of_loss, of_lse)),
            *torch.autograd.grad(op(*leaves)[1], leaves, of_lse),
        ]

    def ours(x, w, b):
        return head(x, w, target, linear_bias=b, **options, return_lse=True)

    def torchs(x, w, b):
        return extended(x, w, target, b, **options)

    truth = results(torchs, [t.double() for t in tensors])
    errors = [relative_errors(results(op, tensors), truth) for op in (ours, torchs)]
    for error, torchs_error in zip(*errors, strict=True):
        assert error <= max(1.5 * torchs_error, 2.5e-7)


def test_module_is_pytorchs(device):
    """Names of parameters, and with the same ones the same loss."""
    torch.manual_seed(0)
    ours = mnist_ext.nn.LinearCrossEntropyLoss(5, 10, out_features=(4, 3), bias=True)
    assert {k: list(v.shape) for k, v in ours.state_dict().items()} == {
        "linear.weight": [120, 5],
        "linear.bias": [120],
    }
    input, target = torch.randn(2, 5), torch.randint(0, 10, (2, 4, 3))
    logits = F.linear(input, ours.linear.weight, ours.linear.bias).unflatten(1, (10, 4, 3))
    torch.testing.assert_close(ours(input, target), F.cross_entropy(logits, target))
    if hasattr(torch.nn, "LinearCrossEntropyLoss"):
        theirs = torch.nn.LinearCrossEntropyLoss(5, 10, out_features=(4, 3), bias=True)
        theirs.load_state_dict(ours.state_dict())
        torch.testing.assert_close(ours(input, target), theirs(input, target))
        assert repr(theirs).split("(")[0] == repr(ours).split("(")[0]


def test_arguments_are_pytorchs():
    """In name, order, kind and default; ours alone come behind them."""
    theirs = getattr(F, "linear_cross_entropy", None)
    if theirs is None:
        pytest.skip("torch.nn.functional.linear_cross_entropy came with torch 2.13")
    expected = [(p.name, p.kind, p.default) for p in inspect.signature(theirs).parameters.values()]
    ours = [(p.name, p.kind, p.default) for p in inspect.signature(head).parameters.values()]
    assert ours[: len(expected)] == expected


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": torch.zeros(2, 3, 4)}, RuntimeError, "input: expected .in_features. or .N"),
        ({"input": torch.zeros(2, 5)}, RuntimeError, "in_features of linear_weight .6, 4., got"),
        ({"linear_weight": torch.zeros(4)}, RuntimeError, "linear_weight: expected .C, in_fea"),
        ({"linear_bias": torch.zeros(5)}, RuntimeError, r"linear_bias: expected shape \[6\]"),
        ({"target": torch.zeros(2, 6), "ignore_index": 1}, RuntimeError, "ignore_index: expected"),
        ({"target": torch.zeros(3).long()}, ValueError, "batch_size"),
        ({"reduction": "max"}, ValueError, "max is not a valid value for reduction"),
        ({"softcap": 0.0}, ValueError, "softcap: expected a positive number, got 0.0"),
        ({"weight": torch.zeros(5)}, RuntimeError, "weight"),
        ({"label_smoothing": 2.0}, RuntimeError, "label_smoothing"),
        ({"linear_weight": torch.zeros(6, 4).double()}, RuntimeError, "dtype"),
        pytest.param(
            {"target": torch.tensor([0, 6])},
            IndexError,
            r"target: .* \[0, 6\) or ignore_index = -100, got 6 at \[1\]",
            marks=pytest.mark.cpu_only("CUDA ends the kernel, as in cross_entropy"),
        ),
    ],
)
def test_bad_arguments(change, error, message):
    arguments = {
        "input": torch.zeros(2, 4),
        "linear_weight": torch.zeros(6, 4),
        "target": torch.zeros(2).long(),
    } | change
    with pytest.raises(error, match=message):
        head(**arguments)
