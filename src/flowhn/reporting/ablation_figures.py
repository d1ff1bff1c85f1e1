"""Figures of the ablations that train models: validation loss beside tokens/s, from a table of ``ablation_tables``.

Points with a bar from the lowest to the highest seed; colours are those of ``style``, markers differ with them, so that a
figure also reads in grey. Each function returns the Figure and, with a path, writes it by the path's ending.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flowhn.errors import UserError
from flowhn.reporting.ablation_tables import SSM_NAMES
from flowhn.reporting.figures import save
from flowhn.reporting.style import FONT, look

_WIDTH, _DPI = 7.0, 200
LOSS, SPEED = "Validation loss (nats per token)", "1,000 tokens/s"
_GROUPS = ("llama", "flowhn_fac", "mamba1", "jamba")  # whose looks the groups of a figure borrow
_ERROR = {"capsize": 2.5, "elinewidth": 0.9, "markersize": 5, "linestyle": "none"}


def split_figure(frame: pd.DataFrame, path: Path | None = None) -> Figure:
    """Loss and speed of each split strategy."""
    return _dots(frame, list(frame.label), None, path)


def fusion_figure(frame: pd.DataFrame, path: Path | None = None) -> Figure:
    """Loss and speed of each fusion, with No_Split and with a split; those that coincide say so."""
    labels = [
        f"{row['label']}\n(the same as {row['coincides']})" if isinstance(row["coincides"], str) else row["label"]
        for row in frame.to_dict("records")
    ]
    return _dots(frame, labels, list(frame.split_name), path)


def ssm_figure(frame: pd.DataFrame, path: Path | None = None) -> Figure:
    """Loss and speed of each split with a Mamba-1 and a Mamba-2 branch."""
    labels = [label.partition(",")[0] for label in frame.label]
    return _dots(frame, labels, [f"{SSM_NAMES.get(ssm, ssm)} branch" for ssm in frame.ssm], path)


def balance_figure(frame: pd.DataFrame, path: Path | None = None) -> Figure:
    """Loss and speed of each FLOP-aware split, cut by FLOPs and by measured time."""
    shares = frame.pivot_table(index="split", columns="balance", values="attention_share")
    labels = []
    for row in frame.to_dict("records"):
        told = [
            f"{shares.loc[row['split'], by]:.2f} by {'FLOPs' if by == 'flops' else by}"
            for by in shares.columns
            if row["split"] in shares.index
        ]
        labels.append(f"{row['label'].partition(',')[0]}\n(attention: {', '.join(told)})")
    groups = ["Cut by measured time" if balance == "time" else "Cut by FLOPs" for balance in frame.balance]
    return _dots(frame, labels, groups, path)


def ratio_figure(frame: pd.DataFrame, path: Path | None = None) -> Figure:
    """Loss and speed over attention's share of the tokens; the FLOP- and the time-balanced cut marked."""
    _require(frame)
    fixed = frame[frame.chosen == "fixed"].sort_values("attention_share")
    with matplotlib.rc_context(FONT):
        figure = Figure(figsize=(_WIDTH, 3.1), dpi=_DPI, layout="constrained")
        for axis, column, label, factor in _panels(figure.subplots(1, 2)):
            _errors(axis, fixed, "attention_share", column, factor, "llama", "Fixed share", linestyle="-", linewidth=1)
            for chosen, name in (("FLOP-balanced", "flowhn_fac"), ("time-balanced", "mamba1")):
                marked = frame[frame.chosen == chosen]
                _errors(axis, marked, "attention_share", column, factor, name, chosen, markersize=8, zorder=4)
                for share in marked.attention_share:
                    axis.axvline(share, color=look(name).color, linewidth=0.7, linestyle=":", zorder=1)
            axis.set_xlabel("Attention's share of the tokens")
            axis.set_ylabel(label)
            axis.set_xlim(0, 1)
            axis.spines[["top", "right"]].set_visible(False)
        _legend(figure)
        return save(figure, path)


