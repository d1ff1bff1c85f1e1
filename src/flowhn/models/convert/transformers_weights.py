"""Models of the transformers library as ours: same weights, same logits, same gradients.

Only the object is read (its ``config`` and its weights); transformers itself is never imported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from flowhn.errors import UserError
from flowhn.models.blocks import SequentialBlock
from flowhn.models.convert.names import foreign_names, matched_weights
from flowhn.models.lm import CausalLM
from flowhn.models.mixers import Attention, Mamba1, Mamba2


@dataclass(frozen=True)
class _Family:
    """How one of transformers' architectures is put together from our parts.

    ``pattern``, ``blocks`` and ``norm_eps`` as in :class:`CausalLM`; ``modules`` maps, for each kind of block, our
    modules inside a layer to transformers', and ``outer`` those outside the layers.
    """

    pattern: list[str]
    blocks: dict[str, Callable[..., nn.Module]]
    norm_eps: float
    modules: dict[str, dict[str, str]]
    outer: dict[str, str]
    layers: str


def from_transformers(hf_model: nn.Module) -> CausalLM:
    """Our model with the weights of a ``LlamaForCausalLM``, ``MambaForCausalLM``, ``Mamba2ForCausalLM`` or
    ``JambaForCausalLM`` (dense) of transformers 5.

    The weights are copied (types and devices as they are), tied embeddings stay tied. What transformers does its own way:

    - It computes norms, scans, RoPE's angles and eager attention's softmax in float32 whatever the model's type. Ours are
      computed in float32 or wider, so float64 models agree only to float32's precision.
    - Llama and Jamba pass ``pad_token_id`` to the embedding as ``padding_idx``: that row starts at zero and its lookups
      give no gradient (Jamba's default is token 0). The setting is carried over, as ``embedding.padding_idx``.
    - Mamba and Mamba-2 keep the residual stream in float32 under weights of lower precision (``residual_in_fp32``); ours
      has the activations' type, which differs only below float32.
    - Mamba and Mamba-2 return float32 logits whatever the model's type; ours have the activations' type.
    - Mamba ties the LM head to the embedding by default; the others do not.
    - Mamba and Mamba-2 zero the states of padding given by an attention mask. Ours takes no mask: give unpadded tokens.
    - Before transformers took mamba_ssm's grouped norm over, Mamba-2's gated norm ignored ``n_groups``. Such a version
      is refused where it matters (``n_groups`` above 1).

    Args:
        hf_model: the model; only its ``config`` and its weights are read.

    Returns:
        A model on the same device, in the same mode (train or eval).

    Raises:
        UserError: another architecture, a layer with experts, or an option that ours does not have, named by its key.
    """
    config = getattr(hf_model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind not in _FAMILIES or not hasattr(hf_model, "lm_head"):
        raise UserError(
            f"{type(hf_model).__name__} cannot be converted; give a LlamaForCausalLM, MambaForCausalLM, "
            "Mamba2ForCausalLM or JambaForCausalLM"
        )
    family = _FAMILIES[kind](config)
    if kind == "mamba2":
        _check_grouped_norm(hf_model)
    embedding = hf_model.get_input_embeddings()
    model = CausalLM(
        vocab_size=config.vocab_size,
        d_model=config.hidden_size,
        n_layers=config.num_hidden_layers,
        pattern=family.pattern,
        blocks=family.blocks,
        tie_embeddings=hf_model.lm_head.weight is embedding.weight,
        norm_eps=family.norm_eps,
    )
    own = model.state_dict()
    names = foreign_names(
        own,
        outer=family.outer,
        layers=family.layers,
        layer=lambda i: family.modules[family.pattern[i % len(family.pattern)]],
    )
    weights = matched_weights(own, hf_model.state_dict(), names, source=f"this {type(hf_model).__name__}")
    for name, parameter in model.named_parameters():
        # Into the parameter itself: its marks (no weight decay, no second initialisation) must survive.
        parameter.data = weights[name].detach().clone()
    model.embedding.padding_idx = embedding.padding_idx
    return model.train(hf_model.training)


def _require(config: Any, **expected: Any) -> None:
    """Refuse a config with another value of an option that ours does not have."""
    for key, wanted in expected.items():
        value = getattr(config, key, wanted)
        if value != wanted:
            raise UserError(
                f"the transformers config has {key}={value}, which flowhn lacks; only {key}={wanted} can be converted"
            )


def _require_silu(config: Any) -> None:
    if config.hidden_act not in ("silu", "swish"):
        raise UserError(
            f"the transformers config has hidden_act={config.hidden_act}, which flowhn lacks; only silu can be converted"
        )


def _mlp_modules(norm: str, mlp: str) -> dict[str, str]:
    return {"mlp_norm": norm} | {f"mlp.{part}": f"{mlp}.{part}_proj" for part in ("gate", "up", "down")}


def _block(
    config: Any, *, d_ff: int | None, norm_eps: float, mixer: Callable[[], nn.Module]
) -> Callable[..., nn.Module]:
    return partial(SequentialBlock, d_model=config.hidden_size, d_ff=d_ff, norm_eps=norm_eps, mixer=mixer)


def _llama(config: Any) -> _Family:
    _require_silu(config)
    _require(config, attention_bias=False, mlp_bias=False, attention_dropout=0.0)
    rope = config.rope_parameters
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"the transformers config has partial_rotary_factor={rope['partial_rotary_factor']} in rope_parameters, which "
            "flowhn lacks; only 1.0 can be converted"
        )
    if rope.get("rope_type", "default") != "default":
        raise UserError(
            f"the transformers config has rope_type={rope['rope_type']} in rope_parameters, which flowhn lacks; "
            "only rope_type=default can be converted"
        )
    attention = partial(
        Attention,
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        d_head=config.head_dim,
        rope=True,
        rope_theta=rope["rope_theta"],
    )
    eps = config.rms_norm_eps
    return _Family(
        pattern=["attention"],
        blocks={"attention": _block(config, d_ff=config.intermediate_size, norm_eps=eps, mixer=attention)},
        norm_eps=eps,
        modules={
            "attention": {"mixer_norm": "input_layernorm", "mixer": "self_attn"}
            | _mlp_modules("post_attention_layernorm", "mlp")
        },
        outer={"embedding": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"},
        layers="model.layers",
    )


def _pure_ssm(config: Any, mixer: Callable[[], nn.Module]) -> _Family:
    """Mamba and Mamba-2: norm and mixer only, in a ``backbone``."""
    eps = config.layer_norm_epsilon
    return _Family(
        pattern=["ssm"],
        blocks={"ssm": _block(config, d_ff=None, norm_eps=eps, mixer=mixer)},
        norm_eps=eps,
        modules={"ssm": {"mixer_norm": "norm", "mixer": "mixer"}},
        outer={"embedding": "backbone.embeddings", "norm": "backbone.norm_f", "lm_head": "lm_head"},
        layers="backbone.layers",
    )


def _mamba(config: Any) -> _Family:
    _require_silu(config)
    _require(config, use_bias=False, use_conv_bias=True)
    mixer = partial(
        Mamba1,
        d_model=config.hidden_size,
        d_state=config.state_size,
        d_conv=config.conv_kernel,
        expand=config.expand,
        dt_rank=int(config.time_step_rank),
    )
    return _pure_ssm(config, mixer)


def _mamba2(config: Any) -> _Family:
    _require_silu(config)
    _require(config, use_bias=False, use_conv_bias=True)
    low, high = config.time_step_limit
    if low > 0 or not math.isinf(high):
        raise UserError(
            f"the transformers config has time_step_limit=({low}, {high}), which flowhn lacks; only (0, inf) can be converted"
        )
    mixer = partial(
        Mamba2,
        d_model=config.hidden_size,
        d_state=config.state_size,
        d_conv=config.conv_kernel,
        expand=config.expand,
        headdim=config.head_dim,
        n_groups=config.n_groups,
        chunk_size=config.chunk_size,
        norm_eps=config.layer_norm_epsilon,
    )
    return _pure_ssm(config, mixer)


def _check_grouped_norm(hf_model: nn.Module) -> None:
    norm = hf_model.get_submodule("backbone.layers.0.mixer.norm")
    if hf_model.config.n_groups > 1 and not hasattr(norm, "group_size"):
        raise UserError(
            f"this transformers version normalises Mamba-2 over all channels whatever n_groups={hf_model.config.n_groups}; "
            "install the version that flowhn's dev extra pins"
        )


def _jamba(config: Any) -> _Family:
    if max(config.layers_num_experts, default=1) > 1:
        raise UserError(
            f"the transformers config has num_experts={config.num_experts}: layers with a mixture of experts (MoE) cannot be "
            "converted, only dense ones (num_experts=1)"
        )
    _require_silu(config)
    _require(config, attention_dropout=0.0, mamba_proj_bias=False, mamba_conv_bias=True)
    eps = config.rms_norm_eps
    mamba = partial(
        Mamba1,
        d_model=config.hidden_size,
        d_state=config.mamba_d_state,
        d_conv=config.mamba_d_conv,
        expand=config.mamba_expand,
        dt_rank=int(config.mamba_dt_rank),
        bcdt_rms_norm=True,
        norm_eps=eps,
    )
    attention = partial(
        Attention,
        d_model=config.hidden_size,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        d_head=getattr(config, "head_dim", config.hidden_size // config.num_attention_heads),
    )
    block = partial(_block, config, d_ff=config.intermediate_size, norm_eps=eps)
    mlp = _mlp_modules("pre_ff_layernorm", "feed_forward")
    return _Family(
        pattern=list(config.layers_block_type),
        blocks={"mamba": block(mixer=mamba), "attention": block(mixer=attention)},
        norm_eps=eps,
        modules={
            "mamba": {"mixer_norm": "input_layernorm", "mixer": "mamba"} | mlp,
            "attention": {"mixer_norm": "input_layernorm", "mixer": "self_attn"} | mlp,
        },
        outer={"embedding": "model.embed_tokens", "norm": "model.final_layernorm", "lm_head": "lm_head"},
        layers="model.layers",
    )


_FAMILIES: Mapping[str, Callable[[Any], _Family]] = {
    "llama": _llama,
    "mamba": _mamba,
    "mamba2": _mamba2,
    "jamba": _jamba,
}
