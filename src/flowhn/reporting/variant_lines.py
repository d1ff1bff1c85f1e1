"""What the README says of variants beyond the paper: which close half of FAC_Split's gap, and where the fastest one stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from flowhn.reporting.beyond import LEAST_SPEED, gap_table, goal_model, is_reference
from flowhn.reporting.reasons import OURS, equal_cost_lines
from flowhn.reporting.record import RunRecord, find_records
from flowhn.reporting.speeds import DaySpread
from flowhn.reporting.style import long_name


def gap_of(experiments: Path, setting: str, size: str, gap: Mapping[str, Any]) -> pd.DataFrame | None:
    """The variants' table, or None where there are no variants or the model that they start from is not there."""
    records = find_records(experiments / "beyond" / setting / "records")
    own = {gap["of"], *gap["to"]}
    if not any(record.cell not in own for record in records) or not any(record.cell == gap["of"] for record in records):
        return None
    return gap_table(records, size=size, of=gap["of"], to=list(gap["to"]))


def budget_words(records: Sequence[RunRecord]) -> str:
    """``, at 30,015,488 tokens (FAC_Split's learning rate 0.0005)``: what runs that are not the table's say of themselves."""
    if not records:
        return ""
    rates = sorted({record.config["lr"] for record in records if record.cell == OURS and record.config.get("lr")})
    told = f" (FAC_Split's learning rate {', '.join(f'{rate:g}' for rate in rates)})" if rates else ""
    return f", at {records[0].tokens:,} tokens{told}"


def beyond_lines(
    frame: pd.DataFrame | None, setting: str, gap: Mapping[str, Any], *, when: str = "", days: DaySpread | None = None
) -> list[str]:
    """Which variants close half of the gap at 90 % of the speed or more; of none, how far the best comes.

    Args:
        frame: as :func:`gap_of` gives it.
        setting: the folder below ``experiments/beyond``, for the link.
        gap: ``{of, to}`` of the table.
        when: what the sentence says of the variants' budget (:func:`budget_words`).
        days: by how much repeats of a speed differ: a variant nearer to the bar is marked.
    """
    if frame is None:
        return []
    tried = _judged(frame, gap)
    link = f"[experiments/beyond/{setting}](experiments/beyond/{setting}/gap.md) has all of them."
    intro = f"Beyond the paper{when}: of {len(tried)} variant{'s' * (len(tried) != 1)} of FAC_Split"
    goal = goal_model(frame, list(gap["to"]))
    reached = tried[tried["reached"]]
    if len(reached):
        # Those of most seeds first, then the fastest.
        reached = reached.assign(_n=reached["own_seeds"].str.count(",")).sort_values(
            ["_n", "own_speed"], ascending=False
        )
        names = ", ".join(_reached(row, days) for row in reached.to_dict("records"))
        verb = "closes" if len(reached) == 1 else "close"
        return [
            f"{intro}, {len(reached)} {verb} half of the gap to {long_name(goal)} or more at 90 % of FAC_Split's speed or more: "
            f"{names}. {link}",
            "",
        ]
    fast = tried[tried["speed"] >= LEAST_SPEED]
    if not len(fast):
        return [f"{intro} none keeps 90 % of its speed. {link}", ""]
    best = fast.iloc[0]
    if goal is None:
        closed = "closes nothing, for no model is ahead,"
    else:
        closed = f"closes {100 * best[f'closed_{goal}']:.0f} % of the gap to {long_name(goal)}"
        if best["own_seeds"] != best["seeds"]:
            closed += f" in seed {best['seeds']} and {100 * best['closed']:.0f} % over seeds {best['own_seeds']},"
    return [
        f"{intro}, `{best['cell']}` has the lowest loss at 90 % of the speed or more: it {closed} at {100 * best['speed']:.0f} % "
        f"of FAC_Split's speed. **None closes half of the gap at 90 % of the speed"
        f"{' at this length and rate' if when else ''}.** {link}",
        "",
    ]


def fastest_lines(
    frame: pd.DataFrame | None, experiments: Path, setting: str, table: Sequence[RunRecord], gap: Mapping[str, Any]
) -> list[str]:
    """Where the fastest variant that reaches the goal stands among the table's models at equal time and FLOPs.

    Args:
        frame: as :func:`gap_of` gives it for ``setting``, the folder of the table as well.
        table: the table's records.
    """
    if frame is None:
        return []
    tried = _judged(frame, gap)
    reached = tried[tried["reached"]]
    if reached.empty:
        return []
    fastest = reached.loc[reached["own_speed"].idxmax(), "cell"]
    own = [record for record in find_records(experiments / "beyond" / setting / "records") if record.cell == fastest]
    return equal_cost_lines([*table, *own], table[0].size, of=fastest)


def _judged(frame: pd.DataFrame, gap: Mapping[str, Any]) -> pd.DataFrame:
    """The rows that are judged, without those that are there to compare with."""
    return frame[[not is_reference(cell, of=gap["of"], to=list(gap["to"])) for cell in frame["cell"]]]


def _reached(row: Mapping[str, Any], days: DaySpread | None) -> str:
    """What a variant closes, at what speed, over which seeds, and whether its speed is above the bar by no more than noise."""
    seeds = f"seed{'s' if ',' in row['own_seeds'] else ''} {row['own_seeds']}"
    told = f"{100 * row['closed']:.0f} % at {100 * row['own_speed']:.1f} %, {seeds}"
    if days is not None and row["own_speed"] < LEAST_SPEED * (1 + days.share):
        told += f", above 90 % by less than the {100 * days.share:.1f} % by which repeats of a speed differ"
    return f"`{row['cell']}` ({told})"
