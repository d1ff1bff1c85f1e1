"""``logger=wandb``: what Weights & Biases is told of a run and of an artefact, beside the curves that Lightning logs.

Offline unless ``WANDB_API_KEY`` or ``WANDB_MODE=online`` is set; nothing leaves the machine before ``wandb sync``.
``WANDB_MODE=disabled`` switches it off.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowhn.errors import UserError
from flowhn.reporting.record import RunRecord, config_hash

if TYPE_CHECKING:
    from flowhn.runs import Run

LOGGER = "wandb"


def is_tracked(config: Mapping[str, Any]) -> bool:
    """Whether a run's configuration asks for Weights & Biases, and the environment does not forbid it."""
    return LOGGER in (config.get("logger") or {}) and os.environ.get("WANDB_MODE") != "disabled"


def check_tracking(config: Mapping[str, Any]) -> None:
    """See that what ``logger=wandb`` needs is there, before anything is trained or timed.

    Raises:
        UserError: wandb is not installed.
    """
    if is_tracked(config) and importlib.util.find_spec("wandb") is None:
        raise UserError(
            "logger=wandb needs the package wandb; run with FLOWHN_EXTRAS=wandb ./reproduce.sh, or pip install wandb"
        )


def is_offline() -> bool:
    """Without a key in the environment nothing is sent; ``WANDB_MODE=online`` trusts an earlier ``wandb login``."""
    mode = os.environ.get("WANDB_MODE")
    return mode != "online" if mode else not os.environ.get("WANDB_API_KEY")


def logger_options(run: Run) -> dict[str, Any]:
    """What Lightning's ``WandbLogger`` is built with beside ``configs/logger/wandb.yaml``.

    Raises:
        UserError: wandb is not installed.
    """
    check_tracking(run.config)
    return {
        "name": run.name,
        "id": run.run_id,
        "job_type": "train",
        "resume": "allow",
        "offline": is_offline(),
        "config": run.config,
        "settings": _settings(),
    }


def _settings() -> Any:
    import wandb

    # Our display owns the terminal: wandb's own lines and its copy of them are switched off.
    return wandb.Settings(console="off", silent=True)


def close_run(run: Run, record: RunRecord | None, say: Callable[[str], None]) -> None:
    """Log the finished run's figures and its record, and end the W&B run, or the next run of this process would join it.

    Args:
        run: the run; without ``logger=wandb`` nothing happens.
        record: what came out; None for a run that failed or was stopped.
        say: told where an offline run lies.
    """
    if not is_tracked(run.config):
        return
    import wandb

    if wandb.run is None and record is not None:  # trained by an earlier call, evaluated by this one
        _init(run.config, run.folder, name=run.name, id=run.run_id, job_type="train")
    tracked = wandb.run
    if tracked is None:
        return
    if record is not None:
        tracked.summary.update(_summary(record))
        artifact = wandb.Artifact(f"record-{run.run_id}", type="record", metadata={"cell": record.cell})
        artifact.add_file(str(run.record_path))
        tracked.log_artifact(artifact)
    _finish(tracked, say, failed=record is None)


def track_artefact(name: str, folder: Path, config: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """One W&B run for an artefact, in the group of its training runs: tables, figures, and the folder as an Artifact.

    Args:
        name: the artefact, for example ``table1``.
        folder: its folder with ``*.csv`` and ``*.png``.
        config: the configuration of one of its runs; without ``logger=wandb`` nothing happens.
        say: told where an offline run lies.
    """
    if not is_tracked(config):
        return
    import pandas as pd
    import wandb

    run_id = config_hash({"artefact": name, "folder": folder.name, "seed": config["seed"]})
    tracked = _init(
        config, Path(config["output_dir"]), name=f"{name}-{folder.name}", id=run_id, job_type="artefact", group=name
    )
    content: dict[str, Any] = {
        f"tables/{path.stem}": wandb.Table(dataframe=pd.read_csv(path)) for path in sorted(folder.glob("*.csv"))
    }
    content |= {f"figures/{path.stem}": wandb.Image(str(path)) for path in sorted(folder.glob("*.png"))}
    tracked.log(content)
    artifact = wandb.Artifact(f"{name}-{folder.name}", type="artefact")
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        artifact.add_file(str(path), name=str(path.relative_to(folder)))
    tracked.log_artifact(artifact)
    _finish(tracked, say)


def _init(config: Mapping[str, Any], folder: Path, **options: Any) -> Any:
    import wandb

    spec = config["logger"][LOGGER]
    options = {"group": spec.get("group"), "tags": spec.get("tags"), "entity": spec.get("entity"), **options}
    mode = "offline" if is_offline() else "online"
    return wandb.init(
        project=spec["project"],
        dir=str(folder),
        mode=mode,
        resume="allow",
        config=dict(config),
        settings=_settings(),
        **options,
    )


def _finish(tracked: Any, say: Callable[[str], None], *, failed: bool = False) -> None:
    folder = Path(tracked.dir).parent
    offline = tracked.offline
    tracked.finish(exit_code=int(failed))  # 1: W&B shows the run as failed, not as finished
    if offline:
        say(f"W&B, offline: wandb sync {folder}")


def _summary(record: RunRecord) -> dict[str, Any]:
    found = {
        "final/val_loss": record.losses["final_val"],
        "final/tokens_per_second": record.throughput["tps"],
        "final/mfu": record.throughput["mfu"],
        "final/parameters": record.parameters,
        "final/tokens": record.tokens,
    }
    for task, result in record.evaluation["tasks"].items():
        found[f"accuracy/{task}"] = result.get(result.get("metric", "acc"))
    return {key: value for key, value in found.items() if value is not None}
