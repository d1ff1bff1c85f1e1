"""State-space dual form of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, section 6), in plain torch.

``h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] x[t]^T``, ``y[t] = C[t] h[t]`` for each head, A being one number a head. Time
is cut into chunks: inside a chunk the map is a masked matrix product like attention, between chunks the states carry.
Shapes: B batch, T tokens, H heads, P headdim, G groups of heads that share B and C, N d_state; c chunks of l tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def ssd_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, chunk_size: int) -> Tensor:
    """Chunked scan of any length, the last chunk padded with dt = 0, which leaves the state as it is.

    Args:
        x: (B, T, H, P).
        dt: (B, T, H), positive.
        A: (H,), negative.
        B, C: (B, T, G, N), G dividing H.
        chunk_size: l; any value gives the same result.

    Returns:
        (B, T, H, P).
    """
    n_tokens, n_groups = x.shape[1], B.shape[2]
    length = min(chunk_size, n_tokens)
    padding = -n_tokens % length
    if padding:
        x, B, C = (F.pad(t, (0, 0, 0, 0, 0, padding)) for t in (x, B, C))
        dt = F.pad(dt, (0, 0, 0, padding))
    heads = (n_groups, x.shape[2] // n_groups)
    # Heads and chunks become batch dimensions: (B, c, G, H/G, l, ...), and (B, c, G, l, N) for what groups share.
    x_dt = (x * dt.unsqueeze(-1)).unflatten(1, (-1, length)).unflatten(3, heads).movedim(2, 4)
    B, C = (t.unflatten(1, (-1, length)).transpose(2, 3) for t in (B, C))
    log_decay = (dt * A).unflatten(1, (-1, length)).unflatten(3, heads).movedim(2, 4).cumsum(-1)  # (B, c, G, H/G, l)
    y = _within_chunks(x_dt, log_decay, B, C)
    if y.shape[1] > 1:
        y = y + _between_chunks(x_dt, log_decay, B, C)
    return y.movedim(4, 2).flatten(3, 4).flatten(1, 2)[:, :n_tokens]


def _within_chunks(x_dt: Tensor, log_decay: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """``sum_{j <= i} (C[i] B[j]) exp(log_decay[i] - log_decay[j]) x_dt[j]``: (B, c, G, H/G, l, P)."""
    length = log_decay.shape[-1]
    later = torch.ones(length, length, dtype=torch.bool, device=x_dt.device).triu(1)
    # Masked before exp: above the diagonal the exponent is positive and may overflow.
    decay = (log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()
    scores = (C @ B.transpose(-1, -2)).unsqueeze(3) * decay  # (B, c, G, H/G, l, l)
    return scores @ x_dt


def _between_chunks(x_dt: Tensor, log_decay: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """What the states before each chunk add to its outputs: (B, c, G, H/G, l, P)."""
    total = log_decay[..., -1]  # (B, c, G, H/G)
    to_end = (total.unsqueeze(-1) - log_decay).exp().unsqueeze(-1)
    states = B.unsqueeze(3).transpose(-1, -2) @ (x_dt * to_end)  # (B, c, G, H/G, N, P), each chunk's own
    before = [torch.zeros_like(states[:, 0])]
    for chunk, decay in zip(states[:, :-1].unbind(1), total[:, :-1].exp().unbind(1), strict=True):
        before.append(torch.addcmul(chunk, before[-1], decay[..., None, None]))
    return (C.unsqueeze(3) @ torch.stack(before, dim=1)) * log_decay.exp().unsqueeze(-1)
