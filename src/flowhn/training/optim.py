"""Optimiser and learning-rate schedule.

Weight decay follows mamba_ssm and nanoGPT: every tensor of two or more dimensions decays (linear and convolution
weights, embeddings, the LM head), except those marked ``_no_weight_decay`` by their module (A_log, D, dt_bias); norms
and biases, which are one-dimensional, never do. The published training script decays every parameter, norms and A_log
included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from flowhn.errors import UserError

_FUSED_DEVICES = ("cuda", "cpu", "mps")


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, decayed and not; tied parameters are counted once, frozen ones left out."""
    decayed, plain = [], []
    for parameter in module.parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and not getattr(parameter, "_no_weight_decay", False)
            (decayed if decays else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(module: nn.Module, config: Mapping[str, Any]) -> torch.optim.AdamW:
    """AdamW from ``{name, lr, betas, weight_decay, eps}``; one fused kernel per step where every parameter allows it.

    Raises:
        UserError: another name, an unknown or missing key, or a value outside its range.
    """
    options = dict(config)
    name = options.pop("name", "adamw")
    if name != "adamw":
        raise UserError(f"optimizer.name={name} is not known; use adamw")
    if unknown := set(options) - {"lr", "betas", "weight_decay", "eps"}:
        raise UserError(f"optimizer.{min(unknown)} is not a key of adamw; use lr, betas, weight_decay or eps")
    lr, betas = float(options.get("lr", 3e-4)), tuple(float(beta) for beta in options.get("betas", (0.9, 0.95)))
    weight_decay, eps = float(options.get("weight_decay", 0.1)), float(options.get("eps", 1e-8))
    if not lr > 0 or not math.isfinite(lr):
        raise UserError(f"lr={lr} must be a positive number")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"optimizer.betas={list(betas)} must be two numbers from 0 up to, not including, 1")
    if weight_decay < 0 or eps <= 0:
        raise UserError(f"optimizer.weight_decay={weight_decay} must be 0 or more, optimizer.eps={eps} above 0")
    groups = parameter_groups(module, weight_decay)
    fused = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for group in groups for p in group["params"])
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)


def lr_factor(step: int, *, total_steps: int, warmup_steps: int, min_lr_ratio: float) -> float:
    """Factor on the peak learning rate at optimiser step ``step`` (from 0): linear warm-up, then a half cosine.

    The first step already moves (1 / warmup_steps), the last one uses nearly ``min_lr_ratio``.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def build_schedule(optimizer: torch.optim.Optimizer, config: Mapping[str, Any]) -> LambdaLR:
    """LambdaLR, stepped once per optimiser step, from ``{warmup_fraction, min_lr_ratio, total_steps}``.

    Raises:
        UserError: an unknown key, a fraction outside 0 to 1, or no steps.
    """
    if unknown := set(config) - {"warmup_fraction", "min_lr_ratio", "total_steps"}:
        raise UserError(f"schedule.{min(unknown)} is not a key; use warmup_fraction or min_lr_ratio")
    total_steps = int(config.get("total_steps", 0))
    warmup_fraction, min_lr_ratio = float(config.get("warmup_fraction", 0.1)), float(config.get("min_lr_ratio", 0.1))
    for key, value in (("warmup_fraction", warmup_fraction), ("min_lr_ratio", min_lr_ratio)):
        if not 0 <= value <= 1:
            raise UserError(f"schedule.{key}={value} must lie between 0 and 1")
    if total_steps < 1:
        raise UserError(f"the budget gives {total_steps} optimiser steps; raise budget= or lower global_batch_tokens=")
    warmup_steps = round(warmup_fraction * total_steps)
    factor = partial(lr_factor, total_steps=total_steps, warmup_steps=warmup_steps, min_lr_ratio=min_lr_ratio)
    return LambdaLR(optimizer, factor)
