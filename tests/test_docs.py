"""What the documentation points to exists."""

import csv
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

import mnist_ext

ROOT = Path(__file__).parents[1]
SEMANTICS = (ROOT / "docs" / "semantics.md").read_text()


@pytest.mark.parametrize(
    "test", sorted(set(re.findall(r"`((?:\w+/)?test_\w+\.py::[\w:]+)`", SEMANTICS)))
)
def test_tests_named_in_semantics_exist(test):
    file, *names = test.split("::")
    (path,) = (ROOT / "tests").rglob(file)
    source = path.read_text()
    for name in names:
        assert re.search(rf"^\s*(def|class) {name}\b", source, re.MULTILINE)


def test_every_behaviour_names_a_test():
    """But those for which the table says in bold, or in words, that there is nothing to test."""
    rows = [line for line in SEMANTICS.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith(("| what", "| ---"))]
    without = [row for row in rows if ".py::" not in row]
    assert len(rows) > 40
    assert {row.split("|")[1].strip() for row in without} == {
        "calls on a few hundred logits",
        "a thousand parameters of 16 elements, against `fused=True`",
        "sums of two or three terms for a million outputs",
        "calls that take a few microseconds, without a gradient",
        "the same: what it costs",
        "one or two outputs, gradients over a million rows",
        "`torch.jit.script` (deprecated)",
        "GPUs that the kernels were not built for",
    }


PAGES = ["README.md", "CONTRIBUTING.md", "csrc/README.md", "csrc/cpu/README.md"]
PAGES += ["csrc/cuda/README.md", "benchmarks/results/README.md"]
PAGES += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))


def anchors(page: Path) -> set[str]:
    """Return what the headings of a page are called in links."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", PAGES)
def test_links_between_files_lead_somewhere(file):
    text = re.sub(r"```.*?```", "", (ROOT / file).read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = (ROOT / file).parent / path if path else ROOT / file
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("file", [*PAGES, ".github/workflows/ci.yml"])
def test_make_commands_exist(file):
    makefile = (ROOT / "Makefile").read_text()
    commands = r"(?:^|`|run: )make ([a-z0-9-]+)"
    for target in re.findall(commands, (ROOT / file).read_text(), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


README = (ROOT / "README.md").read_text()


def test_the_first_lines_of_the_readme_train():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    before = model[2].bias.detach().clone()
    names = {
        "mnist_ext": mnist_ext,
        "model": model,
        "criterion": torch.nn.CrossEntropyLoss(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=1.0),
        "batches": [(torch.ones(5, 4), torch.zeros(5, dtype=torch.int64))] * 2,
    }
    exec(code, names)
    assert type(model) is mnist_ext.nn.Sequential
    assert type(names["criterion"]) is mnist_ext.nn.CrossEntropyLoss
    assert len(code.splitlines()) == 6
    assert not torch.equal(model[2].bias, before)


STEP = {"batch": "64", "activation": "relu", "part": "step"}
LARGE = {"what": "cross_entropy forward + backward", "shape": "2048x32000"}


def test_the_figures_of_the_readme_are_rows():
    """PyTorch's time, ours and their ratio, in the order of its table of figures."""
    figures = [
        ("2026-11-25-cpu-training", STEP, "ours", "ratio"),
        ("2026-11-30-cpu-training-zen5", STEP, "ours", "ratio"),
        ("2026-11-30-cpu-training-intel", STEP, "ours", "ratio"),
        ("2026-11-25-cpu-training", STEP, "ours TrainStep", "to_one_call"),
        ("2026-11-30-cpu-training-zen5", STEP, "ours TrainStep", "to_one_call"),
        ("2026-11-30-cpu-training-intel", STEP, "ours TrainStep", "to_one_call"),
        ("2026-11-25-cpu-kernels", LARGE, "ours", "ratio"),
        ("2026-11-30-cpu-kernels-zen5", LARGE, "ours", "ratio"),
        ("2026-11-30-cpu-kernels-intel", LARGE, "ours", "ratio"),
    ]
    shown = re.findall(r"(\d+) → (\d+) (µs|ms), \*\*([\d.]+)x\*\*", README)
    for (torchs, ours, unit, ratio), figure in zip(shown, figures, strict=True):
        file, of, implementation, column = figure
        with (ROOT / "benchmarks" / "results" / f"{file}.csv").open() as opened:
            rows = [row for row in csv.DictReader(opened) if of.items() <= row.items()]
        rows = {row["implementation"]: row for row in rows}
        scale = {"µs": 1, "ms": 1000}[unit]
        assert torchs == f"{float(rows['torch']['us']) / scale:.0f}"
        assert ours == f"{float(rows[implementation]['us']) / scale:.0f}"
        assert ratio == f"{float(rows['torch'][column]):.1f}"


