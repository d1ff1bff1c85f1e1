"""Figures of validation loss over tokens, time and FLOPs of training, all models of one size (see ``figures``)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, Formatter, FuncFormatter, ScalarFormatter

from flowhn.errors import UserError
from flowhn.reporting import style
from flowhn.reporting.cells import Cell, pool
from flowhn.reporting.record import RunRecord

_LONG = 30  # letters of a name
_FAR = 0.15  # of the curves' height: how far above them the unigram entropy is still drawn as a line


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


def has_losses(records: Iterable[RunRecord]) -> bool:
    """Whether :func:`loss_figure` has something to draw."""
    return any(None not in point for record in records for point in record.losses["val"])


def has_flops(records: Iterable[RunRecord]) -> bool:
    """Whether :func:`loss_vs_flops_figure` has something to draw."""
    return has_losses(record for record in records if record.throughput["flops_per_token"] is not None)


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
        # Names as long as those of variants stand below, or they would leave the curves no room.
        legend: dict[str, Any] = {"loc": "outside right center", "frameon": False, "title_fontsize": 7.5}
        height = 3.9
        if max(len(style.long_name(cell.cell)) for cell, _, _ in lines) > _LONG:
            legend, rows = style.below(len(lines))
            height = 3.4 + rows
        figure = Figure(figsize=(style.WIDTH, height), dpi=style.DPI, layout="constrained")
        axes = figure.subplots()
        _loss_lines(axes, lines)
        _unigram_line(axes, cells)
        axes.set_xlabel(label)
        axes.set_ylabel("Validation loss (nats per token)")
        axes.xaxis.set_major_formatter(formatter)
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(title="Model, final loss", handlelength=3.2, **legend)
        return style.save(figure, path)


def _loss_lines(axes: Axes, lines: Sequence[tuple[Cell, list[float], list[list[float]]]]) -> None:
    looks = style.looks(cell.cell for cell, _, _ in lines)
    for number, (cell, xs, points) in enumerate(lines):
        look = looks[cell.cell]
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
