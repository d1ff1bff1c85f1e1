"""Time Mamba-2's gated RMSNorm on this GPU, forward and backward in bf16: python scripts/bench_norm.py [--shapes 128,1024,1536]

What torch.compile makes of the plain module, and the package's Triton kernels by channels of a thread, programs of a processor and
a cap of the backward's registers.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import torch
from torch.utils.benchmark import Timer

from flowhn.models.mixers import gated_norm_triton
from flowhn.models.norms import GatedRMSNorm

SHAPES = ["128,1024,1536", "64,456,4096"]  # 135m's Mamba-2; 1b's branch of FAC_Split: sequences, tokens, channels


def milliseconds(way: Callable[[], object]) -> float:
    return Timer("way()", globals={"way": way}).blocked_autorange(min_run_time=0.2).median * 1e3


def both_ways(shape: str) -> None:
    """Time one shape, and print a line for each way."""
    n_batch, n_tokens, width = map(int, shape.split(","))
    draw = lambda width: torch.randn(n_batch, n_tokens, width, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    y, z, dout = draw(width), draw(2 * width + 320)[..., :width], draw(width)
    norm = GatedRMSNorm(width).cuda()
    torch._dynamo.reset()
    compiled = torch.compile(norm, dynamic=False)  # as training compiles
    leaves = [y.requires_grad_(), z.requires_grad_(), norm.weight]
    forward = milliseconds(lambda: compiled(y, z))
    both = milliseconds(lambda: torch.autograd.grad(compiled(y, z), leaves, dout))
    print(f"shape ({shape})\n  compiled      forward {forward:6.3f} ms  forward+backward {both:6.3f} ms", flush=True)
    y_data, z_data, weight = (leaf.detach() for leaf in leaves)
    _, scales = gated_norm_triton.gated_norm_forward(y_data, z_data, weight, 1e-5, 1)
    for channels, programs, registers in itertools.product((8, 16), (8, 16), (0, 96, 128)):
        gated_norm_triton.CHANNELS, gated_norm_triton.PROGRAMS = channels, programs
        gated_norm_triton.REGISTERS = registers
        forward = milliseconds(lambda: gated_norm_triton.gated_norm_forward(y_data, z_data, weight, 1e-5, 1))
        backward = milliseconds(lambda: gated_norm_triton.gated_norm_backward(dout, y_data, z_data, weight, scales, 1))
        name = f"triton {channels:2},{programs:2},{registers:3}"
        print(f"  {name}  forward {forward:6.3f} ms  forward+backward {forward + backward:6.3f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    for shape in parser.parse_args().shapes:
        both_ways(shape)


if __name__ == "__main__":
    main()
