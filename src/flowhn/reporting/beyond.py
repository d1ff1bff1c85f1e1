"""How much of a model's gap in validation loss each variant closes, and what it costs in speed.

closed = (loss(of) - loss(variant)) / (loss(of) - loss(to)): 0 % is the model itself, 100 % the model that it is behind.
Losses are those of the seeds that every row has, so that all rows saw the same batches; a row of more seeds is judged by all
that it shares with the two models of its gap.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from flowhn.errors import UserError
from flowhn.reporting.cells import Cell, average_tasks, pool
from flowhn.reporting.record import RunRecord
from flowhn.reporting.style import long_name

LEAST_SPEED = 0.90  # of the model that the variants start from
GOAL = 0.5  # of the gap


def gap_table(records: Iterable[RunRecord], *, size: str, of: str, to: list[str]) -> pd.DataFrame:
    """A row per cell, lowest loss first.

    Columns: ``cell, seeds`` (shared by all rows), ``lr, val_loss, closed_<name>`` (share of the gap to each model of
    ``to``; NaN where there is no gap), ``tps, speed`` (share of the speed of ``of``), ``average`` (accuracy in per cent),
    ``own_seeds`` (those that this row, ``of`` and :func:`goal_model` have), ``closed`` (share of that gap over them),
    ``own_speed`` (share of the speed over them) and ``reached``: at least half of it at no less than 90 % of the speed.

    Raises:
        UserError: no record of ``of``, no seed that all rows share, or records that cannot be pooled.
    """
    records = [record for record in records if record.size == size and record.status == "done"]
    seeds_of: dict[str, set[int]] = {}
    for record in records:
        seeds_of.setdefault(record.cell, set()).add(record.seed)
    if of not in seeds_of:
        raise UserError(f"there is no record of {of}, from which the gap is counted; run that row first")
    shared = set.intersection(*seeds_of.values())
    if not shared:
        raise UserError("the rows of this table share no seed; run each of them with seeds=[0]")
    cells = pool([record for record in records if record.seed in shared], size)
    base = cells[of]
    tasks = average_tasks(cells.values())
    rows = [_row(cell, base, {name: cells.get(name) for name in to}, tasks) for cell in cells.values()]
    frame = pd.DataFrame(rows).assign(seeds=", ".join(map(str, sorted(shared))))
    goal = goal_model(frame, to)
    own = {cell: _own(records, seeds_of, size, cell=cell, of=of, to=goal) for cell in frame["cell"]}
    frame["own_seeds"] = [", ".join(map(str, sorted(own[cell][0]))) for cell in frame["cell"]]
    frame["closed"] = [own[cell][1] for cell in frame["cell"]]
    frame["own_speed"] = [own[cell][2] for cell in frame["cell"]]
    frame["reached"] = (frame["closed"] >= GOAL) & (frame["own_speed"] >= LEAST_SPEED)
    return frame.sort_values("val_loss", na_position="last").reset_index(drop=True)


def _row(cell: Cell, base: Cell, goals: Mapping[str, Cell | None], tasks: list[str]) -> dict[str, Any]:
    average = cell.average(tasks)
    row: dict[str, Any] = {"cell": cell.cell, "lr": cell.first.config.get("lr"), "val_loss": cell.val_loss}
    for name, goal in goals.items():
        row[f"closed_{name}"] = _closed(cell.val_loss, base.val_loss, goal.val_loss if goal else None)
    row |= {"tps": cell.tps, "speed": cell.tps / base.tps if cell.tps and base.tps else float("nan")}
    return row | {"average": average[0] if average else float("nan")}


def _own(
    records: list[RunRecord], seeds_of: Mapping[str, set[int]], size: str, *, cell: str, of: str, to: str | None
) -> tuple[set[int], float, float]:
    """The seeds that a row shares with the two models of its gap; over them, the share of the gap closed and of the speed."""
    if to is None:
        return set(), float("nan"), float("nan")
    seeds = seeds_of[cell] & seeds_of[of] & seeds_of[to]
    cells = pool([record for record in records if record.seed in seeds and record.cell in (cell, of, to)], size)
    speed = cells[cell].tps / cells[of].tps if cells[cell].tps and cells[of].tps else float("nan")
    return seeds, _closed(cells[cell].val_loss, cells[of].val_loss, cells[to].val_loss), speed


def _closed(loss: float | None, start: float | None, goal: float | None) -> float:
    if loss is None or start is None or goal is None or start <= goal:
        return float("nan")
    return (start - loss) / (start - goal)


def goal_model(frame: pd.DataFrame, to: list[str]) -> str | None:
    """The first of ``to`` that is ahead, to which half of the gap is to be closed; None where none is."""
    return next((name for name in to if frame[f"closed_{name}"].notna().any()), None)


def is_reference(cell: str, *, of: str, to: list[str]) -> bool:
    """The row the gap is counted from, one to reach, or a variant of one to reach: there to compare with, not to be judged."""
    return cell == of or any(cell == name or cell.startswith(f"{name}_") for name in to)


def readable_gap(frame: pd.DataFrame, *, of: str, to: list[str]) -> pd.DataFrame:
    """:func:`gap_table` as a reader wants it."""

    def percent(value: float, digits: int = 0) -> str:
        # + 0.0: a share that rounds to nothing has no sign.
        return "–" if pd.isna(value) else f"{round(100 * value, digits) + 0.0:.{digits}f} %"

    def number(value: Any, form: str) -> str:
        return "–" if value is None or pd.isna(value) else format(value, form)

    goal = goal_model(frame, to)
    more = goal is not None and (frame["own_seeds"] != frame["seeds"]).any()
    judged = f"half the gap{f' to {long_name(goal)}' if goal else ''} at 90 % of the speed"
    rows = []
    for row in frame.to_dict("records"):
        name = long_name(row["cell"])
        # The id too where it is another word: it is what models= takes.
        own_name = name if name == row["cell"] or row["cell"] == of or row["cell"] in to else f"{name} ({row['cell']})"
        shown = {"row": own_name, "learning rate": number(row["lr"], "g")}
        shown |= {"val loss": number(row["val_loss"], ".3f")}
        shown |= {f"gap to {long_name(name)} closed": percent(row[f"closed_{name}"]) for name in to}
        # One decimal: the verdict beside it is of the exact share, and 89.9 % is not 90 %.
        if more:
            told = f"{percent(row['closed'])} at {percent(row['own_speed'], 1)} ({row['own_seeds']})"
            shown |= {f"to {long_name(goal)}, of all its seeds": told if row["own_seeds"] != row["seeds"] else ""}
        shown |= {"TPS": number(row["tps"], ",.0f"), f"speed beside {long_name(of)}": percent(row["speed"], 1)}
        shown |= {"average accuracy": number(row["average"], ".2f")}
        verdict = "–" if goal is None else "yes" if row["reached"] else "no"
        rows.append(shown | {judged: "" if is_reference(row["cell"], of=of, to=to) else verdict})
    return pd.DataFrame(rows)
