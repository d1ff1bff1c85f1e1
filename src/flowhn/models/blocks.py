"""Blocks: FlowHN's parallel block (paper, figure 1; published code); the sequential pre-norm layer is in ``sequential``.

Every block follows one protocol: it is built with ``(layer_idx=, n_layers=)`` on top of its own options and called as
``block(x, carry) -> (x, carry)``, x of shape (B, T, D). The carry is what a block hands to the next one: None, or
Hymba's shared keys and values. ``block.flops(n_tokens)`` counts one sequence's forward pass.
Letters: B batch, T tokens, D d_model, n tokens of one branch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowhn.errors import UserError
from flowhn.models.cache import BlockCache, SSMState
from flowhn.models.mixers.short_conv import ShortConv
from flowhn.models.norms import RMSNorm
from flowhn.models.sequential import Carry, SequentialBlock, SwiGLU
from flowhn.models.splits.base import BranchCost, Split, TokenSplit

__all__ = ["Carry", "ParallelBlock", "SequentialBlock", "SwiGLU"]


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for the second branch of all blocks."""
    return torch.cuda.Stream(device)


class _AllKeysCost(NamedTuple):  # no dataclass: torch 2.11 loses the fields of one that is made inside a trace
    """FLOPs of n tokens in the attention branch when they see the keys of all earlier ones of a sequence of ``length``.

    FAC_Split's window must be equally long in each block, so the dearest place counts: the end of the sequence.
    """

    layer: SequentialBlock
    length: int

    def __call__(self, n_tokens: int) -> int:
        queries = ((self.length - n_tokens, self.length),) if n_tokens else ()
        return self.layer.flops(n_tokens, queries=queries)


