"""What every split strategy shares: the routing it returns, the costs it may ask for, and caching.

A split decides, for T tokens and block i, which tokens each branch of a parallel block sees. It is pure arithmetic on
integers: the same lengths always give the same routing, no tensor is looked at, and ``torch.compile`` sees a constant.
Letters: B batch, T tokens, D d_model, n tokens of one branch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from flowhn.errors import UserError

Ranges = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class BranchCost:
    """Forward FLOPs of n tokens of one sequence in each branch (mixer and MLP)."""

    attn: Callable[[int], int]
    ssm: Callable[[int], int]


def complement(ranges: Ranges, n_tokens: int) -> Ranges:
    """The half-open ranges of ``[0, n_tokens)`` that ``ranges`` (ascending, disjoint) leaves out."""
    edges = [0, *(edge for pair in ranges for edge in pair), n_tokens]
    return joined(zip(edges[::2], edges[1::2], strict=True))


def joined(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Ascending ranges without empty ones, touching ones made one."""
    result: list[tuple[int, int]] = []
    for start, stop in ranges:
        if start == stop:
            continue
        if result and result[-1][1] == start:
            result[-1] = (result[-1][0], stop)
        else:
            result.append((start, stop))
    return tuple(result)


def without_first(ranges: Ranges, n_tokens: int) -> Ranges:
    """``ranges`` without their first ``n_tokens`` tokens."""
    rest: list[tuple[int, int]] = []
    for start, stop in ranges:
        dropped = min(n_tokens, stop - start)
        n_tokens -= dropped
        rest.append((start + dropped, stop))
    return joined(rest)


def count(ranges: Ranges) -> int:
    """Number of tokens in half-open ranges."""
    return sum(stop - start for start, stop in ranges)


def gather(x: Tensor, ranges: Ranges) -> Tensor:
    """(B, T, D) -> (B, n, D): the tokens of ``ranges`` in sequence order; a view when they are contiguous."""
    if not ranges:
        return x[:, :0]
    pieces = [x[:, start:stop] for start, stop in ranges]  # views of (B, n_r, D)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def spread(y: Tensor, ranges: Ranges, n_tokens: int) -> Tensor:
    """(B, n, D) -> (B, T, D): put the tokens of ``ranges`` back in their places; zeros in all others."""
    edges = [(0, 0), *ranges, (n_tokens, n_tokens)]
    gaps = [y.new_zeros(y.shape[0], after[0] - before[1], *y.shape[2:]) for before, after in pairwise(edges)]
    pieces = [piece for pair in zip(gaps, _pieces(y, ranges), strict=False) for piece in pair] + [gaps[-1]]
    pieces = [piece for piece in pieces if piece.shape[1]]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1) if pieces else y


def _pieces(y: Tensor, ranges: Ranges) -> list[Tensor]:
    """Cut a branch's output (B, n, D) into the ranges that its tokens came from."""
    pieces, taken = [], 0
    for start, stop in ranges:
        pieces.append(y[:, taken : taken + stop - start])
        taken += stop - start
    return pieces


def _holds(ranges: Ranges, token: int) -> bool:
    return any(start <= token < stop for start, stop in ranges)


def _piece(y: Tensor, ranges: Ranges, start: int, stop: int) -> Tensor:
    """Tokens ``start`` to ``stop``, which lie in one of ``ranges``, of that branch's output (B, n, D)."""
    before = count(tuple((first, min(last, start)) for first, last in ranges if first < start))
    return y[:, before : before + stop - start]


