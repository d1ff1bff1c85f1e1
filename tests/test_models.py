"""The ten models: shapes, gradients, causality, sizes, initialisation; blocks against naive expressions."""

from __future__ import annotations

import copy
import math
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flowhn.config import build_model, compose, to_dict
from flowhn.errors import UserError
from flowhn.models import (
    AlternatingEqualSplit,
    Attention,
    CausalLM,
    ConcatProj,
    FlopAwareCirculatingSplit,
    FlopAwareSplit,
    HymbaBlock,
    Mamba1,
    NoSplit,
    ParallelBlock,
    SequentialBlock,
    SwiGLU,
)

BASELINES = ("llama", "mamba1", "mamba2", "jamba", "shm", "hymba")
SPLITS = ("no", "ae", "fa", "fac")
CELLS = (*BASELINES, *(f"flowhn_{split}" for split in SPLITS))
SIZES = ("tiny", "135m", "350m", "1b")
BANDS = {"tiny": (0.45e6, 1.0e6), "135m": (132e6, 136e6), "350m": (350e6, 360e6), "1b": (1.14e9, 1.17e9)}
WIDTHS = {"tiny": 80, "135m": 768, "350m": 1024, "1b": 2048}


@cache
def config(cell: str, size: str, *overrides: str):
    model, _, split = cell.partition("_")
    return compose("train", [f"model={model}", f"split={split or 'fac'}", f"size={size}", *overrides])


def build(cell: str, size: str = "tiny", *overrides: str, seed: int = 0) -> CausalLM:
    torch.manual_seed(seed)
    return build_model(config(cell, size, *overrides))


def ids(n_tokens: int, vocab_size: int = 2048, batch: int = 2) -> torch.Tensor:
    return torch.randint(vocab_size, (batch, n_tokens), generator=torch.Generator().manual_seed(n_tokens))


@pytest.mark.parametrize("size", SIZES)
def test_ten_models_have_the_same_size_and_width(size):
    counts = {}
    for cell in CELLS:
        with torch.device("meta"):
            model = build(cell, size)
        counts[cell] = model.num_parameters()
        assert model.d_model == model.lm_head.in_features == WIDTHS[size]
        assert model.lm_head.weight is not model.embedding.weight
    low, high = BANDS[size]
    assert all(low <= count <= high for count in counts.values()), counts
    assert max(counts.values()) <= 1.03 * min(counts.values()), counts


def test_flowhn_has_the_published_parameter_counts():
    published = {("flowhn_fac", "135m"): 132.4e6, ("flowhn_no", "135m"): 133.6e6, ("flowhn_fac", "1b"): 1.144e9}
    for (cell, size), expected in published.items():
        with torch.device("meta"):
            assert build(cell, size).num_parameters() == pytest.approx(expected, rel=5e-4)


