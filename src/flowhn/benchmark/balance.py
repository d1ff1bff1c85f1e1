"""``split.balance=time``: cut the tokens so that both branches take the same time on this device, not the same FLOPs.

FLOPs are only part of what a branch costs: a scan is bound by memory, a short attention by launches. Here each branch of
one block is timed, forward and backward, at three lengths; a parabola through them gives its time at every length, and
the cut is the integer at which the slower branch is fastest.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from flowhn.benchmark.timing import median_time
from flowhn.models.blocks import ParallelBlock

_SHARES = (0.3, 0.5, 0.7)  # of the sequence: the cut is expected between them


@dataclass(frozen=True)
class MeasuredBalance:
    """Result of :func:`measure_balance`.

    Attributes:
        ratio: attention's share of the tokens; ``int(ratio * seq_len)`` is ``n_attn``.
        n_attn: attention's tokens of ``seq_len`` at the time-balanced cut.
        n_attn_flops: the same at the FLOP-balanced cut.
        attention, ssm: ``[tokens, milliseconds]`` of each branch, forward and backward, of a whole batch.
        batch_size, device: what was measured on.
    """

    ratio: float
    n_attn: int
    n_attn_flops: int
    seq_len: int
    attention: list[list[float]]
    ssm: list[list[float]]
    batch_size: int
    device: str


def balanced_cut(seq_len: int, attention: Callable[[int], float], ssm: Callable[[int], float]) -> int:
    """The n from 0 to ``seq_len`` with the least ``max(attention(n), ssm(seq_len - n))``; of equal ones the smallest."""
    return min(range(seq_len + 1), key=lambda n: max(attention(n), ssm(seq_len - n)))


def measure_balance(
    block: ParallelBlock,
    *,
    seq_len: int,
    batch_size: int,
    d_model: int,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    compile: bool = False,
) -> MeasuredBalance:
    """Time both branches of ``block`` (moved to ``device``) at some lengths and choose the cut.

    Args:
        block: its weights and gradients are left as they are.
        seq_len, batch_size, d_model: shape of the training batch.
        dtype: autocast to this type; None computes in the block's own.
        compile: time the compiled branches, as training runs them.
    """
    device = torch.device(device)
    lengths = sorted({max(1, round(share * seq_len)) for share in _SHARES})
    shape = {"batch_size": batch_size, "d_model": d_model, "device": device, "dtype": dtype, "compile": compile}
    attention = [[n, 1e3 * _branch_seconds(block.attention, n, **shape)] for n in lengths]
    ssm = [[n, 1e3 * _branch_seconds(block.ssm, n, **shape)] for n in lengths]
    n_attn = balanced_cut(seq_len, _curve(attention), _curve(ssm))
    # Halfway to the next integer, so that int(ratio * seq_len) is n_attn whatever the rounding of the product.
    ratio = min(1.0, (n_attn + 0.5) / seq_len)
    n_attn_flops = balanced_cut(seq_len, block.attention.flops, block.ssm.flops)
    return MeasuredBalance(ratio, n_attn, n_attn_flops, seq_len, attention, ssm, batch_size, _name(device))


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _curve(points: list[list[float]]) -> Callable[[int], float]:
    """A parabola through (or nearest to) the points, 0 for no tokens and never negative."""
    tokens, values = np.array(points).T
    coefficients = np.polyfit(tokens, values, min(2, len(points) - 1))
    return lambda n: max(0.0, float(np.polyval(coefficients, n))) if n else 0.0


def _branch_seconds(
    branch: nn.Module,
    n_tokens: int,
    *,
    batch_size: int,
    d_model: int,
    device: torch.device,
    dtype: torch.dtype | None,
    compile: bool,
) -> float:
    kept = [parameter.grad for parameter in branch.parameters()]
    run = torch.compile(branch, dynamic=False) if compile else branch
    generator = torch.Generator(device=device).manual_seed(0)
    x = torch.randn(batch_size, n_tokens, d_model, device=device, generator=generator)

    def step() -> None:
        leaf = x.requires_grad_()
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            y, _ = run(leaf)
        y.backward(torch.ones_like(y))
        leaf.grad = None

    try:
        return median_time(step, device=device, warmup=3, repeats=5, calls=3)
    finally:
        for parameter, grad in zip(branch.parameters(), kept, strict=True):
            parameter.grad = grad


def load_or_measure(path: Path, measure: Callable[[], MeasuredBalance]) -> MeasuredBalance:
    """The measurement kept in ``path``, or a new one that is kept there: a run that goes on must keep its routing."""
    if path.is_file():
        return MeasuredBalance(**json.loads(path.read_text(encoding="utf-8")))
    result = measure()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(result)), encoding="utf-8")
    temporary.replace(path)
    return result


def set_ratio(tree: Any, ratio: float) -> None:
    """Set ``ratio`` in every time-balanced split of a model's config tree that has none."""
    if isinstance(tree, dict):
        if tree.get("balance") == "time" and tree.get("ratio") is None:
            tree["ratio"] = ratio
        for value in tree.values():
            set_ratio(value, ratio)
