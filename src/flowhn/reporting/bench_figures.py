"""Figures of ``flowhn-bench``: tokens/s and MFU by model and size, and tokens/s over sequence length."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from flowhn.reporting import style

_DPI = 200


def throughput_figure(frame: pd.DataFrame, path: Path | None = None) -> Figure:
    """Bars of tokens/s and points of MFU, one panel for each size; columns as in ``bench_table``."""
    sizes = style.sizes_in_order(frame["size"])
    with matplotlib.rc_context(style.FONT):
        figure = Figure(figsize=(7.5, 2.3 * len(sizes) + 0.5), layout="constrained")
        for axis, size in zip(figure.subplots(len(sizes), 1, squeeze=False)[:, 0], sizes, strict=True):
            part = frame[frame["size"] == size]
            place = np.arange(len(part))
            axis.bar(place, part.tps / 1e3, color=[_color(cell) for cell in part.cell])
            axis.set_xticks(place, [name.replace("FlowHN ", "").replace(", ", ",\n") for name in part.model])
            axis.set_ylabel("1,000 tokens/s (bars)")
            axis.set_title(style.size_name(size), loc="left", fontsize=9)
            axis.spines[["top", "right"]].set_visible(False)
            if part.mfu.notna().any():
                twin = axis.twinx()
                twin.plot(place, part.mfu.astype(float), "ko", markersize=4)
                twin.set_ylim(bottom=0)
                twin.set_ylabel("MFU % (points)")
                twin.spines["top"].set_visible(False)
        if path is not None:
            figure.savefig(path, dpi=_DPI)
    return figure


def _color(cell: str) -> str:
    if cell.startswith("peer_"):
        return "#cccccc"
    return style.look("flowhn_fac" if "_fac" in cell or cell.startswith("fac_") else cell).color


def length_figure(frame: pd.DataFrame, path: Path | None = None) -> Figure:
    """Tokens/s over sequence length, one line for each model."""
    with matplotlib.rc_context(style.FONT):
        figure = Figure(figsize=(5.5, 3.5), layout="constrained")
        axis = figure.subplots()
        for cell, part in frame.groupby("cell", sort=False):
            ordered, look = part.sort_values("seq_len"), style.look(str(cell))
            axis.plot(
                ordered.seq_len, ordered.tps / 1e3, color=look.color, marker=look.marker, linestyle=look.linestyle,
                label=ordered.model.iloc[0],
            )  # fmt: skip
        lengths = sorted(frame.seq_len.unique())
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{length // 1024}k" if length >= 1024 else str(length) for length in lengths])
        axis.set_ylim(bottom=0)
        axis.set_xlabel("Sequence length in tokens (tokens of a step constant)")
        axis.set_ylabel("1,000 tokens/s")
        axis.legend(frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
        if path is not None:
            figure.savefig(path, dpi=_DPI)
    return figure
