"""What a TrainStep reads of its optimizer."""

import copy

import pytest
import torch
from torch import nn
from train_loops import (
    assert_same_bits,
    assert_same_state,
    batches,
    first_batch,
    ordinary_step,
    twins,
)

import mnist_ext
from mnist_ext import TrainStep
from mnist_ext.app.training.models import mlp
from mnist_ext.nn import swap


@pytest.mark.filterwarnings("error")  # a scheduler's, which has seen no step of the optimizer
def test_groups_and_schedulers():
    model = mlp((20,), "relu")
    twin = swap(copy.deepcopy(model))
    optimizers, schedulers = [], []
    for m, sgd in ((model, torch.optim.SGD), (twin, mnist_ext.optim.SGD)):
        groups = [
            {"params": [m[1].weight, m[3].bias], "lr": 0.1, "momentum": 0.9},
            {"params": [m[1].bias, m[3].weight], "weight_decay": 0.1, "nesterov": False},
        ]
        optimizers.append(sgd(groups, lr=0.02))
        schedulers.append(torch.optim.lr_scheduler.ExponentialLR(optimizers[-1], 0.5))
    step = TrainStep(model, nn.CrossEntropyLoss(), optimizers[0])
    criterion = swap(nn.CrossEntropyLoss())
    for x, y in zip(*batches(5, 16), strict=True):
        loss = step(x, y)
        assert torch.equal(loss, ordinary_step(twin, criterion, optimizers[1], x, y))
        for scheduler in schedulers:
            scheduler.step()
    assert_same_bits(model, twin)


def test_parameters_that_the_optimizer_does_not_hold_stay():
    model = mlp((20,), "relu")
    before = model[1].weight.detach().clone()
    optimizer = torch.optim.SGD(model[3].parameters(), lr=0.1)
    TrainStep(model, nn.CrossEntropyLoss(), optimizer)(*first_batch(16))
    assert torch.equal(model[1].weight, before)


def new_train_step(**changed):
    """Describe a single layer whose bias is frozen to the op."""
    settings = {
        **{"relu": [False], "bias": [True], "groups": [0, -1], "momentum": [0.9]},
        **{"dampening": [0.0], "weight_decay": [0.0], "nesterov": [False], "maximize": [False]},
        **{"scale": 1.0, "shift": 0.0, "class_weight": None, "ignore_index": -100},
        **{"label_smoothing": 0.0, "reduction": 1},
    }
    return torch.ops.mnist_ext.new_train_step(torch.empty(0), **{**settings, **changed})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"relu": []}, "relu: expected at least one layer"),
        ({"bias": []}, "bias: expected one for each of 1 layers, got 0"),
        ({"groups": [0]}, "groups: expected one for each of 2 params, got 1"),
        ({"groups": [0, 1]}, "groups: expected -1 to 0, got 1"),
        ({"dampening": []}, "dampening: expected one for each of 1 groups, got 0"),
        ({"maximize": [True, True]}, "maximize: expected one for each of 1 groups, got 2"),
        ({"label_smoothing": 2.0}, r"label_smoothing: expected a number in \[0, 1\], got 2"),
        ({"reduction": 0}, r"reduction: expected 1 \(mean\) or 2 \(sum\), got 0"),
    ],
)
def test_settings_that_the_op_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        new_train_step(**wrong)


def test_steps_of_one_call_with_new_momentum_buffers():
    """The buffers hold nothing in the first of them only."""
    images, labels = first_batch(6, 4, classes=3)
    together, apart = twins(nn.Linear(4, 3), sgd={"momentum": 0.9})
    together._run(images, labels, None, 2, [0.05] * 3)
    for batch in zip(images.split(2), labels.split(2), strict=True):
        apart(*batch)
    assert_same_state(together, apart)


def test_loss_of_a_step_that_updates_nothing():
    images, labels, params = torch.randn(6, 4), torch.arange(6) % 3, [torch.randn(3, 4)]
    handle = new_train_step(bias=[False], groups=[-1])
    loss = torch.ops.mnist_ext.train_steps(handle, images, labels, None, 0, [0.1], params, [], [])
    torch.testing.assert_close(loss, nn.functional.cross_entropy(images @ params[0].t(), labels))


def test_a_handle_that_was_freed():
    with pytest.raises(ValueError, match=r"step: expected a handle from new_train_step.*got -1"):
        torch.ops.mnist_ext.free_train_step(torch.empty(0), -1)
