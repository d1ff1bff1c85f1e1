"""The recurrences of Mamba-1 and Mamba-2 token by token, and random inputs: what every scan is compared with."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def reference_scan(u, delta, A, B, C, D, delta_bias):
    """Mamba-1's recurrence in the inputs' type: u, delta (B, T, E), A (E, N), B, C (B, T, N), D, delta_bias (E,)."""
    dt = F.softplus(delta + delta_bias)
    h = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    outputs = []
    for t in range(u.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        outputs.append((h * C[:, t, None]).sum(-1) + D * u[:, t])
    return torch.stack(outputs, dim=1)


def reference_ssd(x, dt, A, B, C):
    """Mamba-2's recurrence: x (B, T, H, P), dt (B, T, H), A (H,), B, C (B, T, G, N)."""
    per_group = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(per_group, 2), C.repeat_interleave(per_group, 2)
    h = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3])
    outputs = []
    for t in range(x.shape[1]):
        h = torch.exp(dt[:, t] * A)[..., None, None] * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        outputs.append((h * C[:, t, :, None]).sum(-1))
    return torch.stack(outputs, dim=1)


def scan_inputs(n_tokens, *, rows=2, width=6, n_states=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return [
        randn(rows, n_tokens, width),
        randn(rows, n_tokens, width),
        -torch.exp(randn(width, n_states)),
        randn(rows, n_tokens, n_states),
        randn(rows, n_tokens, n_states),
        randn(width),
        randn(width) - 1,
    ]


def ssd_inputs(n_tokens, *, rows=2, heads=4, headdim=3, groups=2, n_states=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return [
        randn(rows, n_tokens, heads, headdim),
        F.softplus(randn(rows, n_tokens, heads) - 1),
        -torch.exp(randn(heads) + 1),
        randn(rows, n_tokens, groups, n_states),
        randn(rows, n_tokens, groups, n_states),
    ]
