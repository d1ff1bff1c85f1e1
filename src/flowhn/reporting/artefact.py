"""The folder of an artefact: its tables and figures, written from its records in one go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from flowhn.errors import UserError
from flowhn.reporting import figures as draw
from flowhn.reporting.beyond import gap_table, readable_gap
from flowhn.reporting.gap_figure import gap_figure
from flowhn.reporting.overlap import overlap_notes
from flowhn.reporting.rates import rate_table, with_table_rows
from flowhn.reporting.record import RunRecord, write_record
from flowhn.reporting.speeds import DaySpread
from flowhn.reporting.style import long_name
from flowhn.reporting.tables import DASH, table1, write_table
from flowhn.reporting.verdicts import INTERVAL, verdicts

# Name in configs/artefacts/*.yaml: how to draw it, and whether the records have what it takes.
_FIGURES: dict[str, tuple[Callable[..., Any], Callable[[Sequence[RunRecord]], bool]]] = {
    "figure4": (draw.figure4, draw.has_throughput),
    "loss": (draw.loss_figure, draw.has_losses),
    "loss_vs_time": (draw.loss_vs_time_figure, draw.has_losses),
    "loss_vs_flops": (draw.loss_vs_flops_figure, draw.has_flops),
}


def write_artefact(
    records: Sequence[RunRecord],
    folder: Path,
    *,
    title: str,
    figures: Sequence[str] = (),
    expected: Sequence[str] | None = None,
    notes: Sequence[str] = (),
    tables: Sequence[str] = ("verdicts",),
    gap: Mapping[str, Any] | None = None,
    days: Mapping[str, DaySpread] | None = None,
    beside: Sequence[RunRecord] = (),
) -> list[Path]:
    """Write ``table`` and ``tables`` as .md and .csv, ``<figure>.png`` each and ``records/``; returns the paths.

    An ``overlap.json`` in the folder (:mod:`flowhn.reporting.overlap`) is told in the table's notes.

    Args:
        records: records of one size.
        figures: names from ``figure4, loss, loss_vs_time, loss_vs_flops``. One for which the records have no numbers (a
            run too short to time, no validation) is left out and named in the table's notes; an older picture of that
            name is removed, so that no picture contradicts the table.
        expected: cells that must have a row even without a record; None takes the paper's ten.
        tables: beside the first: ``verdicts`` on the paper's claims, ``rates`` (learning rates tried), ``gap`` (what
            variants close, with ``gap.png``).
        gap: ``{of, to}`` of the last, see :func:`flowhn.reporting.beyond.gap_table`.
        days: how far speeds differ between days, for the verdicts (:func:`flowhn.reporting.speeds.day_spreads`).
        beside: rows of Table 1, each a rate tried more where it is of the same text and tokens.

    Raises:
        UserError: no records, several sizes, an unknown figure, or records that cannot be pooled.
    """
    sizes = sorted({record.size for record in records})
    if len(sizes) != 1:
        raise UserError(
            f"a table needs records of one size, these have {', '.join(sizes) or 'none'}; choose one with size="
        )
    unknown = [name for name in figures if name not in _FIGURES]
    if unknown:
        raise UserError(f"figures={unknown[0]} is not known; choose from {', '.join(_FIGURES)}")
    frame = table1(records, size=sizes[0], expected=expected)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written, notes = [], [*notes, *overlap_notes(folder)]
    for name in figures:
        function, can = _FIGURES[name]
        path = folder / f"{name}.png"
        if can(records):
            options = {"expected": expected} if name == "figure4" else {}
            function(records, path, size=sizes[0], **options)
            written.append(path)
        else:
            path.unlink(missing_ok=True)
            notes.append(f"{name}.png is not drawn: no record has the numbers for it.")
    written += write_table(frame, folder, title=title, notes=notes)
    written += keep_records(records, folder / "records")
    for name in tables:
        options = {"gap": {"gap": gap, "size": sizes[0]}, "verdicts": {"days": days}, "rates": {"table": beside}}.get(
            name, {}
        )
        written += _TABLES[name](records, folder, title, **options)
    return written


def _write_verdicts(
    records: Sequence[RunRecord], folder: Path, title: str, *, days: Mapping[str, DaySpread] | None
) -> tuple[Path, Path]:
    judged = verdicts(records, days=days)
    heading = f"{title}: the paper's claims"
    return write_table(_readable(judged), folder, title=heading, notes=_VERDICT_NOTES, name="verdicts", full=judged)


def _write_rates(
    records: Sequence[RunRecord], folder: Path, title: str, *, table: Sequence[RunRecord]
) -> tuple[Path, Path]:
    tried = rate_table(with_table_rows(records, table)).rename(columns={"chosen": "lowest"})
    return write_table(tried, folder, title=f"{title}: the losses", notes=_RATE_NOTES, name="rates")


def _write_gap(
    records: Sequence[RunRecord], folder: Path, title: str, *, gap: Mapping[str, Any], size: str
) -> tuple[Path, Path]:
    frame = gap_table(records, size=size, of=gap["of"], to=list(gap["to"]))
    shown = readable_gap(frame, of=gap["of"], to=list(gap["to"]))
    (folder / "gap.png").unlink(missing_ok=True)  # an older picture must not contradict the table
    gap_figure(frame, folder / "gap.png", of=gap["of"], to=list(gap["to"]))
    return write_table(shown, folder, title=title, notes=_GAP_NOTES, name="gap", full=frame)


_TABLES: dict[str, Callable[..., tuple[Path, Path]]] = {
    "verdicts": _write_verdicts,
    "rates": _write_rates,
    "gap": _write_gap,
}
_RATE_NOTES = (
    "Lowest: the rate with the lowest final validation loss at this budget; at another it need not be the best. What the runs "
    "of Table 1 take stands in configs/artefacts/table1.yaml.",
)
_GAP_NOTES = (
    "Closed: share of the difference in validation loss between the starting row and the row to reach. 100 %: as good "
    "as that row; below 0 %: worse than the starting row. Losses are of the seeds that all rows share; a row of more seeds "
    "is judged by all that it shares with the two rows of its gap.",
)


def keep_records(records: Sequence[RunRecord], folder: Path) -> list[Path]:
    """Put a copy of each record beside the table made from them, and nothing else: the folder is the table's source."""
    paths = {folder / f"{record.cell}-s{record.seed}.json": record for record in records}
    for old in folder.glob("*.json") if folder.is_dir() else ():
        if old not in paths:
            old.unlink()
    for path, record in paths.items():
        write_record(path, record)
    return list(paths)


