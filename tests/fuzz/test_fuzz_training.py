"""Random optimizers, swapped models and TrainSteps against PyTorch's ordinary loop.

Layers are small, and in float64, where rounding hides nothing: kernels are for test_fuzz_ops.py.
"""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import tensors as random_tensors
import torch
from hypothesis import strategies as st
from judge import is_same
from torch import nn

import mnist_ext
from mnist_ext import _C, TrainStep
from mnist_ext.nn import Linear, swap, unswap

pytestmark = [pytest.mark.cpu_only("the CPU's"), pytest.mark.filterwarnings("ignore")]

options = st.builds(
    lambda lr, momentum, dampening, weight_decay, nesterov, maximize: {
        "lr": lr,
        "momentum": momentum,
        "dampening": 0.0 if nesterov and momentum else dampening,
        "weight_decay": weight_decay,
        "nesterov": bool(nesterov and momentum),
        "maximize": maximize,
    },
    st.sampled_from([0.1, 0.0, 1e-3, 3.0]),
    st.sampled_from([0.0, 0.9, 0.5, 1.0]),
    st.sampled_from([0.0, 0.0, 0.3, 1.0]),
    st.sampled_from([0.0, 0.0, 0.1]),
    st.booleans(),
    st.booleans(),
)
seeds = st.integers(0, 9999)


# The optimizer


@dataclass(frozen=True)
class Parameter:
    """And the layout of its gradient, and the steps in which it has one."""

    shape: tuple[int, ...]
    kind: str
    layout: str
    gradient_layout: str
    group: int
    has_gradient: tuple[bool, ...]
    shares_memory: bool  # with the parameter before


@dataclass(frozen=True)
class Optimizer:
    params: tuple[Parameter, ...]
    groups: tuple[dict[str, Any], ...]
    later: dict[int, tuple[dict[str, Any], ...]]  # options changed before a step
    dtype: torch.dtype
    tensor_lr: bool
    interchange: int  # before this step, the state goes to a new optimizer
    seed: int

    def run(self, cls):
        """Return parameters and momentum buffers after each step."""
        params, groups = [], [{**group, "params": []} for group in self.groups]
        for i, spec in enumerate(self.params):
            made = random_tensors.tensor(
                spec.shape, self.dtype, spec.kind, spec.layout, self.seed + i
            )
            if spec.shares_memory and params and spec.shape == params[-1].shape:
                made = params[-1].detach()
            params.append(nn.Parameter(made))
            groups[spec.group]["params"].append(params[-1])
        if self.tensor_lr:
            for group in groups:
                group["lr"] = torch.tensor(group["lr"])
        optimizer, results = cls(groups, lr=0.1), []
        for step in range(3):
            for group, changed in zip(
                optimizer.param_groups, self.later.get(step, ()), strict=False
            ):
                group.update(changed)
            if step == self.interchange:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = cls([{"params": g["params"]} for g in optimizer.param_groups], lr=9.0)
                optimizer.load_state_dict(state)
            for i, (param, spec) in enumerate(zip(params, self.params, strict=True)):
                param.grad = None
                if spec.has_gradient[step]:
                    seed = self.seed + 100 * step + i
                    param.grad = random_tensors.tensor(
                        spec.shape, self.dtype, spec.kind, spec.gradient_layout, seed
                    )
            optimizer.step()
            state = [optimizer.state[p].get("momentum_buffer") for p in params]
            results.append([p.detach().clone() for p in params])
            results.append([None if s is None else s.clone() for s in state])
        return results, optimizer.state_dict()["param_groups"]


@st.composite
def optimizers(draw):
    groups = tuple(draw(st.lists(options, min_size=1, max_size=2)))
    dense = st.sampled_from(
        ["contiguous", "contiguous", "offset", "reversed", "every other column"]
    )
    params = tuple(
        Parameter(
            shape=tuple(draw(st.lists(random_tensors.size, max_size=3))),
            kind=draw(random_tensors.values),
            layout=draw(dense),
            gradient_layout=draw(random_tensors.layouts),
            group=draw(st.integers(0, len(groups) - 1)),
            has_gradient=tuple(draw(st.integers(0, 5)) != 5 for _ in range(3)),
            shares_memory=draw(st.integers(0, 9)) == 9,
        )
        for _ in range(draw(st.integers(1, 4)))
    )
    later = {}
    if draw(st.booleans()):
        later[draw(st.integers(1, 2))] = tuple(draw(options) for _ in groups)
    return Optimizer(
        params,
        groups,
        later,
        dtype=draw(random_tensors.dtypes),
        tensor_lr=draw(st.integers(0, 9)) == 9,
        interchange=draw(st.sampled_from([3, 3, 1, 2])),
        seed=draw(seeds),
    )


