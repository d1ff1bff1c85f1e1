"""Mean: y = (y_attn + y_ssm) / 2 (No_Split), half of :mod:`~flowhn.models.fusions.sum`. No weights.

Split modes: the mean over the one present branch is its output, put back in order. Coincides there with
:mod:`~flowhn.models.fusions.sum` and :mod:`~flowhn.models.fusions.none`.
"""

from __future__ import annotations

from torch import Tensor

from flowhn.models.fusions.base import Fusion
from flowhn.models.splits.base import TokenSplit


class MeanFusion(Fusion):
    """The mean of the branch outputs that a token has. Arguments: see :class:`~flowhn.models.fusions.base.Fusion`."""

    def fuse(self, y_attn: Tensor, y_ssm: Tensor, split: TokenSplit) -> Tensor:
        return (y_attn + y_ssm) / 2 if self.full else split.merge(y_attn, y_ssm)

    def flops(self, n_tokens: int) -> int:
        return 0
