"""The suites: docs tasks from held-out documents, the paper's tasks from local files, one evaluator for many models."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from flowhn.config import build_model, compose
from flowhn.data import load_tokenizer, prepare
from flowhn.data.tokenization import TextTokenizer, train_bpe
from flowhn.errors import UserError
from flowhn.evaluation import Evaluator
from flowhn.evaluation.docs_tasks import write_docs_tasks
from flowhn.evaluation.suites import PAPER_TASKS

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SENTENCE = "these plain words make every single document that stands here because nobody wants longer texts in tests"
WORDS = SENTENCE.split(" ")
VOCAB = 400
DOCS = yaml.safe_load((CONFIGS / "eval" / "docs.yaml").read_text())


def document(number: int, n_words: int = 140) -> str:
    """Words of a small vocabulary with a number of its own every few words, so that each passage tells its document."""
    rng = random.Random(number)
    words = [f"mark{number}" if i % 5 == 0 else rng.choice(WORDS) for i in range(n_words)]
    return "\n".join(" ".join(words[i : i + 9]) for i in range(0, n_words, 9))


def heldout(path: Path, numbers=range(100, 112)) -> Path:
    path.write_text("".join(json.dumps({"id": str(n), "text": document(n)}) + "\n" for n in numbers))
    return path


@pytest.fixture(scope="module")
def tokenizer():
    texts = [document(n) for n in range(60)]
    return TextTokenizer(backend=train_bpe(iter(texts), vocab_size=VOCAB), eos_id=0)


def llama(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(compose("train", ["model=llama", "size=tiny", f"vocab_size={VOCAB}"])).eval()


def questions(folder: Path, task: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]


class Rigged(nn.Module):
    """Knows the given texts by heart: after a prefix of one it is sure of the next token, elsewhere it is undecided."""

    def __init__(self, texts: list[list[int]]) -> None:
        super().__init__()
        self.next = {tuple(ids[:end]): ids[end] for ids in texts for end in range(1, len(ids))}
        self.lm_head = nn.Linear(VOCAB, VOCAB, bias=False)
        self.lm_head.weight = nn.Parameter(12 * torch.eye(VOCAB))

    def body(self, ids):
        hidden = torch.zeros(*ids.shape, VOCAB)
        for row, tokens in enumerate(ids.tolist()):
            for end in range(1, len(tokens) + 1):
                if (token := self.next.get(tuple(tokens[:end]))) is not None:
                    hidden[row, end - 1, token] = 1
        return hidden


# --- eval=docs


def test_docs_tasks_are_the_same_on_every_call_and_follow_the_seed(tmp_path):
    path = heldout(tmp_path / "heldout.jsonl")
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        write_docs_tasks(path, tmp_path / name, seed=seed)
    for task in DOCS["tasks"]:
        a, b, c = (questions(tmp_path / name, task) for name in "abc")
        assert a == b
        assert a != c
        assert len(a) > 10


def test_docs_questions_are_made_of_held_out_documents_only(tmp_path):
    """The whole chain: what the data room holds out is asked, and nothing that it trains on."""
    source = tmp_path / "text"
    source.mkdir()
    for number in range(60):
        (source / f"{number}.txt").write_text(document(number))
    spec = yaml.safe_load((CONFIGS / "data" / "files.yaml").read_text())
    spec |= {"path": str(source), "val_fraction": 0.2}
    prepared = prepare(spec, vocab_size=VOCAB, seq_len=16, cache_dir=tmp_path / "cache")
    write_docs_tasks(prepared.heldout_file, tmp_path / "tasks", seed=0)
    rows = np.concatenate([np.asarray(prepared.train[i]["input_ids"])[:-1] for i in range(len(prepared.train))])
    trained = {word for word in load_tokenizer(prepared).decode(rows).split() if word.startswith("mark")}
    asked = {
        word
        for question in questions(tmp_path / "tasks", "docs_continuation")
        for text in (question["context"], *question["choices"])
        for word in text.split()
        if word.startswith("mark")
    }
    asked |= {
        word
        for question in questions(tmp_path / "tasks", "docs_lastword")
        for word in f"{question['context']} {question['target']}".split()
        if word.startswith("mark")
    }
    kept = {f"mark{n}" for n in range(60)}
    assert len(asked) >= 6
    assert asked <= kept
    assert not asked & trained


def test_the_true_continuation_stands_at_every_place_and_follows_its_context(tmp_path):
    write_docs_tasks(heldout(tmp_path / "heldout.jsonl"), tmp_path / "tasks", seed=0)
    found = questions(tmp_path / "tasks", "docs_continuation")
    assert {question["label"] for question in found} == {0, 1, 2, 3}
    for question in found:
        mark = next(word for word in question["context"].split() if word.startswith("mark"))
        text = document(int(mark[4:]))
        choices = question["choices"]
        assert [mark in choice.split() for choice in choices] == [i == question["label"] for i in range(4)]
        truth = choices[question["label"]]
        assert text.index(truth) > text.index(question["context"])
        assert len({choice.split()[0] for choice in choices} | {choice.split()[1] for choice in choices}) > 1
    for question in questions(tmp_path / "tasks", "docs_lastword"):
        assert question["target"] in question["context"].split()


@pytest.mark.parametrize(("shift", "expected"), [(0, 1.0), (1, 0.0)])
def test_a_model_that_knows_the_answers_scores_one_and_one_that_knows_wrong_ones_zero(
    tmp_path, tokenizer, shift, expected
):
    path = heldout(tmp_path / "heldout.jsonl")
    write_docs_tasks(path, tmp_path / "tasks", seed=5)
    words = questions(tmp_path / "tasks", "docs_lastword")
    texts = [f"{q['context']} {'zebra' if shift else q['target']}" for q in words]
    choices = questions(tmp_path / "tasks", "docs_continuation")  # last: what is learnt later counts
    texts += [f"{q['context']} {q['choices'][(q['label'] + shift) % 4]}" for q in choices]
    evaluator = Evaluator(suite=DOCS, heldout_file=path, work_dir=tmp_path / "work", seed=5)
    out = evaluator.run(Rigged([tokenizer.encode(text) for text in texts]), tokenizer, max_length=400)["tasks"]
    assert out["docs_continuation"]["acc"] == expected
    assert out["docs_continuation"]["acc_mutual_info"] == expected
    assert out["docs_lastword"]["acc"] == expected
    n = out["docs_continuation"]["n"]
    assert out["docs_continuation"]["correct"]["acc_mutual_info"] == str(int(expected)) * n
    assert out["docs_continuation"]["metric"] == "acc_mutual_info"
    assert out["docs_lastword"]["metric"] == "acc"
    assert out["docs_lastword"]["correct"].keys() == {"acc"}
    assert out["docs_continuation"]["chance"] == 0.25


def test_too_few_held_out_documents(tmp_path):
    path = heldout(tmp_path / "heldout.jsonl", range(3))
    with pytest.raises(UserError, match=r"eval=docs needs 4 held-out documents.*data\.val_fraction"):
        Evaluator(suite=DOCS, heldout_file=path, work_dir=tmp_path / "work", seed=0)
    with pytest.raises(UserError, match=r"eval=none or eval=paper"):
        Evaluator(suite=DOCS, heldout_file=None, work_dir=tmp_path / "work", seed=0)


# --- eval=paper from local files

ROWS = 6


def paper_rows(task: str) -> list[dict]:
    """Questions in the columns of the original data sets; the right answer is the one with ``good`` in it."""
    rows = []
    for i in range(ROWS):
        answers = [f"bad answer {i}", f"worse answer {i}"]
        four = [*answers, f"wrong answer {i}"]
        four.insert(i % 4, f"good answer {i}")
        two = [answers[0]]
        two.insert(i % 2, f"good answer {i}")
        if task.startswith("arc"):
            choices = {"text": four, "label": list("ABCD")}
            rows.append({"id": str(i), "question": f"What is {i}?", "choices": choices, "answerKey": "ABCD"[i % 4]})
        elif task == "winogrande":
            row = {"sentence": f"Number {i} won because _ ran fast.", "option1": two[0], "option2": two[1]}
            rows.append({**row, "answer": str(i % 2 + 1)})
        elif task == "piqa":
            rows.append({"goal": f"How to do {i}?", "sol1": two[0], "sol2": two[1], "label": i % 2})
        elif task == "hellaswag":
            row = {"ind": i, "activity_label": "Running", "ctx_a": f"A man runs {i}.", "ctx_b": "he"}
            row |= {"ctx": f"A man runs {i}. he", "endings": four, "source_id": "x", "split": "val"}
            rows.append({**row, "split_type": "indomain", "label": str(i % 4)})
        elif task == "boolq":
            rows.append({"question": f"is {i} a number", "passage": f"{i} is.", "idx": i, "label": int(i % 3 > 0)})
        else:
            rows.append({"text": f"These are {i} plain words and {i} good answers"})
    return rows


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for number, task in enumerate(PAPER_TASKS):
        lines = "".join(json.dumps(row) + "\n" for row in paper_rows(task))
        if number % 2:
            with gzip.open(folder / f"{task}.jsonl.gz", "wt") as file:
                file.write(lines)
        else:
            (folder / f"{task}.jsonl").write_text(lines)
    return folder


def suite(data_dir, tasks=tuple(PAPER_TASKS), **changes) -> dict:
    return {"name": "paper", "tasks": list(tasks), "data_dir": str(data_dir), "limit": None, **changes}


@pytest.fixture(scope="module")
def paper(data_dir, tmp_path_factory):
    return Evaluator(suite=suite(data_dir), heldout_file=None, work_dir=tmp_path_factory.mktemp("work"), seed=0)


@pytest.fixture(scope="module")
def first(paper, tokenizer):
    return paper.run(llama(), tokenizer, max_length=64)


def test_the_papers_tasks_are_read_from_local_files(paper, first):
    assert list(paper.tasks) == list(PAPER_TASKS)
    for task, numbers in first["tasks"].items():
        assert numbers["n"] == ROWS
        assert 0 <= numbers["acc"] <= 1
        assert numbers["chance"] == PAPER_TASKS[task].chance
        assert numbers["metric"] == "acc"
        assert len(numbers["correct"]["acc"]) == ROWS
        if task == "lambada_openai":  # nothing to choose from
            assert "choice" not in numbers
            continue
        labels = (
            [int(paper.tasks[task].doc_to_target(doc)) for doc in paper.tasks[task].eval_docs]
            if task != "winogrande"
            else None
        )
        assert len(numbers["choice"]) == ROWS
        if labels:
            assert numbers["correct"]["acc"] == "".join(
                str(int(int(c) == n)) for c, n in zip(numbers["choice"], labels, strict=True)
            )
        assert numbers["correct"]["acc"].count("1") / ROWS == pytest.approx(numbers["acc"])
    assert "acc_norm" in first["tasks"]["hellaswag"]["correct"]
    assert first["tasks"]["lambada_openai"]["perplexity"] > 1
    assert first["seconds"] > 0


def test_lm_evals_own_prompts_and_answers_are_asked(paper):
    """Formatting is lm-eval's: a mistake in our YAML (split, column) would show here."""
    expected = {
        "arc_easy": ("Question: What is 0?\nAnswer:", " good answer 0"),
        "piqa": ("Question: How to do 0?\nAnswer:", " good answer 0"),
        "hellaswag": ("Running: A man runs 0. He", " good answer 0"),
        "boolq": ("0 is.\nQuestion: is 0 a number?\nAnswer:", " no"),
        "winogrande": ("Number 0 won because good answer 0", " ran fast."),
        "lambada_openai": ("These are 0 plain words and 0 good", " answers"),
    }
    for task, pair in expected.items():
        assert paper.tasks[task].instances[0].args == pair
    labels = {task: [paper.tasks[task].doc_to_target(d) for d in paper.tasks[task].eval_docs] for task in PAPER_TASKS}
    assert labels["arc_challenge"] == [0, 1, 2, 3, 0, 1]
    assert [int(label) for label in labels["hellaswag"]] == [0, 1, 2, 3, 0, 1]
    assert labels["piqa"] == [0, 1, 0, 1, 0, 1]
    assert labels["boolq"] == [0, 1, 1, 0, 1, 1]


