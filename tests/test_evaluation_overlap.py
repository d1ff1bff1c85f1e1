"""The overlap check finds what a naive search finds, whatever the length of a document."""

from __future__ import annotations

import random
import tracemalloc
from types import SimpleNamespace

import pytest

from flowhn.errors import UserError
from flowhn.evaluation import overlap as overlap_module
from flowhn.evaluation.overlap import Overlap, Search, ngram_overlap, question_texts

VOCABULARY = [f"w{i}" for i in range(6)]


def words(n: int, seed: int, vocabulary=VOCABULARY) -> list[str]:
    return random.Random(seed).choices(vocabulary, k=n)


def grams(text: str, n: int) -> set[tuple[str, ...]]:
    parts = text.lower().split()
    return {tuple(parts[i : i + n]) for i in range(len(parts) - n + 1)}


def naive(train: list[str], questions: list[list[str]], n: int) -> Overlap:
    seen = set().union(*(grams(text, n) for text in train))
    asked = [set().union(*(grams(text, n) for text in texts)) for texts in questions]
    return Overlap(
        questions=len(asked),
        short=sum(not g for g in asked),
        overlapping=sum(bool(g & seen) for g in asked),
        ngrams=sum(map(len, asked)),
        ngrams_found=sum(len(g & seen) for g in asked),
    )


@pytest.mark.parametrize("n", [1, 2, 4, 5])
@pytest.mark.parametrize("piece", [3, 7, 2**18])
def test_counts_are_those_of_a_naive_search(monkeypatch, n, piece):
    monkeypatch.setattr(overlap_module, "_PIECE_WORDS", piece)
    train = [" ".join(words(size, seed)) for seed, size in enumerate((0, 1, 3, 40, 90))]
    tasks = {
        name: [[" ".join(words(size, 100 * start + size + i)) for i in range(2)] for size in range(12)]
        for start, name in enumerate(("a", "b"), start=1)
    }
    found = ngram_overlap(iter(train), {name: iter(questions) for name, questions in tasks.items()}, n=n)
    assert found.tasks == {name: naive(train, questions, n) for name, questions in tasks.items()}
    assert (found.documents, found.words) == (5, 134)
    found = found.tasks
    assert found["a"].ngrams_found > 0
    assert n <= 2 or found["a"].ngrams_found < found["a"].ngrams


def test_thirteen_words_in_order_are_an_overlap_whatever_stands_between_them():
    sentence = "One two three, four-five six; seven EIGHT nine ten 11 twelve thirteen"
    other = "one two three four five six seven eight nine ten 11 thirteen twelve"
    train = ["nothing here", "before\n" + "  ".join(sentence.lower().replace(",", "").split()) + "! after"]
    found = ngram_overlap(train, {"same": [[sentence]], "other": [[other]], "short": [["one two three"]]}).tasks
    assert found["same"] == Overlap(1, 0, 1, 1, 1)
    assert found["other"] == Overlap(1, 0, 0, 1, 0)
    assert found["short"] == Overlap(1, 1, 0, 0, 0)


def test_words_of_two_documents_are_no_overlap():
    parts = words(13, 1, [f"v{i}" for i in range(100)])
    question = {"task": [[" ".join(parts)]]}
    assert ngram_overlap([" ".join(parts)], question).tasks["task"].overlapping == 1
    assert ngram_overlap([" ".join(parts[:7]), " ".join(parts[7:])], question).tasks["task"].overlapping == 0


def test_nothing_to_search_or_to_search_in():
    assert ngram_overlap(["some text"], {}) == Search({}, 1, 2)
    assert ngram_overlap([], {"a": [["x " * 20]], "b": []}).tasks == {
        "a": Overlap(1, 0, 0, 1, 0),
        "b": Overlap(0, 0, 0, 0, 0),
    }


def test_training_text_streams_through_bounded_memory():
    told: list[int] = []
    vocabulary = [f"w{i}" for i in range(1000)]

    def documents(n: int):
        for seed in range(n):
            yield " ".join(words(2000, seed, vocabulary))

    def peak(n: int) -> int:
        tracemalloc.start()
        ngram_overlap(documents(n), {"a": [[" ".join(words(50, 7))]]}, on_progress=told.append)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    assert peak(200) < peak(10) + 2**20
    assert told == [*range(1, 201), *range(1, 11)]


def test_questions_are_read_from_lm_evals_requests():
    def request(doc_id, *args):
        return SimpleNamespace(doc_id=doc_id, args=args)

    instances = [request(0, "Q: a b", " yes"), request(0, "Q: a b", " no"), request(3, "text", {"until": ["."]})]
    tasks = {"t": SimpleNamespace(instances=instances)}
    assert list(question_texts(tasks)["t"]) == [["Q: a b yes", "Q: a b no"], ["text"]]
    assert list(question_texts(tasks, limit=1)["t"]) == [["Q: a b yes", "Q: a b no"]]


def counted(tmp_path, text: str, question: str) -> dict:
    """``count_overlap`` of a one-file corpus and one question, without lm-eval."""
    from flowhn.config import compose, to_dict
    from flowhn.overlap_report import count_overlap

    (tmp_path / "train.txt").write_text(text)
    (tmp_path / "valid.txt").write_text("something else\n")
    words = ["data=files", f"data.path={tmp_path / 'train.txt'}", f"data.val_path={tmp_path / 'valid.txt'}"]
    config = to_dict(compose("train", [*words, "eval=paper", f"cache_dir={tmp_path / 'cache'}"]))
    task = SimpleNamespace(instances=[SimpleNamespace(doc_id=0, args=(question, ""))])
    workshop = SimpleNamespace(evaluator=lambda *args, **options: SimpleNamespace(tasks={"piqa": task}))
    return count_overlap(config, workshop)


def test_a_planted_question_is_found_and_what_was_read_is_on_record(tmp_path):
    """The positive control: the same path that finds nothing in the real text finds one question put into it."""
    question = "Which of these thirteen words in a row was planted in the text, one or two?"
    clean = counted(tmp_path, "plain text\n<|endoftext|>\nmore of it\n", question)
    planted = counted(tmp_path, f"plain text\n<|endoftext|>\nmore of it {question}\n", question)
    assert (clean["tasks"]["piqa"]["overlapping"], planted["tasks"]["piqa"]["overlapping"]) == (0, 1)
    assert clean["train"] | {"fingerprint": ""} == {
        "files": ["train.txt"], "documents": 2, "words": 5, "fingerprint": "",
    }  # fmt: skip
    assert planted["train"]["words"] == 21
    assert clean["train"]["fingerprint"] != planted["train"]["fingerprint"]


def test_an_overlap_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="not one word of training text"):
        counted(tmp_path, "... ---\n", "word " * 20)
    with pytest.raises(UserError, match="no question has 13 words"):
        counted(tmp_path, "plain text\n", "too short")
