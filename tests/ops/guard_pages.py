"""Every op on tensors that end, or begin, at an unmapped page: all tails of up to two vectors.

To be run on the allocator of guard_pages.c, under which operands, results and scratch memory lie
so: a read or write beyond one of them ends the process. The last line on stderr is the call.

    python guard_pages.py ISA
"""

import ctypes
import faulthandler
import itertools
import mmap
import sys

import torch

import mnist_ext
from mnist_ext import _C

op = torch.ops.mnist_ext
guards_begin = ctypes.c_int.in_dll(ctypes.CDLL(None), "guards_begin")  # of guard_pages.c
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def tails(dtype):
    """Return the sizes up to two of the largest vectors and one more, in the compute type.

    Every third of them where tensors begin behind the page, which tails hardly have to do with.
    """
    return range(1, 2 * (8 if dtype is torch.float64 else 16) + 2, 3 if guards_begin.value else 1)


def tensor(dtype, *shape):
    return torch.rand(shape).to(dtype)


def matrix(dtype, rows, columns, layout):
    """Lay it out row by row (0), column by column (1), or in rows that lie apart (2)."""
    if layout == 1:
        return tensor(dtype, columns, rows).t()
    apart = columns + 5 if layout == 2 else columns
    return torch.empty_strided((rows, columns), (apart, 1), dtype=dtype).copy_(
        tensor(dtype, rows, columns)
    )


