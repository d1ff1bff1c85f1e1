"""A process of its own for each cell of a benchmark, without importing torch and lightning anew for each.

On Linux the cells' processes are forked from a server that has imported them and touched no device; elsewhere, where forking
is not safe, each begins from nothing. Either way a cell inherits no memory of the device and no compiled graph from another.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import psutil

_PRELOADED = ["flowhn.bench_cell", "torch._dynamo"]  # not the compiler itself, which starts workers when it is imported


@cache
def _context() -> BaseContext:
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def run_cell(spec: Mapping[str, Any], timeout: float) -> dict[str, Any]:
    """What :func:`flowhn.bench_cell.measure` finds, and ``cell_seconds``; whatever happens there, an answer comes back.

    Args:
        spec: the cell, as :func:`flowhn.bench.plan` gives it.
        timeout: seconds, after which the process and all that it started are killed.

    Returns:
        The measured part of the record, or ``status`` ("failed", "timed out") and ``reason``, the last line of what the
        process wrote.
    """
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder) / "result.json", Path(folder) / "log"
        process = _context().Process(target=_measure, args=(dict(spec), str(answer), str(log)))
        process.start()
        try:
            process.join(timeout)
            late = process.is_alive()
        finally:
            if process.is_alive():
                _kill(process.pid)
                process.join()
        if late:
            return {"status": "timed out", "reason": f"not done after {timeout:.0f} s; raise cell_timeout_s="}
        if process.exitcode == 0:
            return {**json.loads(answer.read_text(encoding="utf-8")), "cell_seconds": time.monotonic() - begun}
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
        return {"status": "failed", "reason": lines[-1] if lines else f"exit code {process.exitcode}"}


def _kill(pid: int) -> None:
    """The process and what it started (compilers, for one)."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for own in [*process.children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                own.kill()


def _measure(spec: dict[str, Any], answer: str, log: str) -> None:
    """In the cell's process: both outputs into ``log``, what was found into ``answer``."""
    with open(log, "w", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    from flowhn.bench_cell import measure

    Path(answer).write_text(json.dumps(measure(spec)), encoding="utf-8")
