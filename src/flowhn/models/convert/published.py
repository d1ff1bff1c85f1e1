"""The paper's published code (MohammadMahdi1375/Parallel-Hybrid-Model, commit 09dfffd): its config and its names.

Its modes are our split strategies, with that code's exact routing (T tokens, block index i from 0):

- A, No_Split: both branches see every token.
- B, AE_Split: cut at T // 2; attention takes the second part in even blocks and the first in odd ones.
- C, FA_Split: attention takes the first int(0.59 T) tokens; the constant stands for the FLOP computation.
- D, FAC_Split: attention takes the last int(0.5 T) tokens in even blocks and the first int(0.5 T) in odd ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from flowhn.errors import UserError
from flowhn.models.convert.names import foreign_names

# Overrides of the group ``split`` (configs/split) that give each mode's routing.
SPLIT_OF_MODE: Mapping[str, tuple[str, ...]] = {
    "A": ("split=no",),
    "B": ("split=ae",),
    "C": ("split=fa", "split.ratio=0.59", "split.attention_side=first"),
    "D": ("split=published_d",),
}

_LARGEST_SIZE = 10**6  # of any one number: far above every real model, and no product of two overflows

_LAYER = {"mixer_norm": "input_layernorm", "mlp_norm": "pre_ff_layernorm"} | {
    f"mlp.{part}": f"feed_forward.{part}_proj" for part in ("gate", "up", "down")
}
_BLOCK = (
    {f"attention.{ours}": f"atten.{theirs}" for ours, theirs in (_LAYER | {"mixer": "self_attn"}).items()}
    | {f"ssm.{ours}": f"mamba.{theirs}" for ours, theirs in (_LAYER | {"mixer": "mamba"}).items()}
    | {"fusion.proj": "branch_proj", "norm": "pre_ff_layernorm", "proj": "final_proj"}
)


@dataclass(frozen=True)
class PublishedConfig:
    """The keys of the published code's config that decide the network, under that code's names."""

    mode: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rms_norm_eps: float
    mamba_d_state: int
    mamba_d_conv: int
    mamba_expand: int
    mamba_dt_rank: int

    @classmethod
    def read(cls, content: Any) -> PublishedConfig:
        """From the content of a config file. Keys beside the above do not shape this network and are left aside;
        ``mamba_dt_rank`` may be ``"auto"``, ceil(hidden_size / 16).

        Raises:
            UserError: a key that is missing or has no usable value.
        """
        if not isinstance(content, Mapping):
            raise UserError("the published config must be a JSON object with the key mode and the model's sizes")
        missing = [field.name for field in fields(cls) if field.name not in content]
        if missing:
            raise UserError(f"the published config lacks the key {missing[0]}")
        values = {field.name: content[field.name] for field in fields(cls)}
        mode, eps = values["mode"], values["rms_norm_eps"]
        if not isinstance(mode, str) or mode not in SPLIT_OF_MODE:
            raise UserError(f"mode={mode} of the published config must be one of {', '.join(SPLIT_OF_MODE)}")
        if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps <= 1:
            raise UserError(f"rms_norm_eps={eps} of the published config must be a number from 0 to 1")
        if content.get("hidden_act", "silu") not in ("silu", "swish"):
            raise UserError(f"hidden_act={content['hidden_act']} of the published config must be silu")
        if values["mamba_dt_rank"] == "auto" and isinstance(values["hidden_size"], int):
            values["mamba_dt_rank"] = -(-values["hidden_size"] // 16)
        for key, value in values.items():
            if key not in ("mode", "rms_norm_eps"):
                _check_size(key, value)
        heads, kv_heads = values["num_attention_heads"], values["num_key_value_heads"]
        if values["hidden_size"] % heads or heads % kv_heads:
            raise UserError(
                f"num_attention_heads={heads} of the published config must divide hidden_size={values['hidden_size']} and be "
                f"a multiple of num_key_value_heads={kv_heads}"
            )
        return cls(**values)


def _check_size(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST_SIZE:
        raise UserError(f"{key}={value} of the published config must be an integer from 1 to {_LARGEST_SIZE}")


def count_layers(published_weights: Iterable[str]) -> int:
    """How many layers the names of a published state dict speak of."""
    found = {name.split(".")[2] for name in published_weights if re.match(r"model\.layers\.\d+\.", name)}
    return len(found)


def check_embedding(published_weights: Mapping[str, Tensor], config: PublishedConfig, *, source: str) -> None:
    """Vocabulary and width of a published state dict against its config.

    Raises:
        UserError: there is no embedding, or it has another shape.
    """
    expected = (config.vocab_size, config.hidden_size)
    embedding = published_weights.get("model.embed_tokens.weight")
    found = None if embedding is None else tuple(embedding.shape)
    if found != expected:
        raise UserError(
            f"{source} does not fit the model that its config describes: model.embed_tokens.weight "
            f"{'is not there' if found is None else f'has the shape {found}'}, expected {expected} (vocab_size, hidden_size)"
        )


def published_names(own: Iterable[str]) -> dict[str, str]:
    """``{parameter of our FlowHN model: its name in the published state dict}``."""
    return foreign_names(
        own,
        outer={"embedding": "model.embed_tokens", "norm": "model.final_layernorm", "lm_head": "lm_head"},
        layers="model.layers",
        layer=lambda i: _BLOCK,
    )
