"""TrainStep's CUDA kernels: on the emulator of tests/emulator everywhere, and on a GPU.

Each model is trained twice: in one cluster of blocks that keeps it in shared memory, and by the
kernels of each op, one after the other, as on a device without clusters.
"""

import copy

import emulated
import pytest
import torch
from test_train_step import LOSSES, SGDS, batches, ordinary_step
from torch import nn

from mnist_ext import TrainStep, _library
from mnist_ext.app.training.models import mlp

GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("gpu", "gpu sequence")]


@pytest.fixture(params=["cluster", "sequence", *GPU])
def path(request):
    """Run the test on each way to make the steps; yield the device to put tensors on."""
    if request.param.startswith("gpu"):
        _library.cuda.set_train_step_ways(clusters=request.param == "gpu")
        yield "cuda"
        _library.cuda.set_train_step_ways()
        return
    request.getfixturevalue("emulator")
    if request.param == "sequence":
        emulated.set_device(compute_capability_major=8, shared_kilobytes=99)
    yield "cpu"


def launches_of(call):
    before = emulated.launches()
    call()
    return emulated.launches() - before


def trainer(model, loss=None, sgd=None, **options):
    """Return a TrainStep and what it consists of."""
    dtype, device = (lambda p: (p.dtype, p.device))(next(model.parameters()))
    loss = {k: v.to(device, dtype) if k == "weight" else v for k, v in (loss or {}).items()}
    criterion = nn.CrossEntropyLoss(**loss)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], **{"lr": 0.05, **(sgd or {})}
    )
    return TrainStep(model, criterion, optimizer, **options), (model, criterion, optimizer)


def check(device, model, images, labels, loss=None, sgd=None):
    """Compare with the ordinary loop in float64; the error is a few of PyTorch's own in float32."""
    model = model.to(device)
    images, labels = images.to(device), labels.to(device)
    _, truth = trainer(copy.deepcopy(model).double(), loss, sgd)
    _, torchs = trainer(copy.deepcopy(model), loss, sgd)
    step, (_, _, optimizer) = trainer(model, loss, sgd)
    for x, y in zip(images, labels, strict=True):
        ours = step(x, y)
        expected = ordinary_step(*truth, x.double(), y)
        ordinary_step(*torchs, x, y)
        torch.testing.assert_close(ours.double(), expected, rtol=2e-6, atol=1e-7)
    for our, true, their in zip(
        *(m.parameters() for m in (model, truth[0], torchs[0])), strict=True
    ):
        assert_near(our, true, their)
        if "momentum_buffer" in truth[2].state.get(true, {}):
            assert_near(
                *(
                    o.state[p]["momentum_buffer"]
                    for o, p in ((optimizer, our), (truth[2], true), (torchs[2], their))
                )
            )


def assert_near(our, true, their):
    error = (their.double() - true).abs().max()
    allowed = 3 * error + 4 * torch.finfo(our.dtype).eps * true.abs().max()
    assert (our.double() - true).abs().max() <= allowed


def small(hidden=(12, 9), features=20, classes=5, activation="relu"):
    torch.manual_seed(0)
    return mlp(hidden, activation, features, classes)


