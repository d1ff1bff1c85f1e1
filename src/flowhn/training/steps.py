"""A callback base that knows optimiser steps, and the callback that validates at chosen ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

_NEVER = 2**62


class StepCallback(Callback):
    """Calls :meth:`on_micro_batch` after every forward and backward, :meth:`on_step_end` after every optimiser step."""

    _last_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.on_micro_batch(trainer, pl_module, outputs, batch)
        step = trainer.global_step
        if step > self._last_step:
            self._last_step = step
            self.on_step_end(trainer, pl_module, step)

    def on_micro_batch(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        """After one micro-batch; ``outputs`` is what the training step returned."""

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """After optimiser step number ``step`` (counted from 1, over all resumes)."""


class ValidationSchedule(StepCallback):
    """Validates after the given optimiser steps, each exactly once over all resumes of a run.

    Lightning's own interval counts batches since the process began, so a resumed run would validate at other steps.
    Here ``trainer.val_check_batch`` is set to the batch at hand when a step is due, and out of reach otherwise. A
    validation that is due at a checkpoint's step but missing from its curve is made up for before training goes on.

    Args:
        steps: optimiser steps after which to validate.
        is_done: tells whether the validation after a step is on record.
    """

    def __init__(self, *, steps: Iterable[int], is_done: Callable[[int], bool]) -> None:
        self.steps = frozenset(steps)
        self._is_done = is_done

    def is_missing(self, step: int) -> bool:
        """Whether the validation after this step is due and not on record."""
        return step in self.steps and not self._is_done(step)

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        trainer.val_check_batch = trainer.fit_loop.total_batch_idx + 1 if step in self.steps else _NEVER

    def make_up(self, trainer: Trainer) -> None:
        """Run the validation that the loaded checkpoint's step still lacks; called when training starts."""
        if self.is_missing(trainer.global_step):
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True


TRAINER_OPTIONS: dict[str, Any] = {"val_check_interval": _NEVER, "check_val_every_n_epoch": None}
