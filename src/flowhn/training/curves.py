"""Loss curves that lose nothing: every optimiser step counts, over any number of resumes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

from flowhn.errors import UserError
from flowhn.training.guard import LossGuard, SkipWatch
from flowhn.training.steps import StepCallback
from flowhn.training.throughput import ThroughputMonitor

_REPORT_SECONDS = 0.25


class CurveRecorder(StepCallback):
    """Records ``train`` points ``[tokens, loss]`` and ``val`` points ``[tokens, loss, seconds of training]``.

    A train point is the mean loss of the ``log_every`` optimiser steps up to it (fewer at the end of the run), without
    skipped steps; a point of skipped steps alone is left out. Losses stay on the device until a point is due or too many
    steps in a row were skipped, so that no step waits for the device. Points also go to Lightning's loggers.

    Args:
        tokens_per_step: tokens of one optimiser step over all devices.
        log_every: optimiser steps per train point.
        total_steps: optimiser steps of the whole run.
        throughput: gives the seconds of training of a validation point.
        guard: sees the loss of every step.
        on_progress: called about four times a second with (step, total_steps, tokens/s, latest train loss).
    """

    def __init__(
        self,
        *,
        tokens_per_step: int,
        log_every: int,
        total_steps: int,
        throughput: ThroughputMonitor,
        guard: LossGuard,
        on_progress: Callable[[int, int, float | None, float | None], None] | None = None,
    ) -> None:
        self.tokens_per_step = tokens_per_step
        self.log_every = log_every
        self.total_steps = total_steps
        self.train: list[list[float]] = []
        self.val: list[list[float]] = []
        self._throughput = throughput
        self._guard = guard
        self._watch = SkipWatch()
        self._on_progress = on_progress
        self._reported: tuple[float, int] | None = None  # (training seconds, step) of the last report
        self._shown = 0.0
        self._micro: list[torch.Tensor] = []  # losses of this step's micro-batches, on the device
        self._waiting: list[torch.Tensor] = []  # losses of steps not fetched yet, on the device
        self._fetched: list[float] = []  # losses of steps since the last point
        self._trainer: Trainer | None = None

    def has_validation(self, step: int) -> bool:
        """Whether the validation after this optimiser step is on record."""
        return any(point[0] == step * self.tokens_per_step for point in self.val)

    def curves(self) -> dict[str, list[Any]]:
        """Both curves, spikes ``[tokens, loss]`` and skipped steps, as the record stores them."""
        skipped = self._guard.skipped
        return {"train": self.train, "val": self.val, "spikes": self._guard.spikes, "skipped_steps": skipped}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._trainer = trainer
        self._guard.notes = trainer.is_global_zero

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._replay(trainer)

    def on_micro_batch(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        self._micro.append(outputs["loss_value"])

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        loss = torch.stack(self._micro).mean() if len(self._micro) > 1 else self._micro[0]
        self._micro = []
        skipped = getattr(pl_module, "step_was_skipped", None)
        self._waiting.append(loss if skipped is None else torch.where(skipped, torch.nan, loss))
        in_a_row = getattr(pl_module, "skipped_in_a_row", None)
        too_many = in_a_row is not None and self._watch.see(in_a_row)
        is_due = step % self.log_every == 0 or step == self.total_steps
        if too_many or is_due:
            self._fetch(step)
        if is_due:
            if self._fetched:
                mean = math.fsum(self._fetched) / len(self._fetched)
                self.train.append([step * self.tokens_per_step, mean])
                metrics = {"train/loss": mean, "lr": trainer.optimizers[0].param_groups[0]["lr"]}
                self._log(trainer, metrics, step)
            self._fetched = []
        self._report(step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        loss = pl_module.validation_loss()
        self.val.append([step * self.tokens_per_step, loss, self._throughput.elapsed()])
        self._log(trainer, {"val/loss": loss}, step)
        self._reported = None  # the pause is not training

    def _fetch(self, step: int) -> None:
        """Bring the waiting losses to the host, averaged over ranks.

        Raises:
            UserError: too many steps in a row were skipped.
        """
        if not self._waiting:
            return
        losses = torch.stack(self._waiting)
        if self._trainer is not None and self._trainer.world_size > 1:
            losses = self._trainer.strategy.reduce(losses, reduce_op="mean")
        self._waiting = []
        values = losses.tolist()
        try:
            for number, value in enumerate(values, start=step - len(values) + 1):
                if self._guard.see(number, value):
                    self._fetched.append(value)
        except UserError:
            if self._trainer is not None:  # the first process writes down the rows before another one's end ends it
                self._trainer.strategy.barrier()
            raise

    def _report(self, step: int) -> None:
        now = time.monotonic()
        if self._on_progress is None or (now - self._shown < _REPORT_SECONDS and step != self.total_steps):
            return
        seconds = self._throughput.elapsed()
        rate = None
        if self._reported is not None and seconds > self._reported[0]:
            rate = (step - self._reported[1]) * self.tokens_per_step / (seconds - self._reported[0])
        self._on_progress(step, self.total_steps, rate, self.train[-1][1] if self.train else None)
        self._shown, self._reported = now, (seconds, step)

    def _log(self, trainer: Trainer, metrics: dict[str, float], step: int) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({**metrics, "tokens": step * self.tokens_per_step}, step=step)

    def _replay(self, trainer: Trainer) -> None:
        """Lightning's CSV logger starts its file anew in each process; write the earlier points again."""
        points = [(tokens, {"train/loss": loss}) for tokens, loss in self.train]
        points += [(tokens, {"val/loss": loss}) for tokens, loss, _ in self.val]
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                for tokens, metrics in sorted(points, key=lambda point: point[0]):
                    logger.log_metrics({**metrics, "tokens": tokens}, step=int(tokens // self.tokens_per_step))

    def state_dict(self) -> dict[str, Any]:
        self._fetch(self._last_step)
        state = {"train": list(self.train), "val": list(self.val), "since_point": list(self._fetched)}
        return {**state, "guard": self._guard.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.train = [list(point) for point in state_dict["train"]]
        self.val = [list(point) for point in state_dict["val"]]
        self._fetched = [float(value) for value in state_dict["since_point"]]
        self._guard.load_state_dict(state_dict["guard"])
