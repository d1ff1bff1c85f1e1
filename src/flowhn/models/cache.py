"""What a model keeps of the tokens it has read, so that the next ones cost no recomputation of the prefix.

Every mixer, block and model has ``new_cache()`` and ``extend(x, cache)``: the outputs of n new tokens (a prompt, a part of
one, or a single token) behind those in the cache, which it then holds as well. ``extend`` on a new cache runs the same
parallel kernels as ``forward``.
Letters: B batch, n new tokens, S visible tokens, E channels, K taps of a convolution, N d_state, H heads, P headdim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

_GROWTH = 256  # tokens by which a buffer of keys and values grows, so that most steps copy nothing


@dataclass(frozen=True)
class Sight:
    """Keys and values that ``k.shape[2] - n`` earlier tokens and n new ones give: each (B, n_kv_heads, S, d_head).

    ``places`` (S,) says where each stands among the tokens that this attention was given; None: 0, 1, 2, ...
    ``start`` is the place of the first new token.
    """

    k: Tensor
    v: Tensor
    places: Tensor | None
    start: int

    def last_token(self, window: int | None, n_meta: int) -> tuple[Tensor, Tensor]:
        """The keys and values that one new token sees through a window with meta tokens in front of it."""
        size = self.k.shape[2]
        if window is None or size <= n_meta + window:
            return self.k, self.v  # a cache with this window has dropped the others
        k, v = (torch.cat((t[:, :, :n_meta], t[:, :, size - window :]), dim=2) for t in (self.k, self.v))
        return k, v

    def mask(self, n_new: int, window: int | None, n_meta: int) -> Tensor:
        """Boolean (n, S): may a new token (row) see a key (column)?"""
        query = torch.arange(self.start, self.start + n_new, device=self.k.device)[:, None]
        key = torch.arange(self.k.shape[2], device=self.k.device) if self.places is None else self.places
        visible = key <= query
        return visible if window is None else visible & ((key > query - window) | (key < n_meta))


class KVCache:
    """Keys and values of one attention.

    Args:
        window: keep the last ``window`` tokens (less the one to come) and the ``n_meta`` first ones; None: all.
        n_meta: tokens at the start that stay.
    """

    def __init__(self, *, window: int | None = None, n_meta: int = 0) -> None:
        self.window, self.n_meta = window, n_meta
        self.seen = 0  # tokens read so far
        self.kept = 0  # of which are in the buffers
        self._k: Tensor | None = None  # (B, n_kv_heads, capacity, d_head)
        self._v: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> Sight:
        """Take the keys and values of n new tokens; returns what those tokens may look at."""
        start, places = self.seen, self._places(k)
        k, v = self._put(k), self._put(v, values=True)
        self.seen, self.kept = self.seen + k.shape[2] - self.kept, k.shape[2]
        sight = Sight(k, v, places, start)
        if self.window is not None:
            self._drop()
        return sight

    def _places(self, k: Tensor) -> Tensor | None:
        if self.kept == self.seen:
            return None
        n_new, first = k.shape[2], self.seen - (self.kept - self.n_meta)
        pieces = (torch.arange(self.n_meta, device=k.device), torch.arange(first, self.seen + n_new, device=k.device))
        return torch.cat(pieces)

    def _put(self, new: Tensor, *, values: bool = False) -> Tensor:
        name = "_v" if values else "_k"
        buffer, size = getattr(self, name), self.kept + new.shape[2]
        if buffer is None or self.window is not None:  # a windowed cache is short and kept exact
            full = new if buffer is None else torch.cat((buffer, new), dim=2)
            setattr(self, name, full)
            return full
        if size > buffer.shape[2]:
            capacity = -(-size // _GROWTH) * _GROWTH
            grown = buffer.new_empty(*buffer.shape[:2], capacity, buffer.shape[3])
            grown[:, :, : self.kept] = buffer[:, :, : self.kept]
            setattr(self, name, buffer := grown)
        buffer[:, :, self.kept : size] = new
        return buffer[:, :, :size]

    def _drop(self) -> None:
        """Forget what no later token will see."""
        last = self.window - 1
        if self.kept <= self.n_meta + last:
            return
        first = self.kept - last
        self._k, self._v = (torch.cat((t[:, :, : self.n_meta], t[:, :, first:]), dim=2) for t in (self._k, self._v))
        self.kept = self.n_meta + last

    def tensors(self) -> Iterator[Tensor]:
        """The parts that are in use."""
        for buffer in (self._k, self._v):
            if buffer is not None:
                yield buffer[:, :, : self.kept]

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        """Replace every tensor (batch first) by ``change`` of it."""
        self._k, self._v = (None if t is None else change(t) for t in (self._k, self._v))


class SSMState:
    """The recurrent state of one SSM mixer: the convolution's last inputs (B, K - 1, channels) and the scan's state."""

    def __init__(self) -> None:
        self.tail: Tensor | None = None
        self.h: Tensor | None = None  # Mamba-1 (B, E, N), Mamba-2 (B, H, P, N); float32 or wider

    def keep_tail(self, x: Tensor, width: int) -> Tensor:
        """x (B, n, channels) with the kept tail (or zeros) in front: (B, K - 1 + n, channels); its end is kept."""
        padded = F.pad(x, (0, 0, width - 1, 0)) if self.tail is None else torch.cat((self.tail, x), dim=1)
        self.tail = padded[:, padded.shape[1] - width + 1 :].clone()
        return padded

    def tensors(self) -> Iterator[Tensor]:
        return (t for t in (self.tail, self.h) if t is not None)

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.tail, self.h = (None if t is None else change(t) for t in (self.tail, self.h))


@dataclass
class BlockCache:
    """A block with two mixers: FlowHN's branches, or Hymba's heads (whose second layers of a pair own no keys).

    ``seen`` tokens have come by; ``window`` freezes a split's routing that the split itself leaves open; ``conv`` holds the
    last inputs of a convolution in front of both.
    """

    attention: KVCache | None
    ssm: SSMState
    window: int | None = None
    seen: int = 0
    conv: SSMState | None = None

    def _parts(self) -> list[KVCache | SSMState]:
        return [part for part in (self.attention, self.ssm, self.conv) if part is not None]

    def tensors(self) -> Iterator[Tensor]:
        for part in self._parts():
            yield from part.tensors()

    def map(self, change: Callable[[Tensor], Tensor]) -> None:
        for part in self._parts():
            part.map(change)


@dataclass
class ModelCache:
    """One cache for each layer; ``seen`` counts tokens of the text, without meta tokens."""

    layers: list[KVCache | SSMState | BlockCache] = field(default_factory=list)
    seen: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all sequences' keys, values and states that are in use."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer.tensors())

    def reorder(self, rows: Tensor) -> None:
        """Make sequence i continue what sequence ``rows[i]`` has read (beam search; rows may repeat)."""
        for layer in self.layers:
            layer.map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))
