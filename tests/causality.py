"""A check that several tests of blocks share."""

from __future__ import annotations

import torch
from torch import nn


def assert_causal(block: nn.Module, n_tokens: int, *, d_model: int = 16) -> None:
    """A changed token of x (1, n_tokens, d_model) changes its own output of ``block(x) -> (y, carry)`` and none before it."""
    x = torch.randn(1, n_tokens, d_model)
    with torch.no_grad():
        y, _ = block(x)
        for t in range(n_tokens):
            changed = x.clone()
            changed[:, t] += 1.0
            z, _ = block(changed)
            assert torch.allclose(y[:, :t], z[:, :t], atol=1e-6), f"token {t} changed an earlier output"
            assert not torch.allclose(y[:, t], z[:, t], atol=1e-6), f"token {t} did not reach its own output"
