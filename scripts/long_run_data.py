"""Data preparation of a large synthetic corpus, killed in the middle and taken up again (a part of ``long_run.py``).

Run as a program with a JSON file of arguments it does the preparation alone, in a process that can be killed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

WORDS = 150_000  # distinct words of the corpus
ZIPF = 1.07  # exponent of their frequencies
BLOCK_WORDS = 1_000_000
DISK_FACTOR = 3  # the corpus and its intermediate files; the latter are measured as peak_disk_bytes
SEQ_LEN = 1024
ORPHAN_SECONDS = 1.5


def make_corpus(folder: Path, n_bytes: int, *, n_files: int, seed: int) -> int:
    """JSON lines of documents with Zipf-distributed words, about ``n_bytes`` in all; returns the bytes written."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, 12, size=WORDS)
    letters = generator.integers(97, 123, size=int(lengths.sum()), dtype=np.uint8).tobytes().decode()
    ends = np.cumsum(lengths)
    words = np.array([letters[end - length : end] for end, length in zip(ends, lengths, strict=True)], dtype=object)
    cumulative = np.cumsum(1.0 / np.arange(1, WORDS + 1) ** ZIPF)
    written = 0
    for index in range(n_files):
        goal = n_bytes * (index + 1) // n_files
        with (folder / f"part{index}.jsonl").open("w", encoding="utf-8") as stream:
            while written < goal:
                drawn = np.searchsorted(cumulative, generator.random(BLOCK_WORDS) * cumulative[-1])
                tokens = words[np.minimum(drawn, WORDS - 1)].tolist()
                written += _write_documents(stream, tokens, generator, goal - written)
    return written


def _write_documents(stream: Any, tokens: list[str], generator: np.random.Generator, room: int) -> int:
    start = written = 0
    while start < len(tokens) and written < room:
        length = int(generator.lognormal(6.0, 1.0)) + 1
        written += stream.write(json.dumps({"text": " ".join(tokens[start : start + length])}) + "\n")
        start += length
    return written


class Watch(threading.Thread):
    """Samples the memory of a process with its children, and the disk under a folder, until ``stop`` is called.

    Attributes:
        samples: (seconds since the start, resident bytes of all processes, bytes that no file backs).
        peak_disk: bytes under the folder.
    """

    def __init__(self, pid: int, folder: Path | None = None, seconds: float = 0.25) -> None:
        super().__init__(daemon=True)
        self.samples: list[tuple[float, int, int]] = []
        self.peak_disk = 0
        self._process, self._folder, self._seconds = psutil.Process(pid), folder, seconds
        self._stopped = threading.Event()

    def run(self) -> None:
        begun = time.monotonic()
        while not self._stopped.wait(self._seconds):
            try:
                family = [self._process, *self._process.children(recursive=True)]
            except psutil.NoSuchProcess:
                return
            total = anonymous = 0
            for process in family:
                try:
                    memory = process.memory_info()
                except psutil.Error:
                    continue
                total += memory.rss
                anonymous += memory.rss - getattr(memory, "shared", 0)
            self.samples.append((time.monotonic() - begun, total, anonymous))
            if self._folder is not None:
                self.peak_disk = max(self.peak_disk, disk_bytes(self._folder))

    def stop(self) -> None:
        """End the sampling."""
        self._stopped.set()
        self.join()

    def peak(self, column: int = 1) -> int:
        """Largest sample in bytes: column 1 all resident memory, 2 without what files back."""
        return max((sample[column] for sample in self.samples), default=0)


