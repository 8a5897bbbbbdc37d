"""Derivatives of every kind: gradcheck, second ones, torch.func's transforms, in-place writes."""

import copy

import numpy
import pytest
import torch
import torch.nn.functional as F
from op_cases import CASES, FEW, MLP, subsets, value_and_gradients, with_gradients
from torch import nn
from torch.autograd import functional as functional_api
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import mnist_ext
from mnist_ext import _autograd, functional


def checkable(case):
    """Return our function of the case's differentiable tensors, and these."""
    leaves, wanted = with_gradients(case.tensors(torch.float64), case.differentiable)

    def function(*inputs):
        values = iter(inputs)
        arguments = [
            next(values) if i in case.differentiable and leaf is not None else leaf
            for i, leaf in enumerate(leaves)
        ]
        return case.ours(*arguments)

    return function, tuple(wanted)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_gradcheck(device, case):
    """Backward and forward mode; grad_output is random, and a batch of them at once (vmap)."""
    function, inputs = checkable(case)
    gradcheck(function, inputs, check_batched_grad=True, check_forward_ad=True, fast_mode=True)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_vmap_over_the_backward_needs_no_fallback(case, request):
    """The fallback would run our ops one grad_output at a time; here it is an error."""
    before = torch._C._functorch._is_vmap_fallback_enabled()
    torch._C._functorch._set_vmap_fallback_enabled(False)
    request.addfinalizer(lambda: torch._C._functorch._set_vmap_fallback_enabled(before))
    results = []
    for function in (case.ours, case.torchs):
        leaves, wanted = with_gradients(case.tensors(torch.float64), case.differentiable)
        value = function(*leaves)
        torch.manual_seed(1)
        grad_outputs = torch.randn(4, *value.shape, dtype=value.dtype)
        backward = torch.func.vmap(lambda g, v=value, w=wanted: torch.autograd.grad(v, w, g))
        results.append(backward(grad_outputs))
    torch.testing.assert_close(*results)


@pytest.mark.cpu_only("a recorded backward consists of PyTorch's ops")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradgradcheck(case):
    function, inputs = checkable(case)
    gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.usefixtures("every_kernel")
@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_gradients_belong_to_the_caller(case, factor):
    """A second backward gives the same bits, whatever is written to what the first returned."""
    for dtype in (torch.float32, torch.bfloat16):
        leaves, wanted = with_gradients(case.tensors(dtype), case.differentiable)
        value = case.ours(*leaves)
        grad_output = torch.full_like(value, factor)
        first = torch.autograd.grad(value, wanted, grad_output, retain_graph=True)
        expected = [g.clone() for g in first]
        for gradient in first:
            gradient.fill_(7)
        second = torch.autograd.grad(value, wanted, grad_output, retain_graph=True)
        third = torch.autograd.grad(value, wanted, grad_output)
        for results in (second, third):
            torch.testing.assert_close(results, tuple(expected), rtol=0, atol=0)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_only_the_gradients_asked_for(device, case):
    """Each subset of the tensors: the same gradients, by a recorded backward too.

    The gradient of a sum is expanded: all strides 0.
    """
    tensors = case.tensors(torch.float32)
    present = [i for i in case.differentiable if tensors[i] is not None]
    everything = dict(zip(present, value_and_gradients(case.ours, case, tensors)[1:], strict=True))
    for subset in subsets(present):
        leaves, wanted = with_gradients(tensors, subset)
        value = case.ours(*leaves)
        assert value.requires_grad == bool(subset)
        for recorded in (False, True) if subset else ():
            grads = torch.autograd.grad(
                value.sum(), wanted, create_graph=recorded, retain_graph=True
            )
            for i, grad in zip(subset, grads, strict=True):
                torch.testing.assert_close(grad, everything[i])


def test_a_recorded_gradient_depends_on_what_pytorchs_depends_on(device):
    """On ReLU's output, though its derivative by that is 0."""
    input, weight = torch.randn(2, 4), torch.randn(3, 4, requires_grad=True)
    ours, theirs = [
        torch.autograd.grad(output.sum(), weight, create_graph=True)[0]
        for output in (
            functional.linear(input, weight, activation="relu"),
            F.linear(input, weight).relu(),
        )
    ]
    for gradient in (ours, theirs):
        (second,) = torch.autograd.grad(gradient.square().sum(), weight)
        assert not second.any()


@pytest.mark.parametrize("case", FEW, ids=str)
def test_inputs_and_saved_tensors_are_not_written(device, case):
    tensors = case.tensors(torch.float32)
    leaves, wanted = with_gradients(tensors, case.differentiable)
    given = [t for t in leaves if t is not None]
    before = [(t.detach().clone(), t._version) for t in given]
    value = case.ours(*leaves)
    grad_output = torch.randn(value.shape)
    grad_before, value_before = grad_output.clone(), value.detach().clone()
    torch.autograd.grad(value, wanted, grad_output)
    for tensor, (content, version) in zip(given, before, strict=True):
        assert torch.equal(tensor, content)
        assert tensor._version == version
    assert torch.equal(grad_output, grad_before)
    assert torch.equal(value, value_before)
    assert value._version == 0