def depth_figure(frame: pd.DataFrame, path: Path | None = None) -> Figure:
    """Loss and speed over the number of blocks at the same number of parameters."""
    _require(frame)
    with matplotlib.rc_context(FONT):
        figure = Figure(figsize=(_WIDTH, 3.0), dpi=_DPI, layout="constrained")
        for axis, column, label, factor in _panels(figure.subplots(1, 2)):
            _errors(axis, frame, "n_layers", column, factor, "flowhn_fac", None, linestyle="-", linewidth=1)
            ticks = [f"{row.n_layers}\n({row.d_model})" for row in frame.itertuples()]
            axis.set_xticks(list(frame.n_layers), ticks)
            axis.set_xlabel("Number of blocks (width d_model)")
            axis.set_ylabel(label)
            if column == "tps":
                axis.set_ylim(bottom=0)
            axis.spines[["top", "right"]].set_visible(False)
        return save(figure, path)


def _dots(frame: pd.DataFrame, labels: Sequence[str], groups: Sequence[str] | None, path: Path | None) -> Figure:
    """One line for each label: its loss in the left panel, its speed in the right one; a colour and marker for each group.

    A label that comes once in each of several groups is one line with a point of each group.
    """
    _require(frame)
    groups = groups or [""] * len(frame)
    names = list(dict.fromkeys(groups))
    paired = len(set(labels)) * len(names) == len(labels)
    lines = list(dict.fromkeys(labels)) if paired else list(labels)
    places = [lines.index(label) for label in labels] if paired else list(range(len(labels)))
    rows = pd.DataFrame({**{c: frame[c] for c in _COLUMNS}, "group": groups, "place": places})
    height = 1.1 + 0.27 * len(lines) + 0.12 * sum("\n" in line for line in lines)
    with matplotlib.rc_context(FONT):
        figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for axis, column, label, factor in _panels(axes):
            for number, group in enumerate(names):
                part = rows[rows.group == group]
                style = _GROUPS[number % len(_GROUPS)]
                _errors(axis, part, column, "place", factor, style, group or None, horizontal=True)
            axis.set_xlabel(label)
            axis.xaxis.set_major_locator(MaxNLocator(5))
            axis.grid(axis="y", color="#dddddd", linewidth=0.6)
            axis.set_axisbelow(True)
            axis.tick_params(axis="y", length=0)
            axis.spines[["top", "right", "left"]].set_visible(False)
            if column == "tps":
                axis.set_xlim(0, 1.04 * factor * (frame.tps + frame.tps_spread.fillna(0.0)).max())
        axes[0].set_yticks(range(len(lines)), lines)
        axes[0].set_ylim(len(lines) - 0.5, -0.5)
        if len(names) > 1:
            _legend(figure)
        return save(figure, path)


_COLUMNS = ("val_loss", "val_loss_spread", "tps", "tps_spread")


def _panels(axes: Any) -> list[tuple[Axes, str, str, float]]:
    """(axes, column, label, factor) of the two panels."""
    return [(axes[0], "val_loss", LOSS, 1.0), (axes[1], "tps", SPEED, 1e-3)]


def _errors(
    axis: Axes,
    frame: pd.DataFrame,
    x: str,
    y: str,
    factor: float,
    style: str,
    label: str | None,
    *,
    horizontal: bool = False,
    **options: Any,
) -> None:
    """Points of one group; the measured column (x when horizontal, else y) is multiplied by ``factor``."""
    measured = x if horizontal else y
    values, spread = factor * frame[measured], factor * frame[f"{measured}_spread"]
    spread = None if spread.isna().all() else spread.fillna(0.0)
    drawn = look(style)
    axis.errorbar(
        values if horizontal else frame[x], frame[y] if horizontal else values, xerr=spread if horizontal else None,
        yerr=None if horizontal else spread, color=drawn.color, marker=drawn.marker, label=label, **{**_ERROR, **options},
    )  # fmt: skip


def _legend(figure: Figure) -> None:
    """One legend for all panels, below them."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)


def _require(frame: pd.DataFrame) -> None:
    """The two columns that are drawn.

    Raises:
        UserError: no row has a loss, or none a speed.
    """
    for column, what in (("val_loss", "validation loss"), ("tps", "measured tokens/s")):
        if frame[column].isna().all():
            raise UserError(f"no record has a {what}, train longer or set val_points= above 0")
