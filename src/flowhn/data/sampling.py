"""Which training row is sample number ``g`` of a run: a pure function of (seed, g).

Samples are numbered over the whole run and all devices. Data epoch ``e`` holds samples ``e * n_rows`` to
``(e + 1) * n_rows - 1`` in a permutation drawn from (seed, e). A stopped run therefore goes on with exactly the rows it
would have seen, whatever the number of devices or loader workers before and after.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler


class SampleOrder:
    """Row of each global sample.

    Args:
        n_rows: rows of the training part.
        seed: the run's seed.
    """

    def __init__(self, *, n_rows: int, seed: int) -> None:
        if n_rows < 1:
            raise ValueError("an order needs at least one row")
        self._n_rows, self._seed = n_rows, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, sample: int) -> int:
        epoch, position = divmod(sample, self._n_rows)
        if epoch != self._epoch:
            self._permutation = np.random.default_rng([self._seed, epoch]).permutation(self._n_rows)
            self._epoch = epoch
        return int(self._permutation[position])


class GlobalOrderSampler(Sampler[int]):
    """One device's share of a run's samples: ``start + rank``, ``start + rank + world_size``, ... of the global order.

    All devices get the same number of samples; up to ``world_size - 1`` at the end of the run are left out.

    Args:
        order: row of each global sample.
        n_samples: samples of the whole run, over all devices.
        start: samples that all devices together have seen before.
        rank, world_size: this device and the number of devices.
    """

    def __init__(
        self, *, order: SampleOrder, n_samples: int, start: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.order, self.n_samples, self.start = order, n_samples, start
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return max(0, self.n_samples - self.start) // self.world_size

    def __iter__(self) -> Iterator[int]:
        return _GlobalOrderIterator(self)


class _GlobalOrderIterator(Iterator[int]):
    """Iterator whose state is the position in the whole run, so that loading it never skips twice after a start."""

    def __init__(self, sampler: GlobalOrderSampler) -> None:
        self._sampler = sampler
        self._seen = sampler.start  # by all devices together

    def __iter__(self) -> _GlobalOrderIterator:
        return self

    def __next__(self) -> int:
        sampler = self._sampler
        if self._seen + sampler.world_size > sampler.n_samples:
            raise StopIteration
        row = sampler.order[self._seen + sampler.rank]
        self._seen += sampler.world_size
        return row

    def state_dict(self) -> dict[str, Any]:
        """Samples seen by all devices together."""
        return {"samples_seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after ``samples_seen`` samples, also where another number of devices saved the state."""
        self._seen = int(state["samples_seen"])
