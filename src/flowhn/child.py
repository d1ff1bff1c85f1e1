"""A command as a process of its own that is stopped like the one that started it: with time to write its checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import IO

from flowhn.cli import EXIT_INTERRUPTED

GRACE_SECONDS = 30.0  # from the first signal until the child is killed


def run_child(command: Sequence[str], output: IO[bytes], *, grace: float = GRACE_SECONDS) -> int:
    """Run a command to its end, both its outputs into ``output``; returns its exit code (128 + a signal that killed it).

    SIGINT and SIGTERM of this process go on to the child, once each: it has a process group of its own, because the terminal's
    Ctrl-C would reach it a second time, and a second one ends a run without its checkpoint. ``grace`` seconds after the
    first signal the child and all that it started are killed. Outside the main thread, where Python allows no handlers,
    signals are not passed on.

    Raises:
        KeyboardInterrupt: after SIGINT, when the child ended as interrupted.
        SystemExit: after a signal, with the child's exit code (128 + the signal's number if it was done already).
    """
    seen: list[tuple[int, float]] = []
    process: subprocess.Popen | None = None

    def forward(signum: int, frame: FrameType | None) -> None:
        seen.append((signum, time.monotonic()))
        if process is not None:
            process.send_signal(signum)  # does nothing after its end

    previous = {}
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(signum) != signal.SIG_IGN:
                previous[signum] = signal.signal(signum, forward)
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, process_group=0
        )
        for signum, _ in tuple(seen):  # those that came before there was a child
            process.send_signal(signum)
        code = _wait(process, seen, grace)
    finally:
        if process is not None and process.poll() is None:
            _kill(process)
        for signum, handler in previous.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
    code = 128 - code if code < 0 else code
    if not seen:
        return code
    if code in (0, EXIT_INTERRUPTED) and seen[0][0] == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(code or 128 + seen[0][0])


def _wait(process: subprocess.Popen, seen: Sequence[tuple[int, float]], grace: float) -> int:
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(timeout=0.2)
        if seen and time.monotonic() > seen[0][1] + grace:
            _kill(process)


def _kill(process: subprocess.Popen) -> None:
    """The child and what it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
