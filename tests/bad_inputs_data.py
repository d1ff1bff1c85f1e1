"""Broken text and tokenizers, thrown at flowhn-train."""

from __future__ import annotations

import gzip
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from bad_inputs import Bad, Stage, kind, train_argv


def _zst(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def _parquet(columns: dict) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(1, len(data) - 1)]


def _flip(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]


def _noise(text: str, rng: random.Random) -> bytes:
    return (text + "".join(rng.choices("abcdefgh \n", k=5000))).encode()


Make = Callable[[str, random.Random], bytes]
# What is broken -> (file name, its content, whether it has to be refused).
_FILES: dict[str, tuple[str, Make, bool]] = {
    "empty": ("a.txt", lambda t, r: b"", True),
    "blank": ("a.txt", lambda t, r: b" \n\t\n" * r.randrange(1, 50), True),
    "a few words": ("a.txt", lambda t, r: b"three small words", False),
    "random bytes": ("a.txt", lambda t, r: r.randbytes(r.randrange(50, 5000)), True),
    "nul bytes": ("a.txt", lambda t, r: t.encode() + b"\0" * 9, True),
    "bad UTF-8": ("a.txt", lambda t, r: t.encode() + b"\xff\xfe\xfd\n", True),
    "cut inside a character": ("a.txt", lambda t, r: t.encode() + "é".encode()[:1], True),
    "latin-1": ("a.txt", lambda t, r: (t + "caf\xe9\n").encode("latin-1"), True),
    "UTF-16": ("a.txt", lambda t, r: t.encode("utf-16"), True),
    "UTF-16 without mark": ("a.txt", lambda t, r: t.encode(r.choice(("utf-16-le", "utf-16-be"))), True),
    "UTF-32": ("a.txt", lambda t, r: t.encode("utf-32"), True),
    "UTF-16 JSON lines": ("a.jsonl", lambda t, r: json.dumps({"text": t}).encode("utf-16"), True),
    "with a byte order mark": ("a.txt", lambda t, r: t.encode("utf-8-sig"), False),
    "one giant line": ("a.txt", lambda t, r: b"word and word " * r.randrange(20_000, 100_000), False),
    "one giant word": ("a.txt", lambda t, r: b"x" * r.randrange(100_000, 400_000), False),
    "separators only": ("a.txt", lambda t, r: b"<|endoftext|>\n" * 500, True),
    "control characters": ("a.txt", lambda t, r: bytes(r.choices([*range(1, 32), 127], k=9000)), False),
    "strange characters": ("a.txt", lambda t, r: "".join(r.choices("é漢🦙\u202e\u2028 \n", k=9000)).encode(), False),
    "cut gz": ("a.txt.gz", lambda t, r: _cut(gzip.compress(_noise(t, r)), r), True),
    "cut xz": ("a.txt.xz", lambda t, r: _cut(lzma.compress(_noise(t, r)), r), True),
    "cut zst": ("a.txt.zst", lambda t, r: _cut(_zst(_noise(t, r)), r), True),
    "flipped gz": ("a.txt.gz", lambda t, r: _flip(gzip.compress(_noise(t, r), mtime=0), r), False),
    "flipped xz": ("a.txt.xz", lambda t, r: _flip(lzma.compress(_noise(t, r)), r), False),
    "flipped zst": ("a.txt.zst", lambda t, r: _flip(_zst(_noise(t, r)), r), False),
    "not gz": ("a.txt.gz", lambda t, r: t.encode(), True),
    "gz with a tail": ("a.txt.gz", lambda t, r: gzip.compress(t.encode()) + b"tail" * 9, True),
    "wrong compression": ("a.txt.xz", lambda t, r: gzip.compress(t.encode()), True),
    "cut parquet": ("a.parquet", lambda t, r: _cut(_parquet({"text": [t] * 20}), r), True),
    "flipped parquet": ("a.parquet", lambda t, r: _flip(_parquet({"text": [t] * 20}), r), False),
    "text named parquet": ("a.parquet", lambda t, r: t.encode(), True),
    "parquet packed again": ("a.parquet.gz", lambda t, r: gzip.compress(_parquet({"text": [t] * 20})), False),
    "parquet without the column": ("a.parquet", lambda t, r: _parquet({"body": [t] * 20}), True),
    "parquet of numbers": ("a.parquet", lambda t, r: _parquet({"text": list(range(20))}), True),
    "parquet of lists": ("a.parquet", lambda t, r: _parquet({"text": [[t]] * 20}), True),
    "parquet without rows": ("a.parquet", lambda t, r: _parquet({"text": pa.array([], pa.string())}), True),
    "jsonl without the field": ("a.jsonl", lambda t, r: json.dumps({"body": t}).encode() * 1, True),
    "jsonl of numbers": ("a.jsonl", lambda t, r: b'{"text": 5}\n' * 20, True),
    "jsonl of lists": ("a.jsonl", lambda t, r: b'["text"]\n' * 20, True),
    "cut jsonl": ("a.jsonl", lambda t, r: json.dumps({"text": t}).encode()[: r.randrange(2, 500)], True),
    "deep jsonl": ("a.jsonl", lambda t, r: b"[" * 100_000, True),
    "jsonl with huge numbers": ("a.jsonl", lambda t, r: b'{"text": ' + b"9" * 9000 + b"}", True),
    "lone surrogates": ("a.jsonl", lambda t, r: (json.dumps({"text": t + "\ud800"}) + "\n").encode() * 9, False),
    "unknown type": ("a.docx", lambda t, r: t.encode(), True),
    "no suffix": ("corpus", lambda t, r: t.encode(), True),
}