@dataclass(frozen=True)
class TokenSplit:
    """Which of ``n_tokens`` tokens each branch sees: half-open ranges, ascending, so that order is kept.

    A strategy gives a partition (each token in exactly one branch), full copies (both see all), or a partition of which some
    tokens are shared (in both).
    """

    n_tokens: int
    attn: Ranges
    ssm: Ranges

    @property
    def n_attn(self) -> int:
        return count(self.attn)

    @property
    def n_ssm(self) -> int:
        return count(self.ssm)

    @property
    def is_full(self) -> bool:
        """Both branches see every token."""
        everything = joined([(0, self.n_tokens)])
        return self.attn == everything and self.ssm == everything

    @property
    def is_partition(self) -> bool:
        """Each token is in exactly one branch."""
        return self.ssm == complement(self.attn, self.n_tokens)

    @property
    def is_cover(self) -> bool:
        """Each token is in a branch at least."""
        alone = complement(self.attn, self.n_tokens)  # the SSM branch has to have these
        return all(any(first <= start and stop <= last for first, last in self.ssm) for start, stop in alone)

    def gather_attn(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, n_attn, D), in sequence order; a view when the tokens are contiguous."""
        return gather(x, self.attn)

    def gather_ssm(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, n_ssm, D), in sequence order; a view when the tokens are contiguous."""
        return gather(x, self.ssm)

    def merge(self, y_attn: Tensor, y_ssm: Tensor) -> Tensor:
        """(B, n_attn, D) and (B, n_ssm, D) -> (B, T, D): put the tokens back in sequence order.

        Raises:
            ValueError: the branches overlap, so a token would have two outputs.
        """
        if not self.is_partition:
            raise ValueError("merge needs a split in which each token has exactly one branch")
        if not self.attn:
            return y_ssm
        if not self.ssm:
            return y_attn
        first, second = _pieces(y_attn, self.attn), _pieces(y_ssm, self.ssm)
        if self.ssm[0][0] == 0:
            first, second = second, first
        # Touching ranges are one, so the branches' pieces alternate; the first branch may have one more.
        pieces = [piece for pair in zip(first, second, strict=False) for piece in pair] + first[len(second) :]
        return torch.cat(pieces, dim=1)  # (B, T, D)

    def blend(
        self,
        y_attn: tuple[Tensor, ...],
        y_ssm: tuple[Tensor, ...],
        *,
        attn: Callable[..., Tensor],
        ssm: Callable[..., Tensor],
        both: Callable[..., Tensor],
    ) -> Tensor:
        """Tensors of (B, n_attn, D) and (B, n_ssm, D) -> (B, T, D), in sequence order, where tokens may be in both branches.

        Args:
            y_attn, y_ssm: what the functions get of a run of tokens that are in that branch.
            attn, ssm: from ``y_attn``'s or ``y_ssm``'s pieces to what a token of that branch alone becomes.
            both: from ``y_attn``'s and then ``y_ssm``'s pieces to what a shared token becomes.
        """
        edges = [edge for pair in (*self.attn, *self.ssm) for edge in pair]
        pieces, start = [], 0
        while start < self.n_tokens:
            stop = min(edge for edge in edges if edge > start)  # a run of tokens that are in the same branches
            mine = [_piece(y, self.attn, start, stop) for y in y_attn] if _holds(self.attn, start) else []
            other = [_piece(y, self.ssm, start, stop) for y in y_ssm] if _holds(self.ssm, start) else []
            pieces.append(both(*mine, *other) if mine and other else attn(*mine) if mine else ssm(*other))
            start = stop
        return torch.cat(pieces, dim=1)  # (B, T, D)

    def positions_attn(self, device: torch.device | str | None = None) -> Tensor:
        """(n_attn,) long: where in the sequence the attention branch's tokens stand (for rotary embeddings)."""
        if not self.attn:
            return torch.empty(0, dtype=torch.long, device=device)
        pieces = [torch.arange(start, stop, device=device) for start, stop in self.attn]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


