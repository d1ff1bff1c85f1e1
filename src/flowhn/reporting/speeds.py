"""How far a measured speed can be trusted: its spread within runs, between seeds, and between days."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from flowhn.errors import UserError
from flowhn.reporting.bench import find_bench_records
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


def day_spreads(experiments: Path) -> dict[str, float]:
    """Device name -> the largest share by which ``flowhn-bench`` timed the same cell faster on one day than on another.

    From the records below ``experiments/figure4``: same cell, size, length, batch, protocol and number of devices; empty where
    nothing was timed twice.

    Raises:
        UserError: a record is damaged.
    """
    found: dict[tuple[Any, ...], list[float]] = {}
    for folder in sorted((Path(experiments) / "figure4").glob("*/records")):
        for record in find_bench_records(folder):
            if record["status"] == "done" and not record["peer"]:
                found.setdefault(_what(record), []).append(float(record["tps"]))
    spreads: dict[str, float] = {}
    for (device, *_), speeds in found.items():
        if len(speeds) > 1:
            spreads[device] = max(spreads.get(device, 0.0), max(speeds) / min(speeds) - 1)
    return spreads


def _what(record: Mapping[str, Any]) -> tuple[Any, ...]:
    try:
        device = record["device"]
        same = (record[key] for key in ("cell", "size", "seq_len", "batch", "protocol"))
        return (device["name"], device.get("count"), *same)
    except (KeyError, TypeError) as error:
        raise UserError(f"a record of flowhn-bench lacks {error}; delete it and time it again") from error
