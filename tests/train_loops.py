"""The ordinary training loop beside TrainStep, for the tests of it on each device."""

import copy

import torch
from torch import nn

import mnist_ext
from mnist_ext import TrainStep
from mnist_ext.nn import swap

SGDS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-3},
    {"momentum": 0.5, "dampening": 0.3},
    {"maximize": True, "weight_decay": 0.1},
]
LOSSES = [
    {},
    {"reduction": "sum"},
    {"label_smoothing": 0.1},
    {"weight": torch.linspace(0.5, 2, 10), "ignore_index": 3},
    {"weight": torch.linspace(0.5, 2, 10), "label_smoothing": 0.2, "ignore_index": -1},
]


def batches(number, size, features=784, dtype=torch.float32, classes=10):
    torch.manual_seed(1)
    images = torch.randn(number, size, features, dtype=dtype)
    return images, torch.randint(0, classes, (number, size))


def ordinary_step(model, criterion, optimizer, images, labels):
    optimizer.zero_grad()
    loss = criterion(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def pair(model, loss=None, sgd=None, normalize=None):
    """Return a TrainStep, and our modules and optimizer for the ordinary loop on a copy."""
    like = next(model.parameters())
    loss = {k: v.to(like) if k == "weight" else v for k, v in (loss or {}).items()}
    options = {"lr": 0.05, **(sgd or {})}
    twin = swap(copy.deepcopy(model))
    optimizer = mnist_ext.optim.SGD(twin.parameters(), **options)
    torchs = torch.optim.SGD(model.parameters(), **options)
    step = TrainStep(model, nn.CrossEntropyLoss(**loss), torchs, normalize=normalize)
    return step, (twin, swap(nn.CrossEntropyLoss(**loss)), optimizer)


def twins(model, **options):
    """Return TrainSteps of two copies of the model."""
    return [pair(copy.deepcopy(model), **options)[0] for _ in range(2)]


def state_of(step):
    """Copy what a TrainStep with momentum changes."""
    return copy.deepcopy((step._model.state_dict(), step._optimizer.state_dict()["state"]))


def assert_same_state(step, other):
    """Compare the bits of two TrainSteps, or of one and its state of before."""
    states = [s if isinstance(s, tuple) else state_of(s) for s in (step, other)]
    torch.testing.assert_close(*states, rtol=0, atol=0)


def assert_same_bits(model, twin):
    for (name, ours), (_, theirs) in zip(
        model.state_dict().items(), twin.state_dict().items(), strict=True
    ):
        assert torch.equal(ours, theirs), name


def check_steps(model, images, labels, loss=None, sgd=None, change=lambda m, c, o: None):
    """Train on each batch, and expect the bits of the ordinary loop: its kernels are the same.

    After each step, model, criterion and optimizer of both loops are changed. Nothing is written
    to images and labels.
    """
    step, loop = pair(model, loss, sgd)
    given = images.clone(), labels.clone()
    for x, y in zip(images, labels, strict=True):
        value = step(x, y)
        assert not value.requires_grad
        assert torch.equal(value, ordinary_step(*loop, x, y))
        change(model, step._criterion, step._optimizer)
        change(*loop)
    assert_same_bits(model, loop[0])
    torch.testing.assert_close((images, labels), given, rtol=0, atol=0)


def first_batch(*sizes, **options):
    return tuple(tensors[0] for tensors in batches(1, *sizes, **options))


class Written(nn.Module):
    """Two layers, called as ``flow(self, x)`` calls them."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow
        self.flatten, self.relu = nn.Flatten(), nn.ReLU()
        self.a, self.b = nn.Linear(784, 20), nn.Linear(20, 10)
        self.stack = nn.Sequential(self.a, self.relu, self.b)

    def forward(self, x):
        return self.flow(self, x)
