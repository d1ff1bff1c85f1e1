"""Time the selective scan's kernels on this GPU: forward, and forward with backward, one line for each setting.

    python scripts/bench_scan.py                                # all shapes, all tilings
    python scripts/bench_scan.py --shapes 64,447,1536,16 --tiles 8,8,64,1,64,1,1 --profile

A tiling is chunk, forward_chunk, forward_channels, forward_warps, backward_channels, backward_warps, keep_states, segments,
forward_registers and backward_registers; what is left out at the end is as in the defaults.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from flowhn.models.kernels import kernel_status
from flowhn.models.mixers.scan import selective_scan
from flowhn.models.mixers.scan_triton import DEFAULT_TILES, Tiles, triton_scan

SHAPES = ["128,447,1536,16", "64,447,1536,16", "16,447,4096,16", "32,1024,1536,16", "8,4096,1536,16"]
FORWARD = [(8, 32, 1), (8, 64, 1), (8, 128, 1), (16, 32, 1), (16, 64, 1), (8, 128, 4), (8, 128, 2)]
BACKWARD = [(8, 32, 1), (8, 64, 1), (8, 128, 1), (16, 32, 1), (4, 64, 1), (4, 128, 1), (8, 128, 4), (8, 128, 2)]


def tilings() -> list[Tiles]:
    """Each forward setting with the default backward, each backward setting with the default forward."""
    found = [Tiles(8, chunk, channels, warps) for chunk, channels, warps in FORWARD]
    for chunk, channels, warps in BACKWARD:
        forward = max(chunk, DEFAULT_TILES.forward_chunk)
        found += [
            Tiles(chunk, forward, DEFAULT_TILES.forward_channels, 1, channels, warps, keep) for keep in (True, False)
        ]
    found += [replace(DEFAULT_TILES, segments=number) for number in (1, 2, 3, 4, 8, 16)]
    found += [replace(DEFAULT_TILES, forward_registers=cap) for cap in (0, 96, 128, 168)]
    found += [replace(DEFAULT_TILES, backward_registers=cap) for cap in (0, 128, 168)]
    return list(dict.fromkeys(found))


def make_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Leaves as Mamba-1 makes them (B and C slices of one projection), and y's gradient."""
    n_batch, n_tokens, n_channels, n_states = shape
    torch.manual_seed(0)
    rows = lambda width: torch.randn(n_batch, n_tokens, width, device="cuda", dtype=dtype)  # noqa: E731
    A = -torch.arange(1, n_states + 1, device="cuda").float().repeat(n_channels, 1)
    bias = torch.linspace(-7, -2, n_channels, device="cuda")
    leaves = [rows(n_channels), rows(n_channels), A, rows(2 * n_states), torch.ones(n_channels, device="cuda"), bias]
    return [leaf.requires_grad_() for leaf in leaves], rows(n_channels)


def report(name: str, scan: Callable[..., Tensor], leaves: list[Tensor], dy: Tensor, kept: list[Tensor] | None) -> list:
    """Print one line; returns the output and gradients, compared with ``kept``."""
    u, delta, A, BC, D, bias = leaves
    n_states = A.shape[1]

    def forward() -> Tensor:
        return scan(u, delta, A, *BC.split((n_states, n_states), -1), D, bias)

    def both() -> list[Tensor]:
        y = forward()
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    try:
        found = both()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        with torch.no_grad():
            ahead = time_ms(forward)
        line = f"forward {ahead:7.3f} ms  forward+backward {time_ms(both):7.3f} ms  peak {peak:6.0f} MiB"
    except Exception as error:
        print(f"{name}: {type(error).__name__} {str(error).splitlines()[0][:200]}", flush=True)
        return kept
    if kept is not None:
        errors = [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(found, kept, strict=True)]
        line += "  off by " + " ".join(f"{error:.0e}" for error in errors)
    print(f"{name}: {line}", flush=True)
    return found if kept is None else kept


def time_ms(function: Callable[[], object], groups: int = 7, calls: int = 5) -> float:
    """Median over groups of the mean of back-to-back calls."""
    times = []
    for _ in range(groups + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return sorted(times[1:])[groups // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="B,T,E,N")
    parser.add_argument("--tiles", nargs="+", default=None)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--profile", action="store_true", help="also the time of each CUDA kernel")
    args = parser.parse_args()
    chosen = tilings()
    if args.tiles:
        chosen = [Tiles(*values[:6], bool(values[6]), *values[7:]) for values in (parse(text) for text in args.tiles)]
    for shape in map(parse, args.shapes):
        print(f"shape {shape}, {math.prod(shape) / 1e6:.0f}M state updates, {args.dtype}", flush=True)
        leaves, dy = make_inputs(shape, getattr(torch, args.dtype))
        kept = None
        if kernel_status()["mamba_ssm"][0]:
            kept = report("  mamba_ssm", lambda *x: selective_scan(*x, kernel="mamba_ssm"), leaves, dy, None)
        for tiles in chosen:
            name = "  triton " + ",".join(str(int(value)) for value in vars(tiles).values())
            kept = report(name, lambda *x, tiles=tiles: triton_scan(*x, tiles=tiles), leaves, dy, kept)
            if args.profile:
                profile(leaves, dy, tiles)


def profile(leaves: list[Tensor], dy: Tensor, tiles: Tiles) -> None:
    u, delta, A, BC, D, bias = leaves
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as found:
        for _ in range(3):
            y = triton_scan(u, delta, A, *BC.split((A.shape[1],) * 2, -1), D, bias, tiles=tiles)
            torch.autograd.grad(y, leaves, dy)
    for event in itertools.islice(sorted(found.key_averages(), key=lambda e: -e.device_time_total), 8):
        print(f"      {event.device_time_total / 3000:7.3f} ms  {event.key[:90]}", flush=True)


def parse(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    main()
