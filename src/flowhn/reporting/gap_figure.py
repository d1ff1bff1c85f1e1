"""Loss over speed of the variants that are to close a gap, with the corner they have to reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from flowhn.reporting import style
from flowhn.reporting.beyond import GOAL, LEAST_SPEED, goal_model


def gap_figure(frame: pd.DataFrame, path: Path | None = None, *, of: str, to: list[str]) -> Figure | None:
    """Validation loss over the share of the speed of ``of``, one marker for each row of a gap table.

    Shaded: at least half of the gap to the first of ``to`` that is ahead, at no less than 90 % of the speed. Rows stand where the
    seeds that all share put them; what a row of more seeds closes over its own is told beside its name.

    Args:
        frame: as :func:`flowhn.reporting.beyond.gap_table` gives it.
        path: where to write it; None writes nothing.

    Returns:
        The figure; None where no row has both numbers.
    """
    frame = frame.dropna(subset=["val_loss", "speed"]).sort_values("val_loss", ascending=False)
    if frame.empty:
        return None
    looks = style.looks(frame["cell"])
    losses, ahead = frame.set_index("cell")["val_loss"], goal_model(frame, to)
    with matplotlib.rc_context(style.FONT):
        legend, height = style.below(len(frame))
        figure = Figure(figsize=(style.WIDTH, 3.4 + height), dpi=style.DPI, layout="constrained")
        axes = figure.subplots()
        for number, row in enumerate(frame.itertuples(), start=1):
            look, own = looks[row.cell], row.cell == of or row.cell in to
            axes.plot(
                [100 * row.speed], [row.val_loss], look.marker, color=look.color, markersize=9 if own else 6,
                markeredgecolor="black" if own else look.color, markeredgewidth=0.8, linestyle="none",
                label=f"{number}  {_label(row, known=(of, ahead))}",
            )  # fmt: skip
        axes.margins(0.06)
        if ahead is not None and of in losses and ahead in losses:
            goal = losses[of] - GOAL * (losses[of] - losses[ahead])
            (left, right), (low, _) = axes.get_xlim(), axes.get_ylim()
            axes.set_xlim(min(left, 100 * LEAST_SPEED - 5), right)
            corner = (100 * LEAST_SPEED, low)
            axes.add_patch(Rectangle(corner, right - corner[0], goal - low, color="#009E73", alpha=0.12, linewidth=0))
            told = f"half the gap\nto {style.long_name(ahead)},\n{100 * LEAST_SPEED:.0f} % of the speed"
            _in_free_corner(
                axes,
                told,
                (corner[0], right, low, goal),
                [(100 * one.speed, one.val_loss) for one in frame.itertuples()],
            )
        axes.set_xlabel(f"Tokens/s, % of {style.long_name(of)}'s")
        axes.set_ylabel("Validation loss (nats per token)")
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(
            title="Row, final loss (gap closed over more seeds)", markerscale=0.7, handletextpad=0.2, **legend
        )
        _number(figure, axes, [(100 * row.speed, row.val_loss) for row in frame.itertuples()])
        return style.save(figure, path)


def _label(row: Any, *, known: tuple[str | None, ...]) -> str:
    """A row's name and loss; of more seeds than all rows share, what it closes over them, unless that is known (0 or 100 %)."""
    more = row.own_seeds != row.seeds and row.cell not in known
    told = f" ({100 * row.closed:.0f} %, seeds {row.own_seeds})" if more else ""
    return f"{style.long_name(row.cell)}  {row.val_loss:.3f}{told}"


def _in_free_corner(axes: Axes, told: str, box: tuple[float, ...], points: list[tuple[float, float]]) -> None:
    """Write into that corner of a box (left, right, low, high) from which the points are farthest."""
    left, right, low, high = box
    transform, at = axes.transLimits.transform, np.array(axes.transLimits.transform(points))
    corners = [(right, low, "right", "bottom"), (left, low, "left", "bottom"), (right, high, "right", "top")]
    free = [np.hypot(*(at - transform(corner[:2])).T).min() for corner in corners]
    x, y, side, edge = corners[int(np.argmax(free))]
    axes.annotate(
        told, (x, y), xytext=(-4 if side == "right" else 4, 4 if edge == "bottom" else -4),
        textcoords="offset points", fontsize=7, color="#006B4E", ha=side, va=edge,
    )  # fmt: skip


def _number(figure: Figure, axes: Axes, points: list[tuple[float, float]]) -> None:
    """Number the points from 1, each label where it is farthest from the other points and the labels before it."""
    figure.draw_without_rendering()  # the layout decides where points are
    at = axes.transData.transform(points) * 72 / figure.dpi  # in points of print
    taken = [tuple(point) for point in at]
    sides = [(x, y) for x in (7, -7, 0) for y in (5, -5, 0, 9, -9) if x or abs(y) == 9]
    for number, (point, place) in enumerate(zip(points, at, strict=True), start=1):
        others = np.array([other for other in taken if other != tuple(place)] or [(1e9, 1e9)])
        side = max(sides, key=lambda side: min(12.0, np.hypot(*(others - place - side).T).min()))
        axes.annotate(
            str(number), point, xytext=side, textcoords="offset points", fontsize=6.5, ha="center", va="center",
        )  # fmt: skip
        taken.append((place[0] + side[0], place[1] + side[1]))
