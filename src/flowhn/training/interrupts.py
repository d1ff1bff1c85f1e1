"""Stopping on a signal at a point where nothing is lost."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Stopped(BaseException):
    """Training ended early on a signal, after its checkpoint was written."""


class StopRequest:
    """Context manager that turns SIGINT and SIGTERM into a request, which training honours after the step at hand.

    Until ``defers`` is set, which the first finished step does, there is nothing to save and a signal acts at once,
    also in a compilation that takes minutes.

    A second SIGINT raises KeyboardInterrupt at once. Outside the main thread, where Python allows no handlers, it
    does nothing.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.defers = False
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return self.signum is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        if kind is None and self.requested:  # it came after the last look
            self.raise_for_caller()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        again = signum == signal.SIGINT and self.signum == signal.SIGINT
        self.signum = signum
        if again or not self.defers:
            self.raise_for_caller()

    def raise_for_caller(self) -> None:
        """Raise what the signal means to a caller: KeyboardInterrupt, or SystemExit with 128 + the signal's number."""
        if self.signum == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signum is not None:
            raise SystemExit(128 + self.signum)
