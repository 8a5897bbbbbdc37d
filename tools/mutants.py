"""Break csrc in many small ways, one at a time, and count how many of them the tests notice.

    python tools/mutants.py --number 200 --seed 1

In a copy of the sources under build/mutants, each fault that tools/mutations.py draws is compiled,
with what the file reaches, at -O1 and for one instruction set (CUDA on the emulator), and the tests
of its folder run up to the first failure; before that they have passed on the unbroken copy. A
fault does not count if it does not compile, or leaves every byte of the library as it was. Each
result is a row of tests/mutants.csv: the same command goes on where the last one was stopped, also
at a later commit, where a row counts as long as its line of csrc is there. A fault that changes
nothing that the contract names cannot be noticed: whoever finds one writes "equivalent: " and why
in place of its result, and it does not count. Exit code 1: fewer than 95 % were noticed.
"""

import argparse
import csv
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path

import isa_flags
import pybind11
import torch
from mutations import ROOT, Mutation, drawn
from torch.utils import cpp_extension

RESULTS = ROOT / "tests" / "mutants.csv"  # mutation, result, commit
FOLDER = ROOT / "build" / "mutants"
COPY = FOLDER / "copy"  # of the sources, one of them broken
KEPT = FOLDER / "kept"  # what the unbroken copy was built to

SECONDS = 900  # for tests of the unbroken copy
ISA = "avx512" if "avx512f" in Path("/proc/cpuinfo").read_text() else "avx2"
FLAGS = [
    "-std=c++20",
    "-O1",
    "-fexpensive-optimizations",  # with fused multiply-adds
    "-w",
    "-fopenmp",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
]

# By name: tests that take seconds each, for what the others have let pass.
SLOW = (
    "never_in_memory or beyond_a_tensor or running_out_of_memory or huge_pages or two_processes or "
    "softcap_z_loss_and_lse or a_thousand_steps or do_not_grow or does_not_grow or 1000]"
)

# Where in the copy a library is built, and pytest's -k for the devices that run it.
CPU = ("mnist_ext", "not emulated")
EMULATED = ("build/emulator", "emulated or cuda")
AMX = ("build/amx_model", "model")
PATH = f"{COPY}:{COPY / 'tests'}:{ROOT}"  # from the last one the version alone
BUILT_BY = {EMULATED[0]: "emulated.library()", AMX[0]: "amx_model.register()"}


def _ops(*names: str) -> list[str]:
    return [f"tests/ops/test_{name}.py" for name in names]


LAYERS = _ops("linear", "mlp")
LOSS = _ops("cross_entropy")
HEAD = _ops("linear_cross_entropy", "head_in_models")
STEP = ["tests/train_step", *_ops("memory")]
ERRORS = _ops("errors", "autograd", "random_calls")
THREADS = ["tests/cpu/test_parallel.py"]

# The libraries that a file reaches and the tests of each, the fastest first. The first pattern that
# fits decides.
TESTS = {
    r"cpu/(simd/amx|product/(amx|planes))": [(AMX, ["tests/cpu"])],
    r"cpu/(cross_entropy|simd/(exp|tanh))": [(CPU, [*LOSS, *HEAD[:1], "tests/train_step"])],
    r"cpu/product": [(CPU, [*LAYERS, "tests/train_step", *HEAD[:1]])],
    r"cpu/sgd": [(CPU, [*_ops("optim"), "tests/train_step"])],
    r"cpu/dispatch": [(CPU, [*LAYERS, *ERRORS]), (AMX, ["tests/cpu"])],
    r"cpu/(executor|train_steps|threads)": [(CPU, [*THREADS, *STEP, *HEAD, *LAYERS])],
    r"cpu": [(CPU, [*_ops("optim"), *LAYERS, *LOSS, *HEAD[:1], "tests/train_step"])],
    r"cuda/(product|device/(tensor|hopper))": [
        (EMULATED, ["tests/cuda/test_cuda_products.py", *LAYERS]),
    ],
    r"cuda/(cross_entropy|device/thread)": [
        (EMULATED, ["tests/cuda/test_cuda_cross_entropy.py", *LOSS, *HEAD[:1]]),
    ],
    r"cuda/sgd": [(EMULATED, [*_ops("optim"), "tests/train_step"])],
    r"cuda": [(EMULATED, ["tests/cuda", "tests/train_step", *LAYERS, *LOSS])],
    r"ops/cross_entropy": [(CPU, [*LOSS, *ERRORS]), (EMULATED, LOSS)],
    r"(ops|programs)/linear_cross": [(CPU, [*HEAD, *ERRORS]), (EMULATED, HEAD)],
    r"(ops|programs)/layer": [(CPU, [*LAYERS, *ERRORS]), (EMULATED, LAYERS)],
    r"ops/sgd": [(CPU, _ops("optim", "errors"))],
    r"(ops|programs)/train_step": [
        (CPU, [*STEP, *ERRORS]),
        (EMULATED, ["tests/train_step", "tests/cuda/test_cuda_steps.py"]),
    ],
    r"": [
        (CPU, [*ERRORS, *LAYERS, *LOSS, *HEAD, *STEP]),
        (EMULATED, ["tests/cuda", *LAYERS, *LOSS]),
    ],
}


