"""Wrong calls: PyTorch's type of exception, and a message that names op, argument and what came.

`test_random_calls.py` looks for types that differ; here are the messages, and the ops called on
their own.
"""

import pytest
import torch
import torch.nn.functional as F

from mnist_ext import functional, nn

op = torch.ops.mnist_ext
X, W = torch.randn(3, 4), torch.randn(5, 4)
LOGITS, TARGET = torch.randn(3, 4), torch.tensor([0, 1, 2])
IMAGES = torch.randn(2, 3, 4, 5)


def indices(*shape, dtype=torch.int64):
    return torch.zeros(shape, dtype=dtype)


# (op, arguments, options, type, pattern that the message must match)
WRONG_CALLS = [
    ("linear", (X, torch.randn(5, 3)), {}, RuntimeError, r"input.*in_features = 3.*\[3, 4\]"),
    ("linear", (torch.tensor(1.0), W), {}, RuntimeError, r"input \[\] float32, weight \[5, 4\]"),
    ("linear", (X, torch.randn(5, 4, 1)), {}, RuntimeError, r"weight \[5, 4, 1\]"),
    ("linear", (X, W.double()), {}, RuntimeError, r"weight.*float32.*float64"),
    ("linear", (X, W, torch.randn(4)), {}, RuntimeError, r"bias.*\[5\].*\[4\]"),
    ("linear", (X, W, torch.randn(5).double()), {}, RuntimeError, r"float32.*bias \[5\] float64"),
    ("linear", ([1.0], W), {}, TypeError, r"list"),
    ("linear", (X, [[1.0]]), {}, TypeError, r"list"),
    ("cross_entropy", (LOGITS, indices(2)), {}, ValueError, r"batch.*target \[2\] int64"),
    ("cross_entropy", (LOGITS, indices()), {}, ValueError, r"target \[\] int64"),
    ("cross_entropy", (LOGITS, indices(3, 4)), {}, RuntimeError, r"probabilities.*\[3, 4\] int64"),
    ("cross_entropy", (IMAGES, indices(2, 4, 6)), {}, RuntimeError, r"target \[2, 4, 6\] int64"),
    ("cross_entropy", (LOGITS, TARGET.bool()), {}, RuntimeError, r"target \[3\] bool"),
    ("cross_entropy", (LOGITS, TARGET.short()), {}, RuntimeError, r"target \[3\] int16"),
    ("cross_entropy", (LOGITS, TARGET.float()), {}, RuntimeError, r"target \[3\] float32"),
    ("cross_entropy", (LOGITS.long(), TARGET), {}, NotImplementedError, r"input \[3, 4\] int64"),
    ("cross_entropy", (LOGITS[:, :0], TARGET), {}, IndexError, r"input \[3, 0\]"),
    ("cross_entropy", (LOGITS, TARGET, X[0, :3]), {}, RuntimeError, r"weight.* \[3\]"),
    ("cross_entropy", (LOGITS, TARGET, X[:1]), {}, RuntimeError, r"weight \[1, 4\]"),
    ("cross_entropy", (LOGITS, TARGET, X[0].double()), {}, RuntimeError, r"weight \[4\] float64"),
    ("cross_entropy", (LOGITS, LOGITS[:, :3]), {}, RuntimeError, r"target \[3, 3\] float32"),
    ("cross_entropy", (LOGITS, LOGITS), {"ignore_index": 1}, RuntimeError, r"ignore_index"),
    ("cross_entropy", (LOGITS, TARGET), {"label_smoothing": 1.1}, RuntimeError, r"1\.1"),
    ("cross_entropy", (LOGITS, TARGET), {"label_smoothing": "x"}, TypeError, r"label_smoothing"),
    ("cross_entropy", (LOGITS, TARGET), {"reduction": "max"}, ValueError, r"max"),
    ("cross_entropy", (LOGITS, TARGET), {"ignore_index": 1.5}, TypeError, r"ignore_index"),
    ("cross_entropy", (LOGITS, [0, 1, 2]), {}, TypeError, r"list"),
    ("cross_entropy", ([[1.0]], TARGET), {}, TypeError, r"list"),
    ("cross_entropy", (LOGITS, TARGET.to("meta")), {}, RuntimeError, r"meta"),
]


