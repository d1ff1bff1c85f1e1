"""Selective scan of Mamba-1: ``y = scan(u, softplus(delta + bias), A, B, C) + D u``, on the kernel that was resolved.

``h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] x[t]``, ``y[t] = C[t] h[t]`` for each channel and state (Gu and Dao 2023,
arXiv 2312.00752, algorithm 2, with the simplified discretisation of B as in mamba_ssm).

The plain-torch forward and backward are opaque custom operators over :mod:`flowhn.models.mixers.recurrence`:
torch.compile neither breaks its graph nor unrolls a loop over time, and the meta device works.
Shapes: B batch, T tokens, E d_inner, N d_state.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from flowhn.models.mixers.recurrence import backward_blocks, backward_chunked, forward_blocks, forward_chunked
from flowhn.models.mixers.scan_cuda import mamba_ssm_scan
from flowhn.models.mixers.scan_triton import triton_scan

# Elements of one step and of one block of steps, (steps, sequences, N, E), on CPU: measured on 2 cores with 1 MiB L2.
_STEP_ELEMENTS = 64 * 1024
_BLOCK_ELEMENTS = 384 * 1024


def selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor, *, kernel: str
) -> Tensor:
    """``scan(u, softplus(delta + delta_bias), A, B, C) + D u``.

    Args:
        u, delta: (B, T, E).
        A: (E, N), negative.
        B, C: (B, T, N).
        D, delta_bias: (E,).
        kernel: ``torch``, ``mamba_ssm`` or ``triton`` (which leaves float64 to torch), from
            :func:`flowhn.models.kernels.resolve_ssm`.

    Returns:
        (B, T, E) in u's type. The recurrence runs in float32 (float64 for float64 input) whatever the autocast.
    """
    if kernel == "mamba_ssm":
        return mamba_ssm_scan(u, delta, A, B, C, D, delta_bias)
    if kernel == "triton" and u.dtype != torch.float64:
        return triton_scan(u, delta, A, B, C, D, delta_bias)
    wide = torch.promote_types(u.dtype, torch.float32)
    x = u.to(wide)
    dt = F.softplus(delta.to(wide) + delta_bias.to(wide))
    y, _ = scan_forward(x, dt, A.to(wide), B.to(wide), C.to(wide))
    return torch.addcmul(y, x, D.to(wide)).to(u.dtype)


def _plan(x: Tensor, A: Tensor) -> tuple[int, int]:
    """How many sequences go through the CPU loop together (enough to fill an operation), and how many steps a block."""
    per_token = max(1, A.numel())
    rows = min(x.shape[0], max(1, _STEP_ELEMENTS // per_token))
    steps = max(1, min(x.shape[1], _BLOCK_ELEMENTS // (max(1, rows) * per_token)))
    return rows, steps


def _groups(x: Tensor, A: Tensor) -> list[slice]:
    rows, _ = _plan(x, A)
    return [slice(i, i + rows) for i in range(0, x.shape[0], rows)] if rows else []


def _kept_shape(x: Tensor, A: Tensor) -> tuple[int, ...]:
    """Shape of the states kept for the backward; on other devices than CPU it computes them again."""
    if x.device.type != "cpu":
        return (0,)
    _, steps = _plan(x, A)
    return -(-x.shape[1] // steps), x.shape[0], A.shape[1], A.shape[0]


def _time_first(tensors: tuple[Tensor, ...], rows: slice) -> list[Tensor]:
    return [tensor[rows].transpose(0, 1).contiguous() for tensor in tensors]


@torch.library.custom_op("flowhn::selective_scan", mutates_args=())
def scan_forward(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """x, dt (B, T, E), A (E, N), B, C (B, T, N) -> y (B, T, E) and the states kept for the backward."""
    kept, a_nt = x.new_empty(_kept_shape(x, A)), A.t().contiguous()
    with torch.autocast(x.device.type, enabled=False):
        if x.device.type != "cpu":
            y = forward_chunked(*_time_first((x, dt, B, C), slice(None)), a_nt)
            return y.transpose(0, 1).contiguous(), kept
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        _, steps = _plan(x, A)
        for rows in _groups(x, A):
            part = forward_blocks(*_time_first((x, dt, B, C), rows), a_nt, kept=kept[:, rows], steps=steps)
            y[rows] = part.transpose(0, 1)
        return y, kept


@torch.library.custom_op("flowhn::selective_scan_backward", mutates_args=())
def scan_backward(
    dy: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, each in its input's shape."""
    a_nt = A.t().contiguous()
    with torch.autocast(x.device.type, enabled=False):
        if x.device.type != "cpu":
            *parts, da_nt = backward_chunked(*_time_first((dy, x, dt, B, C), slice(None)), a_nt)
            dx, ddt, dB, dC = (part.transpose(0, 1).contiguous() for part in parts)
            return dx, ddt, da_nt.t().contiguous(), dB, dC
        grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (x, dt, B, C)]
        da_nt = torch.zeros_like(a_nt)
        _, steps = _plan(x, A)
        for rows in _groups(x, A):
            inputs = _time_first((dy, x, dt, B, C), rows)
            parts = backward_blocks(*inputs, a_nt, kept=kept[:, rows], steps=steps, dA=da_nt)
            for grad, part in zip(grads, parts, strict=True):
                grad[rows] = part.transpose(0, 1)
        dx, ddt, dB, dC = grads
        return dx, ddt, da_nt.t().contiguous(), dB, dC


@scan_forward.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(_kept_shape(x, A))


@scan_backward.register_fake
def _(
    dy: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, ddt, dA, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, A, B, C))
    return dx, ddt, dA, dB, dC


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 5
    *inputs, kept = ctx.saved_tensors
    return scan_backward(dy, *inputs, kept)


scan_forward.register_autograd(_differentiate, setup_context=_save)
