"""A swapped model behaves as the model it came from, whatever PyTorch does with it."""

import copy
import io
import pickle
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import clip_grad_norm_, parametrizations, parametrize, prune

import mnist_ext
from mnist_ext.nn import swap


class Model(nn.Module):
    """Layers of several kinds, and its own loss."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5, bias=False))
        self.head = nn.Linear(5, 3)
        self.loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]), label_smoothing=0.1)

    def forward(self, input, target):
        place = self.head.weight.device
        return self.loss(self.head(torch.tanh(self.body(input.to(place)))), target.to(place))


torch.manual_seed(0)
INPUT, TARGET = torch.randn(8, 6), torch.randint(0, 3, (8,))


def pair():
    """Make a model of PyTorch's layers and the same one swapped."""
    torch.manual_seed(0)
    torchs = Model()
    return torchs, swap(copy.deepcopy(torchs))


def step(model, input=INPUT, target=TARGET):
    """Return the loss and all gradients."""
    model.zero_grad()
    loss = model(input, target)
    loss.backward()
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    return loss.detach(), grads


def save_and_load(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "clone",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        save_and_load,
        lambda model: copy.deepcopy(model).share_memory(),
    ],
)
def test_copies(clone):
    _, model = pair()
    other = clone(model)
    assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
    assert all(a is not b for a, b in zip(other.parameters(), model.parameters(), strict=True))
    torch.testing.assert_close(step(other), step(model), rtol=0, atol=0)


def test_state_dict_both_ways():
    torchs, ours = pair()
    assert list(torchs.state_dict()) == list(ours.state_dict())
    with torch.no_grad():
        for parameter in torchs.parameters():
            parameter.mul_(2)
    ours.load_state_dict(torchs.state_dict())
    torch.testing.assert_close(step(torchs), step(ours))
    torchs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("name", ["head", "body.0"])
@pytest.mark.parametrize(
    "change",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
    ],
)
def test_weights_computed_after_the_swap(change, name):
    models = pair()
    for model in models:
        torch.manual_seed(1)
        change(model.get_submodule(name))
    torch.testing.assert_close(*map(step, models))
    for layer in [model.get_submodule(name) for model in models]:
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight")
    assert type(models[1].get_submodule(name)) is mnist_ext.nn.Linear


@pytest.mark.parametrize("name", ["head", "body.0"])
def test_hooks(name):
    """Forward, pre-forward and backward hooks see the same tensors and may replace them."""
    results = []
    for model in pair():
        seen, layer = [], model.get_submodule(name)
        layer.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
        layer.register_forward_hook(lambda m, args, output, s=seen: s.append(output) or -output)
        layer.register_full_backward_hook(
            lambda m, gi, go, s=seen: s.extend(t for t in (*gi, *go) if t is not None)
        )
        layer.weight.register_hook(lambda grad: grad * 3)
        layer.bias.register_post_accumulate_grad_hook(lambda p, s=seen: s.append(p.grad))
        results.append((step(model), [t.detach().clone() for t in seen]))
    torch.testing.assert_close(*results)
    assert len(results[0][1]) >= 3


@pytest.mark.parametrize("frozen", ["head.weight", "head.bias", "body.0.weight", "body.2.weight"])
def test_requires_grad_can_be_switched(frozen):
    models = pair()
    for model in models:
        model.get_parameter(frozen).requires_grad_(False)
    results = [step(model) for model in models]
    torch.testing.assert_close(*results)
    assert results[1][1][frozen] is None
    for model in models:
        model.requires_grad_(True)
    torch.testing.assert_close(*map(step, models))


def test_gradients_are_accumulated_and_clipped():
    models = pair()
    norms = []
    for model in models:
        for rows in torch.arange(8).split(2):
            (model(INPUT[rows], TARGET[rows]) / 4).backward()
        norms.append(clip_grad_norm_(model.parameters(), 0.01))
        assert clip_grad_norm_(model.parameters(), 1.0) < 0.0101
    torch.testing.assert_close(*norms)
    for torchs, ours in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(ours.grad, torchs.grad)


def test_functional_call_and_ensembles():
    """Vmap over stacked parameters, the torch.func way of running an ensemble."""
    results = []
    for model in pair():
        parameters = {n: torch.stack([p, p * 2]) for n, p in model.named_parameters()}

        def loss(parameters, model=model):
            return torch.func.functional_call(model, parameters, (INPUT, TARGET))

        results.append(
            (
                torch.func.functional_call(
                    model, {n: p[1] for n, p in parameters.items()}, (INPUT, TARGET)
                ),
                torch.func.vmap(torch.func.grad(loss))(parameters),
            )
        )
    torch.testing.assert_close(*results)


@pytest.mark.usefixtures("every_kernel")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_to_dtype(dtype):
    results = [step(model.to(dtype), INPUT.to(dtype)) for model in pair()]
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.RMSprop])
def test_optimizers_made_before_the_swap(optimizer):
    losses = []
    for convert in (nn.Identity(), swap):
        model, _ = pair()
        made = optimizer(model.parameters(), lr=0.02)
        convert(model)
        history = []
        for _ in range(20):
            history.append(step(model)[0])
            made.step()
        losses.append(torch.stack(history))
    assert losses[0][-1] < 0.9 * losses[0][0]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


EVEN = torch.tensor([0, 1, 2, 1, 1, 2, 1, 0])  # both halves have the same total weight


