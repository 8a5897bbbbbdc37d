"""Draws what the README shows from the rows of benchmarks/results.

    python benchmarks/plot.py --training FILE --kernels FILE [--folder docs]
    python benchmarks/plot.py --training FILE --kernels FILE --memory FILE --sweep docs/NAME.svg

step.svg: a training step, by implementation and, where it was measured, by part. roofline.svg: each
product of a linear layer against what the machine can do with that many operations per byte.
--sweep: the same six graphs for any machine, of rows of training.py, kernels.py (autograd,
cross_entropy) and head_memory.py: speed over sizes, error against float64, memory.
"""

import argparse
import csv
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt

PARTS = {
    "zero_grad": "#bab0ac",
    "forward": "#4e79a7",
    "loss": "#edc948",
    "backward": "#e15759",
    "optimizer": "#59a14f",
}
NAMES = {
    "torch": "PyTorch eager",
    "torch.compile": "torch.compile",
    "compile max-autotune": "torch.compile, max-autotune",
    "jax scan": "JAX, lax.scan",
    "ours": "mnist_ext",
    "our kernels alone": "our kernels alone",
    "ours TrainStep": "mnist_ext.TrainStep",
    "ours epoch": "TrainStep.epoch",
}
# Of a sweep; one colour each in all graphs, ours on top.
COLORS = {
    "torch": ("PyTorch eager", "#4e79a7"),
    "torch.compile": ("torch.compile", "#76b7b2"),
    "jax": ("JAX", "#f28e2b"),
    "chunked": ("PyTorch, chunked", "#b07aa1"),
    "ours": ("mnist_ext", "#e15759"),
    "ours TrainStep": ("mnist_ext.TrainStep", "#9c1f24"),
}
Rows = list[dict[str, str]]


def read(path: Path) -> Rows:
    with path.open() as file:
        return list(csv.DictReader(file))


def source(row: dict[str, str]) -> str:
    return (
        f"{row['cpu']}, {row['threads']} threads, {row['isa']}, torch {row['torch']}, "
        f"commit {row['commit']}, {row['date']}"
    )


