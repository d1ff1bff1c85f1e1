"""Decoding: one token after another, with a cache or by reading the whole text again, and what a decoded token costs.

Letters: B batch, P tokens of the prompt, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flowhn.errors import UserError
from flowhn.models.lm import CausalLM


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits.

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among the k likeliest tokens only; None: all.
        top_p: draw among the fewest tokens whose probabilities reach p together; None: all.

    Raises:
        UserError: a value out of its range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise UserError(f"--temperature={self.temperature} must be 0 (the likeliest token) or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"--top-k={self.top_k} must be at least 1")
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise UserError(f"--top-p={self.top_p} must be above 0 and at most 1")

    def draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """(B, V) -> (B,) long. Drawn on the CPU: a seed gives the same tokens on every device with the same logits."""
        logits = logits.float().cpu()
        if self.temperature == 0.0:
            return logits.argmax(dim=-1)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        probabilities = logits.softmax(dim=-1)
        if self.top_p is not None:
            ordered, order = probabilities.sort(dim=-1, descending=True)
            # A token is out when those before it reach p already; the likeliest one always stays.
            out = ordered.cumsum(dim=-1) - ordered >= self.top_p
            out = out.scatter(1, order, out)
            probabilities = probabilities.masked_fill(out, 0.0)
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)


def generate_tokens(
    model: CausalLM,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    seed: int = 0,
    window: int | None = None,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Yield (B,) long, one new token of each sequence at a time.

    Args:
        model: in eval mode.
        prompt: (B, P) long on the model's device, P >= 1.
        max_new_tokens: how many.
        sampling: None takes the likeliest token.
        seed: of the draws.
        window: freezes the routing of splits that leave it open (see :meth:`CausalLM.new_cache`); used with a cache only.
        use_cache: read each token once. False runs the whole forward on the whole text for every token, with the
            routing that ``forward`` has.

    Raises:
        UserError: an empty prompt; a cache without a ``window`` for a split that needs one.
    """
    if prompt.shape[1] < 1:
        raise UserError("--prompt is empty and the tokenizer has no token to begin with; give some text")
    sampling, generator = sampling or Sampling(), torch.Generator().manual_seed(seed)
    cache = model.new_cache(window=window) if use_cache else None
    text = new = prompt
    for _ in range(max_new_tokens):
        with torch.no_grad():
            hidden = model.body(text) if cache is None else model.extend_body(new, cache)
            token = sampling.draw(model.lm_head(hidden[:, -1]), generator).to(prompt.device)
        yield token
        new = token[:, None]
        if cache is None:
            text = torch.cat((text, new), dim=1)


@dataclass(frozen=True)
class DecodeCost:
    """One decoded token: its FLOPs, the bytes by which it grows the cache, and the bytes of the cache after it.

    Means over several tokens where a routing differs from token to token.
    """

    flops: float
    added_bytes: float
    held_bytes: int


def decode_cost(model: CausalLM, position: int, *, n_tokens: int = 1, window: int | None = None) -> DecodeCost:
    """What the tokens ``position`` to ``position + n_tokens - 1`` (from 0) of one sequence cost to decode, on average.

    FLOPs by each module's ``step_flops``; bytes by running the model on the meta device, where nothing is computed, so
    that they are those of :class:`~flowhn.models.cache.ModelCache` in the model's own type.

    Args:
        window: as in :meth:`CausalLM.new_cache`.

    Raises:
        UserError: a proportional split and no ``window``.
    """
    flops = sum(model.step_flops(position + i, window=window) for i in range(n_tokens)) / n_tokens
    shadow = copy.deepcopy(model).to("meta")
    before, after = (_cache_bytes(shadow, n, window) for n in (position, position + n_tokens))
    return DecodeCost(flops, (after - before) / n_tokens, after)


def _cache_bytes(model: CausalLM, n_tokens: int, window: int | None) -> int:
    if n_tokens == 0:
        return 0
    cache = model.new_cache(window=window)
    with torch.no_grad():
        model.extend_body(torch.zeros(1, n_tokens, dtype=torch.long, device="meta"), cache)
    return cache.nbytes
