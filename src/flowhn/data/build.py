"""Building one prepared data set in an empty folder: documents, tokeniser, token rows, statistics."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from flowhn.data.corpora import Corpus
from flowhn.data.packing import RowWriter, packed_rows, padded_row, unigram_cross_entropy
from flowhn.data.prepared import STATS_NAME, TOKENIZER_NAMES
from flowhn.data.shards import (
    PARTS,
    PIECE_CHARS,
    cut_pieces,
    iter_tokens,
    publish,
    read_pieces,
    sample_pieces,
    tokenise,
    write_pieces,
)
from flowhn.data.tokenization import TextTokenizer, import_tokenizer, open_tokenizer, train_bpe
from flowhn.errors import UserError

__all__ = ["PIECE_CHARS", "build_random", "build_text", "cut_pieces"]

WORK = "work"  # the sub-folder of intermediate files
TRAINING_CHARS = 100_000_000  # BPE statistics need no more text than this; an even sample is taken of larger corpora
CHARS_PER_PROCESS = 20_000_000  # below this a second process costs more than it saves


def build_random(folder: Path, spec: Mapping[str, Any], *, vocab_size: int, seq_len: int) -> None:
    """Uniformly random tokens, seeded: ``n_rows`` training and ``n_val_rows`` validation rows.

    Raises:
        UserError: a number of rows that is not positive.
    """
    digest = hashlib.sha256()
    writers = {}
    for index, (part, key) in enumerate(zip(PARTS, ("n_rows", "n_val_rows"), strict=True)):
        count = spec.get(key)
        if not isinstance(count, int) or count < 1:
            raise UserError(f"data.{key}={count} must be a whole number of rows, at least 1")
        generator = np.random.default_rng([int(spec.get("seed") or 0), index])
        writer = _row_writer(folder, part, digest, seq_len=seq_len, vocab_size=vocab_size, padded=False)
        for start in range(0, count, 1024):
            writer.write(generator.integers(vocab_size, size=(min(1024, count - start), seq_len + 1)))
        writers[part] = writer
    _finish(folder, writers, {"tokenizer_size": None, "vocab_size": vocab_size, "seq_len": seq_len, "packing": "pack"})


def build_text(
    folder: Path,
    corpus: Corpus,
    spec: Mapping[str, Any],
    *,
    vocab_size: int,
    seq_len: int,
    report: Callable[[str], None],
) -> None:
    """Tokenise a corpus into ``folder``; goes on where a killed build in the same folder was.

    Raises:
        UserError: documents that cannot be read, a tokeniser larger than the vocabulary, too little text for one row.
    """
    source = str(spec.get("tokenizer") or "train")
    if source != "train":  # first, because reading a large corpus may take hours
        import_tokenizer(source, folder)
        _open_tokenizer(folder, vocab_size)
    read = _read_documents(folder, corpus, report)
    if source == "train" and not (folder / "tokenizer.json").is_file():
        report("training the tokenizer")
        _train_tokenizer(folder, vocab_size, read["train"])
    tokenizer = _open_tokenizer(folder, vocab_size)
    packing = str(spec.get("packing") or "pack")
    digest = hashlib.sha256()
    writers = {}
    for part in PARTS:
        report(f"tokenising the {part} part, {read[part]['chars']:,} characters")
        _tokenise(folder, part, read[part], spec.get("num_proc"), vocab_size)
        report(f"writing the rows of the {part} part")
        tokens = iter_tokens(folder / WORK, part, read[part]["shards"])
        writer = _row_writer(folder, part, digest, seq_len=seq_len, vocab_size=vocab_size, padded=packing == "pad")
        total = _write_rows(writer, tokens, seq_len=seq_len, pad_id=tokenizer.pad_id, packing=packing)
        if not writer.n_rows:
            more = "give more text" if part == "train" else "raise data.val_fraction or give a longer data.val_path"
            size = f"the {part} part of the data ({total} tokens)"
            raise UserError(f"seq_len={seq_len} is longer than {size}; lower seq_len or {more}")
        writers[part] = writer
    stats = {
        "tokenizer_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "vocab_size": vocab_size,
        "seq_len": seq_len,
        "packing": packing,
        "n_documents": sum(read[part]["documents"] for part in PARTS),
        "n_train_documents": read["train"]["documents"],
        "n_val_documents": read["val"]["documents"],
        "n_train_characters": read["train"]["chars"],
        "n_val_characters": read["val"]["chars"],
    }
    _finish(folder, writers, stats)


def _read_documents(folder: Path, corpus: Corpus, report: Callable[[str], None]) -> dict[str, dict[str, int]]:
    work = folder / WORK
    read = read_pieces(work)
    if read is None:
        report("reading documents")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        read = write_pieces(corpus, folder, work)
    else:
        report("going on with the documents that a stopped preparation has read")
    for part in PARTS:
        if not read[part]["documents"]:
            raise UserError(f"data.path gives no {part} document; change data.val_fraction or data.val_path")
    return read


def _train_tokenizer(folder: Path, vocab_size: int, read: Mapping[str, int]) -> None:
    stride = -(-read["chars"] // TRAINING_CHARS)
    texts = sample_pieces(folder / WORK, "train", read["shards"], stride)
    temporary = folder / WORK / "tokenizer.json"
    train_bpe(texts, vocab_size=vocab_size).save(str(temporary))
    publish(temporary, folder / "tokenizer.json")


def _tokenizer_path(folder: Path) -> Path:
    return next(folder / name for name in TOKENIZER_NAMES if (folder / name).exists())


def _open_tokenizer(folder: Path, vocab_size: int) -> TextTokenizer:
    tokenizer = open_tokenizer(_tokenizer_path(folder))
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"vocab_size={vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}; "
            f"set vocab_size={tokenizer.vocab_size} or data.tokenizer=train"
        )
    return tokenizer


def _tokenise(folder: Path, part: str, read: Mapping[str, int], num_proc: Any, vocab_size: int) -> None:
    wanted = int(num_proc or min(os.cpu_count() or 1, 1 + read["chars"] // CHARS_PER_PROCESS))
    path = _tokenizer_path(folder)
    tokenise(folder / WORK, part, path, n_shards=read["shards"], vocab_size=vocab_size, num_proc=wanted)


def _write_rows(writer: RowWriter, tokens: Iterable[pa.RecordBatch], *, seq_len: int, pad_id: int, packing: str) -> int:
    """Write a part's rows; returns its number of tokens before cutting into rows."""
    total = 0

    def chunks() -> Iterator[np.ndarray]:
        nonlocal total
        for batch in tokens:
            chunk = batch.column(0).flatten().to_numpy(zero_copy_only=False)
            total += len(chunk)
            yield chunk.astype(np.int64)

    if packing == "pack":
        for rows in packed_rows(chunks(), seq_len):
            writer.write(rows)
    else:
        document: list[np.ndarray] = []
        rows: list[tuple[np.ndarray, int]] = []
        for piece, is_last in _pieces(tokens):
            document.append(piece)
            if is_last:
                rows.append(padded_row(np.concatenate(document), seq_len, pad_id))
                total += rows[-1][1]
                document = []
            if len(rows) == 1024:
                _write_padded(writer, rows)
        _write_padded(writer, rows)
    return total


