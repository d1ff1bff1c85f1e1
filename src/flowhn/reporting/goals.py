"""What the project set out to reach in speed, beside what a folder of benchmark records shows.

Goals on one H200 are for the cases ``figure4``, ``peers`` and ``length``, those on a CPU for ``cpu_peers``; records of other
cases or devices have none. Of several runs of a cell the median counts (see :func:`flowhn.reporting.bench.counted`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import pandas as pd

from flowhn.reporting.bench import counted, label

BASELINES = ("llama", "mamba1", "mamba2", "jamba", "shm", "hymba")
# On one H200 at 1,024 tokens, by cell and size: tokens/s.
GOALS_H200 = {
    ("flowhn_fac", "135m"): 1_050_000, ("flowhn_fac", "350m"): 350_000, ("flowhn_fac", "1b"): 135_000,
    ("flowhn_fac_mamba2", "135m"): 1_050_000, ("flowhn_fac_mamba2", "350m"): 375_000, ("flowhn_fac_mamba2", "1b"): 155_000,
}  # fmt: skip
GOAL_SHARE = {"135m": 0.53, "350m": 0.52, "1b": 0.69}
GOAL_LEAD = {"135m": 1.15, "350m": 1.25, "1b": 1.5}
BETTER_BRANCH = ("1b",)  # where the lead is that of the better branch; elsewhere of the paper's, Mamba-1
GOAL_PEERS = {"llama": 1.25, "mamba1": 1.3, "mamba2": 1.5}
GOAL_CPU = dict.fromkeys(("llama", "mamba1", "mamba2", "jamba"), 1.0)  # not slower than transformers
# The published code's FAC_Split (mode D, fp32, eager) at its fastest batch (16; 4) on one H200, 2026-11: tokens/s and our goal.
PUBLISHED_H200 = {"135m": (96_200, 10.9), "1b": (11_700, 11.0)}
GOAL_LENGTH = (8192, 85.0)  # at that length, % of FAC's tokens/s at 1,024
_FAC = ("flowhn_fac", "flowhn_fac_mamba2")


@dataclass(frozen=True)
class Goal:
    """One goal: ``each`` is what each run reached (by repeat number), ``reached`` their median or the ratio of medians.

    ``cells`` are ours that it is about. ``lacking`` names what was not measured yet and could still take it away.
    """

    what: str
    size: str
    goal: float
    reached: float
    unit: str
    each: tuple[float, ...]
    cells: tuple[str, ...]
    lacking: tuple[str, ...] = field(default=())

    @property
    def met(self) -> str:
        """``yes``, ``no``, or ``open`` where what is lacking may still make it a no."""
        if self.reached < self.goal:
            return "no"
        return "open" if self.lacking else "yes"


Runs = Mapping[int, Mapping[str, Any]]  # repeat number -> record


class _Measured:
    """The records that count, by cell, size and length."""

    def __init__(self, records: Sequence[Mapping[str, Any]], protocol: str) -> None:
        self.records = [record for record in records if record["protocol"] == protocol]

    def members(self, cell: str, size: str, seq_len: int) -> list[Mapping[str, Any]]:
        wanted = (cell, size, seq_len)
        return [record for record in self.records if (record["cell"], record["size"], record["seq_len"]) == wanted]

    def runs(self, cell: str, size: str, seq_len: int = 1024) -> Runs:
        """Empty where nothing was timed."""
        return {record.get("repeat", 0): record for record in counted(self.members(cell, size, seq_len))}

    def pair(self, cell: str, size: str, seq_len: int) -> tuple[Runs, Runs] | None:
        """Ours and transformers' at the same batch, where both were timed at one."""
        ours, theirs = (self.members(name, size, seq_len) for name in (cell, f"peer_{cell}"))
        batches = {r["batch"] for r in ours if r["status"] == "done"} & {
            r["batch"] for r in theirs if r["status"] == "done"
        }
        pairs = []
        for batch in batches:
            both = [counted([r for r in own if r["batch"] == batch]) for own in (ours, theirs)]
            pairs.append(tuple({r.get("repeat", 0): r for r in own} for own in both))
        return max(pairs, key=lambda pair: _tps(pair[0]), default=None)

    def does_not_fit(self, cell: str, size: str) -> bool:
        """Whether not even one sequence fitted: such a model has no speed to be measured."""
        return any(
            record["status"] == "out of memory" and _least_batch(record) == 1
            for record in self.members(cell, size, 1024)
        )


def _least_batch(record: Mapping[str, Any]) -> int:
    return record["batch"] if isinstance(record["batch"], int) else record["first_batch"]


def _tps(runs: Runs) -> float:
    return median(record["tps"] for record in runs.values())


def _each(value: Callable[..., float], *runs: Runs) -> tuple[float, ...]:
    """The value for each repeat that all of ``runs`` have."""
    shared = sorted(set.intersection(*(set(own) for own in runs)))
    return tuple(value(*(own[number] for own in runs)) for number in shared)


def _ratio(first: Mapping[str, Any], second: Mapping[str, Any]) -> float:
    return first["tps"] / second["tps"]


def find_goals(records: Sequence[Mapping[str, Any]]) -> list[Goal]:
    """The goals that the records have something to say about; none for a case or a device without goals."""
    done = [record for record in records if record["status"] == "done"]
    if not done:
        return []
    case = done[0].get("case", "figure4")
    if case == "cpu_peers":
        own = [record for record in records if record["device"].get("type") in ("cpu", None)]
        return list(_cpu(own))
    if case in _CASES_H200 and all("H200" in str(record["device"]["name"]) for record in done):
        measured = _Measured(records, "optimised")
        wanted = _CASES_H200[case]
        return [goal for part in wanted for goal in part(measured)]
    return []


def _speeds(measured: _Measured) -> Iterator[Goal]:
    for (cell, size), goal in GOALS_H200.items():
        if runs := measured.runs(cell, size):
            yield Goal(label(cell), size, goal, _tps(runs), "tokens/s", _each(lambda r: r["tps"], runs), (cell,))


def _leads(measured: _Measured) -> Iterator[Goal]:
    """The share of the matrix-product rate, the lead over the baselines and over the published code, size by size."""
    for size, share in GOAL_SHARE.items():
        ours = {cell: runs for cell in _FAC if (runs := measured.runs(cell, size))}
        if not ours:
            continue
        shares = {cell: _each(lambda r: 100 * r["share_of_matmul"], runs) for cell, runs in ours.items()}
        best = max(shares, key=lambda cell: median(shares[cell]))
        what = "FAC, better branch, of the measured matrix-product rate"
        yield Goal(what, size, 100 * share, median(shares[best]), "%", shares[best], (best,))
        yield from _over_baselines(measured, size, ours)
        if size in PUBLISHED_H200 and "flowhn_fac" in ours:
            theirs, goal = PUBLISHED_H200[size]
            what = f"FAC over the published code at its best batch ({theirs:,} tokens/s, not in this run)"
            runs = ours["flowhn_fac"]
            each = _each(lambda r, theirs=theirs: r["tps"] / theirs, runs)
            yield Goal(what, size, goal, _tps(runs) / theirs, "x", each, ("flowhn_fac",))


def _over_baselines(measured: _Measured, size: str, ours: Mapping[str, Runs]) -> Iterator[Goal]:
    either = size in BETTER_BRANCH
    mine = {cell: runs for cell, runs in ours.items() if either or cell == "flowhn_fac"}
    rivals = {cell: runs for cell in BASELINES if (runs := measured.runs(cell, size))}
    if not mine or not rivals:
        return
    cell = max(mine, key=lambda name: _tps(mine[name]))
    rival = max(rivals, key=lambda name: _tps(rivals[name]))
    lacking = tuple(name for name in BASELINES if name not in rivals and not measured.does_not_fit(name, size))
    unfit = [name for name in BASELINES if name not in rivals and name not in lacking]
    told = f"{label(rival)}; {len(rivals)} of {len(BASELINES)} timed" + (f", {len(unfit)} did not fit" if unfit else "")
    what = f"FAC{', better branch,' if either else ''} over the fastest of the baselines ({told})"
    reached = _tps(mine[cell]) / _tps(rivals[rival])
    each = _each(_ratio, mine[cell], rivals[rival])
    yield Goal(what, size, GOAL_LEAD[size], reached, "x", each, (cell, rival), lacking)


def _peers(measured: _Measured) -> Iterator[Goal]:
    yield from _beside_peers(measured, GOAL_PEERS, "135m", 1024, "transformers', ")


def _cpu(records: Sequence[Mapping[str, Any]]) -> Iterator[Goal]:
    shapes = sorted({(record["protocol"], record["size"], record["seq_len"]) for record in records})
    for protocol, size, seq_len in shapes:
        yield from _beside_peers(
            _Measured(records, protocol), GOAL_CPU, size, seq_len, f"transformers' on the CPU, T {seq_len}, "
        )


def _beside_peers(
    measured: _Measured, wanted: Mapping[str, float], size: str, seq_len: int, where: str
) -> Iterator[Goal]:
    for cell, goal in wanted.items():
        pair = measured.pair(cell, size, seq_len)
        if pair is None:
            continue
        batch = next(iter(pair[0].values()))["batch"]
        what = f"{label(cell)} over {where}batch {batch}"
        yield Goal(what, size, goal, _tps(pair[0]) / _tps(pair[1]), "x", _each(_ratio, *pair), (cell, f"peer_{cell}"))


def _lengths(measured: _Measured) -> Iterator[Goal]:
    """What FAC keeps of its rate at a long sequence; nothing where one of the two lengths was not measured."""
    length, goal = GOAL_LENGTH
    for size in dict.fromkeys(record["size"] for record in measured.records):
        long, short = (measured.runs("flowhn_fac", size, n) for n in (length, 1024))
        if long and short:
            each = _each(lambda a, b: 100 * _ratio(a, b), long, short)
            what = f"FAC at {length:,} tokens, of its rate at 1,024"
            yield Goal(what, size, goal, 100 * _tps(long) / _tps(short), "%", each, ("flowhn_fac",))


# Others time variants, and peers and length have batches of their own.
_CASES_H200: dict[str, tuple[Callable[[_Measured], Iterator[Goal]], ...]] = {
    "figure4": (_speeds, _leads, _peers, _lengths),
    "peers": (_peers,),
    "length": (_lengths,),
}


def goals(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Goal beside reached: columns what, size, goal, reached, unit, each (one number for each run), spread (half the range
    of ``each`` over the median, %; NaN for one run), met (``yes``, ``no``, ``open``). Empty where there is no goal."""
    rows = []
    for goal in find_goals(records):
        spread = (max(goal.each) - min(goal.each)) / 2 / median(goal.each) if len(goal.each) > 1 else float("nan")
        rows.append(
            {
                "what": goal.what, "size": goal.size, "goal": goal.goal, "reached": goal.reached, "unit": goal.unit,
                "each": list(goal.each), "spread": 100 * spread, "met": goal.met,
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def readable_goals(frame: pd.DataFrame) -> pd.DataFrame:
    """:func:`goals` as text; of a goal with one run the column of runs is blank, and left out where all are."""
    shown = frame.assign(
        goal=[_short(value) for value in frame.goal],
        reached=[_short(value) for value in frame.reached],
        each=["; ".join(map(_short, each)) if len(each) > 1 else "" for each in frame.each],
        spread=["" if pd.isna(value) else f"{value:.1f}" for value in frame.spread],
    )
    if not (shown.each != "").any():
        shown = shown.drop(columns=["each", "spread"])
    return shown.rename(columns={"each": "each run", "spread": "± %"})


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
