"""``mnist-ext bench``: what this package gains on this machine, in under a minute."""

import argparse
import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from mnist_ext.app.cli.options import MOST_THREADS, integer
from mnist_ext.app.cli.streams import print_message

if TYPE_CHECKING:
    from mnist_ext.app.bench.benchmark import Limits, Result

_BUSY = 0.7  # of the CPUs
_HEADER = ("what", "shape", "ours", "PyTorch", "mnist_ext", "gain", "20 - 80 %", "limit")
_ROW = "{:<31} {:<11} {:<15} {:>10} {:>10} {:>7} {:>13} {:>6}"


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its options."""
    parser = commands.add_parser(
        "bench",
        help="time this package against PyTorch on this machine, in under a minute",
        description="Time training steps, the products of the layers and the loss, ours against\n"
        "PyTorch eager, in turns, after checking that the results agree. Times are medians in\n"
        "microseconds; the gain is PyTorch's time over ours, the median of the turns, with its\n"
        "20th and 80th percentile; limit is the share of the FLOP/s of a large matrix product\n"
        "that ours reaches or, for cross_entropy, of the bytes/s of a large copy, both measured\n"
        "in the same run. torch.compile would take most of the minute to compile; 'make bench'\n"
        "in the repository has it.",
        epilog="example: mnist-ext bench --threads 1\n\n"
        "exit codes: 0 done, 1 ours computes something else than PyTorch, 2 wrong use",
    )
    parser.add_argument(
        "--threads",
        type=integer(1, MOST_THREADS),
        metavar="N",
        help="CPU threads (default: PyTorch's choice)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object a line: the machine, then each comparison; times in seconds",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    import torch

    from mnist_ext.app.bench import benchmark

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    machine = _machine()
    limits = benchmark.Limits.measure()
    if args.json:
        print(json.dumps({**machine, "limits": asdict(limits)}), flush=True)
    else:
        _print_header(machine, limits)
    try:
        for result in benchmark.measure(limits):
            print(json.dumps(asdict(result)) if args.json else _row(result), flush=True)
    except benchmark.WrongResultError as error:
        print_message(f"error: {error}")
        return 1
    return 0


def _machine() -> dict[str, Any]:
    from mnist_ext import build_info
    from mnist_ext.app.bench.machine import cpu_model, cpus

    info = build_info()
    return {
        "cpu": cpu_model(),
        "cpus": cpus(),
        "threads": info["openmp_threads"],
        "load": os.getloadavg()[0],
        "cpu_isa": info["cpu_isa"],
        "version": info["version"],
        "torch": info["torch"],
    }


def _print_header(machine: dict[str, Any], limits: "Limits") -> None:
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    print(
        f"{machine['cpu']}, {threads} on {machine['cpus']} CPUs; mnist_ext "
        f"{machine['version']} ({machine['cpu_isa']}), torch {machine['torch']}\n"
        f"limits: {limits.flops / 1e9:.0f} GFLOP/s in a large matrix product, "
        f"{limits.bytes / 1e9:.0f} GB/s in a large copy\n"
    )
    if machine["load"] > _BUSY * machine["cpus"]:
        print(f"note: other work runs here, the load is {machine['load']:.1f}: trust no figure\n")
    print(_ROW.format(*_HEADER), flush=True)


def _row(result: "Result") -> str:
    return _ROW.format(
        result.what,
        result.shape,
        result.ours,
        f"{result.torch_seconds * 1e6:,.1f}",
        f"{result.ours_seconds * 1e6:,.1f}",
        f"{result.gain:.2f}x",
        f"{result.gain_p20:.2f} - {result.gain_p80:.2f}",
        f"{result.limit:.0%}",
    )
