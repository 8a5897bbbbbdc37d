"""Where a figure comes from: printed above every table."""

import datetime
import importlib.metadata
import os
import subprocess
from pathlib import Path

import torch

import mnist_ext
from mnist_ext.app.bench.machine import cpu_model


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        process = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git, as on a machine that got the files alone
        return "unknown"
    return process.stdout.strip() or "unknown"


def jax_version() -> str:
    try:
        return importlib.metadata.version("jax")
    except importlib.metadata.PackageNotFoundError:
        return ""


def fields() -> dict[str, object]:
    """Return the columns that a CSV row carries to say where it comes from."""
    info = mnist_ext.build_info()
    return {
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "isa": info["cpu_isa"],
        "mnist_ext": info["version"],
        "torch": info["torch"],
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "jax": jax_version(),
        "python": info["python"],
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


def describe() -> str:
    f = fields()
    return (
        f"{f['cpu']}, {os.cpu_count()} CPUs, {f['threads']} threads, "
        f"load {os.getloadavg()[0]:.1f}\n"
        f"mnist_ext {f['mnist_ext']} ({f['isa']}), commit {f['commit']}, "
        f"torch {f['torch']} ({f['torch_isa']}), Python {f['python']}, {f['date']}"
    )
