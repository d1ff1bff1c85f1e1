"""Accuracy over length from the results of ``eval=long_context``: one table, one figure.

A folder ``evals`` holds one JSON file per model as ``flowhn-eval RUN eval=long_context`` writes it, with ``cell``,
``seed``, ``size`` and ``seq_len`` (the length that was trained at) beside the tasks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from flowhn.errors import UserError
from flowhn.reporting import style
from flowhn.reporting.tables import write_table

TITLE = "Long context: accuracy over length, trained at a fraction of it"
FOLDER_NAME = "evals"
KINDS = {"niah": "needle in a haystack", "recall": "associative recall"}
METRICS = {"exact_match": "exact match", "acc": "chosen among four"}
_CHANCE = {"exact_match": 0.0, "acc": 25.0}
_APART = 0.09  # of a doubling of the length: how far models stand from each other at one length
_COLUMNS = (
    "cell",
    "seed",
    "kind",
    "length",
    "questions",
    "exact_match",
    "exact_match_stderr",
    "acc",
    "acc_stderr",
    "trained",
)


def read_results(folder: Path) -> pd.DataFrame:
    """A row per model, task and length; accuracies and standard errors in per cent.

    Raises:
        UserError: a file that is no such result, or none at all.
    """
    rows: list[dict[str, Any]] = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            about = {"cell": content["cell"], "seed": content["seed"], "trained": content["seq_len"]}
            for task, result in content["tasks"].items():
                kind = task.split("_")[0]
                shares = {key: _percent(result.get(key)) for key in _COLUMNS if key.startswith(("exact_match", "acc"))}
                rows.append({**about, "kind": kind, "length": result["length"], "questions": result["n"], **shares})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not a result of eval=long_context ({error!r}); remove it") from error
    if not rows:
        raise UserError(
            f"{folder} has no results of eval=long_context; make some with flowhn-eval RUN eval=long_context"
        )
    frame = pd.DataFrame(rows, columns=list(_COLUMNS))
    order = {cell: place for place, cell in enumerate(style.in_order(frame["cell"]))}
    return (
        frame.assign(_o=frame["cell"].map(order))
        .sort_values(["kind", "_o", "seed", "length"])
        .drop(columns="_o")
        .reset_index(drop=True)
    )


def answer(frame: pd.DataFrame) -> str:
    """What the results say in a sentence or two: exact matches of all questions, and each model's choices beside chance."""
    matched = int((frame["exact_match"] * frame["questions"] / 100).round().sum())
    asked = int(frame["questions"].sum())
    number = f"{matched:,}" if matched else "no"
    exact = f"{number} exact match{'es' if matched > 1 else ''} in {asked:,} questions"
    right = (frame["acc"] * frame["questions"] / 100).round().groupby(frame["cell"]).sum()
    of = frame.groupby("cell")["questions"].sum()
    guessed = of * _CHANCE["acc"] / 100
    error = (guessed * (1 - _CHANCE["acc"] / 100)) ** 0.5  # standard, of the number that is right
    models = ", ".join(
        f"{style.long_name(cell)} {right[cell]:.0f}{f' of {of[cell]:,}' if of.nunique() > 1 else ''}"
        for cell in right.sort_values(ascending=False, kind="stable").index
    )
    told = f"{exact}; chosen right among four: {models}"
    if of.nunique() == 1:
        told += f", of {of.iloc[0]:,} each (guessing: {guessed.iloc[0]:.0f} ± {error.iloc[0]:.1f})"
    above = style.in_order(right.index[right > guessed + 2 * error])
    names = f": {', '.join(map(style.long_name, above))}" if above else ""
    return f"{told}: {'' if above else 'none is '}above guessing by two standard errors{names}."


def _percent(value: Any) -> float:
    return float("nan") if value is None else 100 * float(value)


