"""What the CUDA compiler made of the kernels, read with NVIDIA's disassembler: no GPU is needed.

The disassembler comes with the CUDA toolkit, and with triton, which torch brings along.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mnist_ext
from mnist_ext import _library

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import cuda_toolkit


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


def code_for(architecture: str) -> dict[str, str]:
    """Return name and SASS of each kernel."""
    functions = dump("-sass", "-arch", f"sm_{architecture}").split("Function : ")[1:]
    if not functions:
        pytest.skip(f"the library was built without code for sm_{architecture}")
    return {text.split(maxsplit=1)[0]: text for text in functions}


@pytest.fixture(scope="module")
def sm_80():
    return code_for("80")


@pytest.fixture(scope="module")
def sm_90a():
    return code_for("90a")


def instances(kernels, name, *parts):
    """Pick a template's instances by parts of their mangled names."""
    return [sass for n, sass in kernels.items() if all(part in n for part in (name, *parts))]


def test_code_for_each_architecture():
    """And PTX, which newer devices compile for themselves."""
    built_for = mnist_ext.build_info()["cuda"]
    flags = [
        f
        for tensor_cores in (False, True)
        for f in cuda_toolkit.code_flags(built_for, tensor_cores)
    ]
    code = {flag.split(",code=")[1] for flag in flags}
    assert set(re.findall(r"\.(sm_\w+)\.cubin", dump("-lelf"))) == {
        name for name in code if name.startswith("sm_")
    }
    ptx = {name.replace("compute", "sm") for name in code if name.startswith("compute_")}
    assert set(re.findall(r"\.(sm_\w+)\.ptx", dump("-lptx"))) == ptx


def test_nothing_that_counts_is_spilled():
    """Some stack is for printf, which reports a bad target; arrays would show as more."""
    line = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)"
    usage = re.findall(line, dump("-res-usage"))
    assert len(usage) >= 48 + 18  # kernels without tensor cores, and with mma's
    for kernel, registers, stack, local in usage:
        most = 128
        if "wgmma" in kernel:
            most = 168  # what each of three warpgroups gets at the start
        elif "product_" in kernel and ("ELi128E" in kernel or "simt_kernelId" in kernel):
            most = 255  # large tiles, or doubles: two blocks of 128 threads at once
        assert int(local) == 0, kernel
        assert int(stack) <= (0 if "product_" in kernel else 48), kernel
        assert int(registers) <= most, kernel


def test_rows_are_read_and_written_16_bytes_at_a_time(sm_80):
    by_rows = re.compile("positions_kernel.*(OneWarp|OneBlock)|sgd_kernel")
    rows = {n: sass for n, sass in sm_80.items() if by_rows.search(n)}
    assert len(rows) == 4 * 3  # dtypes, kernels
    for name, sass in rows.items():
        assert re.search(r"\bLDG?\.E\.128", sass), name
        assert re.search(r"\bSTG?\.E\.128", sass), name


def test_products_keep_their_sums_in_registers_and_read_16_bytes_at_a_time(sm_80):
    """The kernels without tensor cores."""
    products = {n: sass for n, sass in sm_80.items() if "product_simt_kernel" in n}
    assert len(products) == 2 * (3 + 3 + 1 + 1)  # tiles, layouts; half dtypes have one
    for name, sass in products.items():
        assert not re.search(r"\b(LDL|STL)\b", sass), name
        assert re.search(r"\bLDS\.128", sass), name
        assert re.search(r"\bLDGSTS\.E\.\S*128", sass), name


@pytest.mark.parametrize(
    ("dtype", "instruction"),
    [
        ("8BFloat16", "HMMA.16816.F32.BF16"),
        ("7Float16", "HMMA.16816.F32 "),
        ("If", "HMMA.1688.F32.TF32"),
    ],
)
def test_mma(sm_80, dtype, instruction):
    """Tensor cores of the right dtype, fed by 16-byte copies and ldmatrix."""
    kernels = instances(sm_80, "product_mma_kernel", dtype)
    assert len(kernels) == 3 * 2  # layouts, tiles
    for kernel in kernels:
        assert kernel.count("HMMA") == kernel.count(instruction) > 0
        assert re.search(r"LDGSTS\.E\.\S*128", kernel)
        assert "LDSM" in kernel or dtype == "If"


# What wgmma is called for each dtype, and how many layouts of operands are compiled.
WGMMA = {
    "8BFloat16": ("x16.F32.BF16", 4),
    "7Float16": ("x16.F32", 4),
    "If": ("x8.F32.TF32", 1),
}


@pytest.mark.parametrize("columns", [128, 256])
@pytest.mark.parametrize("dtype", WGMMA)
def test_wgmma(sm_90a, dtype, columns):
    kernels = instances(sm_90a, "product_wgmma_kernel", dtype, f"ELi{columns}E")
    instruction, layouts = WGMMA[dtype]
    assert len(kernels) == layouts
    for kernel in kernels:
        assert kernel.count("HGMMA") == kernel.count(f"HGMMA.64x{columns}{instruction} ") > 0
        assert "UTMALDG.2D" in kernel
        assert "USETMAXREG" in kernel


@pytest.mark.parametrize("dtype", WGMMA)
def test_wgmmas_of_a_stage_follow_each_other(sm_90a, dtype):
    """Four at a time are in flight: only the last of them is waited for."""
    for kernel in instances(sm_90a, "product_wgmma_kernel", dtype):
        order = re.findall(r"HGMMA[^;]*|WARPGROUP\.DEPBAR[^;]*", kernel)
        products = [x for x in order if x.startswith("HGMMA")]
        assert len(products) % 4 == 0
        for first in range(0, len(products), 4):
            assert ["gsb0" in x for x in products[first : first + 4]] == [False, False, False, True]
        waits = [i for i, x in enumerate(order) if x.startswith("WARPGROUP")]
        assert all("gsb0" in order[i - 1] or order[i - 1].startswith("WARPGROUP") for i in waits)
