"""Compiles a benchmark in C++ with the flags of setup.py for one instruction set."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import isa_flags  # noqa: E402

ISAS = list(isa_flags.FLAGS)
FLAGS = ["-std=c++20", "-fopenmp", "-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-psabi"]


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def compiler_version() -> str:
    command = [compiler(), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]


def compile_cpp(
    source: Path, binary: Path, isa: str, optimize: str = "-O3", link: Sequence[str] = ()
) -> None:
    """Compile one file, with what the kernels need besides their headers."""
    sources = [source, ROOT / "csrc/cpu/threads/scratch.cpp"]
    flags = [optimize, *FLAGS, *isa_flags.FLAGS[isa], f"-DMNIST_EXT_ISA={isa}"]
    subprocess.run([compiler(), *flags, *sources, "-o", binary, *link], check=True)
