"""Learning rates chosen from the records of ``table1_lr``: for each family the rate with the lowest final validation loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from flowhn.errors import UserError
from flowhn.reporting.record import RunRecord

# Names of configs/model; the first of a family is the one that is tried. FlowHN is tried with FAC_Split, whose rate AE_Split and
# FA_Split inherit, and No_Split too where it was not tried itself: under a name of its own, ``flowhn_no``.
FAMILIES = {
    "flowhn": ("flowhn",),
    "flowhn_no": ("flowhn_no",),
    "hybrid": ("shm", "jamba", "hymba"),
    "mamba": ("mamba2", "mamba1"),
    "llama": ("llama",),
}
# Row of Table 1 -> what its rates are called in configs/artefacts/table1_lr.yaml, before the number.
_TABLE_ROWS = {"flowhn_fac": "flowhn", "flowhn_no": "flowhn_no", "shm": "hybrid", "mamba2": "mamba", "llama": "llama"}


def rate_table(records: Iterable[RunRecord]) -> pd.DataFrame:
    """A row per family and rate: ``family, model, lr, tokens, val_loss, chosen``; a rate that diverged has no loss.

    Raises:
        UserError: the records of a family differ in tokens or size.
    """
    family_of = {models[0]: family for family, models in FAMILIES.items()}
    rows = []
    for record in records:
        is_no = record.model == "flowhn" and record.config.get("choices", {}).get("split") == "no"
        model = "flowhn_no" if is_no else record.model
        if model in family_of:
            rows.append(
                {
                    "family": family_of[model],
                    "model": model,
                    "size": record.size,
                    "lr": float(record.config["lr"]),
                    "tokens": record.tokens,
                    "val_loss": record.losses["final_val"],
                }
            )
    frame = pd.DataFrame(rows, columns=["family", "model", "size", "lr", "tokens", "val_loss"])
    frame["val_loss"] = pd.to_numeric(frame["val_loss"])
    for family, group in frame.groupby("family"):
        if group["tokens"].nunique() > 1 or group["size"].nunique() > 1:
            raise UserError(
                f"the learning rates of {family} were tried at different sizes or tokens; use records of one set"
            )
    best = frame.dropna(subset="val_loss").groupby("family")["val_loss"].idxmin()
    frame["chosen"] = frame.index.isin(best)
    order = list(FAMILIES)
    key = frame["family"].map(order.index) if len(frame) else frame["family"]
    return frame.assign(_order=key).sort_values(["_order", "lr"]).drop(columns="_order").reset_index(drop=True)


def family_tried(cell: str) -> str | None:
    """What the rates tried with this row of Table 1 are called before the number; None where none were."""
    return _TABLE_ROWS.get(cell)


def with_table_rows(tried: Sequence[RunRecord], table: Iterable[RunRecord]) -> list[RunRecord]:
    """The runs that tried rates, and the rows of Table 1 that tried one more: the same model, size, seed, text and tokens."""

    def kind(record: RunRecord) -> tuple[Any, ...]:
        own = _TABLE_ROWS.get(record.cell, record.cell.rpartition("_")[0])
        return own, record.size, record.seed, record.tokens, record.data.get("sha256")

    rates: dict[tuple[Any, ...], set[float]] = {}
    for record in tried:
        rates.setdefault(kind(record), set()).add(record.config["lr"])
    rows = [row for row in table if row.cell in _TABLE_ROWS and kind(row) in rates]
    return [*tried, *(row for row in rows if row.config["lr"] not in rates[kind(row)])]


def chosen_rates(records: Iterable[RunRecord]) -> dict[str, float]:
    """Model name (of ``configs/model``, or ``flowhn_no``) -> its family's learning rate, for the families that have a record."""
    frame = rate_table(records)
    chosen = frame[frame["chosen"]].set_index("family")["lr"]
    return {model: float(chosen[family]) for family in chosen.index for model in FAMILIES[family]}
