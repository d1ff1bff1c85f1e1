"""AE_Split, alternating equal (paper, figure 2; the published code's mode B): halves that swap from block to block.

Odd lengths as in the published code: the cut is at T // 2, so the second half is the longer one by a token.
The two halves never meet in a branch: a token of the second half sees none of the first at any depth.
"""

from __future__ import annotations

from flowhn.models.splits.base import BranchCost, Ranges, Split


class AlternatingEqualSplit(Split):
    """Even blocks: SSM takes the first half, attention the second. Odd blocks: the other way round."""

    def attention_ranges(self, n_tokens: int, layer_idx: int, cost: BranchCost) -> Ranges:
        cut = n_tokens // 2
        return ((0, cut),) if layer_idx % 2 else ((cut, n_tokens),)
