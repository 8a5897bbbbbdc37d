"""What wraps an op from outside: torch.compile, torch.export, fake and meta tensors."""

import copy
import io
import itertools
import re
import warnings

import pytest
import torch
from op_cases import CASES, FEW, NARROW_INDICES, subsets, value_and_gradients, with_gradients
from torch import nn
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

import mnist_ext
from mnist_ext import _autograd

pytestmark = pytest.mark.cpu_only("what wraps an op does not see whose kernels run")
op = torch.ops.mnist_ext


def compiled_agrees(case, tensors, backend, **options):
    """Compile without graph breaks, run, and compare with eager.

    Bit for bit, but for the gradient of cross_entropy: eager forms it in the forward, from
    exponentials that are kept; a compiled backward forms them again.
    """
    torch._dynamo.reset()
    compiled = torch.compile(case.ours, fullgraph=True, backend=backend, **options)
    ours = value_and_gradients(compiled, case, tensors)
    eager = value_and_gradients(case.ours, case, tensors)
    assert torch.equal(ours[0], eager[0])
    rtol, atol = (0, 0) if case.op == "linear" else (1e-6, 1e-6)
    torch.testing.assert_close(ours, eager, rtol=rtol, atol=atol)
    return compiled


@pytest.mark.parametrize(
    ("case", "dynamic"),
    [*itertools.product([*FEW, *NARROW_INDICES[::11]], [True]), *((c, False) for c in FEW[::3])],
    ids=str,
)
def test_compiles_without_graph_break(case, dynamic):
    """Traced by Dynamo and AOTAutograd, forward and backward; the ops themselves then run."""
    compiled_agrees(case, case.tensors(torch.float32), "aot_eager", dynamic=dynamic)


