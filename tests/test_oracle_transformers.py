"""transformers as oracle: a converted model gives its logits and its gradients, over random configurations."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from flowhn.errors import UserError
from flowhn.models import from_transformers
from widened import Widened

LOGITS, GRADIENTS = 1e-4, 1e-3  # largest difference; largest difference relative to a tensor's largest gradient
# Some gradients are zero but for rounding (a scale that a norm takes out again): below this share of the model's largest
# gradient, a tensor is measured by that. In float64, where rounding is out of sight, every tensor is measured by itself.
FLOOR = 1e-3
FAMILIES = ("llama", "mamba", "mamba2", "jamba")
OURS = {"llama": "llama", "mamba": "mamba1", "mamba2": "mamba2", "jamba": "jamba"}


@cache
def classes(family: str) -> tuple[type, type]:
    """Configuration and model class; transformers imports a family when it is first named."""
    import transformers

    name = family.capitalize()
    return getattr(transformers, f"{name}Config"), getattr(transformers, f"{name}ForCausalLM")


@pytest.fixture(autouse=True, scope="module")
def few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _attention_sizes(draw) -> dict:
    kv_heads, d_head = draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 6, 8, 16]))
    heads = kv_heads * draw(st.integers(1, 3))
    return {
        "hidden_size": heads * d_head,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": draw(st.integers(1, 50)),
    }


def _llama(draw) -> dict:
    own_width = {"head_dim": draw(st.sampled_from([2, 6, 8]))} if draw(st.booleans()) else {}
    theta = draw(st.sampled_from([100.0, 10000.0, 500000.0]))
    rope = {"rope_type": "default", "rope_theta": theta}
    return _attention_sizes(draw) | own_width | {"rms_norm_eps": _eps(draw), "rope_parameters": rope}


def _mamba(draw) -> dict:
    return {
        "hidden_size": draw(st.integers(4, 40)),
        "state_size": draw(st.integers(1, 20)),
        "expand": draw(st.integers(1, 3)),
        "conv_kernel": draw(st.integers(1, 5)),
        "time_step_rank": draw(st.one_of(st.just("auto"), st.integers(1, 5))),
        "layer_norm_epsilon": _eps(draw),
    }


def _mamba2(draw) -> dict:
    groups, expand = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2]))
    heads, head_dim = groups * draw(st.integers(1, 3)), draw(st.sampled_from([4, 8]))
    return {
        "hidden_size": heads * head_dim // expand,
        "num_heads": heads,
        "head_dim": head_dim,
        "expand": expand,
        "n_groups": groups,
        "state_size": draw(st.integers(1, 20)),
        "conv_kernel": draw(st.integers(1, 5)),
        "chunk_size": draw(st.integers(1, 40)),
        "layer_norm_epsilon": _eps(draw),
    }


def _jamba(draw) -> dict:
    period = draw(st.integers(1, 3))
    sizes = _attention_sizes(draw)
    # Jamba's norm over a single rank or state would be a sign function, whose gradient is rounding noise.
    ranks = st.integers(2, 5)
    return sizes | {
        "num_experts": 1,
        "attn_layer_period": period,
        "attn_layer_offset": draw(st.integers(0, period - 1)),
        "mamba_d_state": draw(st.integers(2, 20)),
        "mamba_d_conv": draw(st.integers(1, 5)),
        "mamba_expand": draw(st.integers(1, 3)),
        "mamba_dt_rank": draw(st.one_of(st.just("auto"), ranks) if sizes["hidden_size"] > 16 else ranks),
        "rms_norm_eps": _eps(draw),
    }


def _eps(draw) -> float:
    return draw(st.sampled_from([1e-6, 1e-5, 1e-2]))


SIZES = {"llama": _llama, "mamba": _mamba, "mamba2": _mamba2, "jamba": _jamba}


@st.composite
def cases(draw, family: str) -> tuple[dict, int, int, int]:
    """Keyword arguments of a transformers config, batch, tokens, seed."""
    vocab = draw(st.integers(3, 60))
    options = SIZES[family](draw) | {
        "vocab_size": vocab,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "tie_word_embeddings": draw(st.booleans()),
        "pad_token_id": draw(st.sampled_from([None, 0, vocab - 1])),
    }
    return options, draw(st.integers(1, 3)), draw(st.integers(1, 41)), draw(st.integers(0, 10**6))


def build(family: str, options: dict, seed: int = 0) -> nn.Module:
    """A transformers model whose every parameter matters: norms away from 1, logits of order 1, decays spread."""
    config, model = classes(family)
    torch.manual_seed(seed)
    return randomised(model(config(**options)).eval())


def randomised(net: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if "embed" in name:
                weight.normal_()
            elif weight.ndim == 2 and "A_log" not in name:
                weight.normal_(std=weight.shape[1] ** -0.5)
            else:
                weight.add_(0.3 * torch.randn_like(weight))
    return net


def difference(
    theirs: nn.Module, batch: int, tokens: int, seed: int, *, floor: float = FLOOR, ours: nn.Module | None = None
) -> tuple[float, float]:
    """Largest difference of logits, and of a random loss's gradients relative to the largest of their tensor.

    ``ours`` has their weights already; None: it is converted from them.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(theirs.config.vocab_size, (batch, tokens), generator=generator)
    ours = from_transformers(theirs) if ours is None else ours
    expected, got = theirs(input_ids=ids, use_cache=False).logits, ours(ids)
    probe = torch.randn(expected.shape, generator=generator).to(expected.dtype)
    (expected * probe).sum().backward()
    (got * probe).sum().backward()
    # Their gradients under our names: the gradients themselves go through the conversion, as weights.
    carrier = copy.deepcopy(theirs)
    for there, weight in zip(carrier.parameters(), theirs.parameters(), strict=True):
        there.data = torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
    wanted = dict(from_transformers(carrier).named_parameters())
    least = floor * max(g.abs().max().item() for g in wanted.values())
    relative = [
        ((p.grad - wanted[name]).abs().max() / max(wanted[name].abs().max().item(), least, 1e-300)).item()
        for name, p in ours.named_parameters()
    ]
    return (expected - got).abs().max().item(), max(relative)


