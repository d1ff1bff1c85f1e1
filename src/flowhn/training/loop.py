"""``fit``: one training run with Lightning, from wherever it stopped to its last step."""

from __future__ import annotations

import logging
import math
import signal
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch import seed_everything as lightning_seed_everything
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import DoublePrecision

from flowhn.errors import UserError
from flowhn.reporting.record import MAX_TRAIN_POINTS
from flowhn.training.checkpoints import AtomicCheckpointIO, latest_valid_checkpoint
from flowhn.training.curves import CurveRecorder
from flowhn.training.distributed import build_strategy, cluster_plugins, process_group
from flowhn.training.guard import LossGuard
from flowhn.training.hardware import Hardware
from flowhn.training.interrupts import Stopped, StopRequest
from flowhn.training.resume import CheckpointKeeper
from flowhn.training.sharded import full_weights
from flowhn.training.steps import TRAINER_OPTIONS, ValidationSchedule
from flowhn.training.throughput import ThroughputMonitor

CHECKPOINTS = "checkpoints"  # folder inside a run's folder
_TRAIN_POINTS = 500  # of a run's curve when trainer.log_every is null
_LOG_EVERY_CUDA = 10  # reading a loss waits for the GPU


@dataclass(frozen=True)
class FitResult:
    """What a run produced; fields as in the run record.

    Attributes:
        curves: ``{"train": [[tokens, loss]], "val": [[tokens, loss, seconds]], "spikes": [[tokens, loss]],
            "skipped_steps": [step]}``.
        throughput, memory: see :class:`~flowhn.training.throughput.ThroughputMonitor`.
        resumed: how often the run went on from a checkpoint.
        wall_seconds: time spent in ``fit`` over all resumes, without what was lost to kills.
        train_seconds: of these, training proper.
        steps: optimiser steps done.
        skipped: checkpoints that were not usable, with the reason.
        weights: of a sharded network, whole and on the CPU; None where the network itself has them.
    """

    curves: dict[str, list[Any]]
    throughput: dict[str, Any]
    memory: dict[str, Any]
    resumed: int
    wall_seconds: float
    train_seconds: float
    steps: int
    skipped: list[tuple[Path, str]] = field(default_factory=list)
    weights: dict[str, torch.Tensor] | None = None


def seed_everything(seed: int) -> None:
    """Seed python, numpy, torch and the loader workers."""
    with _quiet():
        lightning_seed_everything(seed, workers=True, verbose=False)


