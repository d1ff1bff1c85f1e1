"""mamba_ssm's Triton SSD as custom operators that torch.compile can trace.

``mamba_chunk_scan_combined`` is an autograd.Function over autotuned Triton kernels, which torch.compile would try to
trace through. These operators make the calls which that function makes (mamba_ssm 2.2.4 to 2.3.2), without its optional
arguments. Nothing but the inputs is kept: its backward computes the chunk states again.
Shapes: x (B, T, H, P), dt (B, T, H), A, D, dt_bias (H,), B and C (B, T, G, N).
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

_MODULE = "mamba_ssm.ops.triton.ssd_combined"


def mamba_ssm_ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, *, chunk_size: int
) -> Tensor:
    """``ssd(x, softplus(dt + dt_bias), A, B, C) + D x``, (B, T, H, P) in x's type; A, D and dt_bias in float32."""
    dt, B, C = dt.to(x.dtype), B.to(x.dtype), C.to(x.dtype)
    return kernel_forward(x, dt, A.float(), B, C, D.float(), dt_bias.float(), chunk_size)


@torch.library.custom_op("flowhn::mamba_ssm_ssd", mutates_args=())
def kernel_forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, chunk_size: int
) -> Tensor:
    """(B, T, H, P)."""
    forward = importlib.import_module(_MODULE)._mamba_chunk_scan_combined_fwd
    return forward(x, dt, A, B, C, chunk_size, D=D, dt_bias=dt_bias, dt_softplus=True)[0].contiguous()


@torch.library.custom_op("flowhn::mamba_ssm_ssd_backward", mutates_args=())
def kernel_backward(
    dy: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    y: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D, dt_bias."""
    backward = importlib.import_module(_MODULE)._mamba_chunk_scan_combined_bwd
    grads = backward(dy, x, dt, A, B, C, y, chunk_size, D=D, dt_bias=dt_bias, dt_softplus=True)
    dx, ddt, dA, dB, dC, dD, _, dbias = grads[:8]
    pairs = zip((dx, ddt, dA, dB, dC, dD, dbias), (x, dt, A, B, C, D, dt_bias), strict=True)
    dx, ddt, dA, dB, dC, dD, dbias = (grad.to(given.dtype).contiguous() for grad, given in pairs)
    return dx, ddt, dA, dB, dC, dD, dbias


@kernel_forward.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, chunk_size: int) -> Tensor:
    return x.new_empty(x.shape)


@kernel_backward.register_fake
def _(
    dy: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    y: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, ddt, dA, dB, dC, dD, dbias = (t.new_empty(t.shape) for t in (x, dt, A, B, C, D, dt_bias))
    return dx, ddt, dA, dB, dC, dD, dbias


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.chunk_size = inputs
    ctx.save_for_backward(*tensors, output)


def _differentiate(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *kernel_backward(dy, *ctx.saved_tensors, ctx.chunk_size), None


kernel_forward.register_autograd(_differentiate, setup_context=_save)
