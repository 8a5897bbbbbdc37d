"""How far apart two cores are: nanoseconds that a cache line takes from one to the other.

    python benchmarks/cores.py

Threads that share a step hand each other cache lines. On a virtual machine the host decides which
cores these two CPUs are at the moment: neighbours that share a third-level cache (20 to 50 ns), or
not (100 to 300 ns). It may change from one minute to the next, and with it what a second thread is
worth in small steps, to everyone who uses one. Read a figure of several threads beside this one.
"""

import subprocess
import tempfile
from pathlib import Path

from compiling import compile_cpp

from mnist_ext.app.bench.machine import cpus


class Cores:
    """Measures whenever it is asked; compiles its program once."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._program = Path(self._folder.name) / "cores"
        compile_cpp(Path(__file__).with_suffix(".cpp"), self._program, "baseline")

    def nanoseconds(self) -> float | None:
        """Return the time one way between the first two CPUs; None where there is only one."""
        if cpus() < 2:
            return None
        run = subprocess.run([self._program], capture_output=True, text=True, check=True)
        return float(run.stdout)


if __name__ == "__main__":
    found = Cores().nanoseconds()
    print("one CPU only" if found is None else f"{found:.0f} ns")
