"""On a GPU: whole models in bfloat16 on the kernels that training takes, against float32 on the plain paths.

The timed cells are those of configs/bench/figure4.yaml, built by what ``flowhn-bench`` builds them with: compiled blocks,
kernels as custom operators, the fused loss, clipping and fused AdamW.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from flowhn import bench_cell
from flowhn.bench import plan
from flowhn.config import build_model, compose, to_dict
from flowhn.models.kernels import kernels_used
from flowhn.training.hardware import resolve_hardware
from flowhn.training.loss import token_loss, training_loss
from flowhn.training.optim import parameter_groups
from test_gpu_mixers import few_tiles, relative

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
CASE = Path(__file__).resolve().parents[1] / "configs" / "bench" / "figure4.yaml"
TIMED = [name for name, entry in yaml.safe_load(CASE.read_text())["cells"].items() if isinstance(entry, list)]
# The paper's 135m with half its vocabulary and four layers at most, which is a whole period of every pattern.
SMALLER = "'vocab_size=32768'"
MAX_LAYERS = 4
# No multiple of a tile; two chunks and a part of the SSD; whole, the sequence is cut by the selective scan as at 1b, a
# branch's share of it is not, as at 135m; longer than Hymba's window.
SHAPE = (2, 531)
# What bfloat16 alone makes of a case is measured: the same step on plain torch under autocast. The timed one rounds in
# other places but as often, so that it may differ from float32 by half as much again, and a single parameter (few
# numbers, some of them sums that cancel) by four times as much: A_log's gradient made 1.1 times as large is ten times.
FACTOR, FACTOR_OF_ONE = 1.5, 4.0
# A mean over tokens, which may agree by chance, so that no multiple is asked: six times the largest of 23 cells on an H200.
LOSS = 2e-4
EAGER = (
    "llama", "mamba1", "mamba2", "jamba", "shm", "hymba", "flowhn_no", "flowhn_ae", "flowhn_fa", "flowhn_fac",
)  # fmt: skip
# Largest difference to float32, relative to it, as root mean squares; rounding alone makes about 0.005 of it.
LIMIT = {"logits": 3e-2, "gradients": 5e-2, "loss": 2e-3}
# Mamba-2 and Hymba normalise what their branches add to the residual, so that more of the logits has been rounded.
OF_LLAMA = 2.5
each_timed = pytest.mark.parametrize("cell", TIMED)


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Products and convolutions of float32 in TF32, as flowhn-bench's optimised protocol has them, or not."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def small(overrides: list[str]) -> dict:
    config = to_dict(compose("train", overrides))
    config["model"]["n_layers"] = min(config["model"]["n_layers"], MAX_LAYERS)
    return config


def taken(module: nn.Module, optimizer: torch.optim.Optimizer, before: list[Tensor]) -> dict[str, list[Tensor]]:
    """What a step left: AdamW's first moment (the clipped gradients, times 0.1) and the change of every weight."""
    parameters = list(module.parameters())
    moments = [optimizer.state[parameter]["exp_avg"].clone() for parameter in parameters]
    return {
        "clipped gradients": moments,
        "change of the weights": [(p.detach() - w) for p, w in zip(parameters, before, strict=True)],
    }


