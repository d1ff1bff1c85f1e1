"""Mamba-2 mixer (state-space duality)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowhn.errors import UserError
from flowhn.models.cache import SSMState
from flowhn.models.kernels import resolve_ssm
from flowhn.models.mixers.conv import causal_conv, causal_conv_silu
from flowhn.models.mixers.mamba2_triton import mamba2_inner, takes
from flowhn.models.mixers.ssd import ssd_scan
from flowhn.models.mixers.ssd_cuda import mamba_ssm_ssd
from flowhn.models.mixers.ssd_triton import LARGEST, triton_ssd
from flowhn.models.mixers.ssm_init import inverse_softplus_dt, keep
from flowhn.models.mixers.stepwise import ssd_states, ssd_step
from flowhn.models.norms import GatedRMSNorm

# Longer chunks cost more inside a chunk, shorter ones more passes; measured on 2 cores.
_CPU_CHUNK = 64


class Mamba2(nn.Module):
    """``out_proj(norm(ssd(silu(conv(x, B, C))) * silu(z)))`` with ``z, x, B, C, dt = in_proj(input)``
    (Dao and Gu 2024).

    Parameter names and the order inside in_proj follow mamba_ssm's and transformers' Mamba2; the gate comes before the
    norm, whose groups are B and C's (``d_inner / n_groups`` channels). in_proj and out_proj have no bias.
    E = expand * D channels in H heads of P, G groups of heads that share B and C, N = d_state.

    Args:
        d_model: width D.
        d_state: N.
        d_conv: width of the causal depthwise convolution.
        expand: E / D.
        headdim: P; must divide E.
        n_groups: G; must divide the number of heads.
        chunk_size: l of mamba_ssm's kernel and of :meth:`flops`; on CPU and in our Triton kernel chunks are of at most 64
            tokens, with the same result.
        dt_min, dt_max: range of the initial step sizes, log-uniform.
        norm_eps: of the gated norm.
        backend: auto, torch, mamba_ssm or triton (see :mod:`flowhn.models.kernels`).

    Raises:
        UserError: sizes that do not divide each other, or an unknown backend.
    """

    kernel_kind = "ssm"

    def __init__(
        self,
        *,
        d_model: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        n_groups: int = 1,
        chunk_size: int = 256,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.d_inner = expand * d_model
        if headdim < 1 or self.d_inner % headdim:
            raise UserError(f"headdim={headdim} does not divide expand * d_model = {self.d_inner}; choose a divisor")
        self.n_heads = self.d_inner // headdim
        if n_groups < 1 or self.n_heads % n_groups:
            raise UserError(f"n_groups={n_groups} does not divide the {self.n_heads} heads; choose a divisor")
        if chunk_size < 1:
            raise UserError(f"chunk_size={chunk_size} must be at least 1")
        resolve_ssm("auto" if backend in ("mamba_ssm", "triton") else backend, "cpu")  # refuses an unknown name at once
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.headdim, self.n_groups, self.chunk_size, self.backend = headdim, n_groups, chunk_size, backend
        conv_dim = self.d_inner + 2 * n_groups * d_state
        self.in_proj = nn.Linear(d_model, self.d_inner + conv_dim + self.n_heads, bias=False)
        self.conv1d = nn.Conv1d(conv_dim, conv_dim, d_conv, groups=conv_dim, padding=d_conv - 1)
        self.dt_bias = keep(nn.Parameter(inverse_softplus_dt(self.n_heads, dt_min=dt_min, dt_max=dt_max)))
        self.A_log = keep(nn.Parameter(torch.empty(self.n_heads).uniform_(1, 16).log()))
        self.D = keep(nn.Parameter(torch.ones(self.n_heads)))
        self.norm = GatedRMSNorm(self.d_inner, n_groups=n_groups, eps=norm_eps)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)

    def kernel(self, device_type: str) -> str:
        """``torch``, ``mamba_ssm`` or ``triton``: what the scan runs on a device type."""
        return resolve_ssm(self.backend, device_type, has_triton=max(self.headdim, self.d_state) <= LARGEST)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        kernel = self.kernel(x.device.type)
        projected = self.in_proj(x)
        if kernel == "triton" and takes(projected, taps=self.d_conv, group_width=self.d_inner // self.n_groups):
            return self.out_proj(self._inner(projected))
        z, xbc, dt = self._cut(projected)
        xbc = causal_conv_silu(xbc, self.conv1d.weight, self.conv1d.bias, kernel=kernel)
        return self.out_proj(self.norm(self._scan(xbc, dt), z))

    def _inner(self, projected: Tensor) -> Tensor:
        """All between the two products as one operator, (B, T, E)."""
        return mamba2_inner(
            projected, self.conv1d.weight, self.conv1d.bias, self._decay_rates(), self.D, self.dt_bias, self.norm.weight,
            n_groups=self.n_groups, d_state=self.d_state, eps=self.norm.eps,
        )  # fmt: skip

    def _cut(self, projected: Tensor) -> tuple[Tensor, ...]:
        """z (B, T, E), xbc (B, T, E + 2 G N) with x, B and C side by side, and dt (B, T, H)."""
        widths = (self.d_inner, self.d_inner + 2 * self.n_groups * self.d_state, self.n_heads)
        return projected.split(widths, dim=-1)

    def _parts(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, H, P), B and C (B, T, G, N)."""
        shared = self.n_groups * self.d_state
        x, B, C = xbc.split((self.d_inner, shared, shared), dim=-1)
        B, C = (part.unflatten(-1, (self.n_groups, self.d_state)) for part in (B, C))
        return x.unflatten(-1, (self.n_heads, self.headdim)), B, C

    def _decay_rates(self) -> Tensor:
        """A, (H,), in float32 or wider."""
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    def _scan(self, xbc: Tensor, dt: Tensor) -> Tensor:
        """``ssd(x, softplus(dt + dt_bias), A, B, C) + D x``, (B, T, E); the plain path in float32 or wider."""
        kernel, A = self.kernel(xbc.device.type), self._decay_rates()
        if kernel == "triton" and xbc.dtype != torch.float64:
            return triton_ssd(xbc, dt, A, self.D, self.dt_bias, n_groups=self.n_groups, d_state=self.d_state)
        x, B, C = self._parts(xbc)
        if not xbc.shape[1]:
            return x.flatten(2)
        if kernel == "mamba_ssm":
            return mamba_ssm_ssd(x, dt, A, B, C, self.D, self.dt_bias, chunk_size=self.chunk_size).flatten(2)
        wide = torch.promote_types(x.dtype, torch.float32)
        chunk = min(self.chunk_size, _CPU_CHUNK) if x.device.type == "cpu" else self.chunk_size
        # The meta device knows no autocast.
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            x_wide, B, C = x.to(wide), B.to(wide), C.to(wide)
            step = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
            y = ssd_scan(x_wide, step, A.to(wide), B, C, chunk_size=chunk)
            return torch.addcmul(y, x_wide, self.D.to(wide)[:, None]).to(x.dtype).flatten(2)

    def new_cache(self) -> SSMState:
        """The state before the first token."""
        return SSMState()

    def extend(self, x: Tensor, state: SSMState) -> Tensor:
        """(B, n, D) -> (B, n, D): n >= 1 new tokens behind those that ``state`` has read; it takes them up."""
        z, xbc, dt = self._cut(self.in_proj(x))
        padded = state.keep_tail(xbc, self.d_conv)
        xbc = F.silu(causal_conv(padded, self.conv1d.weight, self.conv1d.bias)[:, self.d_conv - 1 :])
        return self.out_proj(self.norm(self._scan_on(xbc, dt, state), z))

    def _scan_on(self, xbc: Tensor, dt: Tensor, state: SSMState) -> Tensor:
        """The scan that goes on from ``state``, shapes as in :meth:`_scan`."""
        wide = torch.promote_types(xbc.dtype, torch.float32)
        x, B, C = (part.to(wide) for part in self._parts(xbc))
        step = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        inputs = (x, step, self._decay_rates().to(wide), B, C)
        with torch.autocast("cpu" if xbc.is_meta else xbc.device.type, enabled=False):
            if xbc.shape[1] == 1 and state.h is not None:
                y, state.h = ssd_step(*inputs, state.h)
                return torch.addcmul(y, x, self.D.to(wide)[:, None]).to(xbc.dtype).flatten(2)
            y = self._scan(xbc, dt)
            added, state.h = ssd_states(*inputs, state.h)
        return y if added is None else y + added.to(y.dtype).flatten(2)

    def step_flops(self, n_before: int) -> int:
        """FLOPs of one decoded token, the same behind any number of tokens: projections and convolution, 3 E N for the
        state (decay, B x, sum), 2 E N for the output.
        """
        e, shared = self.d_inner, self.n_groups * self.d_state
        linear = 2 * self.d_model * (2 * e + 2 * shared + self.n_heads) + 2 * e * self.d_model
        return linear + 2 * self.d_conv * (e + 2 * shared) + 5 * e * self.d_state

    def flops(self, n_tokens: int) -> int:
        """Forward FLOPs of one sequence, 2 for each multiply-add; norms, gates and activations count 0.

        SSD, for each chunk of l tokens (the configured ``chunk_size``, the last one shorter): ``l * l * (G N + E)`` for
        C B^T and its product with x, counted half as causal attention is; ``2 l E N`` for the chunk's state; and, from
        the second chunk on, ``2 l E N`` for what the earlier state adds and ``2 E N`` for carrying it.
        """
        e, n, shared = self.d_inner, self.d_state, self.n_groups * self.d_state
        linear = 2 * self.d_model * (2 * e + 2 * shared + self.n_heads) + 2 * e * self.d_model
        conv = 2 * self.d_conv * (e + 2 * shared)
        full, rest = divmod(n_tokens, self.chunk_size)
        chunks = [self.chunk_size] * full + [rest] * bool(rest)
        within = sum(length * length for length in chunks) * (shared + e)
        states = 2 * n_tokens * e * n
        carried = 2 * sum(length + 1 for length in chunks[1:]) * e * n
        return n_tokens * (linear + conv) + within + states + carried
