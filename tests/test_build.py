"""How the build finds a CUDA compiler, or asks for one."""

import re
import shlex
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import build_backend
import build_requirements
import cuda_toolkit


def make_toolkit(home: Path, number: int) -> Path:
    for folder in ("bin", "include", "lib"):
        (home / folder).mkdir(parents=True)
    (home / "bin" / "nvcc").touch()
    (home / "include" / "cuda_runtime.h").touch()
    (home / "include" / "cuda.h").write_text(f"#define CUDA_VERSION {number}\n")
    (home / "lib" / "libcudart_static.a").touch()
    return home


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch, tmp_path):
    """Hide every toolkit that this machine may have."""
    for name in ("CUDA_HOME", "CUDA_PATH", "MNIST_EXT_CUDA", "MNIST_EXT_CUDA_ARCH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(cuda_toolkit.glob, "glob", lambda pattern: [])
    monkeypatch.setattr(sys, "path", [])


def test_nothing_there():
    assert cuda_toolkit.find("13.0") is None


def test_environment_comes_first(monkeypatch, tmp_path):
    first, second = (make_toolkit(tmp_path / name, 13000) for name in "ab")
    monkeypatch.setattr(cuda_toolkit.glob, "glob", lambda pattern: [str(second)])
    assert cuda_toolkit.find("13.0").home == second
    monkeypatch.setenv("CUDA_HOME", str(first))
    assert cuda_toolkit.find("13.0").home == first


def test_another_major_version_is_passed_over(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "old", 12080)))
    assert cuda_toolkit.find("13.0") is None
    monkeypatch.setenv("CUDA_PATH", str(make_toolkit(tmp_path / "new", 13020)))
    toolkit = cuda_toolkit.find("13.0")
    assert (toolkit.home, toolkit.version) == (tmp_path / "new", "13.2")
    assert toolkit.libraries == tmp_path / "new" / "lib"


@pytest.mark.parametrize("missing", ["bin/nvcc", "include/cuda.h"])
def test_a_folder_without_compiler_or_headers_is_passed_over(monkeypatch, tmp_path, missing):
    """The headers come with torch itself, to where the compiler from PyPI would lie."""
    home = make_toolkit(tmp_path / "site" / "nvidia" / "cu13", 13000)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site")])
    assert cuda_toolkit.find("13.0").home == home
    (home / missing).unlink()
    assert cuda_toolkit.find("13.0") is None


EVERY = ["8.0", "9.0", "10.0", "12.0"]  # that a toolkit of today knows


@pytest.mark.parametrize(
    ("asked_for", "toolkit", "gpus", "expected"),
    [
        (None, "12.6", [], ["8.0", "9.0"]),
        (None, "13.0", [], EVERY),
        ("", "13.0", [], EVERY),  # make gpu leaves it empty without a GPU
        (" ", "13.0", [], EVERY),
        ("10.0;9.0", "13.0", [], ["9.0", "10.0"]),
        # Those of the GPUs that are there.
        (None, "13.0", [(8, 6), (9, 0), (9, 0)], ["8.0", "9.0"]),
        (None, "13.0", [(12, 1)], ["12.0"]),
        (None, "13.0", [(7, 5)], EVERY),  # which has no use for any
        ("all", "13.0", [(12, 1)], EVERY),
        ("9.0", "13.0", [(12, 1)], ["9.0"]),
    ],
)
def test_architectures(monkeypatch, asked_for, toolkit, gpus, expected):
    if asked_for is not None:
        monkeypatch.setenv("MNIST_EXT_CUDA_ARCH", asked_for)
    assert cuda_toolkit.architectures(toolkit, gpus) == expected


def test_an_unknown_architecture(monkeypatch):
    monkeypatch.setenv("MNIST_EXT_CUDA_ARCH", "hopper")
    with pytest.raises(SystemExit, match="got 'hopper'"):
        cuda_toolkit.architectures("13.0")


