"""The paper's published code as oracle: its weights, carried over by flowhn-convert, give its logits in all four modes.

:func:`published_logits` says that code's computation again, one token and one head at a time, on its own parameter names
(float64, no flowhn). Cases made with the code itself are checked too when their folder is named:
``FLOWHN_PUBLISHED_CASES=DIR`` with files ``NAME.config.json``, ``NAME.weights.safetensors`` and ``NAME.io.safetensors``.
"""

from __future__ import annotations

import copy
import json
import math
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import flowhn
from flowhn.convert import convert_published
from flowhn.models import CausalLM, TokenSplit

TOLERANCE = 1e-5  # of float32 logits
SUBJECT = {
    "A": "FlowHN No_Split (published mode A)", "B": "FlowHN AE_Split (published mode B)",
    "C": "FlowHN FA_Split (published mode C)", "D": "FlowHN published mode D",
}  # fmt: skip
RESTATED = "the published computation, restated token by token"
EXACT = 1e-10  # of float64 logits, where no rounding hides a difference
CASES = Path(os.environ.get("FLOWHN_PUBLISHED_CASES", "no such folder"))
CONFIG = {
    "mode": "A", "hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 17, "rms_norm_eps": 1e-4, "mamba_d_state": 5, "mamba_d_conv": 3,
    "mamba_expand": 3, "mamba_dt_rank": 2,
}  # fmt: skip


def routing(mode: str, n_tokens: int, layer: int) -> tuple[list[int], list[int]]:
    """Tokens of the attention branch and of the SSM branch, as in the published code."""
    tokens = list(range(n_tokens))
    if mode == "A":
        return tokens, tokens
    if mode == "B":
        first, second = tokens[: n_tokens // 2], tokens[n_tokens // 2 :]
        return (second, first) if layer % 2 == 0 else (first, second)
    if mode == "C":
        return tokens[: int(0.59 * n_tokens)], tokens[int(0.59 * n_tokens) :]
    n_attn = int(0.5 * n_tokens)
    if layer % 2 == 0:
        return tokens[n_tokens - n_attn :], tokens[: n_tokens - n_attn]
    return tokens[:n_attn], tokens[n_attn:]


def published_logits(weights: dict, config: dict, ids: torch.Tensor) -> torch.Tensor:
    """(B, T) -> (B, T, V), float64, one sequence after the other."""
    w, c = {name: tensor.double() for name, tensor in weights.items()}, config
    return torch.stack([_sequence(w, c, row) for row in ids])


def _sequence(w: dict, c: dict, ids: torch.Tensor) -> torch.Tensor:
    x = w["model.embed_tokens.weight"][ids]  # (T, D)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        to_attn, to_ssm = routing(c["mode"], len(ids), i)
        y_attn = _layer(w, c, f"{at}atten.", x[to_attn], "self_attn.", _attention)
        y_ssm = _layer(w, c, f"{at}mamba.", x[to_ssm], "mamba.", _mamba)
        if c["mode"] == "A":
            y = torch.cat([y_ssm, y_attn], dim=-1)
        else:
            y = torch.empty_like(x)
            y[to_attn], y[to_ssm] = y_attn, y_ssm
        x = x + y @ w[f"{at}branch_proj.weight"].T
        x = x + _rms(x, w[f"{at}pre_ff_layernorm.weight"], c) @ w[f"{at}final_proj.weight"].T
    return _rms(x, w["model.final_layernorm.weight"], c) @ w["lm_head.weight"].T


def _rms(x: torch.Tensor, scale: torch.Tensor, c: dict) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + c["rms_norm_eps"]).sqrt() * scale


def _layer(w: dict, c: dict, at: str, x: torch.Tensor, name: str, mixer) -> torch.Tensor:
    if not len(x):
        return x
    x = x + mixer(w, c, at + name, _rms(x, w[f"{at}input_layernorm.weight"], c))
    h, mlp = _rms(x, w[f"{at}pre_ff_layernorm.weight"], c), f"{at}feed_forward."
    gate, up = h @ w[f"{mlp}gate_proj.weight"].T, h @ w[f"{mlp}up_proj.weight"].T
    return x + (gate * torch.sigmoid(gate) * up) @ w[f"{mlp}down_proj.weight"].T


