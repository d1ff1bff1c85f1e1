"""``./reproduce.sh long_context``: ask trained models to retrieve over 1k to 32k tokens; results, table and figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowhn.errors import UserError
from flowhn.reporting.long_context import FOLDER_NAME, write_long_context
from flowhn.reporting.record import environment
from flowhn.run_folder import WEIGHTS_NAME, write_json

if TYPE_CHECKING:
    from flowhn.runs import Run


def long_suite(overrides: Sequence[str]) -> dict[str, Any]:
    """The suite ``eval=long_context`` with overrides such as ``eval.limit=5``."""
    from flowhn.config import compose, to_dict

    return to_dict(compose("train", ["eval=long_context", *overrides]))["eval"]


def asked_of(suite: Mapping[str, Any]) -> dict[str, Any]:
    """What decides which questions a suite asks: a result with the same is not made again."""
    return {key: suite[key] for key in ("tasks", "limit", "max_length")}


def evaluate_long(run: Run, suite: Mapping[str, Any], workshop: Any) -> dict[str, Any]:
    """The suite's results of a finished run, with what a table needs to know of it.

    Raises:
        UserError: the run's weights or data are missing or damaged.
    """
    from flowhn.loading import load_run
    from flowhn.training import resolve_hardware

    if not (run.folder / WEIGHTS_NAME).is_file():
        raise UserError(f"{run.folder} has no {WEIGHTS_NAME} to evaluate; run again with --force")
    hardware = resolve_hardware(run.config)
    loaded = load_run(run.folder, device=hardware.device, config=run.config)
    prepared = workshop.prepare(run.config)
    result = workshop.evaluate(
        loaded.model,
        workshop.tokenizer(prepared),
        run.config,
        suite=suite,
        hardware=hardware,
        heldout_file=prepared.heldout_file,
    )
    return described(run.config, run.run_id) | _provenance(run, hardware) | result


def _provenance(run: Run, hardware: Any) -> dict[str, Any]:
    """When and on what this was measured, and which code trained the model."""
    from flowhn.benchmark import describe_device

    record = run.record()
    trained = None if record is None else {"git": record.git, "created": record.created, "device": record.device}
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment(),
        "device": describe_device(hardware.device, 1),
        "training": trained,
    }


def described(config: Mapping[str, Any], run_id: str | None) -> dict[str, Any]:
    """What stands beside the results of a run."""
    from flowhn.runs import cell_name

    about = {"cell": cell_name(config), "seed": config.get("seed"), "run_id": run_id}
    return about | {"size": config["choices"]["size"], "seq_len": config["seq_len"], "tokens": config.get("tokens")}


def measure_long_context(runs: Mapping[str, Run], folder: Path, *, overrides: Sequence[str], say: Any) -> Path | None:
    """Evaluate every run that has a record, and draw what is in ``folder``; returns it, None without any record.

    A result of the same run and questions is not repeated.

    Raises:
        UserError: see :func:`evaluate_long`.
    """
    from flowhn.experiment import Workshop

    finished = [run for run in runs.values() if run.record() is not None]
    if not finished:
        return None
    suite, workshop = long_suite(overrides), Workshop()
    asked = asked_of(suite)
    for run in finished:
        path = folder / FOLDER_NAME / f"{run.config['cell']}-s{run.config['seed']}.json"
        if path.is_file():
            known = json.loads(path.read_text(encoding="utf-8"))
            if known.get("run_id") == run.run_id and known.get("asked") == asked:
                continue
        say(f"{run.name}: retrieval over {', '.join(suite['tasks'])}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, evaluate_long(run, suite, workshop) | {"asked": asked})
    write_long_context(folder / FOLDER_NAME, folder)
    return folder
