"""The published fusion, plus a summary of what the other branch said about earlier tokens.

m_b(t) is the mean of branch b's outputs at positions <= t (zero while there are none), so nothing looks ahead.

    No_Split:     y_t = W [y_ssm, y_attn]_t + C_a m_attn(t) + C_s m_ssm(t)        W (D, 2D)
    split modes:  y_t = W merge(y_attn, y_ssm)_t + C_o m_o(t)                     W (D, D), o the branch that t is not in

No biases. With C = 0 it is :mod:`~flowhn.models.fusions.concat_proj`; coincides with no other fusion. In split modes the
summary is the same for all tokens of a range, because the other branch has none in between: it is mapped once per range.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowhn.models.fusions.base import Fusion
from flowhn.models.splits.base import TokenSplit


def running_mean(y: Tensor) -> Tensor:
    """(B, T, D) -> (B, T, D): the mean over positions <= t, summed in float32 or wider."""
    wide = torch.promote_types(y.dtype, torch.float32)
    count = torch.arange(1, y.shape[1] + 1, device=y.device, dtype=wide)
    return (y.to(wide).cumsum(dim=1) / count[:, None]).to(y.dtype)


class CrossFusion(Fusion):
    """Project, and add the other branch's running mean. Arguments: see :class:`~flowhn.models.fusions.base.Fusion`."""

    looks_back = True  # a token needs sums over earlier ones, which caches for decoding do not keep

    def __init__(self, *, d_model: int, full: bool, coordinate_gradients: bool = False) -> None:
        super().__init__(d_model=d_model, full=full, coordinate_gradients=coordinate_gradients)
        self.proj = nn.Linear(2 * d_model if full else d_model, d_model, bias=False)
        self.cross_attn = nn.Linear(d_model, d_model, bias=False)  # of attention's summary
        self.cross_ssm = nn.Linear(d_model, d_model, bias=False)

    def fuse(self, y_attn: Tensor, y_ssm: Tensor, split: TokenSplit) -> Tensor:
        if self.full:
            own = self.proj(torch.cat([y_ssm, y_attn], dim=-1))  # (B, T, D)
            return own + self.cross_attn(running_mean(y_attn)) + self.cross_ssm(running_mean(y_ssm))
        own = self.proj(split.merge(y_attn, y_ssm))  # (B, T, D)
        return own + self._summaries(y_attn, y_ssm, split)

    def _summaries(self, y_attn: Tensor, y_ssm: Tensor, split: TokenSplit) -> Tensor:
        """(B, T, D): for each token, the mapped mean of the other branch's earlier outputs."""
        ys, maps, taken = (y_attn, y_ssm), (self.cross_attn, self.cross_ssm), [0, 0]
        wide = torch.promote_types(y_attn.dtype, torch.float32)
        sums = [y.new_zeros(y.shape[0], y.shape[2], dtype=wide) for y in ys]  # (B, D) each
        ranges = sorted(
            [(start, stop, 0) for start, stop in split.attn] + [(start, stop, 1) for start, stop in split.ssm]
        )
        pieces = []
        for start, stop, branch in ranges:
            other, n = 1 - branch, stop - start
            mean = (sums[other] / max(taken[other], 1)).to(y_attn.dtype)
            pieces.append(maps[other](mean)[:, None].expand(-1, n, -1))  # (B, n, D)
            sums[branch] = sums[branch] + ys[branch][:, taken[branch] : taken[branch] + n].sum(dim=1, dtype=wide)
            taken[branch] += n
        return torch.cat(pieces, dim=1) if pieces else y_attn.new_zeros(y_attn.shape)

    def flops(self, n_tokens: int) -> int:
        """Split modes: the map of the summary, once per range of tokens, is not counted."""
        summaries = 2 * self.d_model if self.full else 0
        return 2 * (self.proj.in_features + summaries) * self.d_model * n_tokens
