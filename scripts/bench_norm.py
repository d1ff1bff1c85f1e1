"""Time Mamba-2's gated RMSNorm on this GPU, forward and backward in bf16: python scripts/bench_norm.py [--shapes 128,1024,1536]

What torch.compile makes of the plain module, and the package's Triton kernels, by channels of a thread and programs of a processor.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from flowhn.models import gated_norm_triton
from flowhn.models.norms import GatedRMSNorm

SHAPES = ["128,1024,1536", "64,456,4096"]  # 135m's Mamba-2; 1b's branch of FAC_Split: sequences, tokens, channels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    for shape in parser.parse_args().shapes:
        n_batch, n_tokens, width = map(int, shape.split(","))
        draw = lambda *sizes: torch.randn(sizes, device="cuda", dtype=torch.bfloat16)  # noqa: E731
        y = draw(n_batch, n_tokens, width).requires_grad_()
        z = draw(n_batch, n_tokens, 2 * width + 320)[..., :width].requires_grad_()
        dout = draw(n_batch, n_tokens, width)
        norm = GatedRMSNorm(width).cuda()
        leaves = [y, z, norm.weight]
        torch._dynamo.reset()
        compiled = torch.compile(norm, dynamic=False)  # as training compiles

        def ours(y: Tensor = y, z: Tensor = z, norm: GatedRMSNorm = norm) -> Tensor:
            return norm(y, z, kernel="triton")

        def plain(y: Tensor = y, z: Tensor = z, compiled: Callable[..., Tensor] = compiled) -> Tensor:
            return compiled(y, z)

        print(f"shape ({shape})", flush=True)
        settings = [(channels, programs) for channels in (8, 16) for programs in (4, 8, 16)]
        ways = [("compiled", plain, settings[0]), *((f"triton {cut}", ours, cut) for cut in settings)]
        for name, way, (gated_norm_triton.CHANNELS, gated_norm_triton.PROGRAMS) in ways:
            names = {"way": way, "grad": torch.autograd.grad, "leaves": leaves, "dout": dout}
            forward = Timer("way()", globals=names).blocked_autorange(min_run_time=0.2).median
            both = Timer("grad(way(), leaves, dout)", globals=names).blocked_autorange(min_run_time=0.2).median
            print(f"  {name:<16} forward {forward * 1e3:6.3f} ms  forward+backward {both * 1e3:6.3f} ms", flush=True)


if __name__ == "__main__":
    main()
