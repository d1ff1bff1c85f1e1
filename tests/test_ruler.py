"""``eval=ruler``: lm-eval's own questions at the asked lengths, its own scores, and what is said when they cannot be had."""

from __future__ import annotations

import itertools
import json
import random
import sys
from types import SimpleNamespace

import nltk
import numpy as np
import pytest
import requests
import torch
from torch import nn

from flowhn.config import build_model, compose, to_dict
from flowhn.config_checks import check_values
from flowhn.data.tokenization import TextTokenizer, train_bpe
from flowhn.errors import UserError
from flowhn.evaluation import Evaluator, ruler
from flowhn.evaluation.ruler import ROOM, RULER_TASKS, at_lengths, write_ruler_tasks
from flowhn.evaluation.suites import needs_length
from flowhn.experiment import Workshop

VOCAB = 900
LOCAL = [name for name, task in RULER_TASKS.items() if not task.download]
# What lm-eval's questions are made of, so that a small vocabulary has few tokens for them.
PHRASES = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n",
    "Memorize and track the chain(s) of variable assignment hidden in the following text. VAR = VAR = ",
    "Answer: According to the chain(s) of variable assignment in the text above, 5 variables are assgined the value",
    "Question: Find all variables that are assigned the value in the text above. they are: ",
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you",
    "What are all the special magic uuids for mentioned in the provided text? One of the special magic uuids for is: ",
    "The special magic number for mentioned in the provided text is",
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared",
    "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently appeared",
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that",
    "Question: What are the 10 most common words in the above list? Answer: The top 10 words that appear most often are:",
)
# wonderwords is an extra: 300 words of three kinds stand in for its lists.
WORDS = """
class RandomWord:
    def __init__(self):
        words = [a + b + c for a in "bdfgk" for b in "aeiou" for c in "lmnprstvxzqw"]
        self._categories = {"nouns": words[:100], "adjectives": words[100:200], "verbs": words[200:]}
        self._categories |= {name[:-1]: words for name, words in self._categories.items()}
"""


@pytest.fixture(scope="module")
def tokenizer():
    return TextTokenizer(backend=train_bpe(iter(PHRASES * 9), vocab_size=VOCAB), eos_id=0)


@pytest.fixture
def words(tmp_path, monkeypatch):
    """Stand-in word lists, in lm-eval's modules too; as they were afterwards."""
    (tmp_path / "site" / "wonderwords").mkdir(parents=True)
    (tmp_path / "site" / "wonderwords" / "__init__.py").write_text(WORDS)
    monkeypatch.syspath_prepend(tmp_path / "site")
    for name in [name for name in sys.modules if name.startswith(("lm_eval.tasks.ruler.", "wonderwords"))]:
        monkeypatch.delitem(sys.modules, name)
    yield
    for name in [name for name in sys.modules if name.startswith(("lm_eval.tasks.ruler.", "wonderwords"))]:
        del sys.modules[name]


def suite(*overrides: str) -> dict:
    return to_dict(compose("train", ["eval=ruler", *overrides]))["eval"]


def written(folder, tokenizer, *names: str, **options) -> dict[str, list[dict]]:
    write_ruler_tasks(names, folder, tokenizer=tokenizer, **{"seed": 0, "n_questions": 3, **options})
    return {name: [json.loads(line) for line in (folder / f"{name}.jsonl").open()] for name in names}


# --- what is asked


def test_the_suite_asks_what_needs_no_download_at_each_length():
    assert suite()["tasks"] == LOCAL
    asked = suite("eval.tasks=[arc_easy,ruler_vt]", "eval.lengths=[4096,2048,4096]")
    assert at_lengths(asked) == ["arc_easy", "ruler_vt_2048", "ruler_vt_4096"]
    assert needs_length(asked) == 4096 + ROOM
    assert needs_length({"tasks": ["arc_easy"]}) is None
    assert needs_length({"tasks": ["niah_1k"], "max_length": 7}) == 7


