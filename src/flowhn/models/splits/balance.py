"""The FLOP-aware choice of how many tokens attention takes (paper, figure 2; shared by FA_Split and FAC_Split).

The branches run side by side, so a block is done when the slower one is. With a(n) the FLOPs of n tokens in the
attention branch and s(n) those in the SSM branch, the cut is ``argmin_n |a(n) - s(T - n)|``. Deviation: the published
code uses the constant 0.59 T (``ratio=0.59`` gives exactly that); here it is solved at each length, best integer.

``shared``, which is not in the paper, gives k of attention's n tokens to the SSM branch as well; the cut is then
``argmin_n |a(n) - s(T - n + k)|``, with k at most n.
"""

from __future__ import annotations

from flowhn.errors import UserError
from flowhn.models.splits.base import BranchCost, Ranges, Split, without_first


def balanced_attention_tokens(n_tokens: int, cost: BranchCost, multiple_of: int = 1, n_shared: int = 0) -> int:
    """Number of attention tokens, a multiple of ``multiple_of``, that brings the branches' FLOPs closest together.

    Of attention's tokens the SSM branch has ``n_shared`` too (or all, where they are fewer). Both costs grow with the number of
    tokens, so the difference does too and bisection finds its change of sign; of two equally good cuts the smaller is taken. A
    sequence shorter than ``multiple_of`` is cut at the exact integer.
    """
    step = multiple_of if n_tokens >= multiple_of else 1
    low, high = 0, n_tokens // step  # the answer is among low * step .. high * step

    def difference(k: int) -> int:
        return cost.attn(k * step) - cost.ssm(n_tokens - k * step + min(n_shared, k * step))

    while low < high:
        middle = (low + high) // 2
        if difference(middle) < 0:
            low = middle + 1
        else:
            high = middle
    if low > 0 and abs(difference(low - 1)) <= abs(difference(low)):
        low -= 1
    return low * step


class FlopAware(Split):
    """A strategy that gives attention :meth:`n_attention` tokens.

    Args:
        ratio: attention's share of the tokens, 0 to 1, instead of the balanced one: ``int(ratio * T)`` as in the
            published code, then the nearest multiple.
        balance: what is balanced when there is no ratio: ``flops`` (counted, as published) or ``time`` (measured on the
            device; whoever builds the model measures first and sets ``ratio``, see ``flowhn.benchmark.balance``).
        multiple_of: round the number of attention tokens to a multiple of this, for kernels that like round lengths.
            Has no effect on sequences shorter than it.
        shared: share of the sequence's tokens, 0 to 1, that both branches see: the first of attention's, in sequence order.
        window, keys: see :class:`~flowhn.models.splits.base.Split`.

    Raises:
        UserError: ``ratio`` or ``shared`` outside 0 to 1, ``multiple_of`` not a positive integer, an unknown ``balance``, or
            ``balance=time`` to be measured with ``keys=all`` or ``shared``.
    """

    flop_balanced = True

    def __init__(
        self,
        *,
        ratio: float | None = None,
        balance: str = "flops",
        multiple_of: int = 1,
        window: int | None = None,
        keys: str = "own",
        shared: float = 0.0,
    ) -> None:
        super().__init__(window=window, keys=keys)
        if balance not in ("flops", "time"):
            raise UserError(f"split.balance={balance} must be flops or time")
        if ratio is not None and not _is_share(ratio):
            raise UserError(f"split.ratio={ratio} must be null or attention's share of the tokens, from 0 to 1")
        if not _is_share(shared):
            raise UserError(
                f"split.shared={shared} must be the share of the tokens that both branches see, from 0 to 1"
            )
        if balance == "time" and ratio is None and (keys == "all" or shared):
            told = "split.keys=all" if keys == "all" else "split.shared"
            raise UserError(
                f"split.balance=time measures branches that see their own tokens alone; with {told} use split.balance=flops or "
                "set split.ratio="
            )
        if isinstance(multiple_of, bool) or not isinstance(multiple_of, int) or multiple_of < 1:
            raise UserError(f"split.multiple_of={multiple_of} must be a positive number of tokens")
        self.ratio = ratio
        self.balance = balance
        self.multiple_of = multiple_of
        self.shared = float(shared)

    def n_shared(self, n_tokens: int) -> int:
        """How many of ``n_tokens`` tokens both branches see, where attention has so many."""
        return int(self.shared * n_tokens)

    def alone_ranges(self, attn: Ranges, n_tokens: int) -> Ranges:
        return without_first(attn, self.n_shared(n_tokens))

    def n_attention(self, n_tokens: int, cost: BranchCost) -> int:
        """How many of ``n_tokens`` tokens go to attention."""
        if self.ratio is None and self.balance == "time":
            raise UserError("split.balance=time has no measurement here; train with flowhn-train, or set split.ratio=")
        if self.ratio is None:
            return balanced_attention_tokens(n_tokens, cost, self.multiple_of, self.n_shared(n_tokens))
        wanted = int(self.ratio * n_tokens)
        if n_tokens < self.multiple_of:
            return wanted
        nearest = (wanted + self.multiple_of // 2) // self.multiple_of * self.multiple_of
        return nearest if nearest <= n_tokens else nearest - self.multiple_of


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0.0 <= value <= 1.0