def draw_step(rows: Rows, path: Path, batch: str = "64", activation: str = "relu") -> None:
    rows = [r for r in rows if r["batch"] == batch and r["activation"] == activation]
    names = [name for name in NAMES if any(r["implementation"] == name for r in rows)]
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for y, name in enumerate(names):
        us = {r["part"]: float(r["us"]) for r in rows if r["implementation"] == name}
        left = 0.0
        for part, color in PARTS.items():
            if part in us:
                axes.barh(y, us[part], left=left, color=color, label=part)
                left += us[part]
        if left == 0:
            left = us["step"]
            axes.barh(y, left, color="#9c9ede")
        axes.text(left, y, f" {left:.0f}", va="center")
    axes.set_yticks(range(len(names)), [NAMES[name] for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("microseconds")
    axes.set_title(f"One training step of 784-128-64-10 with ReLU, batch {batch}")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    axes.legend(handles.values(), handles.keys(), loc="lower right", frameon=False)
    finish(figure, axes, path, source(rows[0]))


def draw_roofline(rows: Rows, path: Path) -> None:
    """Draw the products of `linear`; the roof over them is of the rows' own limits."""
    products = [r for r in rows if r["unit"] == "GFLOP/s" and r["what"].startswith("linear ")]
    moved = [r for r in rows if r["unit"] == "GB/s" and r["what"].startswith("cross_entropy")]
    peak = max(float(r["rate"]) / float(r["limit"]) for r in products)
    bandwidth = max(float(r["rate"]) / float(r["limit"]) for r in moved)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    roof = [0.25, peak / bandwidth, 1024]
    axes.plot(roof, [min(peak, x * bandwidth) for x in roof], color="black", lw=1)
    axes.text(1024, peak * 1.5, f"large product, {peak:.0f} GFLOP/s ", ha="right")
    axes.text(0.3, 0.3 * bandwidth * 1.5, f"large copy, {bandwidth:.0f} GB/s", rotation=33)
    for ours, color, label in ((False, "#9aa5b1", "PyTorch eager"), (True, "#e15759", "mnist_ext")):
        points = []
        for r in products:
            if r["implementation"].startswith("ours") is ours:
                m, k, n = map(int, r["shape"].split("x"))
                points.append((2 * m * k * n / (4 * (m * k + k * n + m * n)), float(r["rate"])))
        axes.scatter(*zip(*points, strict=True), s=14, color=color, label=label, alpha=0.8)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("FLOP per byte of operands and result")
    axes.set_ylabel("GFLOP/s")
    shapes = len({r["shape"] for r in products})
    axes.set_title(f"Linear layers as ops: forward and gradients, {shapes} shapes")
    axes.legend(loc="lower right", frameon=False)
    finish(figure, axes, path, source(products[0]))


def draw_curves(axes, rows: Rows, size, value, band: bool = True) -> None:
    """Draw a curve for each implementation: value(row, microseconds) over size(row)."""
    for name, (label, color) in COLORS.items():
        points = sorted((r for r in rows if r["implementation"] == name), key=size)
        if not points:
            continue
        x = [size(r) for r in points]
        axes.plot(x, [value(r, r.get("us")) for r in points], "o-", ms=3, color=color, label=label)
        if band:  # the 20th to the 80th percentile
            low, high = ([value(r, r[p]) for r in points] for p in ("p20", "p80"))
            axes.fill_between(x, low, high, color=color, alpha=0.2, lw=0)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1024:g}K" if x >= 1024 else f"{x:g}")


def draw_sweep(training: Rows, kernels: Rows, memory: Rows, path: Path) -> None:
    def share_of_limit(row, us) -> float:
        return 100 * float(row["limit"]) * float(row["us"]) / float(us)

    def first_size(row) -> int:
        return int(row["shape"].split("x")[0])

    def mebibytes(row) -> float:
        return first_size(row) * int(row["shape"].split("x")[1]) / 2**18

    squares = [
        r
        for r in kernels
        if r["what"] == "linear forward + backward" and len(set(r["shape"].split("x"))) == 1
    ]
    losses = [r for r in kernels if r["what"] == "cross_entropy forward + backward"]
    steps = [
        {**r, "implementation": r["implementation"].replace("jax scan", "jax")}
        for r in training
        if r["part"] == "step"
    ]
    figure, grid = plt.subplots(2, 3, figsize=(11, 6.4), layout="constrained")
    (speed, loss_speed, step_speed), (error, loss_error, of_memory) = grid

    draw_curves(speed, squares, first_size, share_of_limit)
    speed.set(
        title="Linear layer, forward and backward",
        xlabel="rows = features in = out",
        ylabel="% of the largest sgemm's FLOP/s",
        ylim=0,
    )
    draw_curves(loss_speed, losses, mebibytes, share_of_limit)
    loss_speed.set(
        title="Cross-entropy, forward and backward",
        xlabel="MiB of logits",
        ylabel="% of a large copy's bytes/s",
        ylim=0,
    )
    draw_curves(
        step_speed, steps, lambda r: int(r["batch"]), lambda r, us: int(r["batch"]) / float(us)
    )
    step_speed.set(
        title="Training step, 784-128-64-10",
        xlabel="batch",
        yscale="log",
        ylabel="million images a second",
    )
    draw_curves(error, squares, first_size, lambda r, _: float(r["error"]), band=False)
    draw_curves(loss_error, losses, mebibytes, lambda r, _: float(r["error"]), band=False)
    for axes, xlabel in ((error, "rows = features in = out"), (loss_error, "MiB of logits")):
        axes.set(
            title="Error of the gradients",
            xlabel=xlabel,
            ylim=0,
            ylabel="root mean square, share of theirs",
        )
    draw_curves(
        of_memory,
        memory,
        lambda r: int(r["shape"].split("x")[2]),
        lambda r, _: float(r["bytes"]) / 2**20,
        band=False,
    )
    rows, features, _ = memory[0]["shape"].split("x")
    of_memory.set(
        title=f"Memory of a last layer and its loss, {rows} rows of {features}",
        xlabel="classes",
        yscale="log",
        ylabel="MiB beside arguments and gradients",
    )
    handles = {}
    for axes in grid.flat:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=6, frameon=False
    )
    finish(figure, speed, path, source(squares[0]))


def finish(figure, axes, path: Path, text: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(text, fontsize=7, color="gray")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--training", type=Path, help="rows of training.py")
    parser.add_argument("--kernels", type=Path, help="rows of kernels.py")
    parser.add_argument("--memory", type=Path, help="rows of head_memory.py")
    parser.add_argument("--sweep", type=Path, help="draw the graphs of one machine to this file")
    parser.add_argument("--folder", type=Path, default=Path("docs"), help="where to draw")
    args = parser.parse_args()
    mpl.rcParams.update({"svg.hashsalt": "mnist_ext", "svg.fonttype": "none", "font.size": 9})
    if args.sweep:
        draw_sweep(read(args.training), read(args.kernels), read(args.memory), args.sweep)
        return
    if args.training:
        draw_step(read(args.training), args.folder / "step.svg")
    if args.kernels:
        draw_roofline(read(args.kernels), args.folder / "roofline.svg")


if __name__ == "__main__":
    main()
