"""The Markdown of tables: how numbers, gaps and slips in print are written, and what is said around Table 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pandas as pd
from tabulate import tabulate

from flowhn.reporting import paper
from flowhn.reporting.style import size_name, task_name

DASH = "–"
SLIP = "†"
READ_OFF = "≈"
_PROPER = ("TPS", "MFU")


def table1_markdown(frame: pd.DataFrame) -> list[str]:
    """The lines of a frame of :func:`flowhn.reporting.tables.table1` with its remarks: speed, accuracy, what compares."""
    attrs = frame.attrs
    beside = f"paper {size_name(attrs['paper_size'])}"
    parts = []
    if attrs["size"] != attrs["paper_size"]:
        parts += [
            f"The paper has no size {attrs['size']}: the columns '{beside}' are its numbers at "
            f"{size_name(attrs['paper_size'])}, for reference only.",
            "",
        ]
    yes, no = ([s["columns"] for s in attrs["statements"] if s["comparable"] is wanted] for wanted in (True, False))
    parts += [
        f"**Comparable with the paper:** {_list(yes)}. **Not comparable:** {_list(no)}. Reasons: below the tables.",
        "",
        *(f"**Caution:** {warning}\n" for warning in attrs["warnings"]),
    ]
    parts += ["**Size, loss and speed**", "", _speed(frame, beside), ""]
    if attrs["tasks"]:
        errors = "Accuracy in %, zero-shot, ± one standard error."
        if (frame["seeds"] > 1).any():
            errors += (
                " Rows of several seeds show their mean; its error is that of one seed (the questions are the same)."
            )
        if attrs["chances"]:
            told = ", ".join(
                f"{task_name(t)} {100 * attrs['chances'][t]:.3g}" for t in attrs["tasks"] if t in attrs["chances"]
            )
            errors += f" Guessing gives: {told}." if told else ""
        for task, metric in attrs["metrics"].items():
            errors += f" {task_name(task).capitalize()}: lm-eval's {metric}."
        averaged = ", ".join(task_name(task) for task in attrs["average_tasks"])
        parts += ["**Accuracy**", "", _accuracies(frame, beside), "", f"{errors} Average: mean of {averaged}.", ""]
    parts += ["**Why the columns are comparable with the paper's, or not**", ""]
    parts += [
        *(
            f"- {s['columns']}: {'comparable' if s['comparable'] else 'not comparable'}. {s['reason']}"
            for s in attrs["statements"]
        ),
        "",
    ]
    if attrs["missing"]:
        parts += [f"missing: {'; '.join(attrs['missing'])}", ""]
    if attrs["slips"]:
        parts += [
            f"Slips in the printed table, shown as printed ({SLIP}):",
            "",
            *(f"- {line}" for line in attrs["slips"]),
            "",
        ]
    if set(attrs["read_off_chart"]) & set(frame["cell"]):
        parts += [f"{READ_OFF}: not in the printed table; read off the paper's figure 4, about 2 % either way.", ""]
    return parts


def _speed(frame: pd.DataFrame, beside: str) -> str:
    head = [
        "model",
        "parameters",
        "tokens",
        "val loss",
        "perplexity",
        "TPS",
        f"TPS, {beside}",
        "MFU %",
        f"MFU %, {beside}",
    ]
    if (frame["seeds"] > 1).any():
        head.insert(1, "seeds")
    rows = []
    for row in frame.to_dict("records"):
        mark = READ_OFF if row["cell"] in frame.attrs["read_off_chart"] else ""
        cells = [
            row["model"],
            _number(row["parameters"], lambda n: f"{n / 1e6:,.2f}M"),
            _number(row["tokens"], lambda n: f"{n:,.0f}"),
            _number(row["val_loss"], lambda n: f"{n:.3f}"),
            _number(row["perplexity"], lambda n: f"{n:,.1f}" if n < 1e6 else f"{n:.1e}"),
            _number(row["tps"], lambda n: f"{n:,.0f}"),
            _number(row["paper_tps"], lambda n, m=mark: f"{m}{n:,.0f}"),
            _number(row["mfu"], lambda n: f"{n:.1f}"),
            _number(row["paper_mfu"], lambda n, m=mark: f"{m}{n:.1f}" if m else f"{n:.2f}"),
        ]
        if "seeds" in head:
            cells.insert(1, str(row["seeds"]))
        rows.append(cells)
    return pipe_table(head, rows)


def _accuracies(frame: pd.DataFrame, beside: str) -> str:
    slips = {tuple(pair) for pair in frame.attrs["slip_cells"]}
    columns = [*frame.attrs["tasks"], "average"]
    head = ["model"]
    for column in columns:
        head.append("average" if column == "average" else task_name(column))
        if column == "average" and not set(paper.TASKS) <= set(columns):
            head.append(f"average of the paper's six, {beside}")
        elif f"paper_{column}" in frame.columns:
            head.append(beside)
    rows = []
    for row in frame.to_dict("records"):
        cells = [row["model"]]
        for column in columns:
            error = row[f"{column}_stderr"]
            tail = "" if pd.isna(error) else f" ± {error:.1f}"
            cells.append(_number(row[column], lambda n, t=tail: f"{n:.1f}{t}"))
            if f"paper_{column}" in row:
                mark = SLIP if (row["cell"], f"paper_{column}") in slips else ""
                cells.append(_number(row[f"paper_{column}"], lambda n, m=mark: f"{n:.2f}{m}"))
        rows.append(cells)
    return pipe_table(head, rows)


def _number(value: Any, form: Callable[[float], str]) -> str:
    return DASH if value is None or pd.isna(value) else form(value)


def _list(names: Sequence[str]) -> str:
    return (
        ", ".join(name if index == 0 or name in _PROPER else name.lower() for index, name in enumerate(names))
        or "nothing"
    )


def pipe_table(head: Iterable[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    head = [_escape(str(item)) for item in head]
    numeric = ["left"] + ["right"] * (len(head) - 1)
    rows = [[_escape(item) for item in row] for row in rows]
    return tabulate(rows, headers=head, tablefmt="pipe", disable_numparse=True, colalign=numeric if rows else None)


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
