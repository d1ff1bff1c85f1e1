"""Bad data: each is one sentence that names the key and the mend, and leaves nothing half-made behind."""

from __future__ import annotations

import errno
import gzip
import json
import lzma
import random
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flowhn.data import build as build_module
from flowhn.data import load_tokenizer, prepare
from flowhn.data.prepared import PreparedData
from flowhn.errors import UserError

LINES = "some words stand here and make a line of text\n" * 400
GOOD = "<|endoftext|>\n".join(f"document {number}\n{LINES}" for number in range(12))
NOISE = "".join(random.Random(0).choices("abcdefgh \n", k=20_000)).encode()


def zst(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def parquet(columns: dict) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def spec_of(path, **changes) -> dict:
    return {"name": "files", "path": str(path), "val_fraction": 0.2, "tokenizer": "train", **changes}


def fails(spec: dict, cache: Path, *words: str, vocab_size: int = 300, seq_len: int = 16) -> None:
    with pytest.raises(UserError) as caught:
        prepare(spec, vocab_size=vocab_size, seq_len=seq_len, cache_dir=cache)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    if cache.is_dir():
        assert [path.name for path in cache.iterdir() if path.is_dir()] == []


BAD_FILES = {
    "empty.txt": (b"", "is empty"),
    "blank.txt": (b"\n  \n\n", "no document"),
    "empty.txt.gz": (gzip.compress(b""), "no document"),
    "binary.txt": (b"text\n\x7fELF\x00\x01\x02", "binary"),
    "latin.txt": (LINES.encode() + "caf\xe9\n".encode("latin-1"), "not UTF-8 (line 401)"),
    "image.png": (b"\x89PNG", "unknown type"),
    "archive.tar.gz": (gzip.compress(b"x"), "unknown type"),
    "cut.txt.gz": (gzip.compress(NOISE)[:-300], "damaged or cut short"),
    "not.txt.gz": (b"plain text", "damaged or cut short"),
    "cut.txt.xz": (lzma.compress(NOISE)[:-300], "damaged or cut short"),
    "not.txt.xz": (b"plain text", "damaged or cut short"),
    "cut.txt.zst": (zst(NOISE)[:-300], "damaged or cut short"),
    "not.txt.zst": (b"plain text", "damaged or cut short"),
    "key.jsonl": (
        b'{"text": "a"}\n{"body": "b"}\n',
        "line 2 has no text under 'text' (it has: body); set data.text_key",
    ),
    "number.jsonl": (b'{"text": 5}\n', "line 1 has no text"),
    "list.jsonl": (b"[1, 2]\n", "it has: list"),
    "json.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2 is not JSON"),
    "column.parquet": (parquet({"body": ["a"]}), "no column 'text' (it has: body)"),
    "number.parquet": (parquet({"text": [1, 2]}), "numbers, not text"),
    "not.parquet": (b"plain text", "not a readable Parquet file"),
    "none.parquet": (parquet({"text": pa.array([None, ""], pa.string())}), "no document"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_unreadable_files(name, tmp_path):
    content, words = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    fails(spec_of(tmp_path / name), tmp_path / "cache", "data.path", name, words)
    (tmp_path / "good.txt").write_text(GOOD)
    fails(spec_of(tmp_path / "good.txt", val_path=str(tmp_path / name)), tmp_path / "cache", "data.val_path", words)


def test_paths_that_lead_nowhere(tmp_path):
    (tmp_path / "folder").mkdir()
    cache = tmp_path / "cache"
    fails(spec_of(tmp_path / "missing.txt"), cache, "data.path", "does not exist")
    fails(spec_of(tmp_path / "folder"), cache, "data.path", "holds no readable file", ".parquet")
    fails(spec_of(tmp_path / "*.txt"), cache, "data.path", "matches no file")
    fails({"name": "files", "path": None, "val_fraction": 0.1}, cache, "data.path=FILE")
    fails(spec_of(7), cache, "data.path=7")


def test_options_out_of_range(tmp_path):
    path, cache = tmp_path / "good.txt", tmp_path / "cache"
    path.write_text(GOOD)
    for value in (0, 1, -0.5, "much", None):
        fails(spec_of(path, val_fraction=value), cache, f"data.val_fraction={value}")
    fails(spec_of(path, packing="tight"), cache, "data.packing=tight", "pack, pad")
    fails(spec_of(path, num_proc=0), cache, "data.num_proc=0")
    fails({"name": "wiki"}, cache, "data.name=wiki", "docs, files, slimpajama, random")
    fails({}, cache, "data.name")
    fails(spec_of(path), cache, "seq_len=0", seq_len=0)
    fails(spec_of(path), cache, "vocab_size=200", "257", vocab_size=200)
    fails({"name": "random", "n_rows": 0, "n_val_rows": 1}, cache, "data.n_rows=0")
    fails({"name": "random", "n_rows": 4, "n_val_rows": "x"}, cache, "data.n_val_rows=x")


def test_a_sequence_longer_than_the_data(tmp_path):
    path = tmp_path / "good.txt"
    path.write_text(GOOD)
    fails(spec_of(path), tmp_path / "cache", "seq_len=10000000", "train part", "lower seq_len", seq_len=10_000_000)
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    spec = spec_of(path, val_path=str(short))
    fails(spec, tmp_path / "cache", "seq_len=64", "val part", "data.val_path", seq_len=64)


def test_tokenizers_that_do_not_fit(tmp_path, monkeypatch):
    path, cache = tmp_path / "good.txt", tmp_path / "cache"
    path.write_text(GOOD)
    ready = prepare(spec_of(path), vocab_size=300, seq_len=16, cache_dir=tmp_path / "ready").tokenizer_file
    size = json.loads((ready.parent / "stats.json").read_text())["tokenizer_size"]
    fails(spec_of(path, tokenizer=str(ready)), cache, "vocab_size=258", f"set vocab_size={size}", vocab_size=258)
    fails(spec_of(path, tokenizer=str(tmp_path / "no.json")), cache, "data.tokenizer", "does not exist")
    (tmp_path / "bad.json").write_text("{}")
    fails(spec_of(path, tokenizer=str(tmp_path / "bad.json")), cache, "data.tokenizer", "not a tokenizers JSON")
    endless = json.loads(ready.read_text())
    endless["added_tokens"] = []
    del endless["model"]["vocab"]["<|endoftext|>"]
    (tmp_path / "endless.json").write_text(json.dumps(endless))
    fails(spec_of(path, tokenizer=str(tmp_path / "endless.json")), cache, "no end-of-text token")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fails(spec_of(path, tokenizer="nobody/nothing"), cache, "data.tokenizer=nobody/nothing", "HF_HUB_OFFLINE")


def test_slimpajama_without_a_hub_is_one_quick_sentence(tmp_path, monkeypatch):
    import huggingface_hub

    spec = {"name": "slimpajama", "path": "DKYoon/SlimPajama-6B", "tokenizer": "train"}
    begun = time.perf_counter()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fails(spec, tmp_path / "cache", "data=slimpajama", "HF_HUB_OFFLINE", "data=files")
    monkeypatch.delenv("HF_HUB_OFFLINE")

    def unreachable(*args, **kwargs):
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", unreachable)
    fails(spec, tmp_path / "cache", "data=slimpajama", "did not answer", "Name or service not known", "data=files")
    assert time.perf_counter() - begun < 10


def test_slimpajama_reads_both_parts_and_says_where_reading_stopped(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *args, **kwargs: None)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    parts = {"train": [{"text": LINES}] * 5, "validation": [{"text": LINES}] * 2}
    monkeypatch.setattr(datasets, "load_dataset", lambda repo, split, streaming: parts[split])
    spec = {"name": "slimpajama", "path": "DKYoon/SlimPajama-6B", "tokenizer": "train"}
    prepared = prepare(spec, vocab_size=300, seq_len=16, cache_dir=tmp_path / "cache")
    assert (prepared.stats["n_train_documents"], prepared.stats["n_val_documents"]) == (5, 2)

    def stops(repo, split, streaming):
        yield {"text": LINES}
        raise TimeoutError("read timed out")

    monkeypatch.setattr(datasets, "load_dataset", stops)
    fails(spec, tmp_path / "other", "data=slimpajama", "read timed out")


def test_no_room_and_no_right_to_write(tmp_path, monkeypatch):
    path = tmp_path / "good.txt"
    path.write_text(GOOD)
    (tmp_path / "file").write_text("in the way")
    fails(spec_of(path), tmp_path / "file", "cache_dir", "cannot be written")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    write, cache, lines = build_module._write_rows, tmp_path / "cache", []
    monkeypatch.setattr(build_module, "_write_rows", full)
    with pytest.raises(UserError, match=r"no disk space left under cache_dir=.* free some and run again"):
        prepare(spec_of(path), vocab_size=300, seq_len=16, cache_dir=cache)
    (kept,) = (folder for folder in cache.iterdir() if folder.is_dir())
    assert kept.name.startswith(".building-")  # hours of reading and tokenising are not thrown away
    monkeypatch.setattr(build_module, "_write_rows", write)
    again = prepare(spec_of(path), vocab_size=300, seq_len=16, cache_dir=cache, report=lines.append)
    assert lines[0].startswith("going on")
    whole = prepare(spec_of(path), vocab_size=300, seq_len=16, cache_dir=tmp_path / "other", report=lines.append)
    assert again.stats["sha256"] == whole.stats["sha256"]
    assert any(line.startswith("preparing data takes at most") for line in lines)
    assert [folder.name for folder in cache.iterdir() if folder.is_dir()] == [again.dir.name]


def test_another_fault_leaves_nothing_half_made(tmp_path, monkeypatch):
    """What the data or the code is to blame for would stop the next call too."""
    path = tmp_path / "good.txt"
    path.write_text(GOOD)

    def broken(*args, **kwargs):
        raise ValueError("not a number")

    monkeypatch.setattr(build_module, "_write_rows", broken)
    with pytest.raises(ValueError, match="not a number"):
        prepare(spec_of(path), vocab_size=300, seq_len=16, cache_dir=tmp_path / "cache")
    assert not [folder for folder in (tmp_path / "cache").iterdir() if folder.is_dir()]


def test_a_broken_cache_is_named(tmp_path):
    with pytest.raises(UserError, match="delete that folder"):
        PreparedData.open(tmp_path)
    prepared = prepare(
        {"name": "random", "n_rows": 4, "n_val_rows": 1}, vocab_size=9, seq_len=4, cache_dir=tmp_path / "cache"
    )
    (prepared.dir / "train" / "state.json").unlink()
    with pytest.raises(UserError, match="delete that folder"):
        _ = prepared.train
    with pytest.raises(UserError, match="data=random has no tokenizer"):
        load_tokenizer(prepared)