def disk_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; files that vanish meanwhile do not count."""
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except OSError:
                continue
    return total


class Attempt:
    """One process that prepares the corpus; ``stages`` are (seconds, line) as it reports them."""

    def __init__(self, arguments: Path, cache: Path) -> None:
        self.begun = time.monotonic()
        self.stages: list[tuple[float, str]] = []
        command = [sys.executable, str(Path(__file__).resolve()), str(arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.watch = Watch(self.process.pid, cache)
        self.watch.start()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.stages.append((time.monotonic() - self.begun, line.strip()))

    def wait(self, ready: Callable[[Attempt], bool] | None = None) -> bool:
        """Wait for the end (False) or for ``ready`` (True)."""
        while self.process.poll() is None:
            if ready is not None and ready(self):
                return True
            time.sleep(0.02 if ready is not None else 0.2)
        return False

    def end(self) -> float:
        """Seconds that the process lived; to be called when it is dead."""
        self.process.wait()
        seconds = time.monotonic() - self.begun
        self._reader.join(5)
        self.watch.stop()
        return seconds


def _count(cache: Path, pattern: str) -> int:
    return sum(1 for _ in cache.glob(f".building-*/work/{pattern}"))


def _kill_points(cache: Path, n_shards: int, n_chars: int) -> dict[str, Callable[[Attempt], bool]]:
    """When to kill: with a third of the text read, half of the shards tokenised, some rows written."""

    def writes_rows(attempt: Attempt) -> bool:
        says_so = any("writing the rows" in line for _, line in attempt.stages)
        return says_so and any(path.stat().st_size > n_chars // 50 for path in cache.glob(".building-*/train.rows"))

    return {
        "reading": lambda _: _count(cache, "*.pieces") >= max(1, n_shards // 3),
        "tokenising": lambda _: _count(cache, "train-*.tokens") >= max(1, n_shards // 2),
        "rows": writes_rows,
    }


def prepare(corpus: Path, work: Path, *, vocab_size: int, n_chars: int, shard_chars: int, kill: bool) -> dict[str, Any]:
    """Prepare the corpus in a process of its own: killed once while reading, once while tokenising and once while rows
    are written (with ``kill``), then to the end; what each restart had and what was lost is counted."""
    cache = work / ("cache-killed" if kill else "cache-whole")
    cache.mkdir()
    spec = {"name": "files", "path": str(corpus), "val_fraction": 0.02, "tokenizer": "train", "packing": "pack"}
    given = {
        "spec": spec,
        "vocab_size": vocab_size,
        "seq_len": SEQ_LEN,
        "cache": str(cache),
        "shard_chars": shard_chars,
    }
    arguments = work / "arguments.json"
    arguments.write_text(json.dumps(given), encoding="utf-8")
    attempts: list[Attempt] = []
    kills, total = [], 0.0
    for name, ready in _kill_points(cache, n_chars // shard_chars, n_chars).items() if kill else ():
        attempt = Attempt(arguments, cache)
        attempts.append(attempt)
        killed = attempt.wait(ready)
        attempt.process.kill()
        total += attempt.end()
        time.sleep(ORPHAN_SECONDS)  # its own processes notice within half a second
        kept, torn = _count(cache, "*.tokens"), _count(cache, "*-*.new")
        kills.append({"while": name, "killed": killed, "token_shards_kept": kept, "token_shards_torn": torn})
    last = Attempt(arguments, cache)
    attempts.append(last)
    last.wait()
    total += last.end()
    if last.process.returncode:
        raise RuntimeError(f"the preparation ended with code {last.process.returncode}")
    result = next(json.loads(line) for _, line in reversed(last.stages) if line.startswith("{"))
    for made, after in zip(kills, attempts[1:], strict=False):
        made["next_began_with"] = after.stages[0][1] if after.stages else ""
    tokens = result["n_train_tokens"] + result["n_val_tokens"]
    return {
        "peak_rss_bytes": max(attempt.watch.peak() for attempt in attempts),
        "peak_rss_without_mapped_files_bytes": max(attempt.watch.peak(2) for attempt in attempts),
        "peak_disk_bytes": max(attempt.watch.peak_disk for attempt in attempts),
        "cache_bytes": disk_bytes(cache),
        "kills": kills,
        "seconds": total,
        "tokens": tokens,
        "tokens_per_second": tokens / total,
        "stages": [[[round(at, 1), line] for at, line in each.stages if not line.startswith("{")] for each in attempts],
        "sha256": result["sha256"],
        "documents": result["n_documents"],
    }


def data_preparation(
    folder: Path, *, n_bytes: int, n_files: int, seed: int, vocab_size: int, compare: bool = True
) -> dict[str, Any]:
    """Corpus, a preparation with kills and (with ``compare``) one without, figures; all that was written is deleted.

    Raises:
        RuntimeError: too little free disk, a preparation failed, or the two gave other rows.
    """
    from flowhn.data.shards import SHARD_CHARS

    free = shutil.disk_usage(folder).free
    if free < DISK_FACTOR * n_bytes:
        raise RuntimeError(f"{free:,} bytes are free under {folder}, {DISK_FACTOR} times the corpus is needed")
    corpus = folder / "corpus"
    corpus.mkdir()
    shard_chars = min(SHARD_CHARS, max(1, n_bytes // 12))  # a small corpus has shards enough to be killed between
    try:
        begun = time.monotonic()
        written = make_corpus(corpus, n_bytes, n_files=n_files, seed=seed)
        made = time.monotonic() - begun
        each = {}
        for name, kill in (("killed", True), ("never_killed", False))[: 1 + compare]:
            each[name] = prepare(
                corpus, folder, vocab_size=vocab_size, n_chars=written, shard_chars=shard_chars, kill=kill
            )
            for cache in folder.glob("cache-*"):
                shutil.rmtree(cache)
    finally:
        for path in (corpus, *folder.glob("cache-*")):
            shutil.rmtree(path, ignore_errors=True)
    same = each["killed"]["sha256"] == each["never_killed"]["sha256"] if compare else None
    if same is False:
        raise RuntimeError("a killed preparation gave other rows than one that was never stopped")
    about = {"corpus_bytes": written, "corpus_files": n_files, "seed": seed, "making_the_corpus_seconds": made}
    about |= {"vocab_size": vocab_size, "seq_len": SEQ_LEN, "shard_chars": shard_chars, "same_rows": same}
    peak = max(part["peak_rss_bytes"] for part in each.values())
    return about | {"peak_rss_bytes": peak, "below_2_gib": peak < 2 * 2**30} | each


def _main(arguments: Path) -> None:
    from flowhn.data import prepare as prepare_data
    from flowhn.data import shards

    given = json.loads(arguments.read_text(encoding="utf-8"))
    shards.SHARD_CHARS = given["shard_chars"]
    prepared = prepare_data(
        given["spec"],
        vocab_size=given["vocab_size"],
        seq_len=given["seq_len"],
        cache_dir=Path(given["cache"]),
        report=lambda line: print(line, flush=True),
    )
    print(json.dumps(prepared.stats), flush=True)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
