"""Records, table and figure of ``./reproduce.sh branches``: both branches of FlowHN's blocks before the fusion.

A record is the measurement of one trained run (``flowhn.evaluation.branches``): ``cell, size, seed, run_id`` and the run's own
``training`` (commit, device, tokens, loss), ``loss, blocks, loss_by_position``, and where it was measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flowhn.errors import UserError
from flowhn.reporting import style
from flowhn.reporting.sealed import read_sealed, write_sealed
from flowhn.reporting.tables import write_table

SCHEMA = "flowhn-branches-1"
FOLDER_NAME = "measurements"
BRANCHES = ("attention", "ssm")
_DPI = 200
_NAMES = {"attention": "attention", "ssm": "SSM"}
_MARKERS = {"attention": "o", "ssm": "^"}
_NOTES = (
    "RMS over all numbers of the batch. update: what a branch adds to its input. gradient: of the loss at the branch's output, "
    "before the fusion. A branch is measured on its own tokens.",
    "cosine and CKA compare the two updates of one token. A split never makes both: there both branches were run on all "
    "tokens of the block's input, for this measurement alone.",
    "One seed, one batch: differences of a few per cent mean nothing.",
)


def write_measurement(folder: Path, content: Mapping[str, Any]) -> Path:
    """Write one record into ``folder`` and return its path."""
    path = Path(folder) / f"{content['cell']}-s{content['seed']}.json"
    write_sealed(path, content, schema=SCHEMA)
    return path


def read_measurement(path: Path) -> dict[str, Any]:
    """Read and check a record; raises UserError as :func:`~flowhn.reporting.sealed.read_sealed`."""
    return read_sealed(path, schema=SCHEMA)


def find_measurements(folder: Path) -> list[dict[str, Any]]:
    """All records of a folder, the cells in the paper's order."""
    found = [read_measurement(path) for path in sorted(Path(folder).glob("*.json"))]
    order = style.in_order(record["cell"] for record in found)
    return sorted(found, key=lambda record: (order.index(record["cell"]), record["seed"]))