def test_passes_of_the_compiler():
    """Two for each file with all architectures; those of tensor cores need others."""

    def code(architectures, tensor_cores):
        flags = cuda_toolkit.code_flags(architectures, tensor_cores)
        return [flag.removeprefix("-gencode=arch=compute_").split(",code=") for flag in flags]

    assert code(EVERY, False) == [
        *(["80", "sm_80"], ["90", "sm_90"], ["90", "sm_100"], ["90", "sm_120"]),
        ["90", "compute_90"],
    ]
    assert code(EVERY, True) == [
        *(["80", "sm_80"], ["80", "sm_100"], ["80", "sm_120"], ["80", "compute_80"]),
        ["90a", "sm_90a"],
    ]
    assert code(["8.6"], False) == [["80", "sm_86"], ["80", "compute_80"]]
    assert code(["9.0"], True) == [["80", "compute_80"], ["90a", "sm_90a"]]


def test_compiler_on_path_that_is_a_script_elsewhere(tmp_path):
    home = make_toolkit(tmp_path / "toolkit", 13000)
    script = tmp_path / "bin" / "nvcc"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\necho '#$ TOP={home}/bin/..' >&2\n")
    script.chmod(0o755)
    assert cuda_toolkit.find("13.0").home == home


def test_packages_that_are_missing(monkeypatch):
    missing = build_requirements.missing_packages
    monkeypatch.setattr(build_requirements.importlib.util, "find_spec", lambda name: object())
    assert missing("77.0.3") is None
    assert "needs 'setuptools>=77' (setuptools is 65.5.0): run `pip inst" in missing("65.5.0")
    monkeypatch.setattr(
        build_requirements.importlib.util, "find_spec", lambda name: None if "py" in name else 1
    )
    assert "`pip install 'pybind11>=2.13' ninja`" in missing("80.1")


@pytest.mark.parametrize(
    ("macros", "refused"),
    [
        ("#define __GNUC__ 10", "'fake' is GCC 10: install one"),
        ("#define __GNUC__ 11", None),
        ("#define __clang__ 1\n#define __GNUC__ 4", None),
        (None, "'fake' cannot be run"),
    ],
)
def test_compilers(monkeypatch, tmp_path, macros, refused):
    monkeypatch.setenv("CXX", "fake")
    if macros:
        compiler = tmp_path / "bin" / "fake"
        compiler.parent.mkdir()
        compiler.write_text(f"#!/bin/sh\necho '{macros}'\n")
        compiler.chmod(0o755)
    message = build_requirements.missing_compiler()
    assert message is None if refused is None else refused in message


def test_the_makefile_installs_what_an_isolated_build_would():
    root = Path(__file__).parents[1]
    requires = re.search(r"^requires = \[(.*)\]$", (root / "pyproject.toml").read_text(), re.M)
    installed = re.search(r"^BUILD_REQUIRES := (.*)$", (root / "Makefile").read_text(), re.M)
    wanted = sorted(re.findall('"(.*?)"', requires[1]))
    assert sorted([*shlex.split(installed[1]), "torch>=2.10"]) == wanted


def test_what_pip_is_asked_for(monkeypatch, tmp_path):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(build_backend.build_meta, "get_requires_for_build_wheel", lambda _: [])
    ask = build_backend.get_requires_for_build_wheel
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "nvidia-cuda-nvcc==13.0.*" in ask()
    monkeypatch.setenv("MNIST_EXT_CUDA", "0")
    assert ask() == []
    monkeypatch.delenv("MNIST_EXT_CUDA")
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "toolkit", 13000)))
    assert ask() == []
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(torch.version, "cuda", None)  # a CPU-only torch brings no compiler along
    assert ask() == []
    monkeypatch.setattr(torch.version, "cuda", "12.8")  # for which PyPI has none
    assert ask() == []


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ((7, 5), "8.0;9.0", False),
        ((8, 0), "9.0", False),
        ((8, 6), "8.0;9.0", True),
        ((9, 0), "8.0;9.0", True),
        ((11, 0), "8.0;9.0;10.0;12.0", False),
        ((10, 3), "8.0;9.0;10.0;12.0", True),
        ((13, 0), "8.0;9.0;10.0;12.0", True),
    ],
)
def test_gpus_that_the_kernels_run_on(capability, architectures, expected):
    """Others get PyTorch's ops."""
    decision = pytest.importorskip("mnist_ext._decision")
    assert decision.is_built_for(capability, architectures) == expected
