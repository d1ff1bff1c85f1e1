"""``split.shared``: some tokens go through both branches, the others, as published, through one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from causality import assert_causal
from flowhn.artefacts import load_artefact, plan_cells
from flowhn.config import compose, identity, to_dict
from flowhn.errors import UserError
from flowhn.models.blocks import ParallelBlock
from flowhn.models.fusions import ConcatProj, GatedFusion, SumFusion
from flowhn.models.lm import CausalLM
from flowhn.models.mixers import Attention, Mamba1
from flowhn.models.splits import FlopAwareCirculatingSplit, FlopAwareSplit, Split
from flowhn.models.splits.balance import balanced_attention_tokens
from flowhn.models.splits.base import BranchCost, TokenSplit, spread, without_first

SPLITS = (FlopAwareSplit, FlopAwareCirculatingSplit)
FUSIONS = (GatedFusion, SumFusion)
COST = BranchCost(attn=lambda n: 7 * n + n * n, ssm=lambda n: 11 * n)


def block(split: Split, fusion=GatedFusion, *, layer_idx: int = 0, n_layers: int = 3) -> ParallelBlock:
    torch.manual_seed(layer_idx)
    return ParallelBlock(
        d_model=16,
        d_ff=24,
        attention=lambda: Attention(d_model=16, n_heads=4, n_kv_heads=2),
        ssm=lambda: Mamba1(d_model=16, d_state=4),
        split=split,
        fusion=fusion,
        layer_idx=layer_idx,
        n_layers=n_layers,
    )


def tokens(ranges) -> list[int]:
    return [t for start, stop in ranges for t in range(start, stop)]


@pytest.mark.parametrize("shared", [0.0, 0.1, 0.25, 0.6, 1.0])
@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("cls", SPLITS)
def test_the_first_of_attention_s_tokens_go_to_both_branches(cls, window, shared):
    split = cls(shared=shared, window=window)
    for n_tokens in (1, 2, 7, 8, 20, 24, 61):
        period = window or n_tokens
        for layer_idx in range(4):
            routing = split(n_tokens, layer_idx, COST)
            attn, ssm = tokens(routing.attn), tokens(routing.ssm)
            assert routing.is_cover
            assert ssm == sorted(set(ssm))  # order is kept, no token twice
            both = sorted(set(attn) & set(ssm))
            expected = []
            whole = split(period, layer_idx, COST)
            for offset in range(0, n_tokens, period):
                mine = [offset + t for t in tokens(whole.attn)][: int(shared * period)]
                expected += [t for t in mine if t < n_tokens]
            assert both == expected
            assert routing.is_partition is (not both)


def test_none_shared_is_the_published_routing():
    fac = FlopAwareCirculatingSplit(ratio=0.5, shared=0.0)
    assert [(fac(7, i, COST).attn, fac(7, i, COST).ssm) for i in range(3)] == [
        (((4, 7),), ((0, 4),)), (((1, 4),), ((0, 1), (4, 7))), (((0, 1), (5, 7)), ((1, 5),)),
    ]  # fmt: skip
    some = FlopAwareCirculatingSplit(ratio=0.5, shared=0.3)
    assert [some(7, i, COST).ssm for i in range(3)] == [((0, 6),), ((0, 3), (4, 7)), ((0, 6),)]


@settings(max_examples=60, deadline=None)
@given(
    n_tokens=st.integers(0, 200), linear=st.integers(1, 5000), square=st.integers(0, 50), ssm=st.integers(1, 5000),
    multiple_of=st.integers(1, 32), shared=st.integers(0, 250),
)  # fmt: skip
def test_the_cut_balances_what_both_branches_see(n_tokens, linear, square, ssm, multiple_of, shared):
    cost = BranchCost(attn=lambda n: linear * n + square * n * n, ssm=lambda n: ssm * n)
    step = multiple_of if n_tokens >= multiple_of else 1

    def gap(n: int) -> int:
        return abs(cost.attn(n) - cost.ssm(n_tokens - n + min(shared, n)))

    best = min(range(0, n_tokens + 1, step), key=lambda n: (gap(n), n))
    found = balanced_attention_tokens(n_tokens, cost, multiple_of, shared)
    assert gap(found) == gap(best)
    if not shared:
        assert found == best


def test_ranges_without_their_first_tokens():
    assert without_first(((1, 4), (6, 9)), 0) == ((1, 4), (6, 9))
    assert without_first(((1, 4), (6, 9)), 2) == ((3, 4), (6, 9))
    assert without_first(((1, 4), (6, 9)), 4) == ((7, 9),)
    assert without_first(((1, 4), (6, 9)), 99) == ()


@pytest.mark.parametrize(
    "split",
    [
        TokenSplit(9, ((3, 9),), ((0, 5),)),
        TokenSplit(9, ((0, 2), (5, 9)), ((0, 6),)),
        TokenSplit(9, ((0, 2), (5, 9)), ((1, 7),)),
        TokenSplit(9, ((0, 9),), ((4, 6),)),
    ],
)
def test_fused_as_if_an_absent_branch_were_zero(split):
    """The fusions' equations of No_Split on both outputs, each spread over all tokens."""
    y_attn, y_ssm = torch.randn(2, split.n_attn, 6), torch.randn(2, split.n_ssm, 6)
    a, s = spread(y_attn, split.attn, 9), spread(y_ssm, split.ssm, 9)
    assert torch.allclose(SumFusion(d_model=6, full=False)(y_attn, y_ssm, split), a + s, atol=1e-6)
    gated = GatedFusion(d_model=6, full=False)
    gate = torch.sigmoid(gated.gate_attn(a) + gated.gate_ssm(s))
    assert torch.allclose(gated(y_attn, y_ssm, split), gate * a + (1 - gate) * s, atol=1e-6)


