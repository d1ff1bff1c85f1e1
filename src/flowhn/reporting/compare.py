"""Ours beside the paper where absolute numbers cannot be compared: every model relative to one of the same table.

Another machine, text or size moves all rows; what a claim is about is how the rows stand to each other.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from flowhn.errors import UserError
from flowhn.reporting import paper, style

_DPI = 200
_PANELS = (("tps", "Tokens/s over {}'s"), ("mfu", "MFU over {}'s"), ("average", "Accuracy, points over {}'s"))


def relative(frame: pd.DataFrame, reference: str = "flowhn_no") -> pd.DataFrame:
    """Every row of :func:`flowhn.reporting.tables.table1` relative to one row, ours and the paper's.

    Returns:
        ``cell, model``; ``tps, mfu`` as ratios and ``average`` as difference in points, each with ``paper_*`` and ``delta_*``
        (ours minus the paper's). Missing numbers are NaN.

    Raises:
        UserError: the reference has no record.
    """
    ours = frame.set_index("cell")
    if reference not in ours.index or not ours.loc[reference, "seeds"]:
        raise UserError(f"there is no record of {style.long_name(reference)} to compare the other rows with")
    result = frame[["cell", "model"]].copy()
    for column in ("tps", "mfu", "average"):
        for name in (column, f"paper_{column}"):
            base = ours.loc[reference, name]
            result[name] = (frame[name] - base) if column == "average" else frame[name] / base
        result[f"delta_{column}"] = result[column] - result[f"paper_{column}"]
    return result


def deltas(frame: pd.DataFrame) -> pd.DataFrame:
    """Ours minus the paper's, row by row, at a size that the paper has: model, tokens/s ratio, MFU and task accuracies in points.

    Raises:
        UserError: the paper has no such size, so that there is nothing to subtract.
    """
    if frame.attrs["size"] != frame.attrs["paper_size"]:
        raise UserError(
            f"the paper has no size {frame.attrs['size']}: its {style.size_name(frame.attrs['paper_size'])} numbers are a "
            "reference, and a difference from them would mean nothing"
        )
    result = frame[["model"]].copy()
    result["tokens/s, ours / paper"] = frame["tps"] / frame["paper_tps"]
    result["MFU, points"] = frame["mfu"] - frame["paper_mfu"]
    for task in (*paper.TASKS, "average"):
        if task in frame and f"paper_{task}" in frame:
            result[f"{style.task_name(task)}, points"] = frame[task] - frame[f"paper_{task}"]
    return result


def relative_figure(frame: pd.DataFrame, path: Path | None = None, *, reference: str = "flowhn_no") -> Figure:
    """The frame of :func:`relative`: filled points are ours, hollow ones the paper's, a line joins a model's two."""
    panels = [(column, label) for column, label in _PANELS if frame[column].notna().any()]
    with matplotlib.rc_context(style.FONT):
        figure = Figure(figsize=(7.0, 0.28 * len(frame) + 1.0), dpi=_DPI, layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        places = np.arange(len(frame))
        for axis, (column, label) in zip(axes, panels, strict=True):
            ours, theirs = frame[column], frame[f"paper_{column}"]
            axis.hlines(places, ours, theirs, color="#BBBBBB", linewidth=1.2, zorder=1)
            axis.plot(
                theirs, places, "o", markerfacecolor="white", markeredgecolor="#0072B2", markersize=5, label="paper"
            )
            axis.plot(ours, places, "o", color="#D55E00", markersize=5, label="ours")
            axis.axvline(0 if column == "average" else 1, color="#999999", linewidth=0.7, zorder=0)
            axis.set_xlabel(label.format(style.name(reference)))
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.tick_params(axis="y", length=0)
            axis.grid(axis="y", color="#E8E8E8", linewidth=0.6)
        axes[0].set_yticks(places, [style.name(cell) for cell in frame.cell])
        axes[0].set_ylim(len(frame) - 0.5, -0.5)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
        if path is not None:
            figure.savefig(path, dpi=_DPI)
    return figure
