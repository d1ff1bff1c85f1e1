"""Softmax cross-entropy and its gradient in one Triton kernel, written over the logits. Imported on a CUDA device only.

    loss[i] = logsumexp(l[i]) - l[i, label[i]]        dl[i] = scale * (softmax(l[i]) - onehot(label[i]))

One program for each row: it reads the row once for the sum, then again, from the cache, for the gradient. Plain torch
reads the logits in the forward pass, reads them again in the backward pass and writes the gradient elsewhere.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _WARPS = 8192, 16
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def cross_entropy_kernel(logits, labels, scale, losses, n_classes, stride, ignore, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    logits += row * stride
    if label == ignore:
        tl.store(losses + row, 0.0)
        for start in range(0, n_classes, BLOCK):
            column = start + tl.arange(0, BLOCK)
            tl.store(logits + column, tl.zeros((BLOCK,), dtype=logits.dtype.element_ty), mask=column < n_classes)
    else:
        # Running maximum and sum in base 2: one exponential for each logit is what this pass costs.
        top = float("-inf")
        sums = tl.zeros((BLOCK,), dtype=tl.float32)
        for start in range(0, n_classes, BLOCK):
            column = start + tl.arange(0, BLOCK)
            value = tl.load(logits + column, mask=column < n_classes, other=float("-inf")).to(tl.float32) * _LOG2E
            higher = tl.maximum(top, tl.max(value, axis=0))
            sums = sums * tl.exp2(top - higher) + tl.exp2(value - higher)
            top = higher
        lse = top + tl.log2(tl.sum(sums, axis=0))
        wanted = tl.load(logits + label).to(tl.float32)
        tl.store(losses + row, lse * _LN2 - wanted)
        factor = tl.load(scale)
        tl.debug_barrier()  # the label's logit is read before it is written over
        for start in range(0, n_classes, BLOCK):
            column = start + tl.arange(0, BLOCK)
            value = tl.load(logits + column, mask=column < n_classes, other=float("-inf")).to(tl.float32) * _LOG2E
            grad = tl.exp2(value - lse) - tl.where(column == label, 1.0, 0.0)
            tl.store(logits + column, (grad * factor).to(logits.dtype.element_ty), mask=column < n_classes)


def cross_entropy_and_gradient_(logits: Tensor, labels: Tensor, scale: Tensor, ignore: int) -> Tensor:
    """Write ``scale`` times the gradient of each row's loss over ``logits``; returns the losses.

    Args:
        logits: (N, V), rows contiguous; overwritten.
        labels: (N,) long; rows with ``ignore`` get loss and gradient 0.
        scale: one number, float32, on the device.

    Returns:
        (N,) float32.
    """
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    block = min(_BLOCK, triton.next_power_of_2(logits.shape[1]))
    cross_entropy_kernel[(logits.shape[0],)](
        logits, labels, scale, losses, logits.shape[1], logits.stride(0), ignore, BLOCK=block, num_warps=_WARPS
    )
    return losses
