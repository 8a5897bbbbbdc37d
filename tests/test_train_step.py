"""TrainStep: the ordinary loop's numbers, in the user's tensors; what it cannot do is refused."""

import copy
import os
import signal
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import mnist_ext
from mnist_ext import TrainStep
from mnist_ext.app.data import datasets as data
from mnist_ext.app.training.models import mlp
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


def pair(model, loss=None, sgd=None):
    """Return a TrainStep, and our modules and optimizer for the ordinary loop on a copy."""
    dtype = next(model.parameters()).dtype
    loss = {k: v.to(dtype) if k == "weight" else v for k, v in (loss or {}).items()}
    options = {"lr": 0.05, **(sgd or {})}
    twin = swap(copy.deepcopy(model))
    optimizer = mnist_ext.optim.SGD(twin.parameters(), **options)
    step = TrainStep(
        model, nn.CrossEntropyLoss(**loss), torch.optim.SGD(model.parameters(), **options)
    )
    return step, (twin, swap(nn.CrossEntropyLoss(**loss)), optimizer)


def assert_same_bits(model, twin):
    for (name, ours), (_, theirs) in zip(
        model.state_dict().items(), twin.state_dict().items(), strict=True
    ):
        assert torch.equal(ours, theirs), name


class TestTheOrdinaryLoopsNumbers:
    """The kernels are those of the ordinary loop on swapped modules: the same bits."""

    def check(self, model, images, labels, loss=None, sgd=None):
        step, loop = pair(model, loss, sgd)
        for x, y in zip(images, labels, strict=True):
            assert torch.equal(step(x, y), ordinary_step(*loop, x, y))
        assert_same_bits(model, loop[0])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("size", [1, 7, 64, 257, 600])
    def test_batch_sizes(self, isa, size, dtype):
        self.check(mlp((128, 64), "relu").to(dtype), *batches(3, size, dtype=dtype))

    @pytest.mark.parametrize("sgd", SGDS, ids=str)
    def test_optimizer_options(self, isa, sgd):
        self.check(mlp((40, 30), "relu"), *batches(4, 32), sgd=sgd)

    @pytest.mark.parametrize("loss", LOSSES, ids=str)
    @pytest.mark.parametrize("size", [5, 64])
    def test_loss_options(self, isa, loss, size):
        images, labels = batches(3, size)
        labels[:, 0] = loss.get("ignore_index", 0)
        sgd = {"lr": 0.001} if loss.get("reduction") == "sum" else {}
        self.check(mlp((40, 30), "relu"), images, labels, loss, sgd)

    @pytest.mark.parametrize("hidden", [(), (1,), (3, 5), (200,), (17, 33, 9, 21, 13), (64,) * 12])
    @pytest.mark.parametrize("activation", ["relu", "none"])
    def test_depths_and_widths(self, isa, hidden, activation):
        model = mlp(hidden, activation, in_features=30, num_classes=7)
        self.check(model, *batches(4, 33, 30, classes=7))

    @pytest.mark.parametrize("classes", [1, 2, 33, 300])
    def test_numbers_of_classes(self, isa, classes):
        self.check(mlp((20,), "relu", 50, classes), *batches(3, 19, 50, classes=classes))

    def test_without_biases_and_with_relu_behind_the_last_layer(self):
        model = nn.Sequential(
            nn.Linear(20, 30, bias=False), nn.ReLU(), nn.Linear(30, 5), nn.Identity(), nn.ReLU()
        )
        self.check(model, *batches(4, 16, 20, classes=5))

    def test_with_and_without_threads(self):
        """The number of threads does not change a bit."""
        images, labels = batches(3, 200)
        results = []
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                torch.manual_seed(0)
                model = mlp((128, 64, 31), "relu")
                step, _ = pair(model, sgd={"momentum": 0.9})
                losses = [step(x, y) for x, y in zip(images, labels, strict=True)]
                results.append([*losses, *(p.detach() for p in model.parameters())])
        finally:
            torch.set_num_threads(before)
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))

    @pytest.mark.parametrize("dtype", [torch.int32, torch.uint8], ids=str)
    def test_labels_of_other_dtypes(self, dtype):
        step, (twin, *rest) = pair(mlp((16,), "relu"))
        images, labels = batches(2, 9)
        for x, y in zip(images, labels, strict=True):
            assert torch.equal(step(x, y.to(dtype)), ordinary_step(twin, *rest, x, y))

    def test_nothing_to_learn_from(self):
        """No image, or none whose label counts: NaN, and the update of weight decay alone."""
        for images, labels in (
            (torch.randn(0, 784), torch.zeros(0, dtype=torch.int64)),
            (torch.randn(4, 784), torch.full((4,), -100)),
        ):
            model = mlp((16,), "relu")
            step, loop = pair(model, sgd={"weight_decay": 0.1})
            assert step(images, labels).isnan()
            assert ordinary_step(*loop, images, labels).isnan()
            assert_same_bits(model, loop[0])

    def test_strides(self):
        images, labels = batches(1, 12)
        spread = torch.randn(24, 784 * 2)
        spread[::2, ::2] = images[0]
        for x in (
            spread[::2, ::2],
            images[0].T.contiguous().T,
            images[:, :1].expand(1, 12, 784)[0],
        ):
            model = mlp((16,), "relu")
            step, loop = pair(model)
            y = labels[0].repeat_interleave(2)[::2]
            expected = ordinary_step(*loop, x.contiguous(), labels[0])
            assert torch.equal(step(x, y), expected)
            assert_same_bits(model, loop[0])


