"""Building one prepared data set in an empty folder: documents, tokeniser, token rows, statistics."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from flowhn.data.corpora import Corpus
from flowhn.data.packing import RowWriter, packed_rows, padded_row, token_dtype, unigram_cross_entropy
from flowhn.data.prepared import HELDOUT_NAME, STATS_NAME, TOKENIZER_NAMES
from flowhn.data.tokenization import TextTokenizer, import_tokenizer, open_tokenizer, train_bpe
from flowhn.errors import UserError

PARTS = ("train", "val")
PIECE_CHARS = 65_536  # a book is tokenised in pieces of this size, so that memory stays bounded
BATCH_PIECES = 64
TRAINING_CHARS = 100_000_000  # BPE statistics need no more text than this; an even sample is taken of larger corpora
CHARS_PER_PROCESS = 20_000_000  # below this a second process costs more than it saves
_PIECES = pa.schema([("text", pa.large_string()), ("last", pa.bool_())])


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
    """Tokenise a corpus into ``folder``.

    Raises:
        UserError: documents that cannot be read, a tokeniser larger than the vocabulary, too little text for one row.
    """
    source = str(spec.get("tokenizer") or "train")
    if source != "train":  # first, because reading a large corpus may take hours
        import_tokenizer(source, folder)
        _open_tokenizer(folder, vocab_size)
    report("reading documents")
    read = _write_pieces(corpus, folder)
    for part in PARTS:
        if not read[part]["documents"]:
            raise UserError(f"data.path gives no {part} document; change data.val_fraction or data.val_path")
    if source == "train":
        report("training the tokenizer")
        _train_tokenizer(folder, vocab_size, read["train"]["chars"])
    tokenizer = _open_tokenizer(folder, vocab_size)
    packing = str(spec.get("packing") or "pack")
    digest = hashlib.sha256()
    writers = {}
    for part in PARTS:
        report(f"tokenising the {part} part, {read[part]['chars']:,} characters")
        tokens = _tokenise(folder, part, tokenizer, spec, read[part]["chars"], vocab_size)
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


def _write_pieces(corpus: Corpus, folder: Path) -> dict[str, dict[str, int]]:
    """Stream documents to disk in pieces; held-out ones also to ``heldout.jsonl``. Returns documents and characters."""
    read = {part: {"documents": 0, "chars": 0} for part in PARTS}
    pieces: dict[str, list[tuple[str, bool]]] = {part: [] for part in PARTS}
    with contextlib.ExitStack() as stack:
        streams = {}
        for part in PARTS:
            file = stack.enter_context(pa.OSFile(str(folder / f"{part}.pieces"), "wb"))
            streams[part] = stack.enter_context(pa.ipc.new_stream(file, _PIECES))
        heldout = stack.enter_context((folder / HELDOUT_NAME).open("w", encoding="utf-8", newline="\n"))

        def flush(part: str) -> None:
            texts, last = zip(*pieces[part], strict=True)
            streams[part].write_batch(pa.record_batch([pa.array(texts, pa.large_string()), list(last)], schema=_PIECES))
            pieces[part].clear()

        for document in corpus.documents():
            part = "val" if document.held_out else "train"
            read[part]["documents"] += 1
            read[part]["chars"] += len(document.text)
            if document.held_out:
                heldout.write(json.dumps({"id": document.id, "text": document.text}) + "\n")
            for piece in cut_pieces(document.text):
                pieces[part].append(piece)
                if len(pieces[part]) == BATCH_PIECES:
                    flush(part)
        for part in PARTS:
            if pieces[part]:
                flush(part)
    return read


def cut_pieces(text: str) -> Iterator[tuple[str, bool]]:
    """Pieces of at most ``PIECE_CHARS`` characters that end at a line end or a blank where there is one, and whether
    each is the document's last."""
    start = 0
    while len(text) - start > PIECE_CHARS:
        stop = start + PIECE_CHARS
        # The blank belongs to the word after it, as byte-level BPE has it.
        cut = max(text.rfind("\n", start + 1, stop) + 1, 0) or text.rfind(" ", start + 1, stop)
        cut = cut if cut > start else stop
        yield text[start:cut], False
        start = cut
    yield text[start:], True


