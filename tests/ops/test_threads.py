"""Many Python threads that call all ops at once get the bits of one that calls them alone.

Beside them in the same threads: TrainStep, the ordinary loop, and PyTorch's own ops, which share
OpenMP's threads and the allocator. 50 threads and every case: `make endure`.
"""

import copy
import random
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import op_cases
import pytest
import torch
import torch.nn.functional as F
import train_loops
from op_cases import FLOATS, Case, value_and_gradients
from torch import Tensor, nn

from mnist_ext.app.training.models import mlp

Task = Callable[[], list[Tensor]]


def _of_shapes(*shapes: tuple[int, ...] | Tensor) -> Callable[[torch.dtype], list[Tensor]]:
    return lambda dtype: [
        shape if isinstance(shape, Tensor) else torch.randn(shape).to(dtype) for shape in shapes
    ]


# Of a size that several threads of OpenMP share, in each Python thread.
LARGE = [
    Case("large", "linear", _of_shapes((600, 130), (150, 130)), {"activation": "relu"}, (0, 1)),
    Case(
        "large",
        "mlp",
        _of_shapes((600, 130), (90, 130), (90,), (70, 90), (70,)),
        {"activations": ("relu", "none")},
        (0, 1, 2, 3, 4),
    ),
    Case("large", "cross_entropy", _of_shapes((3000, 50), torch.arange(3000) % 50), {}, (0,)),
    Case("large", "cross_entropy", _of_shapes((4, 50, 30, 30), (4, 50, 30, 30)), {}, (0, 1)),
    Case(
        "large",
        "linear_cross_entropy",
        lambda dtype: [*_of_shapes((300, 64), (900, 64), torch.arange(300))(dtype), None, None],
        {},
        (0, 1),
    ),
]


def of_case(case: Case, dtype: torch.dtype) -> Task:
    tensors = case.tensors(dtype)
    return lambda: value_and_gradients(case.ours, case, tensors)


def training(way: str) -> Task:
    """Return a task that trains a copy of a model, in batches of which OpenMP's threads share."""
    model = mlp((128, 64), "relu")
    images, labels = train_loops.batches(6, 200)

    def train() -> list[Tensor]:
        trained = copy.deepcopy(model)
        step, loop = train_loops.pair(trained, sgd={"momentum": 0.9})
        if way == "epoch":
            step.epoch(images.flatten(0, 1), labels.flatten(), 150)
            return [*trained.parameters()]
        if way == "ordinary loop":
            step, trained = lambda x, y: train_loops.ordinary_step(*loop, x, y), loop[0]
        losses = [step(x, y) for x, y in zip(images, labels, strict=True)]
        return [*losses, *trained.parameters()]

    return train


def of_torch() -> dict[str, Task]:
    """Return tasks for oneDNN, MKL and PyTorch's own loops."""
    image, kernel = torch.randn(8, 3, 40, 40), torch.randn(16, 3, 3, 3)
    a, b = torch.randn(300, 200), torch.randn(200, 300)
    query = torch.randn(2, 4, 100, 32)
    lstm = nn.LSTM(20, 30)

    def convolution() -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (image, kernel)]
        value = F.conv2d(*leaves)
        return [value, *torch.autograd.grad(value.square().mean(), leaves)]

    return {
        "conv2d": convolution,
        "mm": lambda: [a @ b],
        "bfloat16 mm": lambda: [a.bfloat16() @ b.bfloat16()],
        "attention": lambda: [F.scaled_dot_product_attention(query, query, query)],
        "lstm": lambda: [lstm(image[..., :20].flatten(0, 1))[0]],
        "log_softmax": lambda: [a.log_softmax(1), a.sum(0), a.exp()],
    }


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


@pytest.mark.cpu_only("the emulator is not for threads of Python")
@pytest.mark.usefixtures("every_kernel")
def test_many_at_once_get_the_bits_of_one(long, monkeypatch):
    threads = 50 if long else 8
    cases = [*(op_cases.CASES if long else op_cases.FEW), *LARGE]
    dtypes = FLOATS if long else [torch.float32, torch.bfloat16]
    tasks = {f"{c} {i} {d}": of_case(c, d) for i, c in enumerate(cases) for d in dtypes}
    tasks |= {way: training(way) for way in ("TrainStep", "epoch", "ordinary loop")}
    tasks |= of_torch()
    alone = {name: list(map(bits, task())) for name, task in tasks.items()}
    start = threading.Barrier(threads)

    def work(number: int) -> list[str]:
        """Return which tasks, in an order of this thread's own, gave other bits."""
        names = list(tasks)
        random.Random(number).shuffle(names)
        start.wait()
        return [
            name
            for name in names
            if not all(map(torch.equal, map(bits, tasks[name]()), alone[name]))
        ]

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # as often as it can be asked for
    try:
        with ThreadPoolExecutor(threads) as pool:
            others = [name for names in pool.map(work, range(threads)) for name in names]
    finally:
        sys.setswitchinterval(before)
    print(f"{threads} threads, {len(tasks)} tasks each")
    assert others == []
