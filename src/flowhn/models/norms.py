"""RMSNorm whose weight follows the activations' type."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def to_autocast(x: Tensor) -> Tensor:
    """x in the type that autocast computes in on its device; x itself without autocast (which the meta device does not know)."""
    device = x.device.type
    return x if x.is_meta or not torch.is_autocast_enabled(device) else x.to(torch.get_autocast_dtype(device))


class RMSNorm(nn.RMSNorm):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension.

    ``torch.nn.RMSNorm`` with one difference: the weight is cast to the input's type. A float32 master weight under
    bfloat16 activations otherwise misses torch's fused kernel (which warns about it). The mean is accumulated in
    float32 by torch, and the output has the input's type.

    Args:
        d: size of the last dimension.
        eps: added to the mean square. 1e-6 as in Llama and Jamba.
    """

    def __init__(self, d: int, *, eps: float = 1e-6) -> None:
        super().__init__(d, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d), same type."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class GatedRMSNorm(nn.Module):
    """``RMSNorm(y * silu(z)) * weight`` in groups of channels: the gate first, as in mamba_ssm's Mamba2.

    Args:
        d: number of channels.
        n_groups: the mean square is taken over each of ``n_groups`` equal groups of channels (mamba_ssm: ``ngroups``).
        eps: added to the mean square.
    """

    def __init__(self, d: int, *, n_groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        self.n_groups = n_groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """y, z (..., d) -> (..., d) in z's type; computed in float32 (or float64 for float64 input)."""
        wide = torch.promote_types(z.dtype, torch.float32)
        gated = y.to(wide) * F.silu(z.to(wide))
        groups = gated.unflatten(-1, (self.n_groups, -1))  # (..., G, d / G)
        normed = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)
        return (normed.flatten(-2) * self.weight.to(wide)).to(z.dtype)
