"""lm-eval's view of a model: log-likelihoods of continuations, of whole texts, and greedy generation.

The conventions are those of lm-eval's own ``HFLM``: an empty context is the end-of-text token, texts that are too long lose
their left end, padding is on the right. Two things differ, and neither changes a number: requests whose input is the same
are computed once (several one-token answers to one question), and the LM head runs at the scored positions only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flowhn.errors import UserError
from flowhn.models import CausalLM

# Padded tokens of one forward pass. A CPU is fastest while activations stay in its caches (500 real requests, one core:
# 2.3 s at 2,048, 3.8 s at 8,192); a GPU wants enough to do.
_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384, "mps": 4096}
_LOGITS_NUMBERS = 2**28  # logits held at once: 1 GiB in fp32
_ENCODE_PAIRS = 256  # pairs of texts tokenised at once


class Tokenizer(Protocol):
    """What the adapter asks of a tokenizer."""

    eos_id: int

    def encode(self, text: str) -> list[int]: ...

    # and, where it has one, encode_batch(texts: list[str]) -> list[list[int]], which may use all cores

    def decode(self, ids: Iterable[int]) -> str: ...


class _Generation:
    """One greedy continuation under way: the context's ``ids``, what was ``made`` of it, and the ``text`` so far."""

    def __init__(self, index: int, ids: list[int], stops: Sequence[str], limit: int) -> None:
        self.index, self.ids, self.limit = index, ids, limit
        self._stops = [stop for stop in stops if stop]
        self.made: list[int] = []
        self.text = ""
        self.finished = limit < 1

    def take(self, token: int, tokenizer: Tokenizer) -> None:
        """Append a token, unless it ends the text, and look for a stop string."""
        if token == tokenizer.eos_id:
            self.finished = True
            return
        self.made.append(token)
        text = tokenizer.decode(self.made)
        found = [position for stop in self._stops if (position := text.find(stop)) >= 0]
        self.text = text[: min(found)] if found else text
        self.finished = bool(found) or len(self.made) >= self.limit


