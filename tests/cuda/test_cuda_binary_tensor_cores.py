"""What the CUDA compiler made of the tensor-core kernels, read with NVIDIA's disassembler."""

import re

import pytest
from test_cuda_binary import code_name, dump, pytestmark  # noqa: F401

import mnist_ext


@pytest.fixture(scope="module")
def usage():
    """List each kernel's mangled name, registers, bytes of stack and of local memory."""
    line = r"Function (\w*mma_kernel\w+):\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)"
    return [(name, *map(int, rest)) for name, *rest in re.findall(line, dump("-res-usage"))]


def kernels_for(architecture: str) -> dict[str, str]:
    """Disassemble each kernel."""
    built_for = [code_name(a.replace(".", "")) for a in mnist_ext.build_info()["cuda"]]
    if architecture not in built_for:
        pytest.skip(f"the library was built without code for sm_{architecture}")
    functions = dump("-sass", "-arch", f"sm_{architecture}").split("Function : ")[1:]
    return {text.split(maxsplit=1)[0]: text for text in functions}


@pytest.fixture(scope="module")
def sm_80():
    return kernels_for("80")


@pytest.fixture(scope="module")
def sm_90a():
    return kernels_for("90a")


def instances(kernels, name, *parts):
    """Pick a template's instances by parts of their mangled names."""
    return [sass for n, sass in kernels.items() if all(part in n for part in (name, *parts))]


def test_nothing_is_spilled(usage):
    assert len(usage) >= 3 * 16
    for kernel, registers, stack, local in usage:
        assert (stack, local) == (0, 0), kernel
        if "wgmma_kernel" in kernel:  # what each of three warpgroups gets at the start
            assert registers <= 168, kernel
        else:  # two blocks of 128 threads at once with large tiles, four with small ones
            assert registers <= (255 if "ELi128E" in kernel else 128), kernel


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(
    ("dtype", "instruction"),
    [
        ("8BFloat16", "HMMA.16816.F32.BF16"),
        ("7Float16", "HMMA.16816.F32 "),
        ("If", "HMMA.1688.F32.TF32"),
    ],
)
def test_mma(request, architecture, dtype, instruction):
    """Tensor cores of the right dtype, fed by 16-byte copies and ldmatrix; 16-byte stores."""
    kernels = instances(request.getfixturevalue(architecture), "linear_mma_kernel", dtype)
    assert len(kernels) == 16
    for kernel in kernels:
        assert kernel.count("HMMA") == kernel.count(instruction) > 0
        assert re.search(r"LDGSTS\.E\.\S*128", kernel)
        assert "LDSM" in kernel or dtype == "If"
        assert re.search(r"STG\.E\.128" if dtype != "If" else r"STG\.E\.64", kernel)


# What wgmma is called for each dtype, and how many layouts of operands are compiled.
WGMMA = {
    "8BFloat16": ("x16.F32.BF16", 4),
    "7Float16": ("x16.F32", 4),
    "If": ("x8.F32.TF32", 3),
}


@pytest.mark.parametrize("columns", [128, 256])
@pytest.mark.parametrize("dtype", WGMMA)
def test_wgmma(sm_90a, dtype, columns):
    kernels = instances(sm_90a, "linear_wgmma_kernel", dtype, f"ELi{columns}E")
    instruction, layouts = WGMMA[dtype]
    assert len(kernels) == layouts
    for kernel in kernels:
        assert kernel.count("HGMMA") == kernel.count(f"HGMMA.64x{columns}{instruction} ") > 0
        assert "UTMALDG.2D.MULTICAST" in kernel
        assert "USETMAXREG" in kernel
        assert re.search(r"STG\.E\.128" if dtype != "If" else r"STG\.E\.64", kernel)


@pytest.mark.parametrize("dtype", WGMMA)
def test_wgmmas_of_a_stage_follow_each_other(sm_90a, dtype):
    """Four at a time are in flight: only the last of them is waited for."""
    kernels = instances(sm_90a, "linear_wgmma_kernel", dtype)
    assert len(kernels) == 2 * WGMMA[dtype][1]
    for kernel in kernels:
        order = re.findall(r"HGMMA[^;]*|WARPGROUP\.DEPBAR[^;]*", kernel)
        products = [x for x in order if x.startswith("HGMMA")]
        assert len(products) % 4 == 0
        for first in range(0, len(products), 4):
            assert ["gsb0" in x for x in products[first : first + 4]] == [False, False, False, True]
        waits = [i for i, x in enumerate(order) if x.startswith("WARPGROUP")]
        assert all("gsb0" in order[i - 1] or order[i - 1].startswith("WARPGROUP") for i in waits)


def test_a_training_steps_products_of_pixels_are_made_in_registers(sm_90a):
    """Two loops over gradients, of 3 and 4 units; each pixel's number takes two instructions."""
    (pixels,) = instances(sm_90a, "train_steps_kernelIh")
    assert pixels.count("HMMA.1688.F32.TF32") == 20 + 14 + 18
    assert len(re.findall(r"PRMT \S+, \S+, 0x744[0-3],", pixels)) == 32 + 24 + 32
    assert "I2F.U8" not in pixels
    assert not re.search(r"\bLDL\b", pixels)  # STL: what printf is given
    (floats,) = instances(sm_90a, "train_steps_kernelIf")
    assert "HMMA" not in floats
