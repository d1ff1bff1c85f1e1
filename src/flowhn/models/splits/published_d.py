"""The published code's mode D, its stand-in for FAC_Split: two halves that swap sides from block to block.

Attention always gets ``int(0.5 T)`` tokens: the last ones in even blocks, the first ones in odd blocks. Equals AE_Split
at even T; at odd T the middle token goes to the SSM in every block, where AE_Split gives it to attention in even blocks
and to the SSM in odd ones. Figure 2 draws something else (:mod:`flowhn.models.splits.fac`); this class serves weights
made with the published code (``flowhn-convert published``).
"""

from __future__ import annotations

from flowhn.models.splits.base import BranchCost, Ranges, Split


class PublishedModeDSplit(Split):
    """Even blocks: attention takes the last ``T // 2`` tokens. Odd blocks: the first ``T // 2``. SSM takes the rest."""

    def attention_ranges(self, n_tokens: int, layer_idx: int, cost: BranchCost) -> Ranges:
        n_attn = n_tokens // 2
        return ((0, n_attn),) if layer_idx % 2 else ((n_tokens - n_attn, n_tokens),)