class TestTheOrdinaryLoopsNumbers:
    @pytest.mark.parametrize("size", [1, 8, 13])
    def test_batch_sizes(self, path, size):
        check(path, small(), *batches(3, size, 20, classes=5))

    @pytest.mark.parametrize("sgd", SGDS, ids=str)
    def test_optimizer_options(self, path, sgd):
        check(path, small(), *batches(3, 6, 20, classes=5), sgd=sgd)

    @pytest.mark.parametrize("loss", LOSSES, ids=str)
    def test_loss_options(self, path, loss):
        images, labels = batches(2, 9, 20)
        labels[:, 0] = loss.get("ignore_index", 0)
        sgd = {"lr": 0.001} if loss.get("reduction") == "sum" else {}
        check(path, small(classes=10), images, labels, loss, sgd)

    # One layer; neurons fewer than blocks; more than a tile of 8 for each block; deep.
    @pytest.mark.parametrize("hidden", [(), (1,), (70,), (9, 3, 5, 2)])
    @pytest.mark.parametrize("features", [13, 16])
    def test_depths_and_widths(self, path, hidden, features):
        model = small(hidden, features, 7)
        check(path, model, *batches(2, 9, features, classes=7), sgd={"momentum": 0.9})

    def test_without_biases_and_with_relu_behind_the_last_layer(self, path):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(20, 30, bias=False), nn.ReLU(), nn.Linear(30, 5), nn.Identity(), nn.ReLU()
        )
        check(path, model, *batches(3, 7, 20, classes=5))

    @pytest.mark.parametrize("frozen", ["0.bias", "0", "1", "0 1", "1 2"])
    def test_frozen_parameters(self, path, frozen):
        model = small()
        layers = [m for m in model if isinstance(m, nn.Linear)]
        for name in frozen.split():
            layer, _, of_layer = name.partition(".")
            for key, param in layers[int(layer)].named_parameters():
                if of_layer in ("", key):
                    param.requires_grad_(False)
        before = copy.deepcopy(model)
        check(path, model, *batches(2, 6, 20, classes=5), sgd={"momentum": 0.9})
        for param, old in zip(model.parameters(), before.parameters(), strict=True):
            assert torch.equal(param.cpu(), old) != param.requires_grad

    def test_groups(self, path):
        images, labels = (t.to(path) for t in batches(3, 6, 20, classes=5))
        model = small().to(path)
        twin = copy.deepcopy(model).double()

        def groups(m):
            weights = [p for p in m.parameters() if p.dim() == 2]
            biases = [p for p in m.parameters() if p.dim() == 1]
            return torch.optim.SGD(
                [
                    {"params": weights, "momentum": 0.9, "lr": 0.1},
                    {"params": biases, "weight_decay": 0.1},
                ],
                lr=0.02,
            )

        step = TrainStep(model, nn.CrossEntropyLoss(), groups(model))
        optimizer = groups(twin)
        for x, y in zip(images, labels, strict=True):
            step(x, y)
            ordinary_step(twin, nn.CrossEntropyLoss(), optimizer, x.double(), y)
        for ours, truth in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.uint8], ids=str)
    def test_labels_of_other_dtypes(self, path, dtype):
        images, labels = batches(2, 6, 20, classes=5)
        check(path, small(), images, labels.to(dtype).long())
        losses = []
        for of_dtype in (torch.int64, dtype):
            step, _ = trainer(small().to(path))
            losses.append(step(images[0].to(path), labels[0].to(path, of_dtype)))
        assert torch.equal(*losses)

    def test_float64(self, path):
        model = small().double()
        images, labels = batches(2, 6, 20, torch.float64, 5)
        check(path, model, images, labels, sgd={"momentum": 0.9})

    def test_confident_predictions(self, path):
        """The gradient of a target's logit is not lost as its probability approaches 1."""
        model = nn.Linear(4, 3, bias=False).to(path)
        nn.init.zeros_(model.weight)
        step, _ = trainer(model, sgd={"lr": 1.0})
        model.weight.data[0, 0] = 30.0
        x = torch.tensor([[1.0, 0, 0, 0]], device=path)
        before = model.weight[0, 0].item()
        step(x, torch.tensor([0], device=path))
        # 2 exp(-30) of each of the other two: too small for the weight, not for theirs.
        assert model.weight[0, 0].item() == before
        truth = -torch.exp(torch.tensor(-30.0, dtype=torch.float64)).item()
        assert model.weight[1, 0].item() == pytest.approx(truth, rel=1e-5)


