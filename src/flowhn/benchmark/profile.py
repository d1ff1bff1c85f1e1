"""Where the time of a training step goes: device time by kind of kernel, and how much of it overlaps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_STEPS = 3
# A kernel belongs to the first kind that one of its words occurs in.
_KINDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("attention", ("sdpa", "flash", "fmha", "attention", "compute_dot_do_o")),
    ("SSM scan", ("selective_scan", "_chunk_", "state_passing", "ssd_")),
    ("loss", ("softmax", "nll_loss", "cross_entropy")),
    ("optimiser", ("adam", "multi_tensor_apply", "lpnorm")),
    ("convolution", ("conv_silu", "causal_conv")),
    ("matrix products", ("nvjet", "gemm", "cutlass", "xmma", "splitk", "cublas", "gemv")),
    ("norms, gates, copies", ("triton_", "elementwise", "copy", "cat", "reduce", "fill", "memset", "memcpy", "norm")),
    ("embedding", ("grad_weight", "scatter", "embedding", "indexing", "sort", "radix", "scan_by_key", "segment")),
)
# Inductor names a kernel after the operators at its edges too: of these, all but a loss move and gate what others computed.
_FUSED = ("triton_poi_", "triton_red_", "triton_per_")


def kind_of(kernel: str) -> str:
    """The kind of a kernel, by its name; ``other`` where nothing is known."""
    lower = kernel.lower()
    kinds = (
        [row for row in _KINDS if row[0] in ("loss", "norms, gates, copies")] if lower.startswith(_FUSED) else _KINDS
    )
    return next((kind for kind, words in kinds if any(word in lower for word in words)), "other")


def profile_steps(step: Callable[[], None], *, device: torch.device, top: int = 25) -> dict[str, Any]:
    """Profile a few steps.

    Returns:
        ``{"kinds": {kind: ms}, "top": [[kernel, ms, calls]], "kernel_ms", "busy_ms", "overlap_ms"}``, all for one step.
        ``busy_ms`` is the time in which at least one kernel ran; what ``kernel_ms`` exceeds it by ran beside another.
    """
    from torch.profiler import ProfilerActivity, profile

    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_cuda
    with profile(activities=activities) as found:
        for _ in range(_STEPS):
            step()
        if on_cuda:
            torch.cuda.synchronize(device)
    wanted = torch.autograd.DeviceType.CUDA if on_cuda else torch.autograd.DeviceType.CPU
    kernels = [event for event in found.events() if event.device_type == wanted and "#" not in event.name]
    sums: dict[str, list[float]] = {}
    for event in kernels:
        entry = sums.setdefault(event.name, [0.0, 0])
        entry[0] += (event.time_range.elapsed_us() if on_cuda else event.self_cpu_time_total) / 1e3 / _STEPS
        entry[1] += 1
    kinds: dict[str, float] = {}
    for name, (milliseconds, _) in sums.items():
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0.0) + milliseconds
    total = sum(kinds.values())
    busy = (
        union([(event.time_range.start, event.time_range.end) for event in kernels]) / 1e3 / _STEPS
        if on_cuda
        else total
    )
    rows = sorted(([name[:120], ms, calls // _STEPS] for name, (ms, calls) in sums.items()), key=lambda row: -row[1])
    ordered = dict(sorted(kinds.items(), key=lambda pair: -pair[1]))
    return {
        "kinds": ordered,
        "top": rows[:top],
        "kernel_ms": total,
        "busy_ms": busy,
        "overlap_ms": max(0.0, total - busy),
    }


def union(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered
