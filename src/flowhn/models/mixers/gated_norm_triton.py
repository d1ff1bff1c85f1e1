"""Triton kernels of Mamba-2's gated RMSNorm. Imported on a CUDA device only.

For a token and a group of D channels, with g = y silu(z) and r = 1 / sqrt(mean(g^2) + eps):

    out = r w g        dg = r (w dout - r^2 g mean(w dout g))        dy = dg silu(z)        dz = dg y silu'(z)
    dw = sum over tokens of r g dout

torch.compile makes a kernel for each of dy and dz, which read everything and reduce twice, and reads y and z twice in the
forward. Here a program takes every n-th token, reads once, and keeps w and its share of dw in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowhn.models.kernels import takes_register_caps

# The fastest on an H200 of 4, 8 and 16 programs and of 8 and 16 channels: scripts/bench_norm.py
PROGRAMS = 8  # for a processor of the GPU
CHANNELS = 16  # of a thread
# The most of a backward thread's. 0: as the compiler likes, which at 4,096 channels is 182 and leaves a processor room for one
# program. Not measured: with 128 there is room for two, and a little is spilt.
REGISTERS = 0


@triton.jit
def _gate(z):
    """silu(z) and its derivative."""
    gate = tl.sigmoid(z)
    return z * gate, gate * (1.0 + z * (1.0 - gate))


@triton.jit
def _row(x, row, n_tokens, stride_b, stride_t, column, inside):
    """One group of one token, float32 (BD,)."""
    start = x + row // n_tokens * stride_b + row % n_tokens * stride_t
    return tl.load(start + column, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def gated_norm_forward_kernel(
    y, z, w, out, scales, eps, n_rows, n_tokens, n_groups, y_b, y_t, z_b, z_t, D: tl.constexpr, BD: tl.constexpr
):
    """out (B T, G D) and scales (B T, G): r."""
    group = tl.program_id(1)
    inside = tl.arange(0, BD) < D
    column = group * D + tl.arange(0, BD)
    weight = tl.load(w + column, mask=inside, other=0.0)
    first = tl.program_id(0).to(tl.int64)
    for number in tl.range(0, tl.cdiv(n_rows - tl.program_id(0), tl.num_programs(0)), num_stages=2):
        row = first + number * tl.num_programs(0)
        silu, _ = _gate(_row(z, row, n_tokens, z_b, z_t, column, inside))
        gated = _row(y, row, n_tokens, y_b, y_t, column, inside) * silu
        scale = tl.rsqrt(tl.sum(gated * gated, axis=0) / D + eps)
        tl.store(scales + row * n_groups + group, scale)
        tl.store(out + row * n_groups * D + column, (gated * scale * weight).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gated_norm_backward_kernel(
    dout, y, z, w, scales, dy, dz, dw, n_rows, n_tokens, n_groups, dout_b, dout_t, y_b, y_t, z_b, z_t, dz_b, dz_t,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dy (B T, G D), dz (B, T, G D), and of each program dw (programs, G D)."""
    group = tl.program_id(1)
    inside = tl.arange(0, BD) < D
    column = group * D + tl.arange(0, BD)
    weight = tl.load(w + column, mask=inside, other=0.0)
    summed = tl.zeros((BD,), dtype=tl.float32)
    first = tl.program_id(0).to(tl.int64)
    for number in tl.range(0, tl.cdiv(n_rows - tl.program_id(0), tl.num_programs(0)), num_stages=2):
        row = first + number * tl.num_programs(0)
        silu, slope = _gate(_row(z, row, n_tokens, z_b, z_t, column, inside))
        value = _row(y, row, n_tokens, y_b, y_t, column, inside)
        given = _row(dout, row, n_tokens, dout_b, dout_t, column, inside)
        scale = tl.load(scales + row * n_groups + group)
        normed = value * silu * scale
        summed += given * normed
        given *= weight
        d_gated = scale * (given - normed * (tl.sum(given * normed, axis=0) / D))
        tl.store(dy + row * n_groups * D + column, (d_gated * silu).to(dy.dtype.element_ty), mask=inside)
        place = dz + row // n_tokens * dz_b + row % n_tokens * dz_t + column
        tl.store(place, (d_gated * value * slope).to(dz.dtype.element_ty), mask=inside)
    tl.store(dw + tl.program_id(0) * n_groups * D + column, summed, mask=inside)


def _launch(z: Tensor, n_groups: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid, widths and warps."""
    width = z.shape[2] // n_groups
    processors = torch.cuda.get_device_properties(z.device).multi_processor_count if z.is_cuda else 1
    block = triton.next_power_of_2(width)
    warps = min(16, max(1, block // (32 * CHANNELS)))
    return (min(z.shape[0] * z.shape[1], PROGRAMS * processors), n_groups), {
        "D": width,
        "BD": block,
        "num_warps": warps,
    }


def gated_norm_forward(y: Tensor, z: Tensor, weight: Tensor, eps: float, n_groups: int) -> tuple[Tensor, Tensor]:
    """y, z (B, T, G D) with adjacent channels, weight (G D,) float32 -> out (B, T, G D) in z's type, and r (B, T, G), float32."""
    out, scales = z.new_empty(z.shape), weight.new_empty((*z.shape[:2], n_groups))
    grid, sizes = _launch(z, n_groups)
    gated_norm_forward_kernel[grid](
        y, z, weight, out, scales, eps, z.shape[0] * z.shape[1], z.shape[1], n_groups,
        *y.stride()[:2], *z.stride()[:2], **sizes,
    )  # fmt: skip
    return out, scales


def gated_norm_backward(
    dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, scales: Tensor, n_groups: int, *, dz: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, z (B, T, G D) and of weight (G D,).

    Args:
        dz: where that of z goes, with adjacent channels; None: a new contiguous tensor.
    """
    dy, dz = y.new_empty(y.shape), z.new_empty(z.shape) if dz is None else dz
    grid, sizes = _launch(z, n_groups)
    dw = weight.new_empty((grid[0], weight.shape[0]))
    if REGISTERS and takes_register_caps(z.device):
        sizes["maxnreg"] = REGISTERS
    gated_norm_backward_kernel[grid](
        dout, y, z, weight, scales, dy, dz, dw, z.shape[0] * z.shape[1], z.shape[1], n_groups,
        *dout.stride()[:2], *y.stride()[:2], *z.stride()[:2], *dz.stride()[:2], **sizes,
    )  # fmt: skip
    return dy, dz, dw.sum(0)
