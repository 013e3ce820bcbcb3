"""Ctrl-C and SIGTERM: the first lets training end its step and save, the second stops at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interruption:
    """A request to stop, made by a signal.

    Outside of `deferred` a signal raises KeyboardInterrupt at once. Inside, the first one only sets `requested`.
    """

    def __init__(self) -> None:
        self.requested = False
        self._deferring = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the code inside end by itself: it looks at `requested` between its steps."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Handle the signals of this process inside (main thread only)."""
        handled = [number for number in SIGNALS if number != signal.SIGHUP or _is_heeded(number)]
        before = {number: signal.signal(number, self._handle) for number in handled}
        # A process may be started with signals blocked.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        is_first, self.requested = not self.requested, True
        if not (is_first and self._deferring):
            raise KeyboardInterrupt


def _is_heeded(number: signal.Signals) -> bool:
    """Return whether the signal has a handler: nohup makes a process ignore SIGHUP, which must stay so."""
    return signal.getsignal(number) is not signal.SIG_IGN
