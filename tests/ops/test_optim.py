"""SGD against torch.optim.SGD: the same bits, the same state."""

import contextlib
import copy
import itertools
import json
import threading

import pytest
import torch
from torch import nn

import mnist_ext

OPTIONS = [
    {"lr": 0.1, "momentum": m, "dampening": d, "weight_decay": w, "nesterov": n, "maximize": x}
    for m, d, w, n, x in itertools.product(
        (0.0, 0.9), (0.0, 0.3), (0.0, 0.05), (False, True), (False, True)
    )
    if not (n and (m == 0 or d != 0)) and not (m == 0 and d != 0)
]


def parameters(dtype=torch.float32):
    """Shapes: less and more than a vector, none, a scalar, enough for two threads, transposed."""
    shapes = [(3, 5), (0, 4), (), (17,), (300, 401)]
    made = [torch.randn(shape).to(dtype) for shape in shapes]
    made.append(torch.randn(40, 30).to(dtype).t())
    return [nn.Parameter(p) for p in made]


def assert_as_torchs(use, **tolerance):
    """Compare what a use of the optimizer's class comes to with ours and with PyTorch's."""
    results = []
    for cls in (mnist_ext.optim.SGD, torch.optim.SGD):
        torch.manual_seed(0)
        results.append(use(cls))
    torch.testing.assert_close(*results, **tolerance)


def run(optimizer, params, steps, seed=0):
    """Step with random gradients; the first parameter gets none in the first step."""
    torch.manual_seed(seed)
    for step in range(steps):
        optimizer.zero_grad()
        for i, p in enumerate(params):
            grad = torch.randn_like(p)
            p.grad = None if i == step == 0 else grad
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_same_bits(device, options, dtype):
    ours = parameters(dtype)
    torchs = copy.deepcopy(ours)
    run(mnist_ext.optim.SGD(ours, **options), ours, 4)
    run(torch.optim.SGD(torchs, **options), torchs, 4)
    for our, their in zip(ours, torchs, strict=True):
        if dtype.itemsize == 2:  # PyTorch rounds once more in what its vectors leave over
            torch.testing.assert_close(our, their, rtol=1e-2, atol=5e-2)
        elif device in ("baseline", "cuda"):  # no fused multiply-add; PyTorch's own order
            torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(our, their)


@pytest.mark.parametrize(
    ("first", "second"), [*itertools.permutations([mnist_ext.optim.SGD, torch.optim.SGD])]
)
def test_state_dict_is_interchangeable(first, second):
    options = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
    params = parameters()
    expected = copy.deepcopy(params)
    start = first(params, **options)
    run(start, params, 3)
    continued = second(params, lr=99.0)
    continued.load_state_dict(start.state_dict())
    run(continued, params, 3, seed=1)

    whole = torch.optim.SGD(expected, **options)
    run(whole, expected, 3)
    run(whole, expected, 3, seed=1)
    torch.testing.assert_close(params, expected)
    assert continued.state_dict().keys() == whole.state_dict().keys()
    torch.testing.assert_close(continued.state_dict()["state"], whole.state_dict()["state"])


def test_groups_schedulers_hooks_and_closure():
    def use(cls):
        model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
        optimizer = cls(
            [
                {"params": model[0].parameters(), "momentum": 0.5},
                {"params": model[2].parameters(), "lr": 0.3},
            ],
            lr=0.1,
        )
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        calls = []
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *_: calls.append("post"))
        input = torch.randn(8, 4)

        def closure():
            optimizer.zero_grad()
            loss = model(input).square().mean()
            loss.backward()
            return loss

        losses = []
        for _ in range(5):
            losses.append(optimizer.step(closure).detach())
            scheduler.step()
        assert calls == ["pre", "post"] * 5
        return torch.stack(losses), *model.parameters()

    assert_as_torchs(use)


def tied(flat):
    first, second = nn.Parameter(flat[:70_000]), nn.Parameter(torch.zeros(70_000))
    second.data = first.data
    first.grad, second.grad = torch.randn(2, 70_000)
    return [first, second]


def views(flat):
    params = [nn.Parameter(flat[begin : begin + 50_000]) for begin in (0, 30_000, 80_000)]
    for param in params:
        param.grad = torch.randn(50_000)
    return params


def views_of_two_dtypes(flat):
    params = [nn.Parameter(flat.view(torch.float16)[:90_000]), nn.Parameter(flat[:90_000])]
    for param in params:
        param.grad = torch.ones_like(param)
    return params


