"""Triton kernels of the causal depthwise convolution with SiLU, in token-major layout. Imported on a CUDA device only.

``a[t] = bias + sum_k w[k] x[t - K + 1 + k]``, ``y = silu(a)``. The backward pass computes a again:

    da = dy * silu'(a)        dx[t] = sum_k w[k] da[t + K - 1 - k]        dw[k] = sum_t da[t] x[t - K + 1 + k]

A program walks over the tokens of a segment, four at a time, and keeps the last three of x and of da in registers, so
that x and dy are read once and dx is written once. Fewer taps than four are four of which the first are zero.
Letters: B batch, T tokens, E channels, K taps. Values of a token are (BE,).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of eighteen tried on an H200 at (64, 457, 4352) and (128, 447, 1536) the fastest; the backward of the second shape alone is
# 5 % faster with segments of 32: scripts/bench_conv.py
FORWARD_SEGMENT, BACKWARD_SEGMENT, BLOCK_E, WARPS = 64, 128, 256, 2  # tokens, tokens, channels of a program


@triton.jit
def _tap(w, channel, within, k: tl.constexpr, K: tl.constexpr):
    """Tap k of four, (BE,)."""
    first: tl.constexpr = 4 - K
    return tl.load(w + channel * K + (k - first), mask=within & (k >= first), other=0.0)


@triton.jit
def _row(x, row, n_tokens, stride, channel, within):
    """x of one token, float32 (BE,); zeros outside the sequence."""
    inside = within & (row >= 0) & (row < n_tokens)
    return tl.load(x + row * stride + channel, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _four(x, row, n_tokens, stride, channel, within):
    """x of four tokens from ``row`` on."""
    return (
        _row(x, row, n_tokens, stride, channel, within),
        _row(x, row + 1, n_tokens, stride, channel, within),
        _row(x, row + 2, n_tokens, stride, channel, within),
        _row(x, row + 3, n_tokens, stride, channel, within),
    )


@triton.jit
def _begin(x, w, bias, start, n_tokens, stride, channel, within, K: tl.constexpr):
    """The four taps, the bias, x of the three tokens before ``start`` and of the four from there on."""
    w0, w1 = _tap(w, channel, within, 0, K), _tap(w, channel, within, 1, K)
    w2, w3 = _tap(w, channel, within, 2, K), _tap(w, channel, within, 3, K)
    offset = tl.load(bias + channel, mask=within, other=0.0)
    p1 = _row(x, start - 3, n_tokens, stride, channel, within)
    p2 = _row(x, start - 2, n_tokens, stride, channel, within)
    p3 = _row(x, start - 1, n_tokens, stride, channel, within)
    n0, n1, n2, n3 = _four(x, start, n_tokens, stride, channel, within)
    return w0, w1, w2, w3, offset, p1, p2, p3, n0, n1, n2, n3


@triton.jit
def _silu(a):
    return a * tl.sigmoid(a)


@triton.jit
def _slope(a):
    """The derivative of silu."""
    gate = tl.sigmoid(a)
    return gate * (1.0 + a * (1.0 - gate))


@triton.jit
def conv_silu_forward_kernel(
    x, w, bias, y, n_tokens, n_channels, stride_b, stride_t, K: tl.constexpr, LT: tl.constexpr, BE: tl.constexpr
):
    batch = tl.program_id(2).to(tl.int64)
    start = tl.program_id(1) * LT
    channel = tl.program_id(0) * BE + tl.arange(0, BE)
    within = channel < n_channels
    x += batch * stride_b
    y += batch * n_tokens * n_channels
    w0, w1, w2, w3, offset, p1, p2, p3, n0, n1, n2, n3 = _begin(
        x, w, bias, start, n_tokens, stride_t, channel, within, K
    )
    for row in range(start, tl.minimum(start + LT, n_tokens), 4):
        x0, x1, x2, x3 = n0, n1, n2, n3
        # The next four are asked for before this four's results are written: a load does not pass an earlier store.
        n0, n1, n2, n3 = _four(x, row + 4, n_tokens, stride_t, channel, within)
        y0 = _silu(offset + w0 * p1 + w1 * p2 + w2 * p3 + w3 * x0)
        y1 = _silu(offset + w0 * p2 + w1 * p3 + w2 * x0 + w3 * x1)
        y2 = _silu(offset + w0 * p3 + w1 * x0 + w2 * x1 + w3 * x2)
        y3 = _silu(offset + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3)
        place = y + row * n_channels + channel
        tl.store(place, y0.to(y.dtype.element_ty), mask=within)
        tl.store(place + n_channels, y1.to(y.dtype.element_ty), mask=within & (row + 1 < n_tokens))
        tl.store(place + 2 * n_channels, y2.to(y.dtype.element_ty), mask=within & (row + 2 < n_tokens))
        tl.store(place + 3 * n_channels, y3.to(y.dtype.element_ty), mask=within & (row + 3 < n_tokens))
        p1, p2, p3 = x1, x2, x3


@triton.jit
def conv_silu_backward_kernel(
    dy, x, w, bias, dx, dw, dbias, n_tokens, n_channels, stride_b, stride_t, dy_stride_b, dy_stride_t, dx_stride_b, dx_stride_t,
    K: tl.constexpr, LT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """dx, and this segment's share of dw (B segments, K, E) and dbias (B segments, E)."""
    batch = tl.program_id(2).to(tl.int64)
    start = tl.program_id(1) * LT
    stop = tl.minimum(start + LT, n_tokens)
    channel = tl.program_id(0) * BE + tl.arange(0, BE)
    within = channel < n_channels
    x += batch * stride_b
    dy += batch * dy_stride_b
    dx += batch * dx_stride_b
    w0, w1, w2, w3, offset, p1, p2, p3, n0, n1, n2, n3 = _begin(
        x, w, bias, start, n_tokens, stride_t, channel, within, K
    )
    g0, g1, g2, g3 = _four(dy, start, n_tokens, dy_stride_t, channel, within)
    q1 = tl.zeros((BE,), dtype=tl.float32)  # da of the three tokens before
    q2 = tl.zeros((BE,), dtype=tl.float32)
    q3 = tl.zeros((BE,), dtype=tl.float32)
    s0 = tl.zeros((BE,), dtype=tl.float32)  # sums: taps and bias
    s1 = tl.zeros((BE,), dtype=tl.float32)
    s2 = tl.zeros((BE,), dtype=tl.float32)
    s3 = tl.zeros((BE,), dtype=tl.float32)
    sums = tl.zeros((BE,), dtype=tl.float32)
    # dx of a token needs da of the three tokens behind it: one more round, whose sums are the next segment's.
    for row in range(start, start + LT + 4, 4):
        x0, x1, x2, x3 = n0, n1, n2, n3
        y0, y1, y2, y3 = g0, g1, g2, g3
        n0, n1, n2, n3 = _four(x, row + 4, n_tokens, stride_t, channel, within)
        g0, g1, g2, g3 = _four(dy, row + 4, n_tokens, dy_stride_t, channel, within)
        d0 = y0 * _slope(offset + w0 * p1 + w1 * p2 + w2 * p3 + w3 * x0)
        d1 = y1 * _slope(offset + w0 * p2 + w1 * p3 + w2 * x0 + w3 * x1)
        d2 = y2 * _slope(offset + w0 * p3 + w1 * x0 + w2 * x1 + w3 * x2)
        d3 = y3 * _slope(offset + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3)
        if row < start + LT:
            s0 += d0 * p1 + d1 * p2 + d2 * p3 + d3 * x0
            s1 += d0 * p2 + d1 * p3 + d2 * x0 + d3 * x1
            s2 += d0 * p3 + d1 * x0 + d2 * x1 + d3 * x2
            s3 += d0 * x0 + d1 * x1 + d2 * x2 + d3 * x3
            sums += d0 + d1 + d2 + d3
        place = dx + (row - 3) * dx_stride_t + channel
        kind = dx.dtype.element_ty
        value = w3 * q1 + w2 * q2 + w1 * q3 + w0 * d0
        tl.store(place, value.to(kind), mask=within & (row - 3 >= start) & (row - 3 < stop))
        value = w3 * q2 + w2 * q3 + w1 * d0 + w0 * d1
        tl.store(place + dx_stride_t, value.to(kind), mask=within & (row - 2 >= start) & (row - 2 < stop))
        value = w3 * q3 + w2 * d0 + w1 * d1 + w0 * d2
        tl.store(place + 2 * dx_stride_t, value.to(kind), mask=within & (row - 1 >= start) & (row - 1 < stop))
        value = w3 * d0 + w2 * d1 + w1 * d2 + w0 * d3
        tl.store(place + 3 * dx_stride_t, value.to(kind), mask=within & (row < stop))
        p1, p2, p3 = x1, x2, x3
        q1, q2, q3 = d1, d2, d3
    tile = batch * tl.num_programs(1) + tl.program_id(1)
    tl.store(dbias + tile * n_channels + channel, sums, mask=within)
    last = dw + (tile * K + K - 1) * n_channels + channel
    tl.store(last, s3, mask=within)
    if K > 1:
        tl.store(last - n_channels, s2, mask=within)
    if K > 2:
        tl.store(last - 2 * n_channels, s1, mask=within)
    if K > 3:
        tl.store(last - 3 * n_channels, s0, mask=within)