class TestEpoch:
    @pytest.mark.parametrize("features", [16, 18])  # rows that bulk copies can fetch, and not
    @pytest.mark.parametrize("pixels", [False, True])
    @pytest.mark.parametrize("permuted", [False, True])
    def test_is_the_steps_one_after_the_other(self, path, features, pixels, permuted):
        torch.manual_seed(0)
        images = torch.randint(0, 256, (40, 1, features), dtype=torch.uint8)
        options = {"normalize": (0.13, 0.3)} if pixels else {}
        if not pixels:
            images = torch.randn(40, 1, features)
        labels = torch.randint(0, 5, (40,)).to(path)
        images = images.to(path)
        order = torch.randperm(40)[:29].to(path) if permuted else torch.arange(29, device=path)
        models = [small((9,), features).to(path)]
        models.append(copy.deepcopy(models[0]))
        epoch, _ = trainer(models[0], sgd={"momentum": 0.9}, **options)
        step, _ = trainer(models[1], sgd={"momentum": 0.9}, **options)
        if permuted:
            mean = epoch.epoch(images, labels, 6, order)
        else:
            mean = epoch.epoch(images[:29], labels[:29], 6)
        total = 0.0
        for chosen in order.split(6):
            total += step(images[chosen], labels[chosen]).item() * len(chosen)
        assert mean == pytest.approx(total / 29, rel=1e-6)
        for ours, theirs in zip(*(m.parameters() for m in models), strict=True):
            assert torch.equal(ours, theirs)

    def test_scheduler(self, path):
        images, labels = (t[0].to(path) for t in batches(1, 30, 20, classes=5))
        models = [small().to(path)]
        models.append(copy.deepcopy(models[0]))
        results = []
        for m in models:
            step, (_, _, optimizer) = trainer(m)
            results.append((step, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)))
        results[0][0].epoch(images, labels, 6, scheduler=results[0][1])
        for x, y in zip(images.split(6), labels.split(6), strict=True):
            results[1][0](x, y)
            results[1][1].step()
        for ours, theirs in zip(*(m.parameters() for m in models), strict=True):
            assert torch.equal(ours, theirs)

    @pytest.mark.parametrize("bad", [-1, 30])
    def test_indices_and_labels_out_of_range(self, path, bad):
        images, labels = (t[0].to(path) for t in batches(1, 30, 20, classes=5))
        step, (model, _, _) = trainer(small().to(path))
        before = copy.deepcopy(model)
        order = torch.tensor([0, bad], device=path)
        with pytest.raises(IndexError, match=f"permutation.*30 images, got {bad}"):
            step.epoch(images, labels, 2, order)
        labels[3] = bad
        with pytest.raises(IndexError, match=f"labels.*got {bad}"):
            step.epoch(images, labels, 8)
        for ours, old in zip(model.parameters(), before.parameters(), strict=True):
            assert torch.equal(ours, old)


@pytest.mark.parametrize("hidden", [(), (33,), (33, 9)])
def test_results_do_not_depend_on_the_order_of_threads(emulator, hidden):
    """A barrier that is missing shows here; several steps to a launch, for those between steps."""
    images = torch.randint(0, 256, (40, 16), dtype=torch.uint8)
    labels = torch.randint(0, 5, (40,))
    order = torch.arange(39, -1, -1)
    results = []
    for seed in (1, 2, 3, 4):
        emulated.set_seed(seed)
        step, (model, _, _) = trainer(
            small(hidden, 16), sgd={"momentum": 0.9}, normalize=(0.1, 0.3)
        )
        losses = step._run(images, labels, order, 9, [0.05] * 5)
        results.append([losses, *(p.detach().clone() for p in model.parameters())])
    for tensors in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(tensors, results[0], strict=True))


def test_which_models_a_cluster_takes(emulator):
    """One launch for all steps of a call, where the device can; else some for each."""
    images, labels = (t[0] for t in batches(1, 12, 20, classes=5))

    def launches(model, dtype=torch.float32, **device):
        emulated.set_device(**device)
        step, _ = trainer(model.to(dtype))
        rates = [0.1] * 3
        return launches_of(lambda: step._run(images.to(dtype), labels, None, 4, rates))

    assert launches(small()) == 1
    assert launches(small(), compute_capability_major=8) > 3
    assert launches(small((4000,)), shared_kilobytes=99) > 3
    assert launches(small(), torch.float64) > 3
    assert launches(small((4,) * 8)) > 3  # one layer more than a launch holds


def test_hundreds_of_steps_take_more_than_one_launch(emulator):
    """The momentum buffers go on from one to the next."""
    images, labels = (t[0] for t in batches(1, 400, 4, classes=3))
    models = [small((), 4, 3)]
    models.append(copy.deepcopy(models[0]))
    step, _ = trainer(models[0], sgd={"momentum": 0.9, "lr": 0.001})
    assert launches_of(lambda: step._run(images, labels, None, 1, [0.001] * 400)) == 2
    emulated.set_device(compute_capability_major=8)
    step, _ = trainer(models[1], sgd={"momentum": 0.9, "lr": 0.001})
    step._run(images, labels, None, 1, [0.001] * 400)
    for ours, theirs in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_readmes_model(emulator):
    """At its real size, a batch of 64 in 16 blocks: an H200's shared memory just holds it."""
    emulated.set_device(largest_cluster=16)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (64, 28, 28), dtype=torch.uint8)
    labels = torch.randint(0, 10, (64,))
    options = {"sgd": {"momentum": 0.9}, "normalize": (0.13, 0.3)}
    models = [mlp((128, 64), "relu")]
    models.append(copy.deepcopy(models[0]))
    step, _ = trainer(models[0], **options)
    losses = []
    assert launches_of(lambda: losses.append(step(images, labels))) == 1
    truth, criterion, optimizer = trainer(models[1].double(), sgd={"momentum": 0.9})[1]
    pixels = (images[:, None] / 255 - 0.13).double() / 0.3
    expected = ordinary_step(truth, criterion, optimizer, pixels, labels)
    torch.testing.assert_close(losses[0].double(), expected, rtol=1e-6, atol=0)
    for ours, true in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(ours.double(), true, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [5, -1, 2**40])
