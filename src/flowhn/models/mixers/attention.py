"""Causal grouped-query attention with optional RoPE, sliding window and meta tokens."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowhn.errors import UserError
from flowhn.models.cache import KVCache, Sight
from flowhn.models.kernels import flash_sdpa_usable, resolve_attention
from flowhn.models.mixers.rope import apply_rope
from flowhn.models.splits.base import Ranges, count, gather, spread


def _build_mask(n_tokens: int, window: int, n_meta: int, device: torch.device) -> Tensor:
    query = torch.arange(n_tokens, device=device)[:, None]
    key = torch.arange(n_tokens, device=device)[None, :]
    return (key <= query) & ((key > query - window) | (key < n_meta))  # (T, T)


@lru_cache(maxsize=8)
def _cached_mask(n_tokens: int, window: int, n_meta: int, device: torch.device) -> Tensor:
    # A mask born in inference mode could not be saved for a later training step's backward.
    with torch.inference_mode(False):
        return _build_mask(n_tokens, window, n_meta, device)


def window_mask(n_tokens: int, window: int, n_meta: int, device: torch.device) -> Tensor:
    """Boolean (T, T): may query i (row) see key j (column): ``i - window < j <= i``, or ``j < n_meta`` and ``j <= i``.

    Kept for the last few shapes, except while torch.compile traces (its tensors must not outlive the trace).
    """
    build = _build_mask if torch.compiler.is_compiling() else _cached_mask
    return build(n_tokens, window, n_meta, device)


def causal_tail(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the last n of m tokens, each seeing all before it and itself: (B, H, n, d_head) -> the same shape.

    On CUDA torch's flash attention, which alone among SDPA's kernels aligns a causal mask with the last key; its operator is
    called directly, since ``scaled_dot_product_attention(is_causal=True)`` means the first key and would need a dense mask here.

    Args:
        q: (B, H, n, d_head); on CUDA see :func:`flash_takes`.
        k, v: (B, n_kv_heads, m, d_head), m at least n.
    """
    if q.is_cuda:
        return torch.ops.aten._scaled_dot_product_flash_attention.default(q, k, v, 0.0, True, False)[0]
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def flash_takes(q: Tensor) -> bool:
    """Whether torch's flash attention can be called for these queries (B, H, n, d_head) as they are."""
    narrow = q.shape[-1] % 8 == 0 and q.shape[-1] <= 192  # wider heads: not on every GPU
    fits = narrow and q.dtype in (torch.bfloat16, torch.float16)
    return q.is_cuda and fits and flash_sdpa_usable()


