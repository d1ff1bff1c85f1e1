"""What every fusion shares: the check of the routing, and gradients of equal size for both branches on request.

Letters: B batch, T tokens, D d_model, n tokens of one branch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from flowhn.models.fusions.coordinate import coordinate_gradients as coordinated
from flowhn.models.splits.base import TokenSplit


class Fusion(nn.Module, ABC):
    """Base of the fusions; a subclass gives :meth:`fuse` and :meth:`flops`.

    Args:
        d_model: width D.
        full: both branches see every token (No_Split); otherwise each token has the output of one branch.
        coordinate_gradients: rescale what comes back to the branches so that both gradients have the same RMS, the total
            norm unchanged (:mod:`flowhn.models.fusions.coordinate`). The forward pass does not change.
    """

    takes_shared = False  # whether some tokens may have both branches' outputs and others one (``split.shared``)

    def __init__(self, *, d_model: int, full: bool, coordinate_gradients: bool = False) -> None:
        super().__init__()
        self.d_model, self.full, self.coordinate_gradients = d_model, full, coordinate_gradients

    def forward(self, y_attn: Tensor, y_ssm: Tensor, split: TokenSplit) -> Tensor:
        """(B, n_attn, D) and (B, n_ssm, D) -> (B, T, D).

        Raises:
            ValueError: the routing is not of the kind (full or partition) that this fusion was built for.
        """
        if self.full and not split.is_full:
            raise ValueError("a fusion built with full=True needs a split in which both branches see all tokens")
        if not self.full and not (split.is_partition or (self.takes_shared and split.is_cover)):
            raise ValueError("a fusion built with full=False needs a split in which each token has exactly one branch")
        if self.coordinate_gradients:
            y_attn, y_ssm = coordinated(y_attn, y_ssm)
        return self.fuse(y_attn, y_ssm, split)

    @abstractmethod
    def fuse(self, y_attn: Tensor, y_ssm: Tensor, split: TokenSplit) -> Tensor:
        """(B, n_attn, D) and (B, n_ssm, D) -> (B, T, D), the routing being of the right kind."""

    @abstractmethod
    def flops(self, n_tokens: int) -> int:
        """Forward FLOPs of one sequence of ``n_tokens``, in split modes of so many branch outputs.

        Matrix products, as everywhere; sums and norms are not counted.
        """
