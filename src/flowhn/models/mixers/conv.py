"""Causal depthwise convolution over time: as a sum of shifted products, or one Triton kernel on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from flowhn.models.kernels import ANY_STRIDES, triton_usable

KERNEL_TAPS = 4  # more do not fit the Triton kernel's registers; d_conv is 4 in every model of the paper


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


def causal_conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None, *, kernel: str) -> Tensor:
    """``silu(causal_conv(x, weight, bias))``, shapes as there.

    Args:
        kernel: what the mixer's scan runs on; ``torch`` keeps to plain torch, anything else takes the Triton kernel
            where Triton works and there are at most four taps (sums in float32; written once instead of once for each tap).
    """
    fused = kernel != "torch" and x.device.type == "cuda" and triton_usable() and weight.shape[-1] <= KERNEL_TAPS
    if not fused or not x.shape[1]:
        return F.silu(causal_conv(x, weight, bias))
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    return conv_silu(x, weight.squeeze(1).float().contiguous(), bias.float())


@torch.library.custom_op("flowhn::conv_silu", mutates_args=(), tags=ANY_STRIDES)
def conv_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (B, T, E), weight (E, K), bias (E,) -> (B, T, E), contiguous."""
    from flowhn.models.mixers.conv_triton import conv_silu_forward  # needs Triton

    return conv_silu_forward(x, weight, bias)


@torch.library.custom_op("flowhn::conv_silu_backward", mutates_args=(), tags=ANY_STRIDES)
def conv_silu_backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias."""
    from flowhn.models.mixers import conv_triton

    return conv_triton.conv_silu_backward(dy, x, weight, bias)


@conv_silu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@conv_silu_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return conv_silu_backward(dy, *ctx.saved_tensors)


conv_silu.register_autograd(_differentiate, setup_context=_save)
