"""What the CPU's kernels are compiled for, and with which flags for each."""

import platform


def of(machine: str) -> dict[str, list[str]]:
    """Return the flags by instruction set, of a processor named as by `uname -m`."""
    flags: dict[str, list[str]] = {"baseline": []}
    if machine in ("x86_64", "AMD64"):
        flags["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
        flags["avx512"] = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"]
        flags["amx"] = [*flags["avx512"], "-mamx-tile", "-mamx-bf16", "-DMNIST_EXT_AMX"]
    return flags


FLAGS = of(platform.machine())
