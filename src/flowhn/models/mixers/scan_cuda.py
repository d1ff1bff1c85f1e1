"""mamba_ssm's compiled selective scan as custom operators that torch.compile can trace.

``mamba_ssm.ops.selective_scan_interface.selective_scan_fn`` calls the extension ``selective_scan_cuda`` from an
autograd.Function, where torch.compile breaks its graph. These operators make the same two calls (signatures of
mamba_ssm 2.2.4 to 2.3.2) with shapes declared. Here channels come before time: u (B, E, T), B and C (B, 1, N, T).
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

_TOKENS_PER_STATE = 2048  # the kernel keeps one state for each 2048 tokens


def mamba_ssm_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor) -> Tensor:
    """:func:`flowhn.models.mixers.scan.selective_scan` on mamba_ssm's kernel; u, delta (B, T, E), B, C (B, T, N)."""
    channels_first = [t.to(u.dtype).transpose(1, 2).contiguous() for t in (u, delta, B, C)]
    u_t, delta_t, B_t, C_t = channels_first
    y, _ = kernel_forward(
        u_t, delta_t, A.float().contiguous(), B_t.unsqueeze(1), C_t.unsqueeze(1), D.float(), delta_bias.float()
    )
    return y.transpose(1, 2)


@torch.library.custom_op("flowhn::mamba_ssm_scan", mutates_args=())
def kernel_forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """y (B, E, T) and the kernel's states (B, E, ceil(T / 2048), 2 N), float32."""
    extension = importlib.import_module("selective_scan_cuda")
    y, states = extension.fwd(u, delta, A, B, C, D, None, delta_bias, True)[:2]
    return y.contiguous(), states.contiguous()


@torch.library.custom_op("flowhn::mamba_ssm_scan_backward", mutates_args=())
def kernel_backward(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D, delta_bias."""
    extension = importlib.import_module("selective_scan_cuda")
    if dy.stride(-1) != 1:
        dy = dy.contiguous()
    # After the states: no output kept (it belongs to the gate z), no buffer for z's gradient, softplus, no recomputing.
    grads = extension.bwd(u, delta, A, B, C, D, None, delta_bias, dy, states, None, None, True, False)
    pairs = zip(grads[:7], (u, delta, A, B, C, D, delta_bias), strict=True)
    du, ddelta, dA, dB, dC, dD, dbias = (grad.to(given.dtype).contiguous() for grad, given in pairs)
    return du, ddelta, dA, dB, dC, dD, dbias


@kernel_forward.register_fake
def _(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> tuple[Tensor, Tensor]:
    n_states = -(-u.shape[2] // _TOKENS_PER_STATE)
    states = u.new_empty((u.shape[0], u.shape[1], n_states, 2 * A.shape[1]), dtype=torch.float32)
    return delta.new_empty(delta.shape), states


@kernel_backward.register_fake
def _(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    du, ddelta, dA, dB, dC, dD, dbias = (t.new_empty(t.shape) for t in (u, delta, A, B, C, D, delta_bias))
    return du, ddelta, dA, dB, dC, dD, dbias


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    *inputs, states = ctx.saved_tensors
    return kernel_backward(dy, *inputs, states)


kernel_forward.register_autograd(_differentiate, setup_context=_save)
