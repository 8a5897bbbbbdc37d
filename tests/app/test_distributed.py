"""Training in two processes: the run of one process, up to rounding; and what a lost one ends."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from run_folders import names_in, rows_of

from mnist_ext.app import UserError
from mnist_ext.app.cli.main import main
from mnist_ext.app.runs import checkpoint
from mnist_ext.app.training import distributed

# Two processes share a batch as 180 and 179 images; the last of 1,437 leaves one of them empty.
DIGITS = ["--dataset", "digits", "--recipe", "best", "--scheduler", "none", "--batch-size", "359"]
DIGITS += ["--threads", "1", "--log-interval", "1"]
SECONDS = 120
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.fixture(autouse=True)
def no_threads_given(isolated, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def epochs_until_killed(victim: int) -> str:
    """Start two processes, kill one after two epochs; return what the other says at its end."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    argv = [sys.executable, "-m", "mnist_ext", "train", *DIGITS, "--epochs", "100000"]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    first, second = processes = [
        subprocess.Popen(
            [*argv, "--name", "run"],
            env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    with first, second:
        for line in first.stdout:
            if line.split()[:2] == ["epoch", "2/100000"]:
                processes[victim].kill()
                break
        out, err = processes[1 - victim].communicate(timeout=SECONDS)
        processes[victim].communicate()
    assert processes[victim].returncode == -signal.SIGKILL
    assert processes[1 - victim].returncode == 1
    assert victim == 1 or out == ""  # the second process prints nothing but errors
    return err


def epoch_of_checkpoint() -> int:
    return checkpoint.read(Path("runs/run/checkpoint.safetensors"))[1]["epoch"]


def test_the_first_process_is_killed(ran):
    """Between or within epochs; the run goes on, here in one process."""
    err = epochs_until_killed(victim=0)
    assert "error: process 1: another process of the run is gone" in err
    done = epoch_of_checkpoint()
    assert done >= 1
    events = ran("train", "--resume", "runs/run", "--epochs", done + 1, "--json").objects
    assert [e["epoch"] for e in events if e["event"] == "epoch"] == [done + 1]
    rows = rows_of(Path("runs/run/metrics.csv"))
    assert [row["epoch"] for row in rows] == [str(n + 1) for n in range(done + 1)]


def test_two_processes_are_one_also_after_the_second_was_killed():
    err = epochs_until_killed(victim=1)
    said = [line for line in err.splitlines() if "mnist-ext: " in line]
    assert len(said) == 1
    assert "error: process 0: another process of the run is gone" in said[0]
    assert "-m mnist_ext train --resume runs/run" in said[0]
    done = epoch_of_checkpoint()
    assert done >= 2

    argv = ["-m", "mnist_ext", "train", "--resume", "runs/run", "--epochs", str(done + 2)]
    result = subprocess.run([*TORCHRUN, *argv], capture_output=True, text=True, timeout=SECONDS)
    assert result.returncode == 0, result.stderr
    # Every line once: the second process prints nothing.
    assert result.stdout.count(f"epoch {done + 2}/{done + 2}") == 1
    assert "2, which share each batch of 359; 1 CPU threads each" in result.stdout
    assert names_in("runs") == ["run"]

    assert main(["train", *DIGITS, "--epochs", "4", "--name", "one", "--quiet"]) == 0
    for file, columns in (
        ("steps.csv", ("epoch", "step", "loss", "lr")),
        ("metrics.csv", ("epoch", "train_loss", "test_loss")),
    ):
        both, alone = (rows_of(Path(f"runs/{name}/{file}")) for name in ("run", "one"))
        assert [int(row["epoch"]) for row in both][-1] == done + 2
        for row, expected in zip(both, alone, strict=False):
            for column in columns:
                assert float(row[column]) == pytest.approx(float(expected[column]), rel=1e-4)


def test_one_call_is_refused(monkeypatch, refused):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    part = "--one-call trains in one process, and there are 2"
    refused("train", "--dataset", "digits", "--one-call", parts=(part,))
    assert names_in() == []


def test_environment(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert distributed.from_environment() == distributed.ALONE
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert distributed.from_environment() == distributed.ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="RANK='' and WORLD_SIZE='2'"):
        distributed.from_environment()


def test_cores_are_shared(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert distributed.default_threads() == cores
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(10 * cores))
    assert distributed.default_threads() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert distributed.default_threads() is None
