"""Sum: y = y_attn + y_ssm (No_Split). No weights.

Split modes: a token has one branch output, and the sum over the present branches is that output, put back in order.
Coincides there with :mod:`~flowhn.models.fusions.mean` and :mod:`~flowhn.models.fusions.none`.
"""

from __future__ import annotations

from torch import Tensor

from flowhn.models.fusions.base import Fusion
from flowhn.models.splits.base import TokenSplit


class SumFusion(Fusion):
    """The sum of the branch outputs that a token has. Arguments: see :class:`~flowhn.models.fusions.base.Fusion`."""

    def fuse(self, y_attn: Tensor, y_ssm: Tensor, split: TokenSplit) -> Tensor:
        return y_attn + y_ssm if self.full else split.merge(y_attn, y_ssm)

    def flops(self, n_tokens: int) -> int:
        return 0
