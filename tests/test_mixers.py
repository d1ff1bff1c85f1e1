"""Mixers: shapes, causality, lengths from 0 up, FLOP formulas, initial values, equality with transformers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from flowhn.errors import UserError
from flowhn.models.mixers import Attention, Mamba1, Mamba2
from flowhn.models.mixers.attention import window_mask
from flowhn.models.mixers.conv import causal_conv
from flowhn.models.mixers.rope import apply_rope
from flowhn.models.norms import GatedRMSNorm, RMSNorm

D = 24
BUILDERS = {
    "attention": lambda: Attention(d_model=D, n_heads=4, n_kv_heads=2),
    "attention_rope": lambda: Attention(d_model=D, n_heads=4, n_kv_heads=1, rope=True),
    "attention_window": lambda: Attention(d_model=D, n_heads=4, sliding_window=5),
    "attention_meta": lambda: Attention(d_model=D, n_heads=4, n_kv_heads=2, sliding_window=5, n_meta_tokens=3),
    "mamba1": lambda: Mamba1(d_model=D, d_state=4),
    "mamba1_norms": lambda: Mamba1(d_model=D, d_state=4, bcdt_rms_norm=True),
    "mamba2": lambda: Mamba2(d_model=D, d_state=6, headdim=8, chunk_size=8),
    "mamba2_groups": lambda: Mamba2(d_model=D, d_state=6, headdim=8, n_groups=3, chunk_size=8),
}
each_mixer = pytest.mark.parametrize("name", BUILDERS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@each_mixer
@pytest.mark.parametrize("n_tokens", [0, 1, 2, 7, 33])
def test_shapes_and_gradients(name, n_tokens):
    mixer, x = BUILDERS[name](), torch.randn(2, n_tokens, D, requires_grad=True)
    y = mixer(x)
    assert y.shape == x.shape
    y.square().sum().backward()
    assert x.grad.shape == x.shape
    if n_tokens > 4:
        for key, parameter in mixer.named_parameters():
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
            assert parameter.grad.abs().sum() > 0, key


@each_mixer
@settings(max_examples=8, deadline=None)
@given(n_tokens=st.integers(2, 40), data=st.data())
def test_causal(name, n_tokens, data):
    """A changed token moves its own output and no earlier one."""
    at = data.draw(st.integers(0, n_tokens - 1))
    mixer, x = BUILDERS[name]().double(), torch.randn(1, n_tokens, D, dtype=torch.float64)
    changed = x.clone()
    changed[:, at] += 1
    difference = (mixer(x) - mixer(changed)).abs().amax((0, 2))
    assert (difference[:at] < 1e-10).all()
    assert difference[at] > 1e-8


@each_mixer
def test_autocast_and_half_precision_stay_near_float32(name):
    mixer, x = BUILDERS[name](), torch.randn(2, 19, D)
    expected = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = mixer(x)
    half = BUILDERS[name]()
    half.load_state_dict(mixer.state_dict())
    half = half.bfloat16()(x.bfloat16())
    for y in (cast, half):
        assert y.dtype == torch.bfloat16
        assert (y - expected).norm() / expected.norm() < 0.05


@each_mixer
def test_compiles_without_graph_break(name):
    mixer, x = BUILDERS[name](), torch.randn(2, 19, D)
    torch.compiler.reset()
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    y.sum().backward()
    torch.testing.assert_close(y, mixer(x))


@each_mixer
def test_deterministic_and_batch_independent(name):
    mixer, x = BUILDERS[name](), torch.randn(3, 17, D)
    torch.testing.assert_close(mixer(x)[1:2], mixer(x[1:2]))


# FLOPs


def counted_flops(mixer, n_tokens):
    """What torch counts on the meta device, where attention is seen, at its full square."""
    mixer = mixer.to("meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        mixer(torch.empty(1, n_tokens, mixer.d_model, device="meta"))
    return counter.get_total_flops()


@pytest.mark.parametrize("n_tokens", [1, 64, 100])
@pytest.mark.parametrize(("n_kv_heads", "d_head"), [(4, None), (2, None), (1, 10)])
def test_attention_flops(n_tokens, n_kv_heads, d_head):
    mixer = Attention(d_model=D, n_heads=4, n_kv_heads=n_kv_heads, d_head=d_head)
    half = 2 * n_tokens * n_tokens * 4 * mixer.d_head
    assert mixer.flops(n_tokens) + half == counted_flops(mixer, n_tokens)


def test_attention_flops_shared_kv_and_window():
    own, shared = (Attention(d_model=D, n_heads=4, n_kv_heads=2, shares_kv=flag) for flag in (False, True))
    assert own.flops(50) - shared.flops(50) == 50 * 2 * D * 2 * 2 * 6
    window, n = 10, 50
    local = Attention(d_model=D, n_heads=4, n_kv_heads=2, sliding_window=window)
    assert own.flops(n) - local.flops(n) == 4 * D * (n * n // 2 - (window * window // 2 + (n - window) * window))
    assert local.flops(window) == own.flops(window)
    meta = Attention(d_model=D, n_heads=4, n_kv_heads=2, sliding_window=window, n_meta_tokens=4)
    pairs = int(window_mask(n, window, 4, torch.device("cpu")).sum())
    counted = (meta.flops(n) - n * 2 * D * (D + D + 2 * 2 * 6)) / (4 * D)
    assert counted == pytest.approx(pairs, rel=0.05)


@pytest.mark.parametrize("n_tokens", [1, 64, 100])
def test_mamba1_flops(n_tokens):
    mixer = Mamba1(d_model=D, d_state=4, bcdt_rms_norm=True)
    unseen = n_tokens * mixer.d_inner * (2 * 4 + 9 * 4)  # the convolution's shifts and the scan are no matrix products
    assert mixer.flops(n_tokens) - unseen == counted_flops(mixer, n_tokens)


@pytest.mark.parametrize("n_tokens", [1, 8, 20, 64])
def test_mamba2_flops(n_tokens):
    """Counted on meta, SSD's products are full squares of chunks (also the padded one); the formula counts half."""
    mixer = Mamba2(d_model=D, d_state=6, headdim=8, chunk_size=8)
    full, rest = divmod(n_tokens, 8)
    lengths = [8] * full + [rest] * bool(rest)
    conv = n_tokens * 2 * 4 * (2 * D + 2 * 6)
    linear = n_tokens * 2 * (D * (4 * D + 2 * 6 + 6) + 2 * D * D)
    e, n = 2 * D, 6
    ssd = sum(l * l * (n + e) + 2 * l * e * n for l in lengths) + sum(2 * (l + 1) * e * n for l in lengths[1:])  # noqa: E741
    assert mixer.flops(n_tokens) == linear + conv + ssd
    if n_tokens % 8 == 0:
        half = sum(l * l * (n + e) for l in lengths)  # noqa: E741
        first_off = 2 * 8 * e * n * (full > 1)  # torch also multiplies the first chunk by its empty earlier state
        carry = 2 * e * n * (full - 1)
        single = 2 * 8 * e * n * (full == 1)  # one chunk alone needs no state, which the formula counts all the same
        assert mixer.flops(n_tokens) - conv - carry + half + first_off - single == counted_flops(mixer, n_tokens)


