"""Which token goes to which branch, drawn; and how far information can flow through a stack of FlowHN blocks.

The routing itself is the caller's (``flowhn.models.splits``): per strategy a list of routes, one for each block, every route
an object with ``n_tokens`` and the half-open ranges ``attn`` and ``ssm``, as :class:`flowhn.models.splits.base.TokenSplit` has.

Reachability: position i can depend on token j after n blocks if there is a path. A block gives a token what its branch
makes of the earlier tokens of that same branch, and its own value through the residual path; so with R_n the (T, T) matrix
of what is seen after n blocks, R_0 = I and row i of R_{n+1} is the union of the rows of R_n of all tokens up to i in its
branch. It is a bound: a path is no proof that the model uses it. ``fusion=cross`` opens further paths and is not covered.
Letters: T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from flowhn.reporting import style

_DPI = 200
_WIDTH = 7.0  # inches
_FEW_TOKENS = 24  # up to here each token is drawn as a box, as in the paper's figure 2
_SEEN, _UNSEEN, _FUTURE = "#0072B2", "#F3D9B1", "#FFFFFF"


class Route(Protocol):
    """Routing of one block: half-open, ascending ranges of T tokens."""

    n_tokens: int
    attn: Sequence[tuple[int, int]]
    ssm: Sequence[tuple[int, int]]


def reach(routes: Sequence[Route], *, attention_sees_all: bool = False) -> list[np.ndarray]:
    """What every position can have seen after each block.

    Args:
        routes: one for each block, all of the same T.
        attention_sees_all: attention's tokens read keys and values of all earlier tokens (``split.keys=all``).

    Returns:
        (T, T) bool matrices, one for each block: row i, column j is true when position i can depend on token j.
    """
    seen = np.eye(routes[0].n_tokens, dtype=bool)
    found = []
    for route in routes:
        after = seen.copy()
        for ranges, sees_all in ((route.attn, attention_sees_all), (route.ssm, False)):
            if not ranges:
                continue
            tokens = np.concatenate([np.arange(start, stop) for start, stop in ranges])
            rows = np.logical_or.accumulate(seen if sees_all else seen[tokens], axis=0)
            after[tokens] |= rows[tokens] if sees_all else rows
        seen = after
        found.append(seen)
    return found


def share_seen(seen: np.ndarray) -> np.ndarray:
    """(T,) per position, the share (0 to 1) of the earlier tokens that it can depend on; the first has none and gets 1."""
    before = np.arange(len(seen))
    return (seen.sum(axis=1) - 1 + (before == 0)) / np.maximum(before, 1)


def reach_table(routes: Mapping[str, Sequence[Route]], **options: Any) -> pd.DataFrame:
    """Per strategy and number of blocks, the share of earlier tokens that can be seen, in %.

    Columns: cell, model, blocks, mean (over positions), last (of the last position), blind (share of the positions that see
    less than half of what is before them).
    """
    rows = []
    for cell, blocks in routes.items():
        for number, seen in enumerate(reach(blocks, **options), start=1):
            shares = share_seen(seen)
            rows.append(
                {
                    "cell": cell,
                    "model": style.long_name(cell),
                    "blocks": number,
                    "mean": 100 * shares.mean(),
                    "last": 100 * shares[-1],
                    "blind": 100 * (shares < 0.5).mean(),
                }
            )
    return pd.DataFrame(rows)


def routing_figure(routes: Mapping[str, Sequence[Route]], path: Path | None = None) -> Figure:
    """One panel for each strategy: tokens from left to right, a row for each block, coloured by the branch that gets them."""
    n_blocks = max(len(blocks) for blocks in routes.values())
    colors = style.BRANCH_COLORS
    with matplotlib.rc_context(style.FONT):
        figure = Figure(figsize=(_WIDTH, (0.22 * n_blocks + 0.42) * len(routes) + 0.6), dpi=_DPI, layout="constrained")
        panels = figure.subplots(len(routes), 1, squeeze=False, sharex=True)[:, 0]
        for axis, (cell, blocks) in zip(panels, routes.items(), strict=True):
            few = blocks[0].n_tokens <= _FEW_TOKENS
            for row, route in enumerate(blocks):
                both = sum(stop - start for start, stop in (*route.attn, *route.ssm)) > route.n_tokens  # some tokens
                for lane, (branch, ranges) in enumerate((("attention", route.attn), ("ssm", route.ssm))):
                    height = 0.4 if both else 0.8
                    bottom = row - 0.4 + (lane * 0.4 if both else 0)
                    pieces = [(t, t + 1) for start, stop in ranges for t in range(start, stop)] if few else ranges
                    axis.broken_barh(
                        [(start, stop - start) for start, stop in pieces], (bottom, height), facecolor=colors[branch],
                        edgecolor="white", linewidth=0.8 if few else 0.4,
                    )  # fmt: skip
            axis.set_ylim(n_blocks - 0.45, -0.55)
            axis.set_yticks(range(len(blocks)), [str(row + 1) for row in range(len(blocks))])
            axis.set_ylabel("Block")
            axis.set_title(style.name(cell), loc="left", fontsize=8.5)
            axis.set_xlim(0, blocks[0].n_tokens)
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
            if few:
                ticks = np.arange(blocks[0].n_tokens)
                axis.set_xticks(ticks + 0.5, [str(t + 1) for t in ticks])
        panels[-1].set_xlabel("Token" if few else "Position in the sequence (tokens)")
        _legend(figure, [(colors["attention"], "attention branch"), (colors["ssm"], "SSM branch")])
        return _save(figure, path)


def reach_figure(routes: Mapping[str, Sequence[Route]], path: Path | None = None, **options: Any) -> Figure:
    """The reachability picture: a row for each strategy, a column for each number of blocks; the figure in % is the mean."""
    n_blocks = max(len(blocks) for blocks in routes.values())
    with matplotlib.rc_context(style.FONT):
        figure = Figure(figsize=(min(_WIDTH, 1.75 * n_blocks + 1.0), 1.75 * len(routes) + 0.5), dpi=_DPI,
                        layout="constrained")  # fmt: skip
        grid = figure.subplots(len(routes), n_blocks, squeeze=False, sharex=True, sharey=True)
        for line, (cell, blocks) in zip(grid, routes.items(), strict=True):
            for axis, number in zip(line, range(n_blocks), strict=True):
                axis.set_visible(number < len(blocks))
            for axis, seen in zip(line, reach(blocks, **options), strict=False):
                picture = np.where(np.tril(np.ones_like(seen)), np.where(seen, 2, 1), 0)
                axis.imshow(
                    picture, cmap=ListedColormap([_FUTURE, _UNSEEN, _SEEN]), vmin=0, vmax=2, interpolation="nearest"
                )
                axis.text(0.96, 0.94, f"{100 * share_seen(seen).mean():.0f} %", ha="right", va="top",
                          transform=axis.transAxes, fontsize=8)  # fmt: skip
                axis.spines[:].set_linewidth(0.4)
                axis.tick_params(width=0.4, length=2)
            line[0].set_ylabel(f"{style.name(cell)}\nposition")
        for number, axis in enumerate(grid[0], start=1):
            axis.set_title(f"after block {number}", fontsize=8.5)
        for axis in grid[-1]:
            axis.set_xlabel("earlier token")
        _legend(figure, [(_SEEN, "can be seen"), (_UNSEEN, "cannot be seen")])
        return _save(figure, path)


def reach_over_blocks_figure(frame: pd.DataFrame, path: Path | None = None) -> Figure:
    """The mean share of earlier tokens that can be seen over the number of blocks; frame of :func:`reach_table`."""
    with matplotlib.rc_context(style.FONT):
        figure = Figure(figsize=(4.6, 2.6), dpi=_DPI, layout="constrained")
        axis = figure.subplots()
        for cell, part in frame.groupby("cell", sort=False):
            look = style.look(str(cell))
            axis.plot(part.blocks, part["mean"], color=look.color, linestyle=look.linestyle, marker=look.marker,
                      markersize=4, linewidth=1.3, label=look.name)  # fmt: skip
        axis.set_xlabel("Blocks")
        axis.set_ylabel("Earlier tokens seen (%)")
        axis.set_xticks(sorted(frame.blocks.unique()))
        axis.set_ylim(0, 104)
        axis.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside right center", frameon=False, handlelength=3)
        return _save(figure, path)


def context_and_loss_figure(
    routes: Mapping[str, Sequence[Route]],
    losses: Mapping[str, Mapping[str, Any]],
    path: Path | None = None,
    *,
    reference: str = "flowhn_fac",
    **options: Any,
) -> Figure:
    """Over the position: how many earlier tokens can be seen after the last block (top), and the loss above ``reference``'s.

    Args:
        routes: per strategy, the blocks' routes at the length that was trained.
        losses: per strategy what ``flowhn.evaluation.branches.loss_by_position`` measured, all on the same sequences. The band
            is two standard errors of the paired differences, sequences taken as independent.
        reference: the strategy whose loss the others are compared with.
    """
    with matplotlib.rc_context(style.FONT):
        figure = Figure(figsize=(_WIDTH, 4.2), dpi=_DPI, layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True)
        for cell, blocks in routes.items():
            look = style.look(cell)
            line = {"color": look.color, "linestyle": look.linestyle, "linewidth": 1.4}
            seen = reach(blocks, **options)[-1]
            top.plot(np.arange(len(seen)), seen.sum(axis=1) - 1, label=look.name, **line)
            if cell in losses and cell != reference:
                frame = loss_difference(losses[cell], losses[reference])
                middle = (frame.start + frame.stop - 1) / 2
                bottom.plot(middle, frame.difference, **line)
                bottom.fill_between(
                    middle, frame.difference - 2 * frame.stderr, frame.difference + 2 * frame.stderr,
                    color=line["color"], alpha=0.15, linewidth=0,
                )  # fmt: skip
        bottom.axhline(0, color=style.look(reference).color, linestyle=style.look(reference).linestyle, linewidth=1.0)
        top.set_ylabel("Earlier tokens that can be seen")
        bottom.set_ylabel(f"Loss above {style.name(reference)}'s\n(nats per token)")
        bottom.set_xlabel("Position in the sequence (tokens)")
        for axis in (top, bottom):
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xlim(left=0)
        figure.legend(loc="outside right center", frameon=False, handlelength=3)
        return _save(figure, path)


def loss_difference(ours: Mapping[str, Any], reference: Mapping[str, Any]) -> pd.DataFrame:
    """Mean difference of two models' losses by position on the same sequences: start, stop, difference, stderr (paired).

    Raises:
        ValueError: they were not measured on the same number of sequences and stretches.
    """
    first, second = (np.asarray(part["losses"], dtype=float) for part in (ours, reference))
    if first.shape != second.shape or ours["edges"] != reference["edges"]:
        raise ValueError("losses by position can be compared only when both were measured on the same sequences")
    differences = first - second  # (sequences, stretches)
    error = differences.std(axis=0, ddof=1) / len(differences) ** 0.5 if len(differences) > 1 else np.nan
    edges = ours["edges"]
    return pd.DataFrame(
        {"start": edges[:-1], "stop": edges[1:], "difference": differences.mean(axis=0), "stderr": error}
    )


def _legend(figure: Figure, entries: Sequence[tuple[str, str]]) -> None:
    handles = [Patch(facecolor=color, label=label) for color, label in entries]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def _save(figure: Figure, path: Path | None) -> Figure:
    if path is not None:
        figure.savefig(path, dpi=_DPI)
    return figure
