"""Draws what the README shows from the rows of benchmarks/results.

    python benchmarks/plot.py --training FILE --kernels FILE --commits FILE FILE... [--folder docs]

step.svg: a training step, by implementation and, where it was measured, by part. roofline.svg: each
product of a linear layer against what the machine can do with that many operations per byte.
commits.svg: a training step over the commits that it was measured at on one make of CPU.
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
# The same rows give the same bytes; texts stay texts.
SVG = {"svg.hashsalt": "mnist_ext", "svg.fonttype": "none", "font.size": 9}
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


def draw_commits(runs: list[Rows], path: Path) -> None:
    """Draw what one make of CPU gains over PyTorch's step, over commits: each run is of one."""
    eager = []
    for rows in runs:
        steps = [r for r in rows if (r["implementation"], r["part"]) == ("torch", "step")]
        eager.append({r["batch"]: r for r in steps if r["activation"] == "relu"})
    figure, grid = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    for axes, ratio, name in zip(
        grid, ("ratio", "to_one_call"), ("The loop, swapped", "TrainStep"), strict=True
    ):
        for batch in sorted(set().union(*eager), key=int):
            x = [i for i, steps in enumerate(eager) if batch in steps]
            points = [eager[i][batch] for i in x]
            (line,) = axes.plot(x, [float(r[ratio]) for r in points], "o-", ms=3, label=batch)
            if ratio == "ratio":
                low, high = ([float(r[f"ratio_{end}"]) for r in points] for end in ("p20", "p80"))
                axes.fill_between(x, low, high, alpha=0.15, color=line.get_color())
        axes.axhline(1, color="black", lw=0.8)
        axes.set_ylim(0)
        ticks = [f"{rows[0]['commit'][:7]}\n{rows[0]['date']}" for rows in runs]
        axes.set_xticks(range(len(runs)), ticks, fontsize=7)
        axes.set_title(f"{name}: times as fast as eager")
    grid[0].legend(title="batch", frameon=False, ncols=2)
    grid[1].spines[["top", "right"]].set_visible(False)
    last = runs[-1][0]
    finish(figure, grid[0], path, f"{last['cpu']}, {last['threads']} threads, {last['isa']}")


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
    parser.add_argument(
        "--commits", type=Path, nargs="+", help="rows of training.py, the oldest first"
    )
    parser.add_argument("--folder", type=Path, default=Path("docs"), help="where to draw")
    args = parser.parse_args()
    mpl.rcParams.update(SVG)
    if args.training:
        draw_step(read(args.training), args.folder / "step.svg")
    if args.kernels:
        draw_roofline(read(args.kernels), args.folder / "roofline.svg")
    if args.commits:
        draw_commits([read(path) for path in args.commits], args.folder / "commits.svg")


if __name__ == "__main__":
    main()
