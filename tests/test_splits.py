"""Every split strategy in the package, found by listing it, keeps the promises of the base class unasked."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from causality import assert_causal
from flowhn.config import config_dir
from flowhn.errors import UserError
from flowhn.models import splits as package
from flowhn.models.blocks import ParallelBlock
from flowhn.models.fusions import ConcatProj
from flowhn.models.mixers import Attention, Mamba1
from flowhn.models.splits import (
    AlternatingEqualSplit,
    BranchCost,
    FlopAwareCirculatingSplit,
    FlopAwareSplit,
    NoSplit,
    Split,
    TokenSplit,
    balanced_attention_tokens,
)

LENGTHS = (0, 1, 2, 3, 6, 7, 16, 33, 128)
COST = BranchCost(attn=lambda n: 700 * n + 4 * n * n, ssm=lambda n: 1000 * n)


def strategies() -> list[type[Split]]:
    """Concrete strategies of all modules of the package."""
    found = set()
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        for _, item in inspect.getmembers(importlib.import_module(module.name), inspect.isclass):
            if issubclass(item, Split) and not inspect.isabstract(item):
                found.add(item)
    return sorted(found, key=lambda cls: cls.__name__)


def instances() -> list[Split]:
    """Each strategy at its defaults and, where it takes one, with a window."""
    made = []
    for cls in strategies():
        made.append(cls())
        if "window" in inspect.signature(cls).parameters:
            made.append(cls(window=5))
    return made


def name(split: Split) -> str:
    return f"{type(split).__name__}-w{split.window}"


def tokens(ranges) -> list[int]:
    return [t for start, stop in ranges for t in range(start, stop)]


@pytest.fixture(params=instances(), ids=name)
def split(request) -> Split:
    return request.param


def small_block(split: Split, *, layer_idx: int = 0, rope: bool = False) -> ParallelBlock:
    torch.manual_seed(layer_idx)
    return ParallelBlock(
        d_model=16,
        d_ff=24,
        attention=lambda: Attention(d_model=16, n_heads=2, rope=rope),
        ssm=lambda: Mamba1(d_model=16, d_state=4),
        split=split,
        fusion=ConcatProj,
        layer_idx=layer_idx,
        n_layers=3,
    )


def test_the_four_strategies_are_found():
    assert {NoSplit, AlternatingEqualSplit, FlopAwareSplit, FlopAwareCirculatingSplit} <= set(strategies())


def test_each_strategy_has_one_yaml_that_sets_all_its_options():
    seen = {}
    for path in sorted((config_dir() / "split").glob("*.yaml")):
        options = yaml.safe_load(path.read_text())
        cls = getattr(importlib.import_module("flowhn.models"), options.pop("_target_").rpartition(".")[2])
        seen[cls] = path.name
        assert set(options) == set(inspect.signature(cls).parameters), path.name
        assert vars(cls(**options)) == vars(cls()), f"{path.name} differs from the defaults of {cls.__name__}"
    assert set(seen) == set(strategies())


@pytest.mark.parametrize("n_tokens", LENGTHS)
def test_every_token_reaches_a_branch_and_order_is_kept(split, n_tokens):
    for layer_idx in range(6):
        routing = split(n_tokens, layer_idx, COST)
        attn, ssm = tokens(routing.attn), tokens(routing.ssm)
        assert sorted(set(attn) | set(ssm)) == list(range(n_tokens))
        assert attn == sorted(set(attn))
        assert ssm == sorted(set(ssm))
        assert routing.is_full if split.full else routing.is_partition
        assert (routing.n_attn, routing.n_ssm) == (len(attn), len(ssm))
        assert hash(routing) == hash(TokenSplit(n_tokens, routing.attn, routing.ssm))


@pytest.mark.parametrize("n_tokens", LENGTHS)
def test_gather_and_merge_are_inverse(split, n_tokens):
    x = torch.randn(2, n_tokens, 3)
    for layer_idx in range(4):
        routing = split(n_tokens, layer_idx, COST)
        a, s = routing.gather_attn(x), routing.gather_ssm(x)
        assert torch.equal(a, x[:, tokens(routing.attn)])
        assert torch.equal(s, x[:, tokens(routing.ssm)])
        assert routing.positions_attn().tolist() == tokens(routing.attn)
        if split.full:
            assert torch.equal(a, x)
            assert a.data_ptr() == x.data_ptr()  # no copy
        else:
            assert torch.equal(routing.merge(a, s), x)


def test_merge_refuses_overlapping_branches():
    x = torch.zeros(1, 4, 2)
    with pytest.raises(ValueError, match="exactly one branch"):
        NoSplit()(4, 0, COST).merge(x, x)


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("n_tokens", [1, 2, 3, 7, 12])
def test_a_parallel_block_does_not_look_ahead(split, n_tokens, rope):
    for layer_idx in range(3):
        assert_causal(small_block(split, layer_idx=layer_idx, rope=rope), n_tokens)


@pytest.mark.parametrize("cls", [cls for cls in strategies() if cls.flop_balanced])
@pytest.mark.parametrize("n_tokens", LENGTHS)
def test_flops_are_balanced_where_promised(cls, n_tokens):
    block = small_block(cls())
    for branch in (COST, BranchCost(block.attention.flops, block.ssm.flops)):  # toy costs and a real block's
        for layer_idx in range(3):
            routing = cls()(n_tokens, layer_idx, branch)
            gap = abs(branch.attn(routing.n_attn) - branch.ssm(routing.n_ssm))
            assert gap == min(abs(branch.attn(n) - branch.ssm(n_tokens - n)) for n in range(n_tokens + 1))


@settings(max_examples=60, deadline=None)
@given(
    n_tokens=st.integers(0, 300),
    linear=st.integers(1, 5000),
    square=st.integers(0, 50),
    ssm=st.integers(1, 5000),
    multiple_of=st.integers(1, 64),
)
def test_balance_is_the_best_multiple(n_tokens, linear, square, ssm, multiple_of):
    cost = BranchCost(attn=lambda n: linear * n + square * n * n, ssm=lambda n: ssm * n)
    step = multiple_of if n_tokens >= multiple_of else 1
    best = min(range(0, n_tokens + 1, step), key=lambda n: (abs(cost.attn(n) - cost.ssm(n_tokens - n)), n))
    assert balanced_attention_tokens(n_tokens, cost, multiple_of) == best


def test_the_paper_s_135m_block_is_balanced_at_577_of_1024():
    with torch.device("meta"):
        block = ParallelBlock(
            d_model=768,
            d_ff=2048,
            attention=lambda: Attention(d_model=768, n_heads=32, n_kv_heads=8),
            ssm=lambda: Mamba1(d_model=768, bcdt_rms_norm=True),
            split=FlopAwareCirculatingSplit(),
            fusion=ConcatProj,
        )
    assert block.token_split(1024).n_attn == 577


def test_fac_circulates_as_in_figure_2():
    fac = FlopAwareCirculatingSplit(ratio=2 / 6)
    windows = [tokens(fac(6, i, COST).attn) for i in range(4)]
    assert windows == [[4, 5], [2, 3], [0, 1], [4, 5]]  # {5,6}, {3,4}, {1,2}, and round again


def test_fac_wraps_and_keeps_sequence_order():
    fac = FlopAwareCirculatingSplit(ratio=0.5)
    assert [fac(7, i, COST).attn for i in range(3)] == [((4, 7),), ((1, 4),), ((0, 1), (5, 7))]


def test_fac_lets_late_tokens_see_early_ones_and_fixed_cuts_do_not():
    def sees_first(split: Split, n_layers: int) -> bool:
        """Does the last of 128 tokens depend on the first after some blocks?"""
        reach = {127}
        for i in reversed(range(n_layers)):
            routing = split(128, i, COST)
            for group in (tokens(routing.attn), tokens(routing.ssm)):
                inside = [t for t in group if t in reach]
                if inside:
                    reach |= {t for t in group if t <= max(inside)}
        return 0 in reach

    assert sees_first(FlopAwareCirculatingSplit(), 3)
    assert sees_first(NoSplit(), 1)
    assert not sees_first(AlternatingEqualSplit(), 8)
    assert not sees_first(FlopAwareSplit(), 8)


def test_ae_swaps_halves_and_cuts_odd_lengths_like_the_published_code():
    ae = AlternatingEqualSplit()
    assert [ae(7, i, COST).attn for i in range(3)] == [((3, 7),), ((0, 3),), ((3, 7),)]


def test_fa_sides_and_the_published_ratio():
    last, first = (FlopAwareSplit(ratio=0.59, attention_side=side)(1024, 1, COST) for side in ("last", "first"))
    assert last.attn == ((420, 1024),)
    assert first.attn == ((0, 604),)


@pytest.mark.parametrize("split", [split for split in instances() if split.window], ids=name)
def test_window_makes_routing_depend_on_the_position_alone(split):
    for layer_idx in range(3):
        longest = set(tokens(split(40, layer_idx, COST).attn))
        for n_tokens in range(41):
            assert tokens(split(n_tokens, layer_idx, COST).attn) == sorted(t for t in longest if t < n_tokens)
        assert {t + 5 for t in longest if t < 35} == {t for t in longest if t >= 5}


@pytest.mark.parametrize("ratio", [0, 0.3, 1])
@pytest.mark.parametrize("multiple_of", [1, 4, 16])
def test_ratio_and_multiple_of(ratio, multiple_of):
    for n_tokens in range(50):
        n_attn = FlopAwareSplit(ratio=ratio, multiple_of=multiple_of)(n_tokens, 0, COST).n_attn
        assert 0 <= n_attn <= n_tokens
        assert abs(n_attn - ratio * n_tokens) <= (multiple_of if n_tokens >= multiple_of else 1)
        assert n_tokens < multiple_of or n_attn % multiple_of == 0


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"ratio": 1.5}, "split.ratio"),
        ({"ratio": -0.1}, "split.ratio"),
        ({"ratio": float("nan")}, "split.ratio"),
        ({"ratio": "half"}, "split.ratio"),
        ({"multiple_of": 0}, "split.multiple_of"),
        ({"window": 0}, "split.window"),
        ({"window": 2.5}, "split.window"),
        ({"attention_side": "middle"}, "split.attention_side"),
    ],
)
def test_bad_options_name_their_key(options, key):
    with pytest.raises(UserError, match=key):
        FlopAwareSplit(**options)
    if "attention_side" not in options:
        with pytest.raises(UserError, match=key):
            FlopAwareCirculatingSplit(**options)


def test_routing_is_cached(split):
    assert split(64, 1, COST) is split(64, 1, COST)
