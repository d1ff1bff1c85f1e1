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

BLOCK, WARPS, GROUP = 16384, 16, 16  # the fastest of fourteen tried on an H200: scripts/bench_loss.py
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def cross_entropy_kernel(
    logits, labels, scale, losses, n_classes, stride, ignore, BLOCK: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """A tile is (BLOCK / GROUP, GROUP): a thread has whole groups, so that no thread waits for another inside the loops."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    logits += row * stride
    place = tl.arange(0, BLOCK // GROUP)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    if label == ignore:
        tl.store(losses + row, 0.0)
        for start in range(0, n_classes, BLOCK):
            column = start + place
            zero = tl.zeros((BLOCK // GROUP, GROUP), dtype=logits.dtype.element_ty)
            tl.store(logits + column, zero, mask=column < n_classes)
    else:
        # Each group's running maximum and sum, in base 2: one exponential for each logit is what this pass costs.
        top = tl.zeros((BLOCK // GROUP,), dtype=tl.float32) - 1e30  # below any logit, and -1e30 + 1e30 is a number
        sums = tl.zeros((BLOCK // GROUP,), dtype=tl.float32)
        for start in range(0, n_classes, BLOCK):
            column = start + place
            value = tl.load(logits + column, mask=column < n_classes, other=float("-inf")).to(tl.float32) * _LOG2E
            higher = tl.maximum(top, tl.max(value, axis=1))
            sums = sums * tl.exp2(top - higher) + tl.sum(tl.exp2(value - higher[:, None]), axis=1)
            top = higher
        highest = tl.max(top, axis=0)
        lse = highest + tl.log2(tl.sum(sums * tl.exp2(top - highest), axis=0))
        wanted = tl.load(logits + label).to(tl.float32)
        tl.store(losses + row, lse * _LN2 - wanted)
        factor = tl.load(scale)
        tl.debug_barrier()  # the label's logit is read before it is written over
        for start in range(0, n_classes, BLOCK):
            column = start + place
            value = tl.load(logits + column, mask=column < n_classes, other=float("-inf")).to(tl.float32) * _LOG2E
            grad = tl.exp2(value - lse) - tl.where(column == label, 1.0, 0.0)
            tl.store(logits + column, (grad * factor).to(logits.dtype.element_ty), mask=column < n_classes)


def cross_entropy_and_gradient_(
    logits: Tensor,
    labels: Tensor,
    scale: Tensor,
    ignore: int,
    *,
    block: int = BLOCK,
    warps: int = WARPS,
    group: int = GROUP,
) -> Tensor:
    """Write ``scale`` times the gradient of each row's loss over ``logits``; returns the losses.

    Args:
        logits: (N, V), rows contiguous; overwritten.
        labels: (N,) long; rows with ``ignore`` get loss and gradient 0.
        scale: one number, float32, on the device.
        block, warps, group: columns that a program reads at a time, its warps, and adjacent columns of a thread. Few warps
            are many rows at once, which do not all stay in the cache between the two readings.

    Returns:
        (N,) float32.
    """
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    block = min(block, triton.next_power_of_2(logits.shape[1]))
    cross_entropy_kernel[(logits.shape[0],)](
        logits,
        labels,
        scale,
        losses,
        logits.shape[1],
        logits.stride(0),
        ignore,
        BLOCK=block,
        GROUP=min(group, block),
        num_warps=warps,
    )
    return losses