def gradient_is_a_parameter(flat):
    params = [nn.Parameter(flat[:70_000]), nn.Parameter(flat[70_000:140_000])]
    params[0].grad, params[1].grad = torch.randn(70_000), params[0].detach()
    return params


@pytest.mark.parametrize("make", [tied, views, views_of_two_dtypes, gradient_is_a_parameter])
@pytest.mark.parametrize("options", [{}, {"momentum": 0.9, "weight_decay": 0.1}], ids=len)
def test_tensors_that_share_memory_are_updated_one_after_the_other(make, options):
    def use(cls):
        flat = torch.randn(140_000)
        params = make(flat)
        optimizer = cls(params, lr=0.1, **options)
        optimizer.step()
        new = nn.Parameter(flat[10_000:20_000])  # in its first step, before those that are not
        new.grad = torch.randn(10_000)
        optimizer.param_groups[0]["params"].insert(0, new)
        for _ in range(2):
            optimizer.step()
        return flat.view(torch.int32)

    assert_as_torchs(use)


def test_momentum_buffers_that_share_memory():
    def use(cls):
        params = [nn.Parameter(torch.randn(70_000)) for _ in range(2)]
        optimizer = cls(params, lr=0.1, momentum=0.9)
        run(optimizer, params, 2)
        optimizer.state[params[1]] = optimizer.state[params[0]]
        run(optimizer, params, 2)
        return params

    assert_as_torchs(use, rtol=0, atol=0)


@contextlib.contextmanager
def observed(path):
    observer = torch.profiler.ExecutionTraceObserver().register_callback(str(path))
    observer.start()
    try:
        yield
    finally:
        observer.unregister_callback()


def names_seen_by(profiler, step, path, thread=False):
    """Return the names of the entries in what profiler, one of several kinds, has seen of step."""
    with profiler as profile:
        if thread:
            other = threading.Thread(target=step)
            other.start()
            other.join()
        else:
            step()
    if profile is None:
        return {node["name"] for node in json.loads(path.read_text())["nodes"]}
    events = profile.events() if hasattr(profile, "events") else profile.function_events
    return {event.name for event in events}


def all_threads():
    return torch._C._profiler._ExperimentalConfig(profile_all_threads=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", ["profiler", "autograd's", "legacy", "observer", "thread", "all threads"]
)
def test_profilers_see_the_step_where_they_see_pytorchs(kind, tmp_path):
    seen = []
    for cls in (torch.optim.SGD, mnist_ext.optim.SGD):
        param = nn.Parameter(torch.ones(2))
        param.grad = torch.ones(2)
        optimizer = cls([param], lr=0.1)

        def step(optimizer=optimizer):
            optimizer.step()
            optimizer.zero_grad()

        path = tmp_path / cls.__module__
        profiler = {
            "profiler": torch.profiler.profile,
            "autograd's": torch.autograd.profiler.profile,
            "legacy": lambda: torch.autograd.profiler.profile(use_kineto=False),
            "observer": lambda path=path: observed(path),
            "thread": torch.profiler.profile,
            "all threads": lambda: torch.profiler.profile(experimental_config=all_threads()),
        }[kind]()
        names = names_seen_by(profiler, step, path, thread="thread" in kind)
        seen.append({name for name in names if name.startswith("Optimizer")})
    assert seen[0] == seen[1]
    assert seen[0] or kind == "thread"  # a profiler sees its own thread


def test_one_native_call_per_group():
    params = parameters()
    optimizer = mnist_ext.optim.SGD(params, lr=0.1, momentum=0.9)
    run(optimizer, params, 2)
    with torch.profiler.profile() as profile:
        optimizer.step()
    names = [e.name for e in profile.events()]
    assert [name for name in names if "::" in name] == ["mnist_ext::sgd_step"]
    assert "Optimizer.step#SGD.step" in names