def _pieces(tokens: Iterable[pa.RecordBatch]) -> Iterator[tuple[np.ndarray, bool]]:
    for batch in tokens:
        offsets = batch.column(0).offsets.to_numpy()
        ids = np.split(batch.column(0).flatten().to_numpy(zero_copy_only=False), offsets[1:-1])
        yield from zip(ids, batch.column(1).to_pylist(), strict=True)


def _write_padded(writer: RowWriter, batch: list[tuple[np.ndarray, int]]) -> None:
    if batch:
        writer.write(np.stack([row for row, _ in batch]), np.array([n_real for _, n_real in batch]))
        batch.clear()


def _row_writer(folder: Path, part: str, digest: Any, *, seq_len: int, vocab_size: int, padded: bool) -> RowWriter:
    return RowWriter(folder / f"{part}.rows", seq_len=seq_len, vocab_size=vocab_size, padded=padded, digest=digest)


def _dataset(path: Path) -> Any:
    from datasets import Dataset

    return Dataset.from_file(str(path))


def _finish(folder: Path, writers: Mapping[str, RowWriter], stats: dict[str, Any]) -> None:
    """Save the rows with ``datasets``, drop the intermediate files, write the statistics last."""
    for part, writer in writers.items():
        writer.close()
        shutil.rmtree(folder / part, ignore_errors=True)  # a killed process may have left half of it
        _dataset(folder / f"{part}.rows").save_to_disk(str(folder / part))
        stats |= {f"n_{part}_rows": writer.n_rows, f"n_{part}_tokens": writer.n_tokens}
        (folder / f"{part}.rows").unlink()
    stats["unigram_entropy_nats"] = unigram_cross_entropy(writers["train"].counts, writers["val"].counts)
    stats["sha256"] = writers["train"].digest.hexdigest()
    shutil.rmtree(folder / WORK, ignore_errors=True)
    (folder / STATS_NAME).write_text(json.dumps(stats, indent=2) + "\n", encoding="utf-8")
