"""Intermediate files of a preparation: text pieces and their tokens, in shards that are there whole or not at all.

A killed preparation goes on where it was: the pieces are complete once ``pieces.json`` is there, each shard's tokens
once they have their final name. At most one shard per process is tokenised again.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from flowhn.data.corpora import Corpus
from flowhn.data.packing import token_dtype
from flowhn.data.prepared import HELDOUT_NAME
from flowhn.data.tokenization import TextTokenizer, open_tokenizer
from flowhn.errors import UserError

PARTS = ("train", "val")
PIECE_CHARS = 65_536  # a book is tokenised in pieces of this size, so that memory stays bounded
BATCH_PIECES = 64
SHARD_CHARS = 16_000_000  # what a killed process does again: a few seconds of work
MARKER = "pieces.json"  # written last: documents, characters and shards of each part
_PIECES = pa.schema([("text", pa.large_string()), ("last", pa.bool_())])


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


class _PieceWriter:
    """Pieces of one part, in numbered shards of about ``SHARD_CHARS`` characters."""

    def __init__(self, work: Path, part: str) -> None:
        self._work, self._part = work, part
        self._batch: list[tuple[str, bool]] = []
        self._open: contextlib.ExitStack | None = None
        self._stream: Any = None
        self._shard_chars = 0
        self.counts = {"documents": 0, "chars": 0, "pieces": 0, "shards": 0}

    def add(self, text: str) -> None:
        self.counts["documents"] += 1
        self.counts["chars"] += len(text)
        for piece in cut_pieces(text):
            self._batch.append(piece)
            self._shard_chars += len(piece[0])
            if len(self._batch) == BATCH_PIECES or self._shard_chars >= SHARD_CHARS:
                self._flush()
            if self._shard_chars >= SHARD_CHARS:
                self.close()

    def _flush(self) -> None:
        if not self._batch:
            return
        if self._open is None:
            self._open = contextlib.ExitStack()
            path = pieces_file(self._work, self._part, self.counts["shards"])
            file = self._open.enter_context(pa.OSFile(str(path), "wb"))
            self._stream = self._open.enter_context(pa.ipc.new_stream(file, _PIECES))
            self.counts["shards"] += 1
        texts, last = zip(*self._batch, strict=True)
        self._stream.write_batch(pa.record_batch([pa.array(texts, pa.large_string()), list(last)], schema=_PIECES))
        self.counts["pieces"] += len(self._batch)
        self._batch.clear()

    def close(self) -> None:
        """Write what is left and end the shard; a later piece begins another."""
        self._flush()
        if self._open is not None:
            self._open.close()
        self._open, self._shard_chars = None, 0


def pieces_file(work: Path, part: str, index: int) -> Path:
    """Where the text of a shard lies; gone once the shard is tokenised."""
    return work / f"{part}-{index:05d}.pieces"


def tokens_file(work: Path, part: str, index: int) -> Path:
    """Where the tokens of a shard lie, whole."""
    return work / f"{part}-{index:05d}.tokens"


def read_pieces(work: Path) -> dict[str, dict[str, int]] | None:
    """Documents, characters, pieces and shards of each part; None where the text has not been read to its end."""
    path = work / MARKER
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_pieces(corpus: Corpus, folder: Path, work: Path) -> dict[str, dict[str, int]]:
    """Stream documents to disk in pieces; held-out ones also to ``heldout.jsonl``. Returns what ``read_pieces`` does.

    Raises:
        UserError: documents that cannot be read.
    """
    writers = {part: _PieceWriter(work, part) for part in PARTS}
    with (folder / HELDOUT_NAME).open("w", encoding="utf-8", newline="\n") as heldout:
        for document in corpus.documents():
            writers["val" if document.held_out else "train"].add(document.text)
            if document.held_out:
                heldout.write(json.dumps({"id": document.id, "text": document.text}) + "\n")
        for writer in writers.values():
            writer.close()
        heldout.flush()
        os.fsync(heldout.fileno())
    read = {part: writer.counts for part, writer in writers.items()}
    for path in work.glob("*.pieces"):
        _sync(path)
    temporary = work / f"{MARKER}.new"
    temporary.write_text(json.dumps(read), encoding="utf-8")
    publish(temporary, work / MARKER)
    return read


def sample_pieces(work: Path, part: str, n_shards: int, stride: int) -> Iterator[str]:
    """Every ``stride``-th piece of a part, streamed."""
    index = 0
    for shard in range(n_shards):
        with _stream(pieces_file(work, part, shard)) as batches:
            for batch in batches:
                yield from batch.column(0).slice((-index) % stride).to_pylist()[::stride]
                index += batch.num_rows


def iter_tokens(work: Path, part: str, n_shards: int) -> Iterator[pa.RecordBatch]:
    """Batches of ``tokens`` (a list per piece) and ``last``, in the documents' order, streamed."""
    for shard in range(n_shards):
        with _stream(tokens_file(work, part, shard)) as batches:
            yield from batches


