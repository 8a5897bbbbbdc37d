"""The training loop, and that both implementations do the same in it."""

import os
from dataclasses import replace

import pytest
import torch
from torch import nn

from mnist_ext.app import UserError
from mnist_ext.app.data import datasets
from mnist_ext.app.training import trainer
from mnist_ext.app.training.models import mlp
from mnist_ext.app.training.settings import RECIPES, TrainConfig
from mnist_ext.app.training.trainer import EpochMetrics, StepMetrics, Trainer, build, select_device

MNIST_FOLDER = os.environ.get("MNIST_EXT_DATA")
CPU = torch.device("cpu")
QUICK = TrainConfig(dataset="digits", epochs=2, lr=0.1)


@pytest.fixture(scope="module")
def digits() -> datasets.Dataset:
    return datasets.load("digits")


@pytest.fixture(scope="module")
def mnist() -> datasets.Dataset:
    return datasets.load("mnist", MNIST_FOLDER)


def run(config: TrainConfig, dataset: datasets.Dataset) -> list[EpochMetrics]:
    model, criterion = build(config, CPU)
    trainer = Trainer(model, criterion, config, dataset)
    return [trainer.train_epoch() for _ in range(config.epochs)]


def step_losses(config: TrainConfig, dataset: datasets.Dataset) -> list[float]:
    """Return the losses of the first 20 steps."""
    config = replace(config, log_interval=1)
    losses: list[float] = []
    trainer = Trainer(*build(config, CPU), config, dataset)
    for _ in range(2):
        trainer.train_epoch(lambda count, loss, steps: losses.extend(step.loss for step in steps))
    assert len(losses) > 20
    return losses[:20]


class TestModel:
    def test_activation_follows_each_hidden_layer(self):
        model = mlp(hidden=(5,), activation="relu", in_features=8, num_classes=2)
        assert [type(layer) for layer in model] == [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear]
        with pytest.raises(ValueError, match="'gelu'"):
            mlp(activation="gelu")


class TestDevice:
    @pytest.mark.parametrize("name", ["gpu", "meta", "", "cuda:x"])
    def test_unknown(self, name):
        with pytest.raises(UserError, match=f"unknown device '{name}'"):
            select_device(name, "torch")

    @pytest.mark.parametrize(
        ("gpus", "name", "impl", "message"),
        [
            (0, "cuda", "torch", "no CUDA GPU"),
            (1, "cuda:0", "ext", "no CUDA kernels"),
            (1, "cuda:1", "torch", "the last GPU here is cuda:0"),
        ],
    )
    def test_cuda(self, monkeypatch, gpus, name, impl, message):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(trainer, "build_info", lambda: {"cuda": None})
        with pytest.raises(UserError, match=message):
            select_device(name, impl)
        if gpus:
            assert select_device("cuda:0", "torch") == torch.device("cuda:0")


@pytest.mark.parametrize("impl", ["ext", "torch"])
class TestTrain:
    def test_best_recipe_learns(self, digits, impl):
        first, *_, last = run(TrainConfig(impl=impl, **RECIPES["best"]), digits)
        assert last.train_loss < first.train_loss < 2.3
        assert last.test_loss < first.test_loss
        assert last.test_accuracy > 90

    def test_a_seed_determines_the_result(self, digits, impl):
        def result(seed: int) -> list[tuple[float, ...]]:
            metrics = run(replace(QUICK, impl=impl, seed=seed), digits)
            return [(m.train_loss, m.test_loss, m.test_accuracy, m.lr) for m in metrics]

        assert result(3) == result(3)
        assert result(3) != result(4)


# After the first epoch of four one cycle is near its peak. After the second one the cosine is half
# way, but for one step of 92.
@pytest.mark.parametrize(
    ("scheduler", "epoch", "rate"), [("onecycle", 0, 0.1), ("cosine", 1, 0.05)]
)
def test_schedulers_end_near_zero(digits, scheduler, epoch, rate):
    rates = [m.lr for m in run(replace(QUICK, epochs=4, scheduler=scheduler), digits)]
    assert rates == sorted(rates, reverse=True)
    assert rates[epoch] == pytest.approx(rate, rel=0.1)
    assert 0 < rates[-1] < 1e-4


