"""The sequential pre-norm layer and its MLP: the layer of every sequential model, and a branch of FlowHN's parallel block.

The protocol of blocks and the letters are those of :mod:`flowhn.models.blocks`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from flowhn.models.cache import KVCache, SSMState
from flowhn.models.norms import RMSNorm
from flowhn.models.splits.base import Ranges, gather

Carry = tuple[Tensor, Tensor] | None


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``, no biases (Llama's MLP).

    Args:
        d_model: width D.
        d_ff: hidden width.
    """

    def __init__(self, *, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.d_model, self.d_ff = d_model, d_ff
        self.gate = nn.Linear(d_model, d_ff, bias=False)
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))

    def flops(self, n_tokens: int) -> int:
        """Forward FLOPs of one sequence: three projections, activations not counted."""
        return 6 * self.d_model * self.d_ff * n_tokens


class SequentialBlock(nn.Module):
    """A pre-norm layer: ``x = x + mixer(norm(x))``; with an MLP also ``x = x + mlp(norm(x))``.

    The layer of every sequential model, and each branch of FlowHN's parallel block.

    Args:
        d_model: width D.
        mixer: builds the token mixer; called without arguments.
        d_ff: hidden width of the SwiGLU MLP; None leaves the MLP out (pure Mamba layers).
        layer_idx, n_layers: part of the block protocol; this block does not depend on its depth.
        norm_eps: added to the mean square in the norms.
    """

    def __init__(
        self,
        *,
        d_model: int,
        mixer: Callable[[], nn.Module],
        d_ff: int | None = None,
        layer_idx: int = 0,
        n_layers: int = 1,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(d_model, eps=norm_eps)
        self.mixer = mixer()
        self.mlp_norm = RMSNorm(d_model, eps=norm_eps) if d_ff else None
        self.mlp = SwiGLU(d_model=d_model, d_ff=d_ff) if d_ff else None

    def forward(
        self, x: Tensor, carry: Carry = None, *, queries: Ranges | None = None, **mixer_options: Any
    ) -> tuple[Tensor, Carry]:
        """(B, T, D) -> (B, T, D), carry as it came.

        Args:
            x: tokens in order.
            queries: ascending ranges of tokens, of which alone there is an output (B, n, D); an attention mixer lets them
                see all earlier tokens of x. None: all.
            mixer_options: go to the mixer (attention's positions).
        """
        normed = self.mixer_norm(x)
        if queries is None:
            x = x + self.mixer(normed, **mixer_options)
        else:
            x = gather(x, queries) + self.mixer(normed, queries=queries, **mixer_options)
        if self.mlp is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return x, carry

    def new_cache(self, *, window: int | None = None) -> KVCache | SSMState:
        """The mixer's empty cache; ``window`` is part of the protocol and of no meaning here."""
        own = getattr(self.mixer, "sliding_window", None)
        return self.mixer.new_cache() if own is None else self.mixer.new_cache(window=own)

    def extend(
        self,
        x: Tensor,
        cache: KVCache | SSMState,
        carry: Any = None,
        *,
        queries: Ranges | None = None,
        **mixer_options: Any,
    ) -> tuple[Tensor, Any]:
        """(B, n, D) -> (B, n, D): n new tokens behind those in ``cache``; ``queries``, carry as in :meth:`forward`."""
        if queries is not None:
            mixer_options["queries"] = queries
        y = self.mixer.extend(self.mixer_norm(x), cache, **mixer_options)
        x = (x if queries is None else gather(x, queries)) + (y[0] if isinstance(y, tuple) else y)
        return x + self.mlp(self.mlp_norm(x)) if self.mlp is not None else x, carry

    def step_flops(self, n_before: int, *, window: int | None = None) -> int:
        """FLOPs of one decoded token behind ``n_before`` others; ``window`` is of no meaning here."""
        return self.mixer.step_flops(n_before) + (self.mlp.flops(1) if self.mlp is not None else 0)

    def flops(self, n_tokens: int, *, queries: Ranges | None = None) -> int:
        """Forward FLOPs of one sequence of ``n_tokens``; with ``queries`` of these, which also see other tokens."""
        mixer = self.mixer.flops(n_tokens) if queries is None else self.mixer.flops(n_tokens, queries=queries)
        return mixer + (self.mlp.flops(n_tokens) if self.mlp is not None else 0)
