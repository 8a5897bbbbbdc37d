"""Neighbouring linear layers in one call: functional.mlp, nn.Sequential, and what swap makes."""

import itertools

import pytest
import torch
from torch import nn

import mnist_ext
from mnist_ext import functional
from mnist_ext.nn import swap, unswap

op = torch.ops.mnist_ext
TOGETHER = "MLPBackward"  # the name of the node in the graph
ALONE = "LinearBackward"


def model(*, dropout: bool = False) -> mnist_ext.nn.Sequential:
    layers = [
        nn.Flatten(),
        nn.Linear(12, 8),
        nn.ReLU(),
        nn.Linear(8, 8, bias=False),
        nn.Linear(8, 3),
    ]
    if dropout:
        layers.insert(3, nn.Dropout(0.5))
    return swap(nn.Sequential(*layers))


def called(output: torch.Tensor) -> str:
    return output.grad_fn.name()


def results(function, input: torch.Tensor, parameters) -> list[torch.Tensor]:
    output = function(input)
    torch.manual_seed(1)
    wanted = [t for t in (input, *parameters) if t.requires_grad]
    return [output, *torch.autograd.grad(output, wanted, torch.randn_like(output))]


def one_by_one(sequential: nn.Sequential):
    def forward(input):
        for module in sequential:
            input = module(input)
        return input

    return forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "batch", [1, 5, 64, pytest.param(300, marks=pytest.mark.cpu_only("blocks of rows"))]
)
@pytest.mark.parametrize("features", [(784, 128, 64, 10), (7, 300, 1, 33)], ids=str)
def test_same_bits_as_one_layer_after_the_other(device, features, batch, dtype):
    layers = []
    for inputs, outputs in itertools.pairwise(features):
        layers += [nn.Linear(inputs, outputs, dtype=dtype), nn.ReLU()]
    sequential = swap(nn.Sequential(*layers))
    input = torch.randn(batch, features[0], dtype=dtype, requires_grad=True)
    parameters = list(sequential.parameters())
    threads = torch.get_num_threads()
    expected = results(one_by_one(sequential), input, parameters)
    assert called(expected[0]) == "ReluBackward0"
    for count in (1,) if "cuda" in device else (1, 2, 5):
        torch.set_num_threads(count)
        got = results(sequential, input, parameters)
        torch.set_num_threads(threads)
        assert called(got[0]) == TOGETHER
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_layers_with_other_modules_between_them_are_called_apart():
    sequential = model(dropout=True).eval()
    input = torch.randn(4, 12)
    output = sequential(input)
    assert called(output) == TOGETHER  # the two behind Dropout
    assert output.grad_fn.next_functions[0][0].name() == ALONE
    assert torch.equal(output, one_by_one(sequential)(input))


WATCHERS = {
    "forward hook": lambda m, look: m[1].register_forward_hook(look),
    "forward pre-hook": lambda m, look: m[3].register_forward_pre_hook(look),
    "backward hook": lambda m, look: m[3].register_full_backward_hook(look),
    "backward pre-hook": lambda m, look: m[1].register_full_backward_pre_hook(look),
    "hook of ReLU": lambda m, look: m[2].register_forward_hook(look),
    "hook of Flatten": lambda m, look: m[0].register_forward_hook(look),
    "own forward": lambda m, look: setattr(
        m[3], "forward", lambda input: look() or type(m[3]).forward(m[3], input)
    ),
    "own forward of ReLU": lambda m, look: setattr(
        m[2], "forward", lambda input: look() or input.relu()
    ),
    "own forward of Sequential": lambda m, look: setattr(
        m, "forward", lambda input: look() or one_by_one(m)(input)
    ),
}


