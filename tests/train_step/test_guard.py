"""What a TrainStep notices at its next step, and what only `refresh` sees."""

import copy
import types
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune
from train_loops import (
    Written,
    assert_same_bits,
    batches,
    check_steps,
    first_batch,
    ordinary_step,
    pair,
)

from mnist_ext import TrainStep
from mnist_ext.app.training.models import mlp
from mnist_ext.nn import swap


def nothing(*_):
    return None


class Called(nn.Sequential):
    def __call__(self, x):
        return super().__call__(2 * x)


# By message: changes of Sequential(Flatten, Linear, ReLU, Linear), criterion and optimizer.
REFUSED = {
    r"4 \(Dropout\).*remove it": lambda m, c, o: m.append(nn.Dropout()),
    r"2 \(Tanh\)": lambda m, c, o: setattr(m, "2", nn.Tanh()),
    r"0 \(ReLU\)": lambda m, c, o: m.insert(0, nn.ReLU()),
    r"Flatten\(start_dim=1, end_dim=-1\), got": lambda m, c, o: setattr(m[0], "start_dim", 0),
    "4: expected in_features to be the layer's before, 10, got 9": (
        lambda m, c, o: o.add_param_group({"params": m.append(nn.Linear(9, 9))[4].parameters()})
    ),
    r"3\.weight is shared": lambda m, c, o: m.extend([m[2], m[3]]),
    r"4\.bias is shared": lambda m, c, o: setattr(
        m.append(nn.Linear(10, 10))[4], "bias", m[3].bias
    ),
    r"3\.bias shares memory with 3\.weight": (
        lambda m, c, o: setattr(m[3].bias, "data", m[3].weight.data[2])
    ),
    r"1 \(Linear\): its forward was repl": lambda m, c, o: setattr(m[1], "forward", lambda x: x),
    r"model \(Sequential\): its forward": lambda m, c, o: setattr(m, "forward", lambda x: x),
    r"model \(Called\): its class has a __call__": lambda m, c, o: setattr(m, "__class__", Called),
    r"ParametrizedLinear\).*remove_p": lambda m, c, o: nn.utils.parametrizations.orthogonal(m[1]),
    r"1 \(Linear\) has forward_pre_h": lambda m, c, o: prune.random_unstructured(m[1], "bias", 0.5),
    r"2 \(ReLU\) has forward_hooks.*remove": lambda m, c, o: m[2].register_forward_hook(nothing),
    r"model \(.*has forward_pre_hooks": lambda m, c, o: m.register_forward_pre_hook(nothing),
    r"3 \(.*has backward_hooks": lambda m, c, o: m[3].register_full_backward_hook(nothing),
    r"3 \(.*has backward_pre_hooks": lambda m, c, o: m[3].register_full_backward_pre_hook(nothing),
    r"1\.weight has hooks": lambda m, c, o: m[1].weight.register_hook(nothing),
    r"3\.bias has hooks": lambda m, c, o: m[3].bias.register_post_accumulate_grad_hook(nothing),
    r"1\.weight: .*got.*bfloat16|images: expected torch.bfloat16": lambda m, c, o: m.bfloat16(),
    r"3\.weight: expected.*as all others.*got.*float64": lambda m, c, o: m[3].double(),
    r"1\.weight: expected a contiguous": (
        lambda m, c, o: setattr(m[1].weight, "data", torch.randn(784, 10).T)
    ),
    "every parameter is frozen": lambda m, c, o: m.requires_grad_(False),
    r"parameter 0 of group 0, \[10, 784\], belongs to no layer": (
        lambda m, c, o: setattr(m[1], "weight", nn.Parameter(torch.zeros(10, 784)))
    ),
    r"parameter 0 of group 1, \[3\]": (
        lambda m, c, o: o.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    ),
    "group 0 is differentiable": lambda m, c, o: o.param_groups[0].update(differentiable=True),
    "optimizer has step hooks": lambda m, c, o: o.register_step_post_hook(nothing),
    "optimizer: its step was replaced": lambda m, c, o: setattr(o, "step", nothing),
    r"criterion .* has forward_hooks": lambda m, c, o: c.register_forward_hook(nothing),
    '"mean" or "sum", got \'none\'': lambda m, c, o: setattr(c, "reduction", "none"),
    "criterion: expected a weight that needs no gradient": (
        lambda m, c, o: setattr(c, "weight", nn.Parameter(torch.ones(10)))
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    """At the first step after the change, and when constructed: nothing is trained."""
    model = mlp((10,), "relu")
    step, _ = pair(model)
    batch = first_batch(8)
    step(*batch)
    parts = model, step._criterion, step._optimizer
    REFUSED[message](*parts)
    before = [p.detach().clone() for p in model.parameters()]
    for call, arguments in ((step, batch), (step.epoch, (*batch, 4)), (TrainStep, parts)):
        with pytest.raises(ValueError, match=f"mnist_ext.TrainStep: (?s:.*)({message})"):
            call(*arguments)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_other_classes_are_refused():
    model, sgd = mlp((20,)), torch.optim.SGD
    for criterion, make, message in (
        (nn.MSELoss(), sgd, "criterion: expected torch.nn.CrossEntropyLoss, got MSELoss"),
        (nn.CrossEntropyLoss(), torch.optim.Adam, "optimizer: expected torch.optim.SGD, got Adam"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainStep(model, criterion, make(model.parameters()))
    with pytest.raises(ValueError, match=r"1\.weight: expected.*on meta"):
        pair(mlp((20,)).to("meta"))


def test_another_dtype_is_asked_of_the_images():
    step, _ = pair(mlp((20,)))
    step._model.double()
    with pytest.raises(ValueError, match=r"images: expected torch\.float64"):
        step(*first_batch(8))


def replace_bias(model, criterion, optimizer):
    """By one of the same numbers: it is another object that is trained from now on."""
    optimizer.param_groups[0]["params"][1] = model[1].bias = nn.Parameter(model[1].bias.detach())


def change_options(model, criterion, optimizer):
    group = optimizer.param_groups[0]
    group.update(lr=group["lr"] / 2, momentum=0.3 if group["lr"] < 0.0005 else 0)


def write_weight_decay(model, criterion, optimizer):
    """Change the number in a tensor, which stays the same object."""
    group = optimizer.param_groups[0]
    if group["weight_decay"] == 0:
        group["weight_decay"] = torch.tensor(0.1)
    else:
        group["weight_decay"].mul_(3)


@pytest.mark.parametrize(
    "change",
    [
        lambda m, c, o: swap(m),
        lambda m, c, o: m[1].requires_grad_(False),
        lambda m, c, o: m[1].requires_grad_(not m[1].bias.requires_grad),
        lambda m, c, o: m.eval(),
        lambda m, c, o: m.insert(3, nn.Identity()),
        lambda m, c, o: m.insert(4, nn.ReLU()),
        lambda m, c, o: m[2].append(nn.ReLU()),  # to a Sequential that was empty
        lambda m, c, o: setattr(c, "ignore_index", 3),
        lambda m, c, o: setattr(c, "label_smoothing", 0.1),
        lambda m, c, o: setattr(c, "reduction", "sum"),
        lambda m, c, o: setattr(c, "weight", torch.linspace(0.5, 2, 10)),
        replace_bias,
        change_options,
        write_weight_decay,
    ],
)
def test_followed_after_the_change(change):
    model = mlp((20,))
    model.insert(2, nn.Sequential())
    check_steps(model, *batches(4, 16), sgd={"lr": 0.001}, change=change)


def test_attributes_that_a_forward_reads():
    """Another value is noticed, of whatever type, also one that cannot be compared."""
    model = Written(lambda m, x: m.b(m.a(x)))
    model.scales = torch.ones(3)

    def change(model, criterion, optimizer):
        model.scales, model.flow = torch.zeros(3), lambda m, x: m.b(F.relu(m.a(x)))

    check_steps(model, *batches(3, 16), change=change)


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


REPLACED = "of PyTorch's own layers was replaced"


@pytest.mark.parametrize(
    ("context", "message"),
    [
        (lambda: register_module_forward_hook(nothing), "hooks of all modules"),
        (lambda: mock.patch.object(nn.Linear, "forward", lambda self, x: x), REPLACED),
        (lambda: mock.patch.object(F, "linear", types.SimpleNamespace()), REPLACED),
        (lambda: torch.autocast("cpu", dtype=torch.bfloat16), "autocast is on"),
        # Momentum buffers made there could not be written by the ordinary loop afterwards.
        (torch.inference_mode, "inference_mode is on"),
    ],
)
def test_what_concerns_all_layers(context, message):
    model = mlp((20,))
    step, _ = pair(model, sgd={"momentum": 0.9})
    before = copy.deepcopy(model)
    with context(), pytest.raises(ValueError, match=message):
        step(*first_batch(8))
    assert_same_bits(model, before)
    step(*first_batch(8))


def test_momentum_buffers_that_share_memory():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    step, _ = pair(model, sgd={"momentum": 0.9})
    images, labels = torch.randn(3, 10), torch.arange(3)
    step(images, labels)
    state = step._optimizer.state
    state[model[0].weight]["momentum_buffer"] = state[model[1].weight]["momentum_buffer"]
    with pytest.raises(ValueError, match=r"momentum_buffers\[1\] and .*\[0\] share memory"):
        step(images, labels)
