"""Triton kernels of the causal depthwise convolution with SiLU, in token-major layout. Imported on a CUDA device only.

``a[t] = bias + sum_k w[k] x[t - K + 1 + k]``, ``y = silu(a)``. The backward pass computes a again:

    da = dy * silu'(a)        dx[t] = sum_k w[k] da[t + K - 1 - k]        dw[k] = sum_t da[t] x[t - K + 1 + k]

Letters: B batch, T tokens, E channels, K taps. Shapes of the tiles: (BT, BE).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_T, BLOCK_E = 32, 128


@triton.jit
def _activation(
    x, w, bias, row, channel, n_channels, n_tokens, stride_t, K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr
):
    """a, float32 (BT, BE); ``x`` points at the sequence's first token."""
    a = tl.zeros((BT, BE), dtype=tl.float32) + tl.load(bias + channel, mask=channel < n_channels, other=0.0)[None, :]
    for k in tl.static_range(K):
        source = row - (K - 1) + k
        tap = tl.load(w + channel * K + k, mask=channel < n_channels, other=0.0)
        mask = ((source >= 0) & (source < n_tokens))[:, None] & (channel < n_channels)[None, :]
        a += tap[None, :] * tl.load(x + source[:, None] * stride_t + channel[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    return a


@triton.jit
def conv_silu_forward_kernel(
    x, w, bias, y, n_tokens, n_channels, stride_b, stride_t, K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr
):
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * BT + tl.arange(0, BT)
    channel = tl.program_id(0) * BE + tl.arange(0, BE)
    a = _activation(x + batch * stride_b, w, bias, row, channel, n_channels, n_tokens, stride_t, K, BT, BE)
    place = y + batch * n_tokens * n_channels + row[:, None] * n_channels + channel[None, :]
    tl.store(
        place,
        (a * tl.sigmoid(a)).to(y.dtype.element_ty),
        mask=(row < n_tokens)[:, None] & (channel < n_channels)[None, :],
    )


@triton.jit
def conv_silu_backward_kernel(
    dy, x, w, bias, da, dw, dbias, n_tokens, n_channels, stride_b, stride_t, dy_stride_b, dy_stride_t,
    K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """da, and this tile's share of dw (tiles, K, E) and dbias (tiles, E)."""
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * BT + tl.arange(0, BT)
    channel = tl.program_id(0) * BE + tl.arange(0, BE)
    inside = (row < n_tokens)[:, None] & (channel < n_channels)[None, :]
    start = x + batch * stride_b
    a = _activation(start, w, bias, row, channel, n_channels, n_tokens, stride_t, K, BT, BE)
    given = tl.load(dy + batch * dy_stride_b + row[:, None] * dy_stride_t + channel[None, :], mask=inside, other=0.0)
    gate = tl.sigmoid(a)
    grad = given.to(tl.float32) * gate * (1.0 + a * (1.0 - gate))
    tl.store(
        da + batch * n_tokens * n_channels + row[:, None] * n_channels + channel[None, :],
        grad.to(da.dtype.element_ty),
        mask=inside,
    )
    tile = batch * tl.num_programs(1) + tl.program_id(1)
    tl.store(dbias + tile * n_channels + channel, tl.sum(grad, axis=0), mask=channel < n_channels)
    for k in tl.static_range(K):
        source = row - (K - 1) + k
        mask = ((source >= 0) & (row < n_tokens))[:, None] & (channel < n_channels)[None, :]
        value = tl.load(start + source[:, None] * stride_t + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(dw + (tile * K + k) * n_channels + channel, tl.sum(grad * value, axis=0), mask=channel < n_channels)


@triton.jit
def conv_silu_backward_input_kernel(
    da, w, dx, n_tokens, n_channels, K: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr
):
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * BT + tl.arange(0, BT)
    channel = tl.program_id(0) * BE + tl.arange(0, BE)
    start = batch * n_tokens * n_channels
    grad = tl.zeros((BT, BE), dtype=tl.float32)
    for k in tl.static_range(K):
        source = row + (K - 1) - k
        tap = tl.load(w + channel * K + k, mask=channel < n_channels, other=0.0)
        mask = (source < n_tokens)[:, None] & (channel < n_channels)[None, :]
        grad += tap[None, :] * tl.load(
            da + start + source[:, None] * n_channels + channel[None, :], mask=mask, other=0.0
        ).to(tl.float32)
    inside = (row < n_tokens)[:, None] & (channel < n_channels)[None, :]
    tl.store(dx + start + row[:, None] * n_channels + channel[None, :], grad.to(dx.dtype.element_ty), mask=inside)


def _grid(x: Tensor) -> tuple[int, int, int]:
    n_batch, n_tokens, n_channels = x.shape
    return triton.cdiv(n_channels, BLOCK_E), triton.cdiv(n_tokens, BLOCK_T), n_batch


def conv_silu_forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (B, T, E) with adjacent channels, weight (E, K) and bias (E,) float32 -> y (B, T, E), contiguous, in x's type."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    conv_silu_forward_kernel[_grid(x)](
        x, weight, bias, y, x.shape[1], x.shape[2], x.stride(0), x.stride(1), K=weight.shape[1], BT=BLOCK_T, BE=BLOCK_E
    )
    return y


def conv_silu_backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (B, T, E), contiguous, and of weight (E, K) and bias (E,) in float32.

    Sums over tokens are taken tile by tile and then over tiles, always in the same order.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    n_tokens, n_channels, taps = x.shape[1], x.shape[2], weight.shape[1]
    grid = _grid(x)
    da = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dw = torch.empty((grid[1] * grid[2], taps, n_channels), dtype=torch.float32, device=x.device)
    dbias = torch.empty((grid[1] * grid[2], n_channels), dtype=torch.float32, device=x.device)
    conv_silu_backward_kernel[grid](
        dy, x, weight, bias, da, dw, dbias, n_tokens, n_channels, x.stride(0), x.stride(1), dy.stride(0), dy.stride(1),
        K=taps, BT=BLOCK_T, BE=BLOCK_E,
    )  # fmt: skip
    dx = torch.empty_like(da)
    conv_silu_backward_input_kernel[grid](da, weight, dx, n_tokens, n_channels, K=taps, BT=BLOCK_T, BE=BLOCK_E)
    return dx, dw.sum(0).t().contiguous(), dbias.sum(0)
