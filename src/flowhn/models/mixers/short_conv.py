"""A short causal convolution over all tokens before a block's branches part: not in the paper, off by default."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from flowhn.errors import UserError
from flowhn.models.cache import SSMState
from flowhn.models.kernels import resolve_ssm
from flowhn.models.mixers.conv import causal_conv, causal_conv_silu
from flowhn.models.norms import RMSNorm, to_autocast


class ShortConv(nn.Module):
    """``x + silu(conv(RMSNorm(x)))``, the depthwise convolution inside Mamba, here for the tokens of both branches.

    In a split block a token of the attention branch meets its neighbours only where attention looks at them, and the first
    tokens of a branch's stretch meet none. K taps over the whole sequence show each token the K - 1 before it, for K products
    per channel. The weights start at zero: the residual stream is small in the beginning (the embedding's 0.02), and anything
    larger would drown a token's own embedding.

    Args:
        d_model: width D.
        taps: K.
        norm_eps: added to the mean square in the norm.
        backend: as the mixers' (``torch`` keeps to plain torch).

    Raises:
        UserError: fewer than two taps.
    """

    def __init__(self, *, d_model: int, taps: int = 4, norm_eps: float = 1e-6, backend: str = "auto") -> None:
        super().__init__()
        if isinstance(taps, bool) or not isinstance(taps, int) or taps < 2:
            raise UserError(f"short_conv={taps} must be null, or the number of taps: 2 or more (4 as in Mamba)")
        self.taps, self.backend = taps, backend
        self.norm = RMSNorm(d_model, eps=norm_eps)
        self.conv1d = nn.Conv1d(d_model, d_model, taps, groups=d_model, bias=False, padding=taps - 1)
        nn.init.zeros_(self.conv1d.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        kernel = resolve_ssm(self.backend, x.device.type, has_triton=True)
        return x + causal_conv_silu(self._normed(x), self.conv1d.weight, None, kernel=kernel).to(x.dtype)

    def _normed(self, x: Tensor) -> Tensor:
        """RMSNorm(x) in autocast's type: no product follows that would cast it."""
        return to_autocast(self.norm(x))

    def extend(self, x: Tensor, state: SSMState) -> Tensor:
        """(B, n, D) -> (B, n, D): n new tokens behind those of which ``state`` keeps the last K - 1."""
        padded = state.keep_tail(self._normed(x), self.taps)
        return x + F.silu(causal_conv(padded, self.conv1d.weight, None)[:, self.taps - 1 :]).to(x.dtype)

    def flops(self, n_tokens: int) -> int:
        """Forward FLOPs of one sequence."""
        return 2 * self.conv1d.weight.numel() * n_tokens
