"""Figures of ``flowhn-bench``: tokens/s and MFU by model and size, and tokens/s over sequence length."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from flowhn.reporting import style

_DPI = 200
_BAR = 0.6  # of a model's place
_LETTERS = 13  # of a label's line
_HEADROOM = 1.15  # of the highest value, on both axes
_POINT = {
    "color": "black",
    "marker": "o",
    "markersize": 5,
    "linestyle": "",
    "markerfacecolor": "white",
}  # seen on any bar
_NOTE = {"ha": "center", "va": "bottom", "fontsize": 6.5, "color": "#666666"}


def throughput_figure(frame: pd.DataFrame, path: Path | None = None) -> Figure:
    """Bars of tokens/s and points of MFU, one panel for each size; columns as in ``bench_table``.

    Every model has its place in every panel; where a size was not measured it says so.
    """
    sizes = style.sizes_in_order(frame["size"])
    places = {cell: place for place, cell in enumerate(_cells(frame))}
    names = frame.drop_duplicates("cell").set_index("cell")["model"]
    with matplotlib.rc_context(style.FONT):
        figure = Figure(figsize=(max(4.5, 0.7 * len(places) + 1.6), 1.8 * len(sizes) + 1.0), layout="constrained")
        panels = figure.subplots(len(sizes), 1, squeeze=False, sharex=True)[:, 0]
        for axis, size in zip(panels, sizes, strict=True):
            part = frame[frame["size"] == size].assign(place=lambda part: part.cell.map(places))
            axis.bar(part.place, part.tps / 1e3, width=_BAR, color=[_color(cell) for cell in part.cell], linewidth=0)
            for cell in places.keys() - set(part.cell):
                axis.text(places[cell], 0.02, "not\nmeasured", transform=axis.get_xaxis_transform(), **_NOTE)
            axis.set_ylim(0, _HEADROOM * part.tps.max() / 1e3)
            axis.set_ylabel("1,000 tokens/s")
            axis.set_title(style.size_name(size), loc="left", fontsize=9)
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(axis="x", length=0)
            if part.mfu.notna().any():
                _mfu_points(axis.twinx(), part)
        panels[-1].set_xlim(-0.6, len(places) - 0.4)
        panels[-1].set_xticks(range(len(places)), [_wrapped(names[cell]) for cell in places])
        handles = [Patch(facecolor="#8C8C8C", label="Tokens/s (bars, left axis)")]
        if frame.mfu.notna().any():
            handles.append(Line2D([], [], label="MFU (points, right axis)", **_POINT))
        figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
        if path is not None:
            figure.savefig(path, dpi=_DPI)
    return figure


def _cells(frame: pd.DataFrame) -> list[str]:
    """All sizes' cells: the paper's in its order, each followed by transformers' model of it, then the others as they come."""
    found = dict.fromkeys(frame["cell"])
    order = []
    for cell in style.in_order(found):
        if cell in style.CELLS:
            order += [name for name in (cell, f"peer_{cell}", f"{cell}_mamba2") if name in found]
    return [*order, *(cell for cell in found if cell not in order)]


def _wrapped(name: str) -> str:
    """A model's name in lines as narrow as its bar's place."""
    parts = name.removeprefix("FlowHN ").replace("transformers ", "transformers\n").replace(", ", ",\n").split("\n")
    return "\n".join(textwrap.fill(part, _LETTERS, break_on_hyphens=False) for part in parts)


def _mfu_points(twin: Axes, part: pd.DataFrame) -> None:
    mfu = part.mfu.astype(float)
    twin.plot(part.place, mfu, **_POINT)
    twin.set_ylim(0, _HEADROOM * mfu.max())
    twin.set_ylabel("MFU (%)")
    twin.spines["top"].set_visible(False)


def _color(cell: str) -> str:
    if cell.startswith("peer_"):
        return "#cccccc"
    return style.look("flowhn_fac" if "_fac" in cell or cell.startswith("fac_") else cell).color


def length_figure(frame: pd.DataFrame, path: Path | None = None) -> Figure:
    """Tokens/s over sequence length, one line for each model."""
    with matplotlib.rc_context(style.FONT):
        figure = Figure(figsize=(5.5, 3.5), layout="constrained")
        axis = figure.subplots()
        looks = style.looks(frame["cell"])
        for cell, part in frame.groupby("cell", sort=False):
            ordered, look = part.sort_values("seq_len"), looks[str(cell)]
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
