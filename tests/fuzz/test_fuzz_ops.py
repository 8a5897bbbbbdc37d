"""Random calls of linear, mlp, cross_entropy and linear_cross_entropy, against PyTorch's."""

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import modes
import pytest
import tensors as random_tensors
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from judge import is_same, judge, judge_loosely, largest_of
from torch import Tensor

from mnist_ext import _C, functional

pytestmark = [pytest.mark.usefixtures("every_kernel"), pytest.mark.filterwarnings("ignore")]

# AssertionError: PyTorch's own, under torch.func.
ERRORS = (AssertionError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True)
class Spec:
    """A tensor."""

    shape: tuple[int, ...]
    kind: str = "normal"
    layout: str = "contiguous"
    dtype: torch.dtype | None = None  # None: the call's
    makes: str = "numbers"  # or "probabilities", or "positive" ones
    seed: int = 0

    def make(self, dtype: torch.dtype) -> Tensor:
        seed = hash((self.shape, self.seed)) % 2**31
        return random_tensors.tensor(
            self.shape, self.dtype or dtype, self.kind, self.layout, seed, self.makes
        )


@dataclass(frozen=True)
class Indices:
    """Class indices: most of them classes, some ignore_index, seldom neither."""

    shape: tuple[int, ...]
    classes: int
    ignore_index: int
    ignored: float
    dtype: torch.dtype
    layout: str
    wrong: bool
    seed: int

    def make(self, _: torch.dtype) -> Tensor:
        random = torch.Generator().manual_seed(self.seed)
        made = torch.randint(0, max(1, self.classes), self.shape, generator=random)
        if 0 <= self.ignore_index < 256 or self.dtype != torch.uint8:
            made[torch.rand(self.shape, generator=random) < self.ignored] = self.ignore_index
        if self.wrong and made.numel():
            made.view(-1)[self.seed % made.numel()] = self.classes + self.seed % 2
        made = made.to(self.dtype)
        return random_tensors.laid_out(made, self.layout)


@dataclass(frozen=True)
class Call:
    """A call of an op, to us and to PyTorch."""

    op: str
    tensors: tuple[Spec | Indices | None, ...]
    options: dict[str, Any]
    differentiable: tuple[int, ...]
    modes: tuple[str, ...]  # beside the plain one
    gradient: Spec  # what its tensors' shapes come to; the shape here says nothing
    dtypes: tuple[torch.dtype, ...]
    isa: str
    is_spoilt: bool = field(default=False)  # does not fit, or is of odd dtypes

    def ours(self, *t):
        if self.op in ("linear", "cross_entropy"):
            return getattr(functional, self.op)(*t, **self.options)
        if self.op == "mlp":
            return functional.mlp(t[0], self.layers(t))
        input, linear_weight, target, linear_bias, weight = t
        return functional.linear_cross_entropy(
            input, linear_weight, target, linear_bias=linear_bias, weight=weight, **self.options
        )

    def torchs(self, *t):
        if self.op == "cross_entropy":
            return self.torchs_cross_entropy(*t)
        if self.op == "linear_cross_entropy":
            return self.torchs_head(*t)
        output = t[0]
        for weight, bias, activation in self.layers(t):
            output = F.linear(output, weight, bias)
            output = torch.relu(output) if activation == "relu" else output
        return output

    def layers(self, t):
        if self.op == "linear":
            return [(t[1], t[2], self.options["activation"])]
        return list(zip(t[1::2], t[2::2], self.options["activations"], strict=True))

    def torchs_cross_entropy(self, input, target, weight, **options):
        options = {**self.options, **options}
        if options["ignore_index"] is None:
            options["ignore_index"] = -100
        if not target.is_floating_point():
            if target.dtype in (torch.int32, torch.uint8):
                target = target.long()
            # The logits of an ignored position are not read.
            dim = min(1, input.dim() - 1)
            if target.shape == input.shape[:dim] + input.shape[dim + 1 :] and input.dim():
                input = input.masked_fill((target == options["ignore_index"]).unsqueeze(dim), 0)
        return F.cross_entropy(input, target, weight, **options)

    def torchs_head(self, input, linear_weight, target, linear_bias, weight):
        options = dict(self.options)
        softcap, z_loss = options.pop("softcap", None), options.pop("z_loss", 0.0)
        return_lse = options.pop("return_lse", False)
        bias = None if linear_bias is None else linear_bias.flatten()
        logits = F.linear(input, linear_weight.flatten(0, -2), bias)
        logits = logits.unflatten(-1, linear_weight.shape[:-1])
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        loss = replace(self, options=options).torchs_cross_entropy(logits, target, weight)
        lse = torch.logsumexp(logits.float() if logits.itemsize == 2 else logits, input.dim() - 1)
        if z_loss:
            counts = torch.ones_like(lse, dtype=torch.bool)
            if not target.is_floating_point():
                ignore_index = -100 if options["ignore_index"] is None else options["ignore_index"]
                counts = target.long() != ignore_index
            of_lse = (z_loss * lse.square()).masked_fill(~counts, 0)
            if options["reduction"] != "none":
                of_lse = of_lse.sum() / (counts.sum() if options["reduction"] == "mean" else 1)
            loss = (loss + of_lse).to(loss.dtype)
        # A hook of lse sees what comes from its own use, not from the loss.
        return (loss, lse.clone()) if return_lse else loss

    def gradient_of(self, output: Tensor) -> Tensor:
        """Return numbers that bfloat16 holds, so that all dtypes have the same."""
        spec = replace(self.gradient, shape=tuple(output.shape), layout="contiguous")
        made = spec.make(torch.bfloat16).to(output.dtype)
        return random_tensors.laid_out(made, self.gradient.layout)

    def outcome(self, function, made, mode):
        leaves = [None if t is None else t.detach() for t in made]
        wanted = [leaves[i].requires_grad_() for i in self.differentiable]
        try:
            rounds = modes.MODES[mode](function, leaves, wanted, self.gradient_of)
        except ERRORS as error:
            return error, []
        return None, [[None if t is None else t.detach() for t in each] for each in rounds]


