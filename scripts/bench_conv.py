"""Time the convolution kernels' settings on this GPU: python scripts/bench_conv.py [--shape 64,457,4352,8512]"""

from __future__ import annotations

import argparse
import itertools

import torch
from bench_scan import time_ms

from flowhn.models.mixers.conv_triton import conv_silu_backward, conv_silu_forward

SETTINGS = ((64, 1), (128, 1), (128, 2), (256, 2), (256, 4), (512, 4))  # channels and warps of a program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--shape", default="64,457,4352,8512", help="batch, tokens, channels, and those of the tensor they are part of"
    )
    n_batch, n_tokens, n_channels, width = map(int, parser.parse_args().shape.split(","))
    torch.manual_seed(0)
    x = torch.randn(n_batch, n_tokens, width, device="cuda", dtype=torch.bfloat16)[..., :n_channels]
    dy = torch.randn(n_batch, n_tokens, n_channels, device="cuda", dtype=torch.bfloat16)
    weight, bias = torch.randn(n_channels, 4, device="cuda"), torch.randn(n_channels, device="cuda")
    work = torch.empty_like(dy)
    print(f"copy {time_ms(lambda: work.copy_(dy), groups=5, calls=3):.3f} ms")
    for segment, (block, warps) in itertools.product((32, 64, 128), SETTINGS):
        options = {"segment": segment, "block": block, "warps": warps}

        def forward(options: dict[str, int] = options) -> torch.Tensor:
            return conv_silu_forward(x, weight, bias, **options)

        def backward(options: dict[str, int] = options) -> tuple[torch.Tensor, ...]:
            return conv_silu_backward(dy, x, weight, bias, **options)

        print(f"segment {segment:3d} channels {block:3d} warps {warps}: forward {time_ms(forward, groups=5, calls=3):.3f} ms, "
              f"backward {time_ms(backward, groups=5, calls=3):.3f} ms", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
