"""The published fusion (figure 1 and code): one linear map over what the branches give.

No_Split: y = W [y_ssm, y_attn], W of shape (D, 2D). Split modes: y = W merge(y_attn, y_ssm), W of shape (D, D), where
merge puts both branches' tokens back in sequence order. No bias in either.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowhn.models.fusions.base import Fusion
from flowhn.models.splits.base import TokenSplit


class ConcatProj(Fusion):
    """Concatenate (features or tokens) and project.

    Args:
        d_model: width D.
        full: both branches see every token (No_Split), so features are concatenated; otherwise tokens are merged.
        coordinate_gradients: see :class:`~flowhn.models.fusions.base.Fusion`.
    """

    def __init__(self, *, d_model: int, full: bool, coordinate_gradients: bool = False) -> None:
        super().__init__(d_model=d_model, full=full, coordinate_gradients=coordinate_gradients)
        self.proj = nn.Linear(2 * d_model if full else d_model, d_model, bias=False)

    def fuse(self, y_attn: Tensor, y_ssm: Tensor, split: TokenSplit) -> Tensor:
        if not self.full:
            return self.proj(split.merge(y_attn, y_ssm))
        return self.proj(torch.cat([y_ssm, y_attn], dim=-1))  # (B, T, 2D) -> (B, T, D)

    def flops(self, n_tokens: int) -> int:
        return 2 * self.proj.in_features * self.proj.out_features * n_tokens
