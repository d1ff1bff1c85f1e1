"""Records of one model and size, pooled over seeds: where tables, figures and verdicts take numbers from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from flowhn.errors import UserError
from flowhn.reporting.paper import TASKS
from flowhn.reporting.record import RunRecord
from flowhn.reporting.style import in_order


@dataclass(frozen=True)
class Cell:
    """All seeds of one model at one size; numbers are means over the seeds and None where a seed has none."""

    cell: str
    size: str
    records: tuple[RunRecord, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(record.seed for record in self.records)

    @property
    def first(self) -> RunRecord:
        return self.records[0]

    @property
    def tps(self) -> float | None:
        """Training tokens per second over all devices."""
        return _mean(record.throughput["tps"] for record in self.records)

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation in per cent."""
        mean = _mean(record.throughput["mfu"] for record in self.records)
        return None if mean is None else 100 * mean

    @property
    def val_loss(self) -> float | None:
        """Final validation loss in nats per token."""
        return _mean(record.losses["final_val"] for record in self.records)

    @property
    def tasks(self) -> list[str]:
        """Tasks that every seed was evaluated on, the paper's first and in its order."""
        shared = set.intersection(*(set(record.evaluation["tasks"]) for record in self.records))
        return sort_tasks(task for task in shared if self.accuracy(task) is not None)

    def metric(self, task: str) -> str:
        """Name of the accuracy that counts for a task: the record's own word for it, else lm-eval's ``acc``."""
        return str(self.records[0].evaluation["tasks"].get(task, {}).get("metric") or "acc")

    def accuracy(self, task: str) -> tuple[float, float | None] | None:
        """Accuracy and standard error in per cent.

        Seeds answer the same questions, so the error of their mean is taken as the mean of their errors: an upper
        bound, where treating them as independent would understate it.
        """
        results = [record.evaluation["tasks"].get(task, {}) for record in self.records]
        metric = self.metric(task)
        mean = _mean(result.get(metric) for result in results)
        error = _mean(result.get(f"{metric}_stderr") for result in results)
        return None if mean is None else (100 * mean, None if error is None else 100 * error)

    def average(self, tasks: Sequence[str]) -> tuple[float, float | None] | None:
        """Unweighted mean accuracy over tasks with its standard error, in per cent; None when a task is missing."""
        values = [self.accuracy(task) for task in tasks]
        if not values or any(value is None for value in values):
            return None
        errors = [error for _, error in values]
        error = None if None in errors else sqrt(sum(error**2 for error in errors)) / len(errors)
        return sum(value for value, _ in values) / len(values), error

    def correct(self, task: str) -> list[float] | None:
        """Per question the share of seeds that were right (the record's ``correct``); None where a seed lacks it."""
        tasks = [record.evaluation["tasks"].get(task, {}) for record in self.records]
        strings = [(result.get("correct") or {}).get(self.metric(task)) for result in tasks]
        if not all(isinstance(text, str) and text and set(text) <= {"0", "1"} for text in strings):
            return None
        if len({len(text) for text in strings}) != 1:
            return None
        return [sum(map(int, answers)) / len(strings) for answers in zip(*strings, strict=True)]

    def curve(self, kind: str = "val") -> list[list[float]]:
        """Points ``[tokens, mean loss, mean seconds, lowest loss, highest loss]`` at the tokens that all seeds have."""
        curves = [{point[0]: point for point in r.losses[kind] if None not in point} for r in self.records]
        points = []
        for tokens in sorted(set.intersection(*(set(curve) for curve in curves))):
            rows = [curve[tokens] for curve in curves]
            losses = [row[1] for row in rows]
            seconds = sum(row[2] for row in rows) / len(rows) if kind == "val" else None
            points.append([tokens, sum(losses) / len(losses), seconds, min(losses), max(losses)])
        return points


def pool(records: Iterable[RunRecord], size: str) -> dict[str, Cell]:
    """The finished records of one size by cell, in the paper's order. A record given twice counts once.

    Raises:
        UserError: two different runs claim the same cell and seed, or the seeds of a cell differ in tokens,
            parameters, length or learning rate: pooling them would make a wrong table.
    """
    chosen: dict[tuple[str, int], RunRecord] = {}
    for record in records:
        if record.size != size or record.status != "done":
            continue
        key = (record.cell, record.seed)
        other = chosen.setdefault(key, record)
        if other.run_id != record.run_id:
            raise UserError(
                f"two different runs of {record.cell}, size {size}, seed {record.seed} are given ({other.run_id} and "
                f"{record.run_id}); make the table from one of them"
            )
        if record.created > other.created:
            chosen[key] = record
    cells = {}
    for name in in_order(cell for cell, _ in chosen):
        mine = tuple(chosen[key] for key in sorted(chosen) if key[0] == name)
        for what in ("tokens", "parameters", "seq_len"):
            values = {getattr(record, what) for record in mine}
            if len(values) > 1:
                raise UserError(
                    f"the seeds of {name}, size {size}, differ in {what} ({sorted(values)}); they cannot be pooled"
                )
        rates = {record.config.get("lr") for record in mine}
        if len(rates) > 1:
            told = ", ".join(f"seed {record.seed}: {record.config.get('lr')}" for record in mine)
            raise UserError(
                f"the seeds of {name}, size {size}, were trained at different learning rates ({told}); they cannot be "
                "pooled: train them again at one rate, or leave one out"
            )
        cells[name] = Cell(name, size, mine)
    return cells


def sort_tasks(tasks: Iterable[str]) -> list[str]:
    """The paper's six tasks in its order, then the others by name."""
    return sorted(set(tasks), key=lambda task: (TASKS.index(task) if task in TASKS else len(TASKS), task))


def average_tasks(cells: Iterable[Cell]) -> list[str]:
    """What an average is taken over: the paper's six where a cell has all of them, else every task seen."""
    lists = [cell.tasks for cell in cells]
    if any(set(TASKS) <= set(tasks) for tasks in lists):
        return list(TASKS)
    return sort_tasks(task for tasks in lists for task in tasks)


def _mean(values: Iterable[Any]) -> float | None:
    numbers = list(values)
    return None if not numbers or None in numbers else sum(numbers) / len(numbers)