def test_a_model_that_likes_good_answers_is_right_everywhere(paper, tokenizer):
    texts = [
        tokenizer.encode(f"{context}{answer}")
        for name, task in paper.tasks.items()
        for context, answer in (instance.args for instance in task.instances)
        if (name in ("boolq", "lambada_openai") or "good" in context + answer)
    ]
    out = paper.run(Rigged(texts), tokenizer, max_length=400)["tasks"]
    for task in ("arc_easy", "arc_challenge", "piqa", "hellaswag", "winogrande", "lambada_openai"):
        assert out[task]["acc"] == 1.0, task
        assert out[task]["correct"]["acc"] == "1" * ROWS


def test_one_evaluator_serves_two_models_as_two_would(paper, first, data_dir, tmp_path, tokenizer):
    second = paper.run(llama(1), tokenizer, max_length=64)["tasks"]
    again = paper.run(llama(0), tokenizer, max_length=64)["tasks"]
    alone = Evaluator(suite=suite(data_dir), heldout_file=None, work_dir=tmp_path, seed=0)
    assert again == first["tasks"]
    assert alone.run(llama(1), tokenizer, max_length=64)["tasks"] == second
    assert second != again


def test_random_numbers_elsewhere_go_on_as_if_nothing_had_been_evaluated(paper, tokenizer):
    net = llama()
    net.train()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    paper.run(net, tokenizer, max_length=64)
    assert torch.equal(torch.get_rng_state(), before)
    assert net.training


