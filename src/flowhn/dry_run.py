"""``--dry-run``: the runs that an artefact needs, with parameters, tokens and disk, and which records exist."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from flowhn.runs import Run

_COLUMNS = ("cell", "size", "parameters", "tokens", "steps", "seed", "disk while running", "disk after", "record")


def show_plan(name: str, runs: Mapping[str, Run]) -> None:
    """Print one line for each run, what stays of all of them, and what the data take."""
    from rich.console import Console
    from rich.table import Table

    from flowhn.data.disk import shown_bytes
    from flowhn.run_disk import run_bytes
    from flowhn.runs import meta_model

    table = Table(title=f"{name}: {len(runs)} runs")
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column in ("cell", "size", "record") else "right", no_wrap=True)
    after = 0.0
    for cell, run in runs.items():
        config, model = run.config, meta_model(run.config)
        steps = -(-config["tokens"] // config["global_batch_tokens"])
        running, kept = run_bytes(config, model)
        after += kept
        table.add_row(
            cell, config["choices"]["size"], f"{model.num_parameters() / 1e6:,.2f}M", f"{config['tokens']:,}", f"{steps:,}",
            str(config["seed"]), shown_bytes(running), shown_bytes(kept), "exists" if run.record() else "missing",
        )  # fmt: skip
    console = Console(width=max(120, Console().width), soft_wrap=True)
    console.print(table)
    first = next(iter(runs.values()))
    free = shutil.disk_usage(_existing(first.folder)).free
    console.print(
        f"what stays of all runs: {shown_bytes(after)}; free on that disk: {free / 1e9:,.1f} GB; output: {first.folder.parent}"
    )
    for line in _data_lines(runs):
        console.print(line)


def _data_lines(runs: Mapping[str, Run]) -> list[str]:
    """A line for each data set that the runs read: what its preparation takes and leaves in the cache, if it is not there."""
    from flowhn.data.disk import disk_estimate, shown_bytes
    from flowhn.reporting.record import config_hash

    lines = {}
    for config in (run.config for run in runs.values()):
        shape = {"vocab_size": config["vocab_size"], "seq_len": config["seq_len"]}
        key = config_hash({"data": config["data"], **shape})
        if key in lines:
            continue
        cache = Path(config["cache_dir"]) / "data"
        free = shutil.disk_usage(_existing(cache)).free
        at_peak, kept = disk_estimate(config["data"], **shape)
        lines[key] = (
            f"prepared data ({config['choices']['data']}), where the cache has it not yet: {shown_bytes(at_peak)} while it is "
            f"made, {shown_bytes(kept)} after; free on that disk: {free / 1e9:,.1f} GB; cache: {cache}"
        )
    return list(lines.values())


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.absolute().parent)
