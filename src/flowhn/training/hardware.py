"""What a run computes on: device, number of devices, precision, compilation; and how its batch is cut up for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from flowhn.errors import UserError
from flowhn.training.distributed import check_launch, outside_launch

_PRECISIONS = ("bf16-mixed", "16-mixed", "32-true", "bf16-true", "64-true")


@dataclass(frozen=True)
class Hardware:
    """Resolved choice; ``n_devices`` counts all nodes."""

    device: torch.device
    n_devices: int
    precision: str
    compile: bool

    @property
    def accelerator(self) -> str:
        """Lightning's name of the device type."""
        return self.device.type


def resolve_hardware(config: Mapping[str, Any]) -> Hardware:
    """Resolve ``device``, ``precision`` and ``compile`` of a run's config, and ``devices`` and ``num_nodes`` of its
    trainer part.

    ``trainer.devices=auto`` takes what torchrun or Slurm started on this node, else all CUDA devices, else one.
    ``device=auto`` takes CUDA when PyTorch sees it, else the CPU. ``precision=auto`` is bf16-mixed on a CUDA device
    that has bf16 and 32-true elsewhere; ``compile=auto`` is true on CUDA.

    Raises:
        UserError: a device that is not there, another number of processes than devices, or a value that is not known.
    """
    trainer = config.get("trainer") or {}
    kind = _device_type(str(config.get("device", "auto")))
    devices = trainer.get("devices", 1)
    available = torch.cuda.device_count() if kind == "cuda" else 1
    launch = outside_launch()
    count = (
        _positive("trainer.devices", devices) if devices != "auto" else launch.local_world_size if launch else available
    )
    if kind == "cuda" and count > available:
        raise UserError(f"trainer.devices={count} asks for more CUDA devices than the {available} that PyTorch sees")
    if kind == "mps" and count > 1:
        raise UserError(f"trainer.devices={count} is not possible with device=mps; use trainer.devices=1")
    precision = str(config.get("precision", "auto"))
    if precision == "auto":
        precision = "bf16-mixed" if kind == "cuda" and torch.cuda.is_bf16_supported() else "32-true"
    if precision not in _PRECISIONS:
        raise UserError(f"precision={precision} is not known; use auto or one of {', '.join(_PRECISIONS)}")
    if precision == "16-mixed" and trainer.get("strategy") == "fsdp":
        raise UserError("precision=16-mixed is not possible with trainer=fsdp; use bf16-mixed, 32-true or trainer=ddp")
    num_nodes = _positive("trainer.num_nodes", trainer.get("num_nodes", 1))
    check_launch(count * num_nodes, num_nodes)
    compiles = config.get("compile", "auto")
    if compiles not in ("auto", True, False):
        raise UserError(f"compile={compiles} is not known; use auto, true or false")
    return Hardware(
        device=torch.device(kind),
        n_devices=count * num_nodes,
        precision=precision,
        compile=kind == "cuda" if compiles == "auto" else compiles,
    )


def _positive(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{key}={value} must be a whole number of at least 1")
    return value


def _device_type(device: str) -> str:
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device=cuda was asked for and PyTorch sees no CUDA device; use device=cpu, or install a CUDA build "
            "of torch and check nvidia-smi"
        )
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps was asked for and PyTorch sees no Apple GPU; use device=cpu")
    if device not in ("cpu", "cuda", "mps"):
        raise UserError(f"device={device} is not known; use auto, cpu, cuda or mps")
    return device


def batch_plan(
    *, global_batch_tokens: int, seq_len: int, micro_batch_size: int | None = None, n_devices: int = 1
) -> tuple[int, int]:
    """Cut the batch of one optimiser step into ``(micro_batch_size, accumulate)`` for each device.

    ``global_batch_tokens == micro_batch_size * accumulate * n_devices * seq_len``; the step is the same for every
    such cut.

    Args:
        micro_batch_size: sequences of one forward pass on one device; None takes the whole share of a device.

    Raises:
        UserError: the batch does not divide.
    """
    for key, value in (("global_batch_tokens", global_batch_tokens), ("seq_len", seq_len)):
        _positive(key, value)
    sequences, rest = divmod(global_batch_tokens, seq_len)
    if rest or not sequences:
        nearest = max(1, round(global_batch_tokens / seq_len)) * seq_len
        raise UserError(
            f"global_batch_tokens={global_batch_tokens} is not a multiple of seq_len={seq_len}; use {nearest}"
        )
    share, rest = divmod(sequences, n_devices)
    if rest:
        raise UserError(
            f"global_batch_tokens={global_batch_tokens} is {sequences} sequences of seq_len={seq_len}, which "
            f"{n_devices} devices (trainer.devices x trainer.num_nodes) cannot share evenly; use a multiple of "
            f"{n_devices * seq_len}"
        )
    micro = share if micro_batch_size is None else _positive("micro_batch_size", micro_batch_size)
    if share % micro:
        divisors = [d for d in range(1, share + 1) if share % d == 0]
        fit = max([d for d in divisors if d < micro], default=share)
        raise UserError(
            f"micro_batch_size={micro} does not divide the {share} sequences of a device "
            f"(global_batch_tokens={global_batch_tokens}, seq_len={seq_len}); use {fit}"
        )
    return micro, share // micro


def validation_steps(total_steps: int, points: int) -> tuple[int, ...]:
    """Optimiser steps after which to validate: ``points`` of them, evenly spaced, the last one at the end of a run."""
    if points < 0:
        raise UserError(f"val_points={points} must be 0 or more")
    return tuple(sorted({max(1, round(total_steps * index / points)) for index in range(1, points + 1)}))
