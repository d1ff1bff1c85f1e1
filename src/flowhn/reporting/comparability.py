"""Which columns of a table may be held against the paper's: rules over the records, each said in one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flowhn.reporting import paper
from flowhn.reporting.cells import Cell
from flowhn.reporting.record import RunRecord
from flowhn.reporting.style import name, size_name, task_name

PAPER_DATA = "slimpajama"
# The published MFU script divides by 309.7 TFLOP/s, which is an RTX A6000's sparse bf16 figure.
PAPER_DEVICE = "A6000"
_SAME_PARAMETERS = 0.03  # all models of one size are made to lie this near to each other
_SAME_BUDGET = 0.01  # budgets are rounded up to whole optimiser steps


@dataclass(frozen=True)
class Statement:
    """One column group: can it be held against the paper's numbers, and why."""

    columns: str
    comparable: bool
    reason: str


def statements(cells: Mapping[str, Cell], size: str, tasks: Sequence[str]) -> list[Statement]:
    """One statement per column group; an empty list without cells."""
    if not cells:
        return []
    return [
        _parameters(size),
        _tokens(cells, size),
        _loss(),
        _tps(cells, size),
        _mfu(cells),
        _accuracy(cells, size, tasks),
    ]


def row_warnings(cells: Mapping[str, Cell]) -> list[str]:
    """Sentences on rows of ours that cannot be held against each other."""
    found = []
    traits = {
        "the device": lambda r: f"{r.device.get('count') if r.device['type'] == 'cuda' else 1} x {device_name(r)}",
        "the training data": lambda r: f"{r.data.get('name')} {str(r.data.get('sha256') or '')[:8]}".strip(),
        "the number of training tokens": lambda r: f"{r.tokens:,}",
        "the tokens of an optimiser step": lambda r: f"{r.global_batch_tokens:,}",
        "the sequence length": lambda r: f"{r.seq_len:,}",
        "the evaluation": lambda r: str(r.evaluation.get("suite")),
    }
    for what, trait in traits.items():
        groups: dict[str, list[str]] = {}
        for cell in cells.values():
            for value in {trait(record) for record in cell.records}:
                groups.setdefault(value, []).append(name(cell.cell))
        if len(groups) > 1:
            told = "; ".join(f"{value}: {', '.join(names)}" for value, names in groups.items())
            found.append(f"Rows differ in {what} and cannot be compared directly ({told}).")
    counts = {cell.cell: cell.first.parameters for cell in cells.values()}
    if counts and max(counts.values()) > (1 + _SAME_PARAMETERS) * min(counts.values()):
        small, large = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        found.append(
            f"Rows differ by more than {100 * _SAME_PARAMETERS:.0f} % in parameters ({name(small)} {counts[small]:,}, "
            f"{name(large)} {counts[large]:,})."
        )
    return found


def device_name(record: RunRecord) -> str:
    """The device's name, or its type where the name is unknown."""
    return record.device["name"] or record.device["type"]


def _parameters(size: str) -> Statement:
    if size not in paper.SIZES:
        return Statement(
            "Parameters",
            False,
            f"The paper has no size {size}; the reference columns are its {size_name(paper.REFERENCE_SIZE)}.",
        )
    return Statement(
        "Parameters",
        True,
        f"The paper prints the class ({size_name(size)}) and no counts; ours count embeddings and LM head.",
    )


def _tokens(cells: Mapping[str, Cell], size: str) -> Statement:
    wanted = _paper_tokens(size)
    ours = sorted({cell.first.tokens for cell in cells.values()})
    if all(abs(tokens / wanted - 1) < _SAME_BUDGET for tokens in ours):
        return Statement("Tokens", True, f"Both are {_short(wanted)}.")
    told = _short(ours[0]) if len(ours) == 1 else f"{_short(ours[0])} to {_short(ours[-1])}"
    return Statement("Tokens", False, f"Ours trained on {told}, the paper's on {_short(wanted)}.")


def _loss() -> Statement:
    return Statement(
        "Validation loss and perplexity",
        False,
        "The paper prints none. Ours are nats per token of our own validation text and tokenizer, and compare rows "
        "with each other only.",
    )


def _tps(cells: Mapping[str, Cell], size: str) -> Statement:
    devices = sorted({device_name(cell.first) for cell in cells.values()})
    kinds = {cell.first.device["type"] for cell in cells.values()}
    told = " and ".join(devices)
    if kinds != {"cuda"}:
        return Statement(
            "TPS",
            False,
            f"Ours on {told} ({', '.join(sorted(kinds))}), the paper's on one GPU (an RTX A6000 by its code).",
        )
    if size not in paper.SIZES:
        return Statement("TPS", False, f"Size {size} is not in the paper ({told}).")
    if all(PAPER_DEVICE in device for device in devices):
        return Statement(
            "TPS",
            True,
            f"Both on an RTX A6000 ({told}); the paper's code runs in fp32, eager, ours as recorded.",
        )
    return Statement(
        "TPS", False, f"Ours on {told}, the paper's on an RTX A6000 by its code. Ratios between rows can be compared."
    )


def _mfu(cells: Mapping[str, Cell]) -> Statement:
    peaks = sorted({str(cell.first.throughput.get("peak_source")) for cell in cells.values() if cell.mfu is not None})
    told = f"Ours divides by: {', '.join(peaks)}" if peaks else "Ours is empty because the device's peak is unknown"
    return Statement(
        "MFU",
        False,
        f"{told}; the paper's code by 45.158 or 309.7 TFLOP/s, with another FLOP count. Compare the order of rows.",
    )


def _accuracy(cells: Mapping[str, Cell], size: str, tasks: Sequence[str]) -> Statement:
    reasons = []
    wanted = _paper_tokens(size)
    if not tasks:
        return Statement("Accuracy", False, "No record has an evaluation.")
    foreign = [task_name(task) for task in tasks if task not in paper.TASKS]
    if not set(paper.TASKS) & set(tasks):
        reasons.append(f"the tasks ({', '.join(foreign)}) are not the paper's")
    if size not in paper.SIZES:
        reasons.append(f"size {size} is not in the paper")
    if any(abs(cell.first.tokens / wanted - 1) > _SAME_BUDGET for cell in cells.values()):
        reasons.append(f"the paper trained on {_short(wanted)}")
    data = sorted({str(cell.first.data.get("name")) for cell in cells.values()})
    if data != [PAPER_DATA]:
        reasons.append(f"the paper trained on SlimPajama-6B, ours on {', '.join(data)}")
    limits = {(cell.first.config.get("eval") or {}).get("limit") for cell in cells.values()} - {None}
    if limits:
        reasons.append(f"only the first {min(limits)} questions of a task were asked")
    if reasons:
        return Statement("Accuracy", False, _sentence(reasons))
    return Statement(
        "Accuracy", True, "Same tasks, data, tokens and size; ours by lm-eval (acc), the paper's by its own loops."
    )


def _sentence(reasons: Sequence[str]) -> str:
    text = "; ".join(reasons)
    return f"{text[0].upper()}{text[1:]}."


def _paper_tokens(size: str) -> int:
    printed = paper.table1()
    return int(
        printed.loc[printed["size"] == (size if size in paper.SIZES else paper.REFERENCE_SIZE), "tokens"].iloc[0]
    )


def _short(tokens: int) -> str:
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if tokens >= unit:
            return f"{tokens / unit:.3g}{letter} tokens"
    return f"{tokens} tokens"
