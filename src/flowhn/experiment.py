"""The recipe of one run: data, model, training, evaluation, record. Entries call :func:`run`; nothing else does.

A run lives in ``<output_dir>/runs/<name>-<run id>/``; the run id is a hash of everything that decides its result, so the
same configuration always meets its own folder again: a finished run is not repeated, a stopped one goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from flowhn.config import build_model, identity, to_dict
from flowhn.errors import UserError
from flowhn.reporting.record import RunRecord, config_hash, environment, read_record, write_record

RECORD_NAME = "record.json"
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"


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


def cell_name(config: Mapping[str, Any]) -> str:
    """The run's name in tables: the model, with its split strategy for FlowHN (``flowhn_fac``)."""
    if config.get("cell"):
        return str(config["cell"])
    choices = config["choices"]
    return f"{choices['model']}_{choices['split']}" if choices["model"] == "flowhn" else choices["model"]


def plan(cfg: DictConfig) -> Run:
    """Name a composed configuration: its id, its folder. Imports neither torch nor lightning."""
    config = to_dict(cfg)
    run_id = config_hash(identity(config))
    name = f"{cell_name(config)}-{config['choices']['size']}-{config['budget']}-s{config['seed']}"
    return Run(config, run_id, name, Path(config["output_dir"]) / "runs" / f"{name}-{run_id}")


def count_parameters(config: Mapping[str, Any]) -> int:
    """Parameters of a configuration's model, counted on the meta device (nothing is allocated)."""
    import torch

    with torch.device("meta"):
        return build_model(config).num_parameters()


class Workshop:
    """Runs configurations one after another and keeps what they share: the prepared data and the evaluation requests."""

    def __init__(self) -> None:
        self._prepared: dict[str, Any] = {}
        self._evaluators: dict[str, Any] = {}

    def prepare(self, run: Run, on_progress: Callable[[Progress], None], say: Callable[[str], None]) -> Any:
        """Tokenised data of a run's configuration (built on first use, then memory-mapped).

        Raises:
            UserError: the data cannot be read or is too short.
        """
        from flowhn.data import prepare

        config = run.config
        key = config_hash({"data": config["data"], "vocab_size": config["vocab_size"], "seq_len": config["seq_len"]})
        if key not in self._prepared:
            on_progress(Progress("data"))
            self._prepared[key] = prepare(
                config["data"],
                vocab_size=config["vocab_size"],
                seq_len=config["seq_len"],
                cache_dir=Path(config["cache_dir"]) / "data",
                report=lambda text: on_progress(Progress("data", text=text)),
            )
        return self._prepared[key]

    def run(self, run: Run, on_progress: Callable[[Progress], None], say: Callable[[str], None]) -> RunRecord:
        """Train, evaluate and record one configuration; goes on where an earlier call stopped.

        Raises:
            UserError: bad configuration, data, device or checkpoint; another process works in the same folder.
        """
        from filelock import FileLock, Timeout

        if (record := run.record()) is not None:
            return record
        run.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run.folder / "lock")
        try:
            with lock.acquire(timeout=0):
                return self._run_locked(run, on_progress, say)
        except Timeout:
            raise UserError(f"another process works in {run.folder}; wait for it or set output_dir= elsewhere") from None

    def _run_locked(self, run: Run, on_progress: Callable[[Progress], None], say: Callable[[str], None]) -> RunRecord:
        from flowhn.training import seed_everything

        begun = time.monotonic()
        write_json(run.folder / CONFIG_NAME, {"run_id": run.run_id, "name": run.name, "config": run.config})
        prepared = self.prepare(run, on_progress, say)
        seed_everything(run.config["seed"])
        trained = _train(run, prepared, on_progress, say)
        evaluation = self._evaluate(run, prepared, trained, on_progress)
        record = _record(run, prepared, trained, evaluation, time.monotonic() - begun)
        write_record(run.record_path, record)
        # The optimiser's state is worth keeping only until the record exists: two checkpoints of ten 1B models are 275 GB.
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
        return record
