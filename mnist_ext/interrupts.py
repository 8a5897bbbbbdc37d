"""Ctrl-C and SIGTERM as a request to stop at the next good moment."""

import signal
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Within this context Ctrl-C and SIGTERM are noted down instead of ending the process.

    A second Ctrl-C raises KeyboardInterrupt. A signal that was ignored before, as Ctrl-C is in the
    background of a shell, stays so. For the main thread only.

    Attributes:
        signal: the number of the first signal that came, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        """Begin to note signals down."""
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Restore what signals did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal = number
