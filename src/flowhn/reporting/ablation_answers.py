"""What the ablations answer, in two sentences computed from their tables; and what the numbers cannot say.

The first sentence is about validation loss, the second about tokens/s. A difference in loss is called larger than the seeds'
when it exceeds the wider of the two rows' ranges over seeds; with one seed nothing is said about it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from flowhn.reporting.ablation_tables import one_branch
from flowhn.reporting.style import listed

SPLIT_LIMITS = (
    "A short run on a small text ranks strategies by how fast they learn local statistics; whether late tokens have seen early "
    "ones, which is what FA_Split and AE_Split give up, matters for text with long dependencies and more training."
)
FUSION_LIMITS = (
    "The fusions differ in parameters by their projections (see the table), and a small model at a short budget cannot tell "
    "fusions apart whose losses lie within the range over seeds."
)
RATIO_LIMITS = (
    "The best share depends on the device (speed), on T (attention's cost grows with its square) and on the training budget "
    "(loss); the FLOP-balanced point depends on shape and T alone."
)
SSM_LIMITS = (
    "Speed here is that of the plain PyTorch scans on a CPU, or of the kernels that the records name on a GPU: the order of the "
    "two branches can change with the device."
)
BALANCE_LIMITS = (
    "A measured cut belongs to one device, shape and software version: the branches here run one after the other, so balance "
    "pays only through their cost, not through overlap."
)
DEPTH_LIMITS = (
    "Embedding and head shrink with the width, so thin models have more of their parameters in blocks; one learning rate was "
    "used for all depths."
)


def split_answer(frame: pd.DataFrame) -> str:
    """Which strategy learns best, and what the split gains in speed over No_Split."""
    loss = _ranked(frame)
    known = frame.dropna(subset=["tps"])
    full, rest = known[known.split == "no"], known[known.split != "no"]
    if full.empty or rest.empty:
        return f"{loss} {_NO_SPEED}"
    fastest = rest.loc[rest.tps.idxmax()]
    return (
        f"{loss} The fastest is {fastest.label} with {fastest.tps:,.0f} tokens/s, {fastest.tps / full.tps.iloc[0]:.2f} times "
        f"No_Split's {full.tps.iloc[0]:,.0f}."
    )


def fusion_answer(frame: pd.DataFrame) -> str:
    """The best fusion with No_Split and with a split, beside the published one."""
    trained = frame[frame.coincides.isna()].dropna(subset=["val_loss"])
    parts = []
    for split, part in trained.groupby("split_name", sort=False):
        published = part[(part.fusion == "concat_proj") & ~part.coordinated]
        best = part.loc[part.val_loss.idxmin()].to_dict()
        if published.empty:
            continue
        told = f"with {split}, {best['label']} has the lowest validation loss ({best['val_loss']:.3f})"
        if best["cell"] != published.cell.iloc[0]:
            told += f", {_apart(best, published.iloc[0].to_dict())} below the published concat_proj"
        else:
            told += ", the published fusion"
        parts.append(told)
    if not parts:
        return _NO_LOSS
    first = "; ".join(parts)
    same = sorted(frame.fusion[frame.coincides.notna()].unique())
    coincide = f"In split modes {listed(same)} compute what sum does" if same else "No fusions coincide here"
    speeds = trained.dropna(subset=["tps"])
    spread = [100 * (part.tps.max() / part.tps.min() - 1) for _, part in speeds.groupby("split")]
    tail = f", and the choice of fusion changes tokens/s by at most {max(spread):.0f} %" if spread else ""
    return f"{first[0].upper()}{first[1:]}. {coincide}{tail}."


def ratio_answer(frame: pd.DataFrame) -> str:
    """Where loss and speed are best over attention's share, and what the two balanced cuts reach of that."""
    known = frame.dropna(subset=["val_loss"])
    if known.empty:
        return _NO_LOSS
    best = known.loc[known.val_loss.idxmin()]
    first = f"Validation loss is lowest at a share of {best.attention_share:.2f} ({best.val_loss:.3f})"
    fast = frame.dropna(subset=["tps"])
    second = []
    for chosen in ("FLOP-balanced", "time-balanced"):
        for row in known[known.chosen == chosen].itertuples():
            first += f"; the {chosen} cut gives {row.attention_share:.2f} and {row.val_loss:.3f}"
        for row in fast[fast.chosen == chosen].itertuples():
            second.append(f"the {chosen} cut reaches {100 * row.tps / fast.tps.max():.0f} % of that")
    if fast.empty:
        return f"{first}. {_NO_SPEED}"
    top = fast.loc[fast.tps.idxmax()]
    told = f"Training is fastest at a share of {top.attention_share:.2f} ({top.tps:,.0f} tokens/s)"
    return f"{first}. {'; '.join([told, *second])}."


