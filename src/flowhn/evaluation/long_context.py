"""``eval=long_context``: two retrieval tasks at lengths of 1k to 32k tokens, made from held-out documents.

- ``niah_<length>``: needle in a haystack. Four sentences "The secret word of K is V." stand among held-out text, and the value
  of one is asked (RULER's ``niah_multikey_1``, Hsieh et al. 2024).
- ``recall_<length>``: associative recall. Lines "K1 K2 = V" fill the whole context and the value of one is asked (as in
  Zoology's MQAR, Arora et al. 2023, in words).

``exact_match``: greedy decoding gives the value. ``acc``: it is the likeliest of four values that stand in the context (chance:
25 %), for models that have learnt to look but not to be sure. Lengths count the model's own tokens, answer included, and are
met from below. The asked place moves evenly from the beginning to the end (``depth``, 0 to 1). Keys and values are words
that the tokeniser knows as one token where it knows enough of them. Deterministic in documents, tokeniser and seed.
"""

from __future__ import annotations

import bisect
import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from flowhn.errors import UserError
from flowhn.evaluation.lm import Tokenizer

LENGTHS = {"1k": 1024, "2k": 2048, "4k": 4096, "8k": 8192, "16k": 16384, "32k": 32768}
LONG_TASKS = {f"{kind}_{name}": length for kind in ("niah", "recall") for name, length in LENGTHS.items()}
QUESTIONS = 50  # of each task, unless limited: a standard error of at most 7 points
_POOL, _MIN_POOL = 512, 128  # words that serve as keys and values
_N_NEEDLES = 4
_LINE_WORDS = 20
_WORD = re.compile(r"\b[a-z]{4,}\b")

_YAML = """task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0, length: {length}}}
"""


