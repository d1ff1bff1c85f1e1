"""Training with Lightning: the module, exact resume, loss curves, throughput."""

from flowhn.training.checkpoints import AtomicCheckpointIO, CheckpointSearch, latest_valid_checkpoint
from flowhn.training.curves import CurveRecorder
from flowhn.training.hardware import Hardware, batch_plan, resolve_hardware, validation_steps
from flowhn.training.lit_lm import LitLM
from flowhn.training.loop import FitResult, fit, seed_everything
from flowhn.training.loss import token_loss, training_loss
from flowhn.training.resume import CheckpointKeeper
from flowhn.training.throughput import ThroughputMonitor

__all__ = [
    "AtomicCheckpointIO",
    "CheckpointKeeper",
    "CheckpointSearch",
    "CurveRecorder",
    "FitResult",
    "Hardware",
    "LitLM",
    "ThroughputMonitor",
    "batch_plan",
    "fit",
    "latest_valid_checkpoint",
    "resolve_hardware",
    "seed_everything",
    "token_loss",
    "training_loss",
    "validation_steps",
]
