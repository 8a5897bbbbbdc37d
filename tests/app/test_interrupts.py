"""Ctrl-C before, in and after the imports that take seconds; what is answered without them."""

import importlib.metadata
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from mnist_ext.app.cli import interrupts
from mnist_ext.app.cli.interrupts import StopRequest, cleaning_up

(_SCRIPT,) = importlib.metadata.entry_points(group="console_scripts", name="mnist-ext")
_MODULE, _FUNCTION = _SCRIPT.value.split(":")
ENTRIES = {"module": ["-m", "mnist_ext"], "script": ["mnist-ext"]}
LINE = "mnist-ext: interrupted\n"


@pytest.fixture(params=ENTRIES)
def entry(request, tmp_path, monkeypatch):
    """Start the command line with a `torch` that is ./torch.py."""
    monkeypatch.chdir(tmp_path)
    Path("mnist-ext").write_text(  # as pip writes it
        f"import sys\nfrom {_MODULE} import {_FUNCTION}\nsys.exit({_FUNCTION}())"
    )
    package = str(Path(interrupts.__file__).parents[3])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), package]))
    return [sys.executable, *ENTRIES[request.param]]


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["--version"], 0, "mnist-ext "),
        (["--help"], 0, "example:"),
        (["train", "--help"], 0, "--batch-size"),
        (["train", "--epoch", "3"], 2, "unrecognized arguments: --epoch 3"),
        (["train", "--config", "settings.toml"], 2, "unknown key 'epoch'"),
        (["trian"], 2, "invalid choice: 'trian'"),
    ],
)
def test_answered_without_torch(entry, argv, code, text):
    Path("torch.py").write_text("raise SystemError('torch is imported')")
    Path("settings.toml").write_text("epoch = 3")
    result = subprocess.run([*entry, *argv], capture_output=True, text=True)
    assert result.returncode == code
    assert text in (result.stderr if code else result.stdout)
    assert "Traceback" not in result.stderr


IMPORTS = {
    "slow": "time.sleep(60)",
    # What an exception in the middle of torch's import may come to.
    "swallows": "try:\n    time.sleep(60)\nexcept BaseException:\n    print('', file=sys.stderr)",
    "converts": "try:\n    time.sleep(60)\nexcept BaseException:\n    raise ImportError",
}


@pytest.mark.parametrize("torch", IMPORTS)
def test_ctrl_c_while_torch_is_imported(entry, torch):
    Path("torch.py").write_text(f"import sys, time\nprint('now', flush=True)\n{IMPORTS[torch]}")
    with subprocess.Popen(
        [*entry, "train"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "now\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, LINE)


class TestCleaningUp:
    @pytest.fixture(autouse=True)
    def answered(self):
        """Ctrl-C as in a process of the command line."""
        interrupts.answer()

    def test_ctrl_c_raises_each_time(self):
        for _ in range(2):
            with cleaning_up():
                pass
            with pytest.raises(KeyboardInterrupt), cleaning_up():
                signal.raise_signal(signal.SIGINT)

    def test_swallowed_it_is_raised_at_the_end(self):
        with pytest.raises(KeyboardInterrupt), cleaning_up(), suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    def test_or_where_training_would_begin(self):
        begun = []
        with pytest.raises(KeyboardInterrupt), cleaning_up():
            self.train_after_it_was_swallowed(begun)
        assert begun == []

    def train_after_it_was_swallowed(self, begun: list[bool]) -> None:
        with suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with StopRequest():
            begun.append(True)

    def test_or_in_place_of_what_it_was_turned_into(self):
        with pytest.raises(KeyboardInterrupt), cleaning_up():  # noqa: PT012
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                raise ImportError from None


def test_what_is_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupts.answer()
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
    assert stop.signal is None


def test_a_terminal_that_is_gone_takes_what_is_printed_later(monkeypatch):
    terminal, output = os.openpty()
    monkeypatch.setattr(interrupts, "_OUTPUTS", (output,))
    try:
        with StopRequest() as stop:
            os.close(terminal)
            with pytest.raises(OSError, match="Input/output error"):
                os.write(output, b"lost")
            signal.raise_signal(signal.SIGHUP)
            assert os.write(output, b"nobody reads this") == 17
        assert stop.signal == signal.SIGHUP
    finally:
        os.close(output)
