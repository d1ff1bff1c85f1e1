"""Where time goes: kernels of a training step (profiled by ``flowhn-bench``), and the phases of whole runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure

from flowhn.errors import UserError
from flowhn.reporting import style
from flowhn.reporting.bench import label
from flowhn.reporting.record import RunRecord

_DPI = 200
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#7F7F7F")
_PHASES = ("training", "evaluation", "rest")


def step_breakdown(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Milliseconds of each kind of kernel in one training step: a row for each profiled benchmark record, a column for each kind.

    Empty where no record has a profile.
    """
    rows = {
        f"{label(record['cell'])}, {style.size_name(record['size'])}": record["profile"]["kinds"]
        for record in records
        if record.get("profile")
    }
    frame = pd.DataFrame.from_dict(rows, orient="index").fillna(0.0)
    return frame[frame.sum().sort_values(ascending=False).index] if rows else frame


def run_breakdown(records: Sequence[RunRecord]) -> pd.DataFrame:
    """Seconds of whole runs: training (validation left out), evaluation, and the rest (data, validation, start), by model."""
    rows = {}
    for cell in style.in_order(record.cell for record in records):
        mine = [record.wall_seconds for record in records if record.cell == cell]
        train, evaluation, total = (
            sum(seconds[key] for seconds in mine) / len(mine) for key in ("train", "eval", "total")
        )
        rows[style.long_name(cell)] = dict(
            zip(_PHASES, (train, evaluation, max(0.0, total - train - evaluation)), strict=True)
        )
    return pd.DataFrame.from_dict(rows, orient="index")


def breakdown_figure(frame: pd.DataFrame, path: Path | None = None, *, unit: str) -> Figure:
    """Stacked bars, a row for each row of the frame; ``unit`` is what its numbers are (``ms``, ``s``).

    Raises:
        UserError: the frame is empty.
    """
    if frame.empty:
        raise UserError("no record says where its time went; profile with flowhn-bench profile=true")
    with matplotlib.rc_context(style.FONT):
        figure = Figure(figsize=(7.0, 0.3 * len(frame) + 1.1), dpi=_DPI, layout="constrained")
        axis = figure.subplots()
        left = pd.Series(0.0, index=frame.index)
        for number, kind in enumerate(frame.columns):
            axis.barh(
                frame.index, frame[kind], left=left, height=0.72, color=_COLORS[number % len(_COLORS)], label=kind,
                edgecolor="white", linewidth=0.4,
            )  # fmt: skip
            left = left + frame[kind]
        axis.invert_yaxis()
        axis.set_xlabel(f"Time ({unit})")
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        figure.legend(loc="outside lower center", ncols=min(4, len(frame.columns)), frameon=False)
        if path is not None:
            figure.savefig(path, dpi=_DPI)
    return figure