def outcome(function, *arguments):
    try:
        return None, function(*arguments)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError) as error:
        return error, None


def check_optimizer(example: Optimizer) -> int:
    isa = _C.available_isas()
    _C.set_isa([i for i in isa if i != "amx"][-1])  # whose multiply-add is fused
    error, ours = outcome(example.run, mnist_ext.optim.SGD)
    torchs_error, theirs = outcome(example.run, torch.optim.SGD)
    assert type(error) is type(torchs_error), (error, torchs_error)
    if error is not None:
        return 1
    assert [{**g, "foreach": 0} for g in ours[1]] == [{**g, "foreach": 0} for g in theirs[1]]
    finite = [t.abs().double().nan_to_num(0, 0, 0) for s in theirs[0] for t in s if t is not None]
    largest = max([1.0, *[t.max().item() for t in finite if t.numel()]])
    for our_step, their_step in zip(ours[0], theirs[0], strict=True):
        for our, their in zip(our_step, their_step, strict=True):
            assert type(our) is type(their)
            if our is None:
                continue
            assert (our.shape, our.dtype) == (their.shape, their.dtype)
            same = is_same(our, their)
            if our.dtype.itemsize == 2:  # rounded in other places; so it may overflow elsewhere
                same |= (our - their).abs().double() <= 64 * torch.finfo(our.dtype).eps * largest
                same |= ~(their.isfinite() & our.isfinite())
            assert same.all(), (our, their)
    return 3


@pytest.mark.parametrize("share", [0.12])
def test_random_optimizers(fuzz, share):
    fuzz(optimizers(), check_optimizer, share)


# Models


@dataclass(frozen=True)
class Model:
    """A tree of layers: names with sizes, Sequentials as tuples."""

    layers: tuple[Any, ...]
    features: int
    classes: int
    frozen: tuple[bool, ...]  # by parameter
    bias: tuple[bool, ...]  # by Linear
    hooks: str
    seed: int

    def make(self, dtype=torch.float64) -> nn.Sequential:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            model = self._make(self.layers).to(dtype)
        params = list(model.parameters())
        for param, frozen in zip(params, self.frozen, strict=False):
            param.requires_grad_(not frozen)
        return model

    def _make(self, layers):
        biases = iter(self.bias * 9)
        made = []
        for kind, *sizes in layers:
            if kind == "sequential":
                made.append(self._make(sizes))
            elif kind == "linear":
                made.append(nn.Linear(*sizes, bias=next(biases)))
            elif kind == "ours":
                made.append(Linear(*sizes, bias=next(biases), activation="relu"))
            else:
                made.append(_PLAIN[kind](*sizes))
        return nn.Sequential(*made)


_PLAIN = {
    "relu": nn.ReLU,
    "identity": nn.Identity,
    "tanh": nn.Tanh,
    "norm": nn.LayerNorm,
    "flatten": nn.Flatten,
    "in place": lambda: nn.ReLU(inplace=True),
}
widths = st.sampled_from([1, 2, 3, 4, 5, 8, 9, 17])


@st.composite
def models(draw, kinds, hooks):
    features = width = draw(widths)
    layers: list[Any] = [("flatten",)] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        following = draw(widths)
        layers.append((draw(st.sampled_from(["linear"] * 6 + kinds[:1])), width, following))
        width = following
        for kind in draw(st.lists(st.sampled_from(kinds[1:]), max_size=2)):
            layers.append((kind, width) if kind == "norm" else (kind,))
    # Some of them within another Sequential.
    begin = draw(st.integers(0, len(layers)))
    end = draw(st.integers(begin, len(layers)))
    if draw(st.booleans()):
        layers[begin:end] = [("sequential", *layers[begin:end])]
    return Model(
        tuple(layers),
        features,
        width,
        frozen=tuple(draw(st.lists(st.sampled_from([False, False, True]), max_size=8))),
        bias=tuple(draw(st.lists(st.booleans(), min_size=1, max_size=4))),
        hooks=draw(st.sampled_from(hooks)),
        seed=draw(seeds),
    )


