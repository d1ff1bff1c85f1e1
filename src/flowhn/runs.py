"""What a run is: a configuration with the folder and the id that follow from it. Imports neither torch nor lightning.

A run lives in ``<output_dir>/runs/<name>-<run id>/``; the run id is a hash of everything that decides its result, so the
same configuration always meets its own folder again: a finished run is not repeated, a stopped one goes on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from flowhn.config import build_model, identity, to_dict
from flowhn.errors import UserError
from flowhn.reporting.record import RunRecord, config_hash, read_record
from flowhn.run_folder import RECORD_NAME

_LARGEST_SEED = 2**32 - 1  # numpy's generators take 32 bits


@dataclass(frozen=True)
class Progress:
    """What a display shows of a run: phase (``data``, ``train``, ``eval``), position, speed in tokens/s and loss."""

    phase: str
    done: float = 0
    total: float = 0
    tokens_per_second: float | None = None
    loss: float | None = None
    text: str = ""


@dataclass(frozen=True)
class Run:
    """A configuration together with the folder and the id that follow from it."""

    config: dict[str, Any]
    run_id: str
    name: str
    folder: Path

    @property
    def record_path(self) -> Path:
        return self.folder / RECORD_NAME

    def record(self) -> RunRecord | None:
        """The finished run's record, or None. A broken record is an error, never silently repeated or overwritten."""
        if not self.record_path.is_file():
            return None
        record = read_record(self.record_path)
        if record.run_id != self.run_id:
            raise UserError(f"{self.record_path} belongs to another run ({record.run_id}); move it away or use --force")
        return record


def process_rank() -> int:
    """Number of this process among those of one run: 0 for the first or only one. Set by torchrun, Slurm or Lightning.

    Without torchrun and Slurm each node's first process starts the others there; on later nodes any number above 0 does.
    """
    given = next((int(os.environ[key]) for key in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if key in os.environ), 0)
    return given if "RANK" in os.environ or given else int(os.environ.get("NODE_RANK", 0))


def join_submitit_job() -> None:
    """In a submitit job of several tasks (launcher=slurm, launcher=local): name this task as torchrun would.

    Its process then takes its place among those of the run; a job of one task is left as it is.
    """
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return
    import submitit

    if submitit.JobEnvironment().num_tasks < 2:
        return
    from submitit.helpers import TorchDistributedEnvironment

    place = TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
    os.environ["GROUP_RANK"] = str(place.rank // place.local_world_size)


def cell_name(config: Mapping[str, Any]) -> str:
    """The run's name in tables: the model, with its split strategy for FlowHN (``flowhn_fac``)."""
    if config.get("cell"):
        return str(config["cell"])
    choices = config["choices"]
    return f"{choices['model']}_{choices['split']}" if choices["model"] == "flowhn" else choices["model"]


def plan(cfg: DictConfig) -> Run:
    """Name a composed configuration: its id, its folder. Imports neither torch nor lightning."""
    config = to_dict(cfg)
    if config["seed"] > _LARGEST_SEED:
        raise UserError(f"seed={config['seed']} must be at most {_LARGEST_SEED}")
    run_id = config_hash(identity(config))
    name = f"{cell_name(config)}-{config['choices']['size']}-{config['budget']}-s{config['seed']}"
    return Run(config, run_id, name, _folder(Path(config["output_dir"]) / "runs", name, run_id))


def _folder(runs: Path, name: str, run_id: str) -> Path:
    """The run's own folder, or that of the same run under another name (a cell of another artefact): never trained twice."""
    own = runs / f"{name}-{run_id}"
    if own.is_dir():
        return own
    return next((path for path in sorted(runs.glob(f"*-{run_id}")) if path.is_dir()), own)


def meta_model(config: Mapping[str, Any]) -> Any:
    """A configuration's model on the meta device: its shapes are there, and nothing is allocated."""
    import torch

    with torch.device("meta"):
        return build_model(config)