class Split(ABC):
    """Base of the strategies; a subclass gives :meth:`attention_ranges`, the rest goes to the SSM branch.

    Args:
        window: route a sequence as repetitions of the routing of ``window`` tokens, so that a token's branch depends
            on its absolute position alone, whatever the length (costs are then balanced at ``window`` tokens).
            ``None``: the routing is proportional to the actual length, as published, so the same prefix is routed
            differently at another length.
        keys: what a token of the attention branch sees: ``own``, earlier tokens of its branch (published), or ``all``,
            the keys and values of all earlier tokens of the sequence, whichever branch they are in. Not in the paper.

    Raises:
        UserError: ``window`` is not a positive integer, an unknown ``keys``.
    """

    full = False  # both branches see all tokens; decides the shape of the fusion
    flop_balanced = False  # promises the integer cut with the least difference between the branches' FLOPs
    shared = 0.0  # share of the tokens that both branches see

    def __init__(self, *, window: int | None = None, keys: str = "own") -> None:
        if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
            raise UserError(f"split.window={window} must be null or a positive number of tokens")
        if keys not in ("own", "all"):
            raise UserError(f"split.keys={keys} must be own (published) or all (keys and values of all earlier tokens)")
        self.window = window
        self.keys = keys
        self._cache: dict[tuple[int, int, BranchCost], TokenSplit] = {}

    @abstractmethod
    def attention_ranges(self, n_tokens: int, layer_idx: int, cost: BranchCost) -> Ranges:
        """Ascending half-open ranges of the tokens that block ``layer_idx`` (from 0) sends to attention."""

    def ssm_ranges(self, attn: Ranges, n_tokens: int) -> Ranges:
        """The SSM branch's ranges; every token that attention does not see unless a strategy says otherwise."""
        return complement(attn, n_tokens)

    def alone_ranges(self, attn: Ranges, n_tokens: int) -> Ranges:
        """Those of attention's tokens of one period that attention alone sees; all of them unless a strategy says otherwise."""
        return attn

    def __call__(self, n_tokens: int, layer_idx: int, cost: BranchCost) -> TokenSplit:
        """Routing of ``n_tokens`` tokens in block ``layer_idx``. Cached: forward passes ask again and again."""
        if torch.compiler.is_compiling():  # the trace computes it once; it must not reach into the cache
            return self._route(n_tokens, layer_idx, cost)
        key = (n_tokens, layer_idx, cost)
        if key not in self._cache:
            self._cache[key] = self._route(n_tokens, layer_idx, cost)
        return self._cache[key]

    def period(self, window: int | None = None) -> int:
        """Number of tokens after which the routing repeats, when it depends on the position alone.

        Args:
            window: what a proportional split is frozen at; a split with a window of its own keeps that.

        Raises:
            UserError: the split is proportional to the length and ``window`` is None.
        """
        if self.full:
            return 1
        period = window if self.window is None else self.window
        if period is None:
            raise UserError(
                "a token's branch depends on the final length with split.window=null; set a window to decode"
            )
        return period

    def section(
        self, start: int, stop: int, layer_idx: int, cost: BranchCost, *, window: int | None = None
    ) -> TokenSplit:
        """The routing of tokens ``start`` to ``stop`` of a longer sequence, numbered from 0: one period, repeated."""
        period = self.period(window)
        pattern = self(period, layer_idx, cost)  # one period is routed alike with the window and without it

        def tiled(ranges: Ranges) -> Ranges:
            offsets = range(start // period * period, stop, period)
            cut = ((max(o + first, start), min(o + last, stop)) for o in offsets for first, last in ranges)
            return joined((first - start, last - start) for first, last in cut if first < last)

        return TokenSplit(stop - start, tiled(pattern.attn), tiled(pattern.ssm))

    def _route(self, n_tokens: int, layer_idx: int, cost: BranchCost) -> TokenSplit:
        period = self.window or n_tokens
        pattern = joined(self.attention_ranges(period, layer_idx, cost))

        def tiled(ranges: Ranges) -> Ranges:
            return joined(
                (offset + start, min(offset + stop, n_tokens))
                for offset in range(0, n_tokens, period or 1)
                for start, stop in ranges
                if offset + start < n_tokens
            )

        ssm = self.ssm_ranges(tiled(self.alone_ranges(pattern, period)), n_tokens)
        return TokenSplit(n_tokens, tiled(pattern), ssm)

    def __getstate__(self) -> dict[str, object]:
        # The cache is keyed by modules' bound methods: a copy or a pickle starts with an empty one.
        return {**self.__dict__, "_cache": {}}
