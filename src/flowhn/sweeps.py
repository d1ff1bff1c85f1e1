"""Sweeps: many runs from one command, through Hydra's launchers; what is done stays done, what fails is listed.

Every run of a sweep is an ordinary run in its own folder. One whose record exists is not repeated, so a sweep that was
killed goes on with the same command; one that fails leaves its reason and its log, and the others go on.
"""

from __future__ import annotations

import json
import math
import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from flowhn.errors import UserError
from flowhn.reporting.record import RunRecord, read_record
from flowhn.run_folder import write_json

JOB_NAME = "job.json"
LOG_NAME = "error.log"
KEPT_LOGS = 3  # of earlier attempts, beside that of the last one
UNFINISHED = "it did not end (stopped, killed or out of memory); the same command goes on from its last checkpoint"
WORST = math.inf  # what a search is told of a run that failed
_taken: dict[Path, Any] = {}  # sweep's folder -> lock of the device that this process has


@dataclass(frozen=True)
class Job:
    """One run of a sweep: its overrides, and its record's path or the reason why there is none."""

    number: int
    overrides: list[str]
    record: str | None = None
    error: str | None = None
    log: str | None = None


def rotate(log: Path) -> None:
    """Keep what an earlier attempt said: ``output.log`` becomes ``output.log.1``, that ``output.log.2``, up to ``KEPT_LOGS``."""
    if not log.is_file() or not log.stat().st_size:
        return
    for number in range(KEPT_LOGS, 0, -1):
        older = log.with_name(f"{log.name}.{number - 1}") if number > 1 else log
        if older.is_file():
            os.replace(older, log.with_name(f"{log.name}.{number}"))


def run_job(
    body: Callable[[], tuple[RunRecord, Path]], *, folder: Path, number: int, overrides: Sequence[str]
) -> float:
    """Do one run and note in ``folder`` how it ended; returns the final validation loss, :data:`WORST` after a failure.

    Interrupts (Ctrl-C, SIGTERM) go through: they end the sweep. A run whose process is killed is listed as one that did not end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(number, list(overrides))
    write_json(folder / JOB_NAME, asdict(job) | {"error": UNFINISHED, "log": str(folder)})
    try:
        record, path = body()
    except Exception as error:
        log = folder / LOG_NAME
        log.write_text(traceback.format_exc(), encoding="utf-8")
        lines = str(error).strip().splitlines()
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {lines[0] if lines else ''}"
        write_json(folder / JOB_NAME, asdict(job) | {"error": reason, "log": str(log)})
        return WORST
    write_json(folder / JOB_NAME, asdict(job) | {"record": str(path)})
    loss = record.losses["final_val"]
    return WORST if loss is None else loss


def take_device(folder: Path) -> None:
    """Give this process one CUDA device that no other process of the sweep has; nothing with fewer than two devices.

    The first free number is kept, by a lock in the sweep's folder, until the process ends; with more processes than devices
    the later ones share. Must come before CUDA is used: the choice is the environment's ``CUDA_VISIBLE_DEVICES``.
    """
    import torch
    from filelock import FileLock, Timeout

    n_devices = torch.cuda.device_count()
    if n_devices < 2 or folder in _taken:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n_devices)))
    folder.mkdir(parents=True, exist_ok=True)
    number = os.getpid() % n_devices
    for candidate in range(n_devices):
        lock = FileLock(folder / f".device-{candidate}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        _taken[folder], number = lock, candidate
        break
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number]


def read_jobs(folder: Path) -> list[Job]:
    """The jobs that a sweep's folder tells of, in order."""
    found = [Job(**json.loads(path.read_text(encoding="utf-8"))) for path in Path(folder).glob(f"*/{JOB_NAME}")]
    return sorted(found, key=lambda job: job.number)


def sweep_table(jobs: Sequence[Job]) -> pd.DataFrame:
    """One row for each run that has a record: what was varied, then loss, speed, MFU, memory and mean accuracy.

    Columns of overrides that are the same in all runs are left out.
    """
    rows = []
    for job in jobs:
        if job.record is None:
            continue
        record = read_record(Path(job.record))
        varied = dict(override.lstrip("+").partition("=")[::2] for override in job.overrides)
        tasks = record.evaluation["tasks"].values()
        accuracies = [
            task[task.get("metric", "acc")] for task in tasks if task.get(task.get("metric", "acc")) is not None
        ]
        throughput = record.throughput
        rows.append(
            {
                **varied,
                "run": Path(job.record).parent.name,
                "parameters (M)": record.parameters / 1e6,
                "tokens": record.tokens,
                "val loss": record.losses["final_val"],
                "tokens/s": throughput["tps"],
                "MFU %": None if throughput["mfu"] is None else 100 * throughput["mfu"],
                "accuracy %": 100 * sum(accuracies) / len(accuracies) if accuracies else None,
            }
        )
    counts: dict[str, set[str]] = {}
    for job in jobs:
        for override in job.overrides:
            key, _, value = override.lstrip("+").partition("=")
            counts.setdefault(key, set()).add(value)
    same = [key for key, values in counts.items() if len(values) == 1 and len(jobs) > 1]
    return pd.DataFrame(rows).drop(columns=same, errors="ignore")


def _readable(frame: pd.DataFrame) -> pd.DataFrame:
    formats = {
        "parameters (M)": ".2f",
        "tokens": ",.0f",
        "val loss": ".3f",
        "tokens/s": ",.0f",
        "MFU %": ".1f",
        "accuracy %": ".1f",
    }
    shown = frame.copy()
    for column, style in formats.items():
        shown[column] = ["" if pd.isna(value) else format(value, style) for value in frame[column]]
    return shown


def write_summary(folder: Path) -> tuple[str, list[Job]]:
    """Write ``summary.md`` and ``summary.csv`` of a sweep; returns the text and the jobs that failed."""
    jobs = read_jobs(folder)
    frame = sweep_table(jobs)
    failed = [job for job in jobs if job.record is None]
    parts = [f"# Sweep: {len(jobs)} runs, {len(failed)} failed"]
    if not frame.empty:
        shown = frame.sort_values("val loss", na_position="last")
        frame.to_csv(folder / "summary.csv", index=False)
        parts.append(_readable(shown).to_markdown(index=False, disable_numparse=True))
    if failed:
        lines = [f"- {' '.join(job.overrides)}: {job.error} (log: {job.log})" for job in failed]
        parts.append("\n".join(["Failed:", "", *lines]))
    text = "\n\n".join(parts) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.md").write_text(text, encoding="utf-8")
    return text, failed