def test_the_ladders_are_described_rung_by_rung():
    sources = sorted((ROOT / "benchmarks" / "ladder").glob("*.cpp"))
    rungs = {
        name for s in sources for name in re.findall(r"[(?:] ?\"([\w<>, ]+)\",? ", s.read_text())
    }
    head = (ROOT / "benchmarks" / "ladder" / "head.py").read_text()
    rungs |= set(re.findall(r"\"(\w+)\": Rung\(", head))
    text = (ROOT / "docs" / "ladder.md").read_text()
    measured = set(re.findall(r"^\| `(.+?)` \|", text, re.MULTILINE))
    explained = set(re.findall(r"^\d\. \*\*`(.+?)`\*\*", text, re.MULTILINE))
    assert len(measured) > 20
    assert measured == explained
    assert measured <= rungs


def test_the_version_is_the_same_everywhere():
    places = {
        "pyproject.toml": r'^version = "(.*)"',
        "CHANGELOG.md": r"^## (.*)",
        "CITATION.cff": r"^version: (.*)",
        "README.md": r"PyTorch\*, version ([\d.]+),",
    }
    found = [
        re.search(pattern, (ROOT / file).read_text(), re.MULTILINE)[1]
        for file, pattern in places.items()
    ]
    assert len(set(found)) == 1, found


