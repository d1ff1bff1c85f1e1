"""FAC_Split, FLOP-aware circulating (paper, figure 2): attention's window moves from block to block.

With n the FLOP-balanced number of attention tokens, block i sends the n tokens that start at ``(T - (i + 1) n) mod T``
to attention, as on a ring, so it works for any number of blocks. Figure 2 (T = 6, n = 2): {5,6}, {3,4}, {1,2}. A window
that wraps is two ranges and keeps sequence order: its tokens at the start come first, so nothing looks ahead.
Deviation: the published code's mode D only swaps two halves by parity and equals AE_Split at even T.
"""

from __future__ import annotations

from flowhn.models.splits.balance import FlopAware
from flowhn.models.splits.base import BranchCost, Ranges


class FlopAwareCirculatingSplit(FlopAware):
    """Attention's window starts at the end of the sequence and moves back by its own length in each block."""

    def attention_ranges(self, n_tokens: int, layer_idx: int, cost: BranchCost) -> Ranges:
        n_attn = self.n_attention(n_tokens, cost)
        if n_attn == 0:
            return ()
        start = (n_tokens - (layer_idx + 1) * n_attn) % n_tokens
        stop = start + n_attn
        return ((start, stop),) if stop <= n_tokens else ((0, stop - n_tokens), (start, n_tokens))
