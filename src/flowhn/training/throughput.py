"""Tokens per second, model FLOPs utilisation and peak memory of a training run."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

from flowhn.benchmark.peaks import compute_dtype, peak_flops
from flowhn.benchmark.timing import device_synchronize
from flowhn.training.steps import StepCallback


class ThroughputMonitor(StepCallback):
    """Times windows of optimiser steps after a warm-up; the median window counts.

    The device is synchronised only where a window begins, ends or is interrupted. Validation and checkpoint writing are
    left out (:meth:`paused`); loading data, logging and everything else between steps is in. Windows survive a resume;
    each process warms up anew.

    Args:
        tokens_per_step: tokens of one optimiser step over all devices.
        flops_per_token: training FLOPs per token (three times the forward pass), or None for no MFU.
        warmup_steps: untimed steps at the start of each process (compilation, allocator, autotuning).
        window_steps: optimiser steps per window.
        peak: configured peak FLOP/s of one device, None for the table.
    """

    def __init__(
        self,
        *,
        tokens_per_step: int,
        flops_per_token: float | None,
        warmup_steps: int = 5,
        window_steps: int = 10,
        peak: float | None = None,
    ) -> None:
        self.tokens_per_step = tokens_per_step
        self.flops_per_token = flops_per_token
        self.warmup_steps = warmup_steps
        self.window_steps = window_steps
        self.windows: list[float] = []  # seconds of window_steps steps each
        self.train_seconds = 0.0  # training proper, over all resumes
        self.peak_bytes = 0
        self._configured_peak = peak
        self._device = torch.device("cpu")
        self._devices = 1
        self._precision = "32-true"
        self._started: float | None = None  # running since; None while paused
        self._window_seconds = 0.0
        self._window_count = 0
        self._warm = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._device = trainer.strategy.root_device
        self._devices = trainer.world_size
        self._precision = str(trainer.precision)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._window_seconds, self._window_count, self._warm = 0.0, 0, 0
        _reset_peak_memory(self._device)
        self._start()

    def on_step_end(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        if self._warm < self.warmup_steps:
            self._warm += 1
            if self._warm == self.warmup_steps:
                self._stop()
                self._window_seconds = 0.0
                self._start()
            return
        self._window_count += 1
        if self._window_count == self.window_steps:
            self._stop()
            self.windows.append(self._window_seconds)
            self._window_seconds, self._window_count = 0.0, 0
            self._start()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()
        self.peak_bytes = max(self.peak_bytes, _peak_memory(self._device))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            _reset_peak_memory(self._device)
            self._start()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()
        self.peak_bytes = max(self.peak_bytes, _peak_memory(self._device))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what happens inside out of every time, for example writing a checkpoint."""
        was_running = self._started is not None
        self._stop()
        try:
            yield
        finally:
            if was_running:
                self._start()

    def _start(self) -> None:
        device_synchronize(self._device)
        self._started = time.perf_counter()

    def _stop(self) -> None:
        if self._started is not None:
            device_synchronize(self._device)
            elapsed = time.perf_counter() - self._started
            self._window_seconds += elapsed
            self.train_seconds += elapsed
            self._started = None

    def elapsed(self) -> float:
        """Seconds of training so far, over all resumes."""
        return self.train_seconds + (time.perf_counter() - self._started if self._started is not None else 0.0)

    def state_dict(self) -> dict[str, Any]:
        peak = max(self.peak_bytes, _peak_memory(self._device))
        windows = [list(self.windows), self.window_steps]
        return {"windows": windows, "train_seconds": self.elapsed(), "peak_bytes": peak}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        seconds, window_steps = state_dict["windows"]
        self.windows = [second * self.window_steps / window_steps for second in seconds]
        self.train_seconds = float(state_dict["train_seconds"])
        self.peak_bytes = int(state_dict["peak_bytes"])

    def result(self) -> dict[str, Any]:
        """The record's throughput fields; a value is None where nothing was timed or the peak is unknown."""
        peak, source = peak_flops(
            self._device, compute_dtype(self._precision, self._device.type), configured=self._configured_peak
        )
        step_seconds = statistics.median(self.windows) / self.window_steps if self.windows else None
        tps = self.tokens_per_step / step_seconds if step_seconds else None
        mfu = None
        if tps and peak and self.flops_per_token:
            mfu = self.flops_per_token * tps / self._devices / peak
        return {
            "tps": tps,
            "n_windows": len(self.windows),
            "step_seconds": step_seconds,
            "flops_per_token": self.flops_per_token,
            "mfu": mfu,
            "peak_flops": peak,
            "peak_source": source,
        }

    def memory(self) -> dict[str, Any]:
        """The record's memory fields: CUDA allocations, else the process's resident set, while training."""
        return {"peak_bytes": self.peak_bytes, "kind": "cuda" if self._device.type == "cuda" else "rss"}


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        # Linux resets the high-water mark of a process that writes 5 here (man proc, clear_refs). Elsewhere the mark
        # is that of the whole process, which also held earlier runs.
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def _peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated (CUDA) or resident (others) since the last reset."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
