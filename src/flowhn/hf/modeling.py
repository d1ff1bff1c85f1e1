"""``FlowHNForCausalLM``: one of our networks behind transformers' interface, with our own cache in ``generate``.

transformers renamed the argument that carries a cache during version 5 (``past_key_values``, later ``cache``); both names
are taken, and only methods that have not changed are overridden.
Letters: B batch, n tokens given, V vocabulary.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from flowhn.errors import UserError
from flowhn.hf.build import build_net
from flowhn.hf.configuration import FlowHNConfig
from flowhn.models.cache import ModelCache

# The name of this version: in outputs, and among the arguments that generate hands from step to step.
_KEY = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


class FlowHNCache:
    """A :class:`~flowhn.models.cache.ModelCache` with the methods that ``generate`` calls on a cache."""

    is_compileable = False
    is_croppable = False  # an SSM's state knows no way back
    is_linear = (True,)  # the caller slices nothing off the input: prepare_inputs_for_generation does

    def __init__(self, state: ModelCache) -> None:
        self.state = state

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far."""
        return self.state.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: sequence i goes on from what ``beam_idx[i]`` has read."""
        self.state.reorder(beam_idx)


class FlowHNForCausalLM(PreTrainedModel, GenerationMixin):
    """A :class:`flowhn.models.CausalLM` as a transformers model.

    ``forward`` without a cache is the network's own forward: a proportional split routes by the length of its input.
    With a cache, as in ``generate`` by default, such a split is frozen at ``config.routing_window``;
    ``generate(use_cache=False)`` reads the whole text again for every token, routed as in training.
    """

    config_class = FlowHNConfig
    base_model_prefix = "net"
    main_input_name = "input_ids"
    _no_split_modules = ["SequentialBlock", "ParallelBlock", "HymbaBlock"]
    _supports_sdpa = True
    _is_stateful = True  # no assisted decoding: a state cannot be cut back
    _tied_weights_keys = {"net.lm_head.weight": "net.embedding.weight"}

    def __init__(self, config: FlowHNConfig) -> None:
        super().__init__(config)
        self.net = build_net(config.net)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """The network has drawn its weights itself."""

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.net.embedding

    def set_input_embeddings(self, value: torch.nn.Module) -> None:
        self.net.embedding = value

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.net.lm_head

    def set_output_embeddings(self, value: torch.nn.Module) -> None:
        self.net.lm_head = value

    def new_cache(self) -> FlowHNCache:
        """An empty cache; splits that are proportional to the length are frozen at ``config.routing_window``."""
        return FlowHNCache(self.net.new_cache(window=self.config.routing_window))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: FlowHNCache | None = None,
        cache: FlowHNCache | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **ignored: Any,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """(B, n) long -> logits (B, n, V).

        Args:
            input_ids: new tokens, behind those in the cache if there is one.
            attention_mask: may be 0 behind a sequence's last token; the models know no padding in front.
            past_key_values, cache: of an earlier call or of :meth:`new_cache`; filled in place.
            use_cache: None or False without a cache given: none is made.
            labels: (B, n) long, the inputs themselves; -100 is left out. The loss is on the next token.
            logits_to_keep: the last tokens' logits only; 0: all.

        Raises:
            UserError: padding in front of a sequence.
        """
        if attention_mask is not None and attention_mask.shape[1] and not bool(attention_mask[:, 0].all()):
            raise UserError("flowhn models know no padding in front of a text; generate from prompts of one length")
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = self.new_cache()
        hidden = self.net.body(input_ids) if cache is None else self.net.extend_body(input_ids, cache.state)
        logits = self.net.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            if logits_to_keep:
                raise UserError("labels need the logits of every token; leave logits_to_keep out")
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{_KEY: cache})
        return output.to_tuple() if return_dict is False else output

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *arguments: Any, **options: Any
    ) -> None:
        """Put our cache where ``generate`` looks for one, unless the caller gave one or wants none."""
        given = model_kwargs.pop(_KEY, None)
        if given is not None and not isinstance(given, FlowHNCache):
            raise UserError(
                f"a {type(given).__name__} cannot hold a flowhn model's states; leave the cache to generate"
            )
        if given is None and generation_config.use_cache is not False:
            given = self.new_cache()
        if given is not None:
            model_kwargs[_KEY] = given

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """The tokens that the cache has not read yet (``kwargs`` by that name: generate looks for it)."""
        cache = kwargs.get(_KEY)
        seen = cache.get_seq_length() if cache is not None else 0
        inputs = {"input_ids": input_ids[:, seen:] if seen < input_ids.shape[1] else input_ids[:, -1:]}
        inputs["attention_mask"] = kwargs.get("attention_mask")
        inputs["use_cache"] = cache is not None
        inputs["logits_to_keep"] = kwargs.get("logits_to_keep") or 0
        if cache is not None:
            inputs[_KEY] = cache
        return inputs
