"""How far a measured speed can be trusted: its spread within runs, between seeds, and between repeats on other days."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

from flowhn.errors import UserError
from flowhn.reporting.bench import commit_of, find_bench_records, label
from flowhn.reporting.cells import Cell


def stretches(cell: Cell) -> list[float]:
    """Tokens/s between one validation and the next (without the first stretch, which compiles), and the speeds of all seeds.

    Empty where that is less than two speeds. A record's own speed is the median of its timed windows, of which only the number
    is on record; the stretches between validations are windows too, and their tokens and seconds stand in ``losses.val``.
    """
    speeds = [record.throughput["tps"] for record in cell.records if record.throughput["tps"] is not None]
    for record in cell.records:
        points = [point for point in record.losses["val"] if None not in point]
        for start, end in pairwise(points):
            if end[2] > start[2] and end[0] > start[0]:
                speeds.append((end[0] - start[0]) / (end[2] - start[2]))
    return speeds if len(speeds) > 1 else []


def ratio_band(first: Cell, second: Cell) -> tuple[float, float] | None:
    """By which factors the ratio of two speeds can be off: the slowest of one over the fastest of the other, and the reverse.

    None where a model's speed was measured only once.
    """
    a, b = (stretches(cell) for cell in (first, second))
    if not a or not b or not first.tps or not second.tps:
        return None
    slow, fast = min(a) / first.tps, max(a) / first.tps
    return slow / (max(b) / second.tps), fast / (min(b) / second.tps)


@dataclass(frozen=True)
class DaySpread:
    """The largest share by which the same cell was timed faster in one run than in another.

    ``same_code``: both runs had one commit; otherwise no cell was timed twice with one, and a change of the code is in it.
    """

    share: float
    same_code: bool


def day_spreads(experiments: Path) -> dict[str, DaySpread]:
    """Device name -> how far ``flowhn-bench`` timed the same cell apart, from the records below ``experiments/figure4``.

    Same cell: also size, length, batch, protocol, overrides and number of devices. From repeats of the same commit where the
    device has any, else from those of other commits; empty where nothing was timed twice.

    Raises:
        UserError: a record is damaged.
    """
    spreads: dict[str, DaySpread] = {}
    for same_code in (True, False):
        found: dict[str, float] = {}
        for key, runs in _timed(experiments, by_commit=same_code).items():
            speeds = [float(record["tps"]) for _, record in runs]
            if len(speeds) > 1:
                found[key[0]] = max(found.get(key[0], 0.0), max(speeds) / min(speeds) - 1)
        for device, share in found.items():
            spreads.setdefault(device, DaySpread(share, same_code))
    return spreads


def repeats(experiments: Path) -> pd.DataFrame:
    """The cells that were timed more than once with the same code: model, size, tokens/s (one for each run), ± % (half the
    range over the median), commit, when (UTC), folders. Empty where there are none; raises as :func:`day_spreads`."""
    rows = []
    for runs in _timed(experiments, by_commit=True).values():
        if len(runs) < 2:
            continue
        speeds, record = [float(one["tps"]) for _, one in runs], runs[0][1]
        rows.append(
            {
                **_named(record),
                "tokens/s, each run": "; ".join(f"{speed:,.0f}" for speed in speeds),
                "± %": f"{100 * (max(speeds) - min(speeds)) / 2 / median(speeds):.1f}",
                "commit": commit_of(record),
                "when": "; ".join(str(one.get("created", ""))[:16].replace("T", " ") for _, one in runs),
                "folder": ", ".join(dict.fromkeys(folder for folder, _ in runs)),
            }
        )
    return pd.DataFrame(rows)


def other_code(experiments: Path) -> pd.DataFrame:
    """The same cells with other code: model, size, tokens/s and commit of the newest runs (median), those of each other
    commit, difference in %. Empty where no cell was timed at two commits; raises as :func:`day_spreads`."""
    rows = []
    for runs in _timed(experiments, by_commit=False).values():
        by: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
        for folder, record in runs:  # oldest first
            by.setdefault(commit_of(record), []).append((folder, record))
        *older, newest = by
        now = median(float(record["tps"]) for _, record in by[newest])
        for commit in older:
            then = median(float(record["tps"]) for _, record in by[commit])
            rows.append(
                {
                    **_named(by[newest][-1][1]),
                    "tokens/s": f"{now:,.0f}",
                    "commit": newest,
                    "tokens/s then": f"{then:,.0f}",
                    "commit then": commit,
                    "difference %": f"{100 * (now / then - 1):+.1f}",
                    "folder then": ", ".join(dict.fromkeys(folder for folder, _ in by[commit])),
                }
            )
    return pd.DataFrame(rows)


def newest_speeds(experiments: Path, device: str, size: str) -> dict[str, Mapping[str, Any]]:
    """Cell -> its record in the newest code's run of figure 4 on a device at one size, of several the one with the middle
    speed; empty where there is none. Raises as :func:`day_spreads`."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for key, runs in _timed(experiments, by_commit=False).items():
        if key[0] == device and runs[-1][1]["size"] == size and runs[-1][1]["protocol"] == "optimised":
            for _, record in runs:
                found.setdefault(commit_of(record), []).append(record)
    if not found:
        return {}
    newest = max(found.values(), key=lambda records: max(str(record.get("created", "")) for record in records))
    by_cell: dict[str, list[Mapping[str, Any]]] = {}
    for record in sorted(newest, key=lambda record: float(record["tps"])):
        by_cell.setdefault(record["cell"], []).append(record)
    return {cell: own[len(own) // 2] for cell, own in by_cell.items()}


def _named(record: Mapping[str, Any]) -> dict[str, Any]:
    return {"model": label(record["cell"]), "size": record["size"], "batch": str(record["batch"])}


def _timed(experiments: Path, *, by_commit: bool) -> dict[tuple[Any, ...], list[tuple[str, Mapping[str, Any]]]]:
    """What is the same (device first, commit last where asked) -> (folder, record) of each run, oldest first.

    With ``by_commit`` runs of an unknown or changed commit are left out: nobody can tell that their code was the same.
    """
    found: dict[tuple[Any, ...], list[tuple[str, Mapping[str, Any]]]] = {}
    for folder in sorted((Path(experiments) / "figure4").glob("*/records")):
        for record in find_bench_records(folder):
            if record["status"] != "done" or record["peer"]:
                continue
            key = _what(record)
            if by_commit:
                if commit_of(record) == "unknown" or (record.get("git") or {}).get("dirty"):
                    continue
                key += (commit_of(record),)
            found.setdefault(key, []).append((folder.parent.name, record))
    for runs in found.values():
        runs.sort(key=lambda run: str(run[1].get("created", "")))
    return found


def _what(record: Mapping[str, Any]) -> tuple[Any, ...]:
    try:
        device = record["device"]
        same = (record[key] for key in ("cell", "size", "seq_len", "batch", "protocol"))
        return (device["name"], device.get("count"), *same, *(record.get("overrides") or ()))
    except (KeyError, TypeError) as error:
        raise UserError(f"a record of flowhn-bench lacks {error}; delete it and time it again") from error
