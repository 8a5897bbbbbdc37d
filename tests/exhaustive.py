"""Every float32 through exp, log and tanh of the CPU's kernels, and through their conversions.

    python tests/exhaustive.py [--isa avx2 ...] [--step 1000]

Compiles tests/cpu/exhaustive.cpp, which says what is measured, for each instruction set that this
CPU has, prints the tables of docs/accuracy.md and fails where an error is above its bound.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from mnist_ext import _C

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

from compiling import compile_cpp  # noqa: E402
from provenance import cpu_model  # noqa: E402

# In ulp; the largest are those of the baseline, which has no fused multiply-add.
BOUNDS = {
    "exp": 1.25,
    "log": 1.0,  # from 1 on 0.9
    "tanh": 1.75,
    "exp of float64": 1.2,
    "log of float64": 0.9,
    "tanh of float64": 2.0,
}


@dataclass
class Row:
    """The inputs of one range: of a function `errors` of them by size, of a conversion none."""

    what: str
    range: str
    inputs: int
    largest: float  # error in ulp; of a conversion, how many results are wrong
    where: str
    errors: list[int]

    @property
    def is_right(self) -> bool:
        return self.largest <= BOUNDS.get(self.what, 0)


def measure(isa: str, folder: Path, step: int) -> list[Row]:
    """Return the errors of every step-th input."""
    binary = folder / isa
    compile_cpp(ROOT / "tests/cpu/exhaustive.cpp", binary, isa)
    command = [str(binary), str(step)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [
        Row(what, range, int(inputs), float(largest), where, [int(n) for n in errors])
        for what, range, inputs, largest, where, *errors in csv.reader(lines)
    ]


def isas() -> list[str]:
    """Return this CPU's; amx has the functions of avx512."""
    return [isa for isa in _C.available_isas() if isa != "amx"]


def share(part: int, whole: int) -> str:
    percent = 100 * part / whole
    return "" if part == 0 else f"{percent:.2g} %" if percent < 1 else f"{percent:.1f} %"


def functions_table(rows: list[Row]) -> str:
    bins = [f"below {(i + 1) / 4:g}" for i in range(6)]
    lines = [
        f"| function | of | inputs | largest error | at | {' | '.join(bins)} | more |",
        "| --- " * (len(bins) + 6) + "|",
    ]
    for row in rows:
        shares = " | ".join(share(count, row.inputs) for count in row.errors)
        where = row.where if row.largest else ""
        lines.append(
            f"| {row.what} | {row.range} | {row.inputs:,} | {row.largest:.3f} | {where} "
            f"| {shares} |"
        )
    return "\n".join(lines)


def conversions_table(rows: list[Row]) -> str:
    lines = ["| conversion | inputs | wrong |", "| --- | --- | --- |"]
    lines += [f"| {row.what} | {row.inputs:,} | {row.largest:.0f} |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--isa", nargs="+", default=isas(), choices=isas())
    parser.add_argument("--step", type=int, default=1, help="take every so many-th input only")
    args = parser.parse_args()
    wrong = []
    for isa in args.isa:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(isa, Path(folder), args.step)
        print(f"## {isa}\n\n{cpu_model()}, {time.perf_counter() - start:.0f} s.\n")
        print(functions_table([row for row in rows if row.errors]), end="\n\n")
        print(conversions_table([row for row in rows if not row.errors]), end="\n\n", flush=True)
        wrong += [f"{isa}: {row}" for row in rows if not row.is_right]
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