def test_git_runs_before_a_commit_what_make_lint_runs():
    (recipe,) = re.findall(
        r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    commands = re.findall(r"\$\(BIN\)/(.*?)(?: \.| \$\$.*)?\n", recipe)
    hooks = re.findall(r"entry: \.venv/bin/(.*)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks == commands != []


@pytest.mark.parametrize("folder", ["csrc", "csrc/cpu", "csrc/cuda"])
def test_every_file_has_its_line(folder):
    """Named once, by itself or with all others of its folder; and nothing that is not there."""
    root = ROOT / folder
    rows = re.findall(r"^\|(.*?)\|", (root / "README.md").read_text(), re.MULTILINE)
    named = [target for row in rows for target in re.findall(r"\]\(([^)]+)\)", row)]
    files = {str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()}
    files = {file for file in files if not file.endswith("README.md")}
    covered = [
        file
        for name in named
        for file in files
        if file == name or ((root / name).is_dir() and file.startswith(f"{name}/"))
    ]
    assert all((root / name).exists() for name in named)
    assert sorted(covered) == sorted(files)


ADDING_AN_OP = (ROOT / "docs" / "adding-an-op.md").read_text()

# The op of that page as a library beside the package's: for the CPU, and CUDA's on the emulator.
TOY_LIBRARY = """
#define MNIST_EXT_ISA baseline
#include "csrc/cpu/squared_relu.h"
#include "csrc/cpu/threads/scratch.cpp"
#include "csrc/cuda/squared_relu.cuh"
#include "csrc/ops/squared_relu.cpp"

namespace mnist_ext {
namespace {

bool emulates_cuda = false;

template <class... T>
KernelTable table(void (*...run)(const SquaredRelu<T>&, const Launch&)) {
  KernelTable kernels{};
  ((static_cast<Kernels<T>&>(kernels).squared_relu = run), ...);
  return kernels;
}

template <class T>
void emulated(const SquaredRelu<T>& args, const Launch& launch) {
  cuda::squared_relu(args, launch.stream);
}

}  // namespace

const KernelTable& kernel_table() {
  static const KernelTable cpu = table<float, double, BFloat16, Float16>(
      baseline::squared_relu, baseline::squared_relu, baseline::squared_relu,
      baseline::squared_relu);
  static const KernelTable cuda = table<float, double, BFloat16, Float16>(
      emulated, emulated, emulated, emulated);
  return emulates_cuda ? cuda : cpu;
}

namespace ops {

struct OnDevice::State {};
OnDevice::OnDevice(const Tensor&) {}
OnDevice::~OnDevice() = default;
Launch OnDevice::launch() const { return {.threads = 2}; }

STABLE_TORCH_LIBRARY_FRAGMENT(mnist_ext, m) {
  SCHEMA
}
STABLE_TORCH_LIBRARY_IMPL(mnist_ext, CPU, m) { implement_squared_relu(m); }

}  // namespace ops
}  // namespace mnist_ext

extern "C" __attribute__((visibility("default"))) void emulate_cuda(bool emulate) {
  mnist_ext::emulates_cuda = emulate;
}
"""

RUN_TOY = """
import ctypes, sys
import pytest, torch
torch.ops.load_library("./toy.so")
options = ["-q", "-p", "no:cacheprovider", "-k", "not emulated", "tests/ops/test_squared_relu.py"]
for emulate in (True, False):
    ctypes.CDLL("./toy.so").emulate_cuda(emulate)
    if pytest.main(options):
        sys.exit("the tests fail" + " on the emulated GPU" * emulate)
sys.path.append("benchmarks")
import kernels, table
kernels.copy_bandwidth = lambda: 1e10
kernels.squared_relu(table.Table(kernels.COLUMNS, {}, turns=2), torch.float32)
"""


def apply(language: str, text: str, path: Path) -> None:
    if language != "diff":
        assert not path.exists(), f"{path} is there already"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return
    for hunk in text.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        assert {line[:1] for line in lines} <= {*"+- "}, hunk
        old = "".join(line[1:] for line in lines if line[0] != "+")
        new = "".join(line[1:] for line in lines if line[0] != "-")
        before = path.read_text()
        assert before.count(old) == 1, f"{path} has {before.count(old)} times:\n{old}"
        path.write_text(before.replace(old, new))


def test_the_op_of_the_page_can_be_added(tmp_path):
    """All its blocks go into a copy of the checkout and compile; its test and benchmark run."""
    metadata = [path.name for path in ROOT.glob("*.egg-info")]
    for folder in ("csrc", "mnist_ext", "tests", "benchmarks", *metadata):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    blocks = re.findall(r"^`(\S+)`\n\n```(\w+)\n(.*?)^```$", ADDING_AN_OP, re.DOTALL | re.MULTILINE)
    assert len(blocks) * 2 == ADDING_AN_OP.count("```") > 20
    for path, language, text in blocks:
        apply(language, text, tmp_path / path)

    (schema,) = re.findall(r"^\+(  m\.def\(.*)", ADDING_AN_OP, re.MULTILINE)
    toy = tmp_path / "toy.cpp"
    toy.write_text(TOY_LIBRARY.replace("SCHEMA", schema))
    torch_flags = [f"-isystem{path}" for path in include_paths()]
    torch_flags += [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
    compiler = [os.environ.get("CXX", "g++"), "-std=c++20", "-O0", "-w", "-fopenmp"]
    compiler += ["-Itests/emulator", "-I.", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    library = ["-shared", "-fPIC", "-fvisibility=hidden", str(toy), "-o", "toy.so"]
    commands = [
        [*compiler, *library, *torch_flags],
        # The tables have their entries.
        [*compiler, "-fsyntax-only", "-DMNIST_EXT_ISA=baseline", "csrc/cpu/kernels.cpp"],
        [*compiler, "-fsyntax-only", "-xc++", "csrc/cuda/instantiate/float32.cu"],
    ]
    running = [
        subprocess.Popen(c, cwd=tmp_path, stderr=subprocess.PIPE, text=True) for c in commands
    ]
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", RUN_TOY]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count(" passed") == 2
    assert re.search(r"squared_relu .* ours ", ran.stdout)