losses = st.fixed_dictionaries(
    {
        "reduction": st.sampled_from(["mean", "sum"]),
        "label_smoothing": st.sampled_from([0.0, 0.0, 0.2]),
        "ignore_index": st.sampled_from([-100, 0, -1]),
    }
)


@dataclass(frozen=True)
class Training:
    """A model, and how it is trained."""

    model: Model
    loss: dict[str, Any]
    weighted: bool
    groups: tuple[dict[str, Any], ...]
    group_of: tuple[int, ...]  # of each parameter; -1: in none
    batches: tuple[int, ...]
    later: dict[int, tuple[dict[str, Any], ...]]
    freeze_later: tuple[int, int] | None  # before this step, this parameter
    target: torch.dtype
    layout: str
    seed: int

    def criterion(self, dtype=torch.float64):
        weight = torch.linspace(0.5, 2, self.model.classes, dtype=dtype) if self.weighted else None
        return nn.CrossEntropyLoss(weight, **self.loss)

    def optimizer(self, cls, model):
        groups = [{**group, "params": []} for group in self.groups]
        for i, param in enumerate(model.parameters()):
            group = self.group_of[i % len(self.group_of)]
            if group >= 0:
                groups[group % len(groups)]["params"].append(param)
        return cls(groups, lr=0.1)

    def batch(self, number, dtype=torch.float64):
        rows, seed = self.batches[number], self.seed + number
        x = random_tensors.tensor((rows, self.model.features), dtype, "normal", self.layout, seed)
        target = torch.randint(
            self.model.classes, (rows,), generator=torch.Generator().manual_seed(seed)
        )
        if self.loss["ignore_index"] == -1 and self.target != torch.uint8:
            target[::3] = -1
        return x, target.to(self.target)

    def change(self, step, model, optimizer):
        for group, changed in zip(optimizer.param_groups, self.later.get(step, ()), strict=False):
            group.update(changed)
        if self.freeze_later is not None and self.freeze_later[0] == step:
            params = list(model.parameters())
            param = params[self.freeze_later[1] % len(params)]
            param.requires_grad_(not param.requires_grad)


@st.composite
def trainings(draw, models):
    groups = tuple(draw(st.lists(options, min_size=1, max_size=2)))
    later = {}
    if draw(st.booleans()):
        later[draw(st.integers(0, 2))] = tuple(draw(options) for _ in groups)
    freeze = st.tuples(st.integers(1, 2), st.integers(0, 7))
    return Training(
        draw(models),
        draw(losses),
        draw(st.booleans()),
        groups,
        tuple(draw(st.lists(st.sampled_from([0, 0, 1, -1]), min_size=1, max_size=5))),
        tuple(draw(st.lists(st.sampled_from([3, 2, 1, 0, 5, 17]), min_size=1, max_size=3))),
        later,
        draw(st.one_of(st.none(), st.none(), freeze)),
        draw(st.sampled_from([torch.int64, torch.int32, torch.uint8])),
        draw(random_tensors.layouts),
        draw(seeds),
    )


def loop(
    example: Training, model, criterion, optimizer, dtype, target=lambda t: t, images=lambda x: x
):
    """Yield what each step of the ordinary loop comes to: loss, and gradients of parameters."""
    for step in range(len(example.batches)):
        example.change(step, model, optimizer)
        x, y = example.batch(step, dtype)
        optimizer.zero_grad()
        loss = criterion(model(images(x)), target(y))
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
        yield [
            loss.detach(),
            *[None if p.grad is None else p.grad.clone() for p in model.parameters()],
        ]


def assert_close(ours, theirs):
    for our, their in zip(ours, theirs, strict=True):
        assert type(our) is type(their)
        if our is None:
            continue
        scale = 1 + their.abs().nan_to_num(0, 0, 0).max().item() if their.numel() else 1
        # What has grown without bounds has lost its digits to chaos.
        near = is_same(our, their) | ((our - their).abs() <= 1e-9 * scale)
        near |= ~(our.abs() < 1e6) & ~(their.abs() < 1e6)
        assert near.all(), (our, their)


