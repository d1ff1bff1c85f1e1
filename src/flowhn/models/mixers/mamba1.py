"""Mamba-1 mixer, with Jamba's RMSNorms on dt, B and C as an option."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowhn.errors import UserError
from flowhn.models.cache import SSMState
from flowhn.models.kernels import resolve_ssm
from flowhn.models.mixers.conv import causal_conv, causal_conv_silu
from flowhn.models.mixers.scan import selective_scan
from flowhn.models.mixers.ssm_init import inverse_softplus_dt, keep
from flowhn.models.mixers.stepwise import scan_states, scan_step
from flowhn.models.norms import RMSNorm


class Mamba1(nn.Module):
    """``out_proj(scan(silu(conv(x))) * silu(z))`` with ``x, z = in_proj(input)`` (Gu and Dao 2023, figure 3).

    FlowHN's SSM branch is this mixer with ``bcdt_rms_norm`` as in Jamba (paper.md). Parameter names follow mamba_ssm's
    Mamba and transformers' JambaMambaMixer. E = expand * D channels, N = d_state.
    in_proj, x_proj and out_proj have no bias; the convolution and dt_proj have one.

    Args:
        d_model: width D.
        d_state: states per channel.
        d_conv: width of the causal depthwise convolution.
        expand: E / D.
        dt_rank: rank of the step size's projection; None for ceil(D / 16).
        bcdt_rms_norm: normalise dt, B and C (Jamba).
        dt_min, dt_max: range of the initial step sizes, log-uniform.
        norm_eps: of those norms.
        backend: auto, torch, mamba_ssm or triton (see :mod:`flowhn.models.kernels`).

    Raises:
        UserError: a size below 1, or an unknown backend.
    """

    kernel_kind = "ssm"

    def __init__(
        self,
        *,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        bcdt_rms_norm: bool = False,
        dt_min: float = 1e-3,
        dt_max: float = 1e-1,
        norm_eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("d_state", d_state), ("d_conv", d_conv), ("expand", expand)):
            if value < 1:
                raise UserError(f"{name}={value} must be at least 1")
        resolve_ssm("auto" if backend in ("mamba_ssm", "triton") else backend, "cpu")  # refuses an unknown name at once
        self.d_model, self.d_state, self.d_conv, self.backend = d_model, d_state, d_conv, backend
        self.d_inner = expand * d_model
        self.dt_rank = -(-d_model // 16) if dt_rank is None else dt_rank
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=False)
        self.conv1d = nn.Conv1d(self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner)
        A = torch.arange(1, d_state + 1, dtype=torch.float32)
        self.A_log = keep(nn.Parameter(A.log().repeat(self.d_inner, 1)))  # (E, N)
        self.D = keep(nn.Parameter(torch.ones(self.d_inner)))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=False)
        if bcdt_rms_norm:
            self.dt_layernorm = RMSNorm(self.dt_rank, eps=norm_eps)
            self.b_layernorm = RMSNorm(d_state, eps=norm_eps)
            self.c_layernorm = RMSNorm(d_state, eps=norm_eps)
        self.bcdt_rms_norm = bcdt_rms_norm
        self._init_dt_proj(dt_min, dt_max)

    def _init_dt_proj(self, dt_min: float, dt_max: float) -> None:
        bound = self.dt_rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        with torch.no_grad():
            self.dt_proj.bias.copy_(inverse_softplus_dt(self.d_inner, dt_min=dt_min, dt_max=dt_max))
        keep(self.dt_proj.weight, decay=True)
        keep(self.dt_proj.bias)
        self.dt_proj._no_reinit = True

    def kernel(self, device_type: str) -> str:
        """``torch``, ``mamba_ssm`` or ``triton``: what the scan runs on a device type."""
        return resolve_ssm(self.backend, device_type, has_triton=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        u, z = self.in_proj(x).chunk(2, dim=-1)  # (B, T, E) each
        u = causal_conv_silu(u, self.conv1d.weight, self.conv1d.bias, kernel=self.kernel(x.device.type))
        dt, B, C = self.x_proj(u).split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        if self.bcdt_rms_norm:
            dt, B, C = self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)
        # The bias joins inside the scan, in float32: under autocast the linear would round it to bfloat16.
        delta = F.linear(dt, self.dt_proj.weight)  # (B, T, E)
        if x.shape[1]:
            A = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
            kernel = self.kernel(x.device.type)
            u = selective_scan(u, delta, A, B, C, self.D, self.dt_proj.bias, kernel=kernel)
        return self.out_proj(u * F.silu(z))

    def new_cache(self) -> SSMState:
        """The state before the first token."""
        return SSMState()

    def extend(self, x: Tensor, state: SSMState) -> Tensor:
        """(B, n, D) -> (B, n, D): n >= 1 new tokens behind those that ``state`` has read; it takes them up."""
        u, z = self.in_proj(x).chunk(2, dim=-1)  # (B, n, E) each
        padded = state.keep_tail(u, self.d_conv)
        u = F.silu(causal_conv(padded, self.conv1d.weight, self.conv1d.bias)[:, self.d_conv - 1 :])
        dt, B, C = self.x_proj(u).split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        if self.bcdt_rms_norm:
            dt, B, C = self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)
        delta = F.linear(dt, self.dt_proj.weight)  # (B, n, E)
        return self.out_proj(self._scan_on(u, delta, B, C, state) * F.silu(z))

    def _scan_on(self, u: Tensor, delta: Tensor, B: Tensor, C: Tensor, state: SSMState) -> Tensor:
        """The scan that goes on from ``state``: u, delta (B, n, E), B, C (B, n, N) -> (B, n, E)."""
        wide = torch.promote_types(u.dtype, torch.float32)
        A = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
        dt = F.softplus(delta.to(wide) + self.dt_proj.bias.to(wide))
        inputs = (u.to(wide), dt, A.to(wide), B.to(wide), C.to(wide))
        with torch.autocast("cpu" if u.is_meta else u.device.type, enabled=False):
            if u.shape[1] == 1 and state.h is not None:
                y, state.h = scan_step(*inputs, state.h)
                return torch.addcmul(y, inputs[0], self.D.to(wide)).to(u.dtype)
            kernel = self.kernel(u.device.type)
            y = selective_scan(u, delta, A, B, C, self.D, self.dt_proj.bias, kernel=kernel)
            added, state.h = scan_states(*inputs, state.h)
        return y if added is None else y + added.to(y.dtype)

    def step_flops(self, n_before: int) -> int:
        """FLOPs of one decoded token: the same behind any number of tokens."""
        return self.flops(1)

    def flops(self, n_tokens: int) -> int:
        """Forward FLOPs of one sequence: 2 for each multiply-add, and 9 E N a token for the scan (Mamba's own count:
        discretisation, recurrence, output). Norms, gates and activations count 0.
        """
        e, n, r = self.d_inner, self.d_state, self.dt_rank
        linear = 2 * (self.d_model * 2 * e + e * (r + 2 * n) + r * e + e * self.d_model)
        return n_tokens * (linear + 2 * self.d_conv * e + 9 * e * n)