class TestAgainstPyTorch:
    def run(self, dtype, native, steps, activation="relu"):
        torch.manual_seed(1)
        model = mlp(activation=activation).to(dtype)
        criterion = nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        digits = data.load("digits")
        images = data.normalize(digits.train.images, digits.mean, digits.std).flatten(1).to(dtype)
        step = TrainStep(model, criterion, optimizer) if native else None
        generator = torch.Generator().manual_seed(1)
        losses = []
        for _ in range(steps):
            chosen = torch.randint(len(images), (64,), generator=generator)
            batch = images[chosen], digits.train.labels[chosen]
            losses.append(
                step(*batch) if step else ordinary_step(model, criterion, optimizer, *batch)
            )
        return torch.stack(losses), nn.utils.parameters_to_vector(model.parameters()).detach()

    @pytest.mark.parametrize("activation", ["none", "relu"])
    def test_a_thousand_steps(self, activation):
        """Losses within 1e-4 of eager's; parameters at most twice as far from float64 as eager's.

        With ReLU that is a matter of the seed, for eager as for us: where rounding decides on
        which side of 0 a sum falls, two runs part by more, float32 and float64 of eager too.
        """
        losses, params = self.run(torch.float32, True, 1000, activation)
        eager_losses, eager_params = self.run(torch.float32, False, 1000, activation)
        _, truth = self.run(torch.float64, False, 1000, activation)
        torch.testing.assert_close(losses, eager_losses, rtol=1e-4, atol=0)
        distance, eager_distance = ((p.double() - truth).norm() for p in (params, eager_params))
        assert distance <= 2 * eager_distance

    def test_float64(self):
        losses, params = self.run(torch.float64, True, 50)
        eager_losses, eager_params = self.run(torch.float64, False, 50)
        torch.testing.assert_close(losses, eager_losses, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(params, eager_params, rtol=1e-10, atol=1e-12)


class TestPixels:
    """uint8 images with normalize, against images that `data.normalize` made."""

    @pytest.mark.parametrize("features", [784, 30, 3])
    def test_same_as_normalized_images(self, isa, features):
        mean, std = 0.1307, 0.3081
        pixels = torch.randint(0, 256, (4, 33, features), dtype=torch.uint8)
        labels = torch.randint(0, 10, (4, 33))
        model = mlp((40, 30), "relu", features)
        _, loop = pair(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        step = TrainStep(model, nn.CrossEntropyLoss(), optimizer, normalize=(mean, std))
        for x, y in zip(pixels, labels, strict=True):
            expected = ordinary_step(*loop, data.normalize(x, mean, std), y)
            torch.testing.assert_close(step(x, y), expected, rtol=1e-5, atol=0)
        for ours, theirs in zip(model.parameters(), loop[0].parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)

    def test_float64(self):
        pixels, labels = torch.randint(0, 256, (9, 784), dtype=torch.uint8), torch.arange(9)
        model = mlp((16,)).double()
        _, loop = pair(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        step = TrainStep(model, nn.CrossEntropyLoss(), optimizer, normalize=(0.25, 0.5))
        expected = ordinary_step(*loop, (pixels.double() / 255 - 0.25) / 0.5, labels)
        torch.testing.assert_close(step(pixels, labels), expected, rtol=1e-13, atol=0)

    def test_dtype_and_normalize_must_agree(self):
        model = mlp((16,))
        arguments = model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters())
        labels = torch.zeros(2, dtype=torch.int64)
        pixels = torch.zeros(2, 784, dtype=torch.uint8)
        with pytest.raises(ValueError, match=r"images: expected torch.float32.*normalize="):
            TrainStep(*arguments)(pixels, labels)
        with pytest.raises(ValueError, match=r"images: expected uint8.*normalize is given"):
            TrainStep(*arguments, normalize=(0.1, 0.3))(pixels.float(), labels)
        with pytest.raises(ValueError, match=r"normalize: expected a finite mean and std > 0"):
            TrainStep(*arguments, normalize=(0.1, 0.0))


class Quickstart(nn.Module):
    """The shape of PyTorch's own tutorial."""

    def __init__(self):
        super().__init__()
        self.flatten = nn.Flatten()
        self.stack = nn.Sequential(nn.Linear(784, 20), nn.ReLU(), nn.Linear(20, 10))

    def forward(self, x):
        x = self.flatten(x)
        return self.stack(x)


class Written(nn.Module):
    """Two layers, called as ``flow(self, x)`` calls them."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow
        self.a, self.b, self.relu = nn.Linear(784, 20), nn.Linear(20, 10), nn.ReLU()

    def forward(self, x):
        return self.flow(self, x)


FUNCTIONS = [
    lambda m, x: m.b(F.relu(m.a(torch.flatten(x, 1)))),
    lambda m, x: m.b(torch.relu(m.a(torch.flatten(x, start_dim=1)))),
    lambda m, x: m.b(m.a(x.flatten(1, -1)).relu()),
    lambda m, x: m.b(F.relu(m.a(x.view(-1, 784)), inplace=True)),
    lambda m, x: m.b(m.a(x.view((-1, 28 * 28))).relu_()),
    lambda m, x: m.b(torch.relu_(m.a(x.view(x.size(0), -1)))),
    lambda m, x: m.b(m.relu(m.a(x.view(x.size()[0], 784)))),
    lambda m, x: m.b(F.relu(m.a(x.reshape(x.shape[0], -1)))),
    lambda m, x: F.relu(m.b(m.a(torch.reshape(x, (x.size(dim=0), -1)).view(-1, 784)))),
]
OTHER_FUNCTIONS = {
    r"flatten\(x, 0\) in the forward of Written: .*start_dim=1": lambda m, x: torch.flatten(x, 0),
    r"flatten\(x\) in": lambda m, x: torch.flatten(x),
    r"flatten\(x, 2\) in": lambda m, x: x.flatten(2),
    r"flatten\(x, 1, 2\) in": lambda m, x: x.flatten(1, 2),
    r"found view\(x, 64, -1\)": lambda m, x: x.view(64, -1),
    r"found view\(x, 1, -1\)": lambda m, x: x.view(1, -1),
    r"found reshape\(x, -1\)": lambda m, x: x.reshape(-1),
    r"found view\(x, -1, 1, 784\)": lambda m, x: x.view(-1, 1, 784),
    r"found view\(x, size, -1\)": lambda m, x: x.view(x.size(1), -1),
    r"found view\(x, getitem, -1\)": lambda m, x: x.view(x.shape[-1], -1),
    r"found view\(x, torch.int32\)": lambda m, x: x.view(torch.int32),
    r"view\(x, -1, 392\).*in_features of a, 784, got 392": lambda m, x: x.view(-1, 392),
    r"found mul\(size, 2\)": lambda m, x: x.view(x.size(0) * 2, -1),
    r"relu\(x, inplace=False\) in": lambda m, x: F.relu(x),
    r"found gelu\(a\)": lambda m, x: F.gelu(m.a(x)),
    r"found dropout\(x, ": lambda m, x: F.dropout(x),
    r"flatten\(a, 1\) in.*Flatten first": lambda m, x: m.a(x).flatten(1),
    r"view\(a, -1, 20\) in.*Flatten first": lambda m, x: m.a(x).view(-1, 20),
}


class TestFunctions:
    """flatten, view, reshape and relu called in a forward, as functions or methods."""

    @pytest.mark.parametrize("flow", FUNCTIONS)
    def test_taken(self, flow):
        model = Written(flow)
        step, loop = pair(model)
        for x, y in zip(*batches(3, 16), strict=True):
            x = x.view(16, 1, 28, 28)
            assert torch.equal(step(x, y), ordinary_step(*loop, x, y))
        assert_same_bits(model, loop[0])

    @pytest.mark.parametrize("message", OTHER_FUNCTIONS)
    def test_refused(self, message):
        flow = OTHER_FUNCTIONS[message]
        model = Written(lambda m, x: m.b(m.a(flow(m, x)) if "(x" in message else flow(m, x)))
        with pytest.raises(ValueError, match=message):
            pair(model)

    def test_result_of_relu_that_nobody_takes(self):
        """In place, PyTorch's forward goes on with it all the same."""

        def flow(m, x):
            hidden = m.a(x)
            F.relu_(hidden)
            return m.b(hidden)

        with pytest.raises(ValueError, match=r"one after the other.*found b\(a\)"):
            pair(Written(flow))

    def test_a_view_that_would_take_several_images_as_one_row(self):
        """Or one as several: PyTorch's loop has another number of rows than of labels there."""
        step, loop = pair(Written(lambda m, x: m.b(m.a(x.view(-1, 784)))))
        for images in torch.randn(4, 2, 784), torch.randn(4, 392):
            for call in (step, lambda x, y: ordinary_step(*loop, x, y)):
                with pytest.raises(ValueError, match=r"784 numbers each|batch"):
                    call(images, torch.arange(4))


class TestModels:
    @pytest.mark.parametrize(
        "model",
        [
            Quickstart(),
            nn.Linear(784, 10),
            nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(784, 5)), nn.Linear(5, 10)),
            nn.Sequential(mnist_ext.nn.Linear(784, 5, activation="relu"), nn.Linear(5, 10)),
            swap(mlp((20,), "relu")),
        ],
        ids=["module", "linear", "nested", "ours", "swapped"],
    )
    def test_taken(self, model):
        TestTheOrdinaryLoopsNumbers().check(copy.deepcopy(model), *batches(2, 16))

    def test_swapped_in_between(self):
        """`swap` moves each ReLU into the Linear before it: still the same model."""
        model = mlp((20,), "relu")
        step, loop = pair(model)
        images, labels = batches(2, 16)
        step(images[0], labels[0])
        swap(model)
        step(images[1], labels[1])
        for x, y in zip(images, labels, strict=True):
            ordinary_step(*loop, x, y)
        assert_same_bits(model, loop[0])

    def test_frozen_parameters_stay(self):
        for frozen in ("1.weight", "1.bias", "3.weight", "5.weight"):
            model = mlp((20, 16), "relu")
            before = copy.deepcopy(model.state_dict())
            model.get_parameter(frozen).requires_grad_(False)
            step, loop = pair(model, sgd={"momentum": 0.9})
            for x, y in zip(*batches(2, 16), strict=True):
                torch.testing.assert_close(step(x, y), ordinary_step(*loop, x, y))
            for ours, theirs in zip(model.parameters(), loop[0].parameters(), strict=True):
                # Of a bias whose weight is frozen, the loop forms the gradient in another order.
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
            changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
            assert changed == [k for k in before if k != frozen]

    def test_frozen_layers_below(self):
        model = mlp((20, 16), "relu")
        for layer in (model[1], model[3]):
            layer.requires_grad_(False)
        TestTheOrdinaryLoopsNumbers().check(model, *batches(2, 16))

    def test_frozen_in_between_and_thawed(self):
        model = mlp((20,), "relu")
        step, loop = pair(model)
        images, labels = batches(4, 16)
        for i, (x, y) in enumerate(zip(images, labels, strict=True)):
            model[1].requires_grad_(i % 2 == 0)
            loop[0][1].requires_grad_(i % 2 == 0)
            assert torch.equal(step(x, y), ordinary_step(*loop, x, y))
        assert_same_bits(model, loop[0])

    def test_parameters_that_the_optimizer_does_not_hold_stay(self):
        model = mlp((20,), "relu")
        before = model[1].weight.detach().clone()
        optimizer = torch.optim.SGD(model[3].parameters(), lr=0.1)
        TrainStep(model, nn.CrossEntropyLoss(), optimizer)(*(t[0] for t in batches(1, 16)))
        assert torch.equal(model[1].weight, before)


