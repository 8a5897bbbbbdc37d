"""Draws the same six graphs of any machine: speed over sizes, error against float64, memory.

    python benchmarks/plot_sweep.py --training FILE --kernels FILE --memory FILE docs/NAME.svg

Of rows of training.py, of kernels.py (autograd, cross_entropy) and of head_memory.py. Bands reach
from the 20th to the 80th percentile.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from plot import SVG, Rows, finish, read, source

# One colour each in all graphs.
IMPLEMENTATIONS = {
    "torch": ("PyTorch eager", "#4e79a7"),
    "torch.compile": ("torch.compile", "#76b7b2"),
    "jax": ("JAX", "#f28e2b"),
    "jax scan": ("JAX", "#f28e2b"),
    "chunked": ("PyTorch, chunked", "#b07aa1"),
    "ours": ("mnist_ext", "#e15759"),
    "ours TrainStep": ("mnist_ext.TrainStep", "#9c1f24"),
}
Row = dict[str, str]


def draw(axes, rows: Rows, size: Callable[[Row], int], value: Callable[[Row, str], float]) -> None:
    """Draw a curve for each implementation: value(row, microseconds) over size(row)."""
    for name, (label, color) in IMPLEMENTATIONS.items():
        points = sorted((r for r in rows if r["implementation"] == name), key=size)
        if not points:
            continue
        x = [size(r) for r in points]
        y = [value(r, r.get("us", "")) for r in points]
        axes.plot(x, y, "o-", ms=3, color=color, label=label)
        if "p20" in points[0]:
            low, high = ([value(r, r[p]) for r in points] for p in ("p20", "p80"))
            axes.fill_between(x, low, high, color=color, alpha=0.2, lw=0)


def count_in_powers_of_two(axes) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1024:g}K" if x >= 1024 else f"{x:g}")


def sizes(row: Row) -> list[int]:
    return [int(size) for size in row["shape"].split("x")]


def share_of_limit(row: Row, us: str) -> float:
    return 100 * float(row["limit"]) * float(row["us"]) / float(us)


def error(row: Row, _: str) -> float:
    return float(row["error"])


def draw_linear(speed, errors, kernels: Rows) -> Row:
    """Draw square layers, as many rows as features; return a row of theirs."""
    rows = [r for r in kernels if r["what"] == "linear forward + backward"]
    rows = [r for r in rows if len(set(sizes(r))) == 1]
    draw(speed, rows, lambda r: sizes(r)[0], share_of_limit)
    draw(errors, rows, lambda r: sizes(r)[0], error)
    speed.set(title="Linear layer, forward and backward", ylabel="% of a large sgemm's FLOP/s")
    for axes in (speed, errors):
        axes.set(xlabel="rows = features in = features out")
        count_in_powers_of_two(axes)
    return rows[0]


def draw_cross_entropy(speed, errors, kernels: Rows) -> None:
    rows = [r for r in kernels if r["what"] == "cross_entropy forward + backward"]
    shapes = list(dict.fromkeys(r["shape"] for r in rows))
    draw(speed, rows, lambda r: shapes.index(r["shape"]), share_of_limit)
    rows = [r for r in rows if r["error"]]
    draw(errors, rows, lambda r: shapes.index(r["shape"]), error)
    speed.set(title="Cross-entropy, forward and backward", ylabel="% of a large copy's bytes/s")
    for axes in (speed, errors):
        axes.set(xlabel="rows x classes")
        axes.set_xticks(range(len(shapes)), [shape.replace("x", "\nx ") for shape in shapes])


def draw_steps(axes, training: Rows) -> None:
    rows = [r for r in training if r["part"] == "step"]
    draw(axes, rows, lambda r: int(r["batch"]), lambda r, us: int(r["batch"]) / float(us))
    axes.set(title="Training step, 784-128-64-10", xlabel="batch", yscale="log")
    axes.set(ylabel="million images a second")
    count_in_powers_of_two(axes)


def draw_memory(axes, memory: Rows) -> None:
    rows, features, _ = sizes(memory[0])
    draw(axes, memory, lambda r: sizes(r)[2], lambda r, _: float(r["bytes"]) / 2**20)
    axes.set(title="Memory of a last layer and its loss", yscale="log")
    axes.set(xlabel=f"classes, of {rows} rows of {features} features")
    axes.set(ylabel="MiB beside arguments, gradients")
    count_in_powers_of_two(axes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("training", "kernels", "memory"):
        parser.add_argument(f"--{name}", type=Path, required=True, metavar="FILE")
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    mpl.rcParams.update(SVG)
    figure, grid = plt.subplots(2, 3, figsize=(11, 6.4), layout="constrained")
    kernels = read(args.kernels)
    row = draw_linear(grid[0, 0], grid[1, 0], kernels)
    draw_cross_entropy(grid[0, 1], grid[1, 1], kernels)
    draw_steps(grid[0, 2], read(args.training))
    draw_memory(grid[1, 2], read(args.memory))
    for axes in grid[0, :2]:
        axes.set_ylim(0)
    for axes in grid[1, :2]:
        axes.set(
            title="Error of its gradients", ylabel="root mean square, as a share", yscale="log"
        )
    legend = {}
    for axes in grid.flat:
        axes.spines[["top", "right"]].set_visible(False)
        legend |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        legend.values(), legend.keys(), loc="outside upper center", ncols=6, frameon=False
    )
    finish(figure, grid[0, 0], args.picture, source(row))


if __name__ == "__main__":
    main()
