"""Build mnist_ext._C for AArch64 against PyTorch's wheel, and run the tests of the ops by qemu.

    python tools/aarch64_ops.py
    python tools/aarch64_ops.py -x tests/ops/test_linear.py

On Debian 12 with its packages qemu-user and g++-aarch64-linux-gnu, and a Python that has pip. All
that is fetched and built lies in build/aarch64: Debian's Python for arm64, from the sources that
apt knows but beside its own state, so that nothing is installed and nobody needs to be root; the
wheels; a copy of the package with the library. What stands behind goes to pytest.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import check_kernels

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "aarch64"
SYSROOT = FOLDER / "sysroot"
PACKAGES = FOLDER / "packages"

DEBIAN = ["python3.11", "libpython3.11-dev", "libstdc++6", "libgomp1"]
TORCH = "2.10.0"  # the last one whose wheel for AArch64 is without CUDA, and small
# By name: pip asks what depends on what of the processor at hand, which is not AArch64.
WHEELS = f"torch=={TORCH} torchvision==0.25.0 filelock typing-extensions sympy mpmath networkx \
    jinja2 markupsafe fsspec numpy pillow scipy safetensors tqdm pytest iniconfig packaging pluggy \
    pygments setuptools pybind11".split()
PLATFORMS = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (28, 27, 17)]

SOURCES = ["csrc/bindings/cpu.cpp", "csrc/ops/*.cpp", "csrc/cpu/*.cpp", "csrc/cpu/threads/*.cpp"]
COMPILE = [
    "aarch64-linux-gnu-g++",
    *check_kernels.FLAGS,
    *check_kernels.WARNINGS,
    "-fPIC",
    "-fvisibility=hidden",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    f'-DMNIST_EXT_TORCH_VERSION="{TORCH}"',
    '-DMNIST_EXT_NO_CUDA_REASON="built by tools/aarch64_ops.py"',
    "-DMNIST_EXT_ISA=baseline",
    f"-isystem{PACKAGES}/pybind11/include",
    f"-isystem{PACKAGES}/torch/include",
    f"-isystem{PACKAGES}/torch/include/torch/csrc/api/include",
    f"-isystem{SYSROOT}/usr/include/python3.11",
    f"-idirafter{SYSROOT}/usr/include",  # Debian's libc is there too: the compiler's own first
]
TESTS = [f"tests/ops/test_{name}.py" for name in ("linear", "cross_entropy", "mlp", "optim")]
TESTS.append("tests/train_step/test_step.py")
# A thousand steps were not at their end after seven minutes of processor time under qemu.
SELECTED = "not emulated and not a_thousand_steps"


def fetch() -> None:
    """Unpack Debian's Python and the wheels, once; what has no ".new" in its name is whole."""
    if not SYSROOT.exists():
        apt, new = FOLDER / "apt", FOLDER / "sysroot.new"
        for name in ("lists", "archives"):
            (apt / name / "partial").mkdir(parents=True, exist_ok=True)
        (apt / "status").touch()  # nothing is installed: all that they depend on is fetched too
        options = ["APT::Architecture=arm64", "APT::Architectures=arm64", "APT::Sandbox::User="]
        options += [f"Dir::State={apt}", f"Dir::State::status={apt}/status", f"Dir::Cache={apt}"]
        command = ["apt-get", "-qq", *(f"-o{option}" for option in options)]
        only = ["--download-only", "--no-install-recommends", "--yes"]
        subprocess.run([*command, "update"], check=True)
        subprocess.run([*command, "install", *only, *DEBIAN], check=True)
        for package in (apt / "archives").glob("*.deb"):
            subprocess.run(["dpkg", "-x", package, new], check=True)
        new.rename(SYSROOT)
    if not PACKAGES.exists():
        new = FOLDER / "packages.new"
        only = ["--only-binary=:all:", "--no-deps", "--python-version=311", *PLATFORMS]
        pip = [sys.executable, "-m", "pip", "install", "-q", *only, f"--target={new}", *WHEELS]
        subprocess.run(pip, check=True)
        new.rename(PACKAGES)


def build() -> None:
    """Put the package, with its version and the library, beside the wheels."""
    shutil.rmtree(PACKAGES / "mnist_ext", ignore_errors=True)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "mnist_ext", PACKAGES / "mnist_ext", ignore=ignored)
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    metadata = PACKAGES / f"mnist_ext-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(exist_ok=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: mnist-ext\nVersion: {version}\n")

    def compiled(source: Path) -> Path:
        path = FOLDER / "objects" / source.relative_to(ROOT).with_suffix(".o")
        path.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([*COMPILE, "-c", source, "-o", path], check=True)
        return path

    sources = [path for pattern in SOURCES for path in sorted(ROOT.glob(pattern))]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        objects = list(pool.map(compiled, sources))
    library = PACKAGES / "mnist_ext" / "_C.cpython-311-aarch64-linux-gnu.so"
    torchs = [f"-L{PACKAGES}/torch/lib", "-ltorch_cpu", "-lc10", "-Wl,--allow-shlib-undefined"]
    link = [COMPILE[0], "-shared", "-fopenmp", *objects, *torchs, "-o", library]
    subprocess.run(link, check=True)


def main() -> int:
    """Fetch, build, test."""
    fetch()
    build()
    # Threads that wait by spinning would take the cores from those that they wait for.
    environment = {"PYTHONPATH": str(PACKAGES), "PYTHONSAFEPATH": "1", "OMP_WAIT_POLICY": "passive"}
    python = ["qemu-aarch64", "-L", SYSROOT, SYSROOT / "usr/bin/python3.11"]
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--best-isa", "-k", SELECTED]
    command = [*python, *pytest, *(sys.argv[1:] or TESTS)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}).returncode


if __name__ == "__main__":
    sys.exit(main())