@kind("corpora", 18)
def corpus(stage: Stage, place: Path, rng: random.Random) -> Bad:
    what = rng.choice([*_FILES, *_FILES, "huge document", "duplicate files", "folder", "links", "escaping names"])
    words = ["data=files", "data.val_fraction=0.2"]
    path, must_refuse = place / "a.txt", False
    if what in _FILES:
        name, make, must_refuse = _FILES[what]
        path = place / name
        path.write_bytes(make(stage.text, rng))
    elif what == "huge document":
        path.write_text(stage.text.replace("<|endoftext|>", "") * 60, encoding="utf-8")
    elif what == "duplicate files":
        for number in range(12):
            (place / f"{number}.txt").write_text(stage.text, encoding="utf-8")
        path = place
    elif what == "folder":
        path, must_refuse = place / "folder", True
        path.mkdir()
        (path / "notes.pdf").write_bytes(b"%PDF")
    elif what == "links":
        path, must_refuse = place / "loop.txt", True
        path.symlink_to(path)
    else:
        path = place / "names.jsonl"
        rows = [{"id": "../../owned", "path": "/tmp/owned", "text": stage.text + str(n)} for n in range(12)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    key = "data.path"
    if what in _FILES and rng.random() < 0.2:
        key = "data.val_path"
        words.append(f"data.path={stage.root / 'good.txt'}")
    if rng.random() < 0.2:
        words.append("data.packing=pad")
    argv = train_argv(stage, place, *words, f"{key}={path}", cache=place / "cache")
    return Bad("corpora", f"{what} ({key})", "train", argv, (key, "seq_len", "data.val_fraction"), must_refuse)


@kind("options of data", 4)
def data_option(stage: Stage, place: Path, rng: random.Random) -> Bad:
    word = rng.choice((
        "data.val_fraction=0", "data.val_fraction=nan", "data.val_fraction=2", "data.val_fraction=x", "data.packing=tight",
        "data.num_proc=0", "data.num_proc=x", "data.num_proc=-3", "data.text_key=5", "data.separator=''", "data.path=[]",
        "data.path=null", "data.path=5", "data.path=/nowhere/*", "data.path={a:b}", "data.val_path=[/nowhere]", "data.path=''",
        "data.path=/dev/null", "data.path='\\0'", "data.packing=5", "data.loss_on_padding=maybe", "data.name=wiki",
        "data.name=random", "data.tokenizer=[]", "data.tokenizer=5", "data.path=~nobody/x.txt", "data.val_fraction=true",
    ))  # fmt: skip
    words = ["data=files", f"data.path={stage.root / 'good.txt'}"]
    if word.startswith("data.path"):
        words.pop()
    may = ("text_key", "separator", "data.name")
    argv = train_argv(stage, place, *words, word, cache=place / "cache")
    return Bad("options of data", word, "train", argv, ("data.", "vocab_size"), not any(name in word for name in may))


@kind("tokenizers", 7)
def tokenizer(stage: Stage, place: Path, rng: random.Random) -> Bad:
    good = json.loads((stage.text_run / "tokenizer.json").read_text(encoding="utf-8"))
    path, must_refuse, more = place / "tokenizer.json", True, []
    what = rng.choice(("too large", "foreign json", "cut", "empty", "binary", "no end", "missing", "no model", "list",
                       "ids with gaps", "negative ids", "huge ids", "vocabulary of 10", "folder", "nan", "deep"))  # fmt: skip
    content: str | bytes = json.dumps(good)
    vocab = good["model"]["vocab"]
    if what == "too large":
        more = ["vocab_size=258"]
    elif what == "foreign json":
        content = json.dumps(rng.choice(({}, {"model": 5}, {"version": "1.0"}, {"vocab": {"a": 1}}, [1], "x", None)))
    elif what == "cut":
        content = content[: rng.randrange(1, len(content))]
    elif what in ("empty", "binary", "nan", "deep"):
        content = {"empty": b"", "binary": rng.randbytes(500), "nan": b"NaN", "deep": b"[" * 100_000}[what]
    elif what == "no end":
        good["added_tokens"] = []
        del vocab["<|endoftext|>"]
        content = json.dumps(good)
    elif what in ("no model", "list"):
        good["model"] = None if what == "no model" else []
        content = json.dumps(good)
    elif what in ("ids with gaps", "negative ids", "huge ids"):
        number = {"ids with gaps": 5000, "negative ids": -1, "huge ids": 2**40}[what]
        vocab[max(vocab, key=vocab.get)] = number
        content = json.dumps(good)
    elif what == "vocabulary of 10":
        good["model"]["vocab"] = dict(sorted(vocab.items(), key=lambda item: item[1])[:10])
        good["model"]["merges"], must_refuse = [], False
        content = json.dumps(good)
    if what == "folder":
        path = place / "tokenizer"
        path.mkdir()
        (path / "tokenizer_config.json").write_text("{", encoding="utf-8")
        (path / "tokenizer.json").write_text(content, encoding="utf-8")
    elif what != "missing":
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    words = ["data=files", f"data.path={stage.root / 'good.txt'}", "data.val_fraction=0.2", f"data.tokenizer={path}"]
    argv = train_argv(stage, place, *words, *more, cache=place / "cache")
    return Bad("tokenizers", what, "train", argv, ("data.tokenizer", "vocab_size", "tokenizer", "seq_len"), must_refuse)
