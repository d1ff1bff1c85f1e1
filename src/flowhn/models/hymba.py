"""Hymba's block: attention and Mamba heads read the same tokens in one layer (Dong et al. 2024, arXiv 2411.13676).

    h = RMSNorm(x);  x = x + (b_a * rms(Attention(h)) + b_s * rms(Mamba(h))) / 2;  x = x + SwiGLU(RMSNorm(x))

b_a and b_s are learnt vectors of width D (the weights of ``attention_norm`` and ``ssm_norm``). Sliding-window attention
everywhere except in the first, middle and last layer; keys and values shared between neighbouring layers; meta tokens
in front of the sequence, which stay visible outside the window (:class:`~flowhn.models.lm.CausalLM` adds them).

Deviations from the original:
- Each mixer has its own output projection and is normalised after it; the original normalises the heads' outputs and
  applies one shared output projection, and shares the input projection of attention and Mamba.
- Layers share keys and values in fixed pairs (0, 1), (2, 3), ...; the original pairs sliding-window layers only, of
  which three or four layers (tiny, 135m) leave no pair.
- The MLP's activation is SwiGLU as in the other models here.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from flowhn.models.cache import BlockCache, Sight
from flowhn.models.norms import RMSNorm
from flowhn.models.sequential import Carry, SwiGLU


class HymbaBlock(nn.Module):
    """One Hymba layer. The carry is the (k, v) that the next layer of a pair reuses, each (B, n_kv_heads, T, d_head).

    Args:
        d_model: width D.
        attention: builds the attention; called with ``shares_kv`` and, in layers of global attention, with
            ``sliding_window=None`` in place of its own window.
        ssm: builds the SSM mixer; called without arguments.
        d_ff: hidden width of the MLP.
        layer_idx, n_layers: index of this layer from 0, and how many there are; they decide window and sharing.
        norm_eps: added to the mean square in the norms.
    """

    def __init__(
        self,
        *,
        d_model: int,
        attention: Callable[..., nn.Module],
        ssm: Callable[[], nn.Module],
        d_ff: int,
        layer_idx: int = 0,
        n_layers: int = 1,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        # Hymba-1.5B: layers 0, 15 and 31 of 32.
        global_layers = (0, (n_layers - 1) // 2, n_layers - 1)
        self.is_global = layer_idx in global_layers
        self.reuses_kv = layer_idx % 2 == 1
        self.provides_kv = not self.reuses_kv and layer_idx + 1 < n_layers
        self.pair_is_global = self.is_global or (self.provides_kv and layer_idx + 1 in global_layers)
        self.mixer_norm = RMSNorm(d_model, eps=norm_eps)
        window = {"sliding_window": None} if self.is_global else {}
        self.attention = attention(shares_kv=self.reuses_kv, **window)
        self.ssm = ssm()
        self.attention_norm = RMSNorm(d_model, eps=norm_eps)
        self.ssm_norm = RMSNorm(d_model, eps=norm_eps)
        self.mlp_norm = RMSNorm(d_model, eps=norm_eps)
        self.mlp = SwiGLU(d_model=d_model, d_ff=d_ff)

    def forward(self, x: Tensor, carry: Carry = None) -> tuple[Tensor, Carry]:
        """(B, T, D) -> (B, T, D); takes the previous layer's (k, v) or hands its own to the next."""
        h = self.mixer_norm(x)
        kv = carry if self.reuses_kv else self.attention.project_kv(h)
        y_attn = self.attention_norm(self.attention(h, kv=kv))
        y_ssm = self.ssm_norm(self.ssm(h))
        x = x + (y_attn + y_ssm) / 2
        x = x + self.mlp(self.mlp_norm(x))
        return x, kv if self.provides_kv else None

    def new_cache(self, *, window: int | None = None) -> BlockCache:
        """Empty caches; a layer that reuses keys and values has none of its own, and a pair keeps what the layer of the two
        that sees furthest needs. ``window`` is part of the protocol and of no meaning here.
        """
        sliding = None if self.pair_is_global else self.attention.sliding_window
        return BlockCache(None if self.reuses_kv else self.attention.new_cache(window=sliding), self.ssm.new_cache())

    def extend(self, x: Tensor, cache: BlockCache, carry: Sight | None = None) -> tuple[Tensor, Sight | None]:
        """(B, n, D) -> (B, n, D): n new tokens behind those in ``cache``; the carry is what the pair has in sight."""
        h = self.mixer_norm(x)
        y_attn, sight = self.attention.extend(h, cache.attention, sight=carry if self.reuses_kv else None)
        y_ssm = self.ssm_norm(self.ssm.extend(h, cache.ssm))
        x = x + (self.attention_norm(y_attn) + y_ssm) / 2
        cache.seen += x.shape[1]
        return x + self.mlp(self.mlp_norm(x)), sight if self.provides_kv else None

    def step_flops(self, n_before: int, *, window: int | None = None) -> int:
        """FLOPs of one decoded token behind ``n_before`` others; ``window`` is of no meaning here."""
        return self.attention.step_flops(n_before) + self.ssm.step_flops(n_before) + self.mlp.flops(1)

    def flops(self, n_tokens: int) -> int:
        """Forward FLOPs of one sequence of ``n_tokens``."""
        return self.attention.flops(n_tokens) + self.ssm.flops(n_tokens) + self.mlp.flops(n_tokens)