IMAGES_TARGET = indices(2, 4, 5).index_fill_(2, torch.tensor(3), 7)
OUT_OF_RANGE = [
    ("cross_entropy", (LOGITS, TARGET + 2), {}, IndexError, r"target.*\[0, 4\).*got 4 at \[2\]"),
    ("cross_entropy", (LOGITS, TARGET - 1), {}, IndexError, r"target.*got -1 at \[0\]"),
    ("cross_entropy", (IMAGES, IMAGES_TARGET), {}, IndexError, r"\[0, 3\).*got 7 at \[0, 0, 3\]"),
    ("cross_entropy", (LOGITS[0], torch.tensor(4)), {}, IndexError, r"target.*got 4 at \[\]"),
]
# A CUDA kernel ends there, with an assertion on the device: tests/cuda.
ends_kernels = pytest.mark.cpu_only("a class index out of range ends a CUDA kernel")
WRONG_CALLS += [pytest.param(call, marks=ends_kernels) for call in OUT_OF_RANGE]


@pytest.mark.parametrize("call", WRONG_CALLS, ids=lambda c: f"{c[0]}-{c[4]}-{c[2]}")
def test_wrong_calls_raise_what_pytorch_raises(call):
    name, arguments, options, error, message = call
    with pytest.raises(error):
        getattr(F, name)(*arguments, **options)
    with pytest.raises(error, match=message) as raised:
        getattr(functional, name)(*arguments, **options)
    assert error is TypeError or error is raised.type
    assert error is TypeError or f"mnist_ext.{name}" in str(raised.value)


@ends_kernels
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_targets_are_checked_in_the_backward_too(reduction):
    """They may have been changed behind autograd's back."""
    logits, target = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 0])
    loss = functional.cross_entropy(logits, target, reduction=reduction).sum()
    loss.backward(retain_graph=True)
    target.numpy()[3] = 99
    with pytest.raises(IndexError, match=r"cross_entropy.*: target.*got 99 at \[3\]"):
        loss.backward()


@pytest.mark.parametrize(
    "call",
    [
        lambda name: functional.linear(X, W, activation=name),
        lambda name: functional.mlp(X, [(W, None, name), (W.mT, None, "relu")]),
        lambda name: nn.Linear(2, 2, activation=name),
    ],
)
def test_unknown_activation(call):
    with pytest.raises(ValueError, match=r"activation.*none, relu.*'gelu'"):
        call("gelu")


# The ops can be called on their own; nothing they are given is taken on trust.
ONE = torch.tensor(1.0)
_, STATS, TOTAL = op.cross_entropy(LOGITS, TARGET, None, -100, 0.0, 1)


def linear(input=X, weight=W, bias=None):
    return op.linear(input, weight, bias, False)


def linear_backward(grad_output=X @ W.T, input=X, weight=W, output=None):
    return op.linear_backward(grad_output, input, weight, output, True)


def cross_entropy(logits=LOGITS, target=TARGET, weight=None, ignore=-100, smoothing=0.0, mode=1):
    return op.cross_entropy(logits, target, weight, ignore, smoothing, mode)


def cross_entropy_backward(
    grad_output=ONE, target=TARGET, stats=STATS, total=TOTAL, mode=1, need=False
):
    return op.cross_entropy_backward(
        grad_output, LOGITS, target, None, stats, total, -100, 0.0, mode, True, need
    )


