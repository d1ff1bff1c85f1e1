"""bfloat16 against float32: no model loses more than Llama does at its size, or than transformers' own version of it."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from flowhn.config import build_model, compose
from flowhn.models import CausalLM, from_transformers
from test_oracle_transformers import OURS, SMALL, build

CELLS = (
    "llama", "mamba1", "mamba2", "jamba", "shm", "hymba", "flowhn_no", "flowhn_ae", "flowhn_fa", "flowhn_fac",
)  # fmt: skip
# Multiples of Llama's difference. Mamba-2 and Hymba normalise what they add to the residual (gated norm; norms on both
# branches), so that more of their logits has passed through bfloat16: about 1.75 and 1.3 times Llama's on the CPU.
LIMIT = dict.fromkeys(CELLS, 1.1) | {"mamba2": 2.5, "hymba": 2.0}


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


def autocast_difference(model: torch.nn.Module, ids: torch.Tensor) -> tuple[float, float]:
    """Logits and all gradients under autocast against float32, as root mean squares."""
    results = []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = model(ids).float() if isinstance(model, CausalLM) else model(ids, use_cache=False).logits.float()
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        results.append((logits.detach(), torch.cat(gradients)))
    return tuple(relative(half, full) for full, half in zip(*results, strict=True))


@cache
def of_cell(cell: str) -> tuple[float, float]:
    name, _, split = cell.partition("_")
    torch.manual_seed(0)
    model = build_model(compose("train", [f"model={name}", f"split={split or 'fac'}", "size=tiny"]))
    ids = torch.randint(2048, (2, 130), generator=torch.Generator().manual_seed(0))
    return autocast_difference(model, ids)


@pytest.mark.parametrize("cell", CELLS)
def test_no_more_than_llama_at_the_same_size(cell, compare):
    for quantity, ours, llama in zip(("logits", "gradients"), of_cell(cell), of_cell("llama"), strict=True):
        compare(cell, "float32 (tiny, CPU)", f"{quantity} of bfloat16 autocast, relative", ours, 0.03)
        compare(
            cell, "Llama's own difference (tiny, CPU)", f"{quantity} of bfloat16, multiple", ours / llama, LIMIT[cell]
        )


@pytest.mark.parametrize("family", SMALL)
def test_no_more_than_transformers_own(family, compare):
    """The same weights in transformers lose as much; root mean square over five models, because one alone is noisy."""
    squares = torch.zeros(2, 2)
    for seed in range(5):
        theirs = build(family, SMALL[family], seed)
        ids = torch.randint(29, (2, 60), generator=torch.Generator().manual_seed(seed))
        both = [autocast_difference(model, ids) for model in (from_transformers(theirs), theirs)]
        squares += torch.tensor(both).square()
    oracle = f"the same of transformers {family.capitalize()}ForCausalLM"
    for quantity, (ours, other) in zip(("logits", "gradients"), squares.sqrt().T.tolist(), strict=True):
        compare(OURS[family], oracle, f"{quantity} of bfloat16, multiple", ours / other, 1.25)