class ParallelBlock(nn.Module):
    """FlowHN's block: attention and SSM side by side, each on the tokens that the split gives it.

    ::

        a = AttentionLayer(x[attn tokens])        u = SSMLayer(x[ssm tokens])
        x = x + fusion(a, u)
        x = x + Linear(RMSNorm(x))                D -> D, no bias

    With ``short_conv``, which is not in the paper, ``x = x + silu(conv(RMSNorm(x)))`` comes first.

    Both branches are whole pre-norm layers with their own SwiGLU MLP. Figure 1 draws only norm and mixer per branch;
    the published code has the MLPs, and so have we. Attention is told the tokens' positions in the whole sequence,
    which matters only with rotary embeddings (off in the published model).

    Args:
        d_model: width D.
        attention, ssm: build the mixers; called without arguments.
        d_ff: hidden width of each branch's MLP.
        split: which tokens each branch sees.
        fusion: builds the fusion; called with ``d_model`` and ``full`` (both branches see all tokens).
        layer_idx: index of this block from 0 (the split may depend on it); n_layers: number of blocks.
        norm_eps: added to the mean square in the norms.
        overlap: on CUDA, run the branches on two streams, so that the scan, which waits for memory, may run beside the
            products of the attention branch (and so backwards); each branch is then compiled on its own.
        short_conv: taps of a causal convolution over all tokens in front of the branches; None, as in the paper: none.
    """

    def __init__(
        self,
        *,
        d_model: int,
        attention: Callable[[], nn.Module],
        ssm: Callable[[], nn.Module],
        d_ff: int,
        split: Split,
        fusion: Callable[..., nn.Module],
        layer_idx: int = 0,
        n_layers: int = 1,
        norm_eps: float = 1e-6,
        overlap: bool = False,
        short_conv: int | None = None,
    ) -> None:
        super().__init__()
        layer = {"d_model": d_model, "d_ff": d_ff, "layer_idx": layer_idx, "n_layers": n_layers, "norm_eps": norm_eps}
        if not isinstance(overlap, bool):
            raise UserError(f"overlap={overlap} must be true or false")
        self.layer_idx, self.overlap = layer_idx, overlap
        self.attention = SequentialBlock(mixer=attention, **layer)
        self.ssm = SequentialBlock(mixer=ssm, **layer)
        self.short_conv = None
        if short_conv is not None:
            backend = getattr(self.ssm.mixer, "backend", "auto")
            self.short_conv = ShortConv(d_model=d_model, taps=short_conv, norm_eps=norm_eps, backend=backend)
        self.split = split
        self.fusion = fusion(d_model=d_model, full=split.full)
        if split.shared and not getattr(self.fusion, "takes_shared", False):
            raise UserError(
                f"split.shared={split.shared:g} gives some tokens two outputs, which this fusion does not take; use fusion=gated "
                "or fusion=sum, or split.shared=0"
            )
        self.norm = RMSNorm(d_model, eps=norm_eps)
        self.proj = nn.Linear(d_model, d_model, bias=False)

    @property
    def length_dependent(self) -> bool:
        """Whether a token's branch depends on the length of its sequence (a proportional split): padding would change it."""
        return not self.split.full and self.split.window is None

    @property
    def all_keys(self) -> bool:
        """Whether attention's tokens see the keys and values of all earlier tokens, not only of their branch's."""
        return self.split.keys == "all" and not self.split.full

    def _cost(self, n_tokens: int) -> BranchCost:
        """What the split balances, for a routing of ``n_tokens`` tokens."""
        attn = _AllKeysCost(self.attention, n_tokens) if self.all_keys else self.attention.flops
        return BranchCost(attn, self.ssm.flops)

    def token_split(self, n_tokens: int) -> TokenSplit:
        """The routing of ``n_tokens`` tokens in this block."""
        return self.split(n_tokens, self.layer_idx, self._cost(self.split.window or n_tokens))

    def forward(self, x: Tensor, carry: Carry = None) -> tuple[Tensor, Carry]:
        """(B, T, D) -> (B, T, D), carry as it came."""
        split = self.token_split(x.shape[1])
        x = x if self.short_conv is None else self.short_conv(x)
        if self.overlap and x.is_cuda:
            return self._join(x, *self._side_by_side(x, split), split), carry
        y_attn = self._attend(x, split)
        y_ssm, _ = self.ssm(split.gather_ssm(x))  # (B, n_ssm, D)
        return self._join(x, y_attn, y_ssm, split), carry

    def _attend(self, x: Tensor, split: TokenSplit) -> Tensor:
        """The attention branch's output: (B, T, D) -> (B, n_attn, D)."""
        if self.all_keys:
            return self.attention(x, queries=split.attn)[0]
        return self.attention(split.gather_attn(x), positions=split.positions_attn(x.device))[0]

    def _join(self, x: Tensor, y_attn: Tensor, y_ssm: Tensor, split: TokenSplit) -> Tensor:
        """What follows the branches: (B, T, D) -> (B, T, D)."""
        fused = self.fusion(y_attn, y_ssm, split)
        x = x + fused.to(x.dtype)  # a fusion that ends in a norm gives float32 under autocast
        return x + self.proj(self.norm(x))

    def _side_by_side(self, x: Tensor, split: TokenSplit) -> tuple[Tensor, Tensor]:
        """Both branches' outputs, the SSM's computed on a stream of its own; autograd goes back on the same streams."""
        here, aside = torch.cuda.current_stream(x.device), _side_stream(x.device)
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            y_ssm, _ = self.ssm(split.gather_ssm(x))  # (B, n_ssm, D)
        y_attn = self._attend(x, split)
        here.wait_stream(aside)
        y_ssm.record_stream(here)  # its memory belongs to the other stream
        return y_attn, y_ssm

    def compile(self, **options: Any) -> None:
        """As ``nn.Module.compile``; with ``overlap`` the branches and what joins them, because a graph has one stream."""
        if not self.overlap:
            super().compile(**options)
            return
        self.attention.compile(**options)
        self.ssm.compile(**options)
        self._join = torch.compile(self._join, **options)

    def new_cache(self, *, window: int | None = None) -> BlockCache:
        """Empty caches of both branches.

        Args:
            window: freezes the routing of a proportional split (one whose own window is null) at this length.

        Raises:
            UserError: the split is proportional and there is no ``window``; the fusion needs sums over earlier tokens.
        """
        if getattr(self.fusion, "looks_back", False):
            raise UserError(
                "fusion=cross cannot be decoded with a cache, which keeps no sums over earlier tokens; use --no-cache "
                "(transformers: use_cache=False)"
            )
        self.split.period(window)
        tail = None if self.short_conv is None else SSMState()
        return BlockCache(self.attention.new_cache(), self.ssm.new_cache(), window=window, conv=tail)

    def extend(self, x: Tensor, cache: BlockCache, carry: Any = None) -> tuple[Tensor, Any]:
        """(B, n, D) -> (B, n, D): n new tokens behind those in ``cache``; a branch without tokens does not run."""
        start = cache.seen
        split = self._section(start, start + x.shape[1], cache.window)
        x = x if self.short_conv is None else self.short_conv.extend(x, cache.conv)
        y_attn, y_ssm = split.gather_attn(x), split.gather_ssm(x)
        if self.all_keys:  # also when none of them asks: later tokens will see their keys
            y_attn, _ = self.attention.extend(x, cache.attention, queries=split.attn)
        elif split.n_attn:
            positions = start + split.positions_attn(x.device)
            y_attn, _ = self.attention.extend(y_attn, cache.attention, positions=positions)
        if split.n_ssm:
            y_ssm, _ = self.ssm.extend(y_ssm, cache.ssm)
        cache.seen += x.shape[1]
        x = x + self.fusion(y_attn, y_ssm, split)
        return x + self.proj(self.norm(x)), carry

    def _section(self, start: int, stop: int, window: int | None) -> TokenSplit:
        cost = self._cost(self.split.period(window))
        return self.split.section(start, stop, self.layer_idx, cost, window=window)

    def step_flops(self, n_before: int, *, window: int | None = None) -> int:
        """FLOPs of one decoded token behind ``n_before`` others, those of its branch alone (of both where it is shared)."""
        split = self._section(n_before, n_before + 1, window)
        outputs = 1 if self.split.full else split.n_attn + split.n_ssm
        flops = self.fusion.flops(outputs) + 2 * self.proj.weight.numel() + self._conv_flops(1)
        if split.n_attn:
            seen = n_before if self.all_keys else self._section(0, n_before, window).n_attn
            flops += self.attention.step_flops(seen)
        elif self.all_keys:
            flops += self.attention.mixer.key_flops(1)
        return flops + (self.ssm.step_flops(n_before) if split.n_ssm else 0)

    def _conv_flops(self, n_tokens: int) -> int:
        return 0 if self.short_conv is None else self.short_conv.flops(n_tokens)

    def flops(self, n_tokens: int) -> int:
        """Forward FLOPs of one sequence of ``n_tokens``: each branch on its own tokens."""
        split = self.token_split(n_tokens)
        queries = split.attn if self.all_keys else None
        branches = self.attention.flops(split.n_attn, queries=queries) + self.ssm.flops(split.n_ssm)
        outputs = n_tokens if self.split.full else split.n_attn + split.n_ssm
        both = self.fusion.flops(outputs) + 2 * self.proj.weight.numel() * n_tokens
        return branches + both + self._conv_flops(n_tokens)