@pytest.mark.filterwarnings("ignore:mnist_ext.nn.swap left alone")
@pytest.mark.parametrize("before_the_swap", [False, True])
@pytest.mark.parametrize("watch", WATCHERS)
def test_who_looks_between_layers_is_called(watch, before_the_swap):
    sequential, seen = model(), []
    input = torch.randn(4, 12)
    expected = sequential(input)
    if before_the_swap:
        unswap(sequential)
    WATCHERS[watch](sequential, lambda *_: seen.append(1))
    output = swap(sequential)(input)
    output.sum().backward()
    assert seen == [1]
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize(
    "hook", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_hooks_of_all_modules_see_each_layer(hook):
    register = getattr(torch.nn.modules.module, f"register_module_{hook}")
    sequential, seen = model(), []
    with register(lambda module, *_: seen.append(module)):
        sequential(torch.randn(4, 12, requires_grad=True)).sum().backward()
    assert {sequential[1], sequential[3], sequential[4]} <= set(seen)


def test_frozen_model(recorded):
    calls = recorded("_mlp")
    input = torch.randn(4, 12)
    frozen = model().requires_grad_(False)
    frozen(input)
    assert len(calls) == 1
    output = frozen(input.requires_grad_())
    assert called(output) == ALONE  # there is one gradient to be made, not all
    output.sum().backward()
    assert input.grad is not None


def test_input_without_gradient_gets_none(recorded):
    sequential, calls = model(), recorded("_mlp_backward")
    for needs in (False, True):
        input = torch.randn(4, 12, requires_grad=needs)
        sequential(input).sum().backward()
        assert (input.grad is not None) == needs
        assert calls[-1][-2] == needs


def test_swap_replaces_the_class_of_a_sequential_with_something_to_fuse():
    class Own(nn.Sequential):
        pass

    nested = nn.Sequential(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        nn.Sequential(nn.Linear(4, 4), nn.ReLU()),
        nn.Sequential(nn.Linear(4, 4), nn.Tanh()),
        nn.Sequential(nn.ReLU(), nn.ReLU()),
        Own(nn.Linear(4, 4), nn.Linear(4, 4)),
    )
    children = list(nested)
    keys = list(nested.state_dict())
    for _ in range(2):
        assert swap(nested) is nested
        assert list(nested) == children
        ours = [type(m) is mnist_ext.nn.Sequential for m in nested]
        assert ours == [True, True, False, False, False]
        assert type(nested) is nn.Sequential
        assert list(nested.state_dict()) == keys


def test_flatten_between_and_with_its_own_dims():
    sequential = nn.Sequential(
        nn.Flatten(0, 1), nn.Linear(5, 4), nn.ReLU(), nn.Flatten(start_dim=0), nn.Linear(24, 3)
    )
    input = torch.randn(2, 3, 5)
    expected = sequential(input)
    torch.testing.assert_close(swap(sequential)(input), expected)
    assert type(sequential) is mnist_ext.nn.Sequential


def test_a_layer_used_twice_gets_both_gradients():
    layer = nn.Linear(6, 6)
    sequential = swap(nn.Sequential(layer, nn.ReLU(), layer))
    input = torch.randn(3, 6)
    output = sequential(input)
    assert called(output) == TOGETHER
    got = results(sequential, input, layer.parameters())
    expected = results(one_by_one(sequential), input, layer.parameters())
    torch.testing.assert_close(got, expected)


def test_empty_sequential():
    input = torch.randn(2)
    assert mnist_ext.nn.Sequential()(input) is input


def test_tracing_by_torch_fx_sees_each_module():
    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return type(module) is mnist_ext.nn.Linear or super().is_leaf_module(module, name)

    nodes = Tracer().trace(model()).nodes
    assert [node.target for node in nodes if node.op == "call_module"] == ["0", "1", "2", "3", "4"]


def test_a_weight_that_is_no_parameter():
    sequential = model()
    weight = sequential[3].weight.detach() * 2
    del sequential[3].weight
    sequential[3].weight = weight
    input = torch.randn(4, 12)
    assert torch.equal(sequential(input), one_by_one(sequential)(input))


WEIGHTS = [torch.randn(4, 3), torch.randn(2, 4)]
BIASES = [torch.randn(4), torch.randn(2)]


@pytest.mark.parametrize(
    ("input", "weights", "biases", "message"),
    [
        (torch.randn(5, 9), WEIGHTS, BIASES, r"linear.*\[5, 9\]"),
        (torch.randn(5, 3), [WEIGHTS[0], WEIGHTS[0]], BIASES, r"linear.*\[5, 4\]"),
        (torch.randn(5, 3), WEIGHTS, [BIASES[0], BIASES[0]], r"linear: bias.*got \[4\]"),
        (torch.randn(5, 3).double(), WEIGHTS, BIASES, "linear.*float64"),
        (torch.tensor(1.0), WEIGHTS, BIASES, "linear"),
    ],
)
def test_wrong_calls_name_the_layers_shapes(input, weights, biases, message):
    layers = [
        (weight.clone().requires_grad_(), bias.clone().requires_grad_(), "relu")
        for weight, bias in zip(weights, biases, strict=True)
    ]
    with pytest.raises(RuntimeError, match=message):
        functional.mlp(input, layers)


INPUT = torch.randn(5, 3)
LAYERS = [3, 1]
OUTPUT, HIDDEN = op.mlp(INPUT, WEIGHTS, BIASES, LAYERS, True)


def test_hidden_values_are_kept_where_the_backward_reads_them(device):
    for keep_hidden, numbers in ((True, HIDDEN.numel()), (False, 0)):
        output, hidden = op.mlp(INPUT, WEIGHTS, BIASES, LAYERS, keep_hidden)
        torch.testing.assert_close(output, OUTPUT)
        assert hidden.shape == (numbers,)


def forward(input=INPUT, weights=WEIGHTS, biases=BIASES, layers=LAYERS):
    op.mlp(input, weights, biases, layers, True)


def backward(grad_output=OUTPUT, input=INPUT, hidden=HIDDEN, output=None, layers=LAYERS):
    op.mlp_backward(grad_output, input, hidden, output, WEIGHTS, BIASES, layers, True)


@pytest.mark.parametrize(
    ("function", "changed", "message"),
    [
        (forward, {"layers": []}, "layers"),
        (forward, {"layers": [3]}, "weights: expected one for each of 1"),
        (forward, {"layers": [3, 1, 0]}, "weights: expected one for each of 3 layers, got 2"),
        (forward, {"layers": [3, 2]}, "biases: expected 1 for these layers, got 2"),
        (forward, {"biases": BIASES[:1]}, "biases: expected 2 for these layers, got 1"),
        (backward, {"grad_output": torch.randn(5, 3)}, r"grad_output: .*got \[5, 3\]"),
        (backward, {"grad_output": torch.tensor(1.0)}, r"grad_output: .*got \[\]"),
        (backward, {"grad_output": torch.randn(4, 2)}, r"grad_output: .*got \[4, 2\]"),
        (backward, {"grad_output": OUTPUT.double()}, "grad_output: expected the dtype of input"),
        (backward, {"hidden": HIDDEN[:-1]}, "hidden: expected the 20 numbers"),
        (backward, {"hidden": torch.randn(40)[::2]}, "hidden"),
        (backward, {"hidden": HIDDEN.double()}, "hidden: expected the dtype"),
        (backward, {"output": OUTPUT}, "output: expected it where the last layer has a ReLU"),
        (backward, {"layers": [3, 3]}, "output: expected it where the last layer has a ReLU"),
        (backward, {"layers": [3, 3], "output": OUTPUT[:3]}, r"output: .*got \[3, 2\]"),
        (backward, {"layers": [1]}, "weights: expected one for each of 1"),
    ],
)
def test_ops_check_their_arguments(function, changed, message):
    with pytest.raises(RuntimeError, match=message):
        function(**changed)
    function()


@pytest.mark.parametrize(
    "changed",
    [
        {"input": INPUT.bfloat16()},
        {"input": torch.tensor(1.0)},
        {"input": torch.randn(5, 4)},
        {"input": INPUT.to_sparse()},
        {"biases": [BIASES[0], torch.randn(3)]},
        {"biases": [BIASES[0], torch.randn(1)]},
        {"biases": [BIASES[0], torch.randn(1, 2)]},
        {"weights": [WEIGHTS[0], torch.randn(2, 5)]},
        {"weights": [WEIGHTS[0], torch.randn(4)]},
        {"weights": [w.double() for w in WEIGHTS]},
        {"biases": [b.double() for b in BIASES]},
    ],
)
def test_what_the_op_does_not_take_it_leaves_alone(changed):
    arguments = {"input": INPUT, "weights": WEIGHTS, "biases": BIASES, **changed}
    assert op.mlp(*arguments.values(), LAYERS, True) == (None, None)