def agree_over_random_configs(family: str, examples: int, compare) -> None:
    oracle = f"transformers {family.capitalize()}ForCausalLM, random configurations"

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(case=cases(family))
    def check(case):
        options, batch, tokens, seed = case
        logits, gradients = difference(build(family, options, seed), batch, tokens, seed)
        compare(OURS[family], oracle, "logits, float32", logits, LOGITS)
        compare(OURS[family], oracle, "gradients, float32, relative", gradients, GRADIENTS)

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_transformers(family, compare):
    agree_over_random_configs(family, 30, compare)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_transformers_at_length(family, compare):
    agree_over_random_configs(family, 300, compare)


@pytest.mark.parametrize("cell", ["llama", "mamba1", "mamba2", "jamba", "shm"])
def test_the_configured_models_are_transformers_architectures(cell, compare):
    """What ``model=...`` builds, at size tiny: SHM is transformers' Jamba with attention in every second layer."""
    from flowhn.benchmark.peers import build_peer
    from flowhn.config import build_model, compose, to_dict

    config = to_dict(compose("train", [f"model={cell}", "size=tiny"]))
    ours, size = build_model(config).eval(), config["size"]
    if cell == "shm":
        heads = {"num_attention_heads": size["n_heads"], "num_key_value_heads": size["n_kv_heads"], "num_experts": 1}
        layers = {"num_hidden_layers": len(ours.layers), "attn_layer_period": 2, "attn_layer_offset": 1}
        widths = {"hidden_size": size["d_model"], "intermediate_size": size["d_ff"]["shm"]}
        options = {**heads, **layers, **widths, "vocab_size": config["vocab_size"]}
        theirs = build("jamba", options)
    else:
        theirs = randomised(build_peer(cell, config).model.eval())
    family = theirs.config.model_type
    for module in ours.modules():  # ours take 1e-6 where some of theirs take 1e-5
        if hasattr(module, "eps"):
            module.eps = getattr(theirs.config, "rms_norm_eps", None) or theirs.config.layer_norm_epsilon
    ours.load_state_dict(from_transformers(theirs).state_dict())
    logits, gradients = difference(theirs, 2, 97, 0, ours=ours)
    oracle = f"transformers {family.capitalize()}ForCausalLM of the same sizes"
    compare(cell, oracle, "logits of the model that is trained (tiny), float32", logits, LOGITS)
    compare(cell, oracle, "gradients of it, float32, relative", gradients, GRADIENTS)