def long_context_figure(frame: pd.DataFrame, path: Path | None = None) -> Figure:
    """Accuracy over length: a column per task, exact match above, choice among four (chance dotted) below."""
    kinds = [kind for kind in KINDS if kind in set(frame["kind"])]
    lengths = sorted(frame["length"].unique())
    with matplotlib.rc_context(style.FONT):
        figure = Figure(figsize=(7.0, 4.6), dpi=200, layout="constrained")
        axes = figure.subplots(len(METRICS), len(kinds), sharex=True, sharey="row", squeeze=False)
        for row, metric in enumerate(METRICS):
            for column, kind in enumerate(kinds):
                _panel(axes[row][column], frame[frame["kind"] == kind], metric, lengths)
                if row == 0:
                    axes[row][column].set_title(KINDS[kind], loc="left", fontsize=8.5)
            axes[row][0].set_ylabel(f"{METRICS[metric]} (%)")
        for axis in axes[-1]:
            axis.set_xlabel("Context (tokens)")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        if path is not None:
            figure.savefig(path, dpi=200)
    return figure


def _panel(axes: Any, frame: pd.DataFrame, metric: str, lengths: Sequence[int]) -> None:
    cells = frame["cell"].unique()
    for number, (cell, rows) in enumerate(frame.groupby("cell", sort=False)):
        look = style.look(str(cell))
        means = rows.groupby("length")[metric].mean()
        errors = rows.groupby("length")[f"{metric}_stderr"].mean()
        # Side by side, or the error bars of one length would lie on each other.
        places = [length * 2 ** (_APART * (number - (len(cells) - 1) / 2)) for length in means.index]
        axes.errorbar(
            places, means.to_numpy(), yerr=errors.to_numpy(), color=look.color, marker=look.marker, linestyle=look.linestyle,
            markersize=4, linewidth=1.2, elinewidth=0.6, capsize=1.5, label=style.long_name(str(cell)),
        )  # fmt: skip
    for trained in frame["trained"].unique():
        axes.axvline(trained, color="#777777", linewidth=0.8, linestyle=(0, (2, 2)), zorder=0)
        axes.annotate(
            "trained at",
            (trained, 1),
            xycoords=("data", "axes fraction"),
            xytext=(2, -8),
            textcoords="offset points",
            fontsize=6.5,
        )
    if not frame[metric].any():
        axes.text(0.5, 0.5, "0 % everywhere", transform=axes.transAxes, ha="center", fontsize=7.5, color="#555555")
    if _CHANCE[metric]:
        axes.axhline(_CHANCE[metric], color="#777777", linewidth=0.8, linestyle=":", zorder=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / 1024:g}k" if value >= 1024 else f"{value:g}")
    )
    axes.set_ylim(0, max(5.0, axes.get_ylim()[1]))
    axes.spines[["top", "right"]].set_visible(False)


def write_long_context(evals: Path, folder: Path) -> list[Path]:
    """Write ``table.md``, ``table.csv`` and ``long_context.png`` into ``folder`` from the results in ``evals``."""
    frame = read_results(evals)
    shown = [
        {
            "model": style.long_name(row["cell"]),
            "task": KINDS.get(row["kind"], row["kind"]),
            "context": f"{row['length']:,}",
            "questions": row["questions"],
            **{name: f"{row[key]:.1f} ± {row[f'{key}_stderr']:.1f}" for key, name in METRICS.items()},
        }
        for row in frame.to_dict("records")
    ]
    trained = ", ".join(f"{length:,}" for length in sorted(frame["trained"].unique()))
    notes = (
        f"Trained at {trained} tokens. In per cent, ± one standard error. Exact match: greedy decoding gives the value; "
        "choice: the likeliest of four values that stand in the context (guessing: 25 %).",
        f"All lengths and tasks: {answer(frame)}",
    )
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "long_context.png"
    long_context_figure(frame, picture)
    return [*write_table(pd.DataFrame(shown), folder, title=TITLE, notes=notes, full=frame), picture]