@pytest.mark.parametrize("case", FEW, ids=str)
def test_writing_what_the_backward_reads_raises(case):
    """Each tensor written in between: PyTorch's error, where PyTorch's backward reads it, too."""

    def backward_after_writing(function, written: int) -> bool:
        leaves, wanted = with_gradients(tensors, case.differentiable)
        value = function(*leaves)
        expected = torch.autograd.grad(value, wanted, torch.ones_like(value), retain_graph=True)
        leaves[written].detach().zero_()  # shares its version counter
        try:
            again = torch.autograd.grad(value, wanted, torch.ones_like(value))
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
            return False
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))
        return True

    tensors = case.tensors(torch.float32)
    for written in range(len(tensors)):
        if tensors[written] is not None:
            works = backward_after_writing(case.ours, written)
            if case.op == "linear_cross_entropy":  # which may keep all that it is given
                assert not works or backward_after_writing(case.torchs, written)
                continue
            # Ours keeps the logits themselves, and no copy of an input that is not contiguous.
            keeps_more = case.op == "cross_entropy" or not tensors[written].is_contiguous()
            assert works == (not keeps_more and backward_after_writing(case.torchs, written))


@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_gradient_of_a_mean_is_that_of_the_forward(device, reduction, factor):
    """Logits and target written before the first backward: the gradient of what they were.

    CUDA's backward may read them again, whatever the factor is, and says so.
    """
    logits, target = torch.randn(5, 3, requires_grad=True), torch.tensor([0, 2, 1, 0, 2])
    loss = F.cross_entropy(logits, target.clone(), reduction=reduction)
    expected = torch.autograd.grad(loss * factor, logits)[0]
    ours = functional.cross_entropy(logits, target, reduction=reduction) * factor
    logits.detach().zero_()
    target.zero_()
    if "cuda" in device:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(ours, logits)
    else:
        torch.testing.assert_close(torch.autograd.grad(ours, logits)[0], expected)


def _sum(f):
    return lambda x: f(x).sum()


def _batch(x):
    return torch.stack([x, x + 0.5, x * 2])


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(_sum(f))(x),
    "vmap": lambda f, x: torch.func.vmap(f)(_batch(x)),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(_sum(f)))(_batch(x)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones_like(f(x))),
    "autograd's jacobian": lambda f, x: functional_api.jacobian(_sum(f), x),
    "autograd's hessian": lambda f, x: functional_api.hessian(_sum(f), x),
    "vectorized jacobian": lambda f, x: functional_api.jacobian(_sum(f), x, vectorize=True),
    "vectorized hessian": lambda f, x: functional_api.hessian(_sum(f), x, vectorize=True),
}


@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_agree(case, transform):
    first, *rest = case.tensors(torch.float64)
    torch.testing.assert_close(
        *(
            TRANSFORMS[transform](lambda x, f=f: f(x, *rest), first.contiguous())
            for f in (case.ours, case.torchs)
        )
    )


@pytest.mark.parametrize("case", FEW, ids=str)
def test_vmap_over_every_tensor(case):
    tensors = case.tensors(torch.float64)
    batched = [None if t is None else torch.stack([t, t]) for t in tensors]
    dims = tuple(None if t is None else 0 for t in tensors)
    ours, torchs = (torch.func.vmap(f, dims)(*batched) for f in (case.ours, case.torchs))
    torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_saved_tensor_hooks_and_checkpoint(case):
    tensors = case.tensors(torch.float32)
    expected = value_and_gradients(case.ours, case, tensors)

    def checkpointed(*leaves):
        return checkpoint(case.ours, *leaves, use_reentrant=False)

    again = value_and_gradients(checkpointed, case, tensors)
    with torch.autograd.graph.save_on_cpu():
        saved = value_and_gradients(case.ours, case, tensors)
    for results in (again, saved):
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("case", [*FEW, MLP[-1]], ids=str)  # many layers in two buffers
def test_no_grad_and_inference_mode(case):
    tensors = case.tensors(torch.float32)
    leaves, _ = with_gradients(tensors, case.differentiable)
    expected = case.ours(*leaves)
    with torch.no_grad():
        assert torch.equal(case.ours(*leaves), expected)
        assert not case.ours(*leaves).requires_grad
    with torch.inference_mode():
        assert torch.equal(case.ours(*leaves), expected)
        assert case.ours(*leaves).is_inference()


@pytest.mark.filterwarnings("ignore:Error detected in")  # how it names the forward
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize("case", FEW, ids=str)
def test_anomaly_mode(case):
    """NaN from a backward is found, and the forward that made it is named."""
    tensors = case.tensors(torch.float32)
    leaves, wanted = with_gradients(tensors, case.differentiable)
    with torch.autograd.detect_anomaly():
        value = case.ours(*leaves)
        grad_output = torch.full_like(value, torch.nan)
        with pytest.raises(RuntimeError, match="returned nan values"):
            torch.autograd.grad(value, wanted, grad_output)


