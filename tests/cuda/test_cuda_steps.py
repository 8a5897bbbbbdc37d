"""TrainStep on CUDA: its kernels one by one, and as a CUDA graph; on the emulator and on a GPU.

That the numbers are the ordinary loop's is shown by the tests of TrainStep, which run on these
kernels too. The truth here are the same kernels launched one by one: the bits have to be the same.
"""

import contextlib
import copy
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import emulated
import pytest
import torch
from torch import nn
from train_loops import assert_same_bits, assert_same_state, pair, twins

from mnist_ext import optim, train_step
from mnist_ext.app.training.models import mlp


def small(hidden=(12, 9), features=20, classes=5, activation="relu"):
    torch.manual_seed(0)
    return mlp(hidden, activation, features, classes)


def without_graphs(really=True):
    """Let a TrainStep launch kernels alone."""
    if not really:
        return contextlib.nullcontext()
    return mock.patch.object(train_step, "_REPLAYS_GRAPHS", False)


def launches_of(call):
    before = emulated.launches()
    call()
    return emulated.launches() - before


def graphs_started(device, call):
    """Return what call returns, and how many graphs it has started."""
    if device == "cpu":
        before = emulated.graph_launches()
        return call(), emulated.graph_launches() - before
    with torch.profiler.profile() as profile:
        result = call()
        torch.cuda.synchronize()
    return result, sum(event.name == "cudaGraphLaunch" for event in profile.events())


def by_launches_and_as_graph(device, model, use, **options):
    """Have two equal TrainSteps used; return what came of it, and how many graphs started."""
    steps, results = [], []
    for as_graph in (False, True):
        with without_graphs(not as_graph):
            steps.append(pair(copy.deepcopy(model).to(device), **options)[0])
            result, graphs = graphs_started(device, lambda: use(steps[-1]))
        results.append(result)
    assert_same_state(*steps)
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    return results[1], graphs


def data(device, count=40, features=20, classes=5):
    return torch.randn(count, features).to(device), torch.randint(0, classes, (count,)).to(device)


