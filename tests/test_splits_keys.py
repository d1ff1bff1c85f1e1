"""``split.keys=all``: attention's tokens see the keys and values of all earlier tokens, whichever branch these are in."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode

from causality import assert_causal
from flowhn.errors import UserError
from flowhn.models.blocks import ParallelBlock
from flowhn.models.fusions import ConcatProj
from flowhn.models.lm import CausalLM
from flowhn.models.mixers import Attention, Mamba1, attention
from flowhn.models.splits import (
    AlternatingEqualSplit,
    FlopAwareCirculatingSplit,
    FlopAwareSplit,
    PublishedModeDSplit,
    Split,
)
from flowhn.models.splits.base import gather, spread

SPLITS = (AlternatingEqualSplit, FlopAwareSplit, FlopAwareCirculatingSplit, PublishedModeDSplit)
WINDOWS = (None, 5)


def block(split: Split, *, layer_idx: int = 0, rope: bool = False, n_layers: int = 3) -> ParallelBlock:
    torch.manual_seed(layer_idx)
    return ParallelBlock(
        d_model=16,
        d_ff=24,
        attention=lambda: Attention(d_model=16, n_heads=4, n_kv_heads=2, rope=rope),
        ssm=lambda: Mamba1(d_model=16, d_state=4),
        split=split,
        fusion=ConcatProj,
        layer_idx=layer_idx,
        n_layers=n_layers,
    )


def model(split: Split, *, rope: bool = False) -> CausalLM:
    torch.manual_seed(0)

    def build(*, layer_idx: int, n_layers: int) -> ParallelBlock:
        return block(split, layer_idx=layer_idx, n_layers=n_layers, rope=rope)

    return CausalLM(vocab_size=31, d_model=16, n_layers=4, pattern=["p"], blocks={"p": build}).eval()


def masked_attention(layer: Attention, x: torch.Tensor, asking: list[int]) -> torch.Tensor:
    """Attention of the asking tokens over all tokens of x, by an explicit mask and softmax; (1, n, D)."""
    q = layer._rotate(layer.q_proj(x).unflatten(-1, (layer.n_heads, layer.d_head)).transpose(1, 2), None)
    k, v = layer.project_kv(x)
    group = layer.n_heads // layer.n_kv_heads
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    q = q[:, :, asking]
    scores = q @ k.transpose(2, 3) / math.sqrt(layer.d_head)
    visible = torch.arange(x.shape[1])[None, :] <= torch.tensor(asking, dtype=torch.long)[:, None]
    y = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1) @ v
    return layer.o_proj(y.transpose(1, 2).flatten(2))


def tokens(ranges) -> list[int]:
    return [t for start, stop in ranges for t in range(start, stop)]


@pytest.mark.parametrize("tails", [False, True])  # True: as on CUDA, where only the asking tokens cost anything
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("cls", SPLITS)
def test_equals_attention_with_an_explicit_mask(cls, window, rope, tails, monkeypatch):
    monkeypatch.setattr(Attention, "_takes_tails", lambda own, q: tails)
    for layer_idx in range(3):
        own = block(cls(keys="all", window=window), layer_idx=layer_idx, rope=rope).double()
        x = torch.randn(1, 13, 16, dtype=torch.float64)
        split = own.token_split(13)
        branch, asking = own.attention, tokens(split.attn)
        y_attn = gather(x, split.attn) + masked_attention(branch.mixer, branch.mixer_norm(x), asking)
        y_attn = y_attn + branch.mlp(branch.mlp_norm(y_attn))
        y_ssm, _ = own.ssm(split.gather_ssm(x))
        expected = x + own.fusion(y_attn, y_ssm, split)
        expected = expected + own.proj(own.norm(expected))
        assert torch.allclose(own(x)[0], expected, atol=1e-10)


@pytest.mark.parametrize("cls", SPLITS)
def test_gradients_reach_keys_of_the_other_branch_and_are_right(cls):
    own = block(cls(keys="all"), layer_idx=1).double()
    x = torch.randn(1, 7, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: own(x)[0], (x,), atol=1e-6)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("cls", SPLITS)
def test_does_not_look_ahead(cls, window):
    for layer_idx in range(3):
        for n_tokens in (1, 2, 7, 12):
            assert_causal(block(cls(keys="all", window=window), layer_idx=layer_idx), n_tokens)


def test_tokens_of_attention_see_those_of_the_ssm_at_once():
    """With a fixed cut and own keys the last token never sees the first; with all keys it does in the first block."""
    x = torch.randn(1, 12, 16)
    changed = x.clone()
    changed[:, 0] += 1.0
    for keys, sees in (("own", False), ("all", True)):
        own = block(FlopAwareSplit(keys=keys))
        with torch.no_grad():
            assert torch.allclose(own(x)[0][:, -1], own(changed)[0][:, -1], atol=1e-6) is not sees


@pytest.mark.parametrize("cls", SPLITS)
def test_no_dense_mask_is_made(cls, monkeypatch):
    seen = []
    real = torch.nn.functional.scaled_dot_product_attention

    def record(q, k, v, attn_mask=None, **options):
        seen.append((attn_mask, options["is_causal"], q.shape[2] == k.shape[2]))
        return real(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr("flowhn.models.mixers.attention.F.scaled_dot_product_attention", record)
    block(cls(keys="all"), layer_idx=1)(torch.randn(1, 9, 16))
    assert seen == [(None, True, True)]  # one call, a causal square


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("cls", SPLITS)
def test_decoding_with_a_cache_equals_the_whole_forward(cls, rope):
    net = model(cls(keys="all", window=6), rope=rope)
    ids = torch.randint(31, (2, 17))
    with torch.no_grad():
        expected = net(ids)
        for cuts in ((17,), (5, 6, 17), tuple(range(1, 18)), (8, 9, 17)):
            cache, start, pieces = net.new_cache(), 0, []
            for stop in cuts:
                pieces.append(net.extend(ids[:, start:stop], cache))
                start = stop
            assert torch.allclose(torch.cat(pieces, dim=1), expected, atol=1e-5)


def test_a_proportional_split_is_decoded_with_its_routing_frozen():
    net = model(FlopAwareCirculatingSplit(keys="all"))
    ids = torch.randint(31, (1, 12))
    with torch.no_grad():
        cache = net.new_cache(window=12)
        pieces = [net.extend(ids[:, t : t + 1], cache) for t in range(12)]
        assert torch.allclose(torch.cat(pieces, dim=1), net(ids), atol=1e-5)


@pytest.mark.parametrize("cls", SPLITS)
def test_flops_count_the_keys_of_all_and_the_pairs_in_sight(cls):
    for layer_idx in range(4):
        own = block(cls(keys="all"), layer_idx=layer_idx)
        split = own.token_split(40)
        asking = tokens(split.attn)
        layer = own.attention.mixer
        last = split.attn[-1][1]
        linear = 2 * 16 * 16 * 2 * len(asking) + 2 * 2 * 16 * (2 * 4) * last  # q and o of those that ask; k and v
        pairs = sum(t + 0.5 for t in asking)  # areas: a causal square counted half
        attention = linear + 4 * 16 * pairs
        assert layer.flops(len(asking), queries=split.attn) == attention
        rest = own.attention.mlp.flops(len(asking)) + own.ssm.flops(split.n_ssm) + own.fusion.flops(40) + 2 * 256 * 40
        assert own.flops(40) == attention + rest
        assert own.flops(40) > 0


def test_decoding_costs_are_those_of_the_token_s_branch_and_its_keys():
    own = block(FlopAwareSplit(keys="all", ratio=0.5, window=10))  # SSM first: tokens 0 to 4
    kv, mlp = 2 * 2 * 16 * 8, own.attention.mlp.flops(1)
    shared = own.fusion.flops(1) + 2 * 256
    assert own.step_flops(0) == shared + own.ssm.step_flops(0) + kv
    assert own.step_flops(7) == shared + 2 * 16 * 16 * 2 + kv + 4 * 16 * 8 + mlp


def test_flop_aware_cut_balances_what_is_computed():
    """The keys of all tokens belong to the attention branch's work, so it gets fewer tokens than with its own alone."""
    with torch.device("meta"):
        counts = {}
        for keys in ("own", "all"):
            paper = ParallelBlock(
                d_model=768,
                d_ff=2048,
                attention=lambda: Attention(d_model=768, n_heads=32, n_kv_heads=8),
                ssm=lambda: Mamba1(d_model=768, bcdt_rms_norm=True),
                split=FlopAwareCirculatingSplit(keys=keys),
                fusion=ConcatProj,
            )
            split = paper.token_split(1024)
            counts[keys] = split.n_attn
            a = paper.attention.flops(split.n_attn, queries=split.attn if keys == "all" else None)
            assert abs(a - paper.ssm.flops(split.n_ssm)) < 2 * paper.ssm.flops(1)
    assert counts["own"] == 577
    assert 500 < counts["all"] < 577


