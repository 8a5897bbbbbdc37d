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


def code_name(number: str) -> str:
    """Return what code for a compute capability is called: 9.0 with all of its features."""
    return number.replace("90", "90a")


def kernels(pattern: str) -> dict[str, str]:
    """Return name and SASS of the kernels whose name matches, of one architecture."""
    number = mnist_ext.build_info()["cuda"][0].replace(".", "")
    functions = dump("-sass", "-arch", f"sm_{code_name(number)}").split("Function : ")[1:]
    texts = {text.split(maxsplit=1)[0]: text for text in functions}
    return {name: text for name, text in texts.items() if re.search(pattern, name)}


def test_code_for_each_architecture():
    """And the last one's PTX, which newer devices compile for themselves."""
    numbers = [a.replace(".", "") for a in mnist_ext.build_info()["cuda"]]
    assert set(re.findall(r"\.sm_(\w+)\.cubin", dump("-lelf"))) == set(map(code_name, numbers))
    assert set(re.findall(r"\.sm_(\w+)\.ptx", dump("-lptx"))) == {numbers[-1]}


def test_nothing_that_counts_is_spilled():
    """Some stack is for printf, which reports a bad target; arrays there would show as much more.

    In float64 the common case may spill a little: it is held to two blocks at once as the others
    are, with registers of twice the size. The rest, which nothing holds, may take more of them.
    """
    line = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)"
    usage = re.findall(line, dump("-res-usage"))
    assert len(usage) >= 12
    for kernel, registers, stack, local in usage:
        if "mma_kernel" in kernel:  # test_cuda_tensor_core_binary.py
            continue
        # A block of a product has a multiprocessor to itself, with 255 registers for a thread.
        product = "linear_" in kernel
        limit = 0 if product else 160 if "kernelId" in kernel else 80
        assert int(stack) <= limit, kernel
        assert int(local) == 0, kernel
        most = 255 if product else 168 if "kernelIdLb0" in kernel else 128
        assert int(registers) <= most, kernel


def test_rows_are_read_and_written_16_bytes_at_a_time():
    rows = kernels(r"(short|warp|block|cluster)_rows_kernel")
    assert len(rows) == 4 * 4 * 2  # kernels, dtypes, the common case and the rest
    for name, sass in {**rows, **kernels("sgd_kernel")}.items():
        if "short_rows_kernelId" in name:  # a float64 row is copied in two halves
            continue
        assert re.search(r"\bLDG?\.E\.128", sass), name
        assert re.search(r"\bSTG?\.E\.128", sass), name


def test_products_keep_their_sums_in_registers_and_read_16_bytes_at_a_time():
    """The kernels without tensor cores; half dtypes are widened element by element on their way."""
    products = kernels("linear_simt_kernel")
    assert len(products) == 4 * (3 + 2 + 1 + 1)  # layouts; tiles of each dtype
    for name, sass in products.items():
        assert not re.search(r"\b(LDL|STL)\b", sass), name
        assert re.search(r"\bLDS\.128", sass), name
        if re.search("kernelI[fd]", name):
            assert re.search(r"\bLDGSTS\.E\.BYPASS\S*\.128", sass), name
    large = [sass for name, sass in products.items() if "Li128E" in name]
    assert len(large) == 4
    for sass in large:
        # The loop is unrolled so far that 8 x 16 elements are multiplied 8 times, with 48 vectors
        # read for it: nearly everything that is issued multiplies.
        assert sass.count("FFMA ") >= 1024
        assert 18 * sass.count("LDS.128 ") <= sass.count("FFMA ")