# Magnitudes: what results would be if nothing cancelled.


def _linear_magnitudes(call, doubles, gos):
    """Return those of the output and of the gradients; whether rounding may decide ReLU's sign."""
    leaves = [None if t is None else t.abs() for t in doubles]
    wanted = [leaves[i].requires_grad_() for i in call.differentiable]
    output = leaves[0]
    for weight, bias, _ in call.layers(leaves):
        output = F.linear(output, weight, bias)
    if not wanted:
        return [output]
    return [output.detach(), *torch.autograd.grad(output, wanted, gos.abs())]


def _is_undecided(call, doubles, dtype, low) -> bool:
    """Return whether rounding decides on which side of 0 a ReLU's input lies."""
    info, x, size = torch.finfo(low or dtype), doubles[0], doubles[0].abs()
    # Sums of halves are float32, which the next layer gets rounded.
    eps = info.eps if low or dtype.itemsize > 2 else torch.finfo(torch.float32).eps
    # Small whole numbers are exact.
    whole = dtype.itemsize > 2 and all(t is None or (t == t.round()).all() for t in doubles)
    for weight, bias, activation in call.layers(doubles):
        x = F.linear(x, weight, bias)
        size = F.linear(size, weight.abs(), None if bias is None else bias.abs())
        if activation == "relu":
            close = (x.abs() <= 32 * eps * size + info.smallest_normal) | (size > info.max / 8)
            exact = (size == 0) | (whole & (size < 2**20)) | ~size.isfinite()
            if (close & ~exact).any():
                return True
            x = x.relu()
        eps = info.eps
    return False