def plain_step(model: nn.Module, config: dict, data: tuple[Tensor, Tensor], *, autocast: bool) -> dict:
    """One step without compilation, kernels, fusion or the bench's code: the loss, and lists with a tensor per parameter."""
    parameters = list(model.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    with tf32(False):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            loss = token_loss(model.body(data[0]), model.lm_head.weight, None, data[1])
        loss.backward()
    gradients = [parameter.grad.clone() for parameter in parameters]
    norm = sum(gradient.double().square().sum() for gradient in gradients).sqrt()
    for parameter in parameters:
        parameter.grad *= min(1.0, 1.0 / norm.item())
    options = {key: value for key, value in config["optimizer"].items() if key not in ("name", "weight_decay")}
    groups = parameter_groups(model, config["optimizer"]["weight_decay"])
    optimizer = torch.optim.AdamW(groups, **options, foreach=False, fused=False)
    optimizer.step()
    return {"loss": loss.item(), "norm": norm.item(), "gradients": gradients, **taken(model, optimizer, before)}


def timed_step(step: bench_cell.Step, data: tuple[Tensor, Tensor]) -> dict:
    """As :func:`plain_step`, by the step that is timed; its loss and gradients, which it keeps to itself, are made before."""
    parameters = list(step.module.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    with tf32(True):
        with torch.autocast(DEVICE, step.autocast, enabled=step.autocast is not None):
            loss = step.loss(*data)
        loss.backward()
        gradients = [parameter.grad.clone() for parameter in parameters]
        step.optimizer.zero_grad(set_to_none=True)
        step(*data)
    return {"loss": loss.item(), "gradients": gradients, **taken(step.module, step.optimizer, before)}


def whole(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Root mean square of the difference of all parameters together, over that of the reference."""
    squares = [((a.double() - b.double()).square().sum(), b.double().square().sum()) for a, b in zip(found, wanted)]  # noqa: B905
    return float((sum(s for s, _ in squares) / sum(s for _, s in squares)).sqrt())


def worst_of_one(found: list[Tensor], rounded: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest difference of one parameter's gradient as a multiple of plain bfloat16's, or of its mean where that is more."""
    floor = whole(rounded, wanted)
    triples = zip(found, rounded, wanted, strict=True)
    return max(relative(a, w) / max(relative(b, w), floor) for a, b, w in triples)


@cache
def timed(cell: str) -> dict:
    """Of the step that flowhn-bench times, and of plain bfloat16, against plain float32; numbers alone are kept."""
    words = ["bench=figure4", "sizes=[135m]", f"models=[{cell}]", f"overrides=[{SMALLER}]"]
    (spec,) = plan(to_dict(compose("bench", words)))
    config, reference = small(spec["overrides"]), small([*spec["overrides"], "kernels=torch"])
    hardware = resolve_hardware({**config, "precision": spec["precision"], "compile": spec["compile"]})
    assert (hardware.precision, hardware.compile) == ("bf16-mixed", True)
    torch._dynamo.reset()  # as flowhn-bench; what other tests compiled counts towards torch's recompile limit
    step = bench_cell._build({**spec, "precision": hardware.precision}, config, hardware.device, hardware.compile)
    assert all(block._compiled_call_impl is not None for block in step.module.layers)
    weights = {name: tensor.clone() for name, tensor in step.module.state_dict().items()}
    data = bench_cell._tokens({**spec, "seq_len": SHAPE[1]}, SHAPE[0], config["vocab_size"], hardware.device)
    used = kernels_used(step.module, DEVICE)
    found = timed_step(step, data)
    del step
    gc.collect()

    def plain(autocast: bool) -> dict:
        with torch.device(DEVICE):
            model = build_model(reference)
        model.to(DEVICE).train().load_state_dict(weights)
        return plain_step(model, config, data, autocast=autocast)

    wanted, rounded = plain(False), plain(True)
    seen = {"used": used, "norm": wanted["norm"], "loss": abs(found["loss"] - wanted["loss"]) / wanted["loss"]}
    for quantity in ("gradients", "clipped gradients", "change of the weights"):
        seen[quantity] = [whole(result[quantity], wanted[quantity]) for result in (found, rounded)]
    seen["one"] = worst_of_one(found["gradients"], rounded["gradients"], wanted["gradients"])
    return seen


def subject_of(cell: str, used: dict, how: str, size: str = "135m") -> str:
    kernels = ", ".join(f"{kind} {name}" for kind, name in used.items() if name)
    return f"{cell} {size}, bfloat16 {how} ({kernels})"


def compare_with_rounding(compare, subject: str, quantity: str, both: list[float]) -> None:
    """The limit is a multiple of what plain torch in bfloat16 differs by."""
    found, rounded = both
    compare(subject, "float32 on plain torch", quantity, found, float(f"{FACTOR * rounded:.3g}"))


@each_timed
def test_timed_loss_and_gradients(cell, compare):
    """Of all parameters together, and of each."""
    seen = timed(cell)
    subject = subject_of(cell, seen["used"], "as timed")
    compare(subject, "float32 on plain torch", "loss", seen["loss"], LOSS)
    compare_with_rounding(compare, subject, "gradients", seen["gradients"])
    oracle = "plain torch in bfloat16, both against float32"
    compare(subject, oracle, "gradient of the worst parameter, as a multiple", seen["one"], FACTOR_OF_ONE)


@each_timed
def test_timed_step(cell, compare):
    """Clipping and AdamW. The change alone would not show a wrong scale: AdamW's first step hardly depends on it."""
    seen = timed(cell)
    assert seen["norm"] > 1.05  # else nothing is clipped
    subject = subject_of(cell, seen["used"], "as timed, whole step")
    for quantity in ("clipped gradients", "change of the weights"):
        compare_with_rounding(compare, subject, quantity, seen[quantity])


@cache
def eager(cell: str) -> dict:
    """Logits, loss and gradients of the bfloat16 step of a tiny model against the float32 one, and the kernels that ran."""
    name, _, split = cell.partition("_")
    words = [f"model={name}", f"split={split or 'fac'}", "size=tiny"]
    generator = torch.Generator().manual_seed(1)
    results, weights = [], None
    for plain in (True, False):
        config = to_dict(compose("train", [*words, *(["kernels=torch"] if plain else [])]))
        torch.manual_seed(0)
        model = build_model(config).to(DEVICE)
        if weights is None:
            weights = model.state_dict()
            ids = torch.randint(config["vocab_size"], (2, 258), generator=generator).to(DEVICE)
        model.load_state_dict(weights)
        with tf32(not plain), torch.autocast(DEVICE, torch.bfloat16, enabled=not plain):
            hidden = model.body(ids[:, :-1].contiguous())
            with torch.no_grad():
                logits = model.lm_head(hidden).float()
            loss_of = token_loss if plain else training_loss
            loss = loss_of(hidden, model.lm_head.weight, None, ids[:, 1:].contiguous())
        loss.backward()
        results.append((logits, loss.item(), [parameter.grad for parameter in model.parameters()]))
    wanted, found = results
    seen = {"logits": relative(found[0], wanted[0]), "gradients": whole(found[2], wanted[2])}
    return seen | {"loss": abs(found[1] - wanted[1]) / wanted[1], "used": kernels_used(model, DEVICE)}


@pytest.mark.parametrize("cell", EAGER)
def test_bfloat16_on_kernels(cell, compare):
    """Without compilation, which the timed cells have."""
    with few_tiles():
        seen, llama = eager(cell), eager("llama")
    subject = subject_of(cell, seen["used"], "eager", "tiny")
    for quantity, limit in LIMIT.items():
        compare(subject, "float32 on plain torch", quantity, seen[quantity], limit)
    for quantity in ("logits", "gradients"):
        ratio, oracle = seen[quantity] / llama[quantity], "Llama's own difference"
        compare(f"{cell} tiny, bfloat16 eager", oracle, f"{quantity}, as a multiple", ratio, OF_LLAMA)