def test_parameters_count_as_modified():
    """A backward that needs the old values raises, as with PyTorch's."""
    weight = nn.Parameter(torch.randn(3))
    input = torch.randn(3, requires_grad=True)
    loss = (weight * input).sum()
    weight.grad = torch.ones(3)
    mnist_ext.optim.SGD([weight], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_sparse_and_complex_are_refused_by_name():
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"SGD.*\[5, 3\].*sparse.*use torch.optim.SGD"):
        mnist_ext.optim.SGD(embedding.parameters(), lr=0.1).step()
    weight = nn.Parameter(torch.randn(2, dtype=torch.complex64))
    weight.grad = torch.randn(2, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match=r"SGD.*complex64.*use torch.optim.SGD"):
        mnist_ext.optim.SGD([weight], lr=0.1).step()


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
@pytest.mark.parametrize("odd", ["gaps", "subclass", "grad layout"])
def test_what_the_kernel_does_not_take_goes_pytorchs_way(odd, options):
    class Sub(torch.Tensor):
        pass

    def make():
        if odd == "gaps":
            return nn.Parameter(torch.randn(6, 8)[:, ::2])
        if odd == "subclass":
            return torch.randn(6, 4).as_subclass(Sub).requires_grad_()
        return nn.Parameter(torch.randn(6, 4))

    def use(cls):
        p = make()
        optimizer = cls([p], lr=0.1, **options)
        for _ in range(3):
            grad = torch.randn(4, 6).t() if odd == "grad layout" else torch.randn(6, 4)
            p.grad = grad.as_subclass(Sub) if odd == "subclass" else grad
            optimizer.step()
        return p.detach(), *(s["momentum_buffer"] for s in optimizer.state.values() if s)

    assert_as_torchs(use, rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"foreach": True},
        {"fused": True},
        {"differentiable": True},
        {"lr": torch.tensor(0.1)},
        {"weight_decay": torch.tensor(0.1)},
    ],
    ids=lambda o: next(iter(o)),
)
def test_options_of_torch(options):
    def use(cls):
        params = [torch.randn(5, 3).requires_grad_()]
        if "differentiable" in options:
            params = [params[0].clone()]
            params[0].retain_grad()
        optimizer = cls(params, **{"lr": 0.1, **options})
        hooked = []
        optimizer.register_step_pre_hook(lambda *_: hooked.append("pre"))
        params[0].grad = torch.ones(5, 3)
        optimizer.step()
        assert hooked == ["pre"]
        if "differentiable" in options:  # the update is recorded
            assert params[0].grad_fn.name() != "CloneBackward0"
        return params[0].detach()

    assert_as_torchs(use)


def test_grad_scaler():
    def use(cls):
        model = nn.Linear(4, 2)
        optimizer = cls(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(torch.empty(0).device.type, init_scale=8.0)
        for bad in (False, True, False):
            optimizer.zero_grad()
            loss = model(torch.full((1, 4), torch.inf if bad else 1.0)).sum()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert all(p.isfinite().all() for p in model.parameters())
        return list(model.parameters())

    assert_as_torchs(use)


def test_compiled_step():
    def use(cls):
        params = parameters()
        optimizer = cls(params, lr=0.1, momentum=0.9)
        run(optimizer, params, 1)
        torch._dynamo.reset()
        torch.compile(optimizer.step, backend="aot_eager")()
        return params

    assert_as_torchs(use)


def sgd_step(params, grads, buffers=()):
    options = 0.1, 0.9, 0, 0, False, False, False
    return torch.ops.mnist_ext.sgd_step(params, grads, buffers, *options)


def test_op_checks_its_lists():
    ones = torch.ones(2)
    with pytest.raises(RuntimeError, match="grads: expected one for each of 1 params, got 0"):
        sgd_step([ones], [])
    with pytest.raises(RuntimeError, match=r"momentum_buffers.*got 2"):
        sgd_step([ones], [ones], [ones] * 2)


def test_op_refuses_what_shares_memory_and_is_written():
    a, b, c, d, flat = *torch.randn(4, 8), torch.randn(15)
    assert sgd_step([a, a], [c, d]) == 1
    assert sgd_step([a, flat[:8], b, flat[7:]], [c, d, c, d]) == 3
    assert sgd_step([a, b], [c, b]) == 1
    assert sgd_step([a, b], [b, c]) >= 0
    assert sgd_step([a, b], [c, c], [d, d]) == 1
    assert sgd_step([a, b], [c, c], [d, a]) >= 0
    assert sgd_step([a, b, b[:0]], [c, c, c[:0]]) == -1  # read twice; nothing of b
    assert sgd_step([flat[:8], flat[8:]], [c, c[:7]]) == -1


@pytest.mark.parametrize(
    "param",
    [
        torch.ones(4, dtype=torch.int64),
        torch.ones(1).expand(4),
        torch.ones(8)[::2],
        torch.ones(8).as_strided((2, 2, 2), (1, 1, 5)),  # fills its memory, but not once
    ],
    ids=["int64", "expanded", "gaps", "overlap"],
)
def test_op_says_which_tensor_it_refuses_and_changes_none(param):
    good = torch.ones(3)
    assert sgd_step([good, param], [torch.ones(3), torch.ones_like(param)]) == 1
    assert torch.equal(good, torch.ones(3))
