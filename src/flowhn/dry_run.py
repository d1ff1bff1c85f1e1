"""``--dry-run``: the runs that an artefact needs, with parameters, tokens and disk, and which records exist."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from flowhn.runs import Run


def show_plan(name: str, runs: Mapping[str, Run]) -> None:
    """Print one line for each run, and what their weights take."""
    from rich.console import Console
    from rich.table import Table

    from flowhn.runs import count_parameters

    table = Table(title=f"{name}: {len(runs)} runs")
    for column in (
        "cell",
        "size",
        "parameters",
        "tokens",
        "steps",
        "seed",
        "disk while running",
        "disk after",
        "record",
    ):
        table.add_column(column, justify="left" if column in ("cell", "size", "record") else "right", no_wrap=True)
    after = 0.0
    for cell, run in runs.items():
        config, n = run.config, count_parameters(run.config)
        steps = -(-config["tokens"] // config["global_batch_tokens"])
        # fp32: weights 4 bytes; a checkpoint holds weights and two AdamW moments; two are kept while a third is written
        after += 4 * n
        table.add_row(
            cell, config["choices"]["size"], f"{n / 1e6:,.2f}M", f"{config['tokens']:,}", f"{steps:,}", str(config["seed"]),
            _bytes(3 * 12 * n + 4 * n), _bytes(4 * n), "exists" if run.record() else "missing",
        )  # fmt: skip
    console = Console(width=max(120, Console().width))
    console.print(table)
    first = next(iter(runs.values()))
    free = shutil.disk_usage(_existing(first.folder)).free
    console.print(
        f"weights of all runs: {_bytes(after)}; free on that disk: {_bytes(free)}; output: {first.folder.parent}"
    )


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.absolute().parent)


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}"
        n /= 1000
    return f"{n:,.1f} GB"
