"""A process of its own for each cell of a benchmark, without importing torch and lightning anew for each.

On Linux the cells' processes are forked from a server that has imported them and touched no device; elsewhere, where forking
is not safe, each begins from nothing. Either way a cell inherits no memory of the device and no compiled graph from another.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import psutil

_PRELOADED = ["flowhn.bench_cell", "torch._dynamo"]  # not the compiler itself, which starts workers when it is imported
FORKED, FRESH = "forkserver", "spawn"


@cache
def _context(method: str) -> BaseContext:
    context = multiprocessing.get_context(method)
    if method == FORKED:
        # Asking whether there is a GPU must not start CUDA in the server: its children could not use it.
        os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
        context.set_forkserver_preload(_PRELOADED)
    return context


def run_cell(spec: Mapping[str, Any], timeout: float, *, method: str | None = None) -> dict[str, Any]:
    """What :func:`flowhn.bench_cell.measure` finds, and ``cell_seconds``; whatever happens there, an answer comes back.

    Args:
        spec: the cell, as :func:`flowhn.bench.plan` gives it.
        timeout: seconds, after which the process and all that it started are killed.
        method: how the process begins; None: forked on Linux, and from nothing where a forked one cannot use the GPU.

    Returns:
        The measured part of the record, or ``status`` ("failed", "timed out") and ``reason``: the signal that ended the
        process, the last line of what it wrote.
    """
    begun, chosen = time.monotonic(), method or (FORKED if sys.platform == "linux" else FRESH)
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder) / "result.json", Path(folder) / "log"
        process = _context(chosen).Process(target=_measure, args=(dict(spec), str(answer), str(log)))
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
        # The answer and not the exit code: where several threads start processes, one may read another's code first.
        if answer.is_file():
            return {**json.loads(answer.read_text(encoding="utf-8")), "cell_seconds": time.monotonic() - begun}
        if chosen == FORKED and method is None and process.exitcode == _CANNOT_USE_DEVICE:
            return run_cell(spec, timeout, method=FRESH)
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
        return {"status": "failed", "reason": _reason(process.exitcode, lines)}


def _reason(code: int | None, lines: list[str]) -> str:
    """Why a process left no answer, from its exit code (None: another thread has read it) and what it wrote."""
    if code == -signal.SIGKILL:
        return "killed by signal 9: memory ran out, most likely; lower batch="
    said = lines[-1] if lines else ""
    if code is not None and code < 0:
        return f"killed by signal {-code}" + (f": {said}" if said else "")
    return said or f'exit code {code}; a script that starts a benchmark needs if __name__ == "__main__":'


_CANNOT_USE_DEVICE = 113


def _kill(pid: int) -> None:
    """The process and what it started (compilers, for one)."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for own in [*process.children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                own.kill()


def _end_with_parent() -> None:
    """End this process, and what it started, when the benchmark is gone: it would keep the device from others."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        _kill(os.getpid())


def _measure(spec: dict[str, Any], answer: str, log: str) -> None:
    """In the cell's process: both outputs into ``log``, what was found into ``answer``."""
    with open(log, "w", encoding="utf-8") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    if torch.cuda._is_in_bad_fork():
        os._exit(_CANNOT_USE_DEVICE)
    from flowhn.bench_cell import measure

    partial = Path(f"{answer}.partial")
    partial.write_text(json.dumps(measure(spec)), encoding="utf-8")
    partial.replace(answer)
