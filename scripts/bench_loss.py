"""Time the loss kernel's settings on this GPU, and check them against torch: python scripts/bench_loss.py [--rows 65536]"""

from __future__ import annotations

import argparse
import itertools

import torch
from bench_scan import time_ms
from torch.nn import functional as F

from flowhn.training.cross_entropy_triton import cross_entropy_and_gradient_

VOCABULARY = 65_536


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=65_536)
    rows = parser.parse_args().rows
    torch.manual_seed(0)
    logits = torch.randn(rows, VOCABULARY, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(VOCABULARY, (rows,), device="cuda")
    scale = torch.ones((), device="cuda")
    few = logits[:512].float().requires_grad_()
    exact = F.cross_entropy(few, labels[:512], reduction="none")
    exact.sum().backward()
    work = torch.empty_like(logits)
    copy = time_ms(lambda: work.copy_(logits), groups=5, calls=3)
    print(f"copy {copy:.3f} ms")
    for block, warps, group in itertools.product((4096, 8192, 16384), (8, 16, 32), (8, 16)):
        if block // (warps * 32) < group:
            continue

        def once(rows: int = rows, block: int = block, warps: int = warps, group: int = group) -> torch.Tensor:
            return cross_entropy_and_gradient_(
                work[:rows], labels[:rows], scale, -100, block=block, warps=warps, group=group
            )

        work.copy_(logits)
        loss = once(512)
        off = float((work[:512].float() - few.grad).norm() / few.grad.norm())
        worst = float((loss - exact.detach()).abs().max())
        work.copy_(logits)
        print(f"block {block:6d} warps {warps:2d} group {group:2d}: {time_ms(once, groups=5, calls=3):.3f} ms "
              f"loss off by {worst:.0e}, gradient by {off:.0e}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
