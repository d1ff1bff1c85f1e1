"""How much disk a prepared data set takes, told before anything is written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowhn.data.corpora import open_corpus
from flowhn.data.corpora.readers import COMPRESSIONS, PARQUET
from flowhn.data.packing import token_dtype

# Tokens of a byte times log2 of the vocabulary, an upper end for words of random letters too. Measured: 3.4 in the docs
# corpus (vocabulary 4096), 2.6 in that of docs/reliability/long_run.json (32,768).
TOKEN_BITS_PER_BYTE = 4.5
TEXT_PER_FILE_BYTE = {"packed": 4.0, "plain": 1.0}  # compressed text and Parquet unfold
DOCS_BYTES = 2.5e6
STATS_BYTES = 8e3  # statistics, states of the parts, lock
SLIMPAJAMA_BYTES = 25e9  # 6B tokens


def disk_estimate(spec: Mapping[str, Any], *, vocab_size: int, seq_len: int) -> tuple[float, float]:
    """Bytes that preparing a ``data`` config takes at its peak, and bytes that stay in the cache.

    Within ``STATS_BYTES`` for ``data=random``; else an upper estimate from the size of the text: held-out text and
    tokens stay; text, or tokens three times (encoded, in rows, saved), are there at the peak. A padded corpus
    (``packing=pad``) takes a row per document and is not bounded by this.

    Raises:
        UserError: files that are not there.
    """
    token = token_dtype(vocab_size).itemsize
    if spec["name"] == "random":
        rows = int(spec["n_rows"]) + int(spec["n_val_rows"])
        kept = float(rows * (seq_len + 1) * token)
        return 2 * kept + STATS_BYTES, kept + STATS_BYTES
    text = _text_bytes(spec)
    tokens = text * TOKEN_BITS_PER_BYTE / math.log2(vocab_size) * token * (seq_len + 1) / seq_len
    held_out = text * float(spec.get("val_fraction") or 0.0)
    return max(1.05 * text, 3 * tokens) + held_out + STATS_BYTES, tokens + held_out + STATS_BYTES


def shown_bytes(n: float) -> str:
    """Bytes for a reader, three digits at most below 100 GB, rounded up: what is announced is never too little."""
    for unit in ("B", "kB", "MB"):
        if n < 999.5:
            return f"{math.ceil(n)} {unit}" if n >= 100 or unit == "B" else f"{math.ceil(n * 10) / 10:.1f} {unit}"
        n /= 1000
    return f"{math.ceil(n * 10) / 10:,.1f} GB"


def _text_bytes(spec: Mapping[str, Any]) -> float:
    if spec["name"] == "docs":
        return DOCS_BYTES
    if spec["name"] == "slimpajama":
        return SLIMPAJAMA_BYTES
    corpus = open_corpus(spec)
    return sum(_unfolded(path) for path in (*corpus.paths, *corpus.val_paths))


def _unfolded(path: Path) -> float:
    kind = "packed" if path.suffix.lower() in (*COMPRESSIONS, *PARQUET) else "plain"
    return path.stat().st_size * TEXT_PER_FILE_BYTE[kind]