def write_ninja() -> None:
    """Say how mnist_ext._C is built: kernels of one instruction set, by the names of all."""
    version = torch.__version__
    macros = [
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f"'-DMNIST_EXT_TORCH_VERSION=\"{version}\"'",
        "'-DMNIST_EXT_NO_CUDA_REASON=\"built by tools/mutants.py\"'",
    ]
    paths = (pybind11.get_include(), *cpp_extension.include_paths(), sysconfig.get_path("include"))
    compile_flags = " ".join([*FLAGS, *macros, *(f"-isystem{path}" for path in paths)])

    def table(isa: str) -> str:
        return f"_ZN9mnist_ext{len(isa)}{isa}6kTableE"

    names = [f"-Wl,--defsym={table(isa)}={table(ISA)}" for isa in isa_flags.FLAGS if isa != ISA]
    torchs = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu", "-lc10"]
    folders = [COPY / "csrc" / folder for folder in ("ops", "cpu")]
    found = sorted(path for folder in folders for path in folder.rglob("*.cpp"))
    sources = ["csrc/bindings/cpu.cpp", *(str(path.relative_to(COPY)) for path in found)]
    objects = [f"objects/{source}.o" for source in sources]
    lines = [
        "rule compile",
        f"  command = g++ -MMD -MF $out.d {compile_flags} $flags -c $in -o $out",
        "  deps = gcc",
        "  depfile = $out.d",
        "rule link",
        f"  command = g++ -shared -fopenmp $in {' '.join([*names, *torchs])} -o $out",
        f"build {CPU[0]}/_C{sysconfig.get_config_var('EXT_SUFFIX')}: link {' '.join(objects)}",
    ]
    isa = " ".join([f"-DMNIST_EXT_ISA={ISA}", *isa_flags.FLAGS[ISA]])
    for source, made in zip(sources, objects, strict=True):
        lines.append(f"build {made}: compile {source}")
        lines += [f"  flags = {isa}"] if source.endswith("kernels.cpp") else []
    (COPY / "build.ninja").write_text("\n".join(lines) + "\n")


def outputs() -> list[Path]:
    """List what compilers have written to the copy."""
    return [path for suffix in ("*.o", "*.so") for path in COPY.rglob(suffix)]


def restore() -> None:
    """Put back what was built of the unbroken copy, with its times, and the sources."""
    for path in outputs():
        kept = KEPT / path.relative_to(COPY)
        if kept.exists() and kept.stat().st_mtime_ns != path.stat().st_mtime_ns:
            shutil.copy2(kept, path)
    for name in ("benchmarks", "csrc", "docs", "mnist_ext", "tests", "tools", "pyproject.toml"):
        for path in [ROOT / name, *(ROOT / name).rglob("*")]:
            to = COPY / path.relative_to(ROOT)
            if path.is_dir() or path.suffix in (".so", ".pyc"):
                continue
            if not to.exists() or to.read_bytes() != path.read_bytes():
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, to)


@functools.cache
def prepare(place: str) -> None:
    """Build a library of the unbroken copy, where something changed."""
    write_ninja()
    subprocess.run(["ninja", "-j1", "--quiet"], cwd=COPY, check=True)
    if call := BUILT_BY.get(place):
        environment = {**os.environ, "PYTHONPATH": PATH, "MAX_JOBS": "1"}
        code = [sys.executable, "-c", f"import {call.split('.')[0]}; {call}"]
        subprocess.run(code, cwd=COPY, env=environment, check=True)
    for path in outputs():
        kept = KEPT / path.relative_to(COPY)
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, kept)


def run_tests(only: str, tests: list[str], seconds: float) -> str:
    """Return "passed", or what came instead, with the first test that failed; only: pytest's -k."""
    environment = {**os.environ, "PYTHONPATH": PATH, "OMP_WAIT_POLICY": "passive"}
    options = ["-x", "-q", "--best-isa", "--tb=no", "-p", "no:cacheprovider", "-k", only]
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *tests],
        cwd=COPY,
        env=environment,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        out, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return "hangs"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode < 0:
        last = re.search(r'File "\S*?(tests/\S+\.py)", line \d+ in (test_\w+)', out)
        where = f" in {last[1]}::{last[2]}" if last else ""
        return f"signal {-process.returncode}{where}"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", out, re.M)
    if process.returncode in (0, 5):  # 5: there are none
        return "passed"
    return failed[1] if failed else out.strip()[-300:]


