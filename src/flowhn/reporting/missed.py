"""Why a goal of speed is missed, from the profile in the record of the cell that it is about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flowhn.reporting.bench import counted, label
from flowhn.reporting.goals import Goal, find_goals

PRODUCTS = "matrix products"
_SHOWN = 3  # other kinds of kernels that are named


def missed_lines(
    records: Sequence[Mapping[str, Any]], product_flops: Callable[[Mapping[str, Any]], float]
) -> list[str]:
    """A line of Markdown for each cell of ours that misses goals; empty where none is missed.

    Args:
        records: of one folder, as :func:`flowhn.reporting.goals.find_goals` takes them.
        product_flops: a record -> training FLOPs per token of its linear layers (what the products of the profile compute).
    """
    missed: dict[tuple[str, str], list[Goal]] = {}
    for goal in find_goals(records):
        if goal.met == "no":
            missed.setdefault((goal.cells[0], goal.size), []).append(goal)
    lines = []
    for (cell, size), found in missed.items():
        told = "; ".join(f"{goal.what}: {_number(goal.reached)} of {_number(goal.goal)} {goal.unit}" for goal in found)
        why = _why([r for r in records if (r["cell"], r["size"]) == (cell, size)], product_flops)
        lines.append(f"- {label(cell)} at {size} ({told}). {why}")
    return lines


def _why(members: Sequence[Mapping[str, Any]], product_flops: Callable[[Mapping[str, Any]], float]) -> str:
    """Where the step's time goes: the share of the products and their rate, then the kinds that take most of the rest."""
    profiled = [r for r in members if r.get("profile") and r["protocol"] == "optimised"]
    record = next(iter(counted(profiled)), None)
    if record is None:
        return "Nothing was profiled; `flowhn-bench profile=true` does it."
    profile, tokens = record["profile"], record["batch"] * record["seq_len"]
    products, total = profile["kinds"].get(PRODUCTS, 0.0), profile["kernel_ms"]
    if not products or not total:
        return "Its profile shows no matrix products."
    rate = product_flops(record) * tokens / (products / 1e3)
    rest = [(kind, ms) for kind, ms in profile["kinds"].items() if kind != PRODUCTS][:_SHOWN]
    large = record["matmul_flops"]
    told = ", ".join(f"{kind} {100 * ms / total:.0f} %" for kind, ms in rest)
    kept = record.get("matmul_flops_sustained")  # not in older records
    sustained = f" ({kept / 1e12:,.0f} when it runs on for a second)" if kept else ""
    return (
        f"Of the {total:,.1f} ms of kernels of a profiled step (batch {record['batch']}, T {record['seq_len']:,}), matrix "
        f"products take {100 * products / total:.0f} %. They run at {rate / 1e12:,.0f} TFLOP/s, {100 * rate / large:.0f} % "
        f"of the {large / 1e12:,.0f} that the large product reached in the same process{sustained}; alone they would make "
        f"{1e3 * tokens / products:,.0f} tokens/s. The rest: {told}."
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
