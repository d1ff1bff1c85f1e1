"""Initial values and marks that Mamba-1 and Mamba-2 share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def inverse_softplus_dt(n: int, *, dt_min: float, dt_max: float, floor: float = 1e-4) -> Tensor:
    """(n,) biases whose softplus is log-uniform in [dt_min, dt_max], as in mamba_ssm."""
    log_dt = torch.empty(n).uniform_(math.log(dt_min), math.log(dt_max))
    dt = log_dt.exp().clamp_(min=floor)
    return dt + torch.log(-torch.expm1(-dt))


def keep(parameter: nn.Parameter, *, decay: bool = False) -> nn.Parameter:
    """Mark a parameter: the model's one initialisation leaves it alone, and the optimiser does not decay it."""
    parameter._no_reinit = True
    if not decay:
        parameter._no_weight_decay = True
    return parameter
