"""What a TrainStep notices at its next step, and what only `refresh` sees."""

import copy
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from train_loops import Written, assert_same_bits, batches, first_batch, ordinary_step, pair

from mnist_ext.models import mlp
from mnist_ext.nn import swap


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, c, o: m[2].register_forward_hook(lambda *_: None), r"2 \(ReLU\) has"),
        (lambda m, c, o: c.register_forward_hook(lambda *_: None), r"criterion .* has"),
        (lambda m, c, o: m[1].weight.register_hook(lambda g: g), r"1\.weight has hooks"),
        (lambda m, c, o: o.register_step_post_hook(lambda *_: None), "optimizer has step"),
        (lambda m, c, o: m.append(nn.Dropout()), r"4 \(Dropout\)"),
        (lambda m, c, o: setattr(m, "2", nn.Tanh()), r"2 \(Tanh\)"),
        (lambda m, c, o: setattr(m[1], "forward", lambda x: x), "forward was replaced"),
        (lambda m, c, o: setattr(m[0], "start_dim", 2), r"Flatten\(start_dim=1, end_dim=-1\), got"),
        (lambda m, c, o: nn.utils.parametrizations.orthogonal(m[1]), r"1 \(ParametrizedLinear\)"),
        (
            lambda m, c, o: setattr(m[1], "weight", nn.Parameter(torch.zeros(20, 784))),
            "belongs to no layer",
        ),
        (lambda m, c, o: m.requires_grad_(False), "every parameter is frozen"),
        (lambda m, c, o: m.double(), "images: expected torch.float64"),
        (lambda m, c, o: m.bfloat16(), r"1\.weight: expected|images: expected torch.bfloat16"),
        (lambda m, c, o: setattr(c, "reduction", "none"), "reduction"),
        (lambda m, c, o: setattr(o, "step", lambda: None), "step was replaced"),
        (
            lambda m, c, o: setattr(c, "weight", nn.Parameter(torch.ones(10))),
            "criterion: expected a weight that needs no gradient",
        ),
        (lambda m, c, o: o.param_groups[0].update(differentiable=True), "is differentiable"),
        (
            lambda m, c, o: o.add_param_group({"params": [nn.Parameter(torch.zeros(3))]}),
            "parameter 0 of group 1",
        ),
    ],
)
def test_refused_after_the_change(change, message):
    model = mlp((20,), "relu")
    step, _ = pair(model)
    images, labels = first_batch(8)
    step(images, labels)
    change(model, step._criterion, step._optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        step(images, labels)
    with pytest.raises(ValueError, match=message):
        step.epoch(images, labels, 4)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def set_weights(model, criterion, optimizer):
    criterion.weight = torch.linspace(0.5, 2, 10)


def replace_bias(model, criterion, optimizer):
    """By one of the same numbers: it is another object that is trained from now on."""
    optimizer.param_groups[0]["params"][1] = model[1].bias = nn.Parameter(model[1].bias.detach())


@pytest.mark.parametrize(
    "change",
    [
        lambda m, c, o: swap(m),
        lambda m, c, o: m[1].requires_grad_(False),
        lambda m, c, o: m[1].requires_grad_(not m[1].bias.requires_grad),
        lambda m, c, o: m.eval(),
        lambda m, c, o: m.insert(3, nn.Identity()),
        lambda m, c, o: m.insert(4, nn.ReLU()),
        lambda m, c, o: setattr(c, "ignore_index", 3),
        lambda m, c, o: setattr(c, "label_smoothing", 0.1),
        lambda m, c, o: setattr(c, "reduction", "sum"),
        set_weights,
        replace_bias,
    ],
)
def test_followed_after_the_change(change):
    model = mlp((20,), "relu")
    step, loop = pair(model, sgd={"lr": 0.001})
    for x, y in zip(*batches(4, 16), strict=True):
        assert torch.equal(step(x, y), ordinary_step(*loop, x, y))
        change(model, step._criterion, step._optimizer)
        change(*loop)
    assert_same_bits(model, loop[0])


def test_attributes_that_a_forward_reads():
    """Another value is noticed, of whatever type, also one that cannot be compared."""
    model = Written(lambda m, x: m.b(m.a(x)))
    model.scales = torch.ones(3)
    step, loop = pair(model)
    for x, y in zip(*batches(3, 16), strict=True):
        assert torch.equal(step(x, y), ordinary_step(*loop, x, y))
        for m in (model, loop[0]):
            m.scales, m.flow = torch.zeros(3), lambda m, x: m.b(F.relu(m.a(x)))
    assert_same_bits(model, loop[0])


def test_refresh():
    """What a forward reads beyond attributes is seen when asked for."""
    flows = [lambda m, x: m.b(m.a(x))]
    model = Written(lambda m, x: flows[0](m, x))
    step, loop = pair(model)
    images, labels = first_batch(16)
    flows[0] = lambda m, x: m.b(F.relu(m.a(x)))
    assert not torch.equal(step(images, labels), ordinary_step(*loop, images, labels))
    model.load_state_dict(loop[0].state_dict())
    step.refresh()
    assert torch.equal(step(images, labels), ordinary_step(*loop, images, labels))
    assert_same_bits(model, loop[0])
    flows[0] = lambda m, x: m.b(m.a(x).tanh())
    with pytest.raises(ValueError, match="found tanh"):
        step.refresh()


def hook_of_all_modules(monkeypatch):
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    return handle.remove


def patched_forward(monkeypatch):
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: x)
    return monkeypatch.undo


def patched_function(monkeypatch):
    monkeypatch.setattr(F, "linear", types.SimpleNamespace())
    return monkeypatch.undo


@pytest.mark.parametrize(
    ("watch", "message"),
    [
        (hook_of_all_modules, "hooks of all modules"),
        (patched_forward, "of PyTorch's own layers was replaced"),
        (patched_function, "of PyTorch's own layers was replaced"),
    ],
)
def test_what_concerns_all_layers(watch, message):
    step, _ = pair(mlp((20,)))
    undo = watch(pytest.MonkeyPatch())
    try:
        with pytest.raises(ValueError, match=message):
            step(*first_batch(8))
    finally:
        undo()
    step(*first_batch(8))


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (lambda: torch.autocast("cpu", dtype=torch.bfloat16), "autocast is on"),
        # Momentum buffers made there could not be written by the ordinary loop afterwards.
        (torch.inference_mode, "inference_mode is on"),
    ],
)
def test_modes(mode, message):
    model = mlp((20,))
    step, _ = pair(model, sgd={"momentum": 0.9})
    before = copy.deepcopy(model)
    with mode(), pytest.raises(ValueError, match=message):
        step(*first_batch(8))
    assert_same_bits(model, before)


def test_tensors_that_share_memory():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    step, _ = pair(model, sgd={"momentum": 0.9})
    images, labels = torch.randn(3, 10), torch.arange(3)
    step(images, labels)
    state = step._optimizer.state
    state[model[0].weight]["momentum_buffer"] = state[model[1].weight]["momentum_buffer"]
    with pytest.raises(ValueError, match=r"momentum_buffers\[2\] and .*\[0\] share memory"):
        step(images, labels)
    model[1].bias.data = model[0].weight.data[2]
    message = r"1\.bias shares memory with 0\.weight"
    with pytest.raises(ValueError, match=message):
        step(images, labels)
    with pytest.raises(ValueError, match=message):
        pair(model)
