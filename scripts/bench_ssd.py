"""Time the kernels of Mamba-2's SSD on this GPU, ours by tiling and mamba_ssm's: python scripts/bench_ssd.py [--shape 64,456,64]

Each line changes the setting of every kernel; the kernels do not depend on each other, so the fastest of each go together. Of fewer
bc_heads more parts of B's and C's gradients are left to be summed, which counts among the others.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from flowhn.models.kernels import kernel_status
from flowhn.models.mixers.ssd_cuda import mamba_ssm_ssd
from flowhn.models.mixers.ssd_triton import Tiles, triton_ssd

HEADDIM, STATES = 64, 128
# Seven kernels in five settings: the two walks, states and carry; output; x's gradient; that of C B (scores); those of B and C; dt has none.
KERNELS = ("walk", "output", "x", "scores", "bc")
TILINGS = [  # chunk, bc_heads, and of each kernel warps, stages, registers
    Tiles(),
    (64, 32, (8, 2, 128), (4, 3, 0), (4, 3, 0), (4, 3, 0), (4, 2, 168)),
    (64, 16, (4, 2, 0), (4, 2, 128), (4, 2, 0), (4, 2, 128), (4, 2, 0)),
    (64, 64, (4, 3, 128), (4, 3, 168), (4, 2, 128), (8, 2, 128), (4, 3, 0)),
    (64, 8, (4, 2, 96), (4, 1, 128), (8, 2, 128), (4, 3, 168), (8, 3, 128)),
    (128, 16, (8, 2, 128), (8, 2, 0), (8, 2, 0), (8, 2, 0), (8, 2, 0)),
]


def tiles(setting: Tiles | tuple) -> Tiles:
    """A line of the list; two heads of a walk with eight warps, one with four."""
    if isinstance(setting, Tiles):
        return setting
    chunk, heads, *rest = setting
    words = {f"{name}_{what}": value for name, three in zip(KERNELS, rest, strict=True)
             for what, value in zip(("warps", "stages", "registers"), three, strict=True)}  # fmt: skip
    return Tiles(chunk=chunk, bc_heads=heads, walk_heads=max(1, words["walk_warps"] // 4), **words)


def kernel_ms(function: Callable[[], None], calls: int = 5) -> dict[str, float]:
    """Milliseconds of each kernel in one call."""
    for _ in range(2):
        function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(calls):
            function()
        torch.cuda.synchronize()
    sums: dict[str, float] = {}
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            sums[event.name] = sums.get(event.name, 0.0) + event.time_range.elapsed_us() / 1e3 / calls
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="64,456,64", help="batch, tokens, heads")
    parser.add_argument(
        "--mamba-ssm", action="store_true", help="mamba_ssm's kernels too: they try their tiles for minutes"
    )
    parser.add_argument("--tilings", nargs="+", type=int, help="places in the list; all, where none is given")
    options = parser.parse_args()
    n_batch, n_tokens, n_heads = map(int, options.shape.split(","))
    torch.manual_seed(0)
    width = n_heads * HEADDIM
    xbc = torch.randn(n_batch, n_tokens, width + 2 * STATES, device="cuda", dtype=torch.bfloat16).requires_grad_()
    dt = torch.randn(n_batch, n_tokens, n_heads, device="cuda", dtype=torch.bfloat16).requires_grad_()
    A, D, bias = (
        -torch.rand(n_heads, device="cuda") * 8 - 1,
        torch.ones(n_heads, device="cuda"),
        torch.rand(n_heads) - 5,
    )
    small = [tensor.cuda().requires_grad_() for tensor in (A, D, bias)]
    dy = torch.randn(n_batch, n_tokens, width, device="cuda", dtype=torch.bfloat16)

    leaves = [xbc, dt, *small]

    def ours(cut: Tiles) -> Tensor:
        return triton_ssd(xbc, dt, *small, n_groups=1, d_state=STATES, tiles=cut)

    def theirs() -> Tensor:
        x, B, C = xbc.split((width, STATES, STATES), -1)
        x, B, C = x.unflatten(-1, (n_heads, HEADDIM)), B.unsqueeze(2), C.unsqueeze(2)
        return mamba_ssm_ssd(x, dt, small[0], B, C, small[1], small[2], chunk_size=256).flatten(2)

    for cut in [tiles(TILINGS[i]) for i in options.tilings or range(len(TILINGS))]:
        try:
            found = kernel_ms(lambda cut=cut: torch.autograd.grad(ours(cut), leaves, dy))
        except Exception as error:  # a tiling that does not fit is a finding; the others are still timed
            print(f"{cut}\n   {error!s:.200}", flush=True)
            continue
        parts = {name.removesuffix("_kernel"): ms for name, ms in found.items() if name.startswith("ssd_")}
        rest = sum(found.values()) - sum(parts.values())
        print(f"{cut}\n   {sum(found.values()):.3f} ms: " + ", ".join(f"{k} {v:.3f}" for k, v in parts.items())
              + f", others {rest:.3f}", flush=True)  # fmt: skip
    if options.mamba_ssm and kernel_status()["mamba_ssm"][0]:
        print(
            f"mamba_ssm {sum(kernel_ms(lambda: torch.autograd.grad(theirs(), leaves, dy)).values()):.3f} ms", flush=True
        )


if __name__ == "__main__":
    main()
