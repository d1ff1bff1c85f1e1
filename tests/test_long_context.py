"""``eval=long_context`` and ``eval=code``: what is asked, at which length, and what is said when it cannot be."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import datasets
import evaluate
import pytest
import torch
import yaml
from torch import nn

from flowhn.config import build_model, compose
from flowhn.data.tokenization import TextTokenizer, train_bpe
from flowhn.errors import UserError
from flowhn.evaluation import Evaluator
from flowhn.evaluation.long_context import LONG_TASKS, write_long_tasks

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "eval"
VOCAB = 700
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def word(number: int) -> str:
    return "".join(random.Random(number).choices(LETTERS, k=4 + number % 3))


def document(number: int, n_words: int = 400) -> str:
    return " ".join(word(random.Random(f"{number} {i}").randrange(200)) for i in range(n_words)) + "."


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    path = tmp_path_factory.mktemp("heldout") / "heldout.jsonl"
    path.write_text("".join(json.dumps({"id": str(n), "text": document(n)}) + "\n" for n in range(4)))
    return path


@pytest.fixture(scope="module")
def tokenizer():
    texts = [*(document(n) for n in range(40)), *("The secret word of this is that = \n" for _ in range(9))]
    return TextTokenizer(backend=train_bpe(iter(texts), vocab_size=VOCAB), eos_id=0)


@pytest.fixture
def lengths(monkeypatch):
    """Short stand-ins for 1k to 32k."""
    small = {"niah_1k": 200, "niah_2k": 300, "recall_1k": 100, "recall_2k": 240}
    for name, length in small.items():
        monkeypatch.setitem(LONG_TASKS, name, length)
    return small


def questions(folder: Path, task: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]


def written(folder, heldout, tokenizer, tasks, **options) -> dict[str, list[dict]]:
    options = {"seed": 0, "n_questions": 12, **options}
    write_long_tasks(list(tasks), folder, heldout_file=heldout, tokenizer=tokenizer, **options)
    return {task: questions(folder, task) for task in tasks}


def truth(question: dict) -> str:
    return question["choices"][question["label"]]


def test_the_suite_asks_both_tasks_at_1k_to_32k():
    suite = yaml.safe_load((CONFIGS / "long_context.yaml").read_text())
    assert suite["tasks"] == list(LONG_TASKS)
    assert sorted(set(LONG_TASKS.values())) == [2**k for k in range(10, 16)]
    assert suite["max_length"] == max(LONG_TASKS.values())


def test_lengths_are_met_in_the_models_tokens(tmp_path, heldout, tokenizer, lengths):
    for task, asked in written(tmp_path, heldout, tokenizer, lengths).items():
        assert len(asked) == 12
        for question in asked:
            n = len(tokenizer.encode(f"{question['context']} {truth(question)}"))
            assert lengths[task] - 80 < n <= lengths[task]
            assert question["length"] == lengths[task]


def test_a_real_length_is_met_too(tmp_path, heldout, tokenizer):
    for asked in written(tmp_path, heldout, tokenizer, ["niah_1k", "recall_4k"], n_questions=2).values():
        for question in asked:
            n = len(tokenizer.encode(f"{question['context']} {truth(question)}"))
            assert 0.93 * question["length"] < n <= question["length"]


def test_every_question_has_its_answer_once_in_the_context(tmp_path, heldout, tokenizer, lengths):
    made = written(tmp_path, heldout, tokenizer, lengths)
    for question in made["niah_1k"] + made["niah_2k"]:
        key = re.fullmatch(r"The secret word of (\w+) is", question["context"].rpartition("\n")[2])[1]
        found = re.findall(rf"^The secret word of {key} is (\w+)\.$", question["context"], re.M)
        assert found == [truth(question)]
        assert len(re.findall(r"^The secret word of \w+ is \w+\.$", question["context"], re.M)) == 4
        for choice in question["choices"]:
            assert f" is {choice}." in question["context"]
    for question in made["recall_1k"] + made["recall_2k"]:
        *lines, last = question["context"].split("\n")
        pairs = dict(line.split(" = ") for line in lines)
        assert len(pairs) == len(lines)  # no key twice
        assert pairs[last.removesuffix(" =")] == truth(question)
        assert set(question["choices"]) <= set(pairs.values())
    for asked in made.values():
        assert all(len(set(question["choices"])) == len(question["choices"]) == 4 for question in asked)
    assert {question["label"] for asked in made.values() for question in asked} == {0, 1, 2, 3}


def test_the_asked_place_moves_from_the_beginning_to_the_end(tmp_path, heldout, tokenizer):
    for asked in written(tmp_path, heldout, tokenizer, ["niah_2k", "recall_2k"], n_questions=8).values():
        places = []
        for question in asked:
            *lines, last = question["context"].split("\n")
            at = next(i for i, line in enumerate(lines) if line.startswith(last))
            places.append((at + 0.5) / len(lines))
        assert [question["depth"] for question in asked] == [(i + 0.5) / 8 for i in range(8)]
        assert places == pytest.approx([question["depth"] for question in asked], abs=0.1)


def test_questions_follow_the_seed_only(tmp_path, heldout, tokenizer, lengths):
    a, b, c = (
        written(tmp_path / name, heldout, tokenizer, lengths, seed=seed)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert a == b
    assert a != c


def test_too_few_words(tmp_path, tokenizer):
    path = tmp_path / "heldout.jsonl"
    path.write_text(json.dumps({"id": "0", "text": "some words, not many " * 99}) + "\n")
    with pytest.raises(UserError, match=r"eval=long_context needs 128 different words"):
        written(tmp_path / "tasks", path, tokenizer, ["niah_1k"])


class Looker(nn.Module):
    """An associative memory: after words that stood earlier it gives what followed them there, ``n`` tokens looked at."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n
        self.lm_head = nn.Linear(VOCAB, VOCAB, bias=False)
        self.lm_head.weight = nn.Parameter(9 * torch.eye(VOCAB))

    def body(self, ids):
        targets = torch.zeros_like(ids)
        for row, tokens in enumerate(ids.tolist()):
            following: dict[tuple[int, ...], int] = {}
            for end in range(self.n, len(tokens) + 1):
                tail = tuple(tokens[end - self.n : end])
                targets[row, end - 1] = following.get(tail, 0)
                if end < len(tokens):
                    following[tail] = tokens[end]
        return nn.functional.one_hot(targets, VOCAB).float()


