"""Steps that go wrong: losses or gradients that are not finite, and spikes of the loss.

The optimiser step of a loss or gradient that is not finite is skipped on the device, without waiting for it
(``LitLM.configure_gradient_clipping``); here such steps are counted, and three in a row end the run.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from flowhn.errors import UserError
from flowhn.training.checkpoints import write_json_durably

IN_A_ROW = 3  # that many skipped steps end the run
BAD_STEPS_NAME = "not-finite.json"
_SPIKE_HISTORY, _SPIKE_LEAST = 50, 20  # steps a loss is compared with, at most and at least
_SPIKE_DEVIATIONS, _SPIKE_NATS = 6.0, 0.5  # a spike is above the mean by that many standard deviations and that much


class SkipWatch:
    """Tells within ``LAG`` steps that ``IN_A_ROW`` steps in a row were skipped, without emptying the device's queue.

    The count of such steps lives on the device. On CUDA each step starts a copy of it to pinned memory, and the copy of
    ``LAG`` steps ago is looked at: it waits only for a device that is further behind than that. All ranks look at the same
    step's count, which is the same on all of them, so that all stop at the same step.
    """

    LAG = 3

    def __init__(self) -> None:
        self._copies: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()

    def see(self, in_a_row: torch.Tensor) -> bool:
        """Take the count () after an optimiser step; whether it is time to stop."""
        if in_a_row.device.type != "cuda":
            return int(in_a_row) >= IN_A_ROW  # the optimiser has waited for it already
        copy, event = torch.empty_like(in_a_row, device="cpu", pin_memory=True), torch.cuda.Event()
        copy.copy_(in_a_row, non_blocking=True)
        event.record()
        self._copies.append((copy, event))
        if len(self._copies) <= self.LAG:
            return False
        copy, event = self._copies.popleft()
        event.synchronize()
        return int(copy) >= IN_A_ROW


class LossGuard:
    """Sees the loss of every optimiser step, in order.

    Args:
        tokens_per_step: tokens of one optimiser step over all devices.
        total_steps: optimiser steps of the run.
        folder: where the batches of a run that ends are noted.
        rows_of_step: training rows of an optimiser step, for that note; None leaves them out.
    """

    def __init__(
        self,
        *,
        tokens_per_step: int,
        total_steps: int,
        folder: Path,
        rows_of_step: Callable[[int], Sequence[int]] | None = None,
    ) -> None:
        self.tokens_per_step = tokens_per_step
        self.total_steps = total_steps
        self.folder = folder
        self.skipped: list[int] = []  # steps
        self.spikes: list[list[float]] = []  # [tokens, loss]
        self.notes = True  # whether this process writes; of several, one does
        self._rows_of_step = rows_of_step
        self._history: deque[float] = deque(maxlen=_SPIKE_HISTORY)

    def see(self, step: int, loss: float) -> bool:
        """Take the loss of optimiser step ``step`` (from 1), NaN or infinite where the step was skipped.

        Returns:
            Whether it is finite.

        Raises:
            UserError: the third step in a row that is not. Their steps and training rows are in ``not-finite.json``.
        """
        if not math.isfinite(loss):
            self.skipped.append(step)
            last = self.skipped[-IN_A_ROW:]
            if len(last) == IN_A_ROW and last[-1] - last[0] == IN_A_ROW - 1:
                self._end(last)
            return False
        if len(self._history) >= _SPIKE_LEAST:
            mean, deviation = statistics.fmean(self._history), statistics.pstdev(self._history)
            if loss > mean + max(_SPIKE_NATS, _SPIKE_DEVIATIONS * deviation):
                self.spikes.append([step * self.tokens_per_step, loss])
        self._history.append(loss)
        return True

    def _end(self, steps: list[int]) -> None:
        path = self.folder / BAD_STEPS_NAME
        if self.notes:
            rows_of = self._rows_of_step
            rows = {str(step): [int(row) for row in rows_of(step)] for step in steps} if rows_of else {}
            noted = {"steps": steps, "training_rows": rows, "skipped_before": self.skipped[:-IN_A_ROW]}
            write_json_durably(path, noted)
        raise UserError(
            f"loss or gradient was not finite in steps {steps[0]} to {steps[-1]} of {self.total_steps}; lower lr= or set "
            f"clip_grad_norm= and run again (their training rows: {path}; the last checkpoint is whole)"
        )

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"skipped": list(self.skipped), "spikes": list(self.spikes), "history": list(self._history)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`."""
        self.skipped = [int(step) for step in state["skipped"]]
        self.spikes = [list(point) for point in state["spikes"]]
        self._history = deque((float(loss) for loss in state["history"]), maxlen=_SPIKE_HISTORY)
