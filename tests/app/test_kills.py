"""A run that is ended at random moments, and resumed each time, has the bits of one left alone.

100 ends: `make endure`.
"""

import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_folders import assert_same_runs, names_in

from mnist_ext.app.cli.main import main
from mnist_ext.app.runs import checkpoint

EPOCHS = 30  # of 72 steps
TRAIN = ["train", "--dataset", "digits", "--recipe", "best", "--epochs", str(EPOCHS)]
TRAIN += ["--batch-size", "20", "--lr", "0.02", "--log-interval", "7", "--threads", "1"]
RUN = Path("runs/run")
CHECKPOINT = RUN / checkpoint.FILE_NAME
IMPORTS = 2.0  # seconds that a process takes before it trains, about


def progress() -> tuple[int, int]:
    """Return the epochs and the steps of the next one that the checkpoint holds."""
    values = checkpoint.read(CHECKPOINT)[1]
    return values["epoch"], values["step"]


class Ender:
    """Ends processes of one run after another, until each of the given signals has ended one."""

    def __init__(self, signals: list[int], seed: int, seconds: float, anywhere: float) -> None:
        self.signals, self.random = signals, random.Random(seed)
        self.seconds = seconds  # of training, at most, until the signal is sent
        self.anywhere = anywhere  # the share of signals that may come before training

    def train(self, options: list[str]) -> None:
        """Train to the end, in as many processes as it takes."""
        while self.process(options) != 0:
            pass

    def process(self, options: list[str]) -> int:
        """Train in a process, end it while there are signals, and return its exit code."""
        argv = ["train", "--resume", str(RUN)]
        if not CHECKPOINT.exists():  # nothing was to be resumed yet
            shutil.rmtree(RUN, ignore_errors=True)
            argv = [*TRAIN, *options, "--name", RUN.name]
        done = CHECKPOINT.exists() and progress() == (EPOCHS, 0)
        trains = self.random.random() >= self.anywhere
        command = [sys.executable, "-m", "mnist_ext", *argv, "--json"]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            if self.signals and not done:
                if trains:  # "start", and the first step that is logged
                    _ = process.stdout.readline(), process.stdout.readline()
                time.sleep(self.random.uniform(0, self.seconds if trains else IMPORTS))
                process.send_signal(self.signals[-1])
            err = process.communicate(timeout=300)[1]
        code = process.returncode
        if code != 0:
            self.check(code, self.signals.pop(), trains, err)
        return code

    def check(self, code: int, number: int, trains: bool, err: str) -> None:
        """Expect an end as the signal wants it, and a checkpoint that is what the process says."""
        saved = re.fullmatch(
            r"mnist-ext: interrupted after (?:step (\d+) of )?epoch (\d+)[;,] .*\n", err
        )
        if saved:
            assert code == 128 + number
            epoch, step = int(saved[2]), int(saved[1] or 0)
            assert progress() == (epoch - (step > 0), step)
        elif number == signal.SIGINT and not trains and err.endswith("KeyboardInterrupt\n"):
            assert "mnist_ext" not in err  # Python was about to begin
        else:
            # Before training begins, or when all is done and Python is about to end.
            assert (code, err) in ((-number, ""), (130, "mnist-ext: interrupted\n"))
            assert code == -number or number == signal.SIGINT
            assert number == signal.SIGKILL or not trains or progress() == (EPOCHS, 0)


@pytest.mark.skipif(sys.platform == "win32", reason="sends signals")
def test_a_run_ended_at_random_moments_has_the_bits_of_one_left_alone(long, request):
    """Steps one by one, and many to a native call, in turns: of a run, until it is complete."""
    seed = request.config.getoption("--fuzz-seed")
    print(f"--fuzz-seed {seed}")
    three = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]
    signals = random.Random(seed).sample(three * 34 if long else three, 102 if long else 3)
    ways = [[], ["--one-call"]] if long else [[]]
    for i, options in enumerate(ways):
        started = time.perf_counter()
        # Well trained: each step must leave its mark.
        argv = [*TRAIN, *options, "--target-accuracy", "90", "--quiet", "--name", f"whole-{i}"]
        assert main(argv) == 0
        seconds = time.perf_counter() - started
    ender = Ender(signals, seed, seconds / 4, anywhere=0.2 if long else 0)
    runs = 0
    while ender.signals:
        i = runs % len(ways)
        ender.train(ways[i])
        whole = Path(f"runs/whole-{i}")
        assert_same_runs(whole, RUN)
        assert names_in(RUN) == names_in(whole)
        shutil.rmtree(RUN)
        runs += 1
    print(f"{runs} runs were complete")
