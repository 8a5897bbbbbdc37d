"""Build the CPU's kernels by a compiler, without torch, and run tests/cpu/check_kernels.cpp.

    python tools/check_kernels.py c++
    python tools/check_kernels.py aarch64-linux-gnu-g++ qemu-aarch64 -L /usr/aarch64-linux-gnu

What stands behind the compiler runs the program. Warnings are errors.
"""

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import isa_flags

ROOT = Path(__file__).resolve().parents[1]
# Those of setup.py.
FLAGS = ["-std=c++20", "-O3", "-fopenmp", "-ffp-contract=fast"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi", "-Werror"]


def main() -> int:
    """Compile what each instruction set has of its own, link and run."""
    compiler, runner = shlex.split(sys.argv[1]), sys.argv[2:]
    machine = subprocess.run(
        [*compiler, "-dumpmachine"], capture_output=True, text=True, check=True
    )
    isas = isa_flags.of(machine.stdout.split("-")[0])
    folder = ROOT / "build" / "kernels" / Path(compiler[0]).name
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(source: str, isa: str) -> str:
        path = folder / f"{Path(source).stem}-{isa}.o"
        flags = [*FLAGS, *WARNINGS, *isas[isa], f"-DMNIST_EXT_ISA={isa}"]
        subprocess.run([*compiler, *flags, "-c", ROOT / source, "-o", path], check=True)
        return str(path)

    jobs = [("csrc/cpu/kernels.cpp", isa) for isa in isas]
    for source in ("cpu/dispatch", "cpu/train_steps", "cpu/threads/scratch"):
        jobs.append((f"csrc/{source}.cpp", "baseline"))
    jobs.append(("tests/cpu/check_kernels.cpp", "baseline"))
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        objects = list(pool.map(lambda job: compiled(*job), jobs))
    program = folder / "kernels"
    subprocess.run([*compiler, "-fopenmp", *objects, "-o", program], check=True)
    # Threads that wait by spinning would take the cores from those that they wait for.
    return subprocess.run(
        [*runner, program], env={**os.environ, "OMP_WAIT_POLICY": "passive"}
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
