"""No_Split (paper, figure 2 and table 1; the published code's mode A): both branches see every token."""

from __future__ import annotations

from flowhn.models.splits.base import BranchCost, Ranges, Split


class NoSplit(Split):
    """Both branches see all tokens; their features are concatenated by the fusion."""

    full = True

    def __init__(self) -> None:
        super().__init__(window=None)

    def attention_ranges(self, n_tokens: int, layer_idx: int, cost: BranchCost) -> Ranges:
        return ((0, n_tokens),)

    def ssm_ranges(self, alone: Ranges, n_tokens: int) -> Ranges:
        return alone