@pytest.mark.usefixtures("every_kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiles_with_inductor(dtype):
    """A model and its loss, whole and once for all sizes, in the compiler that is the default."""
    model = mnist_ext.nn.swap(
        torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    ).to(dtype)
    criterion = mnist_ext.nn.CrossEntropyLoss(label_smoothing=0.1)

    def loss(input, target):
        return criterion(model(input), target)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    frames = set()
    for rows in (4, 9, 33):
        input, target = torch.randn(rows, 7, dtype=dtype), torch.randint(0, 3, (rows,))
        results = []
        for function in (compiled, loss):
            value = function(input, target)
            results.append([value, *torch.autograd.grad(value, list(model.parameters()))])
        torch.testing.assert_close(*results)
        frames.add(counter.frame_count)
    assert len(frames) == 1


def test_compiled_again_where_the_tf32_setting_changes(monkeypatch, allow_tf32):
    """A constant of the graphs, which Dynamo guards; no GPU is needed to see what was traced."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    monkeypatch.setattr(_autograd, "has_cuda_kernels", lambda _: True)
    ran, graphs = [], []

    def recording(graph, _):
        flags = re.findall(r"mnist_ext\.linear\w*\.default\(.*, (\w+)\)", graph.code)
        graphs.append(flags)

        def run(*args):
            ran.extend(flags)
            return graph(*args)

        return make_boxed_func(run)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=recording, bw_compiler=recording)
    compiled = torch.compile(mnist_ext.functional.linear, fullgraph=True, backend=backend)
    input, weight = (torch.randn(n, 3, requires_grad=True) for n in (2, 4))
    for tf32 in (True, False, True):
        ran.clear()
        allow_tf32(tf32)
        compiled(input, weight).sum().backward()
        assert ran == 2 * [str(tf32)]
    assert len(graphs) == 4  # forward and backward, of each setting: what was compiled is kept


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_export(dynamic, strict):
    """A swapped model is exported and runs as it did.

    Not strict, which is the default, PyTorch's own ops are recorded: such a program needs no
    mnist_ext where it is loaded.
    """
    model = mnist_ext.nn.swap(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5), torch.nn.ReLU())
    )
    input = torch.randn(4, 3, 4)
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    program = torch.export.export(model, (input,), dynamic_shapes=shapes, strict=strict)
    assert strict or "mnist_ext" not in program.graph_module.code
    for x in [input, torch.randn(9, 3, 4)] if dynamic else [input]:
        torch.testing.assert_close(program.module()(x), model(x))


def calls_of_ops(case, dtype):
    """Return (op, arguments) of each call that an op of ours takes, for any gradients wanted."""
    calls = {}

    def recorded(op):
        def call(*args):
            detached = tree_map_only(torch.Tensor, torch.Tensor.detach, args)
            kinds = tree_map_only(torch.Tensor, lambda t: (t.shape, t.dtype), detached)
            result = op(*args)
            if not isinstance(result, tuple) or any(r is not None for r in result):
                calls[str((op, kinds))] = op, detached
            return result

        return call

    tensors = case.tensors(dtype)
    present = tuple(i for i in case.differentiable if tensors[i] is not None)
    # One op makes the gradients of all parameters, with or without that of the input: always of an
    # mlp; of a head, whose op takes each by itself, to save time.
    few = [(), present[1:], present]
    with pytest.MonkeyPatch.context() as patch:
        for name, op in list(vars(_autograd).items()):
            if isinstance(op, torch._ops.OpOverload):
                patch.setattr(_autograd, name, recorded(op))
        for subset in few if case.op in ("mlp", "linear_cross_entropy") else subsets(present):
            leaves, wanted = with_gradients(tensors, subset)
            value = case.ours(*leaves)
            for _ in range(2 if subset else 0):  # the second backward of a loss has an op to call
                torch.autograd.grad(value, wanted, torch.randn_like(value), retain_graph=True)
    return calls.values()


@pytest.mark.usefixtures("every_kernel")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*FEW, *NARROW_INDICES[::5]], ids=str)
def test_opcheck(case, dtype):
    """Schema, fake tensors, autograd registration, AOTDispatch: static and dynamic."""
    for function, arguments in calls_of_ops(case, dtype):
        torch.library.opcheck(function, arguments)


@pytest.mark.usefixtures("every_kernel")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fake_and_meta_tensors_have_the_metadata_of_real_ones(case):
    def metadata(results):
        results = (results,) if torch.is_tensor(results) else results
        return [None if r is None else (r.shape, r.dtype, r.stride()) for r in results]

    for dtype in (torch.float64, torch.float16):
        for function, arguments in calls_of_ops(case, dtype):
            expected = metadata(function(*arguments))
            with torch._subclasses.FakeTensorMode() as mode:
                fakes = tree_map_only(torch.Tensor, mode.from_tensor, arguments)
                assert metadata(function(*fakes)) == expected
            metas = tree_map_only(torch.Tensor, lambda t: t.to("meta"), arguments)
            results = function(*metas)
            assert metadata(results) == expected
            results = (results,) if torch.is_tensor(results) else results
            assert all(r is None or r.is_meta for r in results)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_functions_on_meta_tensors(case):
    metas = [None if t is None else t.to("meta") for t in case.tensors(torch.float32)]
    ours, torchs = case.ours(*metas), case.torchs(*metas)
    assert (ours.shape, ours.dtype, ours.device) == (torchs.shape, torchs.dtype, torchs.device)


def test_fake_tensors_refuse_wrong_shapes():
    with torch._subclasses.FakeTensorMode():
        with pytest.raises(RuntimeError, match="in_features"):
            op.linear(torch.randn(2, 3), torch.randn(4, 5), None, False)
        with pytest.raises(ValueError, match="target"):
            op.cross_entropy(
                torch.randn(2, 3), torch.zeros(4, dtype=torch.int64), None, -100, 0.0, 1
            )


def torchs_and_ours() -> tuple[nn.Module, nn.Module]:
    torchs = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4))
    return torchs, mnist_ext.nn.swap(copy.deepcopy(torchs))


def test_a_trace_records_pytorchs_ops():
    torchs, ours = torchs_and_ours()
    input, target = torch.randn(6, 12), torch.randint(4, (6,))
    other = torch.randn(3, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit's own
        traced = torch.jit.trace(ours, input)
        torch.jit.save(traced, io.BytesIO())  # which no Python function in it would let
        torch.jit.trace(lambda x, t: mnist_ext.functional.cross_entropy(x, t), (input, target))
    torch.testing.assert_close(traced(other), torchs(other))

    def gradients(input):
        loss = mnist_ext.functional.cross_entropy(ours(input), target)
        return torch.autograd.grad(loss, list(ours.parameters()))

    graph = make_fx(gradients)(input)
    assert "mnist_ext" not in graph.code
    torch.testing.assert_close(graph(input), gradients(input))


@pytest.mark.parametrize(("scale", "fullgraph"), [(1.0, True), (4.0, True), (4.0, False)])
def test_compiled_autograd_may_run_a_backward_many_times(scale, fullgraph):
    torch._dynamo.reset()
    _, model = torchs_and_ours()
    input, target = torch.randn(6, 12, requires_grad=True), torch.randint(4, (6,))
    loss = mnist_ext.functional.cross_entropy(model(input), target) / scale
    reference = mnist_ext.functional.cross_entropy(model(input), target) / scale
    (expected,) = torch.autograd.grad(reference, input)
    compiler = torch.compile(backend="aot_eager", fullgraph=fullgraph)
    with compiled_autograd._enable(compiler):
        for _ in range(3):
            input.grad = None
            loss.backward(retain_graph=True)
            torch.testing.assert_close(input.grad, expected)


def test_compiling_warns_of_nothing_of_ours():
    torch._dynamo.reset()
    _, model = torchs_and_ours()

    def loss(input, target):
        return mnist_ext.functional.cross_entropy(model(input), target)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.compile(loss, backend="aot_eager")(torch.randn(6, 12), torch.randint(4, (6,)))
    assert [str(w.message) for w in caught if "mnist_ext" in f"{w.filename} {w.message}"] == []


def test_flops_are_counted_as_pytorchs():
    input = torch.randn(6, 12, requires_grad=True)
    counts = []
    for model in torchs_and_ours():
        compiled = torch.compile(model, backend="aot_eager")
        compiled(input).sum().backward()
        lone, output = model[0], model(input)  # a forward that nobody counts
        for function in (
            lambda m=model: m(input).sum().backward(),
            lambda c=compiled: c(input).sum().backward(),
            lambda m=lone: m(input).sum().backward(),
            lambda o=output: o.sum().backward(),
        ):
            with FlopCounterMode(display=False) as counter:
                function()
            counts.append(counter.get_total_flops())
    assert counts[:4] == counts[4:]
    assert all(counts)


def test_float32_stays_float32_whatever_the_matmul_precision():
    """Where the CPU has AMX, PyTorch takes bfloat16 for "medium"."""
    input, weight = torch.randn(64, 200), torch.randn(30, 200)
    expected = mnist_ext.functional.linear(input, weight)
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(mnist_ext.functional.linear(input, weight), expected)
    finally:
        torch.set_float32_matmul_precision("highest")
