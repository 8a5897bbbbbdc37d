"""Print how much memory a last layer and its loss take beyond inputs and gradients, at the peak.

    python benchmarks/head_memory.py [NxDxC] [--of ours torch torch.compile chunked]

Forward and backward in float32, each in a process of its own; the peak is its resident set's, and
what is taken off is its peak with inputs and gradients alone.
"""

import argparse
import resource
import subprocess
import sys

import torch
from kernels import head_losses

NAMES = ("ours", "torch", "torch.compile", "chunked")


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
    parser.add_argument("shape", nargs="?", default="4096x768x128256", metavar="NxDxC")
    parser.add_argument("--of", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_this_process:
        rows, features, classes = map(int, args.shape.split("x"))
        print(beyond_inputs_and_gradients(args.of[0], rows, features, classes))
        return
    for name in args.of:
        command = [sys.executable, __file__, args.shape, "--of", name, "--in-this-process"]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        size = (
            f"{int(run.stdout.split()[-1]) / 2**20:10,.1f} MiB" if run.returncode == 0 else "failed"
        )
        print(f"{args.shape}  {name:<14}{size}", flush=True)


if __name__ == "__main__":
    main()
