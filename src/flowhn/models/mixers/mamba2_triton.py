"""What Mamba-2 does between its two products, as one custom operator on our Triton kernels.

``norm(ssd(silu(conv(xBC)), dt), z)`` of ``z, xBC, dt = in_proj(x)``. As operators of their own the three would each return a
gradient that has to be copied into that of in_proj's output; this one writes them there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flowhn.models.kernels import ANY_STRIDES
from flowhn.models.mixers.conv import KERNEL_TAPS
from flowhn.models.mixers.ssd_triton import DEFAULT_TILES, fitting, kernel_forward, numbers, ssd_backward, states_shape

_WIDEST_GROUP = 4096  # channels of the norm that a program keeps in registers


def takes(projected: Tensor, *, taps: int, group_width: int) -> bool:
    """Whether the kernels compute this: (B, T, columns) in at most 32 bits, at most so many taps and channels of a group."""
    fits = taps <= KERNEL_TAPS and group_width <= _WIDEST_GROUP
    return fits and projected.device.type == "cuda" and projected.dtype != torch.float64 and projected.numel() > 0


def mamba2_inner(
    projected: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    *,
    n_groups: int,
    d_state: int,
    eps: float,
) -> Tensor:
    """(B, T, E) in projected's type. E = H P channels in G groups, N = d_state.

    Args:
        projected: (B, T, 2 E + 2 G N + H): z, x, B, C and dt side by side, columns adjacent.
        conv_weight, conv_bias: (E + 2 G N, 1, K), as ``nn.Conv1d`` has it, and (E + 2 G N,) or None.
        A, D, dt_bias: (H,); A negative.
        norm_weight: (E,); eps is added to a group's mean square.
    """
    conv_bias = conv_weight.new_zeros(conv_weight.shape[0]) if conv_bias is None else conv_bias
    taps = conv_weight.squeeze(1).float().contiguous()
    small = (taps, conv_bias.float(), A.float(), D.float(), dt_bias.float(), norm_weight.float())
    headdim = norm_weight.shape[0] // A.shape[0]
    tiles = numbers(fitting(DEFAULT_TILES, projected.dtype, headdim, d_state))
    return inner_forward(projected, *small, n_groups, d_state, eps, tiles)[0]


def _split(projected: Tensor, A: Tensor, norm_weight: Tensor, n_groups: int, d_state: int) -> tuple[Tensor, ...]:
    """z (B, T, E), xBC (B, T, E + 2 G N), dt (B, T, H)."""
    width = norm_weight.shape[0]
    return projected.split((width, width + 2 * n_groups * d_state, A.shape[0]), dim=-1)


def _gradient_of(projected: Tensor) -> Tensor:
    """Not filled, (B, T, columns), its rows a multiple of 64 columns apart: a thread then writes eight columns at a time."""
    _, n_tokens, columns = projected.shape
    row = -(-columns // 64) * 64
    return projected.new_empty_strided(projected.shape, (n_tokens * row, row, 1))


@torch.library.custom_op("flowhn::mamba2_inner", mutates_args=(), tags=ANY_STRIDES)
def inner_forward(
    projected: Tensor,
    taps: Tensor,
    conv_bias: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    n_groups: int,
    d_state: int,
    eps: float,
    tiles: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output (B, T, E) and what the backward needs: xBC behind the convolution, y of the scan (B, T, E), its states and
    paces, and the scale of each group (B, T, G), float32."""
    from flowhn.models.mixers.conv_triton import conv_silu_forward  # needs Triton
    from flowhn.models.mixers.gated_norm_triton import gated_norm_forward

    projected = projected if projected.stride(-1) == 1 else projected.contiguous()
    z, xbc, dt = _split(projected, A, norm_weight, n_groups, d_state)
    xbc = conv_silu_forward(xbc, taps, conv_bias)
    y, states, paces = kernel_forward(xbc, dt, A, D, dt_bias, n_groups, d_state, tiles)
    out, scales = gated_norm_forward(y, z, norm_weight, eps, n_groups)
    return out, xbc, y, states, paces, scales


@torch.library.custom_op("flowhn::mamba2_inner_backward", mutates_args=(), tags=ANY_STRIDES)
def inner_backward(
    dout: Tensor,
    projected: Tensor,
    taps: Tensor,
    conv_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    xbc: Tensor,
    y: Tensor,
    states: Tensor,
    paces: Tensor,
    scales: Tensor,
    n_groups: int,
    d_state: int,
    tiles: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of projected, taps, conv_bias, A, D, dt_bias and norm_weight."""
    from flowhn.models.mixers.conv_triton import conv_silu_backward
    from flowhn.models.mixers.gated_norm_triton import gated_norm_backward

    dout, projected = (t if t.stride(-1) == 1 else t.contiguous() for t in (dout, projected))
    z, before, _ = _split(projected, A, norm_weight, n_groups, d_state)
    d_projected = _gradient_of(projected)
    dz, d_before, d_dt = _split(d_projected, A, norm_weight, n_groups, d_state)
    dy, _, d_norm = gated_norm_backward(dout, y, z, norm_weight, scales, n_groups, dz=dz)
    d_xbc, dA, dD, d_bias = ssd_backward(dy, xbc, A, D, states, paces, n_groups, d_state, tiles, d_dt=d_dt)
    _, d_taps, d_conv_bias = conv_silu_backward(d_xbc, before, taps, conv_bias, dx=d_before)
    return d_projected, d_taps, d_conv_bias, dA, dD, d_bias, d_norm


@inner_forward.register_fake
def _(
    projected: Tensor,
    taps: Tensor,
    conv_bias: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    n_groups: int,
    d_state: int,
    eps: float,
    tiles: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n_batch, n_tokens, _ = projected.shape
    width = norm_weight.shape[0]
    out, y = (projected.new_empty((n_batch, n_tokens, width)) for _ in range(2))
    xbc = projected.new_empty((n_batch, n_tokens, width + 2 * n_groups * d_state))
    shape = states_shape(xbc, A, n_groups, d_state, tiles[0])
    scales = norm_weight.new_empty((n_batch, n_tokens, n_groups))
    return out, xbc, y, projected.new_empty(shape), A.new_empty((*shape[:3], 2, tiles[0])), scales


@inner_backward.register_fake
def _(
    dout: Tensor,
    projected: Tensor,
    taps: Tensor,
    conv_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    xbc: Tensor,
    y: Tensor,
    states: Tensor,
    paces: Tensor,
    scales: Tensor,
    n_groups: int,
    d_state: int,
    tiles: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _gradient_of(projected), *(t.new_empty(t.shape) for t in (taps, conv_bias, A, D, A, norm_weight))


def _save(ctx, inputs, output) -> None:
    projected, taps, conv_bias, A, D, _, norm_weight, ctx.n_groups, ctx.d_state, _, ctx.tiles = inputs
    ctx.save_for_backward(projected, taps, conv_bias, A, D, norm_weight, *output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 11
    return *inner_backward(dout, *ctx.saved_tensors, ctx.n_groups, ctx.d_state, ctx.tiles), None, None, None, None


inner_forward.register_autograd(_differentiate, setup_context=_save)
