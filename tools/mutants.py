"""Break csrc in many small ways, one at a time, and count how many of them the tests notice.

    python tools/mutants.py --number 200 --seed 1

Draws mutations (a comparison, a constant, a barrier left out, ...) in turn from the CPU's kernels,
CUDA's kernels (on the emulator) and the ops; of each a random kind, then a random place. In a copy
of the sources under build/mutants it compiles what the file reaches, at -O1 and for one instruction
set, and runs the tests of the file's folder up to the first failure. A mutation does not count if
it does not compile, or leaves every byte of the library as it was. What was found is kept there:
the same command goes on where it was stopped. Exit code 1: fewer than 95 % were noticed.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "mutants"
COPY = FOLDER / "copy"  # of the sources, one of them broken
KEPT = FOLDER / "kept"  # what the unbroken copy was built to

# Text to look for and what to put there, by the kind of the fault. clang-format has put one space
# on either side of each operator with two operands.
TERM = r"[\w.]+(?:->\w+)*(?:\[\w+\]|\([^()]*\))?"
KINDS: dict[str, list[tuple[str, str]]] = {
    "comparison": [
        (r" < (?![^;?\n]*\?)", " <= "), (" <= ", " < "), (r" > (?![^;?\n]*\?)", " >= "), (" >= ", " > "),
        (r" < (?=[^;?\n]*\?)", " > "), (r" > (?=[^;?\n]*\?)", " < "),  # <= would not change a minimum
    ],
    "equality": [(" == ", " != "), (" != ", " == ")],
    "logic": [(" && ", " || "), (r" \|\| ", " && "), (r"\bif \(([^();]+)\)", r"if (!(\1))")],
    "arithmetic": [(r" \+ ", " - "), (" - ", " + "), (r" \* ", " + "), (" / ", " * "), (" % ", " / ")],
    "update": [(r" \+= ", " -= "), (r" \+= ", " = "), (r" \*= ", " = "), (r"\bmin\(", "max("), (r"\bmax\(", "min(")],
    "constant": [(r"(?<![\w.])(\d+)(?![\w.'])", r"(\1 + 1)"), (r"(?<![\w.])(\d+\.\d+)", r"1\1")],
    "flag": [(r"\btrue\b", "false"), (r"\bfalse\b", "true")],
    "index": [(r"(?<=[\w\])])\[([^\[\]&=]*[a-z_][^\[\]&=]*)\]", r"[\1 + 1]")],
    "stride": [(r"(?<= \* )([\w.]*(?:stride|pitch|\bld\w+))\b(?!\()", r"(\1 + 1)")],
    "mask": [(r"(?<=, )(lanes|rest|last|size|valid_bytes)\)", r"\1 - 1)"), (r"(?<=[ (!])(\w*(?:mask\w*|\.data)) \?", r"!\1 ?")],
    "term": [(rf" [+-] {TERM}", ""), (rf" [*/] {TERM}", "")],
    "barrier": [(r"__sync\w+\(\);|__threadfence\(\);|\bwgmma_fence\(\);|\b\w+wait\w*(?:<[^;>]*>)?\([^;]*\);|\b\w+\.(?:wait|arrive)\([^;]*\);", ";")],
    "statement": [(r"(?<=\n)( +)(?!return|break|continue|using|else|case|throw|delete)[\w.>\[\]-]+(?:<\w+>)?(?: [-+*/|&]?= [^;{}\n]+|\([^;{}\n]*\));", r"\1;")],
}

# Of these lines the result is the same by design, or no test can see the difference.
EXEMPT_LINES = {
    r"constexpr .*\bk\w*(Grain|Bytes|Blocks?|From|Threads|Together|Chunk|Strip\w*|Splits|Band|Stages)\b": "how work is cut up, and buffers",
    r"constexpr .*\bk(SumChain|SummedRows|LongK|Piece\w|DotK|ShortRow\w*|Fetches\w*|Least|FewestRows|Small\w*|Largest\w*)\b": "which of two ways is faster",
    r"prefetch|madvise|alignas|__launch_bounds__|\bgrain|cached_bytes|most_bytes": "speed alone",
    r"static_assert|static_cast<std::size_t>\(-1\)|cpu_supports|SYS_arch_prctl": "not at run time, or of another machine",
    r"\bfail<|\bfail\(|\bthrow ": "what a message says",
}
EXEMPT_FUNCTIONS = {  # which kernel, or which cut, is the fastest: the tests hold each to the same contract
    "use_dot_products", "use_amx", "row_threads", "is_better_transposed", "multiply_adds", "prefetch_rows", "has_amx",
    "detect", "advise_huge_pages", "threads_for", "processors",
}  # fmt: skip


ISA = "avx512" if "avx512f" in Path("/proc/cpuinfo").read_text() else "avx2"
COMMON = ["-std=c++20", "-O1", "-w", "-fopenmp", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast"]

# A library: where in the copy it is built, and pytest's -k for the devices that it runs.
CPU = (".", "not emulated")
EMULATED = ("build/emulator", "emulated or cuda")
AMX = ("build/amx_model", "model")
SECONDS = 240  # of tests; then they hang

# The tests of a folder, the fastest first. The first pattern that fits a file decides.
LOSS = ["tests/ops/test_cross_entropy.py", "tests/ops/test_linear_cross_entropy.py", "tests/train_step"]
PRODUCT = ["tests/ops/test_linear.py", "tests/ops/test_mlp.py", "tests/train_step", "tests/ops/test_linear_cross_entropy.py"]
HEAD = ["tests/ops/test_linear_cross_entropy.py", "tests/ops/test_head_in_models.py"]
STEP = ["tests/train_step", "tests/ops/test_memory.py"]
ERRORS = ["tests/ops/test_errors.py", "tests/ops/test_autograd.py", "tests/ops/test_random_calls.py"]
TESTS = {
    r"csrc/cpu/(simd/amx|product/(amx|planes))": [(AMX, ["tests/cpu"])],
    r"csrc/cpu/cross_entropy|csrc/cpu/simd/(exp|tanh)": [(CPU, LOSS)],
    r"csrc/cpu/product": [(CPU, PRODUCT)],
    r"csrc/cpu/sgd": [(CPU, ["tests/ops/test_optim.py", "tests/train_step"])],
    r"csrc/cpu/(executor|train_steps)": [(CPU, [*STEP, *HEAD, "tests/ops/test_mlp.py"])],
    r"csrc/cpu": [(CPU, ["tests/ops/test_optim.py", *PRODUCT, *LOSS[:1]])],
    r"csrc/cuda/product|csrc/cuda/device/(tensor|hopper)": [
        (EMULATED, ["tests/cuda/test_cuda_products.py", "tests/ops/test_linear.py", "tests/ops/test_mlp.py"])
    ],
    r"csrc/cuda/cross_entropy|csrc/cuda/device/thread": [
        (EMULATED, ["tests/cuda/test_cuda_cross_entropy.py", *LOSS])
    ],
    r"csrc/cuda/sgd": [(EMULATED, ["tests/ops/test_optim.py", "tests/train_step"])],
    r"csrc/cuda": [(EMULATED, ["tests/cuda", "tests/train_step", "tests/ops/test_linear.py", *LOSS])],
    r"csrc/ops/cross_entropy": [(CPU, [*LOSS[:1], *ERRORS]), (EMULATED, LOSS[:1])],
    r"csrc/(ops/linear_cross|programs/linear_cross)": [(CPU, [*HEAD, *ERRORS]), (EMULATED, HEAD)],
    r"csrc/ops/layers|csrc/programs/layer": [(CPU, [*PRODUCT[:2], *ERRORS]), (EMULATED, PRODUCT[:3])],
    r"csrc/ops/sgd": [(CPU, ["tests/ops/test_optim.py", "tests/ops/test_errors.py"])],
    r"csrc/(ops|programs)/train_step": [(CPU, [*STEP, "tests/ops/test_errors.py"]), (EMULATED, [*STEP, "tests/cuda"])],
    r"csrc": [(CPU, [*ERRORS, *PRODUCT, *LOSS]), (EMULATED, ["tests/cuda", *PRODUCT, *LOSS])],
}  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    """The text at [begin, end) of a file, and what replaces it."""

    file: str
    begin: int
    end: int
    new: str
    kind: str

    def __str__(self) -> str:
        text = (ROOT / self.file).read_text()
        line = text.count("\n", 0, self.begin) + 1
        old = text[self.begin : self.end].strip()
        start = text.rindex("\n", 0, self.begin) + 1
        whole = text[start : text.index("\n", self.begin)].strip()
        return f"{self.file}:{line}:{self.begin - start} {self.kind} | {whole} | {old} -> {self.new.strip()}"


def blank(match: re.Match[str]) -> str:
    """As many spaces, so that what follows stays where it is."""
    return re.sub(r"[^\n]", " ", match[0])


def code_of(text: str) -> str:
    """Blank all in which a fault would say nothing."""
    text = re.sub(r"//[^\n]*|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])'|^ *#(?:[^\n]*\\\n)*[^\n]*", blank, text, flags=re.M)
    text = re.sub("|".join(rf"[^\n]*(?:{rule})[^\n]*" for rule in EXEMPT_LINES), blank, text)
    functions = "|".join(sorted(EXEMPT_FUNCTIONS))
    return re.sub(rf"^[\w ].*\b(?:{functions})\([^;]*?\{{\n.*?^\}}", blank, text, flags=re.M | re.S)


def mutations(files: list[Path]) -> dict[str, list[Mutation]]:
    """All that there are, by kind."""
    found: dict[str, list[Mutation]] = {}
    for path in files:
        code = code_of(path.read_text())
        for kind, pairs in KINDS.items():
            for old, new in pairs:
                for m in re.finditer(old, code):
                    file = path.relative_to(ROOT).as_posix()
                    found.setdefault(kind, []).append(Mutation(file, *m.span(), m.expand(new), kind))
    return found


def drawn(seed: int) -> Iterator[Mutation]:
    """In turn from the CPU's, CUDA's and what both share; of each a random kind, then a place."""
    choose = random.Random(seed)
    files = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cuh", ".cu"))
    part = {p: p.relative_to(ROOT / "csrc").parts[0] for p in files}
    parts = [mutations([p for p in files if part[p] in names]) for names in (("cpu",), ("cuda",), ("api", "ops", "programs"))]
    while any(parts):
        for of_part in parts:
            if of_part:
                kind = choose.choice(sorted(of_part))
                yield of_part[kind].pop(choose.randrange(len(of_part[kind])))
                if not of_part[kind]:
                    del of_part[kind]


def write_ninja() -> None:
    """Of mnist_ext._C with the kernels of one instruction set, under the names of all."""
    import isa_flags
    import pybind11
    import torch
    from torch.utils import cpp_extension

    includes = [f"-isystem{path}" for path in (pybind11.get_include(), *cpp_extension.include_paths(), sysconfig.get_path("include"))]
    macros = [
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f"'-DMNIST_EXT_TORCH_VERSION=\"{torch.__version__}\"'",
        "'-DMNIST_EXT_NO_CUDA_REASON=\"not built\"'",
    ]
    sources = ["csrc/bindings/cpu.cpp", *sorted(f"csrc/{p.relative_to(COPY / 'csrc')}" for folder in ("ops", "cpu") for p in (COPY / "csrc" / folder).rglob("*.cpp"))]
    table = "_ZN9mnist_ext{}{}6kTableE"
    names = [f"-Wl,--defsym={table.format(len(isa), isa)}={table.format(len(ISA), ISA)}" for isa in isa_flags.FLAGS if isa != ISA]
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()] + ["-ltorch_cpu", "-lc10"]
    lines = [
        f"rule cxx\n  command = g++ -MMD -MF $out.d $flags {' '.join(COMMON + macros + includes)} -c $in -o $out\n  deps = gcc\n  depfile = $out.d",
        f"rule link\n  command = g++ -shared -fopenmp $in {' '.join(names + libraries)} -o $out",
    ]
    for source in sources:
        flags = [f"-DMNIST_EXT_ISA={ISA}", *isa_flags.FLAGS[ISA]] if source.endswith("kernels.cpp") else []
        lines.append(f"build objects/{source}.o: cxx {source}\n  flags = {' '.join(flags)}")
    library = "mnist_ext/_C" + sysconfig.get_config_var("EXT_SUFFIX")
    lines.append(f"build {library}: link " + " ".join(f"objects/{source}.o" for source in sources))
    (COPY / "build.ninja").write_text("\n".join(lines) + "\n")


def library_of(folder: str) -> Path:
    """What ninja makes from a folder of the copy."""
    return next(COPY.glob("mnist_ext/_C*.so" if folder == "." else f"{folder}/*/*.so"))


def outputs() -> list[Path]:
    """What compilers have written to the copy."""
    return [p for suffix in ("*.o", "*.so") for p in COPY.rglob(suffix)]


def restore() -> None:
    """Put back the unbroken sources and what was made of them, with their times."""
    for path in outputs():
        kept = KEPT / path.relative_to(COPY)
        if kept.exists() and kept.stat().st_mtime_ns != path.stat().st_mtime_ns:
            shutil.copy2(kept, path)
    for name in ("csrc", "mnist_ext", "tests", "tools", "pyproject.toml", "docs"):
        for path in [p for p in (ROOT / name).rglob("*") if p.is_file()] or [ROOT / name]:
            to = COPY / path.relative_to(ROOT)
            if path.suffix in (".so", ".pyc"):
                continue
            if not to.exists() or to.read_bytes() != path.read_bytes():
                to.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, to)


def prepare() -> None:
    """Build the unbroken copy, where something changed."""
    COPY.mkdir(parents=True, exist_ok=True)
    restore()
    sys.path.insert(0, str(COPY / "tools"))
    write_ninja()
    subprocess.run(["ninja", "-j1", "--quiet"], cwd=COPY, check=True)
    for builder in ("emulated.library", "amx_model.register"):
        module, function = builder.split(".")
        call = f"import {module}; {module}.{function}()"
        environment = {**os.environ, "PYTHONPATH": f"{COPY}:{COPY / 'tests'}", "MAX_JOBS": "1"}
        subprocess.run([sys.executable, "-c", call], cwd=COPY, env=environment, check=True)
    for path in outputs():
        kept = KEPT / path.relative_to(COPY)
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, kept)


def run_tests(devices: str, tests: list[str]) -> str:
    """Return "passed", or what came instead, with the first test that failed."""
    environment = {**os.environ, "PYTHONPATH": str(COPY), "OMP_WAIT_POLICY": "passive"}
    options = ["-x", "-q", "--best-isa", "--tb=no", "-p", "no:cacheprovider", "-k", devices]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    with subprocess.Popen(
        command, cwd=COPY, env=environment, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        try:
            out, _ = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return "hangs"
    if process.returncode == 0:
        return "passed"
    if process.returncode < 0:
        return f"crashes: signal {-process.returncode}"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", out, re.M)
    return failed[1] if failed else "fails: " + out.strip()[-300:]


def examine(mutation: Mutation) -> str:
    """Return what became of it."""
    text = (ROOT / mutation.file).read_text()
    broken = COPY / mutation.file
    times = broken.stat()
    broken.write_text(text[: mutation.begin] + mutation.new + text[mutation.end :])
    runs = next(runs for pattern, runs in TESTS.items() if re.match(pattern, mutation.file))
    try:
        changed = False
        for (folder, devices), tests in runs:
            library = library_of(folder)
            before = library.read_bytes()
            build = ["ninja", "-j1", "--quiet", "-C", str(COPY if folder == "." else library.parent)]
            if subprocess.run(build, capture_output=True).returncode:
                return "does not compile"
            changed = changed or library.read_bytes() != before
            if changed and (result := run_tests(devices, tests)) != "passed":
                return "noticed: " + result
        return "NOT NOTICED" if changed else "changes nothing"
    finally:
        broken.write_text(text)
        os.utime(broken, ns=(times.st_atime_ns, times.st_mtime_ns))
        restore()


def main() -> int:
    """Draw, break, build, test, count."""
    parser = argparse.ArgumentParser(description="Count which of many small faults the tests notice.")
    parser.add_argument("--number", type=int, default=20, help="of faults that count")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after that; the next call goes on")
    parser.add_argument("--only", default="", help="only what contains this text, also again: csrc/cpu/sgd.h:30")
    parser.add_argument("--list", action="store_true", help="show what would be drawn, and run nothing")
    args = parser.parse_args()
    start = time.monotonic()
    sources = sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file())
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:12]
    journal = FOLDER / f"{digest}-seed{args.seed}.json"
    results = json.loads(journal.read_text()) if journal.exists() else {}
    if not args.list:
        prepare()
    count: Counter[str] = Counter()
    for mutation in drawn(args.seed):
        name = str(mutation)
        if args.only not in name:
            continue
        if args.list:
            print(name)
        elif name not in results or args.only:
            if time.monotonic() - start > 60 * args.minutes:
                break
            results[name] = examine(mutation)
            journal.write_text(json.dumps(results, indent=1))
            print(f"{time.monotonic() - start:5.0f} s {name}: {results[name]}", flush=True)
        count[results.get(name, "listed").split(":")[0]] += 1
        if count["noticed"] + count["NOT NOTICED"] + count["listed"] >= args.number:
            break
    noticed, missed = count["noticed"], count["NOT NOTICED"]
    print(f"seed {args.seed}: {noticed} of {noticed + missed} noticed;", dict(count))
    for name, result in results.items():
        if result == "NOT NOTICED":
            print("not noticed:", name)
    return int(noticed < 0.95 * (noticed + missed))


if __name__ == "__main__":
    sys.exit(main())