def _cross_entropy_magnitudes(call, logits, target, weight, value, gos):
    """Return those of the loss, and of the gradients of logits and probabilities."""
    dim, classes = min(1, logits.dim() - 1), logits.shape[min(1, logits.dim() - 1)]
    smoothing, reduction = call.options["label_smoothing"], call.options["reduction"]
    weights = torch.ones(classes, dtype=torch.float64) if weight is None else weight.abs()
    along = weights.view(-1, *[1] * (logits.dim() - dim - 1))
    if target.is_floating_point():
        counts, count = torch.ones(()), logits.numel() / max(1, classes)
        mass = ((target.abs() * (1 - smoothing) + smoothing / classes) * along).sum(dim)
    else:
        ignore_index = call.options["ignore_index"]
        counts = target.long() != (-100 if ignore_index is None else ignore_index)
        of_target = weights[torch.where(counts, target.long(), 0)] * counts
        mass = of_target * (1 - smoothing) + counts * smoothing * weights.mean()
        count = of_target.sum()
    # A loss and its gradient: the probabilities' sum is 1, and so may the loss's roundings be.
    if reduction == "none":
        per_position, of_value = mass * gos.abs().masked_fill(~counts.bool(), 0), mass
    else:
        count = count if reduction == "mean" else 1
        per_position, of_value = mass * gos.abs() / count, mass.sum() / count
    of_logits = per_position.unsqueeze(dim).expand(logits.shape)
    go = gos.abs() if reduction != "none" else gos.abs().unsqueeze(dim)
    count = count if reduction == "mean" else 1
    of_target = (go * along / count * (1 - smoothing)).expand(logits.shape)
    return of_value + value.abs(), of_logits, of_target


def _head_magnitudes(call, doubles, value, gos):
    _, linear_weight, target, linear_bias, weight = doubles
    outputs = linear_weight.shape[:-1]
    leaves = [None if t is None else t.abs() for t in doubles]
    wanted = [leaves[i].requires_grad_() for i in call.differentiable if i in (0, 1, 3)]
    bias = None if linear_bias is None else leaves[3].flatten()
    logits = F.linear(leaves[0], leaves[1].flatten(0, -2), bias).unflatten(-1, outputs)
    largest = 1 + (logits.max().item() if logits.numel() else 0)
    of_value, of_logits, of_target = _cross_entropy_magnitudes(
        call, logits.detach(), target, weight, value, gos
    )
    # What a logit is off, probabilities are off, too.
    grads = torch.autograd.grad(logits, wanted, of_logits * largest) if wanted else ()
    # Of the gradient by target: log-probabilities, sums of logits.
    made = dict(zip([i for i in call.differentiable if i in (0, 1, 3)], grads, strict=True))
    return [of_value * largest, *[made.get(i, of_target * largest) for i in call.differentiable]]


def _magnitudes(call, doubles, truth):
    value = truth[0]
    gos = call.gradient_of(value)
    if call.op in ("linear", "mlp"):
        return _linear_magnitudes(call, doubles, gos)
    if call.op == "linear_cross_entropy":
        return _head_magnitudes(call, doubles, value, gos)
    of_value, of_logits, of_target = _cross_entropy_magnitudes(call, *doubles, value, gos)
    # log p, of which a gradient by target consists, rounds at its own size.
    grads = dict(zip(call.differentiable, truth[1:], strict=True))
    return [
        of_value,
        *[of_logits if i == 0 else of_target + grads[i].abs() for i in call.differentiable],
    ]


def check(call: Call) -> int:
    """Compare the call, in each of its dtypes and modes; return how many calls that were."""
    _C.set_isa(call.isa)
    count = 0
    for dtype in call.dtypes:
        made = [None if spec is None else spec.make(dtype) for spec in call.tensors]
        doubles = [t.double() if t is not None and t.is_floating_point() else t for t in made]
        truth = magnitudes = None
        for mode in dict.fromkeys(("plain", *call.modes)):
            theirs_mode = "plain" if mode == "compiled" else mode
            theirs_error, theirs = call.outcome(call.torchs, made, theirs_mode)
            ours_error, ours = call.outcome(call.ours, made, mode)
            count += 1
            assert type(ours_error) is type(theirs_error), (dtype, mode, ours_error, theirs_error)
            assert len(ours) == len(theirs), (dtype, mode)
            if ours_error is not None:
                continue
            try:
                if call.is_spoilt or "softcap" in call.options:
                    _compare_loosely(call, mode, dtype, ours, theirs, doubles)
                    continue
                if truth is None:
                    _, (truth,) = call.outcome(call.torchs, doubles, "plain")
                    magnitudes = _magnitudes(call, doubles, truth)
                _compare(call, mode, dtype, ours, theirs, doubles, truth, magnitudes)
            except AssertionError as error:
                raise AssertionError(f"{dtype}, {mode}: {error}") from error
        again = [None if spec is None else spec.make(dtype) for spec in call.tensors]
        for t, before in zip(made, again, strict=True):
            assert t is None or is_same(t, before).all(), "an argument was written to"
    return count