def _train_tokenizer(folder: Path, vocab_size: int, chars: int) -> None:
    stride = -(-chars // TRAINING_CHARS)
    pieces = _dataset(folder / "train.pieces")
    texts = (pieces[index]["text"] for index in range(0, len(pieces), stride))
    train_bpe(texts, vocab_size=vocab_size).save(str(folder / "tokenizer.json"))


def _open_tokenizer(folder: Path, vocab_size: int) -> TextTokenizer:
    path = next(folder / name for name in TOKENIZER_NAMES if (folder / name).exists())
    tokenizer = open_tokenizer(path)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"vocab_size={vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}; "
            f"set vocab_size={tokenizer.vocab_size} or data.tokenizer=train"
        )
    return tokenizer


class _Encode:
    """Maps pieces to token ids; an end-of-text token closes each document. Pickled to worker processes."""

    def __init__(self, tokenizer: TextTokenizer, dtype: np.dtype) -> None:
        self._tokenizer, self._dtype = tokenizer, dtype

    def __call__(self, texts: list[str], last: list[bool]) -> dict[str, list[np.ndarray]]:
        ends = [[self._tokenizer.eos_id] if is_last else [] for is_last in last]
        encoded = self._tokenizer.encode_batch(texts)
        return {"tokens": [np.array(ids + end, dtype=self._dtype) for ids, end in zip(encoded, ends, strict=True)]}


def _tokenise(folder: Path, part: str, tokenizer: TextTokenizer, spec: Mapping, chars: int, vocab_size: int) -> Any:
    """The part's pieces with their tokens, as a memory-mapped ``datasets.Dataset``."""
    from datasets import Features, Sequence, Value

    pieces = _dataset(folder / f"{part}.pieces")
    dtype = token_dtype(vocab_size)
    wanted = spec.get("num_proc") or min(os.cpu_count() or 1, 1 + chars // CHARS_PER_PROCESS)
    num_proc = min(int(wanted), len(pieces))
    return pieces.map(
        _Encode(tokenizer, dtype),
        batched=True,
        batch_size=BATCH_PIECES,
        input_columns=["text", "last"],
        remove_columns=["text"],
        features=Features({"last": Value("bool"), "tokens": Sequence(Value(dtype.name))}),
        writer_batch_size=BATCH_PIECES,
        num_proc=num_proc if num_proc > 1 else None,
        cache_file_name=str(folder / f"{part}.tokens"),
        new_fingerprint=f"flowhn-{part}",
    )


def _write_rows(writer: RowWriter, tokens: Any, *, seq_len: int, pad_id: int, packing: str) -> int:
    """Write a part's rows; returns its number of tokens before cutting into rows."""
    total = 0

    def chunks() -> Iterator[np.ndarray]:
        nonlocal total
        for table in tokens.with_format("arrow").iter(batch_size=BATCH_PIECES):
            chunk = table["tokens"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            total += len(chunk)
            yield chunk.astype(np.int64)

    if packing == "pack":
        for rows in packed_rows(chunks(), seq_len):
            writer.write(rows)
    else:
        document: list[np.ndarray] = []
        batch: list[tuple[np.ndarray, int]] = []
        for piece in tokens.with_format("numpy"):
            document.append(piece["tokens"])
            if piece["last"]:
                batch.append(padded_row(np.concatenate(document), seq_len, pad_id))
                total += batch[-1][1]
                document = []
            if len(batch) == 1024:
                _write_padded(writer, batch)
        _write_padded(writer, batch)
    return total


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
        _dataset(folder / f"{part}.rows").save_to_disk(str(folder / part))
        stats |= {f"n_{part}_rows": writer.n_rows, f"n_{part}_tokens": writer.n_tokens}
    stats["unigram_entropy_nats"] = unigram_cross_entropy(writers["train"].counts, writers["val"].counts)
    stats["sha256"] = writers["train"].digest.hexdigest()
    for path in folder.iterdir():
        if path.is_file() and path.name.split(".", 1)[0].split("_")[0] in PARTS:
            path.unlink()
    (folder / STATS_NAME).write_text(json.dumps(stats, indent=2) + "\n", encoding="utf-8")