class TestManyStepsOfACall:
    @pytest.mark.parametrize("permuted", [False, True])
    @pytest.mark.parametrize(
        ("model", "dtype", "shape", "size", "options"),
        [
            (small(), torch.float32, (40, 20), 6, {}),
            (small(), torch.float32, (40, 20), 6, {"sgd": {"momentum": 0.9}}),
            (small().double(), torch.float64, (40, 20), 6, {"sgd": {"momentum": 0.9}}),
            (small(), torch.uint8, (40, 20), 6, {"normalize": (0.1, 0.3)}),
            # A loss of one block, and of many.
            (nn.Linear(3, 5), torch.float32, (7, 3), 2, {}),
            (nn.Linear(3, 5), torch.float32, (3301, 3), 1100, {}),
        ],
    )
    def test_all_whole_batches(self, device, model, dtype, shape, size, options, permuted):
        """Each with a learning rate of its own; the first one and the last, smaller one apart."""
        images = (torch.rand(shape) * 9).to(dtype).to(device)
        labels = torch.randint(0, 5, shape[:1], dtype=torch.int32).to(device)
        order = torch.randperm(len(images)).to(device) if permuted else None
        rates = [0.01 / (i + 1) for i in range(len(images) // size + 1)]

        def use(step):
            return [step._run(images, labels, order, size, rates) for _ in range(2)]

        losses, graphs = by_launches_and_as_graph(device, model, use, **options)
        assert [len(of_call) for of_call in losses] == [len(rates)] * 2
        assert graphs == 2 * (len(images) // size) - 1

    @pytest.mark.parametrize("groups", [16, 17])
    def test_many_rates(self, device, groups):
        """More than a launch takes. And of more groups than a graph takes: then there is none."""
        images, labels = data(device, 30, 3)
        rates = [0.3 / (1 + i % 37) for i in range(30 * groups)]

        def use(step):
            (group,) = step._optimizer.param_groups
            params = group["params"][:groups]
            step._optimizer.param_groups = [{**group, "params": [param]} for param in params]
            step.refresh()
            return [step._run(images, labels, None, 1, rates)]

        model = mlp((2,) * 8, "none", 3, 5)
        assert by_launches_and_as_graph(device, model, use)[1] == (29 if groups == 16 else 0)


class TestOneStepACall:
    @pytest.mark.parametrize("sgd", [{}, {"momentum": 0.9, "nesterov": True}], ids=str)
    def test_images_and_labels_of_their_own(self, device, sgd):
        batches = [data(device, 6) for _ in range(5)]

        def use(step):
            losses = []
            for images, labels in batches:
                losses.append(step(images, labels))
                step._optimizer.param_groups[0]["lr"] *= 0.8
            return losses

        losses, graphs = by_launches_and_as_graph(device, small(), use, sgd=sgd)
        assert len({loss.item() for loss in losses}) == 5
        assert graphs == 4

    @pytest.mark.parametrize(("sizes", "graphs"), [([4, 4, 4, 3] * 3, 8), ([4, 4, 0, 4], 2)])
    def test_another_batch_between(self, device, sizes, graphs):
        """One that is smaller, or empty, does not displace the graph."""
        batches = [data(device, size) for size in sizes]

        def use(step):
            return [step(*batch) for batch in batches]

        loss = {"reduction": "sum"}
        assert by_launches_and_as_graph(device, small(), use, loss=loss)[1] == graphs


def of_group(**options):
    return lambda step: step._optimizer.param_groups[0].update(options)


def of_loss(name, value):
    return lambda step: setattr(step._criterion, name, value)


def class_weight(step):
    step._criterion.weight = torch.arange(5.0, device=step._model[1].weight.device)


def frozen(step):
    step._model[1].weight.requires_grad_(False)


def other_memory_of_a_parameter(step):
    weight = step._model[1].weight
    step.kept = weight.data  # so that its address is not taken again
    weight.data = weight.data.clone()


def other_momentum_buffers(step):
    step.kept = step._optimizer.state_dict()
    step._optimizer.load_state_dict(copy.deepcopy(step.kept))


def no_momentum_buffers(step):
    step.kept = dict(step._optimizer.state)
    step._optimizer.state.clear()


@pytest.mark.parametrize(
    "change",
    [
        of_group(weight_decay=0.3),
        of_group(momentum=0.5),
        of_group(dampening=0.5),
        of_group(nesterov=True),
        of_group(maximize=True),
        of_loss("label_smoothing", 0.3),
        of_loss("ignore_index", 2),
        of_loss("reduction", "sum"),
        class_weight,
        frozen,
        other_memory_of_a_parameter,
        other_momentum_buffers,
        no_momentum_buffers,
    ],
)
def test_what_changes_between_calls_is_obeyed(device, change):
    batches = [data(device, 6) for _ in range(6)]

    def use(step):
        losses = [step(*batch) for batch in batches[:3]]
        change(step)
        return losses + [step(*batch) for batch in batches[3:]]

    _, graphs = by_launches_and_as_graph(device, small(), use, sgd={"momentum": 0.9})
    assert graphs == 2 + 2  # another graph after one step without any


def test_new_momentum_buffers_where_the_old_ones_were(device, monkeypatch):
    """Nothing that is fixed has changed, but the step does not read them."""
    batches = [data(device, 6) for _ in range(6)]

    def use(step):
        losses = [step(*batch) for batch in batches[:3]]
        states = step._optimizer.state
        old = {param: state["momentum_buffer"] for param, state in states.items()}
        states.clear()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty_like", lambda param: old[param].fill_(torch.nan))
            losses.append(step(*batches[3]))
        return losses + [step(*batch) for batch in batches[4:]]

    _, graphs = by_launches_and_as_graph(device, small(), use, sgd={"momentum": 0.9})
    assert graphs == 2 + 2


@pytest.mark.parametrize("refuse", ["refuse_graphs", "fail_captured_launches"])
def test_a_driver_that_makes_no_graphs(emulator, refuse):
    images, labels = data("cpu")
    getattr(emulated, refuse)()

    def use(step):
        return [step._run(images, labels, None, 6, [0.1] * 7) for _ in range(2)]

    _, graphs = by_launches_and_as_graph("cpu", small(), use)
    assert graphs == 0


def test_a_capture_of_the_callers_own_takes_the_kernels(emulator):
    images, labels = data("cpu", 6)
    step, _ = pair(small())
    kernels = launches_of(lambda: step(images, labels))
    step(images, labels)
    before = copy.deepcopy(step._model)

    def captured():
        return emulated.captured(lambda: [step(images, labels) for _ in range(2)])

    assert graphs_started("cpu", captured) == (2 * kernels, 0)
    assert_same_bits(step._model, before)


@pytest.mark.parametrize("hidden", [(), (33,), (33, 9)])
def test_results_do_not_depend_on_the_order_of_threads(emulator, hidden):
    """A barrier that is missing shows here; several steps to a launch, for those between steps."""
    images = torch.randint(0, 256, (40, 16), dtype=torch.uint8)
    labels = torch.randint(0, 5, (40,))
    order = torch.arange(39, -1, -1)
    results = []
    for seed in (1, 2, 3, 4):
        emulated.set_seed(seed)
        step, _ = pair(small(hidden, 16), sgd={"momentum": 0.9}, normalize=(0.1, 0.3))
        losses = step._run(images, labels, order, 9, [0.05] * 5)
        results.append([losses, *(p.detach() for p in step._model.parameters())])
    for tensors in results[1:]:
        torch.testing.assert_close(tensors, results[0], rtol=0, atol=0)


def test_kernels_of_the_readmes_model(emulator):
    """11, and 2 that add up the splits of K."""
    images = torch.randint(0, 256, (64, 28, 28), dtype=torch.uint8)
    labels = torch.randint(0, 10, (64,))
    step, _ = pair(mlp((128, 64), "relu"), sgd={"momentum": 0.9}, normalize=(0.13, 0.3))
    assert launches_of(lambda: step(images, labels)) == 13


@pytest.mark.parametrize("bad", [5, -1, 2**40])
def test_a_bad_label_ends_the_kernel(emulator, bad, capfd):
    images, labels = data("cpu", 12)
    labels[7] = bad
    step, _ = pair(small())
    before = copy.deepcopy(step._model)
    with pytest.raises(IndexError):
        step(images, labels)
    assert f"expected indices in [0, 5), got {bad} at position 7" in capfd.readouterr().out
    assert_same_bits(step._model, before)


def test_a_bad_index_ends_the_kernel(emulator, capfd):
    images, labels = data("cpu", 12)
    step, _ = pair(small())
    with pytest.raises(IndexError):
        step._run(images, labels, torch.tensor([0, 12]), 2, [0.1])
    assert "order: expected indices in [0, 12), got 12 at position 1" in capfd.readouterr().out


def test_a_momentum_buffer_at_any_address(device):
    """Parameter and gradient may be aligned to 16 bytes where their buffer is not."""
    param = torch.ones(40, device=device, requires_grad=True)
    param.grad = torch.full_like(param, 2)
    sgd = optim.SGD([param], lr=0.5, momentum=0.5)
    sgd.state[param]["momentum_buffer"] = torch.ones(41, device=device)[1:]
    sgd.step()
    assert (param == 1 - 0.5 * 2.5).all()


class TestLifetime:
    def test_it_goes_with_its_train_step(self, device):
        images, labels = data(device, 6)
        step, _ = pair(small().to(device))
        step(images, labels)
        number = step._handle.number
        del step
        gc.collect()
        with pytest.raises(ValueError, match=f"step: expected a handle .*, got {number}"):
            train_step._free_train_step(torch.empty(0, device=device), number)


@pytest.mark.gpu
class TestOnGpu:
    def test_the_host_never_waits(self):
        batches = [data("cuda", 64, 784, 10) for _ in range(5)]
        step, _ = pair(mlp((128, 64), "relu").cuda(), sgd={"momentum": 0.9})
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in batches:
                step(*batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_the_readmes_model(self):
        """At its real size, against launches."""
        images, labels = data("cuda", 64 * 20 + 7, 784, 10)

        def use(step):
            return [step._run(images, labels, None, 64, [0.1 / (i + 1) for i in range(21)])]

        model = mlp((128, 64), "relu")
        by_launches_and_as_graph("cuda", model, use, sgd={"momentum": 0.9})

    def test_a_graph_of_the_callers_own(self):
        """Captured when there is one of TrainStep's, and replayed when that is gone."""
        batches = [data("cuda", 6) for _ in range(4)]
        model = small().cuda()
        step, other = twins(model, sgd={"momentum": 0.9})
        model = step._model
        x, y = (t.clone() for t in batches[0])
        for _ in range(3):
            step(x, y)
            other(x, y)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = step(x, y)
        del step
        gc.collect()
        for images, labels in batches:
            x.copy_(images)
            y.copy_(labels)
            graph.replay()
            assert torch.equal(loss, other(images, labels))
        assert_same_bits(model, other._model)

    def test_streams(self):
        """Calls from one stream and then another, which waits for it."""
        batches = [data("cuda", 6) for _ in range(9)]
        streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]

        def use(step):
            losses = []
            for i, batch in enumerate(batches):
                stream = streams[i // 3]
                stream.wait_stream(streams[(i - 1) // 3])
                with torch.cuda.stream(stream):
                    losses.append(step(*batch))
            torch.cuda.synchronize()
            return losses

        by_launches_and_as_graph("cuda", small(), use)

    def test_beside_a_capture_of_another_thread(self):
        """Theirs goes on, and ours is made."""
        images, labels = data("cuda", 6)
        step, _ = pair(small().cuda())
        x = torch.ones(4, device="cuda")
        begun, made = threading.Event(), threading.Event()

        def capture():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = x + 1
                begun.set()
                made.wait(60)
                y += 1
            graph.replay()
            return y

        step(images, labels)
        torch.cuda.synchronize()
        with ThreadPoolExecutor(1) as pool:
            captured = pool.submit(capture)
            begun.wait(60)
            try:
                losses = [step(images, labels) for _ in range(3)]
            finally:
                made.set()
            assert (captured.result() == 3).all()
        assert losses[2] < losses[0]

    def test_memory_goes_with_the_train_step(self):
        images, labels = data("cuda", 512, 784, 10)
        model = mlp((128, 64), "relu").cuda()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        step, _ = pair(model)
        for _ in range(3):
            step(images, labels)
        assert torch.cuda.memory_allocated() > before
        del step, _
        gc.collect()
        assert torch.cuda.memory_allocated() == before

    def test_a_large_step_holds_no_memory(self):
        features = (65 << 20) // 4  # an image of more than 64 MiB
        images, labels = torch.ones(1, features), torch.zeros(1).long()
        model = nn.Linear(features, 1).cuda()
        model.weight.requires_grad_(False)
        step, _ = pair(model)
        images, labels = images.cuda(), labels.cuda()
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            step(images, labels)
        assert torch.cuda.memory_allocated() == before