def test_a_bad_label_ends_the_kernel(path, bad, capfd):
    if path == "cuda":
        pytest.skip("a device-side assertion ends the process's use of the GPU")
    images, labels = (t[0] for t in batches(1, 12, 20, classes=5))
    labels[7] = bad
    step, (model, _, _) = trainer(small())
    before = copy.deepcopy(model)
    with pytest.raises(IndexError):
        step(images, labels)
    assert f"expected indices in [0, 5), got {bad} at position 7" in capfd.readouterr().out
    for ours, old in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(ours, old)


def test_a_bad_index_ends_the_kernel(path, capfd):
    if path == "cuda":
        pytest.skip("a device-side assertion ends the process's use of the GPU")
    images, labels = (t[0] for t in batches(1, 12, 20, classes=5))
    step, _ = trainer(small())
    with pytest.raises(IndexError):
        step._run(images, labels, torch.tensor([0, 12]), 2, [0.1])
    assert "order: expected indices in [0, 12), got 12 at position 1" in capfd.readouterr().out


class TestEmulator:
    """That it notices what it says it notices."""

    def test_bulk_copies_that_are_not_waited_for(self):
        assert emulated.library().emulator_sum_of_bulk_copies() == 128 * 127 // 2
        error = emulated.error_of("emulator_bulk_copies_not_waited_for")
        assert b"before the last one is complete" in error

    def test_a_bulk_copy_that_is_not_aligned(self):
        assert b"not aligned" in emulated.error_of("emulator_misaligned_bulk_copy")

    def test_a_cluster_that_does_not_wait(self):
        waited, not_waited = set(), set()
        for seed in range(5):
            emulated.set_seed(seed)
            waited.add(emulated.library().emulator_sum_of_cluster(1))
            not_waited.add(emulated.library().emulator_sum_of_cluster(0))
        emulated.set_seed(0)
        assert waited == {4 * (0 + 1 + 2 + 3)}
        assert not_waited != waited

    def test_a_block_far_behind_the_others(self):
        """They have hundreds of waits to do before they would get in its way."""
        waited, not_waited = set(), set()
        for seed in range(5):
            emulated.set_seed(seed)
            waited.add(emulated.library().emulator_sum_before_overtaking(1))
            not_waited.add(emulated.library().emulator_sum_before_overtaking(0))
        emulated.set_seed(0)
        assert waited == {4 * 32}
        assert not_waited != waited


# What only a device can show.


@pytest.mark.gpu
class TestOnGpu:
    def test_the_host_never_waits(self):
        images, labels = (t[0].cuda() for t in batches(1, 64))
        step, _ = trainer(mlp((128, 64), "relu").cuda(), sgd={"momentum": 0.9})
        step(images, labels)
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(images, labels)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("size", [64, 4096])  # in one cluster, and not
    def test_losses_of_the_cpu(self, size):
        pixels = torch.randint(0, 256, (4 * size, 28, 28), dtype=torch.uint8)
        labels = torch.randint(0, 10, (4 * size,))
        model = mlp((128, 64), "relu")
        losses = []
        for device in ("cpu", "cuda"):
            step, _ = trainer(copy.deepcopy(model).to(device), normalize=(0.13, 0.3))
            x, y = pixels.to(device), labels.to(device)
            losses.append([step(*b).item() for b in zip(x.split(size), y.split(size), strict=True)])
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    def test_mixed_devices(self):
        images, labels = (t[0] for t in batches(1, 8))
        step, _ = trainer(mlp((20,)).cuda())
        with pytest.raises(ValueError, match="images: expected a plain tensor on cuda:0"):
            step(images, labels)
        with pytest.raises(RuntimeError, match="labels: expected a tensor on the device"):
            step(images.cuda(), labels)
