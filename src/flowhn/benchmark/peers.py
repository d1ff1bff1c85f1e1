"""Models of the same sizes from transformers, to time beside ours: is a baseline here as fast as it can be had elsewhere?"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from flowhn.errors import UserError

PEERS = ("llama", "mamba1", "mamba2", "jamba")
# The functions of each peer's module in transformers that run mamba_ssm's and causal_conv1d's kernels; the first one decides how
# fast its training step is.
_SCANS = {
    "mamba1": (
        "transformers.models.mamba.modeling_mamba",
        ("mamba_inner_fn", "mamba_selective_scan", "causal_conv1d_fn"),
    ),
    "mamba2": (
        "transformers.models.mamba2.modeling_mamba2",
        ("mamba2_split_conv1d_scan_combined", "mamba2_chunk_scan", "causal_conv1d_fn"),
    ),
    "jamba": ("transformers.models.jamba.modeling_jamba", ("mamba_selective_scan", "causal_conv1d_fn")),
}


class Peer(nn.Module):
    """A transformers causal LM whose ``forward(input_ids, labels)``, both (B, T), gives its own mean loss.

    ``labels`` are the next tokens, as everywhere here; transformers shifts by itself, so it gets them shifted back.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        shifted = torch.cat([input_ids[:, :1], labels[:, :-1]], dim=1)  # transformers compares logits[t] with [t + 1]
        return self.model(input_ids=input_ids, labels=shifted, use_cache=False).loss


def build_peer(name: str, config: Mapping[str, Any]) -> Peer:
    """transformers' model with the sizes of a resolved config of ours (``model`` and ``size`` of it).

    The functions of :data:`_SCANS` stay outside compiled graphs: ``torch.compile`` takes ``torch.compiler.is_exporting()``
    for true (torch 2.11), so that transformers would leave mamba_ssm's kernels for its loop over tokens, and Dynamo unrolls it.

    Raises:
        UserError: no such peer.
    """
    import transformers

    size = config["size"]
    if name not in PEERS:
        raise UserError(f"there is no peer {name}; choose one of {', '.join(PEERS)}")
    if name in _SCANS:
        _keep_out_of_graphs(*_SCANS[name])
    common = {
        "vocab_size": config["vocab_size"],
        "hidden_size": size["d_model"],
        "num_hidden_layers": size["n_layers"][name],
        "tie_word_embeddings": False,
    }
    heads = {"num_attention_heads": size["n_heads"], "num_key_value_heads": size["n_kv_heads"]}
    if name == "llama":
        made = transformers.LlamaConfig(
            **common, **heads, intermediate_size=size["d_ff"]["llama"], attn_implementation="sdpa"
        )
        return Peer(transformers.LlamaForCausalLM(made))
    if name == "mamba1":
        made = transformers.MambaConfig(**common, state_size=16, conv_kernel=4, expand=2, use_cache=False)
        return Peer(transformers.MambaForCausalLM(made))
    if name == "mamba2":
        sizes = size["mamba2"]
        n_heads = 2 * size["d_model"] // sizes["headdim"]
        made = transformers.Mamba2Config(
            **common, state_size=sizes["d_state"], conv_kernel=4, expand=2, head_dim=sizes["headdim"], num_heads=n_heads,
            n_groups=1, chunk_size=sizes["chunk_size"], use_cache=False,
        )  # fmt: skip
        return Peer(transformers.Mamba2ForCausalLM(made))
    made = transformers.JambaConfig(
            **common, **heads, intermediate_size=size["d_ff"]["jamba"], num_experts=1, attn_layer_period=4, attn_layer_offset=2,
            use_cache=False,
    )  # fmt: skip
    return Peer(transformers.JambaForCausalLM(made))


def _keep_out_of_graphs(module_name: str, functions: Sequence[str]) -> None:
    """Have torch.compile break its graph at functions of a module and call them as they are."""
    module = import_module(module_name)
    for function in functions:
        found = getattr(module, function, None)
        if found is not None and not hasattr(found, "_torchdynamo_disable"):
            setattr(module, function, torch.compiler.disable(found))


def peer_kernels(name: str) -> dict[str, str | None]:
    """What a peer runs, as our models' records say it: ``{"ssm", "attention"}``.

    transformers takes mamba_ssm's function where that package (and causal_conv1d) can be imported, else its own plain
    torch; ``ssm`` is the module which that function comes from, or ``unknown`` where this transformers has no such choice.
    """
    attention = "sdpa" if name in ("llama", "jamba") else None
    if name not in _SCANS:
        return {"ssm": None, "attention": attention}
    module, functions = _SCANS[name]
    found = getattr(import_module(module), functions[0], None)
    if not inspect.isfunction(found):
        return {"ssm": "unknown", "attention": attention}
    chooser = inspect.unwrap(found, stop=lambda inner: "implementation" in inspect.getclosurevars(inner).nonlocals)
    chosen = inspect.getclosurevars(chooser).nonlocals.get("implementation")
    return {"ssm": getattr(chosen, "__module__", "unknown"), "attention": attention}
