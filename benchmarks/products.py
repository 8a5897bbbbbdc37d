"""Which matrix product is faster for which shape: dot products or packed outer products.

    python benchmarks/products.py [--isa avx512] [--threads 2]

Compiles products.cpp with the flags of setup.py for one instruction set and runs it. "ratio" is the
outer products' time over the dot products', the median over turns; "chosen" is what
csrc/cpu/product/plan.h picks.
"""

import argparse
import os
import subprocess
import tempfile
from pathlib import Path

from compiling import ISAS, compile_cpp
from provenance import cpu_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", default="avx512", choices=ISAS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()

    print(f"{cpu_model()}, {args.isa}, {args.threads} threads, float32")
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "products"
        compile_cpp(Path(__file__).with_suffix(".cpp"), binary, args.isa)
        subprocess.run([binary, str(args.threads)], check=True)


if __name__ == "__main__":
    main()
