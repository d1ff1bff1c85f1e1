"""Why the verdicts are what they are, in sentences made from records: losses at equal time and FLOPs, depth, reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from flowhn.reporting.cells import Cell, pool
from flowhn.reporting.record import RunRecord
from flowhn.reporting.style import CELLS, listed, long_name, name

OURS = "flowhn_fac"
OTHERS = tuple(cell for cell in CELLS if cell != OURS)
AXES: dict[str, Callable[[Cell], float | None]] = {  # what a token costs on an axis
    "time": lambda cell: 1 / cell.tps if cell.tps else None,
    "FLOPs": lambda cell: cell.first.throughput["flops_per_token"],
}


def at_equal_cost(cells: Mapping[str, Cell], *, of: str = OURS, to: Sequence[str] = OTHERS) -> pd.DataFrame:
    """Validation losses of other models where one model's training ends, on the axes of time and FLOPs.

    Args:
        cells: pooled records of one size (:func:`flowhn.reporting.cells.pool`).
        of: the model whose end counts; time is tokens over the measured speed, as in the figures.
        to: models whose curves are read there, linearly between two validations.

    Returns:
        A row per axis and model: ``axis, cell, end`` (seconds or FLOPs of ``of``), ``own`` (its loss there), ``loss`` (nats; NaN
        where the other's curve does not reach there), ``ends`` (whether the other's training has ended by then).
    """
    rows = []
    for axis, cost in AXES.items():
        per_token = cost(cells[of]) if of in cells else None
        curve = cells[of].curve() if of in cells else []
        if not per_token or not curve:
            continue
        end, own = per_token * curve[-1][0], curve[-1][1]
        for other in to:
            price = cost(cells[other]) if other in cells else None
            points = cells[other].curve() if other in cells else []
            if not price or not points:
                continue
            xs, losses = [price * point[0] for point in points], [point[1] for point in points]
            # A model that has ended keeps the loss it has; before its first validation nothing is known.
            loss = float(np.interp(end, xs, losses)) if end >= xs[0] else np.nan
            rows.append({"axis": axis, "cell": other, "end": end, "own": own, "loss": loss, "ends": end >= xs[-1]})
    return pd.DataFrame(rows, columns=["axis", "cell", "end", "own", "loss", "ends"])


def equal_cost_lines(records: Sequence[RunRecord], size: str, *, of: str = OURS) -> list[str]:
    """Whether FAC_Split, or a variant of it, is ahead of the other models at equal time and at equal FLOPs, one sentence each."""
    frame = at_equal_cost(pool(records, size), of=of, to=[cell for cell in CELLS if cell != of]).dropna(subset="loss")
    ours = name(of) if of in CELLS else f"`{of}`"
    told = []
    for axis, part in frame.groupby("axis", sort=False):
        end, own = part["end"].iloc[0], part["own"].iloc[0]
        where = f"{end:.1f} s at its measured speed" if axis == "time" else f"{end:.3g} FLOPs".replace("e+", "e")
        losses = ", ".join(
            f"{name(row.cell)} {row.loss:.3f}{' (ended)' if row.ends else ''}" for row in part.itertuples()
        )
        worse = [name(cell) for cell in part.loc[part["loss"] > own, "cell"]]
        ahead = (
            "ahead of all of them"
            if len(worse) == len(part)
            else f"ahead of {listed(worse) if worse else 'none of them'}"
        )
        if worse and len(worse) < len(part):
            ahead += " alone" if len(worse) == 1 else " only"
        told.append(
            f"At the end of {ours}'s training ({where}; loss {own:.3f}): {losses}; at equal {axis} {ours} is {ahead}."
        )
    if told:
        told.append(
            "The others are read in the middle of their schedules, before their learning rates have decayed, which favours "
            f"{ours}."
        )
    return [" ".join(told), ""] if told else []


def depth_lines(records: Sequence[RunRecord], size: str, seen: pd.DataFrame | None, *, depths: str = "") -> list[str]:
    """How deep the models of one size are, and what a token of FlowHN can have seen after all blocks.

    Args:
        records: of one size.
        size: that size.
        seen: rows of :func:`flowhn.reporting.routing.reach_table` of the splits on record, after their last block.
        depths: what the ablation of depth found, a sentence.
    """
    cells = pool(records, size)
    layers = {cell: _layers(pooled.first) for cell, pooled in cells.items()}
    ours, rest = layers.get(OURS), {cell: n for cell, n in layers.items() if n and not cell.startswith("flowhn_")}
    if not ours or not rest:
        return []
    others = ", ".join(f"{long_name(cell)} {n}" for cell, n in rest.items())
    sentence = (
        f"Depth at equal parameters: FlowHN has {ours} blocks ({2 * ours} mixers, two side by side in a block), the others have "
        f"layers one after another: {others}."
    )
    if seen is not None and len(seen):
        reach = ", ".join(f"{name(row.cell)} {row.mean:.0f} %" for row in seen.itertuples())
        sentence += (
            f" After {ours} blocks a token can have seen, of the tokens before it and on average over positions: {reach}; in "
            "every other model all of them in the first layer."
        )
    if depths:
        sentence += f" Would more blocks help? {depths}"
    return [sentence, ""]


# What FAC_Split lacks and others have, and the variant that has that alone.
_LACKS = {
    "fac_rope": "positions (RoPE)",
    "fac_keys": "the keys of all tokens",
    "fac_conv": "a convolution before the branches part",
}


def lack_lines(gap: pd.DataFrame | None, *, to: str = "flowhn_no", when: str = "") -> list[str]:
    """How much of the gap each thing closes that FAC_Split lacks, from the variants that have it alone.

    Args:
        gap: as :func:`flowhn.reporting.beyond.gap_table` gives it, or None.
        to: the model whose lead is to be made up for.
        when: what the sentence says of the variants' budget.
    """
    column = f"closed_{to}"
    if gap is None or column not in gap:
        return []
    closed = gap.dropna(subset=[column]).set_index("cell")[column]
    told = [f"{words} {100 * closed[cell]:.0f} %" for cell, words in _LACKS.items() if cell in closed]
    return [f"Each alone closes, of FAC_Split's gap to {name(to)}{when}: {', '.join(told)}.", ""] if told else []


def _layers(record: RunRecord) -> int | None:
    model: Mapping[str, Any] = record.config.get("model") or {}
    count = model.get("n_layers")
    return None if count is None else int(count)