class Attention(nn.Module):
    """``softmax(Q K^T / sqrt(d_head)) V`` with a causal mask, per head; groups of queries share keys and values.

    FlowHN's attention branch uses it without positional encoding (paper.md, as in Jamba), Llama with RoPE, Hymba with a
    sliding window, meta tokens and keys and values shared between neighbouring layers. No biases.
    Parameter names follow transformers' Llama: q_proj, k_proj, v_proj, o_proj.

    Args:
        d_model: width D.
        n_heads: query heads.
        n_kv_heads: key and value heads; None for ``n_heads``. Must divide ``n_heads``.
        d_head: channels per head; None for ``d_model / n_heads``.
        rope: rotate queries and keys by their position.
        rope_theta: base of RoPE's wavelengths.
        sliding_window: W; query i sees keys i - W < j <= i. None for all earlier tokens. Distances are counted in the
            tokens given, not in ``positions``.
        n_meta_tokens: the first tokens of the sequence, always visible to later ones whatever the window.
        shares_kv: own no key and value weights; ``forward`` then needs ``kv``.
        backend: auto, sdpa or flash_attn (see :mod:`flowhn.models.kernels`). A window with meta tokens is no pattern
            that flash_attn knows: sequences longer than the window run SDPA there.

    Raises:
        UserError: heads that do not divide the width or each other, an odd ``d_head`` with RoPE, a window below 1.
    """

    kernel_kind = "attention"

    def __init__(
        self,
        *,
        d_model: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        d_head: int | None = None,
        rope: bool = False,
        rope_theta: float = 10000.0,
        sliding_window: int | None = None,
        n_meta_tokens: int = 0,
        shares_kv: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if n_heads < 1 or (d_head is None and d_model % n_heads):
            raise UserError(f"n_heads={n_heads} does not divide d_model={d_model}; choose a divisor, or set d_head")
        if n_kv_heads < 1 or n_heads % n_kv_heads:
            raise UserError(f"n_kv_heads={n_kv_heads} does not divide n_heads={n_heads}; choose a divisor")
        d_head = d_model // n_heads if d_head is None else d_head
        if rope and d_head % 2:
            raise UserError(f"d_head={d_head} is odd, which RoPE cannot rotate; choose n_heads so that d_head is even")
        if sliding_window is not None and sliding_window < 1:
            raise UserError(f"sliding_window={sliding_window} must be at least 1; use null for full attention")
        resolve_attention("auto" if backend == "flash_attn" else backend, "cpu")  # refuses an unknown name at once
        self.d_model, self.n_heads, self.n_kv_heads, self.d_head = d_model, n_heads, n_kv_heads, d_head
        self.rope, self.rope_theta = rope, rope_theta
        self.sliding_window, self.n_meta_tokens = sliding_window, n_meta_tokens
        self.shares_kv, self.backend = shares_kv, backend
        self.q_proj = nn.Linear(d_model, n_heads * d_head, bias=False)
        if not shares_kv:
            self.k_proj = nn.Linear(d_model, n_kv_heads * d_head, bias=False)
            self.v_proj = nn.Linear(d_model, n_kv_heads * d_head, bias=False)
        self.o_proj = nn.Linear(n_heads * d_head, d_model, bias=False)

    def kernel(self, device_type: str) -> str:
        """``sdpa`` or ``flash_attn``: what long sequences run on a device type."""
        resolved = resolve_attention(self.backend, device_type)
        return "sdpa" if self.sliding_window is not None and self.n_meta_tokens else resolved

    def project_kv(self, x: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys (after RoPE) and values, each (B, n_kv_heads, T, d_head), for this layer and those that share them."""
        if self.shares_kv:
            raise UserError("shares_kv=true leaves this attention without key and value weights; pass kv to forward")
        k = self.k_proj(x).unflatten(-1, (self.n_kv_heads, self.d_head)).transpose(1, 2)
        v = self.v_proj(x).unflatten(-1, (self.n_kv_heads, self.d_head)).transpose(1, 2)
        return self._rotate(k, positions), v

    def forward(
        self,
        x: Tensor,
        *,
        positions: Tensor | None = None,
        kv: tuple[Tensor, Tensor] | None = None,
        queries: Ranges | None = None,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D); with ``queries`` (B, n, D), their outputs in order.

        Args:
            x: tokens in order.
            positions: (T,) integer positions for RoPE; None for 0, 1, 2, ...
            kv: keys and values of the same tokens from :meth:`project_kv` of another layer.
            queries: ascending ranges of the n tokens that ask; each sees all earlier tokens of x and itself. None: all.
        """
        if queries is not None:
            x = x[:, : queries[-1][1] if queries else 0]  # nobody asks for what comes later
        k, v = self.project_kv(x, positions) if kv is None else kv
        q = self._split_heads(self.q_proj(x if queries is None else gather(x, queries)))  # (B, H, n, d_head)
        if queries and self._takes_tails(q):
            y = self._attend_tails(q, k, v, positions, queries)
            return self.o_proj(y.transpose(1, 2).flatten(2))
        if queries is not None:
            q = self._spread(q, queries, x.shape[1])
        q = self._rotate(q, positions)
        y = self._attend(q, k, v) if x.shape[1] else q
        y = y.transpose(1, 2).flatten(2)  # (B, T, H * d_head)
        return self.o_proj(y if queries is None else gather(y, queries))

    def _split_heads(self, q: Tensor) -> Tensor:
        """(B, n, H * d_head) -> (B, H, n, d_head)."""
        return q.unflatten(-1, (self.n_heads, self.d_head)).transpose(1, 2)

    def _spread(self, q: Tensor, queries: Ranges, n_tokens: int) -> Tensor:
        """(B, H, n, d_head) -> (B, H, T, d_head). Tokens that do not ask get a query of zeros and their row is thrown away.

        So SDPA sees one causal square, for which it has its fast kernels on every device, where queries fewer than keys
        would need a dense mask. It costs no more than No_Split's attention does.
        """
        return spread(q.transpose(1, 2), queries, n_tokens).transpose(1, 2)

    def _takes_tails(self, q: Tensor) -> bool:
        """Whether a kernel computes a causal trapezium, so that tokens that do not ask cost nothing."""
        if self.sliding_window is not None:
            return False
        return resolve_attention(self.backend, q.device.type) == "flash_attn" or flash_takes(q)

    def _attend_tails(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None, queries: Ranges) -> Tensor:
        """As :meth:`_attend` for the queries alone, one call for each range: (B, H, n, d_head) -> the same shape."""
        if self.rope:
            every = torch.arange(k.shape[2], device=q.device) if positions is None else positions
            q = self._rotate(q, torch.cat([every[start:stop] for start, stop in queries]))
        tail = self._flash if resolve_attention(self.backend, q.device.type) == "flash_attn" else causal_tail
        ends = [stop for _, stop in queries]
        pieces = q.split([stop - start for start, stop in queries], dim=2)
        done = []
        for piece, end in zip(pieces, ends, strict=True):
            attend = self._attend if piece.shape[2] == end else tail  # a square from the first token on: SDPA's fastest
            done.append(attend(piece, k[:, :, :end], v[:, :, :end]))
        return done[0] if len(done) == 1 else torch.cat(done, dim=2)

    def new_cache(self, *, window: int | None = None) -> KVCache:
        """An empty cache of this attention's keys and values.

        Args:
            window: keep no more than this many tokens beside the meta tokens; :attr:`sliding_window` unless another
                attention that sees further reads the same cache.
        """
        return KVCache(window=window, n_meta=self.n_meta_tokens)

    def extend(
        self,
        x: Tensor,
        cache: KVCache | None,
        *,
        positions: Tensor | None = None,
        sight: Sight | None = None,
        queries: Ranges | None = None,
    ) -> tuple[Tensor, Sight]:
        """n new tokens behind those in ``cache``, which takes them up; always on SDPA once the cache holds tokens.

        Args:
            x: (B, n, D).
            cache: of :meth:`new_cache`; unused when ``sight`` is given.
            positions: (n,) integer positions for RoPE; None: they follow the tokens that the cache has seen.
            sight: what the ``extend`` of another layer returned for the same tokens (its keys and values are shared).
            queries: ascending ranges of the new tokens that ask, numbered from 0; None: all. The cache takes up all.

        Returns:
            (B, n, D) or as many tokens as ask, and the keys and values that were in sight.
        """
        start = cache.seen if sight is None else sight.start
        if positions is None:
            positions = torch.arange(start, start + x.shape[1], device=x.device)
        if sight is None:
            sight = cache.append(*self.project_kv(x, positions))
        if queries is not None and not count(queries):
            return x[:, :0], sight
        q = self._split_heads(self.q_proj(x if queries is None else gather(x, queries)))
        q = self._rotate(q if queries is None else self._spread(q, queries, x.shape[1]), positions)  # (B, H, n, d_head)
        y = self._attend_back(q, sight) if start else self._attend(q, sight.k, sight.v)
        y = y.transpose(1, 2).flatten(2)  # (B, n, H * d_head)
        return self.o_proj(y if queries is None else gather(y, queries)), sight

    def _attend_back(self, q: Tensor, sight: Sight) -> Tensor:
        """(B, H, n, d_head) -> the same shape; one new token sees all it is given, so that it needs no mask."""
        gqa = self.n_kv_heads != self.n_heads
        if q.shape[2] == 1:
            k, v = sight.last_token(self.sliding_window, self.n_meta_tokens)
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=gqa)
        mask = sight.mask(q.shape[2], self.sliding_window, self.n_meta_tokens)
        return F.scaled_dot_product_attention(q, sight.k, sight.v, attn_mask=mask, enable_gqa=gqa)

    def _rotate(self, x: Tensor, positions: Tensor | None) -> Tensor:
        if not self.rope:
            return x
        if positions is None:
            positions = torch.arange(x.shape[2], device=x.device)
        return apply_rope(x, positions, self.rope_theta)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, T, d_head), (B, n_kv_heads, T, d_head) twice -> (B, H, T, d_head)."""
        n_tokens = q.shape[2]
        windowed = self.sliding_window is not None and n_tokens > self.sliding_window
        use_flash = resolve_attention(self.backend, q.device.type) == "flash_attn"
        if use_flash and not (windowed and self.n_meta_tokens):
            return self._flash(q, k, v, self.sliding_window if windowed else None)
        mask = window_mask(n_tokens, self.sliding_window, self.n_meta_tokens, q.device) if windowed else None
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.n_kv_heads != self.n_heads
        )

    def _flash(self, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
        if q.dtype not in (torch.bfloat16, torch.float16):
            raise UserError(f"attention=flash_attn cannot run in {q.dtype}; use precision=bf16-mixed or attention=sdpa")
        from flash_attn import flash_attn_func  # optional package: kernels.py has probed it

        size = (-1, -1) if window is None else (window - 1, 0)
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # (B, T, heads, d_head)
        return flash_attn_func(q, k, v, causal=True, window_size=size).transpose(1, 2)

    def flops(self, n_tokens: int, *, queries: Ranges | None = None) -> int:
        """Forward FLOPs of one sequence: projections 2 * in * out a token, attention 4 per visible pair and channel.

        Visible pairs are counted as areas, a causal square of n tokens being n * n / 2 (half of the full matrix).

        Args:
            n_tokens: tokens that ask.
            queries: where these stand, when they also see tokens that do not ask: keys and values are then made for all
                tokens up to the last that asks. What the fast kernels compute in vain is not counted.
        """
        queries = ((0, n_tokens),) if queries is None else queries
        n_keys = queries[-1][1] if queries else 0
        keys = 0 if self.shares_kv else 2 * self.n_kv_heads * n_keys
        linear = 2 * self.d_model * self.d_head * (2 * self.n_heads * n_tokens + keys)
        doubled_pairs = sum(self._doubled_pairs(stop) - self._doubled_pairs(start) for start, stop in queries)
        return linear + 2 * doubled_pairs * self.n_heads * self.d_head

    def _doubled_pairs(self, n_tokens: int) -> int:
        """Twice the area of what the first ``n_tokens`` tokens see."""
        window = n_tokens if self.sliding_window is None else min(self.sliding_window, n_tokens)
        beyond = n_tokens - window
        doubled = window * window + 2 * beyond * window
        if beyond:  # tokens past the window still see the meta tokens
            meta = min(self.n_meta_tokens, beyond)
            doubled += meta * meta + 2 * (beyond - meta) * meta
        return doubled

    def key_flops(self, n_tokens: int) -> int:
        """FLOPs of the keys and values alone, for tokens that do not ask but are seen later."""
        return 0 if self.shares_kv else 4 * self.d_model * self.d_head * self.n_kv_heads * n_tokens

    def step_flops(self, n_before: int) -> int:
        """FLOPs of one decoded token behind ``n_before`` others: counted as in :meth:`flops`, keys in sight exactly."""
        projections = self.n_heads if self.shares_kv else self.n_heads + 2 * self.n_kv_heads
        visible = n_before + 1
        if self.sliding_window is not None and visible > self.sliding_window:
            beyond = visible - self.sliding_window
            visible = self.sliding_window + min(self.n_meta_tokens, beyond)
        return 2 * self.d_head * (self.d_model * (projections + self.n_heads) + 2 * visible * self.n_heads)