def replaced_forward():
    model = mlp((20,))
    model[1].forward = lambda x: x[:, :20]
    return model


def shared():
    layer = nn.Linear(10, 10)
    return nn.Sequential(layer, nn.ReLU(), layer)


def tied():
    model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    model[1].weight = model[0].weight
    return model


def hooked(register):
    model = mlp((20,), "relu")
    register(model)
    return model


def quickstart_with_a_forward_of_its_own():
    model = Quickstart()
    model.forward = lambda x: model.stack(model.flatten(2 * x))
    return model


class Called(Quickstart):
    def __call__(self, x):
        return super().__call__(2 * x)


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(10, 10), nn.Linear(10, 10)

    def forward(self, x):
        return self.b(self.a(x) + x)


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(10, 10)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else x


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.flatten, self.unused = nn.Flatten(), nn.Linear(10, 10)

    def forward(self, x):
        return self.flatten(x)


REFUSED_MODELS = {
    "dropout": (
        lambda: nn.Sequential(nn.Linear(10, 10), nn.Dropout()),
        r"1 \(Dropout\).*remove it",
    ),
    "tanh": (lambda: nn.Sequential(nn.Linear(10, 10), nn.Tanh()), r"1 \(Tanh\)"),
    "relu first": (lambda: nn.Sequential(nn.ReLU(), nn.Linear(10, 10)), r"0 \(ReLU\)"),
    "flatten of another kind": (
        lambda: nn.Sequential(nn.Flatten(0), nn.Linear(10, 10)),
        r"0 \(Flatten\).*start_dim=1",
    ),
    "no layer": (lambda: Unused(), "at least one Linear"),
    "widths": (
        lambda: nn.Sequential(nn.Linear(10, 9), nn.Linear(10, 9)),
        "1: expected in_features",
    ),
    "shared module": (shared, r"2?0\.weight is shared|weight is shared"),
    "tied weight": (tied, r"1\.weight is shared"),
    "replaced forward": (replaced_forward, r"1 \(Linear\): its forward was replaced"),
    "replaced forward of a module": (
        quickstart_with_a_forward_of_its_own,
        r"model \(Quickstart\): its forward was replaced",
    ),
    "replaced call": (Called, r"model \(Called\): its class has a __call__"),
    "skip connection": (Skip, r"model \(Skip\).*nothing else, found add"),
    "branch": (Branch, r"model \(Branch\).*following it failed"),
    "parametrized": (
        lambda: nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(10, 10))),
        r"0 \(ParametrizedLinear\).*remove_parametrizations",
    ),
    "pruned": (
        lambda: hooked(lambda m: prune.random_unstructured(m[1], "weight", 0.5)),
        r"1 \(Linear\) has forward_pre_hooks",
    ),
    "forward hook": (
        lambda: hooked(lambda m: m[2].register_forward_hook(lambda *_: None)),
        r"2 \(ReLU\) has forward_hooks.*remove them",
    ),
    "forward pre-hook": (
        lambda: hooked(lambda m: m.register_forward_pre_hook(lambda *_: None)),
        r"model \(Sequential\) has forward_pre_hooks",
    ),
    "backward hook": (
        lambda: hooked(lambda m: m[3].register_full_backward_hook(lambda *_: None)),
        r"3 \(Linear\) has backward_hooks",
    ),
    "hook of a tensor": (
        lambda: hooked(lambda m: m[1].weight.register_hook(lambda g: g)),
        r"1\.weight has hooks",
    ),
    "hook after accumulation": (
        lambda: hooked(lambda m: m[3].bias.register_post_accumulate_grad_hook(lambda p: None)),
        r"3\.bias has hooks",
    ),
    "half": (lambda: mlp((20,)).bfloat16(), r"1\.weight: expected.*float32.*got.*bfloat16"),
    "mixed dtypes": (lambda: nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10).double()), "1.wei"),
    "other device": (lambda: mlp((20,)).to("meta"), r"1\.weight.*on meta"),
    "strided": (
        lambda: hooked(lambda m: setattr(m[1].weight, "data", torch.randn(784, 20).T)),
        r"1\.weight: expected a contiguous",
    ),
    "frozen": (lambda: mlp((20,)).requires_grad_(False), "every parameter is frozen"),
}