def tokenise(work: Path, part: str, tokenizer: Path, *, n_shards: int, vocab_size: int, num_proc: int) -> None:
    """Tokenise the shards of a part that are not tokenised yet, in ``num_proc`` processes.

    Raises:
        UserError: one of the processes was killed.
    """
    todo = [index for index in range(n_shards) if not tokens_file(work, part, index).is_file()]
    dtype = token_dtype(vocab_size)
    num_proc = min(num_proc, len(todo))
    if num_proc <= 1:
        opened = open_tokenizer(tokenizer)
        for index in todo:
            _tokenise_shard(work, part, index, opened, dtype)
        return
    stop = multiprocessing.Event()
    with ProcessPoolExecutor(num_proc, initializer=_start_worker, initargs=(tokenizer, os.getpid(), stop)) as pool:
        try:
            for done in as_completed([pool.submit(_run_worker, work, part, index, dtype) for index in todo]):
                done.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a tokenising process was killed, perhaps for want of memory; lower data.num_proc and start again"
            ) from error
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


_worker: dict[str, Any] = {}


def _start_worker(tokenizer: Path, parent: int, stop: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = (
        "false"  # processes, not threads: the library's threads do not survive a fork
    )
    _worker.update(tokenizer=open_tokenizer(tokenizer), stop=stop)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A killed parent cannot stop its processes, and they would keep the cache's lock."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _run_worker(work: Path, part: str, index: int, dtype: np.dtype) -> None:
    _tokenise_shard(work, part, index, _worker["tokenizer"], dtype, _worker["stop"])


def _tokenise_shard(
    work: Path, part: str, index: int, tokenizer: TextTokenizer, dtype: np.dtype, stop: Any = None
) -> None:
    """Map pieces to token ids; an end-of-text token closes each document."""
    schema = pa.schema([("tokens", pa.list_(pa.from_numpy_dtype(dtype))), ("last", pa.bool_())])
    pieces, final = pieces_file(work, part, index), tokens_file(work, part, index)
    temporary = final.with_suffix(".new")
    with _stream(pieces) as batches, pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_stream(file, schema) as out:
        for batch in batches:
            if stop is not None and stop.is_set():
                return
            last = batch.column(1).to_pylist()
            encoded = tokenizer.encode_batch(batch.column(0).to_pylist())
            ids = [np.array(i + [tokenizer.eos_id] * end, dtype=dtype) for i, end in zip(encoded, last, strict=True)]
            offsets = np.cumsum([0, *map(len, ids)], dtype=np.int32)
            tokens = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(ids)))
            out.write_batch(pa.record_batch([tokens, batch.column(1)], schema=schema))
    _sync(temporary)
    publish(temporary, final)
    pieces.unlink()


@contextlib.contextmanager
def _stream(path: Path) -> Iterator[Any]:
    """An Arrow stream read without mapping it, so that a large corpus does not stay in memory."""
    with pa.OSFile(str(path), "rb") as file, pa.ipc.open_stream(file) as batches:
        yield batches


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def publish(temporary: Path, final: Path) -> None:
    """Give a whole file its final name, so that it outlives a loss of power."""
    _sync(temporary)
    os.replace(temporary, final)