def write_long_tasks(
    tasks: Sequence[str],
    folder: Path,
    *,
    heldout_file: Path,
    tokenizer: Tokenizer,
    seed: int,
    n_questions: int,
) -> None:
    """Write tasks, their questions and YAML files, into ``folder``.

    Args:
        tasks: keys of ``LONG_TASKS``.
        heldout_file: JSON lines ``{"id", "text"}`` of documents that were not trained on.
        tokenizer: the model's; lengths are counted with it.
        seed: decides the questions, with the task's name.
        n_questions: how many in each task.

    Raises:
        UserError: the held-out text has too few different words.
    """
    maker = QuestionMaker(heldout_file=heldout_file, tokenizer=tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        rng = random.Random(f"{seed} {task}")
        ask = maker.needle if task.startswith("niah") else maker.recall
        path = (folder / f"{task}.jsonl").absolute()
        with path.open("w", encoding="utf-8") as file:
            for number in range(n_questions):
                file.write(json.dumps(ask(LONG_TASKS[task], (number + 0.5) / n_questions, rng)) + "\n")
        names = {"file": json.dumps(str(path)), "cache": json.dumps(str((folder / "arrow").absolute()))}
        yaml = _YAML.format(task=task, length=LONG_TASKS[task], **names)
        (folder / f"{task}.yaml").write_text(yaml, encoding="utf-8")


class QuestionMaker:
    """Makes the questions of both kinds; a question is ``{context, choices, label, depth, length}``.

    Args:
        heldout_file, tokenizer: see :func:`write_long_tasks`.
    """

    def __init__(self, *, heldout_file: Path, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        lines = [line for line in heldout_file.read_text(encoding="utf-8").split("\n") if line]
        texts = [json.loads(line)["text"] for line in lines]
        self._lines = [line for text in texts for line in _lines(text)]
        self._line_tokens = [len(tokenizer.encode(f"{line}\n")) for line in self._lines]
        self._words = self._pool(texts)

    def _pool(self, texts: Sequence[str]) -> list[str]:
        counts = Counter(word for text in texts for word in _WORD.findall(text))
        common = [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
        cost = {word: len(self._tokenizer.encode(f" {word}")) for word in common}
        pool = [word for word in common if cost[word] == 1][:_POOL]
        if len(pool) < _MIN_POOL:  # a small vocabulary: words of more tokens too, the common ones first among equals
            pool = sorted(common, key=cost.__getitem__)[:_POOL]
        if len(pool) < _MIN_POOL:
            raise UserError(
                f"eval=long_context needs {_MIN_POOL} different words of held-out text and there are {len(pool)}; hold out "
                "more (data.val_fraction=) or choose another eval="
            )
        return pool

    def needle(self, length: int, depth: float, rng: random.Random) -> dict[str, object]:
        """Four needles in held-out text; the asked one at ``depth``."""
        words = rng.sample(self._words, 2 * _N_NEEDLES)
        pairs = list(zip(words[:_N_NEEDLES], words[_N_NEEDLES:], strict=True))
        needles = [f"The secret word of {key} is {value}." for key, value in pairs]
        question = f"The secret word of {pairs[0][0]} is"
        fixed = "\n".join([*needles, f"{question} {pairs[0][1]}"])
        hay = self._haystack(length - len(self._tokenizer.encode(fixed)), rng)
        depths = [depth, *(rng.random() for _ in needles[1:])]

        def context() -> str:
            lines = list(hay)
            placed = sorted(zip(depths, needles, strict=True), reverse=True)  # from the end: earlier places stay valid
            for place, needle in placed:
                lines.insert(round(place * len(hay)), needle)
            return "\n".join([*lines, question])

        while self._size(context(), pairs[0][1]) > length and hay:
            hay.pop()
        return self._question(context(), [value for _, value in pairs], length, depth, rng)

    def recall(self, length: int, depth: float, rng: random.Random) -> dict[str, object]:
        """Lines of pairs all over the context; the asked one at ``depth``."""
        per_line = len(self._tokenizer.encode("".join(self._pair_line(rng) for _ in range(64)))) / 64
        n_pairs = max(_N_NEEDLES, int(length / per_line) + 8)
        size = len(self._words)
        keys = [f"{self._words[i // size]} {self._words[i % size]}" for i in rng.sample(range(size**2), n_pairs)]
        lines = [f"{key} = {rng.choice(self._words)}" for key in keys]
        budget = length - 2 * int(per_line + 1)  # the question is one more pair
        ends = list(accumulate(len(self._tokenizer.encode(f"{line}\n")) for line in lines))
        lines = lines[: max(_N_NEEDLES, bisect.bisect_right(ends, budget))]
        while True:
            asked = min(int(depth * len(lines)), len(lines) - 1)
            question, _, value = lines[asked].rpartition(" ")
            context = "\n".join([*lines, question])
            if self._size(context, value) <= length or len(lines) <= _N_NEEDLES:
                break
            lines.pop()
        others = sorted({line.rpartition(" ")[2] for line in lines} - {value})
        choices = [value, *rng.sample(others, min(_N_NEEDLES - 1, len(others)))]
        return self._question(context, choices, length, depth, rng)

    def _pair_line(self, rng: random.Random) -> str:
        a, b, c = rng.sample(self._words, 3)
        return f"{a} {b} = {c}\n"

    def _haystack(self, n_tokens: int, rng: random.Random) -> list[str]:
        """Successive lines of held-out text from a random place on, about ``n_tokens`` of them; wraps at the end."""
        found, total = [], 0
        at = rng.randrange(len(self._lines))
        while total + self._line_tokens[at] <= n_tokens:
            found.append(self._lines[at])
            total += self._line_tokens[at]
            at = (at + 1) % len(self._lines)
        return found

    def _size(self, context: str, answer: str) -> int:
        return len(self._tokenizer.encode(f"{context} {answer}"))

    def _question(
        self, context: str, choices: list[str], length: int, depth: float, rng: random.Random
    ) -> dict[str, object]:
        truth = choices[0]
        shuffled = rng.sample(choices, len(choices))
        label = shuffled.index(truth)
        return {"context": context, "choices": shuffled, "label": label, "depth": depth, "length": length}


def _lines(text: str) -> Iterator[str]:
    words = text.split()
    for first in range(0, len(words), _LINE_WORDS):
        yield " ".join(words[first : first + _LINE_WORDS])