class TestRefused:
    @pytest.mark.parametrize("kind", REFUSED_MODELS)
    def test_models(self, kind):
        build, message = REFUSED_MODELS[kind]
        model = build()
        with pytest.raises(ValueError, match=rf"mnist_ext.TrainStep: (?s:.*){message}"):
            TrainStep(model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1))

    @pytest.mark.parametrize(
        ("criterion", "message"),
        [
            (nn.MSELoss(), "criterion: expected torch.nn.CrossEntropyLoss, got MSELoss"),
            (nn.CrossEntropyLoss(reduction="none"), r'"mean" or "sum", got \'none\''),
            (nn.CrossEntropyLoss(torch.ones(10, requires_grad=True)), "weight that needs no grad"),
        ],
    )
    def test_criteria(self, criterion, message):
        model = mlp((20,))
        with pytest.raises(ValueError, match=message):
            TrainStep(model, criterion, torch.optim.SGD(model.parameters()))

    def test_optimizers(self):
        model, other = mlp((20,)), nn.Linear(3, 4)
        sgd = torch.optim.SGD
        hooked_optimizer = sgd(model.parameters())
        hooked_optimizer.register_step_pre_hook(lambda *_: None)
        replaced = sgd(model.parameters())
        replaced.step = lambda: None
        for optimizer, message in (
            (torch.optim.Adam(model.parameters()), "expected torch.optim.SGD, got Adam"),
            (sgd([*model.parameters(), *other.parameters()]), r"parameter 4 of group 0, \[4, 3\]"),
            (sgd(model.parameters(), differentiable=True), "group 0 is differentiable"),
            (hooked_optimizer, "optimizer has step hooks"),
            (replaced, "its step was replaced"),
        ):
            with pytest.raises(ValueError, match=message):
                TrainStep(model, nn.CrossEntropyLoss(), optimizer)

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
            (
                lambda m, c, o: nn.utils.parametrizations.orthogonal(m[1]),
                r"1 \(ParametrizedLinear\)",
            ),
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
    def test_what_came_after_construction(self, change, message):
        model, criterion = mlp((20,), "relu"), nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = TrainStep(model, criterion, optimizer)
        images, labels = batches(1, 8)
        step(images[0], labels[0])
        change(model, criterion, optimizer)
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(ValueError, match=message):
            step(images[0], labels[0])
        with pytest.raises(ValueError, match=message):
            step.epoch(images[0], labels[0], 4)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))

    def test_hooks_of_all_modules(self):
        step, _ = pair(mlp((20,)))
        images, labels = batches(1, 8)
        handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
        try:
            with pytest.raises(ValueError, match="hooks of all modules"):
                step(images[0], labels[0])
        finally:
            handle.remove()
        step(images[0], labels[0])

    def test_autocast(self):
        step, _ = pair(mlp((20,)))
        images, labels = batches(1, 8)
        with (
            torch.autocast("cpu", dtype=torch.bfloat16),
            pytest.raises(ValueError, match="autocast"),
        ):
            step(images[0], labels[0])

    def test_inference_mode(self):
        """Momentum buffers made there could not be written by the ordinary loop afterwards."""
        model = mlp((20,))
        step, _ = pair(model, sgd={"momentum": 0.9})
        before = copy.deepcopy(model)
        images, labels = batches(1, 8)
        with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode is on"):
            step(images[0], labels[0])
        assert_same_bits(model, before)

    def test_tensors_that_share_memory(self):
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

    @pytest.mark.parametrize(
        ("images", "labels", "error", "message"),
        [
            (torch.zeros(4, 783), torch.arange(4), ValueError, "images: expected 784 numbers"),
            (torch.zeros(784), torch.arange(1), ValueError, r"images: expected \[n, \.\.\.\]"),
            (torch.zeros(4, 784), torch.arange(3), ValueError, r"labels: expected shape \[4\]"),
            (torch.zeros(4, 784), torch.zeros(4, 1).long(), ValueError, "labels: expected"),
            (torch.zeros(4, 784), torch.zeros(4, 10), ValueError, "labels: expected class ind"),
            (torch.zeros(4, 784).double(), torch.arange(4), ValueError, "images: expected torch.f"),
            (torch.zeros(4, 784, requires_grad=True), torch.arange(4), ValueError, "detach"),
            (torch.zeros(4, 784, device="meta"), torch.arange(4), ValueError, "on cpu that needs"),
            (torch.zeros(4, 784), torch.arange(4, device="meta"), ValueError, "labels.*on meta"),
            (torch.zeros(4, 784).numpy(), torch.arange(4), TypeError, "images.*got ndarray"),
            (torch.zeros(4, 784), [0, 1, 2, 3], TypeError, "labels: expected.*got list"),
            (torch.zeros(4, 784).to_sparse(), torch.arange(4), TypeError, "layout torch.sparse_co"),
        ],
    )
    def test_calls(self, images, labels, error, message):
        model = mlp((20,))
        step, _ = pair(model)
        before = copy.deepcopy(model)
        with pytest.raises(error, match=message):
            step(images, labels)
        assert_same_bits(model, before)

    @pytest.mark.parametrize("bad", [10, -1, -100_000, 2**40])
    def test_labels_out_of_range(self, bad):
        """IndexError, op and argument named; nothing is updated, the momentum included."""
        model = mlp((20,))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        step = TrainStep(model, nn.CrossEntropyLoss(), optimizer)
        images, labels = (t[0] for t in batches(1, 64))
        step(images, labels)
        labels[50] = bad
        before = copy.deepcopy((model, optimizer.state_dict()["state"]))
        message = rf"labels: expected class indices in \[0, 10\) or ignore_index -100, got {bad}"
        with pytest.raises(IndexError, match=rf"mnist_ext.train_steps: {message} at position 50"):
            step(images, labels)
        with pytest.raises(IndexError, match=message):
            step.epoch(images, labels, 8)
        assert_same_bits(model, before[0])
        for i, state in optimizer.state_dict()["state"].items():
            assert torch.equal(state["momentum_buffer"], before[1][i]["momentum_buffer"])


