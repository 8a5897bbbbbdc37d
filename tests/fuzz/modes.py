"""The ways to call a function and have its gradients.

A mode takes a function of tensors, the tensors, which of them want a gradient, and how to make the
gradient of a result. It returns rounds: each the results and the gradients, or the results alone.
What only this mode has, such as second derivatives, comes last, and is said by `EXTRA`.
"""

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

EXTRA = {"create_graph", "jvp"}


def _tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _gradients(outputs, wanted, go, **options):
    outputs = [o for o in outputs if o.requires_grad]
    if not (wanted and outputs):
        return []
    gos = [go(o) for o in outputs]
    return list(torch.autograd.grad(outputs, wanted, gos, allow_unused=True, **options))


def plain(f, leaves, wanted, go, function=None):
    outputs = _tuple((function or f)(*leaves))
    return [[*outputs, *_gradients(outputs, wanted, go)]]


def no_grad(f, leaves, wanted, go):
    with torch.no_grad():
        return [[*_tuple(f(*leaves))]]


def inference_mode(f, leaves, wanted, go):
    with torch.inference_mode():
        return [[*_tuple(f(*leaves))]]


def backward(f, leaves, wanted, go):
    outputs = _tuple(f(*leaves))
    differentiable = [o for o in outputs if o.requires_grad]
    if differentiable:
        torch.autograd.backward(differentiable, [go(o) for o in differentiable])
    return [[*outputs, *[t.grad for t in wanted]]] if differentiable else [[*outputs]]


def twice(f, leaves, wanted, go):
    outputs = _tuple(f(*leaves))
    first = _gradients(outputs, wanted, go, retain_graph=True)
    return [[*outputs, *first], [*outputs, *_gradients(outputs, wanted, go)]]


def create_graph(f, leaves, wanted, go):
    outputs = _tuple(f(*leaves))
    grads = _gradients(outputs, wanted, go, create_graph=True)
    of = [g.square().sum() for g in grads if g is not None and g.requires_grad]
    second = []
    if of:
        second = torch.autograd.grad(sum(of), wanted, materialize_grads=True)
    return [[*outputs, *grads], list(second)]


def batched(f, leaves, wanted, go):
    outputs = _tuple(f(*leaves))
    if not (wanted and outputs[0].requires_grad):
        return [[*outputs]]
    gos = go(outputs[0])
    gos = torch.stack([gos, gos * 2])
    grads = torch.autograd.grad(outputs[0], wanted, gos, is_grads_batched=True, allow_unused=True)
    rounds = zip(*[(None, None) if g is None else (g[0], g[1] / 2) for g in grads], strict=True)
    return [[*outputs, *each] for each in rounds]


def hooks(f, leaves, wanted, go):
    for leaf in wanted:
        leaf.register_hook(lambda g: g / 2)
    outputs = _tuple(f(*leaves))
    for output in outputs:
        if output.requires_grad:
            output.register_hook(lambda g: g * 2)
    return [[*outputs, *_gradients(outputs, wanted, go)]]


def saved_tensor_hooks(f, leaves, wanted, go):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        return plain(f, leaves, wanted, go)


def checkpointed(f, leaves, wanted, go):
    return plain(f, leaves, wanted, go, lambda *t: checkpoint(f, *t, use_reentrant=False))


def autocast(f, leaves, wanted, go):
    with torch.autocast("cpu", torch.bfloat16):
        outputs = _tuple(f(*leaves))
    return [[*outputs, *_gradients(outputs, wanted, go)]]


def parameters(f, leaves, wanted, go):
    made = {id(t): nn.Parameter(t.detach()) for t in wanted}
    return plain(f, [made.get(id(t), t) for t in leaves], [made[id(t)] for t in wanted], go)


def default_device(f, leaves, wanted, go):
    with torch.device("cpu"):
        return plain(f, leaves, wanted, go)


def anomaly(f, leaves, wanted, go):
    with torch.autograd.set_detect_anomaly(True, check_nan=False):
        return plain(f, leaves, wanted, go)


class _PassesThrough(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def function_mode(f, leaves, wanted, go):
    with _PassesThrough():
        return plain(f, leaves, wanted, go)


def _of_wanted(f, leaves, wanted):
    """Return f as a function of the tensors in wanted."""
    places = [next(i for i, t in enumerate(leaves) if t is want) for want in wanted]

    def function(*tensors):
        arguments = list(leaves)
        for place, tensor in zip(places, tensors, strict=True):
            arguments[place] = tensor
        return f(*arguments)

    return function


def vmap(f, leaves, wanted, go):
    wanted = [t for t in wanted if t.dim() < 64]
    if not wanted:
        return plain(f, leaves, wanted, go)
    function = _of_wanted(f, leaves, wanted)
    outputs = torch.func.vmap(function)(*[torch.stack([t.detach()] * 2) for t in wanted])
    return [[o[i] for o in _tuple(outputs)] for i in range(2)]


def vjp(f, leaves, wanted, go):
    if not wanted:
        return plain(f, leaves, wanted, go)
    outputs, function = torch.func.vjp(_of_wanted(f, leaves, wanted), *[t.detach() for t in wanted])
    gos = tuple(go(o) for o in outputs) if isinstance(outputs, tuple) else go(outputs)
    return [[*_tuple(outputs), *function(gos)]]


def jvp(f, leaves, wanted, go):
    if not wanted:
        return [*plain(f, leaves, wanted, go), []]
    primals = tuple(t.detach() for t in wanted)
    outputs, tangents = torch.func.jvp(
        _of_wanted(f, leaves, wanted), primals, tuple(p.cos() for p in primals)
    )
    return [[*_tuple(outputs)], [*_tuple(tangents)]]


def compiled(f, leaves, wanted, go):
    torch.compiler.reset()
    return plain(f, leaves, wanted, go, torch.compile(f, backend="aot_eager"))


MODES = {
    mode.__name__: mode
    for mode in (
        plain,
        no_grad,
        inference_mode,
        backward,
        twice,
        create_graph,
        batched,
        hooks,
        saved_tensor_hooks,
        checkpointed,
        autocast,
        parameters,
        default_device,
        anomaly,
        function_mode,
        vmap,
        vjp,
        jvp,
        compiled,
    )
}