def test_gather_and_spread_are_inverse():
    x = torch.randn(2, 9, 3)
    for ranges in ((), ((0, 9),), ((0, 2),), ((7, 9),), ((1, 3), (5, 9)), ((0, 4), (6, 8))):
        full = spread(gather(x, ranges), ranges, 9)
        asked = tokens(ranges)
        assert torch.equal(full[:, asked], x[:, asked])
        assert not full[:, [t for t in range(9) if t not in asked]].any()
        assert full.shape == x.shape


def test_compiles_in_one_graph_and_gives_the_same():
    own = block(FlopAwareCirculatingSplit(keys="all"), layer_idx=1, rope=True)
    x = torch.randn(2, 12, 16)
    compiled = torch.compile(own, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x)[0], own(x)[0], atol=1e-6)


def test_flash_attention_is_asked_only_for_what_it_takes(monkeypatch):
    monkeypatch.setattr(attention, "flash_sdpa_usable", lambda: True)
    assert not attention.flash_takes(torch.empty(1, 4, 9, 24, dtype=torch.bfloat16))  # on a CPU
    with FakeTensorMode():
        for dtype, d_head, takes in (
            (torch.bfloat16, 24, True), (torch.float16, 192, True), (torch.float32, 24, False), (torch.bfloat16, 20, False),
            (torch.bfloat16, 200, False),
        ):  # fmt: skip
            assert attention.flash_takes(torch.empty(1, 4, 9, d_head, dtype=dtype, device="cuda")) is takes


def test_a_causal_tail_sees_the_last_key_from_its_last_query():
    q, k, v = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    whole = attention.causal_tail(torch.cat([torch.randn(1, 4, 4, 8), q], dim=2), k, v)
    assert torch.allclose(attention.causal_tail(q, k, v), whole[:, :, 4:], atol=1e-6)


def test_unknown_keys_are_refused():
    with pytest.raises(UserError, match=r"split\.keys=some must be own"):
        FlopAwareSplit(keys="some")
    with pytest.raises(UserError, match=r"split\.balance=time"):
        FlopAwareSplit(keys="all", balance="time")