def fit(
    lit: LightningModule,
    datamodule: LightningDataModule,
    *,
    hardware: Hardware,
    trainer_cfg: Mapping[str, Any],
    total_steps: int,
    tokens_per_step: int,
    seq_len: int,
    run_dir: Path,
    samples_per_step: int | None = None,
    run_id: str = "",
    accumulate: int = 1,
    val_steps: Sequence[int] = (),
    clip_grad_norm: float | None = None,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] = (),
    on_progress: Callable[[int, int, float | None, float | None], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> FitResult:
    """Train to ``total_steps`` optimiser steps, going on from the newest whole checkpoint in ``run_dir/checkpoints``.

    On the CPU a run stopped at any moment and called again ends with the same losses and weights, bit for bit.

    Args:
        lit: the module, with ``net.flops(n_tokens)`` for MFU.
        datamodule: serves micro-batches and has ``set_start(samples_seen)``.
        hardware: from :func:`~flowhn.training.hardware.resolve_hardware`.
        trainer_cfg: the ``trainer`` part of the config, see ``configs/trainer/auto.yaml``.
        tokens_per_step: tokens of one optimiser step over all devices, padding left out.
        samples_per_step: sequences of one optimiser step over all devices; None: ``tokens_per_step / seq_len``.
        accumulate: micro-batches of one optimiser step on one device.
        val_steps: optimiser steps after which to validate; empty: never.
        on_progress: called about four times a second with (step, total_steps, tokens/s, latest train loss).
        say: called with one line for each event worth telling (a skipped checkpoint, a resume).

    Raises:
        UserError: a checkpoint of another run, a full disk, losses that are not finite, too little device memory.
        KeyboardInterrupt, SystemExit(143): after SIGINT, SIGTERM, with a checkpoint of the last finished step written.
    """
    say = say or (lambda text: None)
    samples_per_step = samples_per_step or tokens_per_step // seq_len
    run_dir.mkdir(parents=True, exist_ok=True)
    folder = run_dir / CHECKPOINTS
    search = latest_valid_checkpoint(folder, content=True)
    for path, reason in search.skipped:
        say(f"skipped the checkpoint {path}: {reason}")
    if search.path is not None:
        say(f"going on from {search.path}")
    if hardware.precision == "64-true":
        lit.double()  # Lightning does it after it has read a checkpoint, whose weights would be rounded
    stop = StopRequest()
    throughput = _throughput(
        trainer_cfg.get("throughput") or {}, total_steps, tokens_per_step, 3 * lit.net.flops(seq_len) * samples_per_step
    )
    recorder = CurveRecorder(
        tokens_per_step=tokens_per_step,
        log_every=_log_every(trainer_cfg.get("log_every"), total_steps, hardware, say),
        total_steps=total_steps,
        throughput=throughput,
        guard=LossGuard(
            tokens_per_step=tokens_per_step,
            total_steps=total_steps,
            folder=run_dir,
            rows_of_step=_rows_of_step(datamodule, samples_per_step),
        ),
        on_progress=on_progress,
    )
    schedule = ValidationSchedule(steps=val_steps, is_done=recorder.has_validation)
    keeping = trainer_cfg.get("checkpoint") or {}
    keeper = CheckpointKeeper(
        folder=folder,
        run_id=run_id,
        samples_per_step=samples_per_step,
        every_n_steps=keeping.get("every_n_steps"),
        seconds=keeping.get("seconds"),
        keep=keeping.get("keep", 2),
        schedule=schedule,
        throughput=throughput,
        stop=stop,
        search=search,
    )
    with _quiet(), stop, process_group(hardware.n_devices):
        trainer = _trainer(
            hardware,
            trainer_cfg,
            max_steps=total_steps,
            default_root_dir=run_dir,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=clip_grad_norm,
            logger=list(loggers) or False,
            limit_val_batches=None if val_steps else 0,
            callbacks=[throughput, recorder, schedule, *callbacks, keeper],
        )
        _run(trainer, lit, datamodule, search.path, schedule, stop)
        weights = full_weights(lit.net) if trainer_cfg.get("strategy") == "fsdp" else None
    return FitResult(
        curves=recorder.curves(),
        throughput=throughput.result(),
        memory=throughput.memory(),
        resumed=keeper.resumed,
        wall_seconds=keeper.wall_seconds(),
        train_seconds=throughput.elapsed(),
        steps=trainer.global_step,
        skipped=search.skipped,
        weights=weights,
    )


def _rows_of_step(datamodule: LightningDataModule, samples: int) -> Callable[[int], list[int]] | None:
    """Training rows of an optimiser step (from 1), for a data module that knows the row of each sample."""
    row_of = getattr(datamodule, "row_of_sample", None)
    if row_of is None:
        return None
    return lambda step: [row_of(sample) for sample in range((step - 1) * samples, step * samples)]


def _run(
    trainer: Trainer,
    lit: LightningModule,
    datamodule: LightningDataModule,
    checkpoint: Path | None,
    schedule: ValidationSchedule,
    stop: StopRequest,
) -> None:
    try:
        trainer.fit(lit, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
        if schedule.is_missing(trainer.global_step):  # stopped between the last step and its validation
            trainer.validate(lit, datamodule=datamodule, verbose=False)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the device ran out of memory; lower micro_batch_size= (the global batch stays the same)"
        ) from error
    except UserError:
        raise
    except BaseException as error:
        # Lightning turns KeyboardInterrupt into SystemExit(1), and raises its own exception on SIGTERM; whatever the
        # loop or a loader worker raised after a signal, the caller gets the signal's usual meaning.
        if stop.requested or isinstance(error, Stopped):
            stop.raise_for_caller()
            # another process of the run got the signal; the first one ends with the code that a scheduler sees
            raise SystemExit(128 + signal.SIGTERM if trainer.is_global_zero else 0) from None
        raise
    stop.raise_for_caller()  # a signal after the last step; its checkpoint is written


def _trainer(hardware: Hardware, cfg: Mapping[str, Any], *, callbacks: list[Callback], **options: Any) -> Trainer:
    num_nodes = cfg.get("num_nodes", 1)
    bar = [RichProgressBar()] if cfg.get("progress_bar") else []
    strategy = cfg.get("strategy", "auto")
    # Lightning refuses this precision by name for sharded networks, and takes it as a plugin.
    double = [DoublePrecision()] if (strategy, hardware.precision) == ("fsdp", "64-true") else []
    trainer = Trainer(
        accelerator=hardware.accelerator,
        devices=hardware.n_devices // num_nodes,
        num_nodes=num_nodes,
        strategy=build_strategy(strategy, n_devices=hardware.n_devices, timeout_minutes=cfg.get("timeout_minutes", 10)),
        precision=None if double else hardware.precision,
        deterministic=cfg.get("deterministic", False),
        max_epochs=-1,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        callbacks=[*bar, *callbacks],
        plugins=[AtomicCheckpointIO(), *double, *cluster_plugins(hardware.n_devices)],
        enable_progress_bar=bool(bar),
        enable_model_summary=False,
        use_distributed_sampler=False,
        **TRAINER_OPTIONS,
        **options,
    )
    if hardware.n_devices > 1:
        # Lightning's handler of SIGTERM broadcasts at once, in the middle of a step's own collectives, where it can hang for
        # ever. The processes vote on stopping between steps (see resume.py), which needs StopRequest's handler alone.
        trainer._signal_connector.register_signal_handlers = lambda: None
    return trainer


def _throughput(
    cfg: Mapping[str, Any], total_steps: int, tokens_per_step: int, flops_per_step: int
) -> ThroughputMonitor:
    """Windows as configured; a short run has a shorter warm-up and shorter windows rather than none.

    ``flops_per_step`` is three times the forward pass, since the backward pass costs twice that, with padding.
    """
    warmup = min(cfg.get("warmup_steps", 5), max(1, total_steps // 3))
    window = min(cfg.get("window_steps", 10), max(1, (total_steps - warmup) // 3))
    return ThroughputMonitor(
        tokens_per_step=tokens_per_step,
        flops_per_token=flops_per_step / tokens_per_step,
        warmup_steps=warmup,
        window_steps=window,
        peak=cfg.get("peak_flops"),
    )


def _log_every(configured: int | None, total_steps: int, hardware: Hardware, say: Callable[[str], None]) -> int:
    """Steps per point of the curve. A point per step of a long run would make logs and checkpoints grow without end, so
    ``MAX_TRAIN_POINTS`` bound it; a point is the mean over its steps, and nothing is left out."""
    if configured is not None:
        if configured < 1:
            raise UserError(f"trainer.log_every={configured} must be at least 1")
        bounded = max(configured, math.ceil(total_steps / MAX_TRAIN_POINTS))
        if bounded > configured:
            say(
                f"trainer.log_every={configured} would give {total_steps // configured:,} points; logs are kept below "
                f"{MAX_TRAIN_POINTS:,}, with one of every {bounded} steps"
            )
        return bounded
    least = _LOG_EVERY_CUDA if hardware.device.type == "cuda" else 1
    return max(least, total_steps // _TRAIN_POINTS)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's banners, tips and hints about loader workers away from the display; errors still show."""
    names = ("lightning.pytorch", "lightning.fabric", "lightning", "lightning_utilities")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module=r"lightning(\.|$)")
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        warnings.filterwarnings("ignore", message=".*treespec.*")
        warnings.filterwarnings("ignore", message=".*set_vital.*")  # torchdata's stateful loader with torch 2.13
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
