"""Table 1 from run records: ours beside the paper's printed numbers, as a DataFrame, as Markdown and as CSV."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from math import exp
from pathlib import Path
from typing import Any

import pandas as pd

from flowhn.reporting import paper
from flowhn.reporting.cells import Cell, average_tasks, pool, sort_tasks
from flowhn.reporting.comparability import row_warnings, statements
from flowhn.reporting.record import RunRecord
from flowhn.reporting.style import CELLS, in_order, long_name, task_name
from flowhn.reporting.table_text import DASH, SLIP, pipe_table, table1_markdown

__all__ = ["DASH", "SLIP", "table1", "write_table"]


def table1(records: Iterable[RunRecord], *, size: str, expected: Sequence[str] | None = None) -> pd.DataFrame:
    """Table 1 at one size: a row per model in the paper's order, then cells of one's own; seeds pooled as their mean.

    Args:
        records: run records; those of other sizes are left out.
        size: the size to show. One that the paper does not have gets its 135M numbers as reference columns.
        expected: cells that must have a row, with or without a record; None takes the paper's ten.

    Returns:
        Columns ``cell, model, size, seeds, parameters, tokens, val_loss, perplexity, tps, mfu`` (per cent), per task
        its accuracy and ``<task>_stderr`` (per cent), ``average, average_stderr`` and the paper's ``paper_*``. Missing
        numbers are NaN. ``attrs`` holds what :func:`write_table` says around the table: ``size, paper_size, tasks,
        average_tasks, statements, warnings, missing, slips, slip_cells, read_off_chart``.

    Raises:
        UserError: the records cannot make one table (see :func:`flowhn.reporting.cells.pool`).
    """
    cells = pool(records, size)
    order = in_order([*(CELLS if expected is None else expected), *cells])
    tasks = sort_tasks(task for cell in cells.values() for task in cell.tasks)
    averaged = average_tasks(cells.values())
    paper_size = size if size in paper.SIZES else paper.REFERENCE_SIZE
    printed = paper.table1().set_index(["size", "cell"])
    chart = paper.figure4().set_index(["size", "cell"])
    rows = []
    for cell in order:
        row = {"cell": cell, "model": long_name(cell), "size": size, **_ours(cells.get(cell), tasks, averaged)}
        key = (paper_size, cell)
        numbers = printed.loc[key] if key in printed.index else {}
        drawn = chart.loc[key] if key in chart.index else {}
        row |= {f"paper_{column}": drawn.get(column) for column in ("tps", "mfu")}
        row |= {f"paper_{column}": numbers.get(column) for column in ("tokens", *paper.TASKS, "average")}
        rows.append(row)
    frame = pd.DataFrame(rows).astype({"seeds": "Int64"})
    numeric = [column for column in frame.columns if column not in ("cell", "model", "size", "seeds")]
    frame[numeric] = frame[numeric].apply(pd.to_numeric)
    frame.attrs = _remarks(cells, frame, size, paper_size, tasks, averaged)
    return frame


def write_table(
    frame: pd.DataFrame,
    out_dir: Path,
    *,
    title: str,
    notes: Sequence[str] = (),
    name: str = "table",
    full: pd.DataFrame | None = None,
) -> tuple[Path, Path]:
    """Write ``<name>.md`` (GitHub Markdown, rounded) and ``<name>.csv`` (full precision); returns both paths.

    A frame of :func:`table1` gets its remarks: what is comparable with the paper, what is missing, slips in print. Any
    other frame is written as it is, with the notes below it. ``full`` goes into the CSV instead of ``frame``, where a
    reader of the Markdown is shown less.
    """
    parts = [f"# {title}", ""]
    if "statements" in frame.attrs:
        parts += table1_markdown(frame)
    else:
        parts += [
            pipe_table(frame.columns, [[_plain(value) for value in row] for row in frame.itertuples(index=False)]),
            "",
        ]
    if notes:
        parts += ["**Notes**", "", *(f"- {note}" for note in notes), ""]
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    markdown, csv = out_dir / f"{name}.md", out_dir / f"{name}.csv"
    _write(markdown, "\n".join(parts).rstrip() + "\n")
    _write(csv, (frame if full is None else full).to_csv(index=False))
    return markdown, csv


def _ours(cell: Cell | None, tasks: Sequence[str], averaged: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"seeds": len(cell.seeds) if cell else 0}
    row |= {"parameters": cell.first.parameters if cell else None, "tokens": cell.first.tokens if cell else None}
    loss = cell.val_loss if cell else None
    row |= {"val_loss": loss, "perplexity": None if loss is None else exp(min(loss, 700.0))}
    row |= {"tps": cell.tps if cell else None, "mfu": cell.mfu if cell else None}
    for task in tasks:
        row[task], row[f"{task}_stderr"] = (cell.accuracy(task) if cell else None) or (None, None)
    row["average"], row["average_stderr"] = (cell.average(averaged) if cell else None) or (None, None)
    return row


def _remarks(
    cells: dict[str, Cell],
    frame: pd.DataFrame,
    size: str,
    paper_size: str,
    tasks: Sequence[str],
    averaged: Sequence[str],
) -> dict[str, Any]:
    slips = paper.slips()
    slips = slips[(slips["size"] == paper_size) & slips["cell"].isin(frame["cell"])]
    marked = slips[slips["kind"] != "ranking"]
    chart = paper.figure4()
    chances = {
        task: result["chance"]
        for cell in cells.values()
        for task, result in cell.first.evaluation["tasks"].items()
        if result.get("chance")
    }
    return {
        "size": size,
        "paper_size": paper_size,
        "tasks": list(tasks),
        "average_tasks": list(averaged),
        "chances": chances,
        "metrics": {
            task: cell.metric(task) for cell in cells.values() for task in cell.tasks if cell.metric(task) != "acc"
        },
        "statements": [asdict(statement) for statement in statements(cells, size, tasks)],
        "warnings": row_warnings(cells),
        "missing": _missing(frame, tasks),
        "slips": list(slips["sentence"]),
        "slip_cells": [[row.cell, f"paper_{column}"] for row in marked.itertuples() for column in row.columns],
        "read_off_chart": list(chart.loc[(chart["size"] == paper_size) & chart["read_off_chart"], "cell"]),
    }


def _missing(frame: pd.DataFrame, tasks: Sequence[str]) -> list[str]:
    """What the records do not have: whole rows, columns empty in every row, then single numbers."""
    have = frame[frame["seeds"] > 0]
    absent = list(frame.loc[frame["seeds"] == 0, "model"])
    found = [f"records of {', '.join(absent)}"] if absent else []
    labels = {"val_loss": "validation loss", "tps": "TPS", "mfu": "MFU"} | {task: task_name(task) for task in tasks}
    for column, label in labels.items():
        gaps = have.loc[have[column].isna(), "model"]
        if len(gaps) and len(gaps) == len(have):
            found.append(f"{label} (all rows)")
        elif len(gaps):
            found.append(f"{label} ({', '.join(gaps)})")
    if len(have) and not tasks:
        found.append("accuracy (all rows)")
    return found


def _plain(value: Any) -> str:
    if value is None or (not isinstance(value, list | tuple | dict) and pd.isna(value)):
        return DASH
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _write(path: Path, text: str) -> None:
    """Write atomically, so that a reader never finds half a table."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
