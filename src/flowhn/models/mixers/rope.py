"""Rotary position embedding (RoPE; Su et al. 2021), in Llama's layout of channels."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("flowhn::rope_tables", mutates_args=())
def rope_tables(positions: Tensor, d_head: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of ``position * theta^(-2 i / d_head)``, each (T, d_head / 2).

    Opaque to torch.compile, which would otherwise compute every angle again for each head and sequence.
    """
    exponents = torch.arange(0, d_head, 2, device=positions.device, dtype=dtype) / d_head
    angles = positions.to(dtype)[:, None] * theta**-exponents
    return angles.cos(), angles.sin()


@rope_tables.register_fake
def _(positions: Tensor, d_head: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = (positions.shape[0], (d_head + 1) // 2)
    return positions.new_empty(shape, dtype=dtype), positions.new_empty(shape, dtype=dtype)


def apply_rope(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotate pairs of channels (i, i + d_head / 2) by ``position * theta^(-2 i / d_head)`` (Llama's layout).

    The angles are computed in float32 from scratch, so that casting the model to bfloat16 cannot coarsen them.

    Args:
        x: (B, heads, T, d_head).
        positions: (T,), integer.
        theta: base of the wavelengths.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table[:, None] for table in rope_tables(positions, x.shape[-1], theta, wide))  # (T, 1, d_head / 2)
    # Token by token, as the projections lie: the gradient is written for their products and not copied together for them.
    first, second = x.transpose(1, 2).to(wide).chunk(2, dim=-1)  # (B, T, heads, d_head / 2)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype).transpose(1, 2)
