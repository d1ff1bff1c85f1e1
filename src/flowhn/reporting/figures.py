"""Figures from run records: throughput and MFU as in the paper's figure 4; those of losses are in ``loss_figures``.

Everything is drawn on matplotlib's own Figure objects, without pyplot and its global state, so that a
notebook's settings stay as they are. Each function returns the Figure and, with a path, writes it as PNG, PDF or SVG by
the path's ending.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from flowhn.errors import UserError
from flowhn.reporting import paper, style
from flowhn.reporting.cells import pool
from flowhn.reporting.loss_figures import has_flops, has_losses, loss_figure, loss_vs_flops_figure, loss_vs_time_figure
from flowhn.reporting.record import RunRecord
from flowhn.reporting.style import save

__all__ = [
    "figure4",
    "has_flops",
    "has_losses",
    "has_throughput",
    "loss_figure",
    "loss_vs_flops_figure",
    "loss_vs_time_figure",
    "save",
]

_BAR_SPACE = 0.8  # share of a model's slot that its bars take


def figure4(
    records: Iterable[RunRecord],
    path: Path | None = None,
    *,
    size: str | Sequence[str] | None = None,
    expected: Sequence[str] | None = None,
) -> Figure:
    """Training tokens per second (bars, left axis) and MFU (lines, right axis), ours above the paper's figure 4.

    Args:
        records: run records.
        path: where to write it; None writes nothing.
        size: one size or several to show; None takes all that the records have.
        expected: cells that get a place, with or without a record; None takes the paper's ten.

    Raises:
        UserError: no record of these sizes has a throughput.
    """
    records = list(records)
    wanted = {size} if isinstance(size, str) else set(size or (record.size for record in records))
    sizes = style.sizes_in_order(wanted)
    cells = {one: pool(records, one) for one in sizes}
    ours = {one: {n: (c.tps, c.mfu) for n, c in cells[one].items() if c.tps is not None} for one in sizes}
    ours = {one: values for one, values in ours.items() if values}
    if not ours:
        raise UserError(
            f"no record of size {' or '.join(sizes) or 'any'} has a throughput; train longer to time a window"
        )
    order = style.in_order(
        [*(style.CELLS if expected is None else expected), *(n for one in ours.values() for n in one)]
    )
    theirs: dict[str, dict[str, tuple[float | None, float | None]]] = {}
    for row in paper.figure4().itertuples():
        theirs.setdefault(row.size, {})[row.cell] = (row.tps, row.mfu)
    with matplotlib.rc_context(style.FONT):
        figure = Figure(figsize=(style.WIDTH, 5.0), dpi=style.DPI, layout="constrained")
        top, bottom = figure.subplots(2, 1, height_ratios=[1.5, 1])
        _throughput_panel(top, ours, order)
        devices = sorted({_device(c.first) for one in ours for c in cells[one].values()})
        top.set_title(
            f"Ours: {', '.join(style.size_name(one) for one in ours)} on {', '.join(devices)}", loc="left", fontsize=8.5
        )
        _throughput_panel(bottom, theirs, order)
        bottom.set_title("Paper, figure 4: 135M, 350M, 1B on one GPU", loc="left", fontsize=8.5)
        names = [style.name(cell) for cell in order]
        bottom.set_xticks(range(len(order)), names)
        if len(ours) == 1:  # the figure itself, under the name: above the bar it would meet the line
            speeds = [next(iter(ours.values())).get(cell, (None, None))[0] for cell in order]
            names = [
                f"{name}\n{_thousands(tps) if tps else 'no record'}" for name, tps in zip(names, speeds, strict=True)
            ]
        top.set_xticks(range(len(order)), names)
        _throughput_legend(
            figure,
            style.sizes_in_order({*ours, *theirs}),
            any(m is not None for v in ours.values() for _, m in v.values()),
        )
        return save(figure, path)


def has_throughput(records: Iterable[RunRecord]) -> bool:
    """Whether :func:`figure4` has something to draw."""
    return any(record.throughput["tps"] is not None for record in records)


def _throughput_panel(
    axes: Axes, values: Mapping[str, Mapping[str, tuple[float | None, float | None]]], order: Sequence[str]
) -> None:
    sizes = style.sizes_in_order(values)
    width = _BAR_SPACE / len(sizes)
    right = axes.twinx()  # drawn after axes: lines over bars
    for index, size in enumerate(sizes):
        shift = (index - (len(sizes) - 1) / 2) * width
        places = [order.index(cell) + shift for cell in order if cell in values[size]]
        heights = [values[size][cell][0] for cell in order if cell in values[size]]
        axes.bar(places, heights, width * 0.94, color=_size_color(size), linewidth=0)
        points = [(order.index(cell), values[size][cell][1]) for cell in order if cell in values[size]]
        points = [(place, mfu) for place, mfu in points if mfu is not None]
        if points:
            right.plot(*zip(*points, strict=True), **_mfu_look(size))
    axes.set_ylabel("Tokens/s (bars)")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1000:g}k" if value else "0"))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.margins(y=0.08)
    axes.set_ylim(bottom=0)
    axes.set_xlim(-0.6, len(order) - 0.4)
    axes.spines[["top", "right"]].set_visible(False)
    right.spines["top"].set_visible(False)
    axes.tick_params(axis="x", length=0)
    mfus = [mfu for one in values.values() for _, mfu in one.values() if mfu is not None]
    if mfus:
        right.set_ylim(0, max(mfus) * 1.08)
        right.set_ylabel("MFU (%, lines)")
        right.yaxis.set_major_locator(MaxNLocator(5))
    else:
        right.set_yticks([])
        right.spines["right"].set_visible(False)


def _throughput_legend(figure: Figure, sizes: Sequence[str], ours_have_mfu: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [Patch(facecolor=_size_color(size), label=f"{style.size_name(size)} tokens/s") for size in sizes]
    handles += [Line2D([], [], label=f"{style.size_name(size)} MFU", **_mfu_look(size)) for size in sizes]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=2 * len(sizes) if len(sizes) < 4 else len(sizes),
        frameon=False,
    )
    if not ours_have_mfu:
        figure.axes[0].text(
            0.995,
            0.98,
            "MFU: the device's peak is unknown",
            transform=figure.axes[0].transAxes,
            ha="right",
            va="top",
            fontsize=7,
        )


def _device(record: RunRecord) -> str:
    count = record.device.get("count") or 1
    device = record.device["name"] or record.device["type"]
    if record.device["type"] == "cpu":
        return f"{device}, {count} thread{'s' if count > 1 else ''}"
    return device if count == 1 else f"{count} x {device}"


def _size_color(size: str) -> str:
    return style.SIZE_COLORS.get(size, "#CC79A7")


def _mfu_look(size: str) -> dict[str, Any]:
    return {
        "color": "black",
        "linewidth": 0.8,
        "linestyle": {"350m": "--", "1b": ":"}.get(size, "-"),
        "marker": style.SIZE_MARKERS.get(size, "o"),
        "markersize": 4.5,
        "markerfacecolor": _size_color(size),
        "markeredgewidth": 0.8,
    }


def _thousands(value: float) -> str:
    """Three significant digits: 11.4k, 345k, 812."""
    return f"{value / 1000:,.{1 if value < 99_950 else 0}f}k" if value >= 1000 else f"{value:.0f}"
