"""Tables of the ablations that train models: one row for each variant, seeds pooled, from the records of one folder.

What a variant is (split, fusion, branch, depth) is read from the record's configuration, never from its file's name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from flowhn.errors import UserError
from flowhn.reporting.cells import Cell, pool
from flowhn.reporting.record import RunRecord, find_records
from flowhn.reporting.style import name as cell_name
from flowhn.reporting.tables import DASH

SPLITS = ("no", "ae", "fa", "fac")
FUSIONS = ("concat_proj", "sum", "mean", "norm_mean", "gated", "cross", "none")
SSM_NAMES = {"mamba1": "Mamba-1", "mamba2": "Mamba-2"}
COINCIDE = {"mean": "sum", "none": "sum"}  # in split modes a token has one branch output (flowhn.models.fusions)
_HEADS: dict[str, tuple[str, str]] = {
    "label": ("variant", "{}"),
    "variant": ("variant", "{}"),
    "parameters": ("parameters", "{:,.0f}"),
    "attention_share": ("attention's share of tokens", "{:.3f}"),
    "n_layers": ("blocks", "{:.0f}"),
    "d_model": ("d_model", "{:.0f}"),
    "d_ff": ("d_ff", "{:.0f}"),
    "val_loss": ("validation loss (nats/token)", "{:.3f}"),
    "val_loss_spread": ("± seeds", "{:.3f}"),
    "tps": ("tokens/s", "{:,.0f}"),
    "tps_spread": ("± seeds ", "{:,.0f}"),
    "mfu": ("MFU %", "{:.1f}"),
    "accuracy": ("accuracy %", "{:.1f}"),
    "coincides": ("the same as", "{}"),
}


def split_table(folder: Path) -> pd.DataFrame:
    """``ablation_split``: No, AE, FA and FAC_Split, FAC with a window, FAC whose attention sees all earlier keys.

    Columns of every table here: ``cell, label, split, fusion, ssm, seeds, parameters, tokens, attention_share`` (of the
    tokens, in one block; 1 where both branches see all), ``n_layers, d_model, d_ff, val_loss, val_loss_spread`` (half the
    range over seeds), ``tps, tps_spread, mfu`` (%), ``accuracy`` (%, mean of tasks). ``attrs``: ``size, seq_len, device,
    entropy`` and the rest of what :func:`scale` says.

    Raises:
        UserError: no records, several sizes, or two runs that claim one row.
    """
    return _table(folder, order=lambda row: (_place(SPLITS, row["split"]), row["label"]))


def fusion_table(folder: Path) -> pd.DataFrame:
    """``ablation_fusion``: adds ``coordinated`` and ``coincides``, the fusion whose numbers a row repeats.

    In split modes ``mean`` and ``none`` compute what ``sum`` does; they are not trained again and get its numbers.
    """

    def place(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return _place(SPLITS, row["split"]), _place(FUSIONS, row["fusion"]), row["coordinated"], row["label"]

    frame = _table(folder, order=place, label=_fusion_label)
    copies = []
    for row in frame[(frame.fusion == "sum") & (frame.split != "no")].to_dict("records"):
        for other, same in COINCIDE.items():
            if not ((frame.fusion == other) & (frame.split == row["split"])).any():
                copies.append(
                    row | {"fusion": other, "label": other, "coincides": same, "cell": f"{row['cell']}={other}"}
                )
    attrs = frame.attrs
    frame = pd.concat([frame, pd.DataFrame(copies)], ignore_index=True) if copies else frame
    if "coincides" not in frame:
        frame["coincides"] = None
    rows = sorted(frame.to_dict("records"), key=place)
    frame = pd.DataFrame(rows, columns=list(frame.columns))
    frame["split_name"] = [_split_name(row["split"]) for row in rows]
    frame["variant"] = frame.split_name + ", " + frame.label
    frame.attrs = attrs | {"shown": ("variant", *_NUMBERS, "coincides")}
    return frame


def ratio_table(folder: Path) -> pd.DataFrame:
    """``ablation_ratio``: adds ``chosen``: ``fixed``, ``FLOP-balanced`` or ``time-balanced``; by rising share."""
    frame = _table(folder, order=lambda row: (row["attention_share"], row["label"]), label=_balance_label)
    frame["chosen"] = ["fixed" if label.startswith("share ") else label for label in frame.label]
    frame.attrs["shown"] = ("label", "attention_share", *_NUMBERS)
    return frame


def ssm_table(folder: Path) -> pd.DataFrame:
    """``ablation_ssm``: each split with a Mamba-1 and with a Mamba-2 branch."""
    frame = _table(
        folder,
        order=lambda row: (_place(SPLITS, row["split"]), row["ssm"]),
        label=lambda record: f"{_split_name(record.config['choices']['split'])}, {_ssm_name(record)}",
    )
    frame.attrs["shown"] = ("label", "attention_share", *_NUMBERS)
    return frame


def balance_table(folder: Path) -> pd.DataFrame:
    """``ablation_balance``: adds ``balance`` (``flops`` or ``time``): what the cut makes equal in both branches."""
    frame = _table(
        folder,
        order=lambda row: (_place(SPLITS, row["split"]), row["label"]),
        label=lambda record: f"{_split_name(record.config['choices']['split'])}, {_balance_label(record)}",
    )
    frame["balance"] = ["time" if "time" in label else "flops" for label in frame.label]
    frame.attrs["shown"] = ("label", "attention_share", *_NUMBERS)
    return frame


def depth_table(folder: Path) -> pd.DataFrame:
    """``ablation_depth``: the same parameters in few wide or many thin blocks; by rising ``n_layers``."""
    frame = _table(
        folder,
        order=lambda row: (row["n_layers"], row["label"]),
        label=lambda record: f"{_layers(record)} blocks of width {record.config['size']['d_model']}",
    )
    frame.attrs["shown"] = ("label", "n_layers", "d_model", "d_ff", *_NUMBERS)
    return frame


_NUMBERS = ("parameters", "val_loss", "val_loss_spread", "tps", "tps_spread", "mfu")


def read_pool(folder: Path) -> dict[str, Cell]:
    """The records of a folder by cell.

    Raises:
        UserError: there are none, or of several sizes.
    """
    records = find_records(Path(folder) / "records")
    sizes = sorted({record.size for record in records})
    if len(sizes) != 1:
        raise UserError(f"{folder}/records must hold records of one size, these have {', '.join(sizes) or 'none'}")
    return pool(records, sizes[0])


def _table(
    folder: Path, *, order: Callable[[Mapping[str, Any]], Any], label: Callable[[RunRecord], str] | None = None
) -> pd.DataFrame:
    cells = read_pool(folder)
    rows = sorted((_row(cell, (label or _split_label)(cell.first)) for cell in cells.values()), key=order)
    frame = pd.DataFrame(rows)
    frame.attrs = _facts(list(cells.values())) | {"shown": ("label", "attention_share", *_NUMBERS)}
    return frame


def _row(cell: Cell, label: str) -> dict[str, Any]:
    record, choices = cell.first, cell.first.config["choices"]
    shares = [share for one in cell.records if (share := attention_share(one)) is not None]
    accuracies = [value[0] for task in cell.tasks if (value := cell.accuracy(task)) is not None]
    fusion = record.config["fusion"]
    return {
        "cell": cell.cell,
        "label": label,
        "split": choices["split"],
        "fusion": choices["fusion"],
        "coordinated": bool(fusion.get("coordinate_gradients")),
        "ssm": choices["ssm"],
        "seeds": len(cell.seeds),
        "parameters": record.parameters,
        "tokens": record.tokens,
        "attention_share": sum(shares) / len(shares) if shares else float("nan"),
        "n_layers": _layers(record),
        "d_model": record.config["size"]["d_model"],
        "d_ff": record.config["size"]["d_ff"]["flowhn"],
        "val_loss": _or_nan(cell.val_loss),
        "val_loss_spread": _spread([one.losses["final_val"] for one in cell.records]),
        "tps": _or_nan(cell.tps),
        "tps_spread": _spread([one.throughput["tps"] for one in cell.records]),
        "mfu": _or_nan(cell.mfu),
        "accuracy": sum(accuracies) / len(accuracies) if accuracies else float("nan"),
    }


def attention_share(record: RunRecord) -> float | None:
    """Share of the tokens that attention sees in one block, from 0 to 1; 1 with No_Split; None where nothing tells it."""
    told = record.throughput.get("attention_share")
    if told is None and record.config["choices"]["split"] == "no":
        return 1.0
    return record.config["split"].get("ratio") if told is None else told


def _layers(record: RunRecord) -> int:
    return record.config["size"]["n_layers"]["flowhn"]


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _spread(values: list[float | None]) -> float:
    """Half the range over seeds; not a number for one seed."""
    known = [value for value in values if value is not None]
    return (max(known) - min(known)) / 2 if len(known) > 1 else float("nan")


def _place(order: tuple[str, ...], word: str) -> tuple[int, str]:
    """Where a name stands: the known ones in order, then one's own by name."""
    return (order.index(word) if word in order else len(order), word)


