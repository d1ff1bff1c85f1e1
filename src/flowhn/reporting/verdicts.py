"""The paper's claims (:mod:`flowhn.reporting.claims`), each judged from run records alone.

A verdict is ``better``, ``worse``, ``within noise`` or ``not testable``: how the first model stands to the second one.
``holds`` says what that means for the claim: ``partly`` is the claimed direction without the
claimed factor; ``undecided (BoolQ alone)`` a verdict on accuracy that does not stand over the other tasks, and
``undecided (BoolQ and WinoGrande)``, say, one that stands without either, but not without both.

Accuracies are compared by their mean over the tasks. Where both models' records have the answers to each question, the
interval is a paired bootstrap over the questions of each task (95 %, seeds pooled as the mean of their answers);
otherwise it is the normal one from both standard errors, which ignores the pairing and is wider. Neither covers
what another seed of the training would change. A model that is to be the best is compared with the best of k others by an
interval of 1 - 5 %/k, so that picking the other by the same answers makes no verdict. Speeds are compared by their ratio,
with the spread that was measured: of both models' speeds within their runs and between their seeds, or between repeats of
one cell on other days where that is more (:mod:`flowhn.reporting.speeds`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from statistics import NormalDist

import numpy as np
import pandas as pd

from flowhn.reporting import paper
from flowhn.reporting.cells import Cell, average_tasks, pool
from flowhn.reporting.claims import ALL, CLAIMS, Claim
from flowhn.reporting.record import RunRecord
from flowhn.reporting.speeds import DaySpread, ratio_band
from flowhn.reporting.style import long_name, size_name, sizes_in_order, task_name

INTERVAL = "interval (accuracy: 95 %; speed: measured spread)"  # what to call low and high in a table
BIASED = "boolq"  # yes or no: 62.2 % of its answers are yes
_DRAWS = 10_000
_CONFIDENCE = 0.95
COLUMNS = (
    "claim", "size", "sentence", "first", "second", "quantity", "ours_first", "ours_second", "difference", "stderr",
    "low", "high", "claimed", "printed", "verdict", "holds", "method", "source", "rest", "rest_low", "rest_high",
)  # fmt: skip


def verdicts(
    records: Iterable[RunRecord], *, size: str | None = None, days: Mapping[str, DaySpread] | None = None
) -> pd.DataFrame:
    """Judge every claim at every size of the records, a row per pair of models.

    Args:
        records: run records.
        size: judge this size alone.
        days: device name -> how far one cell's speed differs between repeats (:func:`flowhn.reporting.speeds.day_spreads`).

    Columns: ``claim, size, sentence, first, second, quantity`` (average in per cent, tps, mfu in per cent),
    ``ours_first, ours_second``, ``difference`` (points of accuracy, or the ratio for tps and mfu), its ``stderr``,
    ``low`` and ``high`` (the 95 % interval, or the measured spread of a ratio), ``claimed`` (factor), ``printed`` (the same
    figure from the paper's numbers at that size, or at the claim's first size for a size of ours), ``verdict``,
    ``holds`` (yes, no, partly, undecided, undecided (<tasks>) or not testable), ``method`` and ``source``;
    ``rest, rest_low, rest_high``: the
    difference in accuracy without BoolQ, where both models' answers are on record.

    Raises:
        UserError: the records cannot be pooled (see :func:`flowhn.reporting.cells.pool`).
    """
    records = list(records)
    sizes = [size] if size is not None else sizes_in_order(record.size for record in records)
    rows = []
    for one in sizes:
        cells = pool(records, one)
        for claim in CLAIMS:
            for second in claim.seconds:
                rows.append(_judge(claim, second, one, cells, days or {}))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _judge(
    claim: Claim, second: str, size: str, cells: Mapping[str, Cell], days: Mapping[str, DaySpread]
) -> dict[str, object]:
    row: dict[str, object] = dict.fromkeys(COLUMNS)
    row |= {
        "claim": claim.id,
        "size": size,
        "sentence": claim.sentence,
        "quantity": claim.quantity,
        "source": claim.source,
    }
    row |= {"claimed": claim.factor, "first": claim.first}
    rivals = 1
    if second == ALL:
        second, gaps, rivals = _best_other(claim.first, cells, claim.quantity)
    else:
        gaps = ""
    row["second"] = second
    row["printed"] = _printed(claim, second, size)
    first = cells.get(claim.first)
    other = cells.get(second) if second else None
    absent = [long_name(name) for name in (claim.first, second) if name and name not in cells]
    if first is None or other is None:
        return row | _untestable(f"no record of {', '.join(absent) or 'any other model'}")
    reason = _unlike(first, other, claim.quantity)
    if reason:
        return row | _untestable(reason)
    if claim.quantity == "average":
        judged = _compare_accuracy(first, other, cells, rivals)
    else:
        judged = _compare_speed(first, other, claim, days.get(str(first.first.device["name"])))
    if size not in claim.sizes:
        judged["method"] = f"{judged['method']}; the paper claims it at {' and '.join(map(size_name, claim.sizes))}"
    if gaps and judged["verdict"] != "not testable":
        judged["method"] = f"{judged['method']}; {gaps}"
        if judged["holds"] == "yes":  # the best of all was claimed, and not all are here
            judged["holds"] = "undecided"
    return row | judged


def _best_other(first: str, cells: Mapping[str, Cell], quantity: str) -> tuple[str | None, str, int]:
    """The other model of the paper with the highest value, a remark on those not looked at, and of how many it is the best."""
    others = [name for name in paper.table1()["cell"].unique() if name != first]
    tasks = average_tasks(cells.values())

    def value(cell: Cell) -> float | None:
        if quantity != "average":
            return getattr(cell, quantity)
        average = cell.average(tasks)
        return None if average is None else average[0]

    known = {name: own for name in others if name in cells and (own := value(cells[name])) is not None}
    missing = [long_name(name) for name in others if name not in known]
    best = max(known, key=known.__getitem__) if known else None
    wanted = "an average" if quantity == "average" else quantity.upper()
    told = f"left out for want of {wanted}: {', '.join(missing)}" if missing else ""
    return best, told, max(1, len(known))


def _unlike(first: Cell, second: Cell, quantity: str) -> str:
    """Why two models cannot be compared fairly, or an empty text."""
    a, b = first.first, second.first
    if quantity == "average":
        if a.tokens != b.tokens:
            return f"trained on different numbers of tokens ({a.tokens:,} and {b.tokens:,})"
        if a.data.get("sha256") != b.data.get("sha256"):
            return "trained on different data"
        return "" if a.evaluation.get("suite") == b.evaluation.get("suite") else "evaluated on different suites"
    if (a.device["name"], a.device.get("count")) != (b.device["name"], b.device.get("count")):
        return f"measured on different devices ({a.device['name']} and {b.device['name']})"
    return "" if a.seq_len == b.seq_len else "measured at different sequence lengths"


def _compare_accuracy(first: Cell, second: Cell, cells: Mapping[str, Cell], rivals: int) -> dict[str, object]:
    tasks = average_tasks(cells.values())
    a, b = first.average(tasks), second.average(tasks)
    if a is None or b is None:
        return _untestable("a model was not evaluated on all tasks")
    difference = a[0] - b[0]
    confidence = 1 - (1 - _CONFIDENCE) / rivals
    level = f"{100 * confidence:.3g} %" + (f" (95 % for the best of {rivals})" if rivals > 1 else "")
    interval = paired_bootstrap(first, second, tasks, confidence=confidence)
    if interval is not None:
        error, low, high = interval
        method = f"paired bootstrap over questions, {level}, mean of {len(tasks)} tasks"
    elif a[1] is None or b[1] is None:
        return _untestable("the records have no standard errors")
    else:
        error = sqrt(a[1] ** 2 + b[1] ** 2)
        z = NormalDist().inv_cdf((1 + confidence) / 2)
        low, high = difference - z * error, difference + z * error
        method = f"difference with both standard errors, {level}, unpaired, mean of {len(tasks)} tasks"
    verdict = "better" if low > 0 else "worse" if high < 0 else "within noise"
    rest = _without_bias(first, second, tasks, confidence)
    holds = {"better": "yes", "worse": "no"}.get(verdict, "undecided")
    if rest and holds != "undecided" and (alone := _decided_by(first, second, tasks, verdict, rest, confidence)):
        alone = f"{task_name(BIASED)} alone" if alone == BIASED else f"{task_name(BIASED)} and {task_name(alone)}"
        holds = f"undecided ({alone})"
    return rest | {
        "ours_first": a[0], "ours_second": b[0], "difference": difference, "stderr": error, "low": low, "high": high,
        "verdict": verdict, "holds": holds, "method": method,
    }  # fmt: skip


def _decided_by(
    first: Cell, second: Cell, tasks: Sequence[str], verdict: str, rest: Mapping[str, float], confidence: float
) -> str | None:
    """BoolQ, where the verdict does not stand without it, or the first task without which it then does not; else None."""

    def stands(low: float, high: float) -> bool:
        return low > 0 if verdict == "better" else high < 0

    if not stands(rest["rest_low"], rest["rest_high"]):
        return BIASED
    others = [task for task in tasks if task != BIASED]
    for task in others if len(others) > 2 else ():
        interval = paired_bootstrap(first, second, [one for one in others if one != task], confidence=confidence)
        if interval is not None and not stands(*interval[1:]):
            return task
    return None


def _without_bias(first: Cell, second: Cell, tasks: Sequence[str], confidence: float) -> dict[str, float]:
    """The same difference without BoolQ, where a model that has learnt nothing scores 38 to 62 % by its taste for no or yes."""
    others = [task for task in tasks if task != BIASED]
    if len(others) in (0, len(tasks)):
        return {}
    interval = paired_bootstrap(first, second, others, confidence=confidence)
    if interval is None:
        return {}
    difference = first.average(others)[0] - second.average(others)[0]
    return {"rest": difference, "rest_low": interval[1], "rest_high": interval[2]}


def paired_bootstrap(
    first: Cell,
    second: Cell,
    tasks: Sequence[str],
    *,
    confidence: float = _CONFIDENCE,
    draws: int = _DRAWS,
    seed: int = 0,
) -> tuple[float, float, float] | None:
    """Standard error and interval (points) of the difference in mean accuracy over tasks.

    Questions are drawn with replacement within each task. None when a task lacks the answers to each question, or both
    models' answers differ in number. Always the same result for the same records.
    """
    rng = np.random.default_rng(seed)
    total = np.zeros(draws)
    for task in tasks:
        a, b = first.correct(task), second.correct(task)
        if a is None or b is None or len(a) != len(b):
            return None
        # A resample is fully told by how often each distinct difference occurs, so draw those counts directly.
        values, counts = np.unique(np.round(np.subtract(a, b), 9), return_counts=True)
        total += rng.multinomial(len(a), counts / len(a), size=draws) @ values / len(a)
    means = 100 * total / len(tasks)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(means.std()), float(low), float(high)


def _compare_speed(first: Cell, second: Cell, claim: Claim, day: DaySpread | None) -> dict[str, object]:
    a, b = (getattr(cell, claim.quantity) for cell in (first, second))
    if not a or not b:
        return _untestable(f"no {claim.quantity.upper()} on record")
    ratio = a / b
    own = ratio_band(first, second)
    if own is None and day is None:
        return _untestable(
            "each speed was measured once, so their spread is not known; train with val_points=3 or seeds=[0,1]"
        )
    factors = own or (1.0, 1.0)
    method = "ratio; spread within the runs and between seeds"
    if day is not None and (1 / (1 + day.share) < factors[0] or 1 + day.share > factors[1]):
        factors = min(factors[0], 1 / (1 + day.share)), max(factors[1], 1 + day.share)
        source = (
            "one model's speed differs between repeats with the same code"
            if day.same_code
            else "one model's speed differs between days with other code (none was repeated with the same)"
        )
        method = f"ratio; spread {100 * day.share:.1f} %, by which {source}"
    low, high = ratio * factors[0], ratio * factors[1]
    verdict = "better" if low > 1 else "worse" if high < 1 else "within noise"
    holds = {"better": "yes", "worse": "no"}.get(verdict, "undecided")
    if claim.factor is not None and verdict == "better" and high < claim.factor:
        holds = "partly"
    return {
        "ours_first": a, "ours_second": b, "difference": ratio, "low": low, "high": high, "verdict": verdict,
        "holds": holds, "method": method,
    }  # fmt: skip


def _untestable(reason: str) -> dict[str, object]:
    return {"verdict": "not testable", "holds": "not testable", "method": reason}


def _printed(claim: Claim, second: str | None, size: str) -> float | None:
    """The same difference or ratio from the paper's own numbers as printed."""
    where = size if size in paper.SIZES else claim.sizes[0]
    frame = paper.table1() if claim.quantity == "average" else paper.figure4()
    values = frame[frame["size"] == where].set_index("cell")[claim.quantity]
    if claim.first not in values.index or second not in values.index:
        return None
    a, b = float(values[claim.first]), float(values[second])
    return a - b if claim.quantity == "average" else a / b