def time_unbroken(only: str, tests: list[str], times: dict[str, float]) -> float:
    """Return how long the tests take where nothing is broken; they have to pass."""
    key = " ".join([only, *tests])
    if key not in times:
        start = time.monotonic()
        if (result := run_tests(only, tests, SECONDS)) != "passed":
            sys.exit(f"mutants.py: with nothing broken, {key}: {result}")
        times[key] = time.monotonic() - start
        print(f"{times[key]:5.0f} s with nothing broken: {key}", flush=True)
    return times[key]


def examine(mutation: Mutation, times: dict[str, float], slow: str) -> str:
    """Return what became of it.

    times: of tests where nothing is broken, by their names; slow: "not" for all but SLOW, or "".
    """
    file = mutation.file.removeprefix("csrc/")
    matrix = next(TESTS[pattern] for pattern in TESTS if re.match(pattern, file))
    runs = [
        (place, f"({devices}) and {slow} ({SLOW})", tests) for (place, devices), tests in matrix
    ]
    for place, only, tests in runs:
        prepare(place)
        time_unbroken(only, tests, times)
    text = (ROOT / mutation.file).read_text()
    broken = COPY / mutation.file
    status = broken.stat()
    broken.write_text(text[: mutation.begin] + mutation.new + text[mutation.end :])
    changed = False
    try:
        for place, only, tests in runs:
            library = next((COPY / place).rglob("*.so"))
            folder = COPY if place == CPU[0] else library.parent
            before = library.read_bytes()
            built = subprocess.run(["ninja", "-j1", "--quiet"], cwd=folder, capture_output=True)
            if built.returncode != 0:
                return "does not compile"
            changed = changed or library.read_bytes() != before
            # Tests that need much more than usual hang.
            seconds = 30 + 2 * time_unbroken(only, tests, times)
            if changed and (result := run_tests(only, tests, seconds)) != "passed":
                return f"noticed: {result}"
        return "NOT NOTICED" if changed else "changes nothing"
    finally:
        broken.write_text(text)
        os.utime(broken, ns=(status.st_atime_ns, status.st_mtime_ns))
        restore()


Results = dict[str, tuple[str, str]]  # by the mutation's name: what became of it, and the commit


def read_results(names: set[str]) -> Results:
    """Return those of mutations that there are."""
    if not RESULTS.exists():
        return {}
    with RESULTS.open(newline="") as file:
        rows = [row for row in csv.reader(file) if row[0] in names]
    return {name: (result, commit) for name, result, commit in rows}


def write_results(results: Results) -> None:
    """Write all of them."""
    with RESULTS.open("w", newline="") as file:
        rows = [(name, *result) for name, result in sorted(results.items())]
        csv.writer(file, lineterminator="\n").writerows(rows)


def counted(results: Results) -> int:
    """Return how many of them count."""
    return sum(result.startswith(("noticed", "NOT")) for result, _ in results.values())


def commit() -> str:
    """Return the one that the sources are from."""
    command = ["git", "describe", "--always", "--abbrev=10"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def main() -> int:
    """Draw, break, build, test, count."""
    parser = argparse.ArgumentParser(description="Count which of many faults the tests notice.")
    parser.add_argument("--number", type=int, default=20, help="of faults that count")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--minutes", type=float, default=1e9, help="then stop; the next call goes on"
    )
    parser.add_argument("--only", default="", metavar="TEXT", help="again those that contain it")
    args = parser.parse_args()
    start = time.monotonic()
    COPY.mkdir(parents=True, exist_ok=True)
    restore()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    # Of tests where nothing is broken, by their names; at another commit they have to pass again.
    times_file = FOLDER / f"times-{commit()}.json"
    times = json.loads(times_file.read_text()) if times_file.exists() else {}
    mutations = list(drawn(args.seed))
    results = read_results({mutation.name for mutation in mutations})
    for mutation in mutations:
        enough = not args.only and counted(results) >= args.number
        if enough or time.monotonic() - start > 60 * args.minutes:
            break
        if args.only not in mutation.name or (not args.only and mutation.name in results):
            continue
        result = examine(mutation, times, slow="not")
        if result == "NOT NOTICED":
            result = examine(mutation, times, slow="")
        results[mutation.name] = result, commit()
        write_results(results)
        times_file.write_text(json.dumps(times, indent=1))
        print(f"{time.monotonic() - start:5.0f} s {mutation.name}: {result}", flush=True)
    count = Counter(result.split(":")[0] for result, _ in results.values())
    print(f"{count['noticed']} of {counted(results)} noticed; {dict(count)}")
    for name, (result, _) in results.items():
        if result == "NOT NOTICED":
            print(f"not noticed: {name}")
    return int(count["noticed"] < 0.95 * counted(results))


if __name__ == "__main__":
    sys.exit(main())