@pytest.mark.parametrize(
    ("function", "changed", "error", "message"),
    [
        (linear, {"input": torch.tensor(1.0)}, RuntimeError, r"input: expected 1 to 64 dimensions"),
        (linear, {"input": X.long()}, RuntimeError, r"input: expected float32.*int64"),
        (linear, {"input": X.half()}, RuntimeError, r"weight: expected.*float16.*float32"),
        (linear, {"weight": W[0]}, RuntimeError, r"weight: expected 2 dimensions.*\[4\]"),
        (linear, {"bias": W[:4]}, RuntimeError, r"bias: expected shape \[5\].*\[4, 4\]"),
        (linear_backward, {"grad_output": X[:, :2]}, RuntimeError, r"weight.*\[2, in_f.*\[3, 2\]"),
        (linear_backward, {"grad_output": W @ W.T}, RuntimeError, r"input.*\[5, 5\].*\[3, 4\]"),
        (linear_backward, {"grad_output": torch.tensor(1.0)}, RuntimeError, r"1 to 64 dimensions"),
        (linear_backward, {"output": torch.randn(1, 5)}, RuntimeError, r"output.*\[3, 5\]"),
        (linear_backward, {"input": X.double()}, RuntimeError, r"input.*float32.*float64"),
        (linear_backward, {"input": X[:, :3]}, RuntimeError, r"input.*in_features = 4"),
        (cross_entropy, {"logits": torch.tensor(1.0)}, RuntimeError, r"logits: expected \[C\]"),
        (cross_entropy, {"logits": LOGITS.long()}, RuntimeError, r"logits: expected float32"),
        (cross_entropy, {"target": TARGET[:2]}, ValueError, r"target: expected shape \[3\]"),
        (cross_entropy, {"target": indices(3, 1)}, RuntimeError, r"target: expected shape \[3\]"),
        (
            cross_entropy,
            {"target": TARGET.char()},
            RuntimeError,
            r"target: expected class ind.*int8",
        ),
        (cross_entropy, {"target": LOGITS.half()}, RuntimeError, r"target: expected.*float16"),
        (cross_entropy, {"target": X[:2]}, RuntimeError, r"target: expected probab.*\[2, 4\]"),
        (cross_entropy, {"target": LOGITS, "ignore": 0}, RuntimeError, r"ignore_index.*got 0"),
        (cross_entropy, {"weight": X}, RuntimeError, r"weight: expected shape \[4\]"),
        (cross_entropy, {"weight": X[0].half()}, RuntimeError, r"weight.*float32.*float16"),
        (cross_entropy, {"smoothing": 1.5}, RuntimeError, r"label_smoothing.*got 1\.5"),
        (cross_entropy, {"smoothing": float("nan")}, RuntimeError, r"label_smoothing.*got nan"),
        (cross_entropy, {"mode": 3}, ValueError, r"reduction.*got 3"),
        (cross_entropy_backward, {"grad_output": X}, RuntimeError, r"grad_output.*one element"),
        (cross_entropy_backward, {"mode": 0}, RuntimeError, r"grad_output: expected shape \[3\]"),
        (cross_entropy_backward, {"stats": STATS[:, 1:]}, RuntimeError, r"stats.*\[2, 2\]"),
        (cross_entropy_backward, {"stats": STATS.double()}, RuntimeError, r"stats.*float64"),
        (cross_entropy_backward, {"total": STATS}, RuntimeError, r"total_weight: expected one"),
        (cross_entropy_backward, {"need": True}, RuntimeError, r"need_target: expected false"),
    ],
    ids=lambda p: p.__name__ if callable(p) and not isinstance(p, type) else None,
)
def test_ops_check_their_arguments(function, changed, error, message):
    function()
    with pytest.raises(error, match=message):
        function(**changed)


@ends_kernels
@pytest.mark.parametrize("function", [cross_entropy, cross_entropy_backward])
def test_ops_check_class_indices(function):
    with pytest.raises(IndexError, match=r"target.*got 4 at \[2\]"):
        function(target=TARGET + 2)
