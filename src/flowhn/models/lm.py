"""The language model around the blocks: embedding, a cycled pattern of blocks, final norm, LM head; one initialisation.

Letters: B batch, T tokens, M meta tokens, D d_model, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from flowhn.errors import UserError
from flowhn.models.cache import ModelCache
from flowhn.models.norms import RMSNorm, to_autocast

INIT_STD = 0.02  # standard deviation of linear and embedding weights, as in the published code and in Llama


class CausalLM(nn.Module):
    """Embedding -> ``n_layers`` blocks -> RMSNorm -> LM head.

    Args:
        vocab_size: V.
        d_model: D.
        n_layers: number of blocks.
        pattern: names of ``blocks``, cycled over the depth (Jamba: ``[mamba, mamba, attention, mamba]``).
        blocks: name -> builder of a block, called with ``layer_idx`` and ``n_layers``
            (protocol: :mod:`flowhn.models.blocks`).
        n_meta_tokens: M learnt vectors in front of each sequence; they pass through every layer and give no logits
            (Hymba).
        tie_embeddings: the LM head uses the embedding's weight.
        norm_eps: added to the mean square in the final norm.
        residual_in_fp32: under autocast, the sum that runs through the layers stays in float32, as the embedding gives it
            (mamba_ssm's default); false: in autocast's type (Megatron's default), for half the memory traffic of all
            norms and sums. Without autocast it changes nothing.

    Raises:
        UserError: a size that is not positive, or a pattern that names a block which is not there.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        d_model: int,
        n_layers: int,
        pattern: Sequence[str],
        blocks: Mapping[str, Callable[..., nn.Module]],
        n_meta_tokens: int = 0,
        tie_embeddings: bool = False,
        norm_eps: float = 1e-6,
        residual_in_fp32: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(residual_in_fp32, bool):
            raise UserError(f"model.residual_in_fp32={residual_in_fp32} must be true or false")
        self.residual_in_fp32 = residual_in_fp32
        for key, value in (("vocab_size", vocab_size), ("d_model", d_model), ("n_layers", n_layers)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"model.{key}={value} must be a positive integer")
        unknown = sorted(set(pattern) - set(blocks))
        if unknown or not pattern:
            raise UserError(f"model.pattern={list(pattern)} must name blocks among {', '.join(blocks)}")
        self.vocab_size, self.d_model, self.n_meta_tokens = vocab_size, d_model, n_meta_tokens
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.meta_tokens = nn.Parameter(torch.empty(n_meta_tokens, d_model)) if n_meta_tokens else None
        self.layers = nn.ModuleList(
            blocks[pattern[i % len(pattern)]](layer_idx=i, n_layers=n_layers) for i in range(n_layers)
        )
        self.norm = RMSNorm(d_model, eps=norm_eps)
        self.lm_head = nn.Linear(d_model, vocab_size, bias=False)
        if tie_embeddings:
            self.lm_head.weight = self.embedding.weight
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Draw every linear and embedding weight once; parameters marked ``_no_reinit`` keep what their mixer gave."""
        drawn: set[nn.Parameter] = set()  # a tied weight is one parameter and is drawn once
        for module in self.modules():
            if not isinstance(module, nn.Linear | nn.Embedding):
                continue
            weight, bias = module.weight, getattr(module, "bias", None)
            if weight not in drawn and not getattr(weight, "_no_reinit", False):
                nn.init.normal_(weight, std=INIT_STD)
                drawn.add(weight)
            if bias is not None and not getattr(bias, "_no_reinit", False):
                nn.init.zeros_(bias)
        if self.meta_tokens is not None:
            nn.init.normal_(self.meta_tokens, std=INIT_STD)

    def _embed(self, input_ids: Tensor) -> Tensor:
        """(B, T) long -> (B, T, D) in the type of the residual sum."""
        x = self.embedding(input_ids)
        return x if self.residual_in_fp32 else to_autocast(x)

    def body(self, input_ids: Tensor) -> Tensor:
        """(B, T) long -> (B, T, D): the hidden states after the final norm, meta tokens left out."""
        x = self._embed(input_ids)  # (B, T, D)
        if self.meta_tokens is not None:
            meta = self.meta_tokens.to(x.dtype).expand(x.shape[0], -1, -1)
            x = torch.cat([meta, x], dim=1)  # (B, M + T, D)
        carry = None
        for layer in self.layers:
            x, carry = layer(x, carry)
        return self.norm(x[:, self.n_meta_tokens :])

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, T) long -> logits (B, T, V)."""
        return self.lm_head(self.body(input_ids))

    def new_cache(self, *, window: int | None = None) -> ModelCache:
        """An empty cache for :meth:`extend`.

        Args:
            window: routes as if every split had this window; splits with a window of their own keep it.

        Raises:
            UserError: a split's window is null and there is no ``window``: a token's branch would depend on tokens to come.
        """
        return ModelCache([layer.new_cache(window=window) for layer in self.layers])

    def extend_body(self, input_ids: Tensor, cache: ModelCache) -> Tensor:
        """(B, n) long -> (B, n, D): :meth:`body` of n new tokens behind those in ``cache``, which takes them up."""
        x = self._embed(input_ids)  # (B, n, D)
        n_meta = 0
        if self.meta_tokens is not None and not cache.seen:
            n_meta = self.n_meta_tokens
            x = torch.cat([self.meta_tokens.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)  # (B, M + n, D)
        carry = None
        for layer, own in zip(self.layers, cache.layers, strict=True):
            x, carry = layer.extend(x, own, carry)
        cache.seen += input_ids.shape[1]
        return self.norm(x[:, n_meta:])

    def extend(self, input_ids: Tensor, cache: ModelCache) -> Tensor:
        """(B, n) long, n >= 1 -> logits (B, n, V): with the right routing those of :meth:`forward` on the whole text."""
        return self.lm_head(self.extend_body(input_ids, cache))

    @property
    def length_dependent(self) -> bool:
        """Whether the logits of a prefix depend on what follows only by its length; such inputs must not be padded."""
        return any(getattr(layer, "length_dependent", False) for layer in self.layers)

    def flops(self, n_tokens: int) -> int:
        """Forward FLOPs of one sequence of ``n_tokens``, LM head included; a training step costs three times this."""
        head = 2 * self.d_model * self.vocab_size * n_tokens
        return head + sum(layer.flops(n_tokens + self.n_meta_tokens) for layer in self.layers)

    def step_flops(self, n_before: int, *, window: int | None = None) -> int:
        """FLOPs of one token decoded with a cache of ``n_before`` others (meta tokens not counted among them).

        Args:
            window: as in :meth:`new_cache`.
        """
        before = n_before + self.n_meta_tokens
        return 2 * self.d_model * self.vocab_size + sum(
            layer.step_flops(before, window=window) for layer in self.layers
        )

    def num_parameters(self) -> int:
        """Number of parameters, embeddings included, a tied weight counted once."""
        return sum(parameter.numel() for parameter in self.parameters())