@pytest.mark.parametrize("task", LOCAL)
def test_questions_meet_the_length_and_hold_their_answers(task, tmp_path, tokenizer, words):
    name = f"{task}_1400"
    rows = written(tmp_path, tokenizer, name)[name]
    assert len({row["input"] for row in rows}) == len(rows) == 3
    kept = {"ruler_vt": 30, "ruler_cwe": 120, "ruler_fwe": 50}.get(task, 128)  # of max_gen_toks
    for row in rows:
        n = len(tokenizer.encode(f"{row['input']} {row['gen_prefix']}")) + kept
        assert 700 < n <= 1400 + ROOM
        assert row["outputs"]
        assert all(answer in row["input"] for answer in row["outputs"])


def test_they_follow_the_seed_alone_and_leave_the_random_numbers_alone(tmp_path, tokenizer, words):
    names = ["ruler_cwe_1400", "ruler_vt_1400", "niah_multikey_3_600"]
    before = random.getstate(), np.random.get_state()[1].tolist()
    first = written(tmp_path / "a", tokenizer, *names)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    random.seed(5)
    assert written(tmp_path / "b", tokenizer, *reversed(names)) == first
    assert all(other != first[name] for name, other in written(tmp_path / "c", tokenizer, *names, seed=1).items())
    more = written(tmp_path / "d", tokenizer, *names, n_questions=5)
    assert all(more[name][:3] == first[name] for name in names)


def test_they_are_those_that_lm_eval_makes(tmp_path, tokenizer, words, monkeypatch):
    """Its own function, all 500 of them, with the same random numbers."""
    found = written(tmp_path, tokenizer, "niah_single_1_600")["niah_single_1_600"]
    from lm_eval.tasks.ruler import niah_utils

    monkeypatch.setattr(
        niah_utils, "get_tokenizer", lambda name: lambda text: SimpleNamespace(input_ids=tokenizer.encode(text))
    )
    random.seed("0 niah_single_1_600")
    random.getrandbits(32)
    rows = list(niah_utils.niah_single_1(tokenizer="ours", max_seq_lengths=[600])["test"])
    assert len(rows) == ruler.QUESTIONS
    assert rows[:3] == found


# --- what is scored


class Says(nn.Module):
    """Continues each of the given contexts with its text, then ends; long before that it is undecided."""

    def __init__(self, texts: list[tuple[list[int], list[int]]]) -> None:
        super().__init__()
        self.next = {(*context[-300:], *text[:i]): text[i] for context, text in texts for i in range(len(text))}
        self.sizes = sorted({len(key) for key in self.next})
        self.lm_head = nn.Linear(VOCAB, VOCAB, bias=False)
        nn.init.eye_(self.lm_head.weight)

    def body(self, ids):
        hidden = torch.zeros(*ids.shape, VOCAB)
        for row, tokens in enumerate(ids.tolist()):
            for end, size in itertools.product(range(300, len(tokens) + 1), self.sizes):
                if size <= end and (token := self.next.get(tuple(tokens[end - size : end]))) is not None:
                    hidden[row, end - 1, token] = 1
        return hidden


def test_the_score_is_the_share_of_the_answers_that_the_text_has(tmp_path, tokenizer):
    asked = suite("eval.tasks=[ruler_fwe]", "eval.lengths=[400,512]", "eval.limit=2")
    evaluator = Evaluator(suite=asked, heldout_file=None, work_dir=tmp_path, seed=0, tokenizer=tokenizer)
    texts, shares = [], {400: (3, 1), 512: (2, 0)}  # of three words
    for length, known in shares.items():
        for instance, n in zip(evaluator.tasks[f"ruler_fwe_{length}"].instances, known, strict=True):
            text = f" 1. {' '.join(instance.doc['outputs'][:n]).upper()}"  # case does not count
            texts.append((tokenizer.encode(instance.args[0]), tokenizer.encode(text)))
            assert instance.args[0].endswith("the three most frequently appeared words are:")
    out = evaluator.run(Says(texts), tokenizer, max_length=needs_length(asked))["tasks"]
    assert list(out) == ["ruler_fwe_400", "ruler_fwe_512"]
    for length, known in shares.items():
        found = out[f"ruler_fwe_{length}"]
        assert found["string_match"] == pytest.approx(sum(known) / 6)
        assert {key: found[key] for key in ("metric", "length", "n", "chance")} == {
            "metric": "string_match", "length": length, "n": 2, "chance": 0.0,
        }  # fmt: skip
        assert found["string_match_stderr"] > 0
        assert not {"4096", str(length)} & set(found)


