"""``eval=docs``: two tasks made from held-out documents, in lm-eval's own form (JSON lines and YAML).

- ``docs_continuation``: which of four passages continues this one? The three others are taken from other documents. Chance: 25 %.
  Scored by lm-eval's ``acc_mutual_info``: the choice whose log-likelihood the context raises most. A passage's own
  log-likelihood says mostly how common its words are, and a small model's plain accuracy stays at chance.
- ``docs_lastword``: the last word of a passage, which also occurs earlier in it (as most of LAMBADA's do).

Both are deterministic in the documents and the seed.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from flowhn.errors import UserError

CONTEXT_WORDS, CONTINUATION_WORDS = 40, 14  # about 100 tokens of a 2,048-token vocabulary: fits a context of 128
CONTINUATION_ITEMS, LASTWORD_ITEMS = 300, 200
_MIN_DOCUMENTS = 4  # a true continuation and three from elsewhere
_WORD = re.compile(r"\S+")
_PLAIN = re.compile(r"[A-Za-z]{4,}")

_CONTINUATION_YAML = """task: docs_continuation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_mutual_info, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.1}}
"""
_LASTWORD_YAML = """task: docs_lastword
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{' ' + target}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


def write_docs_tasks(heldout_file: Path, folder: Path, *, seed: int) -> None:
    """Write both tasks, their questions and YAML files, into ``folder``.

    Args:
        heldout_file: JSON lines ``{"id", "text"}`` of documents that were not trained on.
        seed: decides which passages are asked.

    Raises:
        UserError: too few documents to make a question.
    """
    documents = [json.loads(line)["text"] for line in heldout_file.read_text(encoding="utf-8").split("\n") if line]
    passages = [list(_passages(text)) for text in documents]
    passages = [found for found in passages if found]
    if len(passages) < _MIN_DOCUMENTS:
        raise UserError(
            f"eval=docs needs {_MIN_DOCUMENTS} held-out documents of {CONTEXT_WORDS + CONTINUATION_WORDS} words or more and "
            f"there are {len(passages)}; hold out more (data.val_fraction=), or set eval=none"
        )
    folder.mkdir(parents=True, exist_ok=True)
    questions = _continuations(passages, random.Random(seed))
    _write(folder, "docs_continuation", questions, _CONTINUATION_YAML)
    _write(folder, "docs_lastword", _lastwords(passages, random.Random(seed + 1)), _LASTWORD_YAML)


def _passages(text: str) -> Iterator[tuple[str, str]]:
    """Successive (context, continuation) pairs of a document, with its own white space inside each."""
    spans = [match.span() for match in _WORD.finditer(text)]
    length = CONTEXT_WORDS + CONTINUATION_WORDS
    for first in range(0, len(spans) - length + 1, length):
        cut, last = first + CONTEXT_WORDS, first + length - 1
        yield text[spans[first][0] : spans[cut - 1][1]], text[spans[cut][0] : spans[last][1]]


def _continuations(passages: Sequence[Sequence[tuple[str, str]]], rng: random.Random) -> list[dict[str, object]]:
    places = [(document, index) for document, found in enumerate(passages) for index in range(len(found))]
    rng.shuffle(places)
    questions = []
    for document, index in places[:CONTINUATION_ITEMS]:
        context, truth = passages[document][index]
        others = rng.sample([other for other in range(len(passages)) if other != document], 3)
        choices = [rng.choice(passages[other])[1] for other in others]
        label = rng.randrange(4)
        choices.insert(label, truth)
        questions.append({"context": context, "choices": choices, "label": label})
    return questions


def _lastwords(passages: Sequence[Sequence[tuple[str, str]]], rng: random.Random) -> list[dict[str, object]]:
    found = []
    for document in passages:
        for context, continuation in document:
            text = f"{context} {continuation}"
            words = [match.span() for match in _WORD.finditer(text)]
            for start, end in reversed(words):  # the last plain word that the passage has used before
                word = text[start:end].rstrip(".,;:")
                if start < len(context):
                    break
                if _PLAIN.fullmatch(word) and word in text[:start].split():
                    found.append({"context": text[:start].rstrip(), "target": word})
                    break
    rng.shuffle(found)
    return found[:LASTWORD_ITEMS]


def _write(folder: Path, task: str, questions: Sequence[dict[str, object]], template: str) -> None:
    path = (folder / f"{task}.jsonl").absolute()
    path.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    cache = (folder / "arrow").absolute()
    yaml = template.format(file=json.dumps(str(path)), cache=json.dumps(str(cache)))
    (folder / f"{task}.yaml").write_text(yaml, encoding="utf-8")
