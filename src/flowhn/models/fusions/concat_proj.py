"""The published fusion (figure 1 and code): one linear map over what the branches give.

No_Split: y = W [y_ssm, y_attn], W of shape (D, 2D). Split modes: y = W merge(y_attn, y_ssm), W of shape (D, D), where
merge puts both branches' tokens back in sequence order. No bias in either.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowhn.models.splits.base import TokenSplit


class ConcatProj(nn.Module):
    """Concatenate (features or tokens) and project.

    Args:
        d_model: width D.
        full: both branches see every token (No_Split), so features are concatenated; otherwise tokens are merged.
    """

    def __init__(self, *, d_model: int, full: bool) -> None:
        super().__init__()
        self.full = full
        self.proj = nn.Linear(2 * d_model if full else d_model, d_model, bias=False)

    def forward(self, y_attn: Tensor, y_ssm: Tensor, split: TokenSplit) -> Tensor:
        """(B, n_attn, D) and (B, n_ssm, D) -> (B, T, D).

        Raises:
            ValueError: the routing is not of the kind (full or partition) that this fusion was built for.
        """
        if not self.full:
            return self.proj(split.merge(y_attn, y_ssm))
        if not split.is_full:
            raise ValueError("a fusion built with full=True needs a split in which both branches see all tokens")
        return self.proj(torch.cat([y_ssm, y_attn], dim=-1))  # (B, T, 2D) -> (B, T, D)

    def flops(self, n_tokens: int) -> int:
        """Forward FLOPs of one sequence of ``n_tokens``."""
        return 2 * self.proj.in_features * self.proj.out_features * n_tokens