def _compare_loosely(call, mode, dtype, ours, theirs, doubles) -> None:
    error, in_double = call.outcome(call.torchs, doubles, "plain" if mode == "compiled" else mode)
    # PyTorch takes a bias that does not fit at some strides, and at others not.
    if error is not None:
        in_double = [[t if t is None else t.double() for t in each] for each in theirs]
    # Of a gradient that cancels to nothing the terms are as large as what comes in.
    largest = largest_of(call.gradient_of(in_double[0][0]))
    for our, their, of_double in zip(ours, theirs, in_double, strict=True):
        for each in zip(our, their, of_double, strict=True):
            judge_loosely(*each, torch.bfloat16 if mode == "autocast" else dtype, largest)


def _compare(call, mode, dtype, ours, theirs, doubles, truth, magnitudes) -> None:
    low = torch.bfloat16 if mode == "autocast" and dtype != torch.float64 else None
    if call.op == "cross_entropy":
        low = None
    relu = call.op in ("linear", "mlp") and _is_undecided(call, doubles, dtype, low)
    largest = max([1.0, *[m.nan_to_num(0, 0, 0).max().item() for m in magnitudes if m.numel()]])
    slack = 4 * largest if "cross_entropy" in call.op else 64 * torch.finfo(dtype).eps
    # The weights of the targets may sum to 0, by which a mean is divided; or the loss is scaled by
    # infinity.
    is_any_infinity = "cross_entropy" in call.op and (
        (doubles[-1] is not None and not doubles[-1].all())
        or not call.gradient_of(truth[0]).isfinite().all()
    )
    if mode in modes.EXTRA:
        *ours, our_extra = ours
        *theirs, their_extra = theirs
        if not relu and dtype.itemsize > 2:
            _, in_double = call.outcome(call.torchs, doubles, mode)
            for each in zip(our_extra, their_extra, in_double[-1], strict=True):
                judge_loosely(*each)
    if mode == "twice":
        for each in zip(*ours, strict=True):
            assert each[0] is each[1] is None or is_same(*each).all(), "another second backward"
    for our, their in zip(ours, theirs, strict=True):
        assert len(our) == len(their)
        for i, (o, t) in enumerate(zip(our, their, strict=True)):
            if relu and i:
                assert (o.shape, o.dtype) == (t.shape, t.dtype)
                continue
            try:
                judge(o, t, truth[i], magnitudes[i], low, slack, is_any_infinity)
            except AssertionError as error:
                raise AssertionError(f"result {i}: {error}") from error


# Strategies


def _spec(draw, shape, kinds, **options) -> Spec:
    seed = draw(st.integers(0, 9999))
    return Spec(tuple(shape), draw(kinds), draw(random_tensors.layouts), seed=seed, **options)


finite_gradients, special_gradients = [
    st.builds(
        Spec,
        st.just(()),
        st.sampled_from(["normal"] * 4 + ["integers", "zero", last]),
        random_tensors.layouts,
        seed=st.integers(0, 9999),
    )
    for last in ("large", "special")
]
halves = st.sampled_from([torch.bfloat16, torch.float16])
mode_names = st.sampled_from([m for m in modes.MODES if m != "compiled"])
# Second derivatives are compared by rule of thumb.
mode_names_for_wild_numbers = mode_names.filter(lambda m: m not in modes.EXTRA)


