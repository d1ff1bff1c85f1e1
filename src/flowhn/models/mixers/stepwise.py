"""The scans' states in closed form: what is left after n tokens, and what an earlier state adds to their outputs.

The scan kernels start from zero and return outputs only. The recurrence is linear, so with s[t] the sum of dt up to t:

    h[n] = exp(s[n] A) h[0] + sum_t exp((s[n] - s[t]) A) dt[t] B[t] x[t]
    y[t] = scan from zero at t  +  C[t] exp(s[t] A) h[0]

Every exponent is negative or zero, and the sums s[n] - s[t] are taken from the right, where they are small. No loop over
tokens; a single token takes the recurrence itself.
Letters: B batch, n tokens, E channels, N d_state, H heads, P headdim, G groups of heads that share B and C.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ELEMENTS = 2**24  # of one (B, l, E, N) tensor: 64 MiB in float32


def _to_end(dt: Tensor) -> Tensor:
    """``sum_{s > t} dt[s]`` along dimension 1."""
    from_right = dt.flip(1).cumsum(1).flip(1)
    return torch.cat((from_right[:, 1:], torch.zeros_like(dt[:, :1])), dim=1)


def scan_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """One token of Mamba-1: x, dt (B, 1, E), A (E, N), B, C (B, 1, N), h (B, E, N) -> y (B, 1, E) and the next h."""
    decay = torch.exp(dt.squeeze(1).unsqueeze(-1) * A)  # (B, E, N)
    h = decay * h + (dt * x).squeeze(1).unsqueeze(-1) * B
    return (h @ C.transpose(1, 2)).transpose(1, 2), h


def scan_states(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Mamba-1: x, dt (B, n, E), A (E, N), B, C (B, n, N), h (B, E, N) or None for zero, all in one type.

    Returns:
        What h adds to the outputs, (B, n, E) (None without h), and the state after the n tokens.
    """
    added, old = [], h  # old: what is left of the state at the start
    length = max(1, _ELEMENTS // max(1, x.shape[0] * A.numel()))
    for start in range(0, x.shape[1], length):
        now = slice(start, start + length)
        step = dt[:, now]
        through = torch.exp(step.sum(1).unsqueeze(-1) * A)  # (B, E, N), the decay over this chunk
        if old is not None:
            carried = torch.exp(step.cumsum(1).unsqueeze(-1) * A) * old.unsqueeze(1)  # (B, l, E, N)
            added.append((carried @ C[:, now].unsqueeze(-1)).squeeze(-1))
            old = through * old
        decay = torch.exp(_to_end(step).unsqueeze(-1) * A)  # (B, l, E, N)
        fresh = (decay * (step * x[:, now]).unsqueeze(-1)).mul_(B[:, now].unsqueeze(2)).sum(1)
        h = fresh if h is None else fresh + through * h
    return (torch.cat(added, dim=1) if added else None), h


def ssd_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """One token of Mamba-2: shapes as in :func:`ssd_states` with n = 1 -> y (B, 1, H, P) and the next h."""
    B, C = (_for_heads(t, x.shape[2])[:, 0] for t in (B, C))  # (B, H, N)
    h = torch.exp(dt[:, 0] * A)[..., None, None] * h + (dt.unsqueeze(-1) * x)[:, 0].unsqueeze(-1) * B.unsqueeze(2)
    return (h @ C.unsqueeze(-1)).squeeze(-1).unsqueeze(1), h


def ssd_states(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor | None
) -> tuple[Tensor | None, Tensor]:
    """Mamba-2: x (B, n, H, P), dt (B, n, H), A (H,), B, C (B, n, G, N), h (B, H, P, N) or None for zero.

    Returns:
        What h adds to the outputs, (B, n, H, P) (None without h), and the state after the n tokens.
    """
    B, C = (_for_heads(t, x.shape[2]) for t in (B, C))  # (B, n, H, N)
    weighted = x * (dt * torch.exp(_to_end(dt) * A)).unsqueeze(-1)  # (B, n, H, P)
    fresh = weighted.permute(0, 2, 3, 1) @ B.transpose(1, 2)  # (B, H, P, N)
    if h is None:
        return None, fresh
    decay = torch.exp(dt.cumsum(1) * A)  # (B, n, H)
    added = (C.transpose(1, 2) @ h.transpose(2, 3)).transpose(1, 2) * decay.unsqueeze(-1)
    return added, fresh + decay[:, -1, :, None, None] * h


def _for_heads(t: Tensor, n_heads: int) -> Tensor:
    """(B, n, G, N) -> (B, n, H, N)."""
    return t.repeat_interleave(n_heads // t.shape[2], dim=2)
