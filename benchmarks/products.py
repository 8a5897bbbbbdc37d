"""Which matrix product is faster for which shape: dot products or packed outer products.

    python benchmarks/products.py [--isa avx512] [--threads 2]

Compiles products.cpp with the flags of setup.py for one instruction set and runs it. "ratio" is the
outer products' time over the dot products', the median over turns; "chosen" is what
csrc/kernels/cpu/linear_impl.h picks.
"""

import argparse
import os
import re
import subprocess
import tempfile
from ast import literal_eval
from pathlib import Path

from provenance import cpu_model

ROOT = Path(__file__).resolve().parents[1]


def isa_flags(isa: str) -> list[str]:
    """Return what setup.py compiles this instruction set's kernels with."""
    found = re.search(rf'ISA_FLAGS\["{isa}"\] = (\[.*\])', (ROOT / "setup.py").read_text())
    return literal_eval(found[1]) if found else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", default="avx512", choices=["baseline", "avx2", "avx512"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()

    print(f"{cpu_model()}, {args.isa}, {args.threads} threads, float32")
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "products"
        flags = ["-std=c++20", "-O3", "-fopenmp", "-ffp-contract=fast", "-Wno-psabi"]
        sources = [ROOT / "benchmarks/products.cpp", ROOT / "csrc/kernels/cpu/scratch.cpp"]
        subprocess.run(
            [
                os.environ.get("CXX", "g++"),
                *flags,
                *isa_flags(args.isa),
                f"-DMNIST_EXT_ISA={args.isa}",
                *sources,
                "-o",
                binary,
            ],
            check=True,
        )
        subprocess.run([binary, str(args.threads)], check=True)


if __name__ == "__main__":
    main()
