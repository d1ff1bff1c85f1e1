"""No fusion: split modes put the branches' tokens back in sequence order and project nothing. No weights.

Coincides there with :mod:`~flowhn.models.fusions.sum` and :mod:`~flowhn.models.fusions.mean`. No_Split is refused: a token
has two outputs there, and making them one is a fusion.
"""

from __future__ import annotations

from torch import Tensor

from flowhn.errors import UserError
from flowhn.models.fusions.base import Fusion
from flowhn.models.splits.base import TokenSplit


class NoFusion(Fusion):
    """Put back in order. Arguments: see :class:`~flowhn.models.fusions.base.Fusion`.

    Raises:
        UserError: ``full``, a token would have two outputs.
    """

    def __init__(self, *, d_model: int, full: bool, coordinate_gradients: bool = False) -> None:
        if full:
            raise UserError(
                "fusion=none cannot make two outputs a token one; with split=no use fusion=sum or fusion=mean"
            )
        super().__init__(d_model=d_model, full=full, coordinate_gradients=coordinate_gradients)

    def fuse(self, y_attn: Tensor, y_ssm: Tensor, split: TokenSplit) -> Tensor:
        return split.merge(y_attn, y_ssm)

    def flops(self, n_tokens: int) -> int:
        return 0
