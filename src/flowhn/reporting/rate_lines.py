"""What the README says of learning rates: those tried, those chosen, and which rows of Table 1 have another."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from flowhn.reporting import style
from flowhn.reporting.rates import FAMILIES, family_tried, rate_table, with_table_rows
from flowhn.reporting.record import RunRecord, find_records
from flowhn.reporting.style import long_name

_TIE = 0.01  # nats of validation loss: less than another seed changes


def rate_lines(experiments: Path, setting: str, records: Sequence[RunRecord]) -> list[str]:
    """A paragraph for each budget at which rates were tried, the shortest runs first; none of longer runs than the table's.

    Args:
        experiments: the folder that has ``table1_lr/<size>-<data>-<budget>/records``.
        setting: the table's folder, ``<size>-<data>-<budget>``.
        records: the table's rows.
    """
    stem = setting.rpartition("-")[0] or setting
    folders = sorted({setting, *(path.name for path in (experiments / "table1_lr").glob(f"{stem}-*"))})
    tried = [find_records(experiments / "table1_lr" / folder / "records") for folder in folders]
    tried = [runs for runs in tried if runs and runs[0].tokens <= records[0].tokens]
    return [line for runs in sorted(tried, key=lambda runs: runs[0].tokens) for line in (_paragraph(runs, records), "")]


def _paragraph(tried: Sequence[RunRecord], records: Sequence[RunRecord]) -> str:
    frame = rate_table(with_table_rows(tried, records))
    families = list(frame["family"].unique())
    tokens = int(frame["tokens"].iloc[0])
    at_length = tokens == records[0].tokens
    told = ", ".join(_family(frame[frame["family"] == family], losses=at_length) for family in families)
    other = " of another selection of text" if tried[0].data.get("sha256") != records[0].data.get("sha256") else ""
    line = f"Learning rates, {'the lowest loss' if at_length else 'chosen'} per family at {tokens:,} tokens{other}: {told}."
    line += _heirs(families)
    family_of = {model: family for family, models in FAMILIES.items() for model in models}
    losses = frame.groupby(["family", "lr"])["val_loss"].min()
    chosen = frame[frame["chosen"]].set_index("family")["lr"]
    others, behind = {}, {}  # rows at another rate; those of them that were tried at a better one themselves
    for record in records:
        family = record.cell if record.cell in chosen else family_of.get(record.model)
        rate = record.config.get("lr")
        if family not in chosen or not rate or rate == chosen[family]:
            continue
        others[long_name(record.cell)] = rate
        own, best = losses.get((family, rate)), losses[family, chosen[family]]
        if at_length and family_tried(record.cell) and own is not None and own > best + _TIE:
            behind[long_name(record.cell)] = rate
    if others:
        told = ", ".join(f"{name} at {rate:g}" for name, rate in others.items())
        line += f" Of the table's rows, at another rate than the one {'best' if at_length else 'chosen'} here: {told}."
    return line + (f" **Higher in loss than need be, by its rate: {', '.join(behind)}.**" if behind else "")


def _heirs(families: Sequence[str]) -> str:
    """Which models of these families were not tried themselves, and whose rate they have."""
    told = []
    for family in families:
        first, *others = FAMILIES[family]
        if family == "flowhn":
            first, others = "flowhn_fac", [f"flowhn_{split}" for split in ("no", "ae", "fa")]
        names = [long_name(model) for model in others if model not in families]
        if names:
            told.append(f"{style.listed(names)} {'have' if len(names) > 1 else 'has'} {style.name(first)}'s")
    return f" Rates of models that were not tried themselves: {'; '.join(told)}." if told else ""


def _family(tried: pd.DataFrame, *, losses: bool) -> str:
    """The chosen rate of a family, and what a reader must know of it: the edge of what was tried, a tie, or all losses (nats)."""
    chosen = tried[tried["chosen"]]
    if not len(chosen):
        return f"{tried['family'].iloc[0]} none"
    row = chosen.iloc[0]
    ties = tried[~tried["chosen"] & (tried["val_loss"] < row["val_loss"] + _TIE)]
    if losses:
        remarks = ["validation losses " + ", ".join(f"{one.lr:g}: {one.val_loss:.3f}" for one in tried.itertuples())]
    else:
        remarks = [f"of {', '.join(f'{rate:g}' for rate in sorted(tried['lr'].unique()))}"]
    remarks += ["the highest tried"] if row["lr"] == tried["lr"].max() else []
    remarks += ["the lowest tried"] if row["lr"] == tried["lr"].min() and len(tried) > 1 else []
    remarks += [f"{rate:g} is within {_TIE:g} nats" for rate in ties["lr"]]
    return f"{row['family']} {row['lr']:g} ({'; '.join(remarks)})"