def _split_name(split: str) -> str:
    return cell_name(f"flowhn_{split}") if split in SPLITS else split


def _split_label(record: RunRecord) -> str:
    split = record.config["split"]
    label = _split_name(record.config["choices"]["split"])
    label += f", window {split['window']}" if split.get("window") else ""
    return label + (", attention to all keys" if split.get("keys") == "all" else "")


def _fusion_label(record: RunRecord) -> str:
    coordinated = record.config["fusion"].get("coordinate_gradients")
    return record.config["choices"]["fusion"] + (", gradients coordinated" if coordinated else "")


def _balance_label(record: RunRecord) -> str:
    split = record.config["split"]
    if split.get("balance") == "time":  # a measured cut stands as its ratio in the record
        return "time-balanced"
    return "FLOP-balanced" if split.get("ratio") is None else f"share {split['ratio']:g}"


def _ssm_name(record: RunRecord) -> str:
    ssm = record.config["choices"]["ssm"]
    return f"{SSM_NAMES.get(ssm, ssm)} branch"


def _facts(cells: list[Cell]) -> dict[str, Any]:
    first = cells[0].first
    devices = sorted({str(r.device["name"] or r.device["type"]) for cell in cells for r in cell.records})
    return {
        "size": first.size,
        "seq_len": first.seq_len,
        "data": first.data.get("name"),
        "device": ", ".join(devices),
        "entropy": first.losses["unigram_entropy"],
        "runs": sum(len(cell.records) for cell in cells),
        "seconds": sum(record.wall_seconds["total"] for cell in cells for record in cell.records),
        "commits": sorted({(r.git["commit"] or "unknown")[:7] for cell in cells for r in cell.records}),
    }


