"""The compiled library: how it loads, what it links to, which kernels it picks, its threads."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import devices
import pytest
import torch

import mnist_ext
from mnist_ext import _C, _library, functional

PACKAGE = Path(mnist_ext.__file__).parent
LIBRARY = Path(_C.__file__)


def run(code: str, *, path: Path | None = None, **environment: str):
    """Run code in a new Python, with `path` before everything else on its search path."""
    variables = {**os.environ, **environment}
    if path is not None:
        variables["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=variables, cwd="/"
    )


def last_line(process) -> str:
    return process.stderr.strip().splitlines()[-1]


class TestBuildInfo:
    def test_is_json_and_has_every_key(self):
        info = json.loads(json.dumps(mnist_ext.build_info()))
        assert info["version"] == mnist_ext.__version__
        assert info["torch"] == torch.__version__
        assert info["cpu_isa"] in info["cpu_isa_available"]
        assert info["cpu_isa_available"][0] == "baseline"
        assert info["openmp_threads"] == torch.get_num_threads()
        assert info["cuda"] is None or len(info["cuda"]) > 0
        assert info["cuda_reason"]


class TestImport:
    def test_without_a_built_library(self, tmp_path):
        ignored = shutil.ignore_patterns("_C.*.so")
        shutil.copytree(PACKAGE, tmp_path / "mnist_ext", ignore=ignored)
        # An editable install has an import hook that would find the library all the same.
        code = (
            "import importlib, sys\n"
            "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in f.__module__]\n"
            "for name in ('mnist_ext.optim', 'mnist_ext'):\n"  # then torch is there already
            "    try:\n"
            "        importlib.import_module(name)\n"
            "    except ImportError as error:\n"
            "        print(error)"
        )
        lines = run(code, path=tmp_path).stdout.splitlines()
        assert len(lines) == 2
        for line in lines:
            assert line.startswith("mnist_ext: cannot load the compiled")
            assert "pip install ." in line

    def test_the_command_line_does_without_torch(self):
        code = (
            "import sys; sys.argv[0] = '/somewhere/bin/mnist-ext'\n"
            "import mnist_ext\n"
            "print('torch' in sys.modules, {*mnist_ext.__all__} <= {*dir(mnist_ext)})\n"
            "from mnist_ext import *\n"
            "print(TrainStep.__module__, nn.__name__, build_info()['version'], __version__)\n"
            "mnist_ext.nothing"
        )
        process = run(code)
        first, second = process.stdout.splitlines()
        assert first == "False True"
        version = mnist_ext.__version__
        assert second == f"mnist_ext.train_step mnist_ext.nn {version} {version}"
        assert last_line(process).endswith("module 'mnist_ext' has no attribute 'nothing'")

    @pytest.mark.parametrize("version", ["2.9.1", "1.13.0+cpu"])
    def test_on_a_torch_that_is_too_old(self, monkeypatch, version):
        monkeypatch.setattr(torch, "__version__", version)
        message = f"mnist_ext needs torch >= 2.10, found {version}: run `pip install 'torch>=2.10'`"
        with pytest.raises(ImportError, match=re.escape(message)):
            _library.load()

    def test_loads_nothing_of_torch_that_torch_does_not_load_itself(self):
        """torch._dynamo and what it brings take as long as torch; and nothing of mnist_ext.app."""
        code = (
            "import sys, torch\n"
            "before = set(sys.modules)\n"
            "import mnist_ext\n"
            "ours = {name for name in sys.modules if 'mnist_ext' in name}\n"
            "print(sorted({*sys.modules} - before - ours))\n"
            "print([name for name in ours if 'app' in name])"
        )
        assert run(code).stdout == "[]\n[]\n"


class TestInstructionSet:
    @pytest.mark.parametrize("forced", _C.available_isas())
    def test_environment_forces_one(self, forced):
        """Two processes print the same digest of every bit. Empty is as unset: the best one."""
        best = _C.available_isas()[-1]
        code = (
            "import hashlib, torch, mnist_ext\n"
            "from mnist_ext import functional\n"
            "info = mnist_ext.build_info()\n"
            "print(info['cpu_isa'], info['cpu_isa_reason'], sep='\\n')\n"
            "torch.manual_seed(0)\n"
            "x = torch.randn(300, 130).requires_grad_()\n"
            "w = torch.randn(90, 130).requires_grad_()\n"
            "loss = functional.cross_entropy(functional.linear(x, w), torch.arange(300) % 90)\n"
            "results = [loss.detach(), *torch.autograd.grad(loss, (x, w))]\n"
            "print(hashlib.sha256(b''.join(r.numpy().tobytes() for r in results)).hexdigest())"
        )
        (isa, reason, digest), (other_isa, _, other_digest) = (
            run(code, MNIST_EXT_ISA=asked).stdout.splitlines()
            for asked in (forced, "" if forced == best else forced)
        )
        assert (isa, reason) == (forced, "MNIST_EXT_ISA asks for it")
        assert (other_isa, other_digest) == (isa, digest)
        assert len(digest) == 64

    def test_unknown_one_is_an_import_error_with_the_choices(self):
        process = run("from mnist_ext import functional", MNIST_EXT_ISA="avx3")
        assert process.returncode == 1
        assert "ImportError" in last_line(process)
        assert "'avx3'" in last_line(process)
        assert ", ".join(_C.available_isas()) in last_line(process)

    def test_set_isa_refuses_unknown_names(self):
        before = _C.active_isa()
        with pytest.raises(ValueError, match=r"'neon5'.*baseline"):
            _C.set_isa("neon5")
        assert _C.active_isa() == before

    def test_kernels_differ(self):
        """The switch reaches the kernels: with other vector widths, sums round differently."""
        if len(_C.available_isas()) == 1:
            pytest.skip("this machine has one instruction set only")
        # Few enough rows for dot products, whose sums over lanes differ, and enough for AMX.
        input, weight = torch.randn(160, 999), torch.randn(160, 999)
        results = []
        for isa in _C.available_isas():
            with devices.use(isa):
                results.append(functional.linear(input, weight))
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(results, 2))


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files and /proc")
class TestLinking:
    def test_one_openmp_runtime_in_the_process(self):
        """Ours resolves to the one that torch brought, even with mnist_ext imported first."""
        code = (
            "import mnist_ext, torch\n"
            "assert torch.ops.mnist_ext.linear.default\n"
            "mnist_ext.functional.linear(torch.randn(256, 256), torch.randn(256, 256))\n"
            "print(*mnist_ext.build_info()['openmp_runtimes'], sep='\\n')"
        )
        runtimes = run(code).stdout.split()
        assert len(runtimes) == 1
        assert "torch" in runtimes[0]

    @pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
    def test_only_the_stable_abi_of_torch(self):
        """No C++ symbol of torch or c10: what would tie the binary to one version of torch."""
        symbols = subprocess.run(
            ["nm", "-D", "-C", "--undefined-only", LIBRARY], capture_output=True, text=True
        ).stdout.splitlines()
        names = [line.split(maxsplit=1)[1] for line in symbols]
        assert any(name.startswith("aoti_torch_") for name in names)
        assert not [name for name in names if name.startswith(("at::", "c10::", "torch::"))]

    @pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm (binutils)")
    def test_no_code_of_one_instruction_set_can_replace_anothers(self):
        """What the linker may merge between files must not stand in a file with ISA flags."""
        objects = list((PACKAGE.parent / "build").glob("objects/*/*/csrc/cpu/kernels.o"))
        if not objects:
            pytest.skip("needs the object files of a build in place (make install)")
        for path in objects:
            isa = path.parents[2].name
            lines = subprocess.run(["nm", "-C", path], capture_output=True, text=True).stdout
            weak = [line for line in lines.splitlines() if line[17:18] in "WVu"]
            assert weak
            foreign = [line for line in weak if f"mnist_ext::{isa}::" not in line]
            # The reference to the exception handler of the C++ runtime is data, not code.
            assert [line for line in foreign if "__gxx_personality" not in line] == []


class TestThreads:
    @pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
    def test_set_num_threads_is_obeyed(self):
        process = run(
            "import os, torch, mnist_ext\n"
            "torch.set_num_threads(1)\n"
            "x, w = torch.randn(512, 512), torch.randn(512, 512)\n"
            "before = len(os.listdir('/proc/self/task'))\n"
            "for threads in (1, 2, 3):\n"
            "    torch.set_num_threads(threads)\n"
            "    mnist_ext.functional.linear(x, w)\n"
            "    print(len(os.listdir('/proc/self/task')) - before)"
        )
        assert process.stdout.split() == ["0", "1", "2"]

    @pytest.mark.usefixtures("every_kernel")
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("threads", [1, 2, 3, 5])
    @pytest.mark.parametrize("isa", _C.available_isas())
    def test_results_do_not_depend_on_the_number_of_threads(self, isa, threads, dtype):
        """Bit by bit; with one thread: nor on which run it is."""
        # Large enough for five threads in every kernel.
        input = torch.randn(600, 130, dtype=dtype, requires_grad=True)
        weight = torch.randn(150, 130, dtype=dtype, requires_grad=True)
        bias = torch.randn(150, dtype=dtype, requires_grad=True)
        target = torch.randint(0, 150, (600,))
        images = torch.randn(3, 40, 30, 35, dtype=dtype, requires_grad=True)
        probabilities = torch.rand(3, 40, 30, 35, dtype=dtype, requires_grad=True)
        short_rows = torch.randn(9000, 10, dtype=dtype, requires_grad=True)

        def everything():
            hidden = functional.linear(input, weight, bias, activation="relu")
            small = functional.linear(input[:64], weight)
            long = functional.linear(short_rows.t(), short_rows.t())  # sums of 9000, column-major
            losses = (
                functional.cross_entropy(hidden, target),
                functional.cross_entropy(images, probabilities, label_smoothing=0.1),
                functional.cross_entropy(images, images.argmax(1), ignore_index=1),
                functional.cross_entropy(images.movedim(-1, 1), images.argmax(3)),
                functional.cross_entropy(short_rows, short_rows.argmin(1)),
            )
            leaves = (input, weight, bias, images, probabilities, short_rows)
            total = sum(losses) + small.sum() + long.sum()
            return hidden, small, long, *losses, *torch.autograd.grad(total, leaves)

        before = torch.get_num_threads()
        try:
            with devices.use(isa):
                torch.set_num_threads(1)
                alone = everything()
                torch.set_num_threads(threads)
                together = everything()
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
