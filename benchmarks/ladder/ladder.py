"""From the naive loop to the kernel in use, one idea at a time: what each is worth on this machine.

    python benchmarks/ladder/ladder.py [linear] [grad_weight] [cross_entropy] [sgd]
                                       [--isa avx512] [--threads 2] [--markdown] [--check]

Each ladder is one file in C++, compiled here with the flags of setup.py for one instruction set; it
opens with the list of its rungs. Every result is compared with one in float64 before anything
is timed; the rungs then take turns.

"us" is the median over turns; "gain" is how many times as long the previous rung takes, "in all"
how many times as long the first one takes: medians of the ratio of each turn. "limit" is the share
of what as many threads as the rung has reached in the same run, in multiply-adds of registers
(GFLOP/s) or in copying as many bytes as the problem occupies (GB/s).
"""

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from compiling import ISAS, compile_cpp, compiler_version
from provenance import commit
from table import Table

from mnist_ext import _C
from mnist_ext.app.bench.machine import cpu_model
from mnist_ext.app.bench.timing import TURNS, Times

HERE = Path(__file__).resolve().parent
LADDERS = ("linear", "grad_weight", "cross_entropy", "sgd")


class Markdown(Table):
    """The same rows as a table in Markdown, names of rungs as code."""

    def header(self) -> None:
        print("| " + " | ".join(self.columns) + " |\n|" + " --- |" * len(self.columns))

    def add(self, **row: object) -> None:
        cells = []
        for name, form in self.columns.items():
            value = row.get(name)
            cell = (
                value
                if isinstance(value, str)
                else f"{value:,{form.lstrip('<>').lstrip('0123456789')}}"
            )
            cells.append(f"`{cell}`" if name == "rung" else cell)
        print("| " + " | ".join(cells) + " |", flush=True)


def plural(threads: int) -> str:
    return f"{threads} thread" + ("s" if threads > 1 else "")


def print_ladder(title: str, unit: str, work: float, lines: list[list[str]], table: type) -> None:
    """Print one ladder from the lines of its program: kind, name, threads, times in turns."""
    limits = {int(threads): name for kind, name, threads, *_ in lines if kind == "limit"}
    rungs = {name: int(threads) for kind, name, threads, *_ in lines if kind == "rung"}
    times = Times(
        {
            (name if kind == "rung" else f"limit {threads}"): [float(t) / 1e6 for t in turns]
            for kind, name, threads, *turns in lines
        }
    )

    def rate(name: str) -> float:
        return work / times.percentiles(name)[1] / 1e9

    limit = ", ".join(
        f"{plural(n)} {rate(f'limit {n}'):,.0f} {unit} ({name})" for n, name in limits.items()
    )
    print(f"\n{title}\nlimit: {limit}\n" + ("" if table is Table else "\n"), end="")
    columns = {
        "rung": "<24",
        "threads": ">7",
        "us": ">11.1f",
        "gain": ">6.2f",
        "in all": ">8.1f",
        unit: ">8.1f",
        "limit": ">6.1%",
    }
    rows = table(columns, {})
    rows.header()
    first = previous = next(iter(rungs))
    for name, threads in rungs.items():
        rows.add(
            **{
                "rung": name,
                "threads": threads,
                "us": times.percentiles(name)[1] * 1e6,
                "gain": times.ratio(previous, to=name)[1],
                "in all": times.ratio(first, to=name)[1],
                unit: rate(name),
                "limit": times.ratio(f"limit {threads}", to=name)[1],
            }
        )
        previous = name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ladders", nargs="*", metavar="ladder", help=", ".join(LADDERS))
    parser.add_argument("--isa", default=_C.available_isas()[-1], choices=ISAS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--markdown", action="store_true", help="tables as in docs/ladder.md")
    parser.add_argument("--check", action="store_true", help="verify on small shapes, time nothing")
    args = parser.parse_args()
    if unknown := set(args.ladders) - set(LADDERS):
        parser.error(f"unknown ladder {', '.join(unknown)}: choose from {', '.join(LADDERS)}")
    chosen = args.ladders or LADDERS

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:

        def compiled(name: str) -> Path:
            binary = Path(folder) / name
            compile_cpp(HERE / f"{name}.cpp", binary, args.isa, "-O1" if args.check else "-O3")
            return binary

        print(
            f"{cpu_model()}, {args.isa}, {plural(args.threads)}, {compiler_version()}, "
            f"commit {commit()}, {datetime.date.today()}"
        )
        for binary in list(pool.map(compiled, chosen)):
            command = [binary, str(args.threads), "0" if args.check else str(TURNS)]
            process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if process.returncode != 0:
                raise SystemExit(f"{binary.name} failed")
            # One "ladder" line opens each; then one line per rung that was verified, one per
            # implementation that was timed.
            for part in process.stdout.split("ladder\t")[1:]:
                head, *lines = (line.split("\t") for line in part.splitlines())
                title, unit, work = head
                if args.check:
                    print(f"{title}: {len(lines)} rungs verified")
                else:
                    timed = [line for line in lines if line[0] != "verified"]
                    table = Markdown if args.markdown else Table
                    print_ladder(title, unit, float(work), timed, table)


if __name__ == "__main__":
    main()