@st.composite
def _common(draw, specs):
    specs = [s for s in specs if isinstance(s, Spec)]
    kinds = {s.kind for s in specs}
    is_tame = kinds == {"normal"}
    gradient = draw(special_gradients if "special" in kinds else finite_gradients)
    names = st.lists(mode_names if is_tame else mode_names_for_wild_numbers, max_size=3)
    chosen = tuple(draw(names))
    if modes.EXTRA.intersection(chosen):
        gradient = replace(gradient, kind="normal")
    dtypes = torch.float32, torch.float64, draw(halves)
    return {
        "modes": chosen,
        "gradient": gradient,
        "dtypes": dtypes,
        "isa": draw(random_tensors.isas),
    }


@st.composite
def _spoilt(draw, specs):
    """Change one thing, or nothing."""
    if draw(st.integers(0, 7)) != 7:
        return tuple(specs), False
    specs = list(specs)
    i = draw(st.sampled_from([i for i, s in enumerate(specs) if s is not None]))
    shape = list(specs[i].shape)
    how = draw(st.sampled_from(["longer", "shorter", "size", "dtype"]))
    if how == "dtype":
        choices = [
            torch.float64,
            torch.float16,
            torch.int64,
            torch.int16,
            torch.bool,
            torch.complex64,
        ]
        specs[i] = replace(specs[i], dtype=draw(st.sampled_from(choices)))
    elif how == "longer":
        specs[i] = replace(specs[i], shape=(*shape, draw(st.sampled_from([1, 2]))))
    elif shape:
        at = draw(st.integers(0, len(shape) - 1))
        shape[at : at + 1] = [] if how == "shorter" else [draw(st.sampled_from([0, 1, 2, 3]))]
        specs[i] = replace(specs[i], shape=tuple(shape))
    return tuple(specs), True


def _wanted(draw, specs, which) -> tuple[int, ...]:
    which = [
        i
        for i in which
        if specs[i] is not None and (specs[i].dtype or torch.float32).is_floating_point
    ]
    if draw(st.integers(0, 3)):
        return tuple(which)
    return tuple(i for i in which if draw(st.booleans()))


themes = st.sampled_from([random_tensors.FINITE, random_tensors.FINITE, random_tensors.SPECIAL])
shapes_of_rows = st.one_of(
    st.tuples(random_tensors.size),
    st.sampled_from([(), (130,), (140,)]),
    st.lists(st.sampled_from([0, 1, 2, 3, 5]), min_size=2, max_size=4).map(tuple),
)


@st.composite
def linears(draw):
    depth = draw(st.sampled_from([1, 1, 2, 3, 4]))
    sizes = [draw(random_tensors.size) for _ in range(depth + 1)]
    kinds = draw(themes)
    if depth > 1:  # where numbers of one layer underflow, those of another make much of it
        kinds = st.just(draw(st.sampled_from(["normal", "normal", "integers", "zero", "special"])))
    specs: list[Any] = [_spec(draw, (*draw(shapes_of_rows), sizes[0]), kinds)]
    for inputs, outputs in itertools.pairwise(sizes):
        specs.append(_spec(draw, (outputs, inputs), kinds))
        specs.append(_spec(draw, (outputs,), kinds) if draw(st.booleans()) else None)
    activations = tuple(draw(st.sampled_from(["relu", "none"])) for _ in range(depth))
    specs, is_spoilt = draw(_spoilt(specs))
    together = {"activations": activations}
    options = together if depth > 1 else {"activation": activations[0]}
    return Call(
        "linear" if depth == 1 else "mlp",
        specs,
        options,
        _wanted(draw, specs, range(len(specs))),
        is_spoilt=is_spoilt,
        **draw(_common(specs)),
    )


index_dtypes = st.sampled_from([torch.int64, torch.int64, torch.int32, torch.uint8])


