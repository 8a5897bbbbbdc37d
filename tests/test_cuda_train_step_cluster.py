"""TrainStep's cluster kernel: many steps in a launch, and images of bytes on tensor cores.

On the emulator of tests/emulator everywhere, and on a GPU; the sequence of kernels is held to the
same.
"""

import copy
import functools

import emulated
import pytest
import test_cuda_train_step
import torch
from test_cuda_train_step import assert_near, launches_of, small, trainer
from torch import nn
from train_loops import ordinary_step

from mnist_ext import TrainStep

path = test_cuda_train_step.path  # a fixture
PIXELS = {"normalize": (0.1307, 0.3081)}


def pixel_images(rows, features, low=0, high=256):
    """Return images like handwriting: half of the pixels are 0, all rows have the same ones."""
    images = torch.randint(low, high, (rows, features), dtype=torch.uint8)
    images[:, ::2] = low
    return images


def run_alone(step, images, labels, order, size, rates):
    """Make the steps of a launch, each in a launch of its own; rates are those of two groups."""
    losses = []
    for i, chosen in enumerate(order.split(size)):
        losses.append(step._run(images, labels, chosen.clone(), size, rates[2 * i : 2 * i + 2]))
    return torch.cat(losses)


class TestManyStepsInALaunch:
    """They are the steps one after the other, to the bit."""

    @pytest.mark.parametrize("hidden", [(), (9,), (33, 9)])
    @pytest.mark.parametrize("features", [16, 18])  # rows that bulk copies can fetch, and not
    @pytest.mark.parametrize("pixels", [False, True])
    def test_to_the_bit(self, path, hidden, features, pixels):
        images = pixel_images(60, features) if pixels else torch.randn(60, features)
        images, labels = images.to(path), torch.randint(0, 5, (60,)).to(path)
        order = torch.randperm(60)[:41].to(path)
        rates = [0.1, 0.02, 0.05, 0.3, 0.2, 0.0, 0.01, 0.1, 0.1, 0.1, 0.3, 0.01]
        models = [small(hidden, features).to(path)]
        models.append(copy.deepcopy(models[0]))
        losses, optimizers = [], []
        for model in models:
            biases = [p for p in model.parameters() if p.dim() == 1]
            weights = [p for p in model.parameters() if p.dim() == 2]
            sgd = {"momentum": 0.5, "nesterov": True, "weight_decay": 0.01}
            groups = [{"params": weights, "momentum": 0.9}, {"params": biases}]
            optimizers.append(torch.optim.SGD(groups, lr=0.1, **sgd))
            options = PIXELS if pixels else {}
            step = TrainStep(model, nn.CrossEntropyLoss(), optimizers[-1], **options)
            if model is models[0]:
                losses.append(step._run(images, labels, order, 7, rates))
            else:
                losses.append(run_alone(step, images, labels, order, 7, rates))
        assert torch.equal(*losses)
        for ours, theirs in zip(*(m.parameters() for m in models), strict=True):
            assert torch.equal(ours, theirs)
            ours, theirs = (
                o.state[p]["momentum_buffer"]
                for o, p in zip(optimizers, (ours, theirs), strict=True)
            )
            assert torch.equal(ours, theirs)

    @pytest.mark.parametrize("features", [16, 18])
    def test_more_rows_than_threads(self, path, features):
        images, labels = pixel_images(600, features), torch.randint(0, 5, (600,))
        order = torch.randperm(600)
        model = small((), features).to(path)
        twin = copy.deepcopy(model).cpu().double()
        step, _ = trainer(model, **PIXELS)
        step._run(images.to(path), labels.to(path), order.to(path), 290, [0.05] * 3)
        loop = trainer(twin)[1]
        mean, std = PIXELS["normalize"]
        for chosen in order.split(290):
            ordinary_step(*loop, (images[chosen].double() / 255 - mean) / std, labels[chosen])
        for ours, truth in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours.cpu().double(), truth, rtol=1e-5, atol=1e-6)

    def test_of_rows_apart_in_memory(self, path):
        """At a distance, and from an address, that bulk copies can have, and that they cannot."""
        labels = torch.randint(0, 5, (24,)).to(path)
        results = []
        for columns, begin in ((16, 0), (48, 16), (20, 0), (48, 7)):
            whole = torch.full((24, columns), 99, dtype=torch.uint8)
            torch.manual_seed(3)
            whole[:, begin : begin + 16] = pixel_images(24, 16)
            images = whole.to(path)[:, begin : begin + 16]
            step, (model, _, _) = trainer(small((9,), 16).to(path), **PIXELS)
            step._run(images, labels, None, 8, [0.1] * 3)
            results.append([p.detach().clone() for p in model.parameters()])
        for params in results[1:]:
            assert all(torch.equal(p, q) for p, q in zip(params, results[0], strict=True))


