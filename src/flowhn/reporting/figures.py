"""Figures from run records: throughput and MFU as in the paper's figure 4; validation loss over tokens, time and FLOPs.

Everything is drawn on matplotlib's own Figure objects, without pyplot and its global state, so that a
notebook's settings stay as they are. Each function returns the Figure and, with a path, writes it as PNG, PDF or SVG by
the path's ending.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, FuncFormatter, MaxNLocator, ScalarFormatter

from flowhn.errors import UserError
from flowhn.reporting import paper, style
from flowhn.reporting.cells import Cell, pool
from flowhn.reporting.record import RunRecord

_WIDTH = 7.0  # inches, a full text column of two
_DPI = 200
_FAR = 0.15  # of the curves' height: how far above them the unigram entropy is still drawn as a line
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
        figure = Figure(figsize=(_WIDTH, 5.0), dpi=_DPI, layout="constrained")
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


def loss_figure(records: Iterable[RunRecord], path: Path | None = None, *, size: str | None = None) -> Figure:
    """Validation loss over training tokens, all models of one size; dashed: what a unigram model reaches.

    Raises:
        UserError: no record has a validation loss, or the records have several sizes and none is chosen.
    """
    return _loss_over(records, path, size, "Training tokens", lambda cell, point: point[0], EngFormatter(sep=""))


def loss_vs_time_figure(records: Iterable[RunRecord], path: Path | None = None, *, size: str | None = None) -> Figure:
    """Validation loss over seconds of training at each model's measured speed; raises as :func:`loss_figure`.

    Tokens over the run's median tokens/s, so that compilation, which is most of a short run's clock, and validation are
    left out. A run without a measured speed is drawn by its own clock.
    """

    def seconds(cell: Cell, point: Sequence[float]) -> float | None:
        return point[0] / cell.tps if cell.tps else point[2]

    label = "Training time (s) at the measured speed, without compilation"
    return _loss_over(records, path, size, label, seconds, FuncFormatter(lambda value, _: f"{value:,g}"))


def loss_vs_flops_figure(records: Iterable[RunRecord], path: Path | None = None, *, size: str | None = None) -> Figure:
    """Validation loss over training FLOPs (tokens times FLOPs per token); raises as :func:`loss_figure`."""

    def flops(cell: Cell, point: Sequence[float]) -> float | None:
        per_token = cell.first.throughput["flops_per_token"]
        return None if per_token is None else per_token * point[0]

    power = ScalarFormatter(useMathText=True)
    power.set_powerlimits((-3, 4))
    return _loss_over(records, path, size, "Training FLOPs", flops, power)


def has_throughput(records: Iterable[RunRecord]) -> bool:
    """Whether :func:`figure4` has something to draw."""
    return any(record.throughput["tps"] is not None for record in records)


def has_losses(records: Iterable[RunRecord]) -> bool:
    """Whether :func:`loss_figure` has something to draw."""
    return any(None not in point for record in records for point in record.losses["val"])


def has_flops(records: Iterable[RunRecord]) -> bool:
    """Whether :func:`loss_vs_flops_figure` has something to draw."""
    return has_losses(record for record in records if record.throughput["flops_per_token"] is not None)


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


def _loss_over(
    records: Iterable[RunRecord],
    path: Path | None,
    size: str | None,
    label: str,
    position: Callable[[Cell, Sequence[float]], float | None],
    formatter: Formatter,
) -> Figure:
    records = list(records)
    sizes = style.sizes_in_order(record.size for record in records)
    if size is None and len(sizes) > 1:
        raise UserError(f"the records have several sizes; choose one with size= ({', '.join(sizes)})")
    size = size or (sizes[0] if sizes else "")
    cells = pool(records, size)
    lines: list[tuple[Cell, list[float], list[list[float]]]] = []
    for cell in cells.values():
        points = [(position(cell, point), point) for point in cell.curve()]
        points = [(x, point) for x, point in points if x is not None]
        if points:
            lines.append((cell, [x for x, _ in points], [point for _, point in points]))
    if not lines:
        raise UserError(
            f"no record of size {size or 'any'} has the validation losses for this figure; set val_points= above 0"
        )
    lines.sort(key=lambda line: -line[2][-1][1])  # the legend runs as the curves end, worst on top
    with matplotlib.rc_context(style.FONT):
        figure = Figure(figsize=(_WIDTH, 3.9), dpi=_DPI, layout="constrained")
        axes = figure.subplots()
        _loss_lines(axes, lines)
        _unigram_line(axes, cells)
        axes.set_xlabel(label)
        axes.set_ylabel("Validation loss (nats per token)")
        axes.xaxis.set_major_formatter(formatter)
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(
            loc="outside right center", frameon=False, title="Model, final loss", title_fontsize=7.5, handlelength=3.2
        )
        return save(figure, path)


def _loss_lines(axes: Axes, lines: Sequence[tuple[Cell, list[float], list[list[float]]]]) -> None:
    for number, (cell, xs, points) in enumerate(lines):
        look = style.look(cell.cell)
        losses = [point[1] for point in points]
        # Markers start at different points, or ten lines' markers would lie in ten columns on top of each other.
        every = max(1, len(xs) // 8)
        axes.plot(
            xs, losses, color=look.color, linestyle=look.linestyle, marker=look.marker,
            linewidth=1.7 if cell.cell == "flowhn_fac" else 1.2,
            zorder=2 if look.linestyle == "-" else 2.5,  # where curves coincide, the solid one shows through the dashes
            markersize=6 if look.marker == "*" else 4, markevery=(number % every, every), markeredgewidth=0,
            label=f"{style.long_name(cell.cell)}  {losses[-1]:.3f}",
        )  # fmt: skip
        if len(cell.records) > 1:
            axes.fill_between(
                xs, [p[3] for p in points], [p[4] for p in points], color=look.color, alpha=0.15, linewidth=0
            )


def _unigram_line(axes: Axes, cells: Mapping[str, Cell]) -> None:
    """One dashed line where all records read the same text; none where they differ.

    Far above the curves a note in the corner takes its place, or the line would leave the curves little room.
    """
    levels = {cell.first.losses["unigram_entropy"] for cell in cells.values()}
    level = levels.pop() if len(levels) == 1 else None
    if level is None:
        return
    low, high = axes.dataLim.intervaly
    if level > high + _FAR * (high - low):
        axes.text(
            0.99, 0.98, f"unigram entropy {level:.2f}, above the figure", transform=axes.transAxes, ha="right",
            va="top", fontsize=7, color="#333333",
        )  # fmt: skip
        return
    axes.axhline(level, color="#555555", linewidth=0.9, linestyle=(0, (6, 3)), zorder=1)
    axes.annotate(
        f"unigram entropy {level:.2f}", (1, level), xycoords=("axes fraction", "data"), xytext=(-2, 2.5),
        textcoords="offset points", ha="right", va="bottom", fontsize=7, color="#333333",
    )  # fmt: skip


def save(figure: Figure, path: Path | None) -> Figure:
    """Write a figure so that a reader finds the old file or the new one; returns it."""
    if path is not None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.stem}.partial{path.suffix}")
        figure.savefig(partial, dpi=_DPI)
        partial.replace(path)
    return figure


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