@st.composite
def _losses(draw, shape, classes_dim, can_spoil):
    """Return a target and a class weight for logits of a shape, and the options."""
    classes = shape[classes_dim]
    smoothing = draw(st.sampled_from([0.0, 0.0, 0.1, 0.9, 1.0]))
    reduction = draw(st.sampled_from(["mean", "sum", "none"]))
    ignore_index = draw(st.sampled_from([-100, -100, -1, 0, 2, 300, -(2**40)]))
    if draw(st.integers(0, 2)) == 2:
        target: Any = _spec(draw, shape, st.just("normal"), makes="probabilities")
        ignore_index = -100
    else:
        target = Indices(
            shape[:classes_dim] + shape[classes_dim + 1 :],
            classes,
            ignore_index,
            draw(st.sampled_from([0.0, 0.3, 1.0])),
            draw(index_dtypes),
            draw(random_tensors.layouts),
            can_spoil and draw(st.integers(0, 19)) == 19,
            draw(st.integers(0, 9999)),
        )
    weight = None
    if draw(st.booleans()):
        kinds = st.sampled_from(["normal"] * 4 + ["integers"])
        weight = _spec(draw, (classes,), kinds, makes="positive")
    options = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": smoothing,
    }
    return target, weight, options


@st.composite
def cross_entropies(draw):
    classes = draw(random_tensors.size)
    rows = draw(shapes_of_rows)
    shape = (*rows[:1], classes, *rows[1:])
    target, weight, options = draw(_losses(shape, min(1, len(shape) - 1), True))
    specs, is_spoilt = draw(_spoilt([_spec(draw, shape, draw(themes)), target, weight]))
    if is_spoilt and draw(st.booleans()):
        changed = [("label_smoothing", 1.5), ("label_smoothing", -0.5), ("reduction", "max")]
        options |= [draw(st.sampled_from(changed))]
    which = [0, 1] if isinstance(specs[1], Spec) else [0]
    return Call(
        "cross_entropy",
        specs,
        options,
        _wanted(draw, specs, which),
        is_spoilt=is_spoilt or classes == 0 or (isinstance(target, Indices) and target.wrong),
        **draw(_common(specs)),
    )


@st.composite
def heads(draw):
    features, classes = draw(random_tensors.size), draw(random_tensors.size)
    rows = draw(st.one_of(st.tuples(random_tensors.size), st.sampled_from([(), (130,)])))
    outputs = (classes,)
    if rows and draw(st.integers(0, 4)) == 4:
        outputs += tuple(draw(st.lists(st.sampled_from([1, 2, 3]), min_size=1, max_size=2)))
    kinds = st.sampled_from(["normal"] * 5 + ["integers", "special", "zero"])
    target, weight, options = draw(_losses((*rows, *outputs), len(rows), True))
    if isinstance(target, Spec):
        options["ignore_index"] = None
    specs = (
        _spec(draw, (*rows, features), kinds),
        _spec(draw, (*outputs, features), kinds),
        target,
        _spec(draw, outputs, kinds) if draw(st.booleans()) else None,
        weight,
    )
    is_wrong = isinstance(target, Indices) and target.wrong
    if draw(st.integers(0, 2)) == 2:
        specs = tuple(replace(s, kind="normal") if isinstance(s, Spec) else s for s in specs)
        options["softcap"] = draw(st.sampled_from([None, 1.5, 30.0]))
        options["z_loss"] = draw(st.sampled_from([0.0, 0.01, 0.5]))
        options["return_lse"] = draw(st.booleans())
        if draw(st.booleans()):  # what kernels take
            specs = (*specs[:4], None)
            options["label_smoothing"] = 0.0
    which = [0, 1, 2, 3] if isinstance(target, Spec) else [0, 1, 3]
    return Call(
        "linear_cross_entropy",
        specs,
        options,
        _wanted(draw, specs, which),
        is_spoilt=is_wrong or classes == 0,
        **draw(_common(specs)),
    )


@pytest.mark.cpu_only("a class index out of range ends a CUDA kernel")
@pytest.mark.parametrize(
    ("calls", "share"),
    [(linears(), 0.2), (cross_entropies(), 0.2), (heads(), 0.2)],
    ids=["linear", "cross_entropy", "linear_cross_entropy"],
)
def test_random_calls(fuzz, calls, share):
    fuzz(calls, check, share)


def check_compiled(call: Call) -> int:
    if call.is_spoilt:
        return 0
    return check(replace(call, modes=("compiled",), dtypes=call.dtypes[:1]))


@pytest.mark.parametrize("share", [0.05])
def test_random_compiled_calls(fuzz, share):
    fuzz(st.one_of(linears(), cross_entropies(), heads()), check_compiled, share)
