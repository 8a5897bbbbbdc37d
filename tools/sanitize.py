"""Build mnist_ext with sanitizers, beside the usual build, and run tests on it.

    python tools/sanitize.py address|thread [--build-only] [arguments of pytest]

address: AddressSanitizer and UndefinedBehaviorSanitizer, for the CUDA kernels on the emulator and
the model of AMX too. thread: ThreadSanitizer, with tests/sanitizer/openmp.cpp in place of libgomp,
and without the emulator, whose threads are fibers, and the model of AMX, which keeps libgomp.
Reports are printed at the end, and fail the run. What is not seen: docs/trust.md.
"""

import argparse
import contextlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

FLAGS = {
    "address": "-fsanitize=address,undefined,float-cast-overflow,bounds-strict",
    "thread": "-fsanitize=thread",
}
# Readable reports; a compiler done in minutes, but with fused multiply-adds; not the -fwrapv of
# Python's own build, under which signed overflow is defined.
COMMON_FLAGS = "-fno-omit-frame-pointer -g1 -O1 -fexpensive-optimizations -fstrict-overflow"

OPTIONS = {
    # Python frees little of what it has at its end. Tests ask for more memory than there is.
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:abort_on_error=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    # What PyTorch's threads do is not seen, nor what makes it right.
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:allocator_may_return_null=1:die_after_fork=0",
}
# Python is built without: what it loads first intercepts malloc, and with libstdc++ also throw.
RUNTIMES = {"address": ("libasan.so", "libstdc++.so"), "thread": ("libtsan.so", "libstdc++.so")}

MEMORY = "tests/ops/test_memory.py::test_"
NOT_TESTED = {
    "address": [
        # How much memory there is of which kind is the sanitizer's matter, and it has an allocator.
        MEMORY + "large_results_ask_for_huge_pages",
        MEMORY + "logits_are_never_in_memory",
        MEMORY + "nothing_beyond_a_tensor_is_read_or_written",
        # More of what other tests run, for minutes.
        "tests/train_step/test_step.py::TestAgainstPyTorch::test_a_thousand_steps",
        "tests/ops/test_linear_cross_entropy.py::test_error_of_softcap_z_loss_and_lse",
    ]
}
NOT_TESTED["thread"] = [
    *NOT_TESTED["address"],
    "tests/ops/test_cross_entropy.py::test_more_than_two_to_the_31_logits",
]


def run(command: list[str], more_environment: dict[str, str], errors: Path | None = None) -> int:
    """Return the command's exit code; its stderr goes to a file, where one is named."""
    environment = {**os.environ, **more_environment}
    with open(errors, "w") if errors else contextlib.nullcontext() as stderr:
        return subprocess.run(command, cwd=ROOT, env=environment, stderr=stderr).returncode


def main() -> int:
    """Build, test."""
    parser = argparse.ArgumentParser(description="Run tests on a build with sanitizers.")
    parser.add_argument("sanitizer", choices=FLAGS)
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("-k", dest="keywords", help="as pytest's")
    args, of_pytest = parser.parse_known_args()

    folder = ROOT / "build" / "sanitized" / args.sanitizer
    library = folder / "lib"
    library.mkdir(parents=True, exist_ok=True)
    build_environment = {
        "MNIST_EXT_CUDA": "0",
        "MNIST_EXT_FLAGS": f"{FLAGS[args.sanitizer]} {COMMON_FLAGS}",
    }
    if args.sanitizer == "thread":
        openmp = str(folder / "openmp.o")
        source = str(ROOT / "tests/sanitizer/openmp.cpp")
        flags = ["-std=c++20", "-fPIC", "-fvisibility=hidden", FLAGS["thread"], "-g1", "-O1"]
        if code := run(["g++", *flags, "-c", source, "-o", openmp], {}):
            return code
        build_environment["LDFLAGS"] = openmp
    build = f"build --build-lib {library} build_ext --build-temp {folder / 'objects'}"
    metadata = f"egg_info --egg-base {library}"
    setup = [sys.executable, "setup.py", "-q", *build.split(), *metadata.split()]
    if (code := run(setup, build_environment)) or args.build_only:
        return code

    found = [
        subprocess.run(
            ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in RUNTIMES[args.sanitizer]
    ]
    for report in folder.glob("report.*"):
        report.unlink()
    test_environment = {
        **{name: f"{options}:log_path={folder / 'report'}" for name, options in OPTIONS.items()},
        "MNIST_EXT_FLAGS": build_environment["MNIST_EXT_FLAGS"],
        "MNIST_EXT_BUILD": str(folder),
        "LD_PRELOAD": " ".join(found),
        "PYTHONPATH": str(library),
        "PYTHONSAFEPATH": "1",  # `python -c` in a test would find the usual build first
    }
    # Not `python -m pytest`, which would find the usual build first. UndefinedBehaviorSanitizer
    # writes to stderr, whatever its log_path: beside AddressSanitizer, whose function of that name
    # it calls. pytest is not to take that away.
    pytest = [str(Path(sys.executable).parent / "pytest"), "-q", "--capture=sys"]
    pytest += [f"--deselect={test}" for test in NOT_TESTED[args.sanitizer]]
    keywords = [f"({args.keywords})"] if args.keywords else []
    if args.sanitizer == "thread":
        # Its memory has fixed places, which random ones may take.
        pytest = ["setarch", "--addr-no-randomize", *pytest]
        keywords.append("not emulated and not [model")
    pytest += ["-k", " and ".join(keywords)]
    errors = folder / "stderr"
    code = run([*pytest, *of_pytest], test_environment, errors)
    reports = [path.read_text(errors="replace") for path in sorted(folder.glob("report.*"))]
    undefined = errors.read_text(errors="replace")
    print(*reports, undefined, sep="\n")
    # Not AddressSanitizer's warning that it may misread fibers, those of the emulator.
    found_by = {"SUMMARY:": "\n".join(reports), "runtime error:": undefined}
    count = sum(text.count(sign) for sign, text in found_by.items())
    print(f"{args.sanitizer}: {count} reports")
    return code or count > 0


if __name__ == "__main__":
    sys.exit(main())