@pytest.mark.parametrize("one_call", [False, True])
def test_an_observer_sees_every_image_and_the_steps_asked_for(digits, one_call):
    config = replace(QUICK, batch_size=500, log_interval=2, one_call=one_call)
    trainer = Trainer(*build(config, CPU), config, digits)
    images, rows, losses = [], [], []

    def observe(count: int, loss: torch.Tensor, steps: list[StepMetrics]) -> bool:
        images.append(count)
        losses.append(loss.item())
        rows.extend(steps)
        return False

    metrics = [trainer.train_epoch(observe) for _ in range(2)]
    assert sum(images) == 2 * len(digits.train)
    assert [(row.epoch, row.step) for row in rows] == [(1, 2), (2, 4), (2, 6)]
    assert {row.lr for row in rows} == {0.1}
    assert losses[-1] == rows[-1].loss < metrics[0].train_loss


@pytest.mark.parametrize("options", [{}, {"impl": "torch"}, {"one_call": True}], ids=str)
@pytest.mark.parametrize("limit", [None, 3])
def test_losses_are_means_over_images(digits, options, limit):
    # With the learning rate 0 every batch is judged by the same model. 1,437 images in batches of
    # 100 leave 37 for the last: a mean over batches would be off.
    config = replace(QUICK, epochs=1, lr=0.0, batch_size=100, limit_batches=limit, **options)
    (metrics,) = run(config, digits)
    torch.manual_seed(config.seed)
    model = mlp()
    order = torch.randperm(1437, generator=torch.Generator().manual_seed(config.seed))
    for split, chosen, loss in (
        (digits.train, order if limit is None else order[:300], metrics.train_loss),
        (digits.test, torch.arange(360), metrics.test_loss),
    ):
        images, labels = datasets.take(split, chosen, digits.mean, digits.std)
        expected = nn.functional.cross_entropy(model(images), labels).item()
        assert loss == pytest.approx(expected, rel=1e-5)


class TestBothImplementations:
    @pytest.mark.parametrize("recipe", ["tutorial", "best"])
    def test_same_losses_step_by_step(self, digits, recipe):
        config = TrainConfig(**RECIPES[recipe])
        ours, theirs = (step_losses(replace(config, impl=i), digits) for i in ("ext", "torch"))
        assert ours == pytest.approx(theirs, rel=1e-5)

    @pytest.mark.mnist
    def test_same_accuracy_on_mnist(self, mnist):
        """Ours by modules and in one call, and PyTorch's, of one seed: after each epoch."""
        ways = {}, {"one_call": True}, {"impl": "torch"}
        runs = [run(TrainConfig(epochs=2, **way), mnist) for way in ways]
        for epochs in zip(*runs, strict=True):
            accuracies = [metrics.test_accuracy for metrics in epochs]
            assert max(accuracies) - min(accuracies) <= 0.3
            assert min(accuracies) > 90


@pytest.mark.mnist
def test_best_recipe_on_mnist(mnist):
    """A tenth of its epochs."""
    config = TrainConfig(**{**RECIPES["best"], "epochs": 2})
    assert run(config, mnist)[-1].test_accuracy >= 98


def test_each_epoch_of_each_seed_trains_on_other_copies(digits, monkeypatch):
    seeds = []
    augmented = trainer.augmented
    monkeypatch.setattr(
        trainer, "augmented", lambda split, seed: seeds.append(seed) or augmented(split, seed)
    )
    for seed in (0, 1, 0):
        # With the learning rate 0 every epoch is judged by the same model.
        epochs = run(replace(QUICK, epochs=3, lr=0.0, augment=True, seed=seed), digits)
        losses = sorted(metrics.train_loss for metrics in epochs)
        assert losses[0] * 1.0001 < losses[1] < losses[2] / 1.0001
    assert len(set(seeds[:6])) == 6
    assert seeds[6:] == seeds[:3]


@pytest.mark.parametrize("recipe", RECIPES)
def test_one_call_is_the_same_run(digits, recipe):
    """The same batches in the same order: losses and accuracies of the ordinary loop."""
    config = TrainConfig(**{**RECIPES[recipe], "epochs": 3})
    ordinary = run(config, digits)
    for ours, theirs in zip(run(replace(config, one_call=True), digits), ordinary, strict=True):
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-3)
        assert ours.test_loss == pytest.approx(theirs.test_loss, rel=1e-3)
        assert ours.lr == theirs.lr