class TestPixels:
    """As near to the float64 truth as a few times PyTorch's own error in float32."""

    def check(self, path, hidden, images, normalize, steps=3):
        classes = 5
        labels = torch.randint(0, classes, (len(images),))
        model = small(hidden, images.shape[1], classes)
        mean, std = normalize
        truth, torchs = copy.deepcopy(model).double(), copy.deepcopy(model)
        step, (ours, _, _) = trainer(model.to(path), sgd={"momentum": 0.9}, normalize=normalize)
        loops = [trainer(m, sgd={"momentum": 0.9})[1] for m in (truth, torchs)]
        inputs = (images.double() / 255 - mean) / std
        for _ in range(steps):
            loss = step(images.to(path), labels.to(path))
            expected = ordinary_step(*loops[0], inputs, labels)
            ordinary_step(*loops[1], inputs.float(), labels)
            torch.testing.assert_close(loss.cpu().double(), expected, rtol=4e-6, atol=1e-7)
        for our, true, their in zip(*(m.parameters() for m in (ours, truth, torchs)), strict=True):
            assert_near(our.cpu(), true, their)

    # A tensor core's rows, fewer, and more than a warp's sums; one neuron of a block, 4 and 12.
    @pytest.mark.parametrize("rows", [1, 8, 13, 64, 70])
    @pytest.mark.parametrize("hidden", [(5,), (32, 9), (90,)])
    def test_sizes(self, path, rows, hidden):
        self.check(path, hidden, pixel_images(rows, 40), PIXELS["normalize"])

    # Parts of a tensor core's 16 inputs and of a warp's 32; more than the 1024 of all warps.
    @pytest.mark.parametrize("features", [1, 7, 16, 17, 250, 784, 1100])
    def test_numbers_of_inputs(self, path, features):
        self.check(path, (9,), pixel_images(9, features), PIXELS["normalize"])

    def test_one_layer(self, path):
        self.check(path, (), pixel_images(12, 40), PIXELS["normalize"])

    # As MNIST's; no normalization to speak of; pixels of little contrast, which cancel unless
    # they are multiplied near 0; what stands for 0 is no pixel.
    @pytest.mark.parametrize(
        ("low", "high", "normalize"),
        [
            (0, 256, (0.1307, 0.3081)),
            (0, 256, (0.0, 1.0)),
            (190, 200, (0.765, 0.01)),
            (0, 256, (30.0, 10.0)),
            (0, 256, (1.7, 0.3)),
            (0, 256, (-0.4, 0.5)),
        ],
    )
    def test_normalizations(self, path, low, high, normalize):
        self.check(path, (9,), pixel_images(16, 784, low, high), normalize)

    @pytest.mark.parametrize("value", [0, 1, 127, 128, 129, 254, 255])
    def test_every_pixel_is_what_it_stands_for(self, path, value):
        """One step without momentum changes the weight by its input, times what they share."""
        images = torch.tensor([[value, 100]], dtype=torch.uint8, device=path)
        step, (model, _, _) = trainer(
            nn.Linear(2, 2, bias=False).to(path), sgd={"lr": 1.0}, normalize=(0.25, 0.125)
        )
        nn.init.zeros_(model.weight)
        step(images, torch.tensor([0], device=path))
        inputs = (torch.tensor([value, 100]).double() / 255 - 0.25) / 0.125
        expected = torch.stack([inputs / 2, -inputs / 2])
        torch.testing.assert_close(model.weight.cpu().double(), expected, rtol=1e-6, atol=1e-6)


def test_launches_follow_each_other(path):
    """Each has its losses, its learning rates and the momentum of the one before."""
    images, labels = torch.randn(400, 4).to(path), torch.randint(0, 3, (400,)).to(path)
    rates = [0.1 / (1 + i) for i in range(400)]
    results = []
    for sizes in ((400,), (150, 250)):
        step, (model, _, _) = trainer(small((), 4, 3).to(path), sgd={"momentum": 0.9})
        losses = []
        for begin, size in zip((0, 150), sizes, strict=False):
            chosen = slice(begin, begin + size)
            losses.append(step._run(images[chosen], labels[chosen], None, 1, rates[chosen]))
        results.append([torch.cat(losses), *(p.detach() for p in model.parameters())])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("pixels", [False, True])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_not_hidden(path, pixels, layer, value):
    """Not by a ReLU either: the loss says that something is wrong."""
    images = pixel_images(9, 20) if pixels else torch.randn(9, 20)
    step, (model, _, _) = trainer(small((12, 9)).to(path), **(PIXELS if pixels else {}))
    with torch.no_grad():
        model[layer + 1].weight[3, 3] = value
    assert not step(images.to(path), torch.randint(0, 5, (9,)).to(path)).isfinite()


@pytest.mark.parametrize("pixels", [False, True])
@pytest.mark.parametrize("hidden", [(), (33,), (33, 9)])
def test_a_missing_barrier_shows(emulator, hidden, pixels):
    """Warps and blocks run ahead of others, in several ways; the results are the same."""
    images = pixel_images(40, 16) if pixels else torch.randn(40, 16)
    labels = torch.randint(0, 5, (40,))
    order = torch.arange(39, -1, -1)
    results = []
    for seed in range(6):
        emulated.set_seed(seed)
        step, (model, _, _) = trainer(
            small(hidden, 16), sgd={"momentum": 0.9}, **(PIXELS if pixels else {})
        )
        losses = []
        run = functools.partial(step._run, images, labels, order, 9, [0.1] * 5)
        assert launches_of(lambda: losses.append(run())) == 1  # noqa: B023
        results.append([losses[0], *(p.detach().clone() for p in model.parameters())])
    for params in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(params, results[0], strict=True))


def test_shared_memory_is_asked_for_in_full(emulator):
    """A model that just does not fit goes by the sequence; one that does, in one launch."""
    images, labels = pixel_images(64, 784), torch.randint(0, 10, (64,))

    def launches(kilobytes):
        emulated.set_device(shared_kilobytes=kilobytes, largest_cluster=16)
        step, _ = trainer(small((128, 64), 784, 10), sgd={"momentum": 0.9}, **PIXELS)
        return launches_of(lambda: step(images, labels))

    assert launches(227) == 1
    assert launches(225) > 1
