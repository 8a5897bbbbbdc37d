"""Which models a TrainStep takes."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor, wait

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from train_loops import Written, batches, check_steps, ordinary_step, pair

import mnist_ext
from mnist_ext.app.training.models import mlp
from mnist_ext.nn import swap


def relu_whose_result_nobody_takes(m, x):
    """In place, PyTorch's forward goes on with it all the same."""
    hidden = m.a(x)
    F.relu_(hidden)
    return m.b(hidden)


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
    lambda m, x: m.stack(m.flatten(x)),  # as PyTorch's own tutorial
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
    r"nothing else, found add": lambda m, x: m.a(x) + x,
    r"model \(Written\): .*following it failed": lambda m, x: m.a(x) if x.sum() > 0 else x,
    r"one after the other.*found b\(a\)": relu_whose_result_nobody_takes,
}


@pytest.mark.cpu_only("the emulator is not for threads of Python")
def test_made_in_several_threads_at_once():
    """torch.fx, which traces the forwards, replaces functions of modules for all threads."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    with ThreadPoolExecutor(4) as pool:
        made = [pool.submit(pair, mlp((20,), "relu")) for _ in range(40)]
    sys.setswitchinterval(interval)
    for each in made:
        each.result()  # raises what making it has raised


class TestFunctions:
    """flatten, view, reshape and relu called in a forward, as functions or methods."""

    @pytest.mark.parametrize("flow", FUNCTIONS)
    def test_taken(self, flow):
        images, labels = batches(3, 16)
        check_steps(Written(flow), images.view(3, 16, 1, 28, 28), labels)

    @pytest.mark.parametrize("message", OTHER_FUNCTIONS)
    def test_refused(self, message):
        flow = OTHER_FUNCTIONS[message]
        model = Written(lambda m, x: m.b(m.a(flow(m, x)) if r"\(x" in message else flow(m, x)))
        with pytest.raises(ValueError, match=message):
            pair(model)

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
            nn.Linear(784, 10),
            nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(784, 5)), nn.Linear(5, 10)),
            nn.Sequential(mnist_ext.nn.Linear(784, 5, activation="relu"), nn.Linear(5, 10)),
            swap(mlp((20,), "relu")),
        ],
        ids=["linear", "nested", "ours", "swapped"],
    )
    def test_taken(self, model):
        check_steps(copy.deepcopy(model), *batches(2, 16))

    def test_without_a_layer(self):
        with pytest.raises(ValueError, match="model: expected at least one Linear, got none"):
            pair(Written(lambda m, x: m.flatten(x)))

    @pytest.mark.parametrize("frozen", ["1.weight", "1.bias", "3.weight", "5.weight"])
    def test_frozen_parameters_stay(self, frozen):
        model = mlp((20, 16), "relu")
        before = copy.deepcopy(model.state_dict())
        model.get_parameter(frozen).requires_grad_(False)
        check_steps(model, *batches(2, 16), sgd={"momentum": 0.9})
        changed = [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])]
        assert changed == [k for k in before if k != frozen]

    def test_frozen_layers_below(self):
        model = mlp((20, 16), "relu")
        for layer in (model[1], model[3]):
            layer.requires_grad_(False)
        check_steps(model, *batches(2, 16))


@pytest.mark.cpu_only("the emulator is not for threads of Python")
def test_other_threads_call_their_models_while_a_forward_is_followed():
    """torch.fx replaces methods of Module meanwhile, for all threads."""
    plain, images = mlp((20,), "relu"), torch.randn(64, 784)
    other = swap(copy.deepcopy(plain))
    expected = other(images)
    assert not torch.equal(expected, plain(images))  # PyTorch's ops would be seen
    calls = []

    def flow(m, x):
        calls.append(pool.submit(other, images))
        wait(calls, timeout=0.1)  # in vain, where it waits for this
        return m.b(m.a(m.flatten(x)))

    with ThreadPoolExecutor(1) as pool:
        pair(Written(flow))
    (call,) = calls
    assert torch.equal(call.result(), expected)
