"""The CUDA kernels against PyTorch eager and torch.compile, on a GPU.

    python benchmarks/gpu.py [--quick] [--csv FILE]

Every implementation's result is compared with float64 before anything is timed. What is timed is
the replay of a CUDA graph, so that Python and launches weigh on nobody; each graph goes through as
many inputs as no cache can hold. Implementations take turns. Times are medians in microseconds;
"ratio" is how many times as long an implementation takes as ours, the median of the ratio of each
turn. "rate" counts one read and one write of the logits, whatever an implementation really moves;
"limit" is its share of the rate of a large copy in the same run. "memory" is what a call needs
beyond its inputs, in sizes of the logits. SGD counts what it must read and write. Rows of linear:
see gpu_linear.py.

Training step: of the 784-128-64-10 model with ReLU, on batches that lie ready on the device, uint8
pixels for `mnist_ext.TrainStep`, which normalizes them, and float32 for the others. Launches count
here, as they do for users. Implementations: PyTorch eager; under torch.compile; its whole step as
one CUDA graph; ours as a call for each step, that as a caller's graph, and as `epoch`. Our two
calls replay the graph that TrainStep makes of its kernels, and are timed too by launches one by
one. The first losses of all are compared with those of TrainStep on the CPU. "rate" counts the
step's arithmetic.
"""

import argparse
import copy as copying
import functools
import math
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import gpu_linear
import torch
import torch.nn.functional as F
from graphs import MICROSECONDS_PER_GRAPH, graph_of
from provenance import describe, fields
from table import Table

import mnist_ext
from mnist_ext import functional
from mnist_ext.app.bench.timing import take_turns
from mnist_ext.app.training.models import mlp

SHAPES = [
    *((8192, n) for n in (4096, 8192, 32_000, 65_536, 128_256)),
    (4096, 262_144),
    (1_000_000, 10),
    (200_000, 256),
    (65_536, 1000),
    (64, 10),
]
QUICK = [(8192, 32_000), (1_000_000, 10), (65_536, 1000), (64, 10)]
DTYPES = [torch.bfloat16, torch.float32]
COPY_BYTES = 4 << 30
BATCH_SIZES = [1, 16, 64, 256, 1024, 4096]
NORMALIZE = (0.1307, 0.3081)
CHECKED_STEPS, TIMED_STEPS = 20, 400

COLUMNS = {
    "what": "<28",
    "shape": "<16",
    "dtype": "<9",
    "implementation": "<16",
    "us": ">10.1f",
    "p20": ">10.1f",
    "p80": ">10.1f",
    "ratio": ">7.2f",
    "rate": ">8.1f",
    "unit": "<8",
    "limit": ">6.2f",
    "memory": ">7.2f",
    "error": ">9.1e",
}


def extra_memory(call: Callable[[], object]) -> int:
    """Return the bytes that a call needs at most beyond what is allocated before it."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def copy_rate() -> float:
    """Return the bytes read and written per second by a large copy."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    times = take_turns({"copy": graph_of([lambda: target.copy_(source)], 1)})
    return 2 * COPY_BYTES / times.percentiles("copy")[1]


def forward_backward(op: Callable[..., torch.Tensor]) -> Callable[..., tuple]:
    def run(logits: torch.Tensor, target: torch.Tensor) -> tuple:
        loss = op(logits, target)
        return loss, *torch.autograd.grad(loss, logits)

    return run