def suite(tasks, **changes) -> dict:
    return {"name": "long_context", "tasks": list(tasks), "data_dir": None, "limit": None, **changes}


@pytest.fixture
def evaluator(tmp_path, heldout, tokenizer, lengths):
    return Evaluator(
        suite=suite(lengths, limit=8), heldout_file=heldout, work_dir=tmp_path / "work", seed=0, tokenizer=tokenizer
    )


def test_a_limit_keeps_all_depths(evaluator):
    for task in evaluator.tasks.values():
        assert [doc["depth"] for doc in task.eval_docs] == [(i + 0.5) / 8 for i in range(8)]


def test_a_model_with_a_memory_is_right_and_one_without_is_not(evaluator, tokenizer, lengths):
    good = evaluator.run(Looker(n=4), tokenizer, max_length=400)["tasks"]
    torch.manual_seed(0)
    net = build_model(compose("train", ["model=llama", "size=tiny", f"vocab_size={VOCAB}"])).eval()
    poor = evaluator.run(net, tokenizer, max_length=400)["tasks"]
    for task, length in lengths.items():
        assert good[task]["exact_match"] == good[task]["acc"] == 1.0, task
        assert good[task]["correct"]["exact_match"] == "1" * 8
        assert good[task]["length"] == length
        assert good[task]["metric"] == "exact_match"
        assert good[task]["chance"] == 0.0
        assert "exact_match_stderr" in good[task]
        assert poor[task]["exact_match"] < 0.3


@pytest.mark.slow  # .ci/run runs it
def test_models_run_beyond_the_length_they_were_trained_at(evaluator, tokenizer):
    for cell in ("mamba1", "mamba2", "shm", "flowhn"):
        net = build_model(compose("train", [f"model={cell}", "size=tiny", f"vocab_size={VOCAB}", "seq_len=64"])).eval()
        out = evaluator.run(net, tokenizer, max_length=300)["tasks"]
        assert all(0 <= numbers["acc"] <= 1 for numbers in out.values())


def test_questions_are_never_cut(evaluator, tokenizer):
    with pytest.raises(UserError, match=r"eval\.max_length=250 would cut the questions of niah_2k; set it to 300"):
        evaluator.run(Looker(n=4), tokenizer, max_length=250)


def test_held_out_text_and_a_tokenizer_are_needed(tmp_path, heldout, tokenizer):
    with pytest.raises(UserError, match=r"eval=long_context needs held-out text"):
        Evaluator(suite=suite(["niah_1k"]), heldout_file=None, work_dir=tmp_path, seed=0, tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"niah_1k counts its length in tokens"):
        Evaluator(suite=suite(["niah_1k"]), heldout_file=heldout, work_dir=tmp_path, seed=0)


# --- eval=code

