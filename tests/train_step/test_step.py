"""TrainStep: the ordinary loop's numbers, in the user's tensors."""

import copy
import re

import pytest
import torch
from torch import nn
from train_loops import (
    LOSSES,
    SGDS,
    assert_same_bits,
    assert_same_state,
    batches,
    check_steps,
    first_batch,
    ordinary_step,
    pair,
    state_of,
)

import mnist_ext
from mnist_ext import TrainStep
from mnist_ext.app.data import datasets
from mnist_ext.app.training.models import mlp
from mnist_ext.nn import swap

LARGE = pytest.mark.cpu_only("several blocks of rows in the CPU's kernels")


class TestTheOrdinaryLoopsNumbers:
    """The kernels are those of the ordinary loop on swapped modules: the same bits."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize(
        "size", [1, 7, 64, *(pytest.param(n, marks=LARGE) for n in (257, 600))]
    )
    def test_batch_sizes(self, device, size, dtype):
        check_steps(mlp((128, 64), "relu").to(dtype), *batches(3, size, dtype=dtype))

    @pytest.mark.parametrize("sgd", SGDS, ids=str)
    def test_optimizer_options(self, device, sgd):
        check_steps(mlp((40, 30), "relu"), *batches(4, 32), sgd=sgd)

    @pytest.mark.parametrize("loss", LOSSES, ids=str)
    @pytest.mark.parametrize("size", [5, 64])
    def test_loss_options(self, device, loss, size):
        images, labels = batches(3, size)
        labels[:, 0] = loss.get("ignore_index", 0)
        sgd = {"lr": 0.001} if loss.get("reduction") == "sum" else {}
        check_steps(mlp((40, 30), "relu"), images, labels, loss, sgd)

    @pytest.mark.parametrize("hidden", [(), (1,), (3, 5), (200,), (17, 33, 9, 21, 13), (64,) * 12])
    @pytest.mark.parametrize("activation", ["relu", "none"])
    def test_numbers_of_layers_and_widths(self, device, hidden, activation):
        model = mlp(hidden, activation, in_features=30, num_classes=7)
        check_steps(model, *batches(4, 33, 30, classes=7))

    @pytest.mark.parametrize("classes", [1, 2, 33, 300])
    def test_numbers_of_classes(self, device, classes):
        check_steps(mlp((20,), "relu", 50, classes), *batches(3, 19, 50, classes=classes))

    def test_without_biases_and_with_relu_behind_the_last_layer(self):
        model = nn.Sequential(
            nn.Linear(20, 30, bias=False), nn.ReLU(), nn.Linear(30, 5), nn.Identity(), nn.ReLU()
        )
        check_steps(model, *batches(4, 16, 20, classes=5))

    @pytest.mark.cpu_only("threads of the CPU")
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
        images, labels = batches(2, 9)
        check_steps(mlp((16,), "relu"), images, labels.to(dtype))

    @pytest.mark.parametrize("label", [None, -100])
    def test_nothing_to_learn_from(self, label):
        """No image, or none whose label counts: NaN, and the update of weight decay alone."""
        images, labels = torch.randn(0, 784), torch.zeros(0, dtype=torch.int64)
        if label is not None:
            images, labels = torch.randn(4, 784), torch.full((4,), label)
        model = mlp((16,), "relu")
        step, loop = pair(model, sgd={"weight_decay": 0.1})
        assert step(images, labels).isnan()
        assert ordinary_step(*loop, images, labels).isnan()
        assert_same_bits(model, loop[0])

    def test_strides(self):
        images, labels = first_batch(12)
        spread = torch.randn(24, 784 * 2)
        spread[::2, ::2] = images
        expanded = images[None, :1].expand(1, 12, 784)[0]
        for x in (spread[::2, ::2], images.T.contiguous().T, expanded):
            model = mlp((16,), "relu")
            step, loop = pair(model)
            expected = ordinary_step(*loop, x.contiguous(), labels)
            assert torch.equal(step(x, labels.repeat_interleave(2)[::2]), expected)
            assert_same_bits(model, loop[0])


class TestAgainstPyTorch:
    def run(self, dtype, native, activation):
        torch.manual_seed(1)
        model = mlp(activation=activation).to(dtype)
        criterion = nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        digits = datasets.load("digits")
        images = datasets.normalize(digits.train.images, digits.mean, digits.std)
        images = images.flatten(1).to(dtype)
        step = TrainStep(model, criterion, optimizer) if native else None
        generator = torch.Generator().manual_seed(1)
        losses = []
        for _ in range(1000):
            chosen = torch.randint(len(images), (64,), generator=generator)
            batch = images[chosen], digits.train.labels[chosen]
            losses.append(
                step(*batch) if step else ordinary_step(model, criterion, optimizer, *batch)
            )
        return torch.stack(losses), nn.utils.parameters_to_vector(model.parameters()).detach()

    @pytest.mark.cpu_only("a thousand steps")
    @pytest.mark.parametrize("activation", ["none", "relu"])
    def test_a_thousand_steps(self, activation):
        """Losses within 1e-4 of eager's; parameters at most twice as far from float64 as eager's.

        With ReLU that is a matter of the seed, for eager as for us: where rounding decides on
        which side of 0 a sum falls, two runs part by more, float32 and float64 of eager too.
        """
        losses, params = self.run(torch.float32, True, activation)
        eager_losses, eager_params = self.run(torch.float32, False, activation)
        _, truth = self.run(torch.float64, False, activation)
        torch.testing.assert_close(losses, eager_losses, rtol=1e-4, atol=0)
        distance, eager_distance = ((p.double() - truth).norm() for p in (params, eager_params))
        assert distance <= 2 * eager_distance


class TestPixels:
    """uint8 images with normalize, against images that were normalized."""

    @pytest.mark.parametrize("features", [784, 30, 3])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_same_as_normalized_images(self, device, features, dtype):
        mean, std = 0.1307, 0.3081
        pixels = torch.randint(0, 256, (4, 33, features), dtype=torch.uint8)
        labels = torch.randint(0, 10, (4, 33))
        model = mlp((40, 30), "relu", features).to(dtype)
        step, loop = pair(model, normalize=(mean, std))
        rtol, rtol_params = (1e-5, 1e-4) if dtype is torch.float32 else (1e-13, 1e-11)
        for x, y in zip(pixels, labels, strict=True):
            images = datasets.normalize(x, mean, std)
            if dtype is torch.float64:
                images = (x.double() / 255 - mean) / std
            expected = ordinary_step(*loop, images, y)
            torch.testing.assert_close(step(x, y), expected, rtol=rtol, atol=0)
        torch.testing.assert_close(
            [*model.parameters()], [*loop[0].parameters()], rtol=rtol_params, atol=rtol_params / 100
        )

    @pytest.mark.parametrize(
        ("normalize", "dtype", "message"),
        [
            (None, torch.uint8, "images: expected torch.float32.*normalize="),
            ((0.1, 0.3), torch.float32, "images: expected uint8.*normalize is given"),
            ((0.1, 0.0), torch.uint8, "normalize: expected a finite mean and std > 0"),
        ],
    )
    def test_dtype_and_normalize_must_agree(self, normalize, dtype, message):
        images, labels = torch.zeros(2, 784, dtype=dtype), torch.zeros(2, dtype=torch.int64)
        with pytest.raises(ValueError, match=message):
            pair(mlp((16,)), normalize=normalize)[0](images, labels)


class TestTheUsersTensors:
    @pytest.mark.parametrize("first", [0, 1])
    def test_one_may_switch_to_the_ordinary_loop_and_back(self, first):
        """Momentum included, on the same model and optimizer."""
        model = swap(mlp((20,), "relu"))
        criterion = swap(nn.CrossEntropyLoss())
        _, loop = pair(model, sgd={"momentum": 0.9})
        optimizer = mnist_ext.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        step = TrainStep(model, criterion, optimizer)
        for i, (x, y) in enumerate(zip(*batches(6, 16), strict=True)):
            native = i % 2 == first
            loss = step(x, y) if native else ordinary_step(model, criterion, optimizer, x, y)
            assert torch.equal(loss, ordinary_step(*loop, x, y))
        assert_same_bits(model, loop[0])

    def test_checkpoints(self):
        images, labels = batches(4, 16)
        model = mlp((20,), "relu")
        step, loop = pair(model, sgd={"momentum": 0.9})
        for i in range(4):
            if i == 2:
                saved = copy.deepcopy((model.state_dict(), step._optimizer.state_dict()))
            step(images[i], labels[i])
        model.load_state_dict(saved[0])
        step._optimizer.load_state_dict(saved[1])
        for x, y in zip(images[2:], labels[2:], strict=True):
            step(x, y)
        for x, y in zip(images, labels, strict=True):
            ordinary_step(*loop, x, y)
        assert_same_bits(model, loop[0])
        held = [p for g in step._optimizer.param_groups for p in g["params"]]
        assert all(a is b for a, b in zip(held, model.parameters(), strict=True))

    def test_a_copy_goes_on_by_itself(self):
        images, labels = batches(3, 16)
        step, _ = pair(mlp((20,), "relu"), sgd={"momentum": 0.9})
        step(images[0], labels[0])
        other = copy.deepcopy(step)
        losses = [[s(x, y) for x, y in zip(images, labels, strict=True)] for s in (step, other)]
        assert losses[0] == losses[1]
        assert other._model is not step._model
        assert_same_state(step, other)

    def test_parameters_count_as_modified(self):
        model = mlp((20,))
        images, labels = first_batch(8)
        loss = model(images).sum()
        pair(model)[0](images, labels)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    @pytest.mark.cpu_only("the model is on the CPU")
    def test_another_default_device(self):
        """Each tensor is made where the model is."""
        model = mlp((20,), "relu")
        model[1].weight.requires_grad_(False)
        images, labels = first_batch(32)
        with torch.device("meta"):
            step, loop = pair(model, sgd={"momentum": 0.9})
            step(images, labels)
            step.epoch(images, labels, 8, torch.arange(32, device="cpu"))
        for chosen in (slice(32), *(slice(i, i + 8) for i in range(0, 32, 8))):
            ordinary_step(*loop, images[chosen], labels[chosen])
        torch.testing.assert_close([*model.parameters()], [*loop[0].parameters()])


class TestWrongCalls:
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
    def test_images_and_labels(self, images, labels, error, message):
        model = mlp((20,))
        step, _ = pair(model)
        before = copy.deepcopy(model)
        with pytest.raises(error, match=message):
            step(images, labels)
        assert_same_bits(model, before)

    @pytest.mark.cpu_only("an index out of range ends a CUDA kernel: tests/cuda")
    @pytest.mark.parametrize("bad", [10, -1, -100_000, 2**40])
    def test_labels_out_of_range(self, bad):
        """IndexError, op and argument named; nothing is updated, the momentum included."""
        step, _ = pair(mlp((20,)), sgd={"momentum": 0.9})
        images, labels = first_batch(64)
        step(images, labels)
        labels[50] = bad
        before = state_of(step)
        message = f"labels: expected class indices in [0, 10) or ignore_index -100, got {bad}"
        where = re.escape(f"mnist_ext.train_steps: {message} at position 50")
        with pytest.raises(IndexError, match=where):
            step(images, labels)
        with pytest.raises(IndexError, match=re.escape(message)):
            step.epoch(images, labels, 8)
        assert_same_state(step, before)