def scale(frame: pd.DataFrame) -> str:
    """What a table was made from, in one sentence: size, tokens, seeds, device."""
    facts = frame.attrs
    seeds = sorted(set(frame.seeds))
    told = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return (
        f"{facts['runs']} runs of size {facts['size']}, {frame.tokens.max():,} tokens of `{facts['data']}` each (T = "
        f"{facts['seq_len']:,}, {told} seed{'' if told == '1' else 's'} a row), {facts['seconds'] / 60:.1f} minutes in all on "
        f"{facts['device']}, commit {', '.join(facts['commits'])}."
    )


def one_branch(frame: pd.DataFrame) -> str:
    """A sentence on the rows whose cut gives one branch all tokens, or an empty text."""
    parts = []
    split = frame[frame.split != "no"]
    for rows, branch in (
        (split[split.attention_share >= 1], "the SSM"),
        (split[split.attention_share <= 0], "attention"),
    ):
        parts += [f"{label}: no token is left for {branch}" for label in rows.label]
    return f"A cut at the edge trains one branch alone ({'; '.join(parts)})." if parts else ""


def notes(frame: pd.DataFrame) -> list[str]:
    """What stands below a written table."""
    if "entropy" not in frame.attrs:
        return list(frame.attrs.get("notes", ()))
    found = [scale(frame), "± seeds: half the range over seeds; a dash for one seed."]
    if frame.attrs["entropy"] is not None:
        found.append(f"Unigram entropy of the text: {frame.attrs['entropy']:.2f} nats per token.")
    if "coincides" in frame and frame["coincides"].notna().any():
        found.append("Rows with an entry under 'the same as' compute the same function; they were trained once.")
    edge = one_branch(frame)
    return [*found, edge] if edge else found


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns that ``attrs["shown"]`` names as text, with units in their heads; empty ones left out."""
    shown = {}
    for column in frame.attrs["shown"]:
        head, style = frame.attrs.get("heads", {}).get(column) or _HEADS[column]
        if column in frame and frame[column].notna().any():
            shown[head] = [DASH if pd.isna(value) else style.format(value) for value in frame[column]]
    return pd.DataFrame(shown)
