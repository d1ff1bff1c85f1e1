"""When checkpoints are written, what they hold beside Lightning's state, and how a run goes on from one.

Design: checkpoints are taken only right after an optimiser step, with no gradient pending. Lightning's loop progress
is thrown away on saving: a resumed run is a fresh fit whose optimiser-step counter starts at the checkpoint's step
and whose data module starts at the checkpoint's sample. Restoring the progress instead makes Lightning count the
batches of the shortened loader twice, end accumulation early, and skip or repeat validations.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from flowhn.errors import UserError
from flowhn.training.checkpoints import STATE_KEY, CheckpointSearch, checkpoint_path, prune, write_json_durably
from flowhn.training.distributed import same_everywhere
from flowhn.training.interrupts import Stopped, StopRequest
from flowhn.training.steps import StepCallback, ValidationSchedule
from flowhn.training.throughput import ThroughputMonitor

_RESUMES = "resumes.json"
_VOTE_SECONDS = 2.0  # the ranks vote on a timed checkpoint or a signal about that often


def random_state() -> dict[str, Any]:
    """State of every generator (python, numpy, torch, CUDA) in types that ``weights_only`` loading accepts."""
    version, values, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(values), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Undo what happened to the generators since :func:`random_state`; CUDA only with the same number of devices."""
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