_VERDICT_NOTES = (
    "Computed from the records. Accuracy: difference of the averages in points with its 95 % interval. TPS and MFU: "
    "ratio with the spread that was measured, from the slowest of one over the fastest of the other to the reverse.",
    "partly: the direction is as claimed, the factor is not reached. Paper: the same figure from the paper's printed "
    "numbers.",
    "Without BoolQ: the same over the other tasks. A model that has learnt nothing scores 38 to 62 % on BoolQ, by whether "
    "it likes no or yes, and that alone can decide the average: where the verdict does not stand without it, the claim is "
    "undecided (BoolQ alone); where it stands over the others, but not without one of them too, undecided (BoolQ and that).",
    "The best of all: the intervals are wider (see the last column), because the model to beat was picked by the same answers.",
    "Intervals cover the choice of questions, not what another training seed would change.",
)


def _readable(judged: pd.DataFrame) -> pd.DataFrame:
    """The columns of a verdict that a reader wants, as text."""

    def figure(row: dict[str, Any], column: str) -> str:
        value = row[column]
        if pd.isna(value):
            return DASH
        return f"{value:+.2f}" if row["quantity"] == "average" else f"{value:.2f}x"

    rows = []
    for row in judged.to_dict("records"):
        tested = row["verdict"] != "not testable"
        rows.append(
            {
                "claim": row["sentence"],
                "against": DASH if pd.isna(row["second"]) else long_name(row["second"]),
                "ours": figure(row, "difference"),
                INTERVAL: f"{figure(row, 'low')} to {figure(row, 'high')}" if tested else DASH,
                "paper": figure(row, "printed"),
                "without BoolQ": DASH
                if pd.isna(row["rest"])
                else f"{row['rest']:+.2f} ({row['rest_low']:+.2f} to {row['rest_high']:+.2f})",
                "verdict": row["verdict"],
                "holds": row["holds"],
                "how": row["method"],
            }
        )
    return pd.DataFrame(rows)