def _hook(model, kind, seen):
    """Register hooks that see, or change, what goes through some layers."""
    layers = [m for m in model.modules() if not isinstance(m, nn.Sequential)]
    some = layers[:: 2 if len(layers) > 2 else 1]
    for module in some if kind != "none" else ():
        if kind == "forward":
            module.register_forward_hook(lambda m, x, y: seen.append(y.detach().clone()))
        elif kind == "replace":
            module.register_forward_hook(lambda m, x, y: y * 0.5)
        elif kind == "pre":
            module.register_forward_pre_hook(lambda m, x: (x[0] * 0.5,))
        elif kind == "backward" and not isinstance(module, nn.ReLU):
            module.register_full_backward_hook(
                lambda m, gx, gy: seen.extend(g.clone() for g in gy if g is not None)
            )


def train(example: Training, with_ours: bool):
    """Return losses and gradients of each step, what hooks have seen, and the parameters."""
    model, criterion, seen = example.model.make(), example.criterion(), []
    optimizer = example.optimizer(torch.optim.SGD, model)
    if with_ours:
        names = list(model.state_dict())
        swap(model)
        swap(criterion)
        assert list(model.state_dict()) == names
        if example.seed % 4 == 1:
            model = copy.deepcopy(model)
            optimizer = example.optimizer(mnist_ext.optim.SGD, model)
        elif example.seed % 4 == 2:
            swap(unswap(model))
    _hook(model, example.model.hooks, seen)
    target = (lambda t: t) if with_ours else torch.Tensor.long
    steps = [*loop(example, model, criterion, optimizer, torch.float64, target)]
    return [t for step in steps for t in step] + seen + [p.detach() for p in model.parameters()]


def check_swap(example: Training) -> int:
    _C.set_isa([i for i in _C.available_isas() if i != "amx"][-1])
    torchs_error, theirs = outcome(train, example, False)
    error, ours = outcome(train, example, True)
    if "modified by an inplace operation" in str(torchs_error) and error is None:
        return 0  # a ReLU in place behind another one: they are fused
    assert type(error) is type(torchs_error), (error, torchs_error)
    if error is None:
        assert_close(ours, theirs)
    return len(example.batches)


@pytest.mark.parametrize("share", [0.12])
def test_random_swapped_models(fuzz, share):
    kinds = ["linear", "relu", "relu", "identity", "tanh", "norm", "in place"]
    hooks = ["none", "none", "forward", "replace", "pre", "backward"]
    fuzz(trainings(models(kinds, hooks)), check_swap, share)


def check_train_step(example: Training) -> int:
    _C.set_isa([i for i in _C.available_isas() if i != "amx"][-1])
    for dtype in (torch.float64, torch.float32):
        ours, ordinary, torchs = [example.model.make(dtype) for _ in range(3)]
        swap(ordinary)
        optimizer = example.optimizer(torch.optim.SGD, ours)
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        parts = [example.criterion(dtype) for _ in range(3)]
        loops = [
            loop(
                example,
                ordinary,
                swap(parts[1]),
                example.optimizer(mnist_ext.optim.SGD, ordinary),
                dtype,
                images=torch.Tensor.contiguous,  # which a TrainStep makes of them
            ),
            loop(
                example,
                torchs,
                parts[2],
                example.optimizer(torch.optim.SGD, torchs),
                dtype,
                torch.Tensor.long,
            ),
        ]
        step = None
        for number in range(len(example.batches)):
            example.change(number, ours, optimizer)
            trained = [p for p in ours.parameters() if p.requires_grad and id(p) in known]
            try:
                step = step or TrainStep(ours, parts[0], optimizer)
                loss = step(*example.batch(number, dtype))
            except ValueError as refused:
                if trained or "frozen or unknown" not in str(refused):
                    raise
                return number + 1
            assert trained
            our_loop, their_loop = next(loops[0]), next(loops[1])
            of_ours = [loss, *[p.detach() for p in ours.parameters()]]
            of_loop = [our_loop[0], *[p.detach() for p in ordinary.parameters()]]
            for our, their in zip(of_ours, of_loop, strict=True):
                assert is_same(our, their).all(), (number, our, their)
            if dtype == torch.float64:
                assert_close([loss], their_loop[:1])
                assert_close(
                    [p.detach() for p in ours.parameters()],
                    [p.detach() for p in torchs.parameters()],
                )
    return 2 * len(example.batches)


@pytest.mark.parametrize("share", [0.12])
def test_random_train_steps(fuzz, share):
    kinds = ["ours", "relu", "identity"]
    fuzz(trainings(models(kinds, ["none"])), check_train_step, share)