def _attention(w: dict, c: dict, at: str, x: torch.Tensor) -> torch.Tensor:
    heads, group = c["num_attention_heads"], c["num_attention_heads"] // c["num_key_value_heads"]
    d = c["hidden_size"] // heads
    q, k, v = (x @ w[f"{at}{name}_proj.weight"].T for name in "qkv")
    out = torch.zeros_like(q)
    for head in range(heads):
        mine, shared = slice(head * d, head * d + d), slice(head // group * d, head // group * d + d)
        for t in range(len(x)):
            weights = ((k[: t + 1, shared] @ q[t, mine]) / math.sqrt(d)).softmax(0)
            out[t, mine] = weights @ v[: t + 1, shared]
    return out @ w[f"{at}o_proj.weight"].T


def _mamba(w: dict, c: dict, at: str, x: torch.Tensor) -> torch.Tensor:
    inner, rank, n = c["mamba_expand"] * c["hidden_size"], c["mamba_dt_rank"], c["mamba_d_state"]
    u_raw, z = (x @ w[f"{at}in_proj.weight"].T).split(inner, dim=-1)
    taps, out = w[f"{at}conv1d.weight"][:, 0], []
    state = torch.zeros(inner, n, dtype=x.dtype)
    for t in range(len(x)):
        u = w[f"{at}conv1d.bias"].clone()
        for k in range(c["mamba_d_conv"]):
            if t - k >= 0:
                u = u + taps[:, -1 - k] * u_raw[t - k]
        u = u * torch.sigmoid(u)
        dt, B, C = (w[f"{at}x_proj.weight"] @ u).split([rank, n, n])
        dt, B, C = (_rms(v, w[f"{at}{name}_layernorm.weight"], c) for v, name in ((dt, "dt"), (B, "b"), (C, "c")))
        step = F.softplus(w[f"{at}dt_proj.weight"] @ dt + w[f"{at}dt_proj.bias"])[:, None]
        state = torch.exp(-step * w[f"{at}A_log"].exp()) * state + step * B * u[:, None]
        y = state @ C + w[f"{at}D"] * u
        out.append(y * z[t] * torch.sigmoid(z[t]))
    return torch.stack(out) @ w[f"{at}out_proj.weight"].T


def random_weights(c: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict of the published code for a config: its names and shapes, every value away from its default."""
    d, ff, inner = c["hidden_size"], c["intermediate_size"], c["mamba_expand"] * c["hidden_size"]
    rank, n, kv = c["mamba_dt_rank"], c["mamba_d_state"], d // c["num_attention_heads"] * c["num_key_value_heads"]
    mlp = {"feed_forward.gate_proj": (ff, d), "feed_forward.up_proj": (ff, d), "feed_forward.down_proj": (d, ff)}
    branch = mlp | {"input_layernorm": (d,), "pre_ff_layernorm": (d,)}
    attention = {"q_proj": (d, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, d)}
    mamba = {
        "in_proj": (2 * inner, d), "conv1d": (inner, 1, c["mamba_d_conv"]), "x_proj": (rank + 2 * n, inner),
        "dt_proj": (inner, rank), "out_proj": (d, inner), "dt_layernorm": (rank,), "b_layernorm": (n,), "c_layernorm": (n,),
    }  # fmt: skip
    block = {f"atten.{name}": shape for name, shape in branch.items()}
    block |= {f"mamba.{name}": shape for name, shape in branch.items()}
    block |= {f"atten.self_attn.{name}": shape for name, shape in attention.items()}
    block |= {f"mamba.mamba.{name}": shape for name, shape in mamba.items()}
    block |= {"branch_proj": (d, 2 * d if c["mode"] == "A" else d), "pre_ff_layernorm": (d,), "final_proj": (d, d)}
    shapes = {f"model.layers.{i}.{k}.weight": s for i in range(c["num_hidden_layers"]) for k, s in block.items()}
    shapes |= {"model.embed_tokens.weight": (c["vocab_size"], d), "lm_head.weight": (c["vocab_size"], d)}
    shapes |= {"model.final_layernorm.weight": (d,)}
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}.mamba.mamba."
        shapes |= {f"{at}{name}": (inner,) for name in ("D", "conv1d.bias", "dt_proj.bias")} | {
            f"{at}A_log": (inner, n)
        }
    generator = torch.Generator().manual_seed(seed)
    return {name: _draw(name, shape, generator) for name, shape in shapes.items()}


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return (0.0 if "bias" in name else 1.0) + 0.3 * noise
    return noise if "embed" in name else 0.5 * noise * shape[1] ** -0.5


@pytest.fixture(autouse=True, scope="module")
def few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def convert(folder: Path, config: dict, weights: dict[str, torch.Tensor]) -> CausalLM:
    save_file(weights, folder / "weights.safetensors")
    (folder / "published.json").write_text(json.dumps(config))
    convert_published(folder / "weights.safetensors", folder / "published.json", folder / "out")
    return flowhn.load(folder / "out")


def differences(model: CausalLM, weights: dict, config: dict, batch: int, n_tokens: int) -> tuple[float, float]:
    """Largest difference of the logits from the published ones, computed in float32 and in float64."""
    ids = torch.randint(config["vocab_size"], (batch, n_tokens), generator=torch.Generator().manual_seed(n_tokens))
    wanted = published_logits(weights, config, ids)
    with torch.no_grad():
        narrow, wide = model(ids), copy.deepcopy(model).double()(ids)
    return (narrow - wanted).abs().max().item(), (wide - wanted).abs().max().item()


@pytest.mark.parametrize("mode", "ABCD")
def test_logits_and_routing_are_those_of_the_published_code(tmp_path, mode, compare):
    config = CONFIG | {"mode": mode}
    weights = random_weights(config)
    model = convert(tmp_path, config, weights)
    for n_tokens in (1, 2, 3, 12, 13, 29):
        narrow, wide = differences(model, weights, config, 2, n_tokens)
        compare(SUBJECT[mode], RESTATED, "logits, float32", narrow, TOLERANCE)
        compare(SUBJECT[mode], RESTATED, "logits, float64", wide, EXACT)
    for n_tokens in [*range(1, 130), 1000, 1023, 1024]:
        for index, layer in enumerate(model.layers):
            to_attn, to_ssm = routing(mode, n_tokens, index)
            split: TokenSplit = layer.token_split(n_tokens)
            assert [t for start, stop in split.attn for t in range(start, stop)] == to_attn
            assert [t for start, stop in split.ssm for t in range(start, stop)] == to_ssm


@st.composite
def configs(draw) -> dict:
    kv_heads, d_head = draw(st.integers(1, 3)), draw(st.integers(2, 8))
    heads = kv_heads * draw(st.integers(1, 3))
    return {
        "mode": draw(st.sampled_from("ABCD")),
        "hidden_size": heads * d_head,
        "intermediate_size": draw(st.integers(1, 40)),
        "num_hidden_layers": draw(st.integers(1, 4)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": draw(st.integers(2, 60)),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        "mamba_d_state": draw(st.integers(2, 20)),  # a norm over one number is its sign
        "mamba_d_conv": draw(st.integers(1, 5)),
        "mamba_expand": draw(st.integers(1, 3)),
        "mamba_dt_rank": draw(st.integers(2, 5)),
    }


@pytest.mark.slow
def test_logits_are_those_of_the_published_code_over_random_configs(compare):
    @settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(config=configs(), batch=st.integers(1, 3), n_tokens=st.integers(1, 40), seed=st.integers(0, 10**6))
    def check(config, batch, n_tokens, seed):
        weights = random_weights(config, seed)
        with tempfile.TemporaryDirectory() as folder:
            model = convert(Path(folder), config, weights)
            narrow, wide = differences(model, weights, config, batch, n_tokens)
            compare(SUBJECT[config["mode"]], RESTATED, "logits, float32", narrow, TOLERANCE)
            compare(SUBJECT[config["mode"]], RESTATED, "logits, float64", wide, EXACT)

    check()


@pytest.mark.skipif(not CASES.is_dir(), reason="FLOWHN_PUBLISHED_CASES names no folder of cases")
def test_cases_made_with_the_published_code(tmp_path, compare):
    names = sorted(path.name.removesuffix(".config.json") for path in CASES.glob("*.config.json"))
    assert names
    for name in names:
        config = json.loads((CASES / f"{name}.config.json").read_text())
        weights, io = load_file(CASES / f"{name}.weights.safetensors"), load_file(CASES / f"{name}.io.safetensors")
        (tmp_path / name).mkdir()
        model = convert(tmp_path / name, config, weights)
        with torch.no_grad():
            largest = (model(io["input_ids"]) - io["logits"]).abs().max()
        compare(SUBJECT[config["mode"]], "the published code's own logits", "logits, float32", largest, TOLERANCE)
        restated = (published_logits(weights, config, io["input_ids"]) - io["logits"]).abs().max()
        compare(RESTATED, "the published code's own logits", "logits, float32", restated, TOLERANCE)
