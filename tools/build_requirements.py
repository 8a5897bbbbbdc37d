"""What the build needs, checked before it starts: one line that says what is missing, or None."""

import importlib.util
import os
import re
import shlex
import subprocess

SETUPTOOLS = 77  # reads the licence as pyproject.toml writes it
GCC = 11


def missing_packages(setuptools_version: str) -> str | None:
    """Return what is to be installed where pip does not (--no-build-isolation, setup.py)."""
    wanted = {"torch": "'torch>=2.10'", "pybind11": "'pybind11>=2.13'"}
    missing = [pip for name, pip in wanted.items() if importlib.util.find_spec(name) is None]
    if int(setuptools_version.split(".")[0]) < SETUPTOOLS:
        missing.append(f"'setuptools>={SETUPTOOLS}'")
    if not missing:
        return None
    return (
        f"mnist_ext: the build needs {', '.join(missing)} (setuptools is {setuptools_version}): "
        f"run `pip install {' '.join(missing)} ninja`, or leave out --no-build-isolation"
    )


def missing_compiler() -> str | None:
    """Return which compiler is needed, where there is none or an old GCC."""
    compiler = os.environ.get("CXX", "c++")
    needed = f"mnist_ext: the build needs a C++20 compiler, GCC {GCC} or later"
    advice = "install one (`apt install g++` on Debian and Ubuntu) or set CC and CXX to one"
    try:
        macros = subprocess.run(
            [*shlex.split(compiler), "-dM", "-E", "-x", "c++", os.devnull],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError, IndexError):
        return f"{needed}; {compiler!r} cannot be run: {advice}"
    gcc = re.search(r"^#define __GNUC__ (\d+)$", macros, re.M)
    if gcc and "#define __clang__ " not in macros and int(gcc[1]) < GCC:
        return f"{needed}; {compiler!r} is GCC {gcc[1]}: {advice}"
    return None
