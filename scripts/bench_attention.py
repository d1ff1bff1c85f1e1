"""Time attention of the last n of m tokens to all m (split.keys=all) on this GPU: python scripts/bench_attention.py

What FAC_Split's attention branch asks with all keys, in three ways: SDPA's causal square with queries of zeros for the tokens
that do not ask, the same on torch's flash attention, and flash attention of the asking tokens alone (causal_tail, which training
runs). With own keys, SDPA sees n tokens: the cost that all keys is compared with. Forward and backward, bf16.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer

from flowhn.models.mixers.attention import causal_tail

SHAPES = [
    "128,32,8,24,542,1024",
    "128,32,8,24,482,482",
    "128,32,8,24,60,1024",
]  # 135m: the first block's range, the second's two


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="batch, heads, kv heads, d_head, n, m")
    for shape in parser.parse_args().shapes:
        batch, heads, kv_heads, d_head, n, m = map(int, shape.split(","))

        def draw(heads: int, tokens: int, batch: int = batch, d_head: int = d_head) -> Tensor:
            rows = torch.randn(batch, tokens, heads, d_head, device="cuda", dtype=torch.bfloat16)
            return rows.transpose(1, 2).requires_grad_()

        q, k, v = draw(heads, n), draw(kv_heads, m), draw(kv_heads, m)
        dy = torch.randn_like(q)

        def square(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            padded = F.pad(q, (0, 0, k.shape[2] - q.shape[2], 0))
            return F.scaled_dot_product_attention(padded, k, v, is_causal=True, enable_gqa=True)[:, :, -q.shape[2] :]

        def flash_square() -> Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                return square()

        def own(q: Tensor = q, k: Tensor = k, v: Tensor = v, n: int = n) -> Tensor:
            return F.scaled_dot_product_attention(q, k[:, :, -n:], v[:, :, -n:], is_causal=True, enable_gqa=True)

        def tail(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return causal_tail(q, k, v)

        print(f"shape ({shape})", flush=True)
        reference = square().float()
        ways: dict[str, Callable[[], Tensor]] = {
            "own keys": own,
            "square": square,
            "flash square": flash_square,
            "tail": tail,
        }
        for name, way in ways.items():
            try:
                off = (
                    ""
                    if name == "own keys"
                    else f"  off by {(way().float() - reference).norm() / reference.norm():.1e}"
                )
                forward = Timer("way()", globals={"way": way}).blocked_autorange(min_run_time=0.3).median
                both = (
                    Timer("way().backward(dy)", globals={"way": way, "dy": dy})
                    .blocked_autorange(min_run_time=0.3)
                    .median
                )
            except RuntimeError as error:  # a kernel that this GPU lacks is a finding; the others are still timed
                print(f"  {name}: {error!s:.200}", flush=True)
                continue
            print(
                f"  {name:<13} forward {forward * 1e3:7.3f} ms  forward+backward {both * 1e3:7.3f} ms{off}", flush=True
            )


if __name__ == "__main__":
    main()