SMALL = {
    "llama": {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 20},
    "mamba": {"hidden_size": 24},
    "mamba2": {"hidden_size": 24, "num_heads": 6, "head_dim": 8, "n_groups": 2, "state_size": 10, "chunk_size": 8},
    "jamba": {
        "hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 20, "num_experts": 1,
        "attn_layer_period": 2, "attn_layer_offset": 1,
    },
}  # fmt: skip
SMALL = {name: options | {"vocab_size": 29, "num_hidden_layers": 3} for name, options in SMALL.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_float64_agrees_to_float32_with_transformers_casts(family):
    logits, gradients = difference(build(family, SMALL[family]).double(), 2, 21, 0)
    assert logits <= 1e-5
    assert gradients <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_float64_agrees_to_float64_without_transformers_casts(family, compare):
    logits, gradients = without_casts(family)
    oracle = f"transformers {family.capitalize()}ForCausalLM, its casts to float32 taken out"
    compare(OURS[family], oracle, "logits, float64", logits, 1e-10)
    compare(OURS[family], oracle, "gradients, float64, relative", gradients, 1e-8)


def without_casts(family: str) -> tuple[float, float]:
    theirs = build(family, SMALL[family]).double()
    with Widened():
        wide = type(theirs)(theirs.config).double().eval()  # RoPE's frequencies are made here
    wide.load_state_dict(theirs.state_dict())
    narrow = wide.forward

    def forward(**inputs):
        with Widened():
            return narrow(**inputs)

    wide.forward = forward
    return difference(wide, 2, 21, 0, floor=0.0)


REFUSED = [
    ("llama", {"attention_bias": True}, "attention_bias=True"),
    ("llama", {"mlp_bias": True}, "mlp_bias=True"),
    ("llama", {"attention_dropout": 0.1}, "attention_dropout=0.1"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "rope_type=linear"),
    ("mamba", {"use_bias": True}, "use_bias=True"),
    ("mamba", {"use_conv_bias": False}, "use_conv_bias=False"),
    ("mamba", {"hidden_act": "relu"}, "hidden_act=relu"),
    ("mamba2", {"use_bias": True}, "use_bias=True"),
    ("mamba2", {"use_conv_bias": False}, "use_conv_bias=False"),
    ("mamba2", {"time_step_limit": (0.0, 0.1)}, "time_step_limit"),
    ("mamba2", {"time_step_limit": (0.01, float("inf"))}, "time_step_limit"),
    ("jamba", {"num_experts": 4}, "num_experts=4"),
    ("jamba", {"mamba_proj_bias": True}, "mamba_proj_bias=True"),
    ("jamba", {"mamba_conv_bias": False}, "mamba_conv_bias=False"),
    ("jamba", {"attention_dropout": 0.5}, "attention_dropout=0.5"),
]


@pytest.mark.parametrize(("family", "option", "named"), REFUSED)
def test_an_option_that_ours_lacks_is_refused_by_name(family, option, named):
    config, model = classes(family)
    with pytest.raises(UserError, match=named):
        from_transformers(model(config(**SMALL[family] | option)))


def test_other_models_are_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    with pytest.raises(UserError, match="GPT2LMHeadModel cannot be converted"):
        from_transformers(GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2)))
    with pytest.raises(UserError, match="LlamaModel cannot be converted"):
        from_transformers(build("llama", SMALL["llama"]).model)
    with pytest.raises(UserError, match="Linear cannot be converted"):
        from_transformers(nn.Linear(2, 2))


def test_experts_outside_the_depth_do_not_count():
    options = SMALL["jamba"] | {"num_experts": 4, "expert_layer_period": 9, "expert_layer_offset": 8}
    assert difference(build("jamba", options), 2, 7, 0)[0] <= LOGITS


def test_groups_are_refused_where_transformers_ignores_them():
    theirs = build("mamba2", SMALL["mamba2"])
    del theirs.backbone.layers[0].mixer.norm.group_size
    with pytest.raises(UserError, match="n_groups=2"):
        from_transformers(theirs)


def test_a_weight_too_many_is_refused():
    theirs = build("llama", SMALL["llama"])
    theirs.model.layers[1].self_attn.extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(UserError, match=r"self_attn\.extra"):
        from_transformers(theirs)


def test_weights_are_copies_with_their_type_marks_and_ties():
    theirs = build("mamba", SMALL["mamba"] | {"tie_word_embeddings": True}).to(torch.bfloat16)
    ours = from_transformers(theirs)
    assert ours.lm_head.weight is ours.embedding.weight
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert ours.layers[0].mixer.A_log._no_weight_decay
    assert not ours.training
    assert from_transformers(theirs.train()).training
    before = theirs.lm_head.weight.clone()
    with torch.no_grad():
        ours.lm_head.weight.zero_()
    assert torch.equal(theirs.lm_head.weight, before)
