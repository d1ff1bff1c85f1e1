"""Gradient-coordinated fusion: both branches receive gradients of the same RMS, the total norm unchanged.

A published summary of the paper names "gradient-coordinated output fusion" without a formula; this is ours. With g_a and
g_s what comes back to the branches' outputs, of N_a and N_s numbers,

    r^2 = (|g_a|^2 + |g_s|^2) / (N_a + N_s),    g_b <- g_b * r / rms(g_b),    rms(g_b)^2 = |g_b|^2 / N_b

so both RMS are r and |g_a|^2 + |g_s|^2 stays. Directions stay too. A branch without tokens, or whose gradient is zero,
leaves both as they are. The sums run over all ranks when torch.distributed is initialised, so that every rank scales
alike; each rank must then run the same blocks, which data parallel training does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


@torch.library.custom_op("flowhn::sum_over_ranks", mutates_args=())
def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of ``values`` over all ranks; a copy of them in a single process. Opaque to torch.compile."""
    total = values.clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    return total


@sum_over_ranks.register_fake
def _(values: Tensor) -> Tensor:
    return torch.empty_like(values)


def gradient_scales(grad_attn: Tensor, grad_ssm: Tensor) -> Tensor:
    """(2,) float32 or wider: what the gradients of attention and SSM are multiplied with."""
    wide = torch.promote_types(grad_attn.dtype, torch.float32)
    grads = (grad_attn, grad_ssm)
    squares = [grad.to(wide).square().sum() for grad in grads]
    numbers = [squares[0].new_full((), grad.numel()) for grad in grads]
    square_a, square_s, n_a, n_s = sum_over_ranks(torch.stack([*squares, *numbers])).unbind()
    squares, numbers = torch.stack([square_a, square_s]), torch.stack([n_a, n_s])
    scales = (squares.sum() / numbers.sum() * numbers / squares).sqrt()
    return torch.where((squares == 0).any(), torch.ones_like(scales), scales)


class _Coordinate(torch.autograd.Function):
    """Identity whose backward pass scales both gradients."""

    @staticmethod
    def forward(ctx: Any, y_attn: Tensor, y_ssm: Tensor) -> tuple[Tensor, Tensor]:
        return y_attn.view_as(y_attn), y_ssm.view_as(y_ssm)

    @staticmethod
    def backward(ctx: Any, grad_attn: Tensor, grad_ssm: Tensor) -> tuple[Tensor, Tensor]:
        scale_attn, scale_ssm = gradient_scales(grad_attn, grad_ssm).unbind()
        return (grad_attn * scale_attn).to(grad_attn.dtype), (grad_ssm * scale_ssm).to(grad_ssm.dtype)


def coordinate_gradients(y_attn: Tensor, y_ssm: Tensor) -> tuple[Tensor, Tensor]:
    """(B, n_attn, D) and (B, n_ssm, D) as they are; their gradients arrive with equal RMS and the same total norm."""
    return _Coordinate.apply(y_attn, y_ssm)
