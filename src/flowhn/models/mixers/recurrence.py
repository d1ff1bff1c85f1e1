"""The selective scan's arithmetic in plain torch, forward and backward, in two orders of work.

All tensors here have time first and channels last: x, dt, dy (T, b, E); B, C (T, b, N); A (N, E); states (t, b, N, E).
Products that broadcast over N then run along contiguous channels, which is what makes them fast on CPU.

- *Blocks* (CPU): a loop over time, one fused multiply-add a step, in blocks short enough for decays and states to stay
  in cache. Only the state before each block is kept for the backward.
- *Chunks* (any other device): time is cut into about sqrt(T) chunks that run side by side, then the states are carried
  over the chunks: about 3 sqrt(T) large operations in place of T small ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _fill_states(a: Tensor, h: Tensor, x_dt: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> None:
    """Fill decays a (t, b, N, E) and states h (t + 1, b, N, E) of one block, whose h[0] is the state before it."""
    torch.mul(dt.unsqueeze(2), A, out=a).exp_()
    torch.mul(x_dt.unsqueeze(2), B.unsqueeze(3), out=h[1:])
    previous, *states = h.unbind(0)
    for decay, state in zip(a.unbind(0), states, strict=True):
        previous = state.addcmul_(decay, previous)


def _sum_states(h: Tensor, weights: Tensor) -> Tensor:
    """``sum_n weights[n] h[n]``: (t, b, N, E), (t, b, N) -> (t, b, E)."""
    return torch.bmm(weights.flatten(0, 1).unsqueeze(1), h.flatten(0, 1)).view(*h.shape[:2], h.shape[3])


def _sum_channels(h: Tensor, weights: Tensor) -> Tensor:
    """``sum_e weights[e] h[e]``: (t, b, N, E), (t, b, E) -> (t, b, N)."""
    return torch.bmm(h.flatten(0, 1), weights.flatten(0, 1).unsqueeze(2)).view(h.shape[:3])


def forward_blocks(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, *, kept: Tensor, steps: int) -> Tensor:
    """y (T, b, E); fills ``kept`` (ceil(T / steps), b, N, E) with the state before each block of ``steps`` tokens."""
    n_tokens, rows, width = x.shape
    y, x_dt = torch.empty_like(x), x * dt
    a = x.new_empty(steps, rows, A.shape[0], width)
    h = x.new_zeros(steps + 1, rows, A.shape[0], width)
    for i, start in enumerate(range(0, n_tokens, steps)):
        now = slice(start, min(start + steps, n_tokens))
        n = now.stop - start
        kept[i] = h[0]
        _fill_states(a[:n], h[: n + 1], x_dt[now], dt[now], A, B[now])
        y[now] = _sum_states(h[1 : n + 1], C[now])
        h[0] = h[n]
    return y


def backward_blocks(
    dy: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, *, kept: Tensor, steps: int, dA: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, B, C; adds A's to ``dA`` (N, E). ``kept`` and ``steps`` as in :func:`forward_blocks`.

    With g[t] the gradient of h[t]: ``g[t] = C[t] dy[t] + a[t+1] g[t+1]``.
    """
    n_tokens, rows, width = x.shape
    x_dt = x * dt
    dx_dt, ddt, dB, dC = (torch.empty_like(t) for t in (x, dt, B, C))
    a, g, scratch = (x.new_empty(steps, rows, A.shape[0], width) for _ in range(3))
    h = x.new_empty(steps + 1, rows, A.shape[0], width)
    carry = torch.zeros_like(h[0])  # a[t+1] g[t+1] of the block to the right
    for i, start in reversed(list(enumerate(range(0, n_tokens, steps)))):
        now = slice(start, min(start + steps, n_tokens))
        n = now.stop - start
        a_now, g_now, tmp = a[:n], g[:n], scratch[:n]
        h[0] = kept[i]
        _fill_states(a_now, h[: n + 1], x_dt[now], dt[now], A, B[now])
        torch.mul(dy[now].unsqueeze(2), C[now].unsqueeze(3), out=g_now)
        decays, grads = a_now.unbind(0), g_now.unbind(0)
        grads[-1].add_(carry)
        for t in range(n - 2, -1, -1):
            grads[t].addcmul_(decays[t + 1], grads[t + 1])
        torch.mul(decays[0], grads[0], out=carry)
        dC[now] = _sum_channels(h[1 : n + 1], dy[now])
        dB[now] = _sum_channels(g_now, x_dt[now])
        dx_dt[now] = _sum_states(g_now, B[now])
        g_now.mul_(a_now).mul_(h[:n])  # the gradient of dt A
        torch.sum(torch.mul(g_now, A, out=tmp), 2, out=ddt[now])
        dA += torch.mul(g_now, dt[now].unsqueeze(2), out=tmp).sum((0, 1))
    ddt.addcmul_(dx_dt, x)
    return dx_dt.mul_(dt), ddt, dB, dC


def linear_recurrence(a: Tensor, b: Tensor) -> Tensor:
    """``h[t] = a[t] h[t-1] + b[t]`` along dimension 0 from h[-1] = 0, in about sqrt(T) chunks side by side."""
    n_tokens = a.shape[0]
    if n_tokens == 0:
        return torch.empty_like(b)
    length = math.isqrt(n_tokens - 1) + 1
    n_chunks = -(-n_tokens // length)
    padding = n_chunks * length - n_tokens
    h, p = (torch.cat((t, t.new_zeros(padding, *t.shape[1:]))).unflatten(0, (n_chunks, length)) for t in (b, a))
    decay = p.clone()
    for t in range(1, length):
        h[:, t].addcmul_(decay[:, t], h[:, t - 1])
        p[:, t].mul_(p[:, t - 1])  # product of the chunk's decays up to t
    for c in range(1, n_chunks):
        h[c].addcmul_(p[c], h[c - 1, -1])
    return h.flatten(0, 1)[:n_tokens]


def forward_chunked(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor) -> Tensor:
    """y (T, b, E)."""
    h = linear_recurrence(torch.exp(dt.unsqueeze(2) * A), (x * dt).unsqueeze(2) * B.unsqueeze(3))
    return _sum_states(h, C)


def backward_chunked(
    dy: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, B, C and A; the states are computed again."""
    a = torch.exp(dt.unsqueeze(2) * A)
    h = linear_recurrence(a, (x * dt).unsqueeze(2) * B.unsqueeze(3))
    later = torch.cat((a[1:], torch.zeros_like(a[:1])))  # a[t + 1]
    g = linear_recurrence(later.flip(0), (dy.unsqueeze(2) * C.unsqueeze(3)).flip(0)).flip(0)
    dC, dB, dx_dt = _sum_channels(h, dy), _sum_channels(g, x * dt), _sum_states(g, B)
    g.mul_(a)
    g[1:].mul_(h[:-1])
    g[:1].zero_()  # h[-1] = 0
    ddt = (g * A).sum(2).addcmul_(dx_dt, x)
    dA = (g * dt.unsqueeze(2)).sum((0, 1))
    return dx_dt.mul_(dt), ddt, dB, dC, dA