def _grid(x: Tensor, segment: int, block: int) -> tuple[int, int, int]:
    n_batch, n_tokens, n_channels = x.shape
    return triton.cdiv(n_channels, block), triton.cdiv(n_tokens, segment), n_batch


def conv_silu_forward(
    x: Tensor, weight: Tensor, bias: Tensor, *, segment: int = FORWARD_SEGMENT, block: int = BLOCK_E, warps: int = WARPS
) -> Tensor:
    """x (B, T, E) with adjacent channels, weight (E, K) and bias (E,) float32 -> y (B, T, E), contiguous, in x's type.

    Args:
        segment, block, warps: tokens (a multiple of four) and channels of a program, and its warps.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    conv_silu_forward_kernel[_grid(x, segment, block)](
        x, weight, bias, y, x.shape[1], x.shape[2], x.stride(0), x.stride(1),
        K=weight.shape[1], LT=segment, BE=block, num_warps=warps,
    )  # fmt: skip
    return y


def conv_silu_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    dx: Tensor | None = None,
    segment: int = BACKWARD_SEGMENT,
    block: int = BLOCK_E,
    warps: int = WARPS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (B, T, E), and of weight (E, K) and bias (E,) in float32; options as in the forward.

    Args:
        dx: where that of x goes, with adjacent channels; None: a new contiguous tensor.

    Sums over tokens are taken segment by segment and then over segments, always in the same order.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    n_tokens, n_channels, taps = x.shape[1], x.shape[2], weight.shape[1]
    grid = _grid(x, segment, block)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if dx is None else dx
    dw = torch.empty((grid[1] * grid[2], taps, n_channels), dtype=torch.float32, device=x.device)
    dbias = torch.empty((grid[1] * grid[2], n_channels), dtype=torch.float32, device=x.device)
    conv_silu_backward_kernel[grid](
        dy, x, weight, bias, dx, dw, dbias, n_tokens, n_channels, *x.stride()[:2], *dy.stride()[:2], *dx.stride()[:2],
        K=taps, LT=segment, BE=block, num_warps=warps,
    )  # fmt: skip
    return dx, dw.sum(0).t().contiguous(), dbias.sum(0)
