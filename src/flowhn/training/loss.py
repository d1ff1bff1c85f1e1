"""The next-token loss: LM head and cross-entropy together, because together they are half of a small model's step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flowhn.models.kernels import triton_usable

IGNORE = -100  # label of a position that does not count in the loss


def token_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """Mean next-token cross-entropy in nats over the labels that count, in plain torch.

    The logits stay in the compute dtype (bf16 under autocast); softmax and loss are fp32. One function, so that
    ``torch.compile`` fuses cast, softmax and loss and never stores the fp32 logits.

    Args:
        hidden: (B, T, D); weight: (V, D); bias: (V,) or None; labels: (B, T), ``IGNORE`` where no loss.

    Returns:
        Scalar, fp32 (fp64 for fp64 inputs).
    """
    logits = F.linear(hidden, weight, bias).flatten(0, 1)  # (B * T, V)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE)


def training_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, plain: Callable[..., Tensor] = token_loss
) -> Tensor:
    """The loss of a training step by the fastest way: :func:`fused_token_loss` on CUDA with Triton, else ``plain``.

    Arguments and result as in :func:`token_loss`; ``plain`` may be its compiled form.
    """
    fused = hidden.device.type == "cuda" and bias is None and hidden.dtype != torch.float64 and triton_usable()
    return fused_token_loss(hidden, weight, labels) if fused else plain(hidden, weight, bias, labels)


def fused_token_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """:func:`token_loss` with one kernel that turns the logits into their gradient where they lie.

    Half the memory of the compiled :func:`token_loss` and two passes over the logits fewer. Arguments as there; under
    autocast the products run in its type, as ``F.linear`` would.
    """
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    with torch.autocast("cuda", enabled=False):
        return _LinearCrossEntropy.apply(hidden.flatten(0, 1), weight.to(hidden.dtype), labels.flatten())


class _LinearCrossEntropy(torch.autograd.Function):
    """hidden (N, D), weight (V, D), labels (N,) -> mean loss. The gradient of the logits is made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        from flowhn.training.cross_entropy_triton import cross_entropy_and_gradient_  # needs Triton

        logits = hidden @ weight.t()  # (N, V)
        share = (labels != IGNORE).sum().float().reciprocal()
        losses = cross_entropy_and_gradient_(logits, labels, share, IGNORE)  # logits now hold their gradient
        ctx.save_for_backward(hidden, weight, logits)
        return losses.sum() * share

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        hidden, weight, d_logits = ctx.saved_tensors
        d_hidden = (d_logits @ weight) * grad.to(weight.dtype) if ctx.needs_input_grad[0] else None
        d_weight = (d_logits.t() @ hidden) * grad.to(weight.dtype) if ctx.needs_input_grad[1] else None
        return d_hidden, d_weight, None
