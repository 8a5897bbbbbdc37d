"""What the CUDA compiler made of the kernels, read with NVIDIA's disassembler: no GPU is needed.

The disassembler comes with the CUDA toolkit, and with triton, which torch brings along.
"""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import mnist_ext
from mnist_ext import _library


def disassembler() -> str | None:
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends/nvidia/bin" if triton else Path()
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(bundled))


pytestmark = [
    pytest.mark.skipif(_library.cuda is None, reason=f"no CUDA kernels: {_library.cuda_reason}"),
    pytest.mark.skipif(disassembler() is None, reason="needs cuobjdump (CUDA toolkit, or triton)"),
]


def dump(*options: str) -> str:
    process = subprocess.run(
        [disassembler(), *options, _library.cuda.__file__], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_code_for_each_architecture():
    """And the last one's PTX, which newer devices compile for themselves."""
    architectures = [a.replace(".", "") for a in mnist_ext.build_info()["cuda"]]
    assert set(re.findall(r"\.sm_(\d+)a?\.cubin", dump("-lelf"))) == set(architectures)
    assert set(re.findall(r"\.sm_(\d+)a?\.ptx", dump("-lptx"))) == {architectures[-1]}


def test_nothing_that_counts_is_spilled():
    """Some stack is for printf, which reports a bad target; arrays there would show as much more.

    In float64 the common case may spill a little: it is held to two blocks at once as the others
    are, with registers of twice the size.
    """
    line = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)"
    usage = re.findall(line, dump("-res-usage"))
    assert len(usage) >= 12
    for kernel, registers, stack, local in usage:
        if "mma_kernel" in kernel:  # test_cuda_tensor_core_binary.py
            continue
        limit = 160 if "kernelId" in kernel else 80
        assert int(stack) <= limit, kernel
        assert int(local) == 0, kernel
        assert int(registers) <= 128, kernel


def test_rows_are_read_and_written_16_bytes_at_a_time():
    architecture = mnist_ext.build_info()["cuda"][0].replace(".", "")
    functions = dump("-sass", "-arch", f"sm_{architecture}").split("Function : ")[1:]
    kernels = {text.split(maxsplit=1)[0]: text for text in functions}
    rows = [name for name in kernels if re.search(r"(short|warp|block|cluster)_rows_kernel", name)]
    assert len(rows) == 4 * 4 * 2  # kernels, dtypes, the common case and the rest
    for name in [*rows, *(name for name in kernels if "sgd_kernel" in name)]:
        if "short_rows_kernelId" in name:  # a float64 row is copied in two halves
            continue
        assert re.search(r"\bLDG?\.E\.128", kernels[name]), name
        assert re.search(r"\bSTG?\.E\.128", kernels[name]), name
