"""FA_Split, FLOP-aware (paper, figure 2; the published code's mode C): one cut at which both branches cost the same.

Figure and code disagree on the sides: in the figure the SSM takes the first tokens and attention the last (the default
here), in the code attention takes the first. The cut is the same in every block, so the two sides never meet.
"""

from __future__ import annotations

from flowhn.errors import UserError
from flowhn.models.splits.balance import FlopAware
from flowhn.models.splits.base import BranchCost, Ranges


class FlopAwareSplit(FlopAware):
    """The same cut in every block.

    Args:
        attention_side: ``last`` (figure 2) or ``first`` (published code) tokens go to attention.
        ratio, balance, multiple_of, window, keys, shared: see :class:`~flowhn.models.splits.balance.FlopAware`.

    Raises:
        UserError: ``attention_side`` is neither; or as the base class does.
    """

    def __init__(
        self,
        *,
        attention_side: str = "last",
        ratio: float | None = None,
        balance: str = "flops",
        multiple_of: int = 1,
        window: int | None = None,
        keys: str = "own",
        shared: float = 0.0,
    ) -> None:
        super().__init__(ratio=ratio, balance=balance, multiple_of=multiple_of, window=window, keys=keys, shared=shared)
        if attention_side not in ("last", "first"):
            raise UserError(f"split.attention_side={attention_side} must be last (figure 2) or first (published code)")
        self.attention_side = attention_side

    def attention_ranges(self, n_tokens: int, layer_idx: int, cost: BranchCost) -> Ranges:
        n_attn = self.n_attention(n_tokens, cost)
        return ((0, n_attn),) if self.attention_side == "first" else ((n_tokens - n_attn, n_tokens),)