class TestTheUsersTensors:
    def test_one_may_switch_to_the_ordinary_loop_and_back(self):
        """Momentum included, on the same model and optimizer."""
        for first in (0, 1):
            model = swap(mlp((20,), "relu"))
            criterion = swap(nn.CrossEntropyLoss())
            _, loop = pair(model, sgd={"momentum": 0.9})
            optimizer = mnist_ext.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
            step = TrainStep(model, criterion, optimizer)
            for i, (x, y) in enumerate(zip(*batches(6, 16), strict=True)):
                if i % 2 == first:
                    loss = step(x, y)
                else:
                    loss = ordinary_step(model, criterion, optimizer, x, y)
                assert torch.equal(loss, ordinary_step(*loop, x, y))
            assert_same_bits(model, loop[0])

    def test_checkpoints(self):
        images, labels = batches(4, 16)
        model = mlp((20,), "relu")
        step, loop = pair(model, sgd={"momentum": 0.9})
        saved = None
        for i, (x, y) in enumerate(zip(images, labels, strict=True)):
            if i == 2:
                saved = copy.deepcopy((model.state_dict(), step._optimizer.state_dict()))
            step(x, y)
        model.load_state_dict(saved[0])
        step._optimizer.load_state_dict(saved[1])
        for x, y in zip(images[2:], labels[2:], strict=True):
            step(x, y)
        for x, y in zip(images, labels, strict=True):
            ordinary_step(*loop, x, y)
        assert_same_bits(model, loop[0])
        assert [id(p) for g in step._optimizer.param_groups for p in g["params"]] == [
            id(p) for p in model.parameters()
        ]

    def test_groups_and_schedulers(self):
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

    @pytest.mark.filterwarnings("error")
    def test_schedulers_do_not_warn(self):
        model = mlp((20,))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        step = TrainStep(model, nn.CrossEntropyLoss(), optimizer)
        images, labels = batches(1, 8)
        step(images[0], labels[0])
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)

    def test_options_changed_in_between(self):
        model = mlp((20,), "relu")
        step, loop = pair(model)
        for i, (x, y) in enumerate(zip(*batches(4, 16), strict=True)):
            for optimizer in (step._optimizer, loop[2]):
                optimizer.param_groups[0].update(lr=0.1 / (i + 1), momentum=0.3 * (i > 1))
            assert torch.equal(step(x, y), ordinary_step(*loop, x, y))
        assert_same_bits(model, loop[0])

    def test_weight_decay_that_is_a_tensor_written_in_between(self):
        model = mlp((20,), "relu")
        decays = torch.tensor(0.1), torch.tensor(0.1)
        step, loop = pair(model)
        for decay, optimizer in zip(decays, (step._optimizer, loop[2]), strict=True):
            optimizer.param_groups[0]["weight_decay"] = decay
        for x, y in zip(*batches(3, 16), strict=True):
            assert torch.equal(step(x, y), ordinary_step(*loop, x, y))
            for decay in decays:
                decay.mul_(3)
        assert_same_bits(model, loop[0])

    def test_parameters_count_as_modified(self):
        model = mlp((20,))
        images, labels = (t[0] for t in batches(1, 8))
        loss = model(images).sum()
        pair(model)[0](images, labels)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_another_default_device(self):
        """Each tensor is made where the model is."""
        model = mlp((20,), "relu")
        model[1].weight.requires_grad_(False)
        images, labels = (t[0] for t in batches(1, 32))
        with torch.device("meta"):
            step, loop = pair(model, sgd={"momentum": 0.9})
            step(images, labels)
            step.epoch(images, labels, 8, torch.arange(32, device="cpu"))
        for chosen in (slice(32), *(slice(i, i + 8) for i in range(0, 32, 8))):
            ordinary_step(*loop, images[chosen], labels[chosen])
        torch.testing.assert_close([*model.parameters()], [*loop[0].parameters()])

    def test_images_and_labels_are_not_written(self):
        images, labels = (t[0] for t in batches(1, 64))
        before = images.clone(), labels.clone()
        loss = pair(mlp((20,)))[0](images, labels)
        assert torch.equal(images, before[0])
        assert torch.equal(labels, before[1])
        assert not loss.requires_grad

    def test_threads_of_python_train_models_of_their_own(self):
        """Each thread has buffers of its own."""
        images, labels = batches(20, 64)

        def train(model):
            step, _ = pair(model)
            for x, y in zip(images, labels, strict=True):
                step(x, y)

        models = [mlp((20,), "relu") for _ in range(3)]
        twins = copy.deepcopy(models)
        threads = [threading.Thread(target=train, args=(m,)) for m in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for model, twin in zip(models, twins, strict=True):
            train(twin)
            assert_same_bits(model, twin)


class TestEpoch:
    @pytest.mark.parametrize("number", [1, 64, 65, 1000])
    @pytest.mark.parametrize("permuted", [False, True])
    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_is_the_steps_one_after_the_other(self, number, permuted, reduction):
        images, labels = (t[0] for t in batches(1, 1000))
        sgd = {"momentum": 0.9, "lr": 0.001}
        model = mlp((20,), "relu")
        twin = copy.deepcopy(model)
        epoch, _ = pair(model, {"reduction": reduction}, sgd)
        step, _ = pair(twin, {"reduction": reduction}, sgd)
        order = torch.randperm(1000)[:number] if permuted else torch.arange(number)
        if permuted:
            mean = epoch.epoch(images, labels, 64, order)
        else:
            mean = epoch.epoch(images[:number], labels[:number], 64)
        total = 0.0
        for chosen in order.split(64):
            loss = step(images[chosen], labels[chosen]).item()
            total += loss * (len(chosen) if reduction == "mean" else 1)
        assert_same_bits(model, twin)
        assert mean == pytest.approx(total / number, rel=1e-6)

    def test_pixels(self):
        pixels = torch.randint(0, 256, (300, 28, 28), dtype=torch.uint8)
        labels = torch.randint(0, 10, (300,))
        model = mlp((20,), "relu")
        twin = copy.deepcopy(model)
        steps = [
            TrainStep(
                m,
                nn.CrossEntropyLoss(),
                torch.optim.SGD(m.parameters(), lr=0.1),
                normalize=(0.13, 0.3),
            )
            for m in (model, twin)
        ]
        order = torch.randperm(300)
        steps[0].epoch(pixels, labels, 64, order)
        for chosen in order.split(64):
            steps[1](pixels[chosen], labels[chosen])
        assert_same_bits(model, twin)

    @pytest.mark.parametrize("cycle_momentum", [False, True])
    def test_scheduler(self, cycle_momentum):
        """Stepped after each batch, whether it moves the momentum or not."""
        images, labels = (t[0] for t in batches(1, 1000))
        model = mlp((20,), "relu")
        twin = copy.deepcopy(model)
        results = []
        for m in (model, twin):
            optimizer = torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9)
            scheduler = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, 0.1, total_steps=40, cycle_momentum=cycle_momentum
            )
            results.append((TrainStep(m, nn.CrossEntropyLoss(), optimizer), scheduler))
        results[0][0].epoch(images, labels, 32, scheduler=results[0][1])
        for x, y in zip(images.split(32), labels.split(32), strict=True):
            results[1][0](x, y)
            results[1][1].step()
        assert_same_bits(model, twin)
        assert results[0][1].last_epoch == results[1][1].last_epoch == 32

    @pytest.mark.parametrize("at", [1, 2, 7])
    @pytest.mark.parametrize("error", [KeyboardInterrupt, ArithmeticError])
    def test_state_where_the_scheduler_is_interrupted_or_fails(self, at, error):
        """The batches that it has counted have been trained on, momentum included; no others."""

        class Scheduler:
            steps = 0

            def step(self):
                self.steps += 1
                if self.steps != at:
                    return
                if error is KeyboardInterrupt:
                    signal.raise_signal(signal.SIGINT)
                else:
                    raise error

        images, labels = (t[0] for t in batches(1, 200))
        (step, _), (twin, _) = (pair(mlp((20,)), sgd={"momentum": 0.9}) for _ in range(2))
        twin._model.load_state_dict(step._model.state_dict())
        scheduler = Scheduler()
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(error):
                step.epoch(images, labels, 10, scheduler=scheduler)
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        finally:
            signal.signal(signal.SIGINT, handler)
        chosen = slice(10 * scheduler.steps)
        twin.epoch(images[chosen], labels[chosen], 10)
        assert_same_bits(step._model, twin._model)
        buffers = [s._optimizer.state_dict()["state"] for s in (step, twin)]
        for i, state in buffers[0].items():
            assert torch.equal(state["momentum_buffer"], buffers[1][i]["momentum_buffer"])

    @pytest.mark.parametrize("bad", [-1, 1000])
    def test_indices_out_of_range(self, bad):
        model = mlp((20,))
        before = copy.deepcopy(model)
        images, labels = (t[0] for t in batches(1, 1000))
        order = torch.arange(1000)
        order[-1] = bad
        with pytest.raises(IndexError, match=f"permutation.*1000 images, got {bad}"):
            pair(model)[0].epoch(images, labels, 64, order)
        assert_same_bits(model, before)

    def test_uint8_labels_among_more_classes_than_uint8_has(self):
        images, labels = (t[0] for t in batches(1, 300, 20, classes=256))
        models = [nn.Linear(20, 300) for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        for model, y in zip(models, (labels.to(torch.uint8), labels), strict=True):
            pair(model)[0].epoch(images, y, 64)
        assert_same_bits(*models)

    def test_bad_uint8_label_that_ignore_index_would_wrap_to(self):
        """-100 is 156 modulo 256."""
        model = mlp((20,))
        before = copy.deepcopy(model)
        images, labels = (t[0] for t in batches(1, 300))
        labels[-1] = 156
        with pytest.raises(IndexError, match="got 156"):
            pair(model)[0].epoch(images, labels.to(torch.uint8), 64)
        assert_same_bits(model, before)

    def test_the_op_checks_indices_itself(self):
        step, _ = pair(mlp((20,)))
        images, labels = (t[0] for t in batches(1, 10))
        with pytest.raises(IndexError, match=r"mnist_ext.train_steps: order.*got 10 at position 1"):
            step._run(images, labels, torch.tensor([0, 10]), 2, [0.1])

    def test_no_image(self):
        step, _ = pair(mlp((20,)))
        assert step.epoch(torch.zeros(0, 784), torch.zeros(0, dtype=torch.int64), 64) != 0

    def test_wrong_calls(self):
        step, _ = pair(mlp((20,)))
        images, labels = (t[0] for t in batches(1, 10))
        for arguments, message in (
            ((images, labels, 0), "batch_size: expected an integer of at least 1, got 0"),
            ((images, labels, 2.0), "batch_size: expected an integer of at least 1, got 2.0"),
            ((images, labels[:9], 4), r"labels: expected shape \[10\], got \[9\]"),
            ((images, labels, 4, torch.arange(10).int()), "permutation: expected indices of int64"),
        ):
            with pytest.raises(ValueError, match=message):
                step.epoch(*arguments)
        with pytest.raises(TypeError, match=r"permutation: expected a plain dense.*got list"):
            step.epoch(images, labels, 4, [0, 1])

    def test_batches_larger_than_anything(self):
        models = [mlp((20,)) for _ in range(2)]
        models[1].load_state_dict(models[0].state_dict())
        images, labels = (t[0] for t in batches(1, 10))
        pair(models[0])[0].epoch(images, labels, 2**64)
        pair(models[1])[0](images, labels)
        assert_same_bits(*models)

    def test_interrupt_comes_between_native_calls(self):
        """An epoch that would take minutes ends with Ctrl-C; what it did so far is kept."""
        # What a shell starts in the background ignores Ctrl-C, and so would this.
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        model = mlp((256, 256), "relu")
        step, _ = pair(model, sgd={"lr": 1e-4})
        before = copy.deepcopy(model)
        images, labels = (t[0] for t in batches(1, 1000))
        order = torch.randint(0, 1000, (20_000_000,))
        timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))

        class Scheduler:  # steps when all indices have been checked and training begins
            def step(self):
                if timer.ident is None:
                    timer.start()

        started = time.perf_counter()
        try:
            with pytest.raises(KeyboardInterrupt):
                step.epoch(images, labels, 64, order, Scheduler())
        finally:
            signal.signal(signal.SIGINT, handler)
        assert time.perf_counter() - started < 60  # minutes, were it not for Ctrl-C
        assert not torch.equal(model[1].weight, before[1].weight)
