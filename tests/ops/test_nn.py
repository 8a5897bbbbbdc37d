"""The modules, and swap."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import mnist_ext
from mnist_ext.nn import swap, unswap

pytestmark = pytest.mark.filterwarnings("error")


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.Linear(8, 3)
    )


def test_linear_is_torchs_linear():
    ours = mnist_ext.nn.Linear(5, 3, activation="relu", dtype=torch.float64)
    torchs = nn.Linear(5, 3, dtype=torch.float64)
    assert isinstance(ours, nn.Linear)
    torchs.load_state_dict(ours.state_dict())
    ours.load_state_dict(torchs.state_dict())
    input = torch.randn(4, 5, dtype=torch.float64)
    torch.testing.assert_close(ours(input), torch.relu(torchs(input)))
    assert "activation='relu'" in repr(ours)


def test_class_weights_may_become_a_parameter():
    input, target = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 1, 0])
    losses = []
    for criterion in (nn.CrossEntropyLoss(), mnist_ext.nn.CrossEntropyLoss()):
        weight = torch.tensor([0.5, 1.0, 2.0, 3.0])
        criterion.weight = nn.Parameter(weight, requires_grad=False)
        losses.append(criterion(input, target))
    torch.testing.assert_close(*losses)


def test_swap_reaches_nested_modules_and_losses():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.ModuleDict({"a": mlp(), "b": nn.Sequential(mlp())})
            self.head = nn.Linear(3, 2)
            self.loss = nn.CrossEntropyLoss(label_smoothing=0.1)

    net = swap(Net())
    linears = [m for m in net.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 7
    assert all(type(m) is mnist_ext.nn.Linear for m in linears)
    assert type(net.loss) is mnist_ext.nn.CrossEntropyLoss
    assert net.loss.label_smoothing == 0.1
    for bare in (nn.Linear(3, 2), nn.CrossEntropyLoss()):
        assert type(swap(bare)).__module__ == "mnist_ext.nn"


def test_swap_leaves_what_it_does_not_know_alone_and_says_so():
    class Scaled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = nn.Sequential(
        Scaled(3, 3), nn.ReLU(), nn.LazyLinear(2), nn.Sequential(weight_norm(nn.Linear(2, 2)))
    )
    with pytest.warns(UserWarning, match="left alone") as warned:
        swap(model)
    assert [type(m) for m in model[:3]] == [Scaled, nn.ReLU, nn.LazyLinear]
    assert not isinstance(model[3][0], mnist_ext.nn.Linear)
    assert [str(w.message) for w in warned] == [
        "mnist_ext.nn.swap left alone: 0 (Scaled: a subclass), "
        "2 (LazyLinear: lazy: swap after the first batch), "
        "3.0 (ParametrizedLinear: parametrized: swap first)"
    ]
    assert warned[0].filename == __file__

    model(torch.randn(1, 3))
    with pytest.warns(UserWarning, match="0 \\(Scaled"):
        swap(model)
    assert type(model[2]) is mnist_ext.nn.Linear


def test_linear_takes_device_and_dtype_by_position():
    assert mnist_ext.nn.Linear(3, 4, True, "cpu", torch.float64).weight.dtype == torch.float64


def test_unswap_is_the_inverse_of_swap():
    model = nn.ModuleDict({"body": mlp(), "loss": nn.CrossEntropyLoss(label_smoothing=0.1)})
    classes = [type(m) for m in model.modules()]
    attributes = [dict(vars(m)) for m in model.modules()]
    parameters = list(model.parameters())
    assert swap(model) is model
    assert [type(m) for m in model.modules()] != classes
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert unswap(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert [vars(m) for m in model.modules()] == attributes
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_unswap_leaves_pytorchs_modules_alone():
    model = mlp()
    classes = [type(m) for m in model.modules()]
    assert [type(m) for m in unswap(model).modules()] == classes


def test_a_warning_names_three_layers_and_counts_the_others():
    class Own(nn.Linear):
        pass

    with pytest.warns(UserWarning, match="left alone") as warned:
        swap(nn.Sequential(*[Own(2, 2) for _ in range(5)]))
    reason = "(Own: a subclass)"
    assert str(warned[0].message) == (
        f"mnist_ext.nn.swap left alone: 0 {reason}, 1 {reason}, 2 {reason} and 2 more"
    )


def test_swap_is_silent_on_what_nobody_calls():
    """A MultiheadAttention reads the parameters of its out_proj, a subclass of Linear."""
    layer = swap(nn.TransformerEncoderLayer(8, 2, 16))
    assert type(layer.linear1) is mnist_ext.nn.Linear
    assert type(layer.self_attn.out_proj) is not mnist_ext.nn.Linear
