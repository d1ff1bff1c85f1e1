"""``./reproduce.sh branches``: measure both branches of the trained FlowHN models, write records, table and figure."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowhn.errors import UserError
from flowhn.reporting.branches import (
    FOLDER_NAME,
    find_measurements,
    read_measurement,
    write_branches,
    write_measurement,
)
from flowhn.reporting.record import environment
from flowhn.run_folder import WEIGHTS_NAME, file_sha256

if TYPE_CHECKING:
    from flowhn.runs import Run

_GRADIENT_TOKENS = 8192  # of the batch that is measured with gradients
_LOSS_ROWS = 512  # validation rows for the loss by position, at most


def measure_runs(runs: Mapping[str, Run], folder: Path, *, title: str) -> Path | None:
    """Measure every run that has a record, and draw what is in ``folder``; returns it, None without any record.

    A measurement of the same weights is not repeated.

    Raises:
        UserError: a run's weights or data are missing or damaged, or a model has no two branches.
    """
    finished = [run for run in runs.values() if run.record() is not None]
    if not finished:
        return None
    for run in finished:
        weights = run.folder / WEIGHTS_NAME
        if not weights.is_file():
            raise UserError(f"{run.folder} has no {WEIGHTS_NAME} to measure; run again with --force")
        sha256 = file_sha256(weights)
        path = folder / FOLDER_NAME / f"{run.config['cell']}-s{run.config['seed']}.json"
        if not (path.is_file() and read_measurement(path)["weights_sha256"] == sha256):
            write_measurement(path.parent, _measure(run) | {"weights_sha256": sha256})
    write_branches(find_measurements(folder / FOLDER_NAME), folder, title=title)
    return folder


def _measure(run: Run) -> dict[str, Any]:
    from flowhn.benchmark import describe_device
    from flowhn.data import TokenDataModule, prepare
    from flowhn.evaluation.branches import loss_by_position, measure_branches
    from flowhn.loading import load_run
    from flowhn.training import resolve_hardware

    config, record = run.config, run.record()
    device = resolve_hardware(config).device
    prepared = prepare(
        config["data"],
        vocab_size=config["vocab_size"],
        seq_len=config["seq_len"],
        cache_dir=Path(config["cache_dir"]) / "data",
    )
    rows = max(1, _GRADIENT_TOKENS // config["seq_len"])
    data = TokenDataModule(
        prepared=prepared, batch_size=rows, val_batch_size=rows, seed=0, n_train_samples=rows, val_rows=_LOSS_ROWS
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torchdata's own use of a torch function that is going away
        batches = [(b["input_ids"].to(device), b["labels"].to(device)) for b in data.val_dataloader()]
    model = load_run(run.folder, device=device, config=config).model  # the caller's own, never the folder's
    return {
        "run_id": run.run_id,
        "cell": config["cell"],
        "size": record.size,
        "seed": record.seed,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment(),
        "device": describe_device(device, 1),
        "training": {
            "git": record.git, "created": record.created, "device": record.device, "tokens": record.tokens,
            "final_val": record.losses["final_val"], "choices": config["choices"], "data": record.data,
        },
        "seq_len": config["seq_len"],
        "rows": len(batches[0][0]),
        "rows_by_position": sum(len(ids) for ids, _ in batches),
        **measure_branches(model, *batches[0]),
        "loss_by_position": loss_by_position(model, batches),
    }  # fmt: skip