CODE = yaml.safe_load((CONFIGS / "code.yaml").read_text())
PROMPT = 'def add(a, b):\n    """Add."""\n'
SOLUTION = "    return a + b\n"
CHECK = "def check(candidate):\n    assert candidate(2, 3) == 5\n"


def test_code_needs_consent(tmp_path, monkeypatch):
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(UserError, match=r"humaneval runs the programs that the model writes.*HF_ALLOW_CODE_EVAL=1"):
        Evaluator(suite=CODE, heldout_file=None, work_dir=tmp_path, seed=0)


def test_code_needs_the_hub(tmp_path, monkeypatch):
    def unreachable(*args, **options):
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    monkeypatch.setattr(evaluate, "load", unreachable)
    with pytest.raises(UserError, match=r"humaneval needs the Hugging Face hub.*Couldn't reach the hub") as caught:
        Evaluator(suite=CODE, heldout_file=None, work_dir=tmp_path, seed=0)
    assert "\n" not in str(caught.value)


class RunsIt:
    """code_eval's part: runs the candidate before its test."""

    def compute(self, references, predictions, k):
        passed = []
        for reference, candidates in zip(references, predictions, strict=True):
            try:
                exec(f"{candidates[0]}\n{reference}", {})
                passed.append(1.0)
            except Exception:
                passed.append(0.0)
        return {f"pass@{k[0]}": sum(passed) / len(passed)}, {}


class Knows(nn.Module):
    """Continues the given texts, then ends."""

    def __init__(self, texts: list[list[int]]) -> None:
        super().__init__()
        self.next = {tuple(ids[:end]): ids[end] for ids in texts for end in range(1, len(ids))}
        self.lm_head = nn.Linear(VOCAB, VOCAB, bias=False)
        nn.init.eye_(self.lm_head.weight)

    def body(self, ids):
        hidden = torch.zeros(*ids.shape, VOCAB)
        for row, tokens in enumerate(ids.tolist()):
            for end in range(1, len(tokens) + 1):
                hidden[row, end - 1, self.next.get(tuple(tokens[:end]), 0)] = 1
        return hidden


def test_humaneval_runs_what_the_model_wrote(tmp_path, monkeypatch, tokenizer):
    rows = [
        {"task_id": f"T/{i}", "prompt": prompt, "canonical_solution": "", "test": CHECK, "entry_point": "add"}
        for i, prompt in enumerate((PROMPT, PROMPT.replace("Add", "Sum")))
    ]
    data = datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    monkeypatch.setattr(evaluate, "load", lambda name: RunsIt())
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: data)
    code = Evaluator(suite=CODE | {"tasks": ["humaneval"]}, heldout_file=None, work_dir=tmp_path, seed=0)
    prompts = [instance.args[0] for instance in code.tasks["humaneval"].instances]
    ids = [tokenizer.encode(f"{prompts[0]}{SOLUTION}\n#end"), tokenizer.encode(prompts[1] + "    return a - b\n")]
    out = code.run(Knows(ids), tokenizer, max_length=400)["tasks"]["humaneval"]
    assert out["pass@1"] == 0.5
    assert out["metric"] == "pass@1"
    assert out["correct"]["pass@1"] == "10"
    assert out["n"] == 2


def test_mbpp_runs_what_the_model_wrote(tmp_path, monkeypatch, tokenizer):
    tests = ["assert add(2, 3) == 5", "assert add(0, 0) == 0", "assert add(1, 1) == 2"]
    rows = [{"task_id": n, "text": f"Add {n}.", "code": "", "test_list": tests} for n in (11, 12)]
    data = datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    monkeypatch.setattr(evaluate, "load", lambda name: RunsIt())
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: data)
    code = Evaluator(suite=CODE | {"tasks": ["mbpp"]}, heldout_file=None, work_dir=tmp_path, seed=0)
    prompts = [instance.args[0] for instance in code.tasks["mbpp"].instances]
    assert all(prompt.count("[BEGIN]") == 4 and prompt.endswith("[BEGIN]\n") for prompt in prompts)  # three shown
    written = ["def add(a, b):\n    return a * b\n[DONE] then more", "def add(a, b):\n    return a + b\n[DONE]"]
    ids = [tokenizer.encode(prompt + text) for prompt, text in zip(prompts, written, strict=True)]
    out = code.run(Knows(ids), tokenizer, max_length=len(max(ids, key=len)) + 8)["tasks"]["mbpp"]
    assert out["pass_at_1"] == 0.5
    assert out["metric"] == "pass_at_1"
    assert out["correct"]["pass_at_1"] == "01"
    assert out["chance"] == 0.0
