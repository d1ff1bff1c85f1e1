"""Causal depthwise convolution over time, as a sum of shifted products."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``y[t] = bias + sum_k weight[k] x[t - K + 1 + k]`` for each channel, with zeros before the first token.

    Equal to ``F.conv1d`` with ``groups=channels`` and left padding.

    Args:
        x: (B, T, channels).
        weight: (channels, 1, K), the layout of ``nn.Conv1d``; cast to x's type.
        bias: (channels,) or None.

    Returns:
        (B, T, channels).
    """
    n_tokens, width = x.shape[1], weight.shape[-1]
    taps = weight.squeeze(1).to(x.dtype)
    padded = F.pad(x, (0, 0, width - 1, 0))
    y = padded[:, :n_tokens] * taps[:, 0]
    for k in range(1, width):
        y = y + padded[:, k : k + n_tokens] * taps[:, k]
    return y if bias is None else y + bias.to(x.dtype)
