"""Sum: y = y_attn + y_ssm (No_Split). No weights.

Split modes: a token has one branch output, and the sum over the present branches is that output, put back in order.
Coincides there with :mod:`~flowhn.models.fusions.mean` and :mod:`~flowhn.models.fusions.none`. With ``split.shared`` a token
that has both outputs gets their sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowhn.models.fusions.base import Fusion
from flowhn.models.splits.base import TokenSplit


class SumFusion(Fusion):
    """The sum of the branch outputs that a token has. Arguments: see :class:`~flowhn.models.fusions.base.Fusion`."""

    takes_shared = True

    def fuse(self, y_attn: Tensor, y_ssm: Tensor, split: TokenSplit) -> Tensor:
        if self.full:
            return y_attn + y_ssm
        if split.is_partition:
            return split.merge(y_attn, y_ssm)
        return split.blend((y_attn,), (y_ssm,), attn=lambda y: y, ssm=lambda y: y, both=torch.add)

    def flops(self, n_tokens: int) -> int:
        return 0
