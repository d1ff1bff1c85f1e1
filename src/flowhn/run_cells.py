"""The missing runs of an artefact, one after another: one that fails is told with its reason, and the others go on."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from pathlib import Path

from flowhn.cli import sentence
from flowhn.errors import UserError
from flowhn.runs import Run

LOG_NAME = "error.log"


def run_missing(title: str, runs: Mapping[str, Run]) -> dict[str, str]:
    """Run every cell without a record; returns the reason for each that failed.

    Raises:
        UserError: the data cannot be read; that stops everything, because every cell reads the same.
    """
    missing = {cell: run for cell, run in runs.items() if run.record() is None}
    if not missing:
        return {}
    from flowhn.display import Display
    from flowhn.experiment import Workshop, summary

    failed: dict[str, str] = {}
    workshop = Workshop()
    with Display(title=title, n_runs=len(missing)) as display:
        for cell, run in missing.items():
            watch = display.watch(cell)
            workshop.prepare(run.config, watch)
            try:
                record = workshop.run(run, watch, say=display.say)
            except Exception as error:
                if run.config["debug"]:
                    raise
                failed[cell] = reason(error, run.folder / LOG_NAME)
                display.finish(cell, f"failed: {failed[cell]}")
            else:
                display.finish(cell, summary(record))
    return failed


def reason(error: Exception, log: Path) -> str:
    """One sentence for what ended a run or an artefact; the traceback of a fault of the program goes into ``log``."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError | MemoryError | RuntimeError) and (known := sentence(error)) is not None:
        return known
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    first = (str(error).strip().splitlines() or ["no message"])[0]
    return f"{type(error).__name__}: {first} (traceback: {log})"