def check(name: str, result: tuple, logits: torch.Tensor, target: torch.Tensor) -> None:
    rows = slice(0, 64)  # of the gradient; the loss needs every row, a part at a time
    part = max(1, 2**25 // logits.shape[1])
    loss = sum(
        F.cross_entropy(x.detach().double(), t, reduction="sum")
        for x, t in zip(logits.split(part), target.split(part), strict=True)
    ) / len(target)
    probabilities = logits[rows].detach().double().softmax(1)
    gradient = probabilities - F.one_hot(target[rows], logits.shape[1])
    expected = loss, gradient / len(target)
    tolerance = 2 * torch.finfo(logits.dtype).eps
    for found, true in zip((result[0], result[1][rows]), expected, strict=True):
        error = ((found.double() - true).abs().max() / true.abs().max()).item()
        # Eager rounds the log-probabilities to the dtype, and is allowed that.
        allowed = tolerance if name == "ours" else 32 * tolerance
        if not error <= max(allowed, 1e-5):
            raise SystemExit(f"{name} is wrong at {list(logits.shape)}: relative error {error:.3g}")


def cross_entropy(table: Table, shape: tuple[int, int], dtype: torch.dtype, copy: float) -> None:
    rows, classes = shape
    size = rows * classes * dtype.itemsize
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    free = torch.cuda.mem_get_info()[0]
    count = max(1, min(math.ceil(2 * cache / size), int(free * 0.2 // size), 64))
    inputs = [
        (
            (torch.randn(shape, device="cuda") * 2).to(dtype).requires_grad_(),
            torch.randint(0, classes, (rows,), device="cuda"),
        )
        for _ in range(count)
    ]
    for what in ("cross_entropy forward", "cross_entropy fwd+bwd"):
        peers: dict[str, Callable[..., tuple]] = {}
        for name, op in (("ours", functional.cross_entropy), ("eager", F.cross_entropy)):
            peers[name] = forward_backward(op) if "bwd" in what else op
        torch._dynamo.reset()
        peers["torch.compile"] = torch.compile(peers["eager"], dynamic=False)
        calls = {}
        memory = {}
        for name, peer in peers.items():
            if "bwd" in what:
                check(name, peer(*inputs[0]), *inputs[0])
                calls[name] = [lambda p=peer, i=i: p(*i) for i in inputs]
            else:
                calls[name] = [lambda p=peer, i=i: p(i[0].detach(), i[1]) for i in inputs]
            memory[name] = extra_memory(calls[name][0]) / size
        estimate = count * (2 * size / copy * 1e6 + 3)
        repeats = max(1, math.ceil(MICROSECONDS_PER_GRAPH / estimate))
        moved = (2 if "bwd" in what else 1) * size
        add_rows(
            table,
            {name: graph_of(c, repeats) for name, c in calls.items()},
            count * repeats,
            moved,
            copy,
            memory,
            {"what": what, "shape": f"{rows}x{classes}", "dtype": str(dtype).split(".")[1]},
        )


def sgd(table: Table, copy: float) -> None:
    """One step with momentum over the MNIST model, and over one large layer."""
    for sizes in ([100_352, 128, 8192, 64, 640, 10], [2**26]):
        calls = {}
        for name, optimizer_class, options in (
            ("ours", mnist_ext.optim.SGD, {}),
            ("eager foreach", torch.optim.SGD, {"foreach": True}),
            ("eager fused", torch.optim.SGD, {"fused": True}),
        ):
            params = [torch.nn.Parameter(torch.randn(n, device="cuda")) for n in sizes]
            for p in params:
                p.grad = torch.randn_like(p)
            optimizer = optimizer_class(params, lr=0.01, momentum=0.9, **options)
            optimizer.step()
            calls[name] = optimizer.step
        moved = 5 * 4 * sum(sizes)
        repeats = max(1, math.ceil(MICROSECONDS_PER_GRAPH / (moved / copy * 1e6 + 3)))
        graphs = {name: graph_of([call], repeats) for name, call in calls.items()}
        row = {"what": "SGD with momentum", "shape": str(sum(sizes)), "dtype": "float32"}
        add_rows(table, graphs, repeats, moved, copy, {}, row)


Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def captured(step: Step, model: torch.nn.Module, images, labels) -> Step:
    """Return the step as one CUDA graph over inputs of its own."""
    x, y = images.clone(), labels.clone()
    before = copying.deepcopy(model.state_dict())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(x, y)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(x, y)
    model.load_state_dict(before)

    def replay(images, labels):
        x.copy_(images)
        y.copy_(labels)
        graph.replay()
        return loss

    return replay


def eager_step(model: torch.nn.Module, compiled: bool = False) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def loss_of(images, labels):
        return F.cross_entropy(model(images), labels)

    function = torch.compile(loss_of, dynamic=False) if compiled else loss_of

    def step(images, labels):
        optimizer.zero_grad()
        loss = function(images, labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def one_call(model: torch.nn.Module, graphs: bool = True) -> mnist_ext.TrainStep:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    criterion = torch.nn.CrossEntropyLoss()
    with mock.patch.object(mnist_ext.train_step, "_REPLAYS_GRAPHS", graphs):
        return mnist_ext.TrainStep(model, criterion, optimizer, normalize=NORMALIZE)


def training_step(table: Table, batch_size: int) -> None:
    torch.manual_seed(0)
    number = max(2, min(64, 16384 // batch_size))
    pixels = torch.randint(0, 256, (number, batch_size, 28, 28), dtype=torch.uint8)
    labels = torch.randint(0, 10, (number, batch_size))
    model = mlp((128, 64), "relu")
    on_cpu = one_call(copying.deepcopy(model))
    expected = [float(on_cpu(pixels[i % number], labels[i % number])) for i in range(CHECKED_STEPS)]
    model, pixels, labels = model.cuda(), pixels.cuda(), labels.cuda()
    images = (pixels[:, :, None] / 255 - NORMALIZE[0]) / NORMALIZE[1]
    torch._dynamo.reset()
    eager = copying.deepcopy(model)
    graph_models = [copying.deepcopy(model) for _ in range(2)]
    order = torch.arange(number * batch_size, device="cuda")
    order = order.repeat(-(-TIMED_STEPS // number))[: TIMED_STEPS * batch_size]

    def run_epoch(step: mnist_ext.TrainStep, steps: int) -> float:
        images_and_labels = pixels.flatten(0, 1), labels.flatten()
        return step.epoch(*images_and_labels, batch_size, order[: steps * batch_size])

    steps = {
        "eager": (eager_step(eager), images),
        "torch.compile": (eager_step(copying.deepcopy(model), compiled=True), images),
        "graph of eager": (
            captured(eager_step(graph_models[0]), graph_models[0], images[0], labels[0]),
            images,
        ),
        "ours": (one_call(copying.deepcopy(model)), pixels),
        "ours launches": (one_call(copying.deepcopy(model), graphs=False), pixels),
        "graph of ours": (
            captured(one_call(graph_models[1]), graph_models[1], pixels[0], labels[0]),
            pixels,
        ),
    }
    for name, (step, x) in steps.items():
        found = [float(step(x[i % number], labels[i % number])) for i in range(CHECKED_STEPS)]
        if not all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(found, expected, strict=True)):
            raise SystemExit(f"{name} is wrong at batch {batch_size}: losses {found}")
    epochs = {
        "ours epoch": one_call(copying.deepcopy(model)),
        "epoch launches": one_call(copying.deepcopy(model), graphs=False),
    }
    for name, epoch in epochs.items():
        mean = run_epoch(epoch, CHECKED_STEPS)
        if not math.isclose(mean, sum(expected) / CHECKED_STEPS, rel_tol=1e-3):
            raise SystemExit(f"{name} is wrong at batch {batch_size}: mean loss {mean}")

    def timed(step: Step, x: torch.Tensor) -> Callable[[], None]:
        def run() -> None:
            for i in range(TIMED_STEPS):
                step(x[i % number], labels[i % number])
            torch.cuda.synchronize()

        return run

    runs = {name: timed(*step) for name, step in steps.items()}
    for name, epoch in epochs.items():
        runs[name] = functools.partial(run_epoch, epoch, TIMED_STEPS)
    times = take_turns(runs, table.turns)
    operations = 2.0 * batch_size * (2 * 784 * 128 + 3 * (128 * 64 + 64 * 10))
    for name in runs:
        p20, median, p80 = (t / TIMED_STEPS * 1e6 for t in times.percentiles(name))
        table.add(
            what="training step",
            shape=f"batch {batch_size}",
            dtype="float32",
            implementation=name,
            us=median,
            p20=p20,
            p80=p80,
            ratio=times.ratio(name, to="ours")[1],
            rate=operations / median / 1e3,
            unit="GFLOP/s",
            limit=None,
            memory=None,
        )


def add_rows(table, graphs, calls, moved, copy, memory, row) -> None:
    times = take_turns(graphs, table.turns)
    for name in graphs:
        p20, median, p80 = (t / calls * 1e6 for t in times.percentiles(name))
        rate = moved / median * 1e6
        table.add(
            **row,
            implementation=name,
            us=median,
            p20=p20,
            p80=p80,
            ratio=times.ratio(name, to="ours")[1],
            rate=rate / 1e9,
            unit="GB/s",
            limit=rate / copy,
            memory=memory.get(name),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the CUDA kernels against PyTorch.")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and turns")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the rows there too")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu.py: no CUDA device: run it on a machine with one (make gpu)")
    if mnist_ext.build_info()["cuda"] is None:
        raise SystemExit(f"gpu.py: {mnist_ext.build_info()['cuda_reason']}")
    gpu = {
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "built_with": mnist_ext.build_info()["cuda_reason"],
    }
    print(describe())
    print(", ".join(map(str, gpu.values())))
    copy = copy_rate()
    print(f"copy of {COPY_BYTES >> 30} GiB: {copy / 1e9:.0f} GB/s read + written\n")
    table = Table(COLUMNS, {**fields(), **gpu}, turns=7 if args.quick else 15)
    table.header()
    for dtype in DTYPES:
        for shape in QUICK if args.quick else SHAPES:
            cross_entropy(table, shape, dtype, copy)
            torch.cuda.empty_cache()
    sgd(table, copy)
    gpu_linear.products(table, args.quick)
    gpu_linear.autograd(table)
    for batch_size in [1, 64, 4096] if args.quick else BATCH_SIZES:
        training_step(table, batch_size)
    if args.csv:
        table.write(args.csv)


if __name__ == "__main__":
    main()