class FlowHNLM(TemplateLM):
    """Adapter of a :class:`flowhn.models.CausalLM`.

    Args:
        model: has ``body(ids (B, T)) -> (B, T, D)`` and ``lm_head``. When its ``length_dependent`` is true (a FlowHN split
            that is proportional to the length), padding would change which branch a real token takes, so only inputs of
            one length share a batch.
        tokenizer: ``encode``, ``decode`` and ``eos_id``.
        device: where the model is.
        max_length: longest input in tokens.
        batch_tokens: padded tokens of one forward pass; None: what suits the device. A longer input goes alone.
        dtype: autocast to this type (``torch.bfloat16``); None computes in the model's own.
        encoded: (context, continuation) -> their tokens, filled here and kept by whoever asks several models the same.
        on_progress: called with (requests done, requests).
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        *,
        device: torch.device | str = "cpu",
        max_length: int,
        batch_tokens: int | None = None,
        dtype: torch.dtype | None = None,
        encoded: dict[tuple[str, str], tuple[list[int], list[int]]] | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self._tokenizer = tokenizer
        self._torch_device = torch.device(device)
        self.max_length = max_length
        self._batch_tokens = batch_tokens or _BATCH_TOKENS.get(self._torch_device.type, 4096)
        self._dtype = dtype
        self._encoded = {} if encoded is None else encoded
        self._known: dict[str, list[int]] = {}  # tokens of the texts of the batch that is being encoded
        self._on_progress = on_progress or (lambda done, total: None)

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        known = self._known.get(string)
        return self._tokenizer.encode(string) if known is None else known

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        key = (context, continuation)
        if key not in self._encoded:
            self._encoded[key] = super()._encode_pair(context, continuation)
        return self._encoded[key]

    def encode(self, requests: Iterable[Any]) -> None:
        """Tokenise pairs (context, continuation) now, so that the models to come find them in ``encoded``."""
        asked = (request.args for request in requests)
        pairs = [pair for pair in asked if len(pair) == 2 and pair[0] and isinstance(pair[1], str)]
        new = [pair for pair in dict.fromkeys(pairs) if pair not in self._encoded]
        in_batch = getattr(self._tokenizer, "encode_batch", None)
        for start in range(0, len(new), _ENCODE_PAIRS):
            part = new[start : start + _ENCODE_PAIRS]
            if in_batch is not None:  # lm-eval tokenises the context without its last spaces, and the whole
                texts = list(
                    dict.fromkeys(text for context, answer in part for text in (context.rstrip(), context + answer))
                )
                self._known = dict(zip(texts, in_batch(texts), strict=True))
            for pair in part:
                self._encode_pair(*pair)
        self._known = {}

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self.encode(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def _body(self, ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, D), never compiled: a model fresh from training would be compiled again for each new shape."""
        with torch.compiler.set_stance("force_eager"), self._attention(), self._autocast():
            return self.model.body(ids)

    def _attention(self) -> AbstractContextManager[Any]:
        """On CUDA flash attention before cuDNN's, which plans every new shape: FAC_Split's questions took 32 s, not 10."""
        if self._torch_device.type != "cuda":
            return nullcontext()
        order = [
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.MATH,
        ]
        return sdpa_kernel(order, set_priority=True)

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = True, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Sum of log-probabilities of each continuation, and whether greedy decoding would have given it."""
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        by_input: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            by_input.setdefault(tuple((context + continuation)[-(self.max_length + 1) :][:-1]), []).append(index)
        done = 0
        for inputs in self._batches(list(by_input)):
            ids, lengths = self._pad(inputs)
            hidden = self._body(ids)  # (B, T, D)
            asked = []  # (request, row, first scored position, target)
            for row, key in enumerate(inputs):
                for index in by_input[key]:
                    target = requests[index][2][-lengths[row] :]
                    asked.append((index, row, lengths[row] - len(target), target))
            scores = self._score(hidden, [question[1:] for question in asked])
            for (index, *_), score in zip(asked, scores, strict=True):
                results[index] = score
            done += len(asked)
            self._on_progress(done, len(requests))
        return results

    def _score(self, hidden: Tensor, asked: Sequence[tuple[int, int, Sequence[int]]]) -> list[tuple[float, bool]]:
        """Score each (row, first position, target) of ``hidden`` (B, T, D).

        The LM head sees every needed position once, however many targets ask for it, and a bounded number at a time.
        """
        owner = np.repeat(np.arange(len(asked)), [len(target) for *_, target in asked])
        place = np.concatenate(
            [np.arange(first, first + len(target)) + row * hidden.shape[1] for row, first, target in asked]
        )
        wanted = np.concatenate([np.asarray(target, dtype=np.int64) for *_, target in asked])
        places, at = np.unique(place, return_inverse=True)
        rows = max(1, _LOGITS_NUMBERS // self.model.lm_head.weight.shape[0])
        totals = torch.zeros(len(asked), dtype=torch.float64)
        greedy = torch.ones(len(asked), dtype=torch.bool)
        for start in range(0, len(places), rows):
            part = torch.from_numpy(places[start : start + rows]).to(hidden.device)
            with self._autocast():
                logits = self.model.lm_head(hidden.flatten(0, 1)[part])
            if logits.dtype is not torch.float64:
                logits = logits.float()  # (n, V)
            inside = np.flatnonzero((at >= start) & (at < start + rows))
            index = torch.from_numpy(at[inside] - start).to(hidden.device)
            target = torch.from_numpy(wanted[inside]).to(hidden.device)
            log_probs = logits[index, target] - logits.logsumexp(dim=-1)[index]
            right = logits.argmax(dim=-1)[index] == target
            owners = torch.from_numpy(owner[inside])
            totals.index_add_(0, owners, log_probs.double().cpu())
            greedy[owners[~right.cpu()]] = False
        return list(zip(totals.tolist(), greedy.tolist(), strict=True))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of whole texts: disjoint windows of ``max_length`` with one token of context, as ``HFLM`` does."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            pieces = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, pieces):
                windows.append((None, context, continuation))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (log_likelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += log_likelihood
        return totals

    @torch.inference_mode()
    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Greedy continuation until a stop string, the end-of-text token or ``max_gen_toks``.

        A long context has a batch to itself and is read once (see :meth:`_cache`); the others are read again for each token.
        """
        waiting = []
        for index, request in enumerate(requests):
            context, options = request.args
            until = options.get("until") or []
            stops = [until] if isinstance(until, str) else list(until)
            ids = self.tok_encode(context) or [self.eot_token_id]
            waiting.append(_Generation(index, ids, stops, int(options.get("max_gen_toks", 256))))
        done = 0
        for batch in self._generation_batches(waiting):
            cache = self._cache(batch)
            while active := [row for row in batch if not row.finished]:
                for row, token in zip(active, self._next_tokens(active, cache), strict=True):
                    row.take(token, self._tokenizer)
            done += len(batch)
            self._on_progress(done, len(requests))
        return [row.text for row in waiting]

    def _generation_batches(self, waiting: Sequence[_Generation]) -> Iterator[list[_Generation]]:
        """Rows of one length stay of one length while all of them grow, so the rule of :meth:`_batches` holds here too."""
        same_length_only = bool(getattr(self.model, "length_dependent", False))
        batch: list[_Generation] = []
        for row in sorted(waiting, key=lambda row: (-len(row.ids), row.index)):
            longest = min(self.max_length, len(batch[0].ids) + batch[0].limit) if batch else 0
            full = (len(batch) + 1) * longest > self._batch_tokens
            if batch and (full or (same_length_only and len(row.ids) != len(batch[0].ids))):
                yield batch
                batch = []
            batch.append(row)
        if batch:
            yield batch

    def _cache(self, batch: Sequence[_Generation]) -> Any:
        """A decoding cache where it gives the tokens that reading everything again gives, else None.

        That is for one row, which ``max_length`` does not cut, of a model that routes by position and not by length.
        """
        row = batch[0]
        whole = len(row.ids) + row.limit <= self.max_length
        if len(batch) > 1 or not whole or not isinstance(self.model, CausalLM) or self.model.length_dependent:
            return None
        try:
            return self.model.new_cache()
        except (UserError, AttributeError):  # fusion=cross has none, nor has a mixer of the user's own that lacks it
            return None

    def _next_tokens(self, rows: Sequence[_Generation], cache: Any = None) -> list[int]:
        if cache is not None:
            new = (rows[0].ids + rows[0].made)[cache.seen :]
            ids, lengths = self._pad([new])
            with torch.compiler.set_stance("force_eager"), self._attention(), self._autocast():
                hidden = self.model.extend_body(ids, cache)  # (1, n, D)
        else:
            ids, lengths = self._pad([(row.ids + row.made)[-self.max_length :] for row in rows])
            hidden = self._body(ids)  # (B, T, D)
        last = torch.tensor(lengths, device=ids.device) - 1
        with self._autocast():
            logits = self.model.lm_head(hidden[torch.arange(len(rows), device=ids.device), last])  # (B, V)
        return logits.float().argmax(dim=-1).tolist()

    def _batches(self, inputs: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
        """Longest first, so that what does not fit in memory fails at once and padding stays small."""
        same_length_only = bool(getattr(self.model, "length_dependent", False))
        batch: list[tuple[int, ...]] = []
        for key in sorted(inputs, key=lambda ids: (-len(ids), ids)):
            full = batch and (len(batch) + 1) * len(batch[0]) > self._batch_tokens
            if full or (batch and same_length_only and len(key) != len(batch[0])):
                yield batch
                batch = []
            batch.append(key)
        if batch:
            yield batch

    def _pad(self, inputs: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
        lengths = [len(ids) for ids in inputs]
        ids = torch.full((len(inputs), max(lengths)), self.eot_token_id, dtype=torch.long)
        for row, key in enumerate(inputs):
            ids[row, : len(key)] = torch.tensor(key, dtype=torch.long)
        return ids.to(self._torch_device), lengths

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self._torch_device.type, dtype=self._dtype)
