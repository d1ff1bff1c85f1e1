"""Preparing data: corpora, tokenisers, packing, and a cache that is whole or not there."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from flowhn.data import build as build_module
from flowhn.data import load_tokenizer, prepare
from flowhn.data.build import cut_pieces
from flowhn.data.corpora.docs import DocsCorpus
from flowhn.data.corpora.files import FilesCorpus
from flowhn.data.packing import packed_rows, unigram_cross_entropy
from flowhn.errors import UserError

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "data"
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "wizards", "boil", "strange", "soup"]


def text_of(n_words: int, seed: int) -> str:
    generator = np.random.default_rng(seed)
    lines = [" ".join(generator.choice(WORDS, 8)) for _ in range(math.ceil(n_words / 8))]
    return "\n".join(lines)


def documents(n: int = 40, n_words: int = 120) -> list[str]:
    return [text_of(n_words, seed) for seed in range(n)]


def files_spec(path, **changes) -> dict:
    return {**yaml.safe_load((CONFIGS / "files.yaml").read_text()), "path": path, "val_fraction": 0.2, **changes}


def small(spec: dict, cache: Path, *, vocab_size: int = 300, seq_len: int = 16, **more):
    return prepare(spec, vocab_size=vocab_size, seq_len=seq_len, cache_dir=cache, **more)


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    spec = yaml.safe_load((CONFIGS / "docs.yaml").read_text())
    return prepare(spec, vocab_size=2048, seq_len=128, cache_dir=tmp_path_factory.mktemp("docs"))


# --- the embedded corpus


def test_docs_has_the_size_and_the_parts_that_the_laptop_run_counts_on(docs):
    stats = docs.stats
    assert stats["n_train_characters"] > 1_500_000
    assert stats["n_train_tokens"] > 450_000
    assert 0.02 < stats["n_val_characters"] / stats["n_train_characters"] < 0.12
    assert stats["tokenizer_size"] == 2048
    assert 5.5 < stats["unigram_entropy_nats"] < math.log(2048)
    assert len(docs.train) == stats["n_train_rows"]
    assert docs.train[0]["input_ids"][-1] == docs.train[1]["input_ids"][0]  # rows overlap by one token


def test_docs_holds_out_whole_modules(docs):
    corpus = DocsCorpus({"val_fraction": 0.06})
    parts = {True: {}, False: {}}
    for document in corpus.documents():
        parts[document.held_out][document.id] = document.text
    assert not parts[True].keys() & parts[False].keys()
    paragraphs = {block for text in parts[False].values() for block in text.split("\n\n") if len(block) > 300}
    held_out = [block for text in parts[True].values() for block in text.split("\n\n") if len(block) > 300]
    assert sum(block in paragraphs for block in held_out) <= 0.02 * len(held_out)
    lines = docs.heldout_file.read_text(encoding="utf-8").rstrip("\n").split("\n")
    assert {row["id"]: row["text"] for row in map(json.loads, lines)} == parts[True]


@pytest.mark.slow  # .ci/run runs it
def test_docs_is_the_same_in_another_process(docs, tmp_path):
    code = (
        "import sys, yaml; from pathlib import Path; from flowhn.data import prepare;"
        f"spec = yaml.safe_load(open({str(CONFIGS / 'docs.yaml')!r}));"
        f"p = prepare(spec, vocab_size=2048, seq_len=128, cache_dir=Path({str(tmp_path)!r}));"
        "print(p.dir.name, p.stats['sha256'])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == [docs.dir.name, docs.stats["sha256"]]


def test_docs_reads_source_without_importing_it(tmp_path):
    (tmp_path / "loud.py").write_text('"""A module docstring that is long enough."""\nraise SystemExit("imported")\n')
    (tmp_path / "twice.py").write_text('def f():\n    """A module docstring that is  long enough."""\n')
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text('"""A docstring in a folder that is skipped."""\n')
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "pydoc_data" / "topics.py").write_text(
        "topics = {'if': 'The statement\\n' 'named if, at some length'}\n"
    )
    found = {d.id: d.text for d in DocsCorpus({"val_fraction": 0.5}, root=tmp_path).documents()}
    assert found == {
        "loud": "A module docstring that is long enough.",
        "topics.if": "The statement\nnamed if, at some length",
    }


# --- files


def write_as(kind: str, folder: Path, texts: list[str]) -> Path:
    lines = "\n<|endoftext|>\n".join(texts).encode()
    rows = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()
    path = folder / f"corpus.{kind}"
    if kind == "txt":
        path.write_bytes(lines)
    elif kind == "txt.gz":
        path.write_bytes(gzip.compress(lines))
    elif kind == "txt.xz":
        path.write_bytes(lzma.compress(lines))
    elif kind == "txt.zst":
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(lines)
    elif kind == "jsonl":
        path.write_bytes(rows)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(rows))
    else:
        pq.write_table(pa.table({"text": texts, "other": list(range(len(texts)))}), path)
    return path


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "txt.xz", "txt.zst", "jsonl", "jsonl.gz", "parquet"])
def test_every_format_gives_the_same_documents(kind, tmp_path):
    texts = [*documents(12), "line separator \u2028 and \x85 next\nline", "näïve 漢字 \U0001f600"]
    corpus = FilesCorpus(files_spec(str(write_as(kind, tmp_path, texts))))
    assert [document.text for document in corpus.documents()] == texts


def test_a_separator_of_ones_own_and_windows_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes(
        b"\xef\xbb\xbfone\r\n%%\r\ntwo\r\nlines\r\n%%\r\n\r\n%%\r\n" + b"".join(b"%d\r\n%%%%\r\n" % i for i in range(9))
    )
    corpus = FilesCorpus(files_spec(str(tmp_path), separator="%%"))
    assert [document.text for document in corpus.documents()] == ["one", "two\nlines", *map(str, range(9))]


def test_folders_globs_and_lists_are_read_in_order(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    (tmp_path / "ignored.bin").write_bytes(b"\0")
    names = lambda path: [p.stem for p in FilesCorpus(files_spec(path)).paths]  # noqa: E731
    assert names(str(tmp_path)) == ["a", "b", "c"]
    assert names(f"{tmp_path}/[ab].txt") == ["a", "b"]
    assert names([str(tmp_path / "c.txt"), str(tmp_path / "a.txt")]) == ["c", "a"]


@pytest.mark.parametrize(("n", "fraction", "expected"), [(10, 0.02, [1]), (60, 0.1, [6]), (1200, 0.1, range(80, 160))])
def test_the_held_out_part_follows_the_document_and_not_its_place(n, fraction, expected, tmp_path):
    texts = documents(n, 10)
    chosen = []
    for order in (texts, texts[::-1], texts * 2):
        path = write_as("jsonl", tmp_path, order)
        found = list(FilesCorpus(files_spec(str(path), val_fraction=fraction)).documents())
        chosen.append({document.text for document in found if document.held_out})
        assert not chosen[-1] & {document.text for document in found if not document.held_out}
    assert chosen[0] == chosen[1] == chosen[2]
    assert len(chosen[0]) in expected


def test_one_long_document_is_enough(tmp_path):
    text = text_of(40_000, 1)
    (tmp_path / "book.txt").write_text(text)
    assert len(text) > 2 * build_module.PIECE_CHARS
    prepared = small(files_spec(str(tmp_path / "book.txt")), tmp_path / "cache")
    tokenizer = load_tokenizer(prepared)
    train, val = (list(FilesCorpus(files_spec(str(tmp_path / "book.txt"))).documents())[i].text for i in (0, 1))
    assert train + val == text
    stream = np.concatenate([row["input_ids"][:-1] for row in prepared.train])
    expected = tokenizer.encode(train)[: len(stream)]
    assert tokenizer.decode(stream) == tokenizer.decode(expected)
    assert stream.tolist() == expected  # cut at line ends, so that the pieces tokenise as the whole does


def test_val_path_is_the_whole_validation_part(tmp_path):
    train, val = documents(12), documents(14)[12:]
    (tmp_path / "v.txt").write_text("\n<|endoftext|>\n".join(val))
    spec = files_spec(str(write_as("jsonl", tmp_path, train)), val_path=str(tmp_path / "v.txt"))
    prepared = small(spec, tmp_path / "cache")
    assert (prepared.stats["n_train_documents"], prepared.stats["n_val_documents"]) == (12, 2)
    rows = [json.loads(line)["text"] for line in prepared.heldout_file.read_text().split("\n") if line]
    assert rows == val


def test_validation_text_in_the_same_folder_is_not_trained_on(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    train, val = documents(12), documents(14)[12:]
    (folder / "a.txt").write_text("\n<|endoftext|>\n".join(train))
    (folder / "v.txt").write_text("\n<|endoftext|>\n".join(val))
    (tmp_path / "link.txt").symlink_to(folder / "v.txt")
    for path in (folder, folder / "*.txt"):
        for val_path in (folder / "v.txt", tmp_path / "link.txt"):
            found = list(FilesCorpus(files_spec(str(path), val_path=str(val_path))).documents())
            assert [document.text for document in found if not document.held_out] == train
            assert [document.text for document in found if document.held_out] == val
    with pytest.raises(UserError, match=r"names no text but that of data\.val_path"):
        FilesCorpus(files_spec(str(folder / "v.txt"), val_path=str(folder / "v.txt")))


# --- rows


@pytest.mark.parametrize("seq_len", [1, 3, 7])
@pytest.mark.parametrize("chunk", [1, 4, 50])
def test_packing_makes_every_token_a_target_once(seq_len, chunk):
    stream = np.arange(100)
    rows = np.concatenate(list(packed_rows((stream[i : i + chunk] for i in range(0, 100, chunk)), seq_len)))
    assert rows.shape == (99 // seq_len, seq_len + 1)
    assert rows[:, 1:].ravel().tolist() == stream[1 : 1 + rows[:, 1:].size].tolist()
    assert rows[:, :-1].ravel().tolist() == stream[: rows[:, 1:].size].tolist()


def test_rows_are_the_documents_with_an_end_after_each(tmp_path):
    texts = documents(12)
    spec = files_spec(str(write_as("jsonl", tmp_path, texts)), val_path=str(write_as("txt", tmp_path, documents(3))))
    prepared = small(spec, tmp_path / "cache")
    tokenizer = load_tokenizer(prepared)
    expected = [token for text in texts for token in [*tokenizer.encode(text), tokenizer.eos_id]]
    rows = np.array(prepared.train["input_ids"])
    assert len(expected) - 16 <= rows[:, 1:].size < len(expected)
    assert [rows[0, 0], *rows[:, 1:].ravel()] == expected[: rows[:, 1:].size + 1]
    digest = hashlib.sha256(rows.astype("<u4").tobytes() + np.array(prepared.val["input_ids"]).astype("<u4").tobytes())
    assert prepared.stats["sha256"] == digest.hexdigest()
    assert prepared.stats["n_train_tokens"] == rows[:, 1:].size


def test_padding_gives_each_document_its_row_and_counts_real_tokens(tmp_path):
    texts = [text_of(1, 0), *documents(11, 60)]
    val = write_as("txt", tmp_path, documents(3))
    spec = files_spec(str(write_as("jsonl", tmp_path, texts)), val_path=str(val), packing="pad")
    prepared = small(spec, tmp_path / "cache", seq_len=32)
    tokenizer = load_tokenizer(prepared)
    whole = [[*tokenizer.encode(text), tokenizer.eos_id] for text in texts]
    for row, tokens in zip(prepared.train, whole, strict=True):
        assert row["n_real"] == min(len(tokens), 33)
        assert row["input_ids"] == (tokens + [tokenizer.pad_id] * 33)[:33]
    assert len(whole[0]) < 33 < len(whole[1])
    assert prepared.stats["n_train_tokens"] == sum(min(len(tokens), 32) for tokens in whole)
    assert prepared.tokens_per_row == prepared.stats["n_train_tokens"] / 12


def test_unigram_cross_entropy_is_smoothed_by_one():
    train, val = np.array([3, 1, 0]), np.array([1, 0, 1])
    assert unigram_cross_entropy(train, val) == pytest.approx(-(math.log(4 / 7) + math.log(1 / 7)) / 2)


def test_pieces_join_to_the_document():
    text = "word " * 30_000 + "x" * 200_000 + "\nend"
    pieces = list(cut_pieces(text))
    assert "".join(piece for piece, _ in pieces) == text
    assert max(len(piece) for piece, _ in pieces) <= build_module.PIECE_CHARS
    assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]


def test_processes_do_not_change_the_tokens(tmp_path):
    path = str(write_as("jsonl", tmp_path, documents(70, 400)))
    hashes = {small(files_spec(path, num_proc=n), tmp_path / f"cache{n}", seq_len=64).stats["sha256"] for n in (1, 2)}
    assert len(hashes) == 1


# --- tokenisers


def test_a_text_cannot_end_itself(docs):
    tokenizer = load_tokenizer(docs)
    ids = tokenizer.encode("before <|endoftext|> after\n\ttab  ünïcode")
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == "before <|endoftext|> after\n\ttab  ünïcode"


def test_a_small_text_gives_a_smaller_tokenizer_and_says_so(tmp_path):
    prepared = small(files_spec(str(write_as("jsonl", tmp_path, documents(20)))), tmp_path / "cache", vocab_size=5000)
    assert prepared.stats["vocab_size"] == 5000
    assert prepared.stats["tokenizer_size"] == load_tokenizer(prepared).vocab_size < 5000


@pytest.mark.parametrize("form", ["file", "folder", "hugging face folder"])
def test_a_ready_tokenizer_is_used_as_it_is(form, docs, tmp_path):
    source = docs.tokenizer_file
    if form == "folder":
        source = docs.dir
    elif form == "hugging face folder":
        from transformers import PreTrainedTokenizerFast

        source = tmp_path / "hf"
        fast = PreTrainedTokenizerFast(tokenizer_file=str(docs.tokenizer_file), eos_token="<|endoftext|>")
        fast.save_pretrained(source)
    path = str(write_as("jsonl", tmp_path, documents(20)))
    prepared = small(files_spec(path, tokenizer=str(source)), tmp_path / "cache", vocab_size=2048)
    ours, theirs = load_tokenizer(prepared), load_tokenizer(docs)
    assert (ours.eos_id, ours.vocab_size) == (theirs.eos_id, theirs.vocab_size)
    assert ours.encode("The quick brown fox.") == theirs.encode("The quick brown fox.")


# --- random tokens


def test_random_tokens_are_seeded_and_never_all_zero(tmp_path):
    spec = yaml.safe_load((CONFIGS / "random.yaml").read_text())
    first, again, other = (
        small({**spec, "seed": seed}, tmp_path / name, vocab_size=97) for seed, name in ((0, "a"), (0, "b"), (1, "c"))
    )
    assert first.stats["sha256"] == again.stats["sha256"] != other.stats["sha256"]
    rows = np.array(first.train["input_ids"])
    assert rows.shape == (spec["n_rows"], 17)
    assert set(np.unique(rows)) == set(range(97))
    assert (rows != 0).any(axis=1).all()
    assert first.tokenizer_file is None
    assert first.stats["unigram_entropy_nats"] == pytest.approx(math.log(97), rel=0.01)


# --- the cache


def test_a_second_call_opens_what_is_there(tmp_path, monkeypatch):
    path = write_as("jsonl", tmp_path, documents())
    first = small(files_spec(str(path)), tmp_path / "cache")
    monkeypatch.setattr(build_module, "build_text", lambda *a, **k: pytest.fail("built again"))
    begun = time.perf_counter()
    assert small(files_spec(str(path), num_proc=2), tmp_path / "cache").dir == first.dir
    assert time.perf_counter() - begun < 1
    path.rename(tmp_path / "moved.jsonl")
    assert small(files_spec(str(tmp_path / "moved.jsonl")), tmp_path / "cache").dir == first.dir


@pytest.mark.parametrize("change", ["file", "vocab_size", "seq_len", "packing", "val_fraction"])
def test_what_shapes_the_tokens_makes_another_cache(change, tmp_path):
    path = write_as("jsonl", tmp_path, documents())
    first = small(files_spec(str(path)), tmp_path / "cache")
    sizes = {change: {"vocab_size": 301, "seq_len": 17}[change]} if change in {"vocab_size", "seq_len"} else {}
    options = {change: {"packing": "pad", "val_fraction": 0.3}[change]} if change in {"packing", "val_fraction"} else {}
    if change == "file":
        write_as("jsonl", tmp_path, documents(41))
    assert small(files_spec(str(path), **options), tmp_path / "cache", **sizes).dir != first.dir


def test_a_half_made_cache_is_never_used(tmp_path, monkeypatch):
    spec = files_spec(str(write_as("jsonl", tmp_path, documents())))
    cache = tmp_path / "cache"
    finish = build_module._finish

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(build_module, "_finish", die)
    with pytest.raises(KeyboardInterrupt):
        small(spec, cache)
    (half,) = (path for path in cache.iterdir() if path.is_dir())
    assert half.name.startswith(".building-")  # gone on from, never used as it is
    assert not (half / "stats.json").exists()
    monkeypatch.setattr(build_module, "_finish", finish)
    prepared = small(spec, cache)
    assert f".building-{prepared.dir.name}" == half.name
    assert not half.exists()
    whole = small(spec, tmp_path / "another")
    assert prepared.stats["sha256"] == whole.stats["sha256"]
    (cache / f".building-{prepared.dir.name}").mkdir()  # what kill -9 leaves behind
    (prepared.dir / "stats.json").unlink()
    assert small(spec, cache).stats["n_train_rows"] == prepared.stats["n_train_rows"]
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [prepared.dir.name]
    assert sorted(path.name for path in prepared.dir.iterdir()) == [
        "heldout.jsonl", "stats.json", "tokenizer.json", "train", "val"
    ]  # fmt: skip


def test_two_processes_prepare_one_cache(tmp_path):
    path = write_as("jsonl", tmp_path, documents(60, 300))
    code = (
        "import sys, json; from pathlib import Path; from flowhn.data import prepare;"
        f"spec = json.loads({json.dumps(json.dumps(files_spec(str(path))))});"
        f"p = prepare(spec, vocab_size=400, seq_len=16, cache_dir=Path({str(tmp_path / 'cache')!r}));"
        "print(p.stats['sha256'], len(p.train))"
    )
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = {process.communicate(timeout=120)[0] for process in running}
    assert all(process.returncode == 0 for process in running)
    assert len(outputs) == 1
    assert len([path for path in (tmp_path / "cache").iterdir() if path.is_dir()]) == 1


def test_every_data_config_names_itself():
    for path in CONFIGS.glob("*.yaml"):
        assert yaml.safe_load(path.read_text())["name"] == path.stem


def test_docs_trains_on_no_paragraph_that_it_holds_out(docs):
    documents = list(DocsCorpus({"val_fraction": 0.06}).documents())

    def paragraphs(held_out: bool) -> set[str]:
        texts = [document.text for document in documents if document.held_out is held_out]
        parts = (" ".join(part.split()).lower() for text in texts for part in text.split("\n\n") if len(part) >= 24)
        return set(parts)

    assert len(paragraphs(True)) > 200
    assert not paragraphs(True) & paragraphs(False)


def test_nearly_everything_held_out_still_leaves_a_document(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents()))
    parts = [document.held_out for document in FilesCorpus(files_spec(str(path), val_fraction=0.99)).documents()]
    assert 0 < sum(parts) < len(parts)


def test_dictionary_encoded_parquet_is_text(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array(documents(20)).dictionary_encode()}), path)
    read = [document.text for document in FilesCorpus(files_spec(str(path))).documents()]
    assert sorted(read) == sorted(documents(20))