@pytest.mark.parametrize("cell", CELLS)
def test_shapes_and_every_parameter_gets_a_gradient(cell):
    model = build(cell)
    x = ids(24)
    logits = model(x)
    assert logits.shape == (2, 24, 2048)
    assert model.body(x).shape == (2, 24, 80)
    F.cross_entropy(logits.flatten(0, 1), x.flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("n_tokens", [1, 2, 3, 7, 33])
def test_causality(cell, n_tokens):
    check_causality(build(cell), n_tokens)


@pytest.mark.parametrize("split", ["ae", "fa", "fac"])
@pytest.mark.parametrize("n_tokens", [1, 5, 9, 33])
def test_causality_with_a_window(split, n_tokens):
    model = build(f"flowhn_{split}", "tiny", "split.window=8")
    check_causality(model, n_tokens)
    x = ids(33)[:, : n_tokens + 3]
    with torch.no_grad():  # routing by position: a prefix has the same logits at any length
        torch.testing.assert_close(model(x)[:, :n_tokens], model(x[:, :n_tokens]), rtol=1e-4, atol=1e-5)


def check_causality(model: CausalLM, n_tokens: int) -> None:
    x = ids(n_tokens, batch=1)
    with torch.no_grad():
        before = model(x)
        assert torch.isfinite(before).all()
        for t in {0, 1, n_tokens // 2, n_tokens - 1} & set(range(n_tokens)):
            changed = x.clone()
            changed[:, t:] = (changed[:, t:] + 1) % 2048
            after = model(changed)
            torch.testing.assert_close(after[:, :t], before[:, :t], rtol=1e-4, atol=1e-5)
            assert not torch.allclose(after[:, t], before[:, t], atol=1e-5)


@pytest.mark.parametrize("cell", CELLS)
def test_every_size_composes_and_counts_flops(cell):
    for size in SIZES:
        with torch.device("meta"):
            model = build(cell, size)
        head = 2 * model.d_model * model.vocab_size
        assert model.flops(0) >= 0
        assert head * 64 < model.flops(64) < model.flops(128)


def test_flops_of_a_flowhn_model_by_hand():
    with torch.device("meta"):
        model = build("flowhn_no", "135m")
    n, d, f, di, r = 1024, 768, 2048, 1536, 48
    attention = n * (4 * d * d + 4 * d * 192) + 2 * n * n * d
    mamba = n * (2 * d * 2 * di + 8 * di + 2 * di * (r + 32) + 2 * r * di + 9 * di * 16 + 2 * di * d)
    block = attention + mamba + 2 * 6 * d * f * n + 2 * 2 * d * d * n + 2 * d * d * n
    assert model.flops(n) == 2 * block + 2 * d * 65536 * n


@pytest.mark.parametrize("cell", CELLS)
def test_initialised_once_and_ssm_parameters_keep_theirs(cell):
    model = build(cell)
    for name, module in model.named_modules():
        weight = module.weight if isinstance(module, nn.Linear | nn.Embedding) else None
        if weight is not None and weight.numel() > 2000 and not getattr(weight, "_no_reinit", False):
            assert weight.std().item() == pytest.approx(0.02, rel=0.1), name
        if isinstance(module, Mamba1):
            steps = F.softplus(module.dt_proj.bias)
            assert 0.9e-3 < steps.min() < steps.max() < 1.1e-1, name
            states = torch.arange(1, 17, dtype=torch.float32).log().expand_as(module.A_log)
            torch.testing.assert_close(module.A_log, nn.Parameter(states.clone()))
            assert torch.equal(module.D, torch.ones_like(module.D))
            assert module.A_log._no_weight_decay
            assert module.D._no_weight_decay
    again, other = build(cell), build(cell, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)


def test_initialisation_draws_each_weight_once(monkeypatch):
    drawn = []
    original = nn.init.normal_

    def counted(weight, *args, **options):
        if "std" in options:  # nn.Embedding's own default draw has none
            drawn.append(weight)
        return original(weight, *args, **options)

    monkeypatch.setattr(nn.init, "normal_", counted)
    for cell in ("hymba", "flowhn_fac"):
        drawn.clear()
        model = build(cell)
        names = [name for w in drawn for name, parameter in model.named_parameters() if parameter is w]
        assert len(names) == len(drawn) == len(set(names))
        assert {"embedding.weight", "lm_head.weight"} < set(names)
        assert not any("A_log" in name or "dt_proj" in name for name in names), names


def test_tied_embeddings_are_one_parameter():
    options = {"vocab_size": 11, "d_model": 4, "n_layers": 1, "pattern": ["a"]}
    blocks = {"a": lambda **depth: SequentialBlock(d_model=4, mixer=lambda: Attention(d_model=4, n_heads=2), **depth)}
    tied, untied = (CausalLM(**options, blocks=blocks, tie_embeddings=tie) for tie in (True, False))
    assert tied.lm_head.weight is tied.embedding.weight
    assert untied.num_parameters() - tied.num_parameters() == 44


def test_layer_patterns():
    def mixers(cell: str, size: str) -> list[str]:
        with torch.device("meta"):
            return [type(layer.mixer).__name__ for layer in build(cell, size).layers]

    period = ["Mamba1", "Mamba1", "Attention", "Mamba1"]
    assert mixers("jamba", "350m") == 3 * period
    assert mixers("shm", "350m") == 6 * ["Mamba1", "Attention"]
    assert set(mixers("mamba2", "tiny")) == {"Mamba2"}


def test_positional_encoding_is_where_the_paper_has_it():
    for cell in CELLS:
        rotary = {m.rope for m in build(cell).modules() if isinstance(m, Attention)}
        assert rotary == ({True} if cell in ("llama", "hymba") else set() if cell.startswith("mamba") else {False})


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def mlp(m: SwiGLU, x: torch.Tensor) -> torch.Tensor:
    gate = x @ m.gate.weight.T
    return (gate * gate.sigmoid() * (x @ m.up.weight.T)) @ m.down.weight.T


def layer(block: SequentialBlock, x: torch.Tensor, **options) -> torch.Tensor:
    u = x + block.mixer(rms(x, block.mixer_norm.weight), **options)
    return u + mlp(block.mlp, rms(u, block.mlp_norm.weight))


def parallel(split, *, rope: bool = False, layer_idx: int = 1) -> ParallelBlock:
    torch.manual_seed(0)
    block = ParallelBlock(
        d_model=16,
        d_ff=24,
        attention=lambda: Attention(d_model=16, n_heads=2, rope=rope),
        ssm=lambda: Mamba1(d_model=16, d_state=4, bcdt_rms_norm=True),
        split=split,
        fusion=ConcatProj,
        layer_idx=layer_idx,
        n_layers=2,
    )
    for name, parameter in block.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)  # a forgotten norm weight shows
    return block


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("n_attn", [0, 3, 10])
def test_parallel_block_is_the_papers_expression(n_attn, rope):
    block = parallel(FlopAwareSplit(ratio=n_attn / 10), rope=rope)
    x = torch.randn(2, 10, 16)
    cut = 10 - n_attn
    a = layer(block.attention, x[:, cut:], positions=torch.arange(cut, 10))
    s = layer(block.ssm, x[:, :cut])
    y = x + torch.cat([s, a], dim=1) @ block.fusion.proj.weight.T
    y = y + rms(y, block.norm.weight) @ block.proj.weight.T
    torch.testing.assert_close(block(x)[0], y, rtol=1e-4, atol=1e-5)


def test_parallel_block_without_split():
    block = parallel(NoSplit())
    x = torch.randn(2, 10, 16)
    both = torch.cat([layer(block.ssm, x), layer(block.attention, x)], dim=-1)
    y = x + both @ block.fusion.proj.weight.T
    y = y + rms(y, block.norm.weight) @ block.proj.weight.T
    torch.testing.assert_close(block(x)[0], y, rtol=1e-4, atol=1e-5)


def test_rope_in_a_wrapped_window_uses_positions_of_the_whole_sequence():
    block = parallel(FlopAwareCirculatingSplit(ratio=0.5), rope=True, layer_idx=2)
    x = torch.randn(1, 7, 16)
    assert block.token_split(7).attn == ((0, 1), (5, 7))
    seen = []
    original = block.attention.mixer.forward
    block.attention.mixer.forward = lambda h, **options: seen.append(options["positions"]) or original(h, **options)
    block(x)
    assert seen[0].tolist() == [0, 5, 6]


def test_sequential_block_without_mlp():
    block = SequentialBlock(d_model=16, mixer=lambda: Mamba1(d_model=16, d_state=4))
    x = torch.randn(2, 9, 16)
    y, carry = block(x, None)
    assert carry is None
    torch.testing.assert_close(y, x + block.mixer(rms(x, block.mixer_norm.weight)), rtol=1e-4, atol=1e-5)


def hymba(layer_idx: int, n_layers: int) -> HymbaBlock:
    return HymbaBlock(
        d_model=16,
        d_ff=24,
        attention=lambda **o: Attention(
            **{"d_model": 16, "n_heads": 4, "n_kv_heads": 2, "rope": True, "sliding_window": 3, "n_meta_tokens": 1, **o}
        ),
        ssm=lambda: Mamba1(d_model=16, d_state=4),
        layer_idx=layer_idx,
        n_layers=n_layers,
    )


def test_hymba_block_is_its_expression_and_shares_keys_and_values():
    torch.manual_seed(0)
    first, second = hymba(0, 4), hymba(1, 4)
    nn.init.uniform_(first.attention_norm.weight, 0.5, 1.5)
    x = torch.randn(2, 8, 16)
    y, carry = first(x, None)
    h = rms(x, first.mixer_norm.weight)
    mixed = rms(first.attention(h), first.attention_norm.weight) + rms(first.ssm(h), first.ssm_norm.weight)
    u = x + mixed / 2
    torch.testing.assert_close(y, u + mlp(first.mlp, rms(u, first.mlp_norm.weight)), rtol=1e-4, atol=1e-5)
    k, v = first.attention.project_kv(h)
    torch.testing.assert_close(carry[0], k, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(carry[1], v, rtol=1e-4, atol=1e-5)
    z, rest = second(y, carry)
    assert rest is None
    assert not hasattr(second.attention, "k_proj")
    assert not torch.allclose(z, second(y, (k + 1, v - 1))[0])


def test_hymba_windows_and_sharing_over_the_depth():
    blocks = [hymba(i, 11) for i in range(11)]
    assert [i for i, b in enumerate(blocks) if b.attention.sliding_window is None] == [0, 5, 10]
    assert [i for i, b in enumerate(blocks) if b.reuses_kv] == [1, 3, 5, 7, 9]
    assert not blocks[10].provides_kv


def test_hymba_meta_tokens_reach_every_logit():
    model = build("hymba")
    x = ids(9)
    before = model(x)
    with torch.no_grad():
        model.meta_tokens[0] += 1.0
    assert before.shape == (2, 9, 2048)
    assert ((model(x) - before).abs().amax(-1) > 0).all()


@pytest.mark.parametrize(
    "split",
    [
        NoSplit(),
        AlternatingEqualSplit(),
        FlopAwareSplit(window=8),
        FlopAwareCirculatingSplit(),
        FlopAwareCirculatingSplit(keys="all"),
    ],
)
def test_torch_compile_traces_a_parallel_block_whole(split):
    block = parallel(split, rope=True)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="eager")
    for n_tokens in (16, 9, 16, 12):  # other lengths are traced anew or with a symbolic length, never wrongly
        x = torch.randn(2, n_tokens, 16)
        torch.testing.assert_close(compiled(x)[0], block(x)[0], rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast_stays_close():
    for cell in ("flowhn_fac", "hymba", "mamba2"):
        model, x = build(cell), ids(32)
        with torch.no_grad():
            reference = model(x)
            with torch.autocast("cpu", torch.bfloat16):
                half = model(x)
        assert (half.float() - reference).abs().max() < 0.1 * reference.abs().max(), cell


@pytest.mark.parametrize("fusion", ["concat_proj", "norm_mean", "gated"])
def test_the_residual_stream_is_kept_in_the_type_that_is_asked_for(fusion):
    words = ["size=tiny", "model=flowhn", "split=no", f"fusion={fusion}"]
    ids = torch.randint(2048, (2, 33), generator=torch.Generator().manual_seed(0))
    kinds, logits = {}, {}
    for wide in (True, False):
        torch.manual_seed(0)
        net = build_model(to_dict(compose("train", [*words, f"+model.residual_in_fp32={str(wide).lower()}"])))
        seen = kinds[wide] = []
        for layer in net.layers:
            layer.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append(output[0].dtype))
        exact = net(ids)
        assert set(seen) == {torch.float32}  # without autocast nothing changes
        seen.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits[wide] = net(ids).float()
        off = (logits[wide] - exact).norm() / exact.norm()
        assert 0 < off < 0.03
    assert set(kinds[True]) == {torch.float32}
    assert set(kinds[False]) == {torch.bfloat16}
    assert not torch.equal(logits[True], logits[False])


def test_an_untrained_model_predicts_uniformly():
    model, x = build("flowhn_fac"), ids(64)
    loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(2048), abs=0.1)


