"""RMSNorm whose weight follows the activations' type, and Mamba-2's gated one: in plain torch, or as Triton kernels on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowhn.models.kernels import ANY_STRIDES, triton_usable

_WIDEST_GROUP = 4096  # channels that a program of the Triton kernels keeps in registers


def to_autocast(x: Tensor) -> Tensor:
    """x in the type that autocast computes in on its device; x itself without autocast (which the meta device does not know)."""
    device = x.device.type
    return x if x.is_meta or not torch.is_autocast_enabled(device) else x.to(torch.get_autocast_dtype(device))


class RMSNorm(nn.RMSNorm):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension.

    ``torch.nn.RMSNorm`` with one difference: the weight is cast to the input's type. A float32 master weight under
    bfloat16 activations otherwise misses torch's fused kernel (which warns about it). The mean is accumulated in
    float32 by torch, and the output has the input's type.

    Args:
        d: size of the last dimension.
        eps: added to the mean square. 1e-6 as in Llama and Jamba.
    """

    def __init__(self, d: int, *, eps: float = 1e-6) -> None:
        super().__init__(d, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d), same type."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class GatedRMSNorm(nn.Module):
    """``RMSNorm(y * silu(z)) * weight`` in groups of channels: the gate first, as in mamba_ssm's Mamba2.

    Args:
        d: number of channels.
        n_groups: the mean square is taken over each of ``n_groups`` equal groups of channels (mamba_ssm: ``ngroups``).
        eps: added to the mean square.
    """

    def __init__(self, d: int, *, n_groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        self.n_groups = n_groups
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, y: Tensor, z: Tensor, *, kernel: str = "torch") -> Tensor:
        """y, z (..., d) -> (..., d) in z's type; computed in float32 (or float64 for float64 input).

        Args:
            kernel: what the mixer's scan runs on; ``torch`` keeps to plain torch, anything else takes the Triton kernels for
                (B, T, d) on CUDA where Triton works.
        """
        fits = z.dim() == 3 and z.numel() and z.dtype != torch.float64 and z.shape[-1] <= _WIDEST_GROUP * self.n_groups
        if kernel != "torch" and z.device.type == "cuda" and fits and triton_usable():
            return gated_norm(y, z, self.weight.float(), self.eps, self.n_groups)[0]
        wide = torch.promote_types(z.dtype, torch.float32)
        gated = y.to(wide) * F.silu(z.to(wide))
        groups = gated.unflatten(-1, (self.n_groups, -1))  # (..., G, d / G)
        normed = groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)
        return (normed.flatten(-2) * self.weight.to(wide)).to(z.dtype)


def _adjacent(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, with adjacent channels."""
    return tuple(tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors)


@torch.library.custom_op("flowhn::gated_norm", mutates_args=(), tags=ANY_STRIDES)
def gated_norm(y: Tensor, z: Tensor, weight: Tensor, eps: float, n_groups: int) -> tuple[Tensor, Tensor]:
    """out (B, T, d) in z's type and the scale of each group (B, T, G), float32; y, z (B, T, d), weight (d,) float32."""
    from flowhn.models.gated_norm_triton import gated_norm_forward  # needs Triton

    y, z = _adjacent(y, z)
    return gated_norm_forward(y, z, weight, eps, n_groups)


@torch.library.custom_op("flowhn::gated_norm_backward", mutates_args=(), tags=ANY_STRIDES)
def gated_norm_backward(
    dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, scales: Tensor, n_groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y, z and weight."""
    from flowhn.models import gated_norm_triton

    dout, y, z = _adjacent(dout, y, z)
    return gated_norm_triton.gated_norm_backward(dout, y, z, weight, scales, n_groups)


@gated_norm.register_fake
def _(y: Tensor, z: Tensor, weight: Tensor, eps: float, n_groups: int) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), weight.new_empty((*z.shape[:2], n_groups))


@gated_norm_backward.register_fake
def _(
    dout: Tensor, y: Tensor, z: Tensor, weight: Tensor, scales: Tensor, n_groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    return y.new_empty(y.shape), z.new_empty(z.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output) -> None:
    *tensors, _, ctx.n_groups = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 5
    return *gated_norm_backward(dout, *ctx.saved_tensors, ctx.n_groups), None, None


gated_norm.register_autograd(_differentiate, setup_context=_save)