@pytest.mark.parametrize("error", [RuntimeError, ValueError, IndexError, NotImplementedError])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_what_a_hook_raises_arrives_unchanged(case, error):
    """And the call is not made again, though the hook would let it pass."""
    leaves, _ = with_gradients(case.tensors(torch.float32), case.differentiable)
    calls = []

    def pack(tensor):
        calls.append(tensor)
        if len(calls) == 1:
            raise error("disk full")
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        pytest.raises(error, match=r"^disk full$"),
    ):
        case.ours(*leaves)
    assert len(calls) == 1


@pytest.mark.parametrize("swapped", [True, False], ids=["mlp", "linear"])
def test_a_backward_makes_the_gradients_that_are_asked_for(recorded, swapped):
    """autograd.grad of some leaves: not the products of the others, where these cost something."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.Linear(512, 64))
    ours = mnist_ext.nn.swap(copy.deepcopy(model))
    forward = ours if swapped else lambda input: ours[3](ours[2](ours[0](input).relu()))
    asked = recorded("_linear_backward")
    input = torch.randn(8192, 64, requires_grad=True)
    for wanted, products in (
        (lambda m: [input], [(False, True, False)] * 3),
        (lambda m: [m[3].weight], [(True, False, False)]),
        (lambda m: [m[2].bias, m[3].bias], [(False, True, True), (False, False, True)]),
    ):
        asked.clear()
        expected = torch.autograd.grad(model(input).sum(), wanted(model))
        grads = torch.autograd.grad(forward(input).sum(), wanted(ours))
        torch.testing.assert_close(grads, expected)
        # (grad_weight, grad_input, grad_bias) of each layer
        assert [(a[1] is not None, a[2] is not None, a[4]) for a in asked] == products


def test_without_a_gradient_nothing_is_kept(monkeypatch, recorded):
    model = mnist_ext.nn.swap(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)))
    input, target = torch.randn(4, 5), torch.tensor([0, 1, 2, 1])
    for function in (_autograd.Linear, _autograd.MLP, _autograd.CrossEntropy):
        monkeypatch.setattr(function, "forward", lambda *_: pytest.fail("enters the graph"))
    calls = recorded("_mlp")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            logits = model(input)
            functional.cross_entropy(logits, target)
            functional.linear(input, model[0].weight)
    assert [call[4] for call in calls] == [False, False]  # keep_hidden


def test_hooks_decide_what_is_kept():
    """Between forward and backward there is no gradient beside the logits."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, id):
        logits = torch.randn(40, 30, requires_grad=True)
        functional.cross_entropy(logits, torch.randint(30, (40,)))
    assert logits.numel() <= sum(sizes) < 1.5 * logits.numel()


def _second_backward(loss, logits):
    value = loss(logits)
    torch.autograd.grad(value, logits, retain_graph=True)
    return torch.autograd.grad(value, logits)


@pytest.mark.parametrize("ignored", [-100, 2, numpy.int64(-100)], ids=["-100", "2", "numpy"])
@pytest.mark.parametrize(
    "way",
    [
        lambda loss, x: torch.autograd.grad(loss(x), x, create_graph=True),
        lambda loss, x: torch.autograd.grad(loss(x), x, torch.ones(2), is_grads_batched=True)[0],
        lambda loss, x: (torch.func.grad(loss)(x.detach()),),
        lambda loss, x: torch.autograd.grad(checkpoint(loss, x, use_reentrant=False), x),
        _second_backward,
    ],
)
def test_ignored_rows_have_gradient_0_however_it_is_made(way, ignored):
    values, target = torch.randn(5, 4), torch.tensor([0, int(ignored), 3, 1, int(ignored)])
    values[1], values[4] = float("nan"), float("inf")

    def loss(logits):
        return functional.cross_entropy(logits, target, ignore_index=ignored)

    grad = way(loss, values.clone().requires_grad_())[0].detach()
    assert (grad[[1, 4]] == 0).all()
    reference = values[[0, 2, 3]].requires_grad_()
    F.cross_entropy(reference, target[[0, 2, 3]]).backward()
    torch.testing.assert_close(grad[[0, 2, 3]], reference.grad)


def test_a_hook_of_the_logits_is_called_once_by_a_recorded_backward():
    logits = torch.randn(4, 5).requires_grad_()
    target = torch.tensor([0, 1, 2, 4])
    (expected,) = torch.autograd.grad(F.cross_entropy(logits, target), logits)
    calls = []
    logits.register_hook(lambda grad: calls.append(grad) or 2 * grad)
    loss = functional.cross_entropy(logits, target)
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    assert len(calls) == 1
    torch.testing.assert_close(grad, 2 * expected)
