"""Threads without torch: compiles and runs parallel.cpp, which says what is tested."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

from compiling import compile_cpp  # noqa: E402


def test_no_thread_begins_where_one_gets_no_memory(tmp_path):
    compile_cpp(ROOT / "tests/cpu/parallel.cpp", tmp_path / "parallel", "baseline", optimize="-O1")
    result = subprocess.run([tmp_path / "parallel"], stdout=subprocess.PIPE, text=True)
    assert (result.returncode, result.stdout) == (0, "")
