"""Training in two processes under torchrun: the run of one process, up to rounding."""

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mnist_ext.app import UserError
from mnist_ext.app.cli.main import main
from mnist_ext.app.runs import checkpoint
from mnist_ext.app.training import distributed

# Two processes share a batch as 180 and 179 images; the last of 1,437 leaves one of them empty.
DIGITS = ["--dataset", "digits", "--recipe", "best", "--batch-size", "359", "--threads", "1"]
SECONDS = 120


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def torchrun(*args: str) -> list[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return [*start, "-m", "mnist_ext", "train", *args]


def run(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run(torchrun(*args), capture_output=True, text=True, timeout=SECONDS)


def rows(path: Path) -> list[dict[str, float]]:
    with path.open(newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def test_two_processes_are_one():
    settings = [*DIGITS, "--epochs", "4", "--log-interval", "1"]
    result = run(*settings, "--name", "two")
    assert result.returncode == 0, result.stderr
    # Every line once: the second process prints nothing.
    assert result.stdout.count("epoch 4/4") == 1
    assert "2, which share each batch of 359; 1 CPU threads each" in result.stdout
    assert [path.name for path in Path("runs").iterdir()] == ["two"]

    assert main(["train", *settings, "--name", "one", "--quiet"]) == 0
    two, one = (rows(Path(f"runs/{name}/steps.csv")) for name in ("two", "one"))
    assert len(one) == 20
    for step, expected in zip(two, one, strict=True):
        assert step == pytest.approx(expected, rel=1e-4)
    two, one = (rows(Path(f"runs/{name}/metrics.csv"))[-1] for name in ("two", "one"))
    assert abs(two["test_accuracy"] - one["test_accuracy"]) <= 0.3
    for name in ("train_loss", "test_loss"):
        assert two[name] == pytest.approx(one[name], rel=1e-4)


@pytest.mark.parametrize("victim", ["0", "1"])
def test_a_killed_process_ends_the_other(victim):
    argv = torchrun(*DIGITS, "--epochs", "100000", "--name", "run")
    with (
        Path("err").open("w") as err,
        subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=err, text=True) as launcher,
    ):
        for line in launcher.stdout:
            if line.startswith("epoch 2/"):
                os.kill(child_of_rank(launcher.pid, victim), signal.SIGKILL)
        assert launcher.wait(SECONDS) != 0
    if victim == "1":
        # torchrun ends what is left with SIGTERM, which may be seen first.
        said = [line for line in Path("err").read_text().splitlines() if "mnist-ext: " in line]
        assert len(said) == 1
        assert "another process of the run is gone" in said[0] or "interrupted after" in said[0]
        assert "-m mnist_ext train --resume runs/run" in said[0]
    _, values = checkpoint.read(Path("runs/run/checkpoint.safetensors"))
    assert values["epoch"] >= 1

    if victim == "0":
        return
    # The run goes on; it is cut short here.
    with subprocess.Popen(
        torchrun("--resume", "runs/run"),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as launcher:
        for line in launcher.stdout:
            if line.startswith(f"epoch {values['epoch'] + 1}/"):
                launcher.terminate()
        assert launcher.wait(SECONDS) != 0
    assert checkpoint.read(Path("runs/run/checkpoint.safetensors"))[1]["epoch"] > values["epoch"]


def child_of_rank(launcher: int, rank: str) -> int:
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rsplit(")", 1)[1].split()[1])
            environment = (path.parent / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == launcher and b"RANK=" + rank.encode() in environment:
            return int(path.parent.name)
    raise AssertionError(f"torchrun has no process of rank {rank}")


def test_one_call_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "--dataset", "digits", "--one-call"]) == 2
    assert "--one-call trains in one process, and there are 2" in capsys.readouterr().err
    assert not Path("runs").exists()


class TestEnvironment:
    def test_alone(self, monkeypatch):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        assert distributed.from_environment() == distributed.ALONE
        monkeypatch.setenv("WORLD_SIZE", "1")
        assert distributed.from_environment() == distributed.ALONE

    def test_nonsense(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.delenv("RANK", raising=False)
        with pytest.raises(UserError, match="RANK='' and WORLD_SIZE='2'"):
            distributed.from_environment()

    def test_cores_are_shared(self, monkeypatch):
        cores = len(os.sched_getaffinity(0))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
        assert distributed.default_threads() == cores
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(10 * cores))
        assert distributed.default_threads() == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        assert distributed.default_threads() is None
