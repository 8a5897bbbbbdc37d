"""Print how much memory a last layer and its loss take beyond inputs and gradients, at the peak.

    python benchmarks/head_memory.py [NxDxC ...] [--of ours torch torch.compile chunked]
                                     [--csv FILE]

Forward and backward in float32, each in a process of its own; the peak is its resident set's, and
what is taken off is its peak with inputs and gradients alone.
"""

import argparse
import resource
import subprocess
import sys
from pathlib import Path

import torch
from kernels import head_losses
from provenance import describe, fields
from table import Table

NAMES = ("ours", "torch", "torch.compile", "chunked")
COLUMNS = {"shape": "<16", "implementation": "<16", "MiB": ">10.1f"}


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def beyond_inputs_and_gradients(name: str, rows: int, features: int, classes: int) -> int:
    """Return bytes. To be called once in a process."""
    loss = head_losses()[name]
    input = torch.randn(rows, features, requires_grad=True)
    weight = torch.randn(classes, features).requires_grad_()
    target = torch.randint(0, classes, (rows,))
    # Code, threads, and what they keep to work in: a few rows and classes.
    loss(input[:64], weight[:640], target[:64] % 640).backward()
    input.grad = weight.grad = None
    gradients = [torch.ones_like(t) for t in (input, weight)]
    before = peak()
    del gradients
    loss(input, weight, target).backward()
    return peak() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", default=["4096x768x128256"], metavar="NxDxC")
    parser.add_argument("--of", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--csv", type=Path, help="write the rows to this file")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_this_process:
        rows, features, classes = map(int, args.shapes[0].split("x"))
        print(beyond_inputs_and_gradients(args.of[0], rows, features, classes))
        return
    print(describe())
    table = Table(COLUMNS, fields())
    table.header()
    for shape in args.shapes:
        for name in args.of:
            command = [sys.executable, __file__, shape, "--of", name, "--in-this-process"]
            run = subprocess.run(command, capture_output=True, text=True, check=False)
            if run.returncode:
                print(f"{shape}  {name}: failed", flush=True)
                continue
            size = int(run.stdout.split()[-1])
            table.add(shape=shape, implementation=name, bytes=size, MiB=size / 2**20)
    if args.csv:
        table.write(args.csv)


if __name__ == "__main__":
    main()
