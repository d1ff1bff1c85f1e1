"""A learnt gate per token and channel, computed from both branches.

No_Split: g = sigmoid(W_a y_attn + W_s y_ssm), y = g * y_attn + (1 - g) * y_ssm. W_a and W_s are (D, D), no bias, so that
every gate starts near one half. Split modes: the absent branch counts as zero in both lines, so
y = sigmoid(W_a y_attn) * y_attn on attention's tokens and y = sigmoid(-W_s y_ssm) * y_ssm on the SSM's: a gated unit of
each branch's own. With ``split.shared`` a token that has both outputs is treated as in No_Split. Coincides with no other fusion.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowhn.models.fusions.base import Fusion
from flowhn.models.splits.base import TokenSplit


class GatedFusion(Fusion):
    """Weigh the branches against each other. Arguments: see :class:`~flowhn.models.fusions.base.Fusion`."""

    takes_shared = True

    def __init__(self, *, d_model: int, full: bool, coordinate_gradients: bool = False) -> None:
        super().__init__(d_model=d_model, full=full, coordinate_gradients=coordinate_gradients)
        self.gate_attn = nn.Linear(d_model, d_model, bias=False)
        self.gate_ssm = nn.Linear(d_model, d_model, bias=False)

    def fuse(self, y_attn: Tensor, y_ssm: Tensor, split: TokenSplit) -> Tensor:
        if self.full:
            gate = torch.sigmoid(self.gate_attn(y_attn) + self.gate_ssm(y_ssm))  # (B, T, D)
            return y_ssm + gate * (y_attn - y_ssm)
        if not split.is_partition:
            return split.blend(
                (self.gate_attn(y_attn), y_attn), (self.gate_ssm(y_ssm), y_ssm),
                attn=lambda gate, y: torch.sigmoid(gate) * y, ssm=lambda gate, y: torch.sigmoid(-gate) * y,
                both=lambda mine, y, other, z: z + torch.sigmoid(mine + other) * (y - z),
            )  # fmt: skip
        gated_attn = torch.sigmoid(self.gate_attn(y_attn)) * y_attn  # (B, n_attn, D)
        gated_ssm = torch.sigmoid(-self.gate_ssm(y_ssm)) * y_ssm  # (B, n_ssm, D)
        return split.merge(gated_attn, gated_ssm)

    def flops(self, n_tokens: int) -> int:
        return 2 * self.d_model * self.d_model * n_tokens * (2 if self.full else 1)
