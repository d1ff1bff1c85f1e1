"""How much of the evaluation questions stands in the training text: n-grams of words, after Brown et al. 2020 (appendix C).

Words are runs of letters and digits in lower case. The n-grams of the questions are kept as 64-bit hashes (8 bytes each); the
training text streams past them once, so memory does not grow with it. Two different n-grams meet in one hash with a
probability of about (n-grams of the training text) x (n-grams of the questions) / 2^64: one in 10^5 for 50M x 2.5M.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

_WORD = re.compile(r"[^\W_]+")
_BASE = 0x9E3779B97F4A7C15  # odd, so that multiplying by it loses nothing modulo 2^64
_PIECE_WORDS = 2**18  # words of a training document looked at together: bounds memory
_SIEVE_BITS = 26  # a table of 2^26 flags (64 MiB) turns away most n-grams before the exact search


@dataclass(frozen=True)
class Overlap:
    """Overlap of one task.

    Attributes:
        questions: number of questions.
        short: questions without any n-gram, which cannot be judged.
        overlapping: questions of which at least one n-gram stands in the training text.
        ngrams: different n-grams, summed over questions.
        ngrams_found: those that stand in the training text.
    """

    questions: int
    short: int
    overlapping: int
    ngrams: int
    ngrams_found: int


@dataclass(frozen=True)
class Search:
    """What was searched, and what was found.

    Attributes:
        tasks: task -> :class:`Overlap`.
        documents, words: training documents read, and words in them. Without them an overlap of nothing says nothing.
    """

    tasks: dict[str, Overlap]
    documents: int
    words: int


def question_texts(tasks: Mapping[str, Any], *, limit: int | None = None) -> dict[str, Iterator[list[str]]]:
    """What is asked in each task: per question the texts "context + answer" of all its answers.

    Args:
        tasks: lm-eval's tasks with their requests built (``Evaluator.tasks``).
        limit: only the first so many questions.
    """
    return {name: islice(_questions(task), limit) for name, task in tasks.items()}


def _questions(task: Any) -> Iterator[list[str]]:
    texts: dict[int, list[str]] = {}
    for instance in task.instances:
        parts = [part for part in instance.args if isinstance(part, str)]
        texts.setdefault(instance.doc_id, []).append("".join(parts))
    yield from texts.values()


def ngram_overlap(
    train: Iterable[str],
    questions: Mapping[str, Iterable[Sequence[str]]],
    *,
    n: int = 13,
    on_progress: Callable[[int], None] | None = None,
) -> Search:
    """Look for the questions' n-grams in the training text.

    Args:
        train: the training documents, read once and one at a time.
        questions: task -> questions, each a sequence of texts (:func:`question_texts`).
        n: words of an n-gram.
        on_progress: called with the number of training documents read, after each.
    """
    names = list(questions)
    owners: list[tuple[int, int]] = []  # (task, n-grams) of each question
    parts = []
    for place, name in enumerate(names):
        for texts in questions[name]:
            grams = [_hashes(_word_hashes(text), n) for text in texts]
            unique = np.unique(np.concatenate(grams)) if grams else np.empty(0, np.uint64)
            owners.append((place, len(unique)))
            parts.append(unique)
    wanted, position = np.unique(np.concatenate([*parts, np.empty(0, np.uint64)]), return_inverse=True)
    found, documents, words = _search(train, wanted, n, on_progress or (lambda done: None))
    found = found[position]
    tasks = np.array([task for task, _ in owners], dtype=np.int64)
    sizes = np.array([size for _, size in owners], dtype=np.int64)
    hits = np.bincount(np.repeat(np.arange(len(owners)), sizes), weights=found, minlength=len(owners)).astype(np.int64)
    found_in = {
        name: Overlap(
            questions=int(np.sum(tasks == place)),
            short=int(np.sum(sizes[tasks == place] == 0)),
            overlapping=int(np.sum(hits[tasks == place] > 0)),
            ngrams=int(np.sum(sizes[tasks == place])),
            ngrams_found=int(np.sum(hits[tasks == place])),
        )
        for place, name in enumerate(names)
    }
    return Search(found_in, documents, words)


def _search(
    train: Iterable[str], wanted: np.ndarray, n: int, tell: Callable[[int], None]
) -> tuple[np.ndarray, int, int]:
    """Which of the sorted hashes ``wanted`` occur in the documents (bool, one per hash); documents and words read."""
    number = n_words = 0
    found = np.zeros(len(wanted), dtype=bool)
    shift = np.uint64(64 - _SIEVE_BITS)
    sieve = np.zeros(2**_SIEVE_BITS, dtype=bool)
    sieve[wanted >> shift] = True
    for number, document in enumerate(train, start=1):
        for kept, words in _pieces(document, n):
            n_words += len(words) - kept
            hashes = _hashes(words, n)
            hashes = hashes[sieve[hashes >> shift]]
            if len(wanted):
                at = np.minimum(np.searchsorted(wanted, hashes), len(wanted) - 1)
                found[at[wanted[at] == hashes]] = True
        tell(number)
    return found, number, n_words


def _pieces(document: str, n: int) -> Iterator[tuple[int, np.ndarray]]:
    """Word hashes of a document, a bounded number at a time; a piece begins with the last n - 1 words of the one before.

    Yields how many of a piece's words are such, and the piece.
    """
    words = (match.group() for match in _WORD.finditer(document.lower()))
    kept = np.empty(0, np.uint64)
    while len(fresh := _as_hashes(list(islice(words, _PIECE_WORDS)))):
        piece = np.concatenate([kept, fresh])
        yield len(kept), piece
        kept = piece[max(0, len(piece) - (n - 1)) :]


def _word_hashes(text: str) -> np.ndarray:
    return _as_hashes(_WORD.findall(text.lower()))


def _as_hashes(words: list[str]) -> np.ndarray:
    """Python's own hash of each word: 64 bits, the same all through a process, which is all that is asked here."""
    return np.fromiter(map(hash, words), dtype=np.int64, count=len(words)).view(np.uint64)


def _hashes(words: np.ndarray, n: int) -> np.ndarray:
    """Hash of every run of n words: a polynomial in an odd base, modulo 2^64."""
    count = len(words) - n + 1
    if count < 1:
        return np.empty(0, np.uint64)
    total = np.zeros(count, dtype=np.uint64)
    for offset in range(n):
        total = total * np.uint64(_BASE) + words[offset : offset + count]
    return total
