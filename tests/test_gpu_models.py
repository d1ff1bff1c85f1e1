"""On a GPU: whole models in bfloat16 on the kernels that training takes, against float32 on the plain paths."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from flowhn.config import build_model, compose, to_dict
from flowhn.models.kernels import kernels_used
from flowhn.training.lit_lm import LitLM
from flowhn.training.loss import token_loss, training_loss

pytestmark = pytest.mark.gpu
CELLS = (
    "llama", "mamba1", "mamba2", "jamba", "shm", "hymba", "flowhn_no", "flowhn_ae", "flowhn_fa", "flowhn_fac",
)  # fmt: skip
N_TOKENS = {"tiny": 257, "135m": 511}
# Largest difference to float32, relative to it, as root mean squares; rounding alone makes about 0.005 of it.
LIMIT = {"logits": 3e-2, "gradients": 5e-2, "loss": 2e-3}
# Mamba-2 and Hymba normalise what their branches add to the residual, so that more of the logits has been rounded.
OF_LLAMA = 2.5


def build(cell, size, *overrides):
    model, _, split = cell.partition("_")
    config = to_dict(compose("train", [f"model={model}", f"split={split or 'fac'}", f"size={size}", *overrides]))
    torch.manual_seed(0)
    with torch.device("cuda"):
        return build_model(config).cuda(), config


def tokens(config, size):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(config["vocab_size"], (2, N_TOKENS[size] + 1), generator=generator).cuda()
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def step(model, ids, labels, loss_of, *, autocast):
    """Logits, loss, and the gradient of every parameter in one vector."""
    head = model.lm_head
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        hidden = model.body(ids)
        with torch.no_grad():
            logits = head(hidden).float()
        loss = loss_of(hidden, head.weight, None, labels)
    loss.backward()
    return logits, loss.item(), torch.cat([parameter.grad.flatten().float() for parameter in model.parameters()])


@cache
def differences(cell, size, compiled=False):
    """Logits, loss and gradients of the bfloat16 step against the float32 one, and the kernels that ran."""
    plain, _ = build(cell, size, "kernels=torch")
    model, config = build(cell, size)
    model.load_state_dict(plain.state_dict())
    ids, labels = tokens(config, size)
    logits, loss, gradient = step(plain, ids, labels, token_loss, autocast=False)
    of_logits = token_loss
    if compiled:
        torch._dynamo.reset()
        lit = LitLM(net=model, optimizer=config["optimizer"], schedule={}, compile=True)
        lit.configure_model()  # as training compiles
        of_logits = lit._loss
    found = step(model, ids, labels, lambda *inputs: training_loss(*inputs, plain=of_logits), autocast=True)
    relative = lambda a, b: float((a - b).norm() / b.norm())  # noqa: E731
    seen = {"logits": relative(found[0], logits), "gradients": relative(found[2], gradient)}
    return seen | {"loss": abs(found[1] - loss) / loss}, kernels_used(model, "cuda")


def check(compare, cell, size, seen, used, how):
    kernels = ", ".join(f"{kind} {name}" for kind, name in used.items() if name)
    for quantity, difference in seen.items():
        subject = f"{cell} {size}, bfloat16 {how} ({kernels})"
        compare(subject, "float32 on plain torch", quantity, difference, LIMIT[quantity])


@pytest.mark.parametrize("size", N_TOKENS)
@pytest.mark.parametrize("cell", CELLS)
def test_bfloat16_on_kernels(cell, size, compare):
    seen, used = differences(cell, size)
    check(compare, cell, size, seen, used, "eager")
    llama, _ = differences("llama", size)
    for quantity in ("logits", "gradients"):
        ratio = seen[quantity] / llama[quantity]
        compare(
            f"{cell} {size}, bfloat16 eager", "Llama's own difference", f"{quantity}, as a multiple", ratio, OF_LLAMA
        )


@pytest.mark.parametrize("cell", ["flowhn_fac", "flowhn_no", "hymba"])
def test_compiled_bfloat16_on_kernels(cell, compare):
    """The path that flowhn-bench times: blocks compiled with static shapes, kernels as custom operators."""
    seen, used = differences(cell, "135m", compiled=True)
    check(compare, cell, "135m", seen, used, "compiled")
