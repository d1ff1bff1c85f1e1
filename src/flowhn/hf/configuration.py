"""The configuration of an exported model: the tree of ``flowhn.models`` classes, and the keys that transformers reads."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class FlowHNConfig(PretrainedConfig):
    """config.json of an exported model.

    Args:
        net: the network as a tree of plain containers, as in a run's config: ``_target_`` names a class of
            ``flowhn.models``, ``_partial_`` leaves it to be called by its owner.
        run: what flowhn's own commands read of the run's config (data, evaluation, ...); transformers ignores it.
        max_position_embeddings: tokens of a training row; lm-eval cuts its inputs to this.
        routing_window: length at which decoding with a cache freezes a proportional split.
        vocab_size, hidden_size, num_hidden_layers: of the network, for tools that ask.
    """

    model_type = "flowhn"

    def __init__(
        self,
        net: dict[str, Any] | None = None,
        run: dict[str, Any] | None = None,
        max_position_embeddings: int = 1024,
        routing_window: int | None = None,
        vocab_size: int = 0,
        hidden_size: int = 0,
        num_hidden_layers: int = 0,
        use_cache: bool = True,
        **options: Any,
    ) -> None:
        self.net = net or {}
        self.run = run or {}
        self.max_position_embeddings = max_position_embeddings
        self.routing_window = routing_window or max_position_embeddings
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.use_cache = use_cache
        options.setdefault("tie_word_embeddings", bool(self.net.get("tie_embeddings", False)))
        super().__init__(**options)
