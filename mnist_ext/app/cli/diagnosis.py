"""What is built, what is missing, what is wrong, and what to do about it."""

import ctypes
import importlib.metadata
import os
import shutil
from pathlib import Path
from typing import Any

import torch

import mnist_ext
from mnist_ext import build_info
from mnist_ext.app import UserError
from mnist_ext.app.bench.machine import cpu_model, cpus
from mnist_ext.app.cli.kernel_check import kernels_right
from mnist_ext.app.data import datasets

# Packages that something here can use, and what for.
_OPTIONAL = {
    "matplotlib": "eval --plots",
    "tensorboard": "train --tensorboard",
    "jax": "a baseline in the benchmarks of the repository",
}
_REQUIRED = ("torchvision", "numpy", "safetensors", "tqdm", "pillow")


def examine() -> dict[str, Any]:
    """Look at everything.

    Returns:
        JSON values: those of ``build_info`` and, besides them,

        - ``location``: the folder of the package.
        - ``packages``, ``optional_packages``: versions by name, None where one is not installed.
        - ``cpu``, ``cpus``: its name, and how many this process may use.
        - ``kernels_right``: for each instruction set, whether its kernels agree with PyTorch's ops.
        - ``gpu``: ``torch_cuda``, ``driver``, ``devices``, ``nvcc``; None where there is none.
        - ``data``: by data set, the ``folder`` it is in and the ``problem`` with it, or None.
        - ``problems``: what is wrong and needs mending.
        - ``hints``: what could be had besides.
        - ``next_step``: what to do now.
    """
    report = build_info()
    report["location"] = str(Path(mnist_ext.__file__).parent)
    report["packages"] = {name: _version(name) for name in _REQUIRED}
    report["optional_packages"] = {name: _version(name) for name in _OPTIONAL}
    report["cpu"] = cpu_model()
    report["cpus"] = cpus()
    report["kernels_right"] = kernels_right()
    report["gpu"] = _gpu()
    report["data"] = {name: _data_state(name) for name in ("mnist", "fashion-mnist")}
    report["problems"] = _problems(report)
    report["hints"] = _hints(report)
    report["next_step"] = (
        report["problems"][0] if report["problems"] else "mnist-ext train --recipe best"
    )
    return report


def rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Return a report as labels and texts for people."""
    gpu = report["gpu"]
    built_for = ", ".join(report["cuda"]) if report["cuda"] else "not built"
    right = report["kernels_right"]
    lines = [
        ("mnist_ext", f"{report['version']} in {report['location']}"),
        (
            "PyTorch",
            f"{report['torch']}; mnist_ext was built with {report['torch_built_with']}",
        ),
        ("Python", f"{report['python']}, {report['platform']}"),
        ("packages", _listed(report["packages"])),
        ("CPU kernels", f"{report['cpu_isa']}: {report['cpu_isa_reason']}"),
        ("checked here", ", ".join(f"{isa} {_verdict(right[isa])}" for isa in right)),
        ("CPU", f"{report['cpu']}; {report['openmp_threads']} threads on {report['cpus']} CPUs"),
        ("OpenMP", ", ".join(report["openmp_runtimes"]) or "unknown"),
        ("CUDA kernels", f"{built_for}: {report['cuda_reason']}"),
        ("CUDA", _gpu_text(gpu)),
    ]
    for name, state in report["data"].items():
        found = state["problem"] or state["folder"] or "not found; 'train' would download it"
        lines.append((name, found))
    lines.append(("digits", "part of the package"))
    for name, version in report["optional_packages"].items():
        lines.append((name, version or f"not installed; for {_OPTIONAL[name]}"))
    lines += [("problem", text) for text in report["problems"]]
    lines += [("hint", text) for text in report["hints"]]
    lines.append(("next step", report["next_step"]))
    return lines


def _listed(versions: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {version or 'missing'}" for name, version in versions.items())


def _verdict(right: bool) -> str:
    return "right" if right else "WRONG RESULTS"


def _gpu_text(gpu: dict[str, Any]) -> str:
    if gpu["torch_cuda"] is None:
        return "this torch has none"
    devices = ", ".join(gpu["devices"]) or "no GPU"
    return (
        f"{devices}; torch for CUDA {gpu['torch_cuda']}; driver {gpu['driver'] or 'not found'}; "
        f"nvcc {gpu['nvcc'] or 'not found'}"
    )


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> dict[str, Any]:
    state: dict[str, Any] = {"torch_cuda": torch.version.cuda, "driver": None, "devices": []}
    try:
        number = ctypes.c_int()
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
        state["driver"] = f"{number.value // 1000}.{number.value % 1000 // 10}"
    except (OSError, AttributeError):
        pass
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            state["devices"].append(f"{torch.cuda.get_device_name(i)} ({major}.{minor})")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [shutil.which("nvcc"), *(f"{home}/bin/nvcc" for home in homes if home)]
    state["nvcc"] = next((c for c in candidates if c and Path(c).exists()), None)
    return state


def _data_state(name: str) -> dict[str, str | None]:
    try:
        folder = datasets.find(name)
    except UserError as error:
        return {"folder": None, "problem": str(error)}
    return {"folder": None if folder is None else str(folder), "problem": None}


def _problems(report: dict[str, Any]) -> list[str]:
    problems = []
    if wrong := [isa for isa, right in report["kernels_right"].items() if not right]:
        problems.append(
            f"the kernels for {', '.join(wrong)} give wrong results here: build mnist_ext again, "
            "and report it if that does not help"
        )
    if report["next_step"]:
        problems.append(report["next_step"])
    if report["cuda"] is None and "cannot be loaded" in report["cuda_reason"]:
        problems.append(report["cuda_reason"])
    if missing := [name for name, version in report["packages"].items() if version is None]:
        problems.append(f"{', '.join(missing)} missing: run pip install {' '.join(missing)}")
    problems += [state["problem"] for state in report["data"].values() if state["problem"]]
    return problems


def _hints(report: dict[str, Any]) -> list[str]:
    hints = []
    if report["cpu_isa"] not in ("amx", report["cpu_isa_available"][-1]):
        hints.append(f"this CPU has {report['cpu_isa_available'][-1]}: unset MNIST_EXT_ISA")
    if report["openmp_threads"] > report["cpus"]:
        hints.append(
            f"{report['openmp_threads']} threads share {report['cpus']} CPUs: set "
            f"OMP_NUM_THREADS={report['cpus']}"
        )
    if report["gpu"]["devices"] and not report["cuda"]:
        hints.append(f"the GPU is not used by mnist_ext's kernels: {report['cuda_reason']}")
    if report["data"]["mnist"] == {"folder": None, "problem": None}:
        hints.append(
            "without a network, put MNIST's four files into DIR/MNIST/raw and set "
            "MNIST_EXT_DATA=DIR; else the embedded digits serve"
        )
    return hints