def ssm_answer(frame: pd.DataFrame) -> str:
    """Mamba-2 against Mamba-1 in the SSM branch, split by split."""
    losses, speeds = [], []
    for name, one, two in _pairs(frame, "ssm", "mamba1", "mamba2"):
        if pd.notna(one["val_loss"]) and pd.notna(two["val_loss"]):
            losses.append(f"{two['val_loss'] - one['val_loss']:+.3f} with {name}")
        if pd.notna(one["tps"]) and pd.notna(two["tps"]):
            speeds.append(f"{two['tps'] / one['tps']:.2f} with {name}")
    first = f"A Mamba-2 branch changes the validation loss by {listed(losses)}." if losses else _NO_LOSS
    return (
        f"{first} {f'Its tokens/s, in multiples of the Mamba-1 branch, are {listed(speeds)}.' if speeds else _NO_SPEED}"
    )


def balance_answer(frame: pd.DataFrame) -> str:
    """What cutting by measured time changes against cutting by FLOPs, for each split."""
    losses, speeds = [], []
    for name, flops, time in _pairs(frame, "balance", "flops", "time"):
        if pd.notna(flops["val_loss"]) and pd.notna(time["val_loss"]):
            shares = f"from {flops['attention_share']:.2f} to {time['attention_share']:.2f}"
            losses.append(f"{shares} with {name} (validation loss {time['val_loss'] - flops['val_loss']:+.3f})")
        if pd.notna(flops["tps"]) and pd.notna(time["tps"]):
            speeds.append(f"{time['tps'] / flops['tps']:.2f} with {name}")
    first = (
        f"Cutting by measured time instead of FLOPs moves attention's share {listed(losses)}." if losses else _NO_LOSS
    )
    second = f"In multiples of the FLOP-balanced cut, tokens/s are {listed(speeds)}." if speeds else _NO_SPEED
    return " ".join(filter(None, (first, second, one_branch(frame))))


def _pairs(
    frame: pd.DataFrame, column: str, first: str, second: str
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Of each split that has both: its name, and its rows whose ``column`` is ``first`` and ``second``."""
    for _, part in frame.groupby("split", sort=False):
        by = part.set_index(column)
        if {first, second} <= set(by.index):
            one = by.loc[first].to_dict()
            yield str(one["label"]).partition(",")[0], one, by.loc[second].to_dict()


def depth_answer(frame: pd.DataFrame) -> str:
    """Which depth learns best, and what depth costs in speed."""
    fast = frame.dropna(subset=["tps"])
    first = _ranked(frame)
    if len(fast) < 2:
        return f"{first} {_NO_SPEED}"
    few, many = fast.loc[fast.n_layers.idxmin()], fast.loc[fast.n_layers.idxmax()]
    return (
        f"{first} From {few.n_layers} to {many.n_layers} blocks at equal parameters, tokens/s go from {few.tps:,.0f} to "
        f"{many.tps:,.0f} ({many.tps / few.tps:.2f} times)."
    )


_NO_LOSS = "These runs are too short for a validation loss."
_NO_SPEED = "They are too short to time."


def _ranked(frame: pd.DataFrame) -> str:
    """Best row by loss, and its lead over the second and the last."""
    known = frame.dropna(subset=["val_loss"]).sort_values("val_loss")
    if known.empty:
        return _NO_LOSS
    rows = known.to_dict("records")
    best = rows[0]
    places = [place for place in dict.fromkeys((1, len(rows) - 1)) if 0 < place < len(rows)]
    names = ("the second, ", "the last, ") if len(places) == 2 else ("",)
    leads = [
        f"{_apart(best, rows[place])} below {name}{rows[place]['label']}"
        for place, name in zip(places, names, strict=False)
    ]
    told = f"Validation loss is lowest with {best['label']} ({best['val_loss']:.3f} nats per token)"
    return f"{told}: {listed(leads)}." if leads else f"{told}."


def _apart(low: Mapping[str, Any], high: Mapping[str, Any]) -> str:
    """How far two losses are apart, and whether that is more than seeds are."""
    difference = high["val_loss"] - low["val_loss"]
    ranges = [2 * row["val_loss_spread"] for row in (low, high) if pd.notna(row["val_loss_spread"])]
    if not ranges:
        return f"{difference:.3f} (one seed)"
    return f"{difference:.3f} ({'more' if difference > max(ranges) else 'not more'} than seeds differ)"
