"""Compiles a benchmark in C++ with the flags of setup.py for one instruction set."""

import os
import re
import subprocess
from ast import literal_eval
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ISAS = ["baseline", "avx2", "avx512"]
FLAGS = ["-std=c++20", "-fopenmp", "-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-psabi"]


def isa_flags(isa: str) -> list[str]:
    """Return what setup.py compiles this instruction set's kernels with."""
    found = re.search(rf'ISA_FLAGS\["{isa}"\] = (\[.*\])', (ROOT / "setup.py").read_text())
    return literal_eval(found[1]) if found else []


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def compiler_version() -> str:
    command = [compiler(), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]


def compile_cpp(source: Path, binary: Path, isa: str, optimize: str = "-O3") -> None:
    """Compile one file, with what the kernels need besides their headers."""
    sources = [source, ROOT / "csrc/cpu/threads/scratch.cpp"]
    flags = [optimize, *FLAGS, *isa_flags(isa), f"-DMNIST_EXT_ISA={isa}"]
    subprocess.run([compiler(), *flags, *sources, "-o", binary], check=True)