def distributed_gradients(rank, folder):
    """In a process of a group of two: keep the gradients of its half of the batch."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2
    )
    half, (_, model) = slice(4 * rank, 4 * rank + 4), pair()
    _, grads = step(nn.parallel.DistributedDataParallel(model), INPUT[half], EVEN[half])
    torch.save(grads, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.cpu_only("processes that the emulator is not set up in")
def test_distributed_data_parallel(tmp_path):
    """The same bits in both processes, and those of the whole batch in one within a rounding."""
    torch.multiprocessing.spawn(distributed_gradients, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    _, expected = step(pair()[1], INPUT, EVEN)
    first = {name.removeprefix("module."): grad for name, grad in first.items()}
    torch.testing.assert_close(first, expected, rtol=1e-6, atol=1e-8)


def test_meta_device_and_to_empty():
    with torch.device("meta"):
        model = swap(Model())
    model = model.to_empty(device="cpu")
    torchs, _ = pair()
    model.load_state_dict(torchs.state_dict())
    torch.testing.assert_close(step(model), step(torchs))


def _activations_replaced_by_type(model, input):
    for name, child in list(model.named_children()):
        if isinstance(child, nn.ReLU):
            setattr(model, name, nn.LeakyReLU(0.5))
    return model(input)


def _hidden_layer_replaced(model, input):
    torch.manual_seed(1)
    model[2] = nn.Linear(6, 6)
    return model(input)


def _adapter_around_a_layer(model, input):
    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, input):
            return self.base(input) + input.sum(-1, keepdim=True)

    model[0] = Adapter(model[0])
    return model(input)


def _layer_copied_by_its_attributes(model, input):
    old, new = model[0], nn.Linear(5, 6)
    new.weight, new.bias = old.weight, old.bias
    return new(input)


def _forward_of_the_class_patched(model, input):
    forward = nn.ReLU.forward
    with mock.patch.object(nn.ReLU, "forward", lambda self, input: forward(self, input) + 1):
        return model(input)


def _linear_of_the_class_patched(model, input):
    forward = nn.Linear.forward
    with mock.patch.object(nn.Linear, "forward", lambda self, input: forward(self, input) * 2):
        return model(input) + model[0](input).sum()


def _functions_patched(model, input):
    with (
        mock.patch.object(F, "linear", wraps=F.linear) as linear,
        mock.patch.object(F, "cross_entropy", wraps=F.cross_entropy) as cross_entropy,
    ):
        swap(nn.CrossEntropyLoss())(model(input), torch.tensor([0, 1, 2, 0]))
    return torch.tensor([linear.call_count, cross_entropy.call_count])


def _call_of_all_modules_patched(model, input):
    call, names = nn.Module.__call__, []

    def noted(self, *args, **kwargs):
        names.append(type(self).__name__)
        return call(self, *args, **kwargs)

    with mock.patch.object(nn.Module, "__call__", noted):
        model(input)
    return torch.tensor([names.count(name) for name in ("Linear", "ReLU")])


def _mode_between_the_layers(model, input):
    class Names(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            names.append(function.__name__)
            return function(*args, **(kwargs or {}))

    names = []
    with Names():
        model(input)
    return torch.tensor([names.count(name) for name in ("linear", "relu")])


@pytest.mark.parametrize(
    "use",
    [
        lambda model, input: model[2:](model[:2](input)),
        lambda model, input: model.append(nn.Tanh())(input),
        lambda model, input: model[0](input),
        lambda model, input: model.__setitem__(1, nn.Tanh()) or model(input),
        _activations_replaced_by_type,
        lambda model, input: model.pop(3) and model(input),
        _hidden_layer_replaced,
        _adapter_around_a_layer,
        _layer_copied_by_its_attributes,
        lambda model, input: model(input) + model[0](input).sum(),
        _forward_of_the_class_patched,
        _linear_of_the_class_patched,
        _functions_patched,
        _call_of_all_modules_patched,
        _mode_between_the_layers,
    ],
)
def test_a_swapped_model_is_what_it_was_to_whoever_uses_it(use):
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    input = torch.randn(4, 5)
    expected = use(copy.deepcopy(model), input)
    torch.testing.assert_close(use(mnist_ext.nn.swap(copy.deepcopy(model)), input), expected)


def test_a_layer_compiled_by_itself_is_called():
    model = mnist_ext.nn.swap(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)))
    graphs = []
    model[2].compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    model(torch.randn(4, 5))
    assert len(graphs) == 1


def test_whole_models_pickled_by_0_1_0():
    """There swap moved the ReLU into the Linear, as an attribute, and left an Identity."""
    model = mnist_ext.nn.Sequential(nn.Linear(5, 6), nn.Identity(), nn.Linear(6, 3))
    mnist_ext.nn.swap(model)
    for layer, activation in ((model[0], "relu"), (model[2], "none")):
        layer.__dict__["activation"] = activation
    loaded = pickle.loads(pickle.dumps(model))
    input = torch.randn(4, 5)
    expected = model[2](torch.relu(F.linear(input, *model[0].parameters())))
    torch.testing.assert_close(loaded(input), expected)
    with pytest.warns(UserWarning, match=r"unswap left alone: 0 \(Linear with activation='relu'"):
        mnist_ext.nn.unswap(loaded)
    torch.testing.assert_close(loaded(input), expected)
    assert "activation" not in vars(loaded[2])
