"""Token streams to rows of ``seq_len + 1`` tokens, written as Arrow.

A row's inputs are ``row[:-1]`` and its targets ``row[1:]``. Packed rows overlap by one token, so every token of the
stream but the first is a target exactly once. Padded rows hold one document each, truncated or filled up (the published
way).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that holds every token id: half the disk for vocabularies up to 65,536."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)


class RowWriter:
    """Writes rows to one Arrow stream file, and counts what training wants to know of them.

    Attributes:
        n_rows: rows written.
        n_tokens: tokens that count toward a budget.
        counts: (V,) how often each token is a real target.
        digest: running SHA-256 over the rows as little-endian 32-bit integers.
    """

    def __init__(self, path: Path, *, seq_len: int, vocab_size: int, padded: bool, digest: hashlib._Hash) -> None:
        dtype = token_dtype(vocab_size)
        fields = [("input_ids", pa.list_(pa.from_numpy_dtype(dtype), seq_len + 1))]
        self._schema = pa.schema(fields + [("n_real", pa.int32())] * padded)
        self._file = pa.OSFile(str(path), "wb")
        self._stream = pa.ipc.new_stream(self._file, self._schema)
        self._dtype, self._seq_len = dtype, seq_len
        self.n_rows, self.n_tokens = 0, 0
        self.counts = np.zeros(vocab_size, dtype=np.int64)
        self.digest = digest

    def write(self, rows: np.ndarray, n_real: np.ndarray | None = None) -> None:
        """Append rows (R, seq_len + 1); ``n_real`` (R,) gives the unpadded tokens of each where rows are padded."""
        if not len(rows):
            return
        rows = np.ascontiguousarray(rows, dtype=self._dtype)
        self.digest.update(rows.astype("<u4").tobytes())
        columns: list[pa.Array] = [pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])]
        targets = rows[:, 1:]
        if n_real is None:
            self.n_tokens += targets.size
        else:
            columns.append(pa.array(n_real, type=pa.int32()))
            self.n_tokens += int(np.minimum(n_real, self._seq_len).sum())
            targets = targets[np.arange(1, rows.shape[1]) < n_real[:, None]]
        self.counts += np.bincount(targets.reshape(-1), minlength=len(self.counts))
        self.n_rows += len(rows)
        self._stream.write_batch(pa.record_batch(columns, schema=self._schema))

    def close(self) -> None:
        """Finish the file; calling it again is harmless."""
        if not self._file.closed:
            self._stream.close()
            self._file.close()


def packed_rows(chunks: Iterable[np.ndarray], seq_len: int) -> Iterator[np.ndarray]:
    """Rows (R, seq_len + 1) of a token stream given in chunks of any length; an unfilled last row is dropped."""
    rest = np.empty(0, dtype=np.int64)
    for chunk in chunks:
        stream = np.concatenate([rest, chunk])
        count = max(0, (len(stream) - 1) // seq_len)
        if count:
            yield np.lib.stride_tricks.sliding_window_view(stream, seq_len + 1)[: count * seq_len : seq_len]
        rest = stream[count * seq_len :]


def padded_row(document: np.ndarray, seq_len: int, pad_id: int) -> tuple[np.ndarray, int]:
    """A document truncated or filled up to ``seq_len + 1`` tokens, and how many of them are its own."""
    n_real = min(len(document), seq_len + 1)
    row = np.full(seq_len + 1, pad_id, dtype=np.int64)
    row[:n_real] = document[:n_real]
    return row, n_real


def unigram_cross_entropy(train_counts: np.ndarray, val_counts: np.ndarray) -> float:
    """Nats per token of the training unigram distribution, smoothed by adding one, on validation counts; both (V,)."""
    log_p = np.log(train_counts + 1.0) - np.log(train_counts.sum() + len(train_counts))
    return float(-(val_counts * log_p).sum() / val_counts.sum())
