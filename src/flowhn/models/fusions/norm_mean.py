"""Hymba's fusion (Dong et al. 2024, arXiv 2411.13676): normalise each branch, scale it by a learnt vector, average.

No_Split: y = (b_a * rms(y_attn) + b_s * rms(y_ssm)) / 2, rms(y) = y / sqrt(mean(y^2) + eps) over channels, b_a and b_s
the weights of the two norms. Split modes: the mean over the one present branch, so y = b_a * rms(y_attn) on attention's
tokens and b_s * rms(y_ssm) on the SSM's. Coincides with no other fusion.
"""

from __future__ import annotations

from torch import Tensor

from flowhn.models.fusions.base import Fusion
from flowhn.models.norms import RMSNorm
from flowhn.models.splits.base import TokenSplit


class NormMeanFusion(Fusion):
    """Normalise, scale, average.

    Args:
        d_model, full, coordinate_gradients: see :class:`~flowhn.models.fusions.base.Fusion`.
        norm_eps: added to the mean square in the norms.
    """

    def __init__(self, *, d_model: int, full: bool, coordinate_gradients: bool = False, norm_eps: float = 1e-6) -> None:
        super().__init__(d_model=d_model, full=full, coordinate_gradients=coordinate_gradients)
        self.attn_norm = RMSNorm(d_model, eps=norm_eps)
        self.ssm_norm = RMSNorm(d_model, eps=norm_eps)

    def fuse(self, y_attn: Tensor, y_ssm: Tensor, split: TokenSplit) -> Tensor:
        y_attn, y_ssm = self.attn_norm(y_attn), self.ssm_norm(y_ssm)
        return (y_attn + y_ssm) / 2 if self.full else split.merge(y_attn, y_ssm)

    def flops(self, n_tokens: int) -> int:
        return 0