def test_a_model_trained_at_128_is_asked_at_400(tmp_path, tokenizer):
    """The whole way that ``flowhn-eval`` goes; another tokenizer gets questions of its own."""
    config = to_dict(compose("train", ["model=flowhn", "size=tiny", f"vocab_size={VOCAB}", f"cache_dir={tmp_path}"]))
    assert config["seq_len"] == 128
    asked = suite("eval.tasks=[ruler_fwe]", "eval.lengths=[400]", "eval.limit=2")
    workshop, hardware = Workshop(), SimpleNamespace(device=torch.device("cpu"), precision="32-true")
    result = workshop.evaluate(
        build_model(config).eval(), tokenizer, config, suite=asked, hardware=hardware, heldout_file=None
    )
    assert result["suite"] == "ruler"
    assert result["tasks"]["ruler_fwe_400"]["n"] == 2
    assert 0 <= result["tasks"]["ruler_fwe_400"]["string_match"] <= 1
    other = TextTokenizer(backend=train_bpe(iter(PHRASES), vocab_size=300), eos_id=0)
    made = [
        workshop.evaluator(config, suite=asked, tokenizer=one, heldout_file=None)
        for one in (tokenizer, other, tokenizer)
    ]
    assert made[0] is made[2] is not made[1]


# --- what is said


def refused(folder, tokenizer, name: str, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        written(folder, tokenizer, name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("task", LOCAL)
def test_a_length_that_is_too_short_is_refused(task, tmp_path, tokenizer, words):
    """lm-eval would look for a shorter question for ever (vt, cwe, fwe)."""
    for length in (1, 64):
        refused(
            tmp_path,
            tokenizer,
            f"{task}_{length}",
            rf"eval.lengths={length} is too short for {task}, .* set eval.lengths=",
        )


def test_an_example_that_is_too_long_is_refused(tmp_path):
    spells = TextTokenizer(backend=train_bpe(iter(["a"]), vocab_size=257), eos_id=0)
    refused(
        tmp_path, spells, "ruler_vt_4096", "worked example of ruler_vt 500 tokens.*leave ruler_vt out of eval.tasks"
    )


def test_a_missing_package_is_named(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(ruler, "find_spec", lambda name: None)
    refused(
        tmp_path,
        tokenizer,
        "niah_single_1_600",
        r"niah_single_1 needs the package wonderwords.*\[ruler_vt, ruler_fwe\]",
    )


def test_data_that_cannot_be_had_is_named(tmp_path, tokenizer, words, monkeypatch):
    def unreachable(*args, **options):
        raise requests.exceptions.ConnectionError("HTTPSConnectionPool(host='x'): Max retries (Caused by ...)")

    def absent(*args, **options):
        raise LookupError

    monkeypatch.setattr(requests, "get", unreachable)
    monkeypatch.setattr(nltk.data, "find", absent)
    monkeypatch.setattr(nltk, "download", lambda *names, **options: False)
    local = r"eval.tasks=\[niah_single_1, .*ruler_fwe\]"
    refused(tmp_path, tokenizer, "ruler_qa_squad_2048", rf"needs SQuAD .* \(ConnectionError\).*{local}")
    refused(tmp_path, tokenizer, "ruler_qa_hotpot_2048", rf"needs HotpotQA .* \(ConnectionError\).*{local}")
    refused(tmp_path, tokenizer, "niah_single_2_2048", rf"needs Paul Graham's essays .*punkt_tab cannot.*{local}")


def test_lengths_and_a_tokenizer_are_needed(tmp_path):
    with pytest.raises(UserError, match=r"ruler_vt needs lengths in tokens; choose eval=ruler"):
        at_lengths({"tasks": ["ruler_vt"]})
    asked = suite("eval.tasks=[ruler_fwe]")
    with pytest.raises(UserError, match="ruler_fwe_2048 counts its length in tokens and the model has no tokenizer"):
        Evaluator(suite=asked, heldout_file=None, work_dir=tmp_path, seed=0)
    for wrong in (4096, [], ["4k"], [0], None):
        with pytest.raises(UserError, match=r"eval.lengths=.* must be a list of lengths in tokens"):
            check_values({"lengths": wrong}, "eval.")