def test_a_token_in_no_branch_is_refused():
    hole = TokenSplit(6, ((0, 2),), ((3, 6),))
    assert not hole.is_cover
    with pytest.raises(ValueError, match="exactly one branch"):
        SumFusion(d_model=4, full=False)(torch.zeros(1, 2, 4), torch.zeros(1, 3, 4), hole)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("cls", SPLITS)
@pytest.mark.parametrize("keys", ["own", "all"])
def test_a_block_does_not_look_ahead(cls, keys, fusion):
    for layer_idx in range(3):
        own = block(cls(shared=0.3, keys=keys), fusion, layer_idx=layer_idx)
        for n_tokens in (1, 4, 13):
            assert_causal(own, n_tokens)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("keys", ["own", "all"])
def test_decoding_with_a_cache_equals_the_whole_forward(fusion, keys):
    split = FlopAwareCirculatingSplit(shared=0.3, window=7, keys=keys)

    def build(*, layer_idx: int, n_layers: int) -> ParallelBlock:
        return block(split, fusion, layer_idx=layer_idx, n_layers=n_layers)

    net = CausalLM(vocab_size=31, d_model=16, n_layers=4, pattern=["p"], blocks={"p": build}).eval()
    ids = torch.randint(31, (2, 23))
    with torch.no_grad():
        whole, cache, pieces = net(ids), net.new_cache(), []
        for first, last in [(0, 5), (5, 6), (6, 7), (7, 16), *((t, t + 1) for t in range(16, 23))]:
            pieces.append(net.extend(ids[:, first:last], cache))
    assert torch.allclose(torch.cat(pieces, dim=1), whole, atol=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_flops_are_those_of_the_products_that_run(fusion):
    own = block(FlopAwareCirculatingSplit(shared=0.3, window=8), fusion, layer_idx=1)
    routing = own.token_split(24)
    assert routing.n_attn + routing.n_ssm == 24 + 3 * 2
    rest = own.flops(24) - own.attention.flops(routing.n_attn) - own.ssm.flops(routing.n_ssm)
    per_output = 2 * 16 * 16 if fusion is GatedFusion else 0
    assert rest == per_output * 30 + 2 * 16 * 16 * 24
    one = own._section(8, 9, None)
    steps = [own.step_flops(n) for n in range(24)]
    assert one.n_attn + one.n_ssm in (1, 2)
    shared = [n for n in range(24) if (s := own._section(n, n + 1, None)).n_attn + s.n_ssm == 2]
    assert len(shared) == 6
    assert min(steps[n] for n in shared) > max(steps[n] for n in range(24) if n not in shared)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_gradients_are_right_and_compiled_ones_the_same(fusion):
    own = block(FlopAwareCirculatingSplit(shared=0.3), fusion, layer_idx=1).double()
    x = torch.randn(1, 7, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: own(x)[0], (x,), atol=1e-6)
    (expected,) = torch.autograd.grad(own(x)[0].square().sum(), x)
    traced = torch.compile(lambda x: own(x)[0], backend="aot_eager", fullgraph=True)
    traced(x).square().sum().backward()
    assert torch.allclose(x.grad, expected, atol=1e-9)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in own.parameters())


def test_what_cannot_share_says_what_to_do():
    for options, told in (
        ({"shared": 1.5}, "split.shared=1.5 must be"),
        ({"shared": True}, "split.shared=True must be"),
        ({"shared": "half"}, "split.shared=half must be"),
        ({"shared": 0.1, "balance": "time"}, "with split.shared use split.balance=flops"),
    ):
        with pytest.raises(UserError, match=told):
            FlopAwareCirculatingSplit(**options)
    with pytest.raises(UserError, match=r"split.shared=0.1 gives some tokens two outputs.*fusion=gated"):
        block(FlopAwareCirculatingSplit(shared=0.1), ConcatProj)
    assert isinstance(block(FlopAwareCirculatingSplit(shared=0.0), ConcatProj), nn.Module)


def test_a_run_without_shared_tokens_keeps_the_name_it_had():
    """That of a record made before there were any."""
    path = Path(__file__).parents[1] / "experiments/beyond/tiny-docs-laptop/records/fac_ratio-s0.json"
    record = json.loads(path.read_text())
    assert "shared" not in str(record["config"])
    (run,) = plan_cells(load_artefact("beyond"), ["size=tiny", "models=[fac_ratio]", "seeds=[0]"]).wanted.values()
    assert run.run_id == record["run_id"]
    words = ["model=flowhn", "split=fac", "size=tiny", "fusion=gated"]
    without, with_some = (to_dict(compose("train", [*words, f"split.shared={share}"])) for share in (0.0, 0.25))
    assert identity(without) != identity(with_some)