def test_limit_asks_the_first_questions_of_each_task(data_dir, tmp_path, tokenizer, first):
    chosen = ["piqa", "lambada_openai"]
    evaluator = Evaluator(suite=suite(data_dir, chosen, limit=4), heldout_file=None, work_dir=tmp_path / "work", seed=0)
    out = evaluator.run(llama(), tokenizer, max_length=64)["tasks"]
    assert not list((tmp_path / "work").glob("*"))  # nothing is left behind
    for task in chosen:
        assert out[task]["n"] == 4
        assert out[task]["correct"]["acc"] == first["tasks"][task]["correct"]["acc"][:4]


@pytest.mark.parametrize("limit", [0, -1, 2.5, "ten", True])
def test_limit_must_be_a_number_of_questions(data_dir, tmp_path, limit):
    with pytest.raises(UserError, match=r"eval\.limit"):
        Evaluator(suite=suite(data_dir, limit=limit), heldout_file=None, work_dir=tmp_path, seed=0)


def broken(folder: Path, kind: str) -> dict:
    spec = suite(folder, ["piqa"])
    if kind == "no folder":
        return spec | {"data_dir": str(folder / "nowhere")}
    if kind == "no file":
        return spec
    content = {
        "not json": b"goal sol1 sol2\n",
        "cut": json.dumps(paper_rows("piqa")[0]).encode()[:-20],
        "empty": b"",
        "no label": b"".join(json.dumps(row | {"label": None}).encode() + b"\n" for row in paper_rows("piqa")),
        "other columns": b'{"question": "What?", "answer": "That."}\n' * 3,
        "not gzip": json.dumps(paper_rows("piqa")[0]).encode(),
    }[kind]
    name = "piqa.jsonl.gz" if kind == "not gzip" else "piqa.jsonl"
    (folder / name).write_bytes(content)
    return spec


@pytest.mark.parametrize(
    "kind", ["no folder", "no file", "not json", "cut", "empty", "other columns", "no label", "not gzip"]
)
def test_missing_or_broken_data_is_one_sentence_about_the_folder(tmp_path, kind, caplog):
    spec = broken(tmp_path, kind)
    with pytest.raises(UserError, match=r"eval\.data_dir") as caught:
        Evaluator(suite=spec, heldout_file=None, work_dir=tmp_path / "work", seed=0)
    assert "\n" not in str(caught.value)
    assert caplog.records == []
    assert "piqa" in str(caught.value) or kind == "no folder"


def test_an_unknown_task_is_named(tmp_path, data_dir):
    with pytest.raises(UserError, match=r"eval\.tasks has mmlu"):
        Evaluator(suite=suite(data_dir, ["mmlu"]), heldout_file=None, work_dir=tmp_path, seed=0)