def test_flop_balance_of_the_paper_size():
    """clarifications.md: at D 768, 32 heads, 8 KV heads, d_ff 2048 and 1024 tokens, the branches balance at 577."""
    attention, ssm = Attention(d_model=768, n_heads=32, n_kv_heads=8), Mamba1(d_model=768, bcdt_rms_norm=True)
    mlp = 6 * 768 * 2048
    gaps = {n: abs(attention.flops(n) + mlp * n - ssm.flops(1024 - n) - mlp * (1024 - n)) for n in range(1025)}
    assert min(gaps, key=gaps.get) == 577


# Attention


def reference_attention(mixer, x, visible):
    """Softmax attention with loops over heads, (1, T, D)."""
    per_group = mixer.n_heads // mixer.n_kv_heads
    heads = []
    q, k, v = (p(x)[0].split(mixer.d_head, dim=-1) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    for h in range(mixer.n_heads):
        scores = q[h] @ k[h // per_group].T / math.sqrt(mixer.d_head)
        heads.append(scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v[h // per_group])
    return mixer.o_proj(torch.cat(heads, dim=-1))[None]


@settings(max_examples=20, deadline=None)
@given(n_tokens=st.integers(1, 40), window=st.none() | st.integers(1, 12), n_meta=st.integers(0, 5))
def test_attention_sees_what_it_should(n_tokens, window, n_meta):
    mixer = Attention(d_model=D, n_heads=4, n_kv_heads=2, sliding_window=window, n_meta_tokens=n_meta).double()
    visible = torch.tensor([
        [j <= i and (window is None or i - window < j or j < n_meta) for j in range(n_tokens)] for i in range(n_tokens)
    ])  # fmt: skip
    x = torch.randn(1, n_tokens, D, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), reference_attention(mixer, x, visible))


def test_window_mask_made_in_inference_mode_can_train():
    mixer, x = Attention(d_model=D, n_heads=4, sliding_window=6), torch.randn(1, 13, D)
    with torch.inference_mode():
        mixer(x)
    mixer(x).sum().backward()


def test_shared_kv_equals_own_kv():
    own = Attention(d_model=D, n_heads=4, n_kv_heads=2, rope=True)
    shared = Attention(d_model=D, n_heads=4, n_kv_heads=2, rope=True, shares_kv=True)
    shared.load_state_dict({key: value for key, value in own.state_dict().items() if key[0] in "qo"})
    x = torch.randn(2, 9, D)
    kv = own.project_kv(x)
    assert [tuple(t.shape) for t in kv] == [(2, 2, 9, 6)] * 2
    torch.testing.assert_close(shared(x, kv=kv), own(x))
    with pytest.raises(UserError, match="shares_kv"):
        shared(x)


def test_rope_depends_on_distance_alone():
    mixer, x = Attention(d_model=D, n_heads=4, rope=True).double(), torch.randn(1, 9, D, dtype=torch.float64)
    positions = torch.arange(9)
    torch.testing.assert_close(mixer(x, positions=positions), mixer(x))
    torch.testing.assert_close(mixer(x, positions=positions + 1000), mixer(x))
    assert (mixer(x, positions=positions * 2) - mixer(x)).abs().max() > 1e-4


def test_rope_matches_transformers():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    q, positions = torch.randn(2, 4, 11, 6), torch.arange(5, 16)
    rope = {"rope_type": "default", "rope_theta": 5e3}
    config = LlamaConfig(hidden_size=D, num_attention_heads=4, rope_parameters=rope)
    cos, sin = LlamaRotaryEmbedding(config)(q, positions[None])
    expected, _ = apply_rotary_pos_emb(q, q, cos, sin)
    torch.testing.assert_close(apply_rope(q, positions, 5e3), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("build", "words"), [
    (lambda: Attention(d_model=10, n_heads=3), "n_heads=3.*d_model=10"),
    (lambda: Attention(d_model=12, n_heads=4, n_kv_heads=3), "n_kv_heads=3.*n_heads=4"),
    (lambda: Attention(d_model=12, n_heads=4, rope=True), "d_head=3"),
    (lambda: Attention(d_model=12, n_heads=4, sliding_window=0), "sliding_window=0"),
    (lambda: Attention(d_model=12, n_heads=4, backend="flex"), "attention=flex"),
    (lambda: Mamba1(d_model=12, d_state=0), "d_state=0"),
    (lambda: Mamba1(d_model=12, backend="cuda"), "kernels=cuda"),
    (lambda: Mamba2(d_model=12, headdim=7), "headdim=7"),
    (lambda: Mamba2(d_model=12, headdim=8, n_groups=2), "n_groups=2"),
    (lambda: Mamba2(d_model=12, headdim=8, backend="cuda"), "kernels=cuda"),
])  # fmt: skip
def test_bad_arguments(build, words):
    with pytest.raises(UserError, match=words):
        build()


# State-space mixers


@settings(max_examples=15, deadline=None)
@given(n_tokens=st.integers(0, 20), width=st.integers(1, 5), bias=st.booleans())
def test_causal_conv_matches_conv1d(n_tokens, width, bias):
    conv = nn.Conv1d(6, 6, width, groups=6, bias=bias).double()
    x = torch.randn(2, n_tokens, 6, dtype=torch.float64)
    padded = F.pad(x.transpose(1, 2), (width - 1, 0))
    expected = conv(padded).transpose(1, 2) if n_tokens else x
    torch.testing.assert_close(causal_conv(x, conv.weight, conv.bias), expected)


@pytest.mark.parametrize(("kind", "sizes"), [(Mamba1, {}), (Mamba2, {"headdim": 1})])
def test_initial_values_and_marks(kind, sizes):
    mixer = kind(d_model=256, **sizes)
    bias = mixer.dt_bias if kind is Mamba2 else mixer.dt_proj.bias
    dt = F.softplus(bias)
    assert 1e-3 * 0.99 <= dt.min() < 2e-3
    assert 5e-2 < dt.max() <= 1e-1 * 1.01
    assert (mixer.D == 1).all()
    if kind is Mamba1:
        torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(512, 16))
        assert mixer.dt_proj._no_reinit
        assert mixer.dt_proj.weight._no_reinit
        assert not hasattr(mixer.dt_proj.weight, "_no_weight_decay")
        assert mixer.dt_proj.weight.abs().max() <= 16**-0.5
    else:
        assert mixer.A_log.min() >= 0
        assert mixer.A_log.max() <= math.log(16)
    for parameter in (bias, mixer.A_log, mixer.D):
        assert parameter._no_reinit
        assert parameter._no_weight_decay


def test_mamba1_matches_transformers_jamba():
    from transformers import JambaConfig
    from transformers.models.jamba.modeling_jamba import JambaMambaMixer

    config = JambaConfig(hidden_size=32, mamba_d_state=8, mamba_dt_rank="auto", rms_norm_eps=1e-6)
    theirs = JambaMambaMixer(config, layer_idx=0)
    nn.init.normal_(theirs.dt_proj.bias)
    ours = Mamba1(d_model=32, d_state=8, bcdt_rms_norm=True)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 21, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("n_groups", [1, 2])
def test_mamba2_matches_transformers(n_groups):
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=32, num_heads=8, head_dim=8, state_size=16, n_groups=n_groups, chunk_size=8, expand=2
    )
    theirs = Mamba2Mixer(config, layer_idx=0)
    nn.init.normal_(theirs.dt_bias)
    ours = Mamba2(d_model=32, d_state=16, headdim=8, n_groups=n_groups, chunk_size=8)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 21, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


# Norms


def test_rms_norm_types_and_values():
    norm = RMSNorm(12, eps=1e-3)
    nn.init.normal_(norm.weight)
    x = torch.randn(3, 5, 12)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x.bfloat16()).float(), expected, rtol=3e-2, atol=3e-2)


def test_gated_rms_norm_groups():
    norm = GatedRMSNorm(8, n_groups=2)
    y, z = torch.randn(3, 8), torch.randn(3, 8)
    halves = [F.rms_norm(half, (4,), eps=1e-5) for half in (y * F.silu(z)).split(4, dim=-1)]
    torch.testing.assert_close(norm(y, z), torch.cat(halves, dim=-1))
