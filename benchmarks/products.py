"""Which kernel makes the products of a linear layer fastest, against PyTorch's sgemm.

    python benchmarks/products.py [--isa amx] [--threads 2] [--shape 64x784x128 ...]

Compiles products.cpp with the flags of setup.py for one instruction set and runs it. Under "outer",
"dot" and "amx": the time of sgemm (MKL, in PyTorch's wheels for x86-64) over that of our kernel,
the median over turns: above 1, ours is faster. "chosen" is what csrc/cpu/product/plan.h picks.
"""

import argparse
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from compiling import ISAS, compile_cpp
from provenance import cpu_model

import mnist_ext

SHAPES = (
    "64x784x128 64x128x64 64x64x10 256x784x128 1024x784x128 4096x784x128 512x512x512 1024x512x512 "
    "1024x1024x1024 4096x1024x1024 357x789x333"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", default=mnist_ext.build_info()["cpu_isa"], choices=ISAS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument(
        "--shape", nargs="+", default=SHAPES.split(), help="batch x in_features x out_features"
    )
    args = parser.parse_args()

    version = f"torch {torch.__version__}"
    print(f"{cpu_model()}, {args.isa}, {args.threads} threads, float32, {version}", flush=True)
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    sizes = [size for shape in args.shape for size in shape.split("x")]
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "products"
        compile_cpp(Path(__file__).with_suffix(".cpp"), binary, args.isa, link=["-ldl"])
        command = [str(binary), str(library), str(args.threads), str(args.turns), *sizes]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