def linear(dtype):
    """Dot products and outer products, packed or not, of one thread and of two."""
    calls = itertools.count()
    for n in tails(dtype):
        sizes = [(n, 3, 5), (3, n, 5), (5, 3, n), (n, n, n), (150, 40, n), (150, n, 40)]
        sizes += [(40 + n, 70, 90), (9, 70 + n, 90), (9, 70, 80 + n)]
        for batch, inputs, outputs in sizes:
            call = next(calls)
            x = matrix(dtype, batch, inputs, call % 3)
            weight = matrix(dtype, outputs, inputs, call // 3 % 3)
            relu = call % 2 == 0
            yield batch, inputs, outputs, call % 9
            y = op.linear(x, weight, tensor(dtype, outputs), relu)
            grad = matrix(dtype, batch, outputs, call % 2 * 2)
            op.linear_backward(grad, x, weight, y if relu else None, True)


def two_layers(dtype, most_rows):
    """Yield n, which is one of the sizes, batch and widths of two layers."""
    if dtype in FLOATS[:2]:
        for n in tails(dtype):
            sizes = [(n, 5, 3, 7), (5, n, 3, 7), (5, 3, n, 7), (5, 7, 3, n), (most_rows, n, n, n)]
            yield from ((n, *each) for each in sizes)


def mlp(dtype):
    for n, batch, *widths in two_layers(dtype, 150):
        yield batch, *widths
        x = tensor(dtype, batch, widths[0])
        weights = [tensor(dtype, b, a) for a, b in itertools.pairwise(widths)]
        biases = [tensor(dtype, b) for b in widths[1:]]
        layers = [3, 1 + 2 * (n % 2)]
        y, hidden = op.mlp(x, weights, biases, layers, True)
        output = y if n % 2 else None
        op.mlp_backward(tensor(dtype, *y.shape), x, hidden, output, weights, biases, layers, True)


def logits_of(dtype, n):
    """Yield rows, columns of positions, classes last, and classes that lie apart."""
    for shape in [(3, n), (n, 3), (8 + n, 5), (n, 2 * n), (2, n, 3), (2, 3, n), (1, n, n)]:
        yield tensor(dtype, *shape)
    yield tensor(dtype, 2, n, 5).movedim(-1, 1)
    yield matrix(dtype, 3, n, 2)
    apart = torch.empty_strided((2, 3, n), (4 * (n + 1) * 3, 2 * (n + 1), 1), dtype=dtype)
    yield apart.copy_(tensor(dtype, 2, 3, n))


def cross_entropy(dtype):
    calls = itertools.count()
    for n in tails(dtype):
        for logits in logits_of(dtype, n):
            call = next(calls)
            classes = logits.shape[1]
            shape = logits.shape[:1] + logits.shape[2:]
            index = [torch.int64, torch.int32, torch.uint8][call % 3]
            weight = tensor(dtype, classes) if call % 5 < 2 else None
            smoothing = 0.1 * (call % 2)
            for target in [torch.randint(classes, shape).to(index), tensor(dtype, *logits.shape)]:
                yield tuple(logits.shape), logits.stride(), target.dtype, call % 30
                wants_target = target.dtype is dtype
                args = logits, target, weight
                options = -100, smoothing
                loss, *found = op.cross_entropy(*args, *options, 0)
                grad = tensor(dtype, *loss.shape)
                op.cross_entropy_backward(grad, *args, *found, *options, 0, True, wants_target)
                _, gradient = op.cross_entropy_with_gradient(*args, *options, 1)
                op.cross_entropy_gradient_(
                    gradient, torch.tensor(2.0).to(dtype), *args, *options, 1
                )


def linear_cross_entropy(dtype):
    if dtype not in FLOATS[:2]:
        return
    for n in tails(dtype):
        sizes = [(n, 3, 5), (3, n, 5), (3, 5, n), (40, n, n)] + [(5, 3, 2048 + n)] * (n < 9)
        for (batch, inputs, classes), extended in itertools.product(sizes, (False, True)):
            yield batch, inputs, classes, extended
            op.linear_cross_entropy(
                *(
                    tensor(dtype, batch, inputs),
                    tensor(dtype, classes, inputs),
                    tensor(dtype, classes),
                ),
                *(torch.randint(classes, (batch,)), None if extended else tensor(dtype, classes)),
                *(-100, 0.0 if extended else 0.1 * (n % 2), 1, None, True, True, True),
                **({"softcap": 3.0, "z_loss": 0.1, "need_lse": True} if extended else {}),
            )


def sgd_step(dtype):
    for n, momentum in itertools.product(tails(dtype), (0.0, 0.9)):
        yield n, momentum
        params, grads, buffers = ([tensor(dtype, m) for m in (n, 3, 64 + n)] for _ in range(3))
        buffers = buffers if momentum else []
        op.sgd_step(
            params, grads, buffers, 0.1, momentum, 0.0, 0.01, momentum > 0, False, n % 2 == 0
        )


def train_steps(dtype):
    for n, batch, *widths in two_layers(dtype, 40):
        first, second = (torch.nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        model = torch.nn.Sequential(first, torch.nn.ReLU(), second).to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9 * (n % 2))
        criterion = torch.nn.CrossEntropyLoss()
        pixels = n % 2 == 1
        normalize = (0.5, 0.5) if pixels else None
        step = mnist_ext.TrainStep(model, criterion, optimizer, normalize=normalize)
        images = torch.randint(256, (2 * batch + 1, widths[0]), dtype=torch.uint8)
        images = images if pixels else images.to(dtype) / 255
        index = [torch.int64, torch.int32, torch.uint8][n % 3]
        labels = torch.randint(widths[-1], (len(images),)).to(index)
        yield batch, *widths
        step(images[-batch:], labels[-batch:])
        step.epoch(images, labels, batch, torch.randperm(len(images)) if n % 4 < 2 else None)


def products_on_tiles(dtype):
    """Products large enough for AMX: see use_amx."""
    if dtype is not torch.float32:
        return
    for n in range(0, 34):
        for batch, inputs, outputs in [
            (128 + n, 130, 160),
            (130, 128 + n, 160),
            (160, 130, 128 + n),
        ]:
            x = matrix(dtype, batch, inputs, n % 3)
            weight = matrix(dtype, outputs, inputs, n // 3 % 3)
            yield batch, inputs, outputs, n
            y = op.linear(x, weight, tensor(dtype, outputs), True)
            op.linear_backward(matrix(dtype, batch, outputs, n % 2 * 2), x, weight, y, True)


def main(isa):
    faulthandler.enable()
    torch.set_num_threads(2)
    _C.set_isa(isa)
    ops = [linear, mlp, cross_entropy, linear_cross_entropy, sgd_step, train_steps]
    if isa == "amx":  # the others are AVX-512's
        ops = [products_on_tiles]
    for guards_begin.value in (False, True):
        odd = torch.empty(3, dtype=torch.uint8)
        guarded = odd.data_ptr() + (0 if guards_begin.value else 3)
        assert guarded % mmap.PAGESIZE == 0, "tensors are not allocated by guard_pages.c"
        for function, dtype in itertools.product(ops, FLOATS):
            for case in function(dtype):
                side = "begin" if guards_begin.value else "end"
                print(isa, side, function.__name__, dtype, *case, file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1])