@pytest.mark.parametrize(
    ("cell", "override", "key"),
    [
        ("llama", "size.n_heads=5", "n_heads"),
        ("flowhn_fac", "split.ratio=1.5", "split.ratio"),
        ("flowhn_fa", "split.attention_side=left", "split.attention_side"),
        ("jamba", "model.n_layers=0", "model.n_layers"),
        ("jamba", "model.pattern=[mamba,mumba]", "model.pattern"),
    ],
)
def test_sizes_that_do_not_fit_name_their_key(cell, override, key):
    with pytest.raises(UserError, match=key):
        build(cell, "tiny", override)


def test_two_streams_compile_the_branches_apart_and_change_nothing_on_a_cpu(monkeypatch):
    words = ["model=flowhn", "split=fac", "size=tiny", "data=random", "eval=none"]
    one, two = (
        build_model(to_dict(compose("train", [*words, *more]))) for more in ([], ["model.blocks.parallel.overlap=true"])
    )
    two.load_state_dict(one.state_dict())
    ids = torch.randint(one.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    assert torch.equal(one(ids), two(ids))
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, **options: compiled.append(module))
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(function) or function)
    block = two.layers[0]
    block.compile(dynamic=False)
    assert compiled[:2] == [block.attention, block.ssm]
    assert len(compiled) == 3
    compiled.clear()
    one.layers[0].compile(dynamic=False)
    assert compiled == [one.layers[0]]


@pytest.mark.gpu
def test_two_streams_compute_what_one_does():
    words = ["model=flowhn", "split=fac", "size=tiny", "data=random", "eval=none"]
    one, two = (
        build_model(to_dict(compose("train", [*words, *more]))) for more in ([], ["model.blocks.parallel.overlap=true"])
    )
    two.load_state_dict(one.state_dict())
    ids = torch.randint(one.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0)).cuda()
    for model in (one, two):
        model.cuda()(ids).square().mean().backward()
    torch.testing.assert_close(one(ids), two(ids))
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