def branches_table(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row for each model and block: per branch ``<branch>_tokens, _input_rms, _output_rms, _update_rms, _gradient_rms,
    _parameter_gradient_norm``, and ``gradient_ratio`` (attention's over SSM's), ``cosine_update, cka_update, cosine_output,
    cka_output``."""
    rows = []
    for record in records:
        for block in record["blocks"]:
            row: dict[str, Any] = {
                "cell": record["cell"], "model": style.long_name(record["cell"]), "seed": record["seed"],
                "block": block["block"] + 1,
            }  # fmt: skip
            for branch in BRANCHES:
                part = block[branch]
                row |= {f"{branch}_{key}": part[key] for key in ("tokens", "input_rms", "output_rms", "update_rms")}
                row[f"{branch}_gradient_rms"] = part["output_gradient_rms"]
                row[f"{branch}_parameter_gradient_norm"] = part["parameter_gradient_norm"]
            attn, ssm = (row[f"{branch}_gradient_rms"] for branch in BRANCHES)
            row["gradient_ratio"] = attn / ssm if attn and ssm else None
            row |= {f"{kind}_{what}": block["similarity"][f"{kind}_{what}"]
                    for what in ("update", "output") for kind in ("cosine", "cka")}  # fmt: skip
            rows.append(row)
    return pd.DataFrame(rows)


def branches_figure(records: Sequence[Mapping[str, Any]], path: Path | None = None) -> Figure:
    """Size of the branches' updates, gradients at their outputs, and how alike they are; a place for each model and block."""
    if not records:
        raise UserError("there is no measurement of branches to draw; run ./reproduce.sh branches")
    frame = branches_table(records)
    with matplotlib.rc_context(style.FONT):
        figure = Figure(figsize=(7.0, 5.2), dpi=_DPI, layout="constrained")
        size, gradient, alike = figure.subplots(3, 1, sharex=True)
        places = np.arange(len(frame)) + frame.groupby(["cell", "seed"], sort=False).ngroup().to_numpy() * 0.8
        for axis, column, label in (
            (size, "update_rms", "Update (RMS)"),
            (gradient, "gradient_rms", "Gradient at output (RMS)"),
        ):
            _pairs(axis, places, frame, column)
            axis.set_ylabel(label)
        alike.plot(places, frame.cosine_update, "s", color="#009E73", markersize=4.5, label="cosine")
        alike.plot(places, frame.cka_update, "D", color="#CC79A7", markersize=4.5, label="CKA")
        alike.axhline(0, color="#999999", linewidth=0.6)
        alike.set_ylim(min(-0.1, frame.cosine_update.min() - 0.05), 1.02)
        alike.set_ylabel("Similarity of updates")
        alike.set_xticks(places, [str(block) for block in frame.block])
        for cell, part in frame.assign(place=places).groupby("cell", sort=False):
            alike.text(part.place.mean(), -0.2, style.name(str(cell)), ha="center", va="top",
                       transform=alike.get_xaxis_transform())  # fmt: skip
        alike.text(-0.01, -0.055, "Block", ha="right", va="top", transform=alike.transAxes)
        alike.set_xlabel(" ")  # room for the models' names
        for axis in (size, gradient, alike):
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(axis="x", length=0)
        handles = [*size.get_legend_handles_labels()[0][:2], *alike.get_legend_handles_labels()[0]]
        figure.legend(handles=handles, loc="outside upper center", ncols=4, frameon=False)
        if path is not None:
            figure.savefig(path, dpi=_DPI)
    return figure


def _pairs(axis: Axes, places: np.ndarray, frame: pd.DataFrame, column: str) -> None:
    """Both branches' values at each place, joined by a line."""
    attn, ssm = (frame[f"{branch}_{column}"].astype(float) for branch in BRANCHES)
    axis.vlines(places, np.fmin(attn, ssm), np.fmax(attn, ssm), color="#BBBBBB", linewidth=1.2, zorder=1)
    for branch, values in (("attention", attn), ("ssm", ssm)):
        axis.plot(places, values, _MARKERS[branch], color=style.BRANCH_COLORS[branch], markersize=5,
                  label=f"{_NAMES[branch]} branch")  # fmt: skip
    axis.set_yscale("log")


def write_branches(records: Sequence[Mapping[str, Any]], folder: Path, *, title: str) -> list[Path]:
    """``table.md``, ``table.csv`` and ``branches.png`` in ``folder``; returns what was written.

    Raises:
        UserError: no records.
    """
    if not records:
        raise UserError("there is no measurement of branches to write; run ./reproduce.sh branches")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    frame = branches_table(records)
    first = records[0]
    where = (
        f"Size {first['size']}, {first['training']['tokens']:,} training tokens, measured on {first['rows']} validation rows of "
        f"{first['seq_len']} tokens, {first['device']['name']}, commit {(first['git']['commit'] or 'unknown')[:7]}."
    )
    written = [*write_table(readable(frame), folder, title=title, notes=[where, *_NOTES], full=frame)]
    branches_figure(records, folder / "branches.png")
    return [*written, folder / "branches.png"]


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """The columns that a reader wants of :func:`branches_table`, as text."""

    def text(values: pd.Series, form: str) -> list[str]:
        return ["–" if pd.isna(value) else format(value, form) for value in values]

    shown = {"model": frame.model, "block": frame.block.astype(str)}
    for branch in BRANCHES:
        name = _NAMES[branch]
        shown |= {
            f"{name} tokens": text(frame[f"{branch}_tokens"], ",.0f"),
            f"{name} update RMS": text(frame[f"{branch}_update_rms"], ".3f"),
            f"{name} gradient RMS": text(frame[f"{branch}_gradient_rms"], ".2e"),
        }
    shown |= {
        "gradient attention / SSM": text(frame.gradient_ratio, ".2f"),
        "cosine of updates": text(frame.cosine_update, ".3f"),
        "CKA of updates": text(frame.cka_update, ".3f"),
    }
    return pd.DataFrame(shown)
