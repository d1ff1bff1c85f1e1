"""Hymba's layer arithmetic against a slow version of it: one token, one head, one channel of the state at a time.

Nothing of flowhn computes in :func:`hymba_logits`; it reads a model's weights by name and its sizes from the case.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowhn.models import Attention, CausalLM, HymbaBlock, Mamba1


@dataclass(frozen=True)
class Case:
    """Sizes of a small Hymba; ``eps`` large enough to matter."""

    n_layers: int = 6
    kv_heads: int = 2
    group: int = 2
    d_head: int = 4
    n_meta: int = 3
    window: int = 4
    d_ff: int = 10
    d_state: int = 3
    d_conv: int = 3
    vocab_size: int = 13
    eps: float = 1e-2
    theta: float = 100.0

    @property
    def d_model(self) -> int:
        return self.kv_heads * self.group * self.d_head


def build(case: Case, seed: int = 0) -> CausalLM:
    """Our model of a case, every weight away from its default."""
    torch.manual_seed(seed)
    attention = partial(
        Attention, d_model=case.d_model, n_heads=case.kv_heads * case.group, n_kv_heads=case.kv_heads, rope=True,
        rope_theta=case.theta, sliding_window=case.window, n_meta_tokens=case.n_meta,
    )  # fmt: skip
    ssm = partial(Mamba1, d_model=case.d_model, d_state=case.d_state, d_conv=case.d_conv)
    block = partial(HymbaBlock, d_model=case.d_model, d_ff=case.d_ff, attention=attention, ssm=ssm, norm_eps=case.eps)
    model = CausalLM(
        vocab_size=case.vocab_size, d_model=case.d_model, n_layers=case.n_layers, pattern=["hymba"],
        blocks={"hymba": block}, n_meta_tokens=case.n_meta, norm_eps=case.eps,
    )  # fmt: skip
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embedding" in name or "meta" in name:
                weight.normal_()
            elif weight.ndim == 2 and "A_log" not in name:
                weight.normal_(std=0.5 * weight.shape[1] ** -0.5)
            else:
                weight.add_(0.3 * torch.randn_like(weight))
    return model


def hymba_logits(w: dict[str, Tensor], case: Case, ids: Tensor) -> Tensor:
    """(T,) -> (T, V) from the weights of a model, by explicit loops."""
    meta = [w["meta_tokens"][m] for m in range(case.n_meta)] if case.n_meta else []
    x = meta + [w["embedding.weight"][token] for token in ids.tolist()]
    keys_values = None
    for i in range(case.n_layers):
        at = f"layers.{i}."
        h = [_rms(v, w[f"{at}mixer_norm.weight"], case) for v in x]
        if i % 2 == 0:  # the first of a pair makes keys and values, the second reads them
            keys_values = _keys_values(w, case, f"{at}attention.", h)
        first_middle_last = (0, (case.n_layers - 1) // 2, case.n_layers - 1)
        window = len(x) if i in first_middle_last else case.window
        attended = _attention(w, case, f"{at}attention.", h, keys_values, window)
        scanned = _mamba(w, case, f"{at}ssm.", h)
        for t in range(len(x)):
            a = _rms(attended[t], w[f"{at}attention_norm.weight"], case)
            s = _rms(scanned[t], w[f"{at}ssm_norm.weight"], case)
            v = x[t] + 0.5 * a + 0.5 * s
            m = _rms(v, w[f"{at}mlp_norm.weight"], case)
            gate = w[f"{at}mlp.gate.weight"] @ m
            x[t] = v + w[f"{at}mlp.down.weight"] @ (gate * torch.sigmoid(gate) * (w[f"{at}mlp.up.weight"] @ m))
    return torch.stack([w["lm_head.weight"] @ _rms(v, w["norm.weight"], case) for v in x[case.n_meta :]])


def _rms(v: Tensor, scale: Tensor, case: Case) -> Tensor:
    return scale * v / torch.sqrt((v * v).sum() / len(v) + case.eps)


def _rotated(v: Tensor, position: int, case: Case) -> Tensor:
    half, out = case.d_head // 2, [None] * case.d_head
    for pair in range(half):
        angle = position * case.theta ** (-2 * pair / case.d_head)
        out[pair] = v[pair] * math.cos(angle) - v[pair + half] * math.sin(angle)
        out[pair + half] = v[pair] * math.sin(angle) + v[pair + half] * math.cos(angle)
    return torch.stack(out)


def _keys_values(w: dict, case: Case, at: str, h: list[Tensor]) -> list[list[tuple[Tensor, Tensor]]]:
    """[token][key-value head] -> key and value."""
    table = []
    for t, v in enumerate(h):
        keys, values = (w[f"{at}{name}_proj.weight"] @ v for name in "kv")
        places = [slice(g * case.d_head, (g + 1) * case.d_head) for g in range(case.kv_heads)]
        table.append([(_rotated(keys[place], t, case), values[place]) for place in places])
    return table


def _attention(w: dict, case: Case, at: str, h: list[Tensor], keys_values: list, window: int) -> list[Tensor]:
    out = []
    for t, v in enumerate(h):
        query, heads = w[f"{at}q_proj.weight"] @ v, []
        for head in range(case.kv_heads * case.group):
            q = _rotated(query[head * case.d_head : (head + 1) * case.d_head], t, case)
            seen = [keys_values[j][head // case.group] for j in range(t + 1) if j < case.n_meta or t - j < window]
            weights = torch.stack([torch.exp((q * k).sum() / math.sqrt(case.d_head)) for k, _ in seen])
            heads.append(sum(share * value for share, (_, value) in zip(weights / weights.sum(), seen, strict=True)))
        out.append(w[f"{at}o_proj.weight"] @ torch.cat(heads))
    return out


def _mamba(w: dict, case: Case, at: str, h: list[Tensor]) -> list[Tensor]:
    inner, n = 2 * case.d_model, case.d_state
    rank = math.ceil(case.d_model / 16)
    both = [w[f"{at}in_proj.weight"] @ v for v in h]
    state, out = torch.zeros(inner, n, dtype=h[0].dtype), []
    for t in range(len(h)):
        u = w[f"{at}conv1d.bias"]
        for back in range(min(t + 1, case.d_conv)):
            u = u + w[f"{at}conv1d.weight"][:, 0, case.d_conv - 1 - back] * both[t - back][:inner]
        u = u * torch.sigmoid(u)
        projected = w[f"{at}x_proj.weight"] @ u
        step = torch.log1p(torch.exp(w[f"{at}dt_proj.weight"] @ projected[:rank] + w[f"{at}dt_proj.bias"]))
        b, c = projected[rank : rank + n], projected[rank + n :]
        columns = [
            torch.exp(-step * torch.exp(w[f"{at}A_log"][:, s])) * state[:, s] + step * b[s] * u for s in range(n)
        ]
        state = torch.stack(columns, dim=1)
        y = sum(c[s] * columns[s] for s in range(n)) + w[f"{at}D"] * u
        z = both[t][inner:]
        out.append(w[f"{at}out_proj.weight"] @ (y * z * torch.sigmoid(z)))
    return out


@pytest.fixture(autouse=True, scope="module")
def few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def differences(case: Case, batch: int, n_tokens: int, seed: int = 0) -> tuple[float, float, float]:
    """Largest difference of the logits in float32 and in float64, and of the float64 gradients, each relative to the
    largest of its tensor.
    """
    narrow = build(case, seed)
    wide = copy.deepcopy(narrow).double()
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(case.vocab_size, (batch, n_tokens), generator=generator)
    leaves = {name: p.detach().clone().requires_grad_() for name, p in wide.named_parameters()}
    wanted, got = torch.stack([hymba_logits(leaves, case, row) for row in ids]), wide(ids)
    probe = torch.randn(wanted.shape, generator=generator, dtype=wanted.dtype)
    (wanted * probe).sum().backward()
    (got * probe).sum().backward()
    gradients = max(
        ((p.grad - leaves[name].grad).abs().max() / leaves[name].grad.abs().max().clamp(min=1e-6)).item()
        for name, p in wide.named_parameters()
    )
    with torch.no_grad():
        return (narrow(ids) - wanted).abs().max().item(), (got - wanted).abs().max().item(), gradients


def check(compare, case: Case, batch: int, n_tokens: int, seed: int = 0) -> None:
    narrow, wide, gradients = differences(case, batch, n_tokens, seed)
    oracle = "explicit loops over tokens, heads and states"
    compare("hymba", oracle, "logits, float32", narrow, 1e-4)
    compare("hymba", oracle, "logits, float64", wide, 1e-10)
    compare("hymba", oracle, "gradients, float64, relative", gradients, 1e-8)


@pytest.mark.parametrize("n_tokens", [1, 4, 11])
def test_logits_and_gradients_are_those_of_the_explicit_loops(n_tokens, compare):
    check(compare, Case(), 2, n_tokens)


@pytest.mark.parametrize(
    "case",
    [
        Case(n_layers=5, n_meta=0, window=1),
        Case(n_layers=4, n_meta=5, window=2),
        Case(n_layers=1, kv_heads=1, group=1, n_meta=1, window=1),
        Case(n_layers=7, kv_heads=3, group=1, window=3),
    ],
)
def test_other_windows_meta_tokens_depths_and_heads(case, compare):
    check(compare, case, 1, 9)


def test_the_oracle_tells_windows_meta_tokens_and_sharing_apart():
    """Each part matters at these sizes: a model without it is far from the loops with it."""
    case, ids = Case(), torch.arange(11) % 13
    model = build(case).double()
    weights = dict(model.named_parameters())
    with torch.no_grad():
        wanted = hymba_logits(weights, case, ids)
        wider = hymba_logits(weights, Case(window=100), ids)
        unmoved = hymba_logits(weights | {"meta_tokens": 0 * weights["meta_tokens"]}, case, ids)
        model.layers[1].attention_norm.weight.mul_(1.5)
        scaled = model(ids[None])[0]
    for other in (wider, unmoved, scaled):
        assert (other - wanted).abs().max() > 1e-3


@pytest.mark.slow
def test_logits_and_gradients_are_those_of_the_explicit_loops_over_random_sizes(compare):
    sizes = st.builds(
        Case,
        n_layers=st.integers(1, 8), kv_heads=st.integers(1, 3), group=st.integers(1, 3), d_head=st.sampled_from([2, 4, 6]),
        n_meta=st.integers(0, 5), window=st.integers(1, 12), d_ff=st.integers(1, 20), d_state=st.integers(1, 6),
        d_conv=st.integers(1, 5), eps=st.sampled_from([1e-6, 1e-2]), theta=st.sampled_from([100.0, 10000.0]),
    )  # fmt: skip

    @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=sizes, batch=st.integers(1, 2), n_tokens=st.integers(1, 14), seed=st.integers(0, 10**6))
    def over_sizes(case, batch, n_tokens, seed):
        check(compare, case, batch, n_tokens, seed)

    over_sizes()