class CheckpointKeeper(StepCallback, Checkpoint):
    """Writes checkpoints, restores what Lightning does not, and honours stop requests.

    As a :class:`~lightning.pytorch.callbacks.Checkpoint` it runs after all other callbacks, whose state is then
    complete.

    Args:
        folder: where the checkpoints lie.
        run_id: names the configuration; a checkpoint of another one is refused. Empty: not checked.
        samples_per_step: sequences of one optimiser step over all devices.
        every_n_steps, seconds: write when either has passed since the last one; None switches it off.
        keep: checkpoints kept.
        schedule, throughput, stop: the run's other parts that this one works with.
        search: the checkpoint that this process found to go on from.
    """

    def __init__(
        self,
        *,
        folder: Path,
        run_id: str,
        samples_per_step: int,
        every_n_steps: int | None,
        seconds: float | None,
        keep: int,
        schedule: ValidationSchedule,
        throughput: ThroughputMonitor,
        stop: StopRequest,
        search: CheckpointSearch | None = None,
    ) -> None:
        if keep < 1:
            raise UserError(f"trainer.checkpoint.keep={keep} must be at least 1")
        self.folder = folder
        self.run_id = run_id
        self.samples_per_step = samples_per_step
        self.every_n_steps = every_n_steps
        self.seconds = seconds
        self.keep = keep
        self.resumed = 0
        self._schedule = schedule
        self._throughput = throughput
        self._stop = stop
        self._search = search or CheckpointSearch(None)
        self._begun = time.monotonic()
        self._earlier_seconds = 0.0
        self._saved_step: int | None = None
        self._saved_at = time.monotonic()
        self._random_state: dict[str, Any] | None = None  # of the loaded checkpoint
        self._before_validation: dict[str, Any] | None = None
        self._next_vote = 0  # step
        self._voted_at: tuple[float, int] | None = None  # time and step of the last vote

    def wall_seconds(self) -> float:
        """Seconds spent in this run, over all resumes, up to now."""
        return self._earlier_seconds + time.monotonic() - self._begun

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """
        Raises:
            UserError: the processes of this run would go on from different checkpoints, or have different configurations.
        """
        if trainer.world_size > 1 and stage == "fit":
            step = self._search.path.name if self._search.path else None
            same_everywhere({"configuration": self.run_id, "newest checkpoint": step}, what="run")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Continue at the checkpoint's step and sample.

        Raises:
            UserError: a checkpoint of another configuration or another program.
        """
        own = checkpoint.get(STATE_KEY)
        if not isinstance(own, dict):
            raise UserError(f"the checkpoint in {self.folder} was not written by flowhn; move it away")
        if self.run_id and own["run_id"] != self.run_id:
            raise UserError(
                f"the checkpoint in {self.folder} belongs to another configuration ({own['run_id']}, this is "
                f"{self.run_id}); set output_dir= to a new folder or use --force"
            )
        step = int(own["step"])
        epoch_loop = trainer.fit_loop.epoch_loop
        progress = epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
        progress.ready = progress.completed = step  # trainer.global_step
        epoch_loop._batches_that_stepped = step  # the loggers' step
        trainer.datamodule.set_start(int(own["samples_seen"]))
        self._earlier_seconds = float(own["wall_seconds"])
        self._random_state = own["random_state"]
        self._saved_step = step
        self.resumed = max(int(own["resumed"]), self._resumes_on_disk()) + 1
        if trainer.is_global_zero:
            # Beside the checkpoint: a run killed again before its next checkpoint was resumed all the same.
            write_json_durably(self.folder / _RESUMES, {"resumed": self.resumed})

    def _resumes_on_disk(self) -> int:
        try:
            return int(json.loads((self.folder / _RESUMES).read_text())["resumed"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint.pop("loops", None)
        checkpoint[STATE_KEY] = {
            "step": trainer.global_step,
            "samples_seen": trainer.global_step * self.samples_per_step,
            "run_id": self.run_id,
            "resumed": self.resumed,
            "wall_seconds": self.wall_seconds(),
            # a validation that is stopped halfway is repeated as a whole, with the numbers its loader draws
            "random_state": self._before_validation if trainer.validating else random_state(),
        }

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._random_state is not None:  # the loaders were built by now and may have drawn numbers
            set_random_state(self._random_state)
            self._random_state = None
        self._before_validation = random_state()
        self._schedule.make_up(trainer)
        self._saved_at = time.monotonic()

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        self._stop.defers = True
        stop, late = self._vote(trainer, step)
        if stop:
            self._end(trainer)
        if step in self._schedule.steps:
            self._before_validation = random_state()
        due = self.every_n_steps is not None and step % self.every_n_steps == 0
        if due or late:
            self.save(trainer)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        # The validation at hand is then missing from the curve, and is made up for on resume.
        if self._any_rank(trainer, [float(self._stop.requested)])[0]:
            self._end(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What comes after training (evaluation, the record) can be killed without losing it."""
        self._saved_step = None  # a checkpoint of this very step may lack the last validation
        self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Write a checkpoint of the present step unless there is one, then delete the old ones.

        Not after a skipped step: should the steps after it be skipped too, the last checkpoint is of a good one.
        """
        step = trainer.global_step
        skipped = getattr(trainer.lightning_module, "step_was_skipped", None)
        if step != self._saved_step and not (skipped is not None and bool(skipped)):
            with self._throughput.paused():
                trainer.save_checkpoint(checkpoint_path(self.folder, step))
                if trainer.is_global_zero:
                    prune(self.folder, newest=step, keep=self.keep)
        self._saved_step, self._saved_at = step, time.monotonic()

    def _end(self, trainer: Trainer) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self.save(trainer)
        raise Stopped

    def _vote(self, trainer: Trainer, step: int) -> tuple[bool, bool]:
        """Whether to stop, and whether a timed checkpoint is due; one rank's wish is done by all, at the same step.

        Several ranks vote about every two seconds, so that a vote costs little beside its steps and a signal is heeded soon.
        """
        now = time.monotonic()
        late = self.seconds is not None and now - self._saved_at >= self.seconds
        if trainer.world_size == 1:
            return self._stop.requested, late
        if step < self._next_vote:
            return False, False
        per_step = 0.0
        if self._voted_at is not None and step > self._voted_at[1]:
            per_step = (now - self._voted_at[0]) / (step - self._voted_at[1])
        stop, late, slowest = self._any_rank(trainer, [float(self._stop.requested), float(late), per_step])
        self._next_vote = step + (max(1, min(100, int(_VOTE_SECONDS / slowest))) if slowest > 0 else 1)
        self._voted_at = (now, step)
        return bool(stop), bool(late)

    @staticmethod
    def _any_rank(trainer: Trainer, values: list[float]) -> list[float]:
        """The largest of each value over all ranks."""
        if trainer.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float32, device=trainer.strategy.root_device)
        return trainer.strategy.reduce(tensor, reduce_op="max").tolist()
