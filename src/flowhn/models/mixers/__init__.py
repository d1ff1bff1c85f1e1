"""Mixers: token-mixing modules (B, T, D) -> (B, T, D), each causal, each with its own ``flops(n_tokens)``."""

from flowhn.models.mixers.attention import Attention
from flowhn.models.mixers.mamba1 import Mamba1
from flowhn.models.mixers.mamba2 import Mamba2

__all__ = ["Attention", "Mamba1", "Mamba2"]
