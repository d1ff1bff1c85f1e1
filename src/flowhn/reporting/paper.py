"""The paper's printed numbers, as data, and the slips in them, found by code.

Source: Moradi, Ahmed, Wen, Mudur, Zhang, Liu, "Balancing Computation Load and Representation Expressivity in Parallel
Hybrid Neural Networks", arXiv 2505.19472 (26 May 2025). ``paper/table1.csv`` is its table 1 typed as printed, in its
column order, slips included. ``paper/figure4.csv`` holds what its figure 4 shows and table 1 does not print, read off
the chart (about 2 % either way): Llama, Mamba-1 and Mamba-2 at 350M and 1B, and the same three at 135M.
TPS is tokens per second, MFU and accuracies are per cent.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import ROUND_HALF_UP, Decimal
from itertools import permutations
from pathlib import Path

import pandas as pd

from flowhn.reporting.style import CELLS, size_name

TASKS = ("arc_easy", "arc_challenge", "winogrande", "piqa", "hellaswag", "boolq")
SIZES = ("135m", "350m", "1b")
REFERENCE_SIZE = "135m"  # beside sizes that the paper does not have
_FOLDER = Path(__file__).with_name("paper")
_UNITS = {"B": 10**9, "M": 10**6}
_CELL_OF = {
    "Llama": "llama", "Mamba-1": "mamba1", "Mamba-2": "mamba2", "Jamba": "jamba", "SHM": "shm", "Hymba": "hymba",
    "No_Split": "flowhn_no", "AE_Split": "flowhn_ae", "FA_Split": "flowhn_fa", "FAC_Split": "flowhn_fac",
}  # fmt: skip
# An average may differ from the mean of its row by this much through rounding alone (two decimals on each side).
_ROUNDING = 0.0101
# A row whose last four columns lie this many points nearer to the other rows in another order is misprinted, not odd.
_MISORDER = 20.0


def table1() -> pd.DataFrame:
    """Table 1 as printed: size, cell, model, tokens, tps, mfu, the six tasks, average."""
    frame = pd.read_csv(_FOLDER / "table1.csv")
    frame["tokens"] = [int(text[:-1]) * _UNITS[text[-1]] for text in frame["tokens"]]
    return _with_cells(frame)


def figure4() -> pd.DataFrame:
    """Figure 4 complete, three sizes by ten models: size, cell, model, tps, mfu, read_off_chart.

    Where table 1 prints the value, that is taken.
    """
    printed = table1()[["size", "cell", "model", "tps", "mfu"]].assign(read_off_chart=False)
    chart = _with_cells(pd.read_csv(_FOLDER / "figure4.csv")).assign(read_off_chart=True)
    both = pd.concat([printed, chart]).drop_duplicates(["size", "cell"], keep="first")
    order = both.assign(s=both["size"].map(SIZES.index), c=both["cell"].map(CELLS.index)).sort_values(["s", "c"])
    return order.drop(columns=["s", "c"])[["size", "cell", "model", "tps", "mfu", "read_off_chart"]].reset_index(
        drop=True
    )


def slips() -> pd.DataFrame:
    """Slips in the printed table 1, computed from it: size, cell, kind, columns, printed, computed, sentence.

    ``kind`` is ``average`` (the printed average is not the mean of its row), ``column_order`` (the last four accuracies
    fit the other rows only in another order) or ``ranking`` (FAC_Split is not the fastest of its block).
    """
    frame = table1()
    rows = [*_averages(frame), *_column_orders(frame), *_rankings(frame)]
    return pd.DataFrame(rows, columns=["size", "cell", "kind", "columns", "printed", "computed", "sentence"])


def _with_cells(frame: pd.DataFrame) -> pd.DataFrame:
    frame["size"] = frame["size"].str.lower()
    frame.insert(1, "cell", frame["model"].map(_CELL_OF))
    return frame


def _averages(frame: pd.DataFrame) -> list[tuple]:
    found = []
    for row in frame.to_dict("records"):
        # Decimal, so that a mean of 38.345 rounds as a reader with a pencil rounds it.
        mean = sum(Decimal(str(row[task])) for task in TASKS) / len(TASKS)
        if abs(float(mean) - row["average"]) > _ROUNDING:
            printed, computed = f"{row['average']:.2f}", str(mean.quantize(Decimal("0.01"), ROUND_HALF_UP))
            who = f"{size_name(row['size'])} {row['model']}"
            sentence = f"{who}: the printed average {printed} is not the mean of its row, {computed}."
            found.append((row["size"], row["cell"], "average", ("average",), printed, computed, sentence))
    return found


def _distance(values: Sequence[float], typical: pd.Series, order: Sequence[str]) -> float:
    return sum(abs(value - typical[task]) for value, task in zip(values, order, strict=True))


def _column_orders(frame: pd.DataFrame) -> list[tuple]:
    """Rows whose last four values fit another column order, judged by the distance to the medians of the sound rows.

    One order is sought for all such rows of the table: the slip was made once, in a spreadsheet, not row by row.
    """
    columns = TASKS[2:]
    suspects, candidates = [], list(permutations(columns))
    for _, block in frame.groupby("size", sort=False):
        for index, row in block.iterrows():
            typical = block.drop(index)[list(columns)].median()
            values = [row[task] for task in columns]
            best = min(_distance(values, typical, order) for order in candidates)
            if _distance(values, typical, columns) - best > _MISORDER:
                suspects.append(index)
    if not suspects:
        return []
    sound = frame.drop(suspects).groupby("size")[list(columns)].median()
    order = min(
        candidates,
        key=lambda c: sum(
            _distance([frame.at[i, t] for t in columns], sound.loc[frame.at[i, "size"]], c) for i in suspects
        ),
    )
    found = []
    for index in suspects:
        row = frame.loc[index]
        sentence = (
            f"{size_name(row['size'])} {row['model']}: the values printed under {', '.join(columns)} fit the other "
            f"rows only in the order {', '.join(order)} (its average is unaffected)."
        )
        found.append(
            (row["size"], row["cell"], "column_order", columns, ", ".join(columns), ", ".join(order), sentence)
        )
    return found


def _rankings(frame: pd.DataFrame) -> list[tuple]:
    found = []
    for size, block in frame.groupby("size", sort=False):
        top = block.loc[block["tps"].idxmax()]
        fac = block.loc[block["cell"] == "flowhn_fac"].iloc[0]
        if top["cell"] != "flowhn_fac":
            sentence = (
                f"{size_name(size)}: {top['model']} has the highest printed TPS of its block ({top['tps']}), "
                f"not FAC_Split ({fac['tps']})."
            )
            found.append((size, "flowhn_fac", "ranking", ("tps",), "FAC_Split", top["model"], sentence))
    return found
