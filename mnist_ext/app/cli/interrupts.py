"""What signals do to the command line.

Ctrl-C ends the process with one line: at once while there is nothing to clean up, else through
KeyboardInterrupt. While a model is trained, signals ask it to stop at the next good moment. The
command line imports this module before all others, so that it imports next to nothing.
"""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_LINE = b"mnist-ext: interrupted\n"
_CODE = 128 + signal.SIGINT
# By these a person, a terminal that goes away or a cluster that wants its machine back ends a run.
_STOPS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)
]
_OUTPUTS = (1, 2)

_cleans_up = False  # KeyboardInterrupt is waited for
_came = False  # Ctrl-C, since then


def answer() -> None:
    """Let Ctrl-C end this process with one line from now on, unless it is ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    global _came
    # Raised in the middle of an import, an exception comes out as another one, or not at all.
    if _cleans_up and not _importing(frame):
        _came = True
        raise KeyboardInterrupt
    if not _came:  # else the line is being printed
        os.write(2, _LINE)
    os._exit(_CODE)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


@contextmanager
def cleaning_up() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt within this context, and at its end if that got lost.

    A destructor or a careless ``except`` may swallow it, or turn it into another exception.
    """
    global _cleans_up, _came
    _cleans_up, _came = True, False
    try:
        yield
    finally:
        _cleans_up = False
        if _came:
            raise KeyboardInterrupt


class StopRequest:
    """Within this context the signals that end a run are noted down instead.

    They are Ctrl-C, SIGTERM, SIGHUP and SIGUSR1. A second Ctrl-C raises KeyboardInterrupt. A signal
    that was ignored before, as Ctrl-C is in the background of a shell and SIGHUP under nohup, stays
    so. For the main thread only.

    Attributes:
        signal: the number of the first signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}
        self._terminals: list[int] = []

    def __enter__(self) -> "StopRequest":
        """Begin to note signals down."""
        if _cleans_up and _came:  # and the exception got lost
            raise KeyboardInterrupt
        self._terminals = [number for number in _OUTPUTS if os.isatty(number)]
        for number in _STOPS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        """Restore what signals did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal = number
        # A terminal that went away takes nothing more, and the checkpoint is still to be written.
        for terminal in self._terminals:
            if not os.isatty(terminal):
                os.dup2(os.open(os.devnull, os.O_WRONLY), terminal)
