"""The lm-eval adapter: every number is what one request at a time gives, whatever is shared, batched, padded or chunked."""

from __future__ import annotations

import random
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from flowhn.config import build_model, compose
from flowhn.data.tokenization import TextTokenizer, train_bpe
from flowhn.evaluation import FlowHNLM
from flowhn.evaluation import lm as lm_module

VOCAB, MAX_LENGTH = 320, 24
SENTENCE = "the cat sat on a mat and the dog ran to the red house where nobody lived for many long years"
WORDS = SENTENCE.split(" ")
CELLS = ("llama", "mamba1", "mamba2", "hymba", "flowhn_no", "flowhn_fac")


@cache
def tokenizer() -> TextTokenizer:
    texts = [" ".join(random.Random(seed).choices(WORDS, k=40)) for seed in range(50)]
    return TextTokenizer(backend=train_bpe(iter(texts), vocab_size=VOCAB), eos_id=0)


@cache
def model(cell: str, *overrides: str) -> nn.Module:
    name, _, split = cell.partition("_")
    torch.manual_seed(0)
    words = [f"model={name}", f"split={split or 'fac'}", "size=tiny", f"vocab_size={VOCAB}", *overrides]
    built = build_model(compose("train", words)).eval()
    with torch.no_grad():
        built.lm_head.weight.mul_(20)  # a random head is nearly uniform: errors would hardly show
    return built


def adapter(cell: str = "llama", *overrides: str, **options) -> FlowHNLM:
    return FlowHNLM(model(cell, *overrides), tokenizer(), **{"max_length": MAX_LENGTH, **options})


def requests(*pairs: tuple) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=pair) for pair in pairs]


def text(n_words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=n_words))


@torch.no_grad()
def naive(cell: str, context: list[int], continuation: list[int], *overrides: str) -> tuple[float, bool]:
    """One forward pass of one request, as lm-eval defines it."""
    inputs = (context + continuation)[-(MAX_LENGTH + 1) :][:-1]
    log_probs = model(cell, *overrides)(torch.tensor([inputs])).double().log_softmax(-1)[0, -len(continuation) :]
    total = sum(log_probs[i, token].item() for i, token in enumerate(continuation))
    return total, log_probs.argmax(-1).tolist() == continuation


def encoded(context: str, continuation: str) -> tuple[list[int], list[int]]:
    if not context:
        return [0], tokenizer().encode(continuation)
    stripped = context.rstrip()
    before = tokenizer().encode(stripped)
    return before, tokenizer().encode(context + continuation)[len(before) :]


PAIRS = (
    *((text(6, 1), f" {word}") for word in ("cat", "dog", "mat")),  # one-token answers to one context
    *((text(n, n), f" {text(n % 4 + 1, n + 50)}") for n in range(1, 12)),  # padding on the right
    (text(60, 3), " red house"),  # longer than the model: loses its left end
    (text(30, 4), " " + text(15, 5)),
    ("", text(5, 6)),  # empty context: the end-of-text token
    ("the cat ", "sat"),  # the trailing space belongs to the answer
    (text(6, 1), " cat"),  # asked twice
)


def assert_close(found, expected):
    assert len(found) == len(expected)
    for (log_likelihood, greedy), (expected_value, expected_greedy) in zip(found, expected, strict=True):
        assert log_likelihood == pytest.approx(expected_value, abs=1e-4)
        assert greedy is expected_greedy


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("batch_tokens", [1, 64, 8192])
def test_log_likelihoods_equal_one_request_at_a_time(cell, batch_tokens):
    found = adapter(cell, batch_tokens=batch_tokens).loglikelihood(requests(*PAIRS))
    assert_close(found, [naive(cell, *encoded(*pair)) for pair in PAIRS])
    assert len({round(value, 3) for value, _ in found}) == len(PAIRS) - 1  # only the repeated request is equal


def test_greedy_answers_are_found():
    context = tokenizer().encode(text(5, 9))
    continuation = []
    for _ in range(3):
        continuation.append(model("llama")(torch.tensor([context + continuation]))[0, -1].argmax().item())
    wrong = [*continuation[:-1], (continuation[-1] + 1) % VOCAB]
    asked = [(None, context, continuation), (None, context, wrong), (None, context, continuation[:1])]
    assert [greedy for _, greedy in adapter()._loglikelihood_tokens(asked)] == [True, False, True]


def test_one_input_is_computed_once(monkeypatch):
    seen = []
    net = model("llama")
    monkeypatch.setattr(net, "body", lambda ids, body=net.body: seen.append(ids.shape) or body(ids))
    context = tokenizer().encode(text(6, 1))
    answers = [(None, context, [token]) for token in range(30)]
    found = adapter()._loglikelihood_tokens(answers)
    assert seen == [(1, len(context))]
    assert sum(torch.tensor([value for value, _ in found]).exp()) < 1
    assert_close(found, [naive("llama", context, [token]) for token in range(30)])


def test_the_head_sees_scored_positions_only_and_a_bounded_number_at_once(monkeypatch):
    rows, widths = [], []
    net = model("llama")
    monkeypatch.setattr(lm_module, "_LOGITS_NUMBERS", 3 * VOCAB + 7)
    monkeypatch.setattr(net, "body", lambda ids, body=net.body: widths.append(ids.numel()) or body(ids))
    with_hook = net.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[0]))
    try:
        found = adapter(batch_tokens=100).loglikelihood(requests(*PAIRS))
    finally:
        with_hook.remove()
    assert max(rows) == 3
    inputs = {tuple((c + a)[-(MAX_LENGTH + 1) :][:-1]): len(a) for c, a in (encoded(*pair) for pair in PAIRS)}
    assert sum(rows) == sum(inputs.values())
    assert max(widths) <= 100
    assert_close(found, [naive("llama", *encoded(*pair)) for pair in PAIRS])


def test_a_request_without_an_answer_does_not_spoil_the_others():
    context = tokenizer().encode(text(6, 1))
    found = adapter()._loglikelihood_tokens([(None, context, []), (None, context, [5, 6])])
    assert found[0] == (0.0, True)
    assert_close(found[1:], [naive("llama", context, [5, 6])])


# --- rolling


@pytest.mark.parametrize("cell", ["llama", "flowhn_fac"])
def test_rolling_log_likelihood_equals_windows_one_by_one(cell):
    texts = ["the", text(10, 1), text(MAX_LENGTH * 3, 2), ""]
    found = adapter(cell).loglikelihood_rolling(requests(*((t,) for t in texts)))
    for one, value in zip(texts, found, strict=True):
        tokens = [0, *tokenizer().encode(one)]  # end of text, then the text
        expected, done = 0.0, 0
        while done < len(tokens) - 1:
            # The first window is full; later ones score max_length new tokens, the last is filled up with context.
            new = min(MAX_LENGTH, len(tokens) - 1 - done)
            first = 0 if done == 0 else done + new - MAX_LENGTH
            context = tokens[first : done + 1]
            expected += naive(cell, context, tokens[done + 1 : done + 1 + new])[0]
            done += new
        assert value == pytest.approx(expected, abs=1e-3)
    assert found[-1] == 0.0


# --- generation


def greedy(cell: str, ids: list[int], n: int, *overrides: str) -> list[int]:
    made: list[int] = []
    for _ in range(n):
        with torch.no_grad():
            token = model(cell, *overrides)(torch.tensor([(ids + made)[-MAX_LENGTH:]]))[0, -1].argmax().item()
        if token == 0:
            break
        made.append(token)
    return made


@pytest.mark.parametrize("cell", ["llama", "mamba1", "flowhn_fac"])
def test_generation_is_greedy_whatever_is_asked_beside(cell):
    contexts = [text(n, n) for n in (1, 3, 4, 12)] + [text(40, 7), ""]
    options = [{"until": [], "max_gen_toks": n} for n in (9, 3, 6, 6, 6, 6)]
    found = adapter(cell).generate_until(requests(*zip(contexts, options, strict=True)))
    for context, option, made in zip(contexts, options, found, strict=True):
        ids = tokenizer().encode(context) or [0]
        assert made == tokenizer().decode(greedy(cell, ids, option["max_gen_toks"]))


@pytest.mark.parametrize(
    ("cell", "overrides"),
    [
        *((cell, ()) for cell in CELLS if cell != "flowhn_fac"),
        ("flowhn_fac", ("split.window=16",)),
        ("flowhn_fac", ("split.window=16", "split.keys=all")),
    ],
)
def test_a_long_context_is_read_once(cell, overrides, monkeypatch):
    asked = requests(*((text(40 + n, n), {"until": [], "max_gen_toks": 12}) for n in range(2)))
    alone = adapter(cell, *overrides, max_length=400, batch_tokens=1)
    net = model(cell, *overrides)
    read, extend = [], net.extend_body
    monkeypatch.setattr(net, "body", None)
    monkeypatch.setattr(net, "extend_body", lambda ids, cache: read.append(ids.shape[1]) or extend(ids, cache))
    found = alone.generate_until(asked)
    assert sorted(read)[:-2] == [1] * (len(read) - 2)
    monkeypatch.undo()
    monkeypatch.setattr(alone, "_cache", lambda batch: None)
    assert found == alone.generate_until(asked)
    assert all(found)


@pytest.mark.parametrize(
    ("cell", "overrides", "max_length"),
    [("flowhn_fac", (), 400), ("flowhn_fac", ("split.window=16", "fusion=cross"), 400), ("llama", (), 44)],
    ids=["routed by length", "no cache", "cut"],
)
def test_a_context_that_a_cache_would_answer_otherwise_is_read_again(cell, overrides, max_length, monkeypatch):
    monkeypatch.setattr(model(cell, *overrides), "extend_body", None)
    lm = adapter(cell, *overrides, max_length=max_length, batch_tokens=1)
    assert lm.generate_until(requests((text(40, 1), {"until": [], "max_gen_toks": 5})))[0]


class Counter(nn.Module):
    """Answers token t with t + 1, so that it ends by itself."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.last = last
        self.lm_head = nn.Linear(VOCAB, VOCAB, bias=False)
        nn.init.eye_(self.lm_head.weight)

    def body(self, ids):
        following = torch.where(ids >= self.last, torch.zeros_like(ids), ids + 1)
        return nn.functional.one_hot(following, VOCAB).float()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"until": ["gh", "de", ""], "max_gen_toks": 9}, "bc"),  # the first in the text, not the first asked
        ({"until": "e", "max_gen_toks": 9}, "bcd"),
        ({"until": ["x"], "max_gen_toks": 9}, "bcdefgh"),  # the end of the text comes first
        ({"until": None, "max_gen_toks": 3}, "bcd"),
        ({"max_gen_toks": 0}, ""),
        ({}, "bcdefgh"),
    ],
)
def test_generation_ends_at_a_stop_string_the_end_of_text_or_the_limit(options, expected):
    code = tokenizer().encode("a")[0]
    assert tokenizer().decode([code + 1]) == "b"
    lm = FlowHNLM(Counter(last=code + 7), tokenizer(), max_length=MAX_LENGTH)
    assert lm.generate_until(requests(("a", options))) == [expected]


# --- splits that depend on the length


def test_padding_never_changes_the_routing_of_a_proportional_split(monkeypatch):
    net = model("flowhn_fac")
    assert net.length_dependent
    lengths_seen, padded_rows = [], []

    def body(ids, real=net.body):
        lengths_seen.append(ids.shape[1])
        padded_rows.extend(row for row in ids.tolist() if tuple(row) not in inputs)
        return real(ids)

    inputs = {tuple((c + a)[-(MAX_LENGTH + 1) :][:-1]) for c, a in (encoded(*pair) for pair in PAIRS)}
    monkeypatch.setattr(net, "body", body)
    adapter("flowhn_fac").loglikelihood(requests(*PAIRS))
    assert padded_rows == []  # every row that the model saw is one request's own input, nothing added
    assert set(lengths_seen) == {len(ids) for ids in inputs}
    assert len(lengths_seen) == len(set(lengths_seen))  # and inputs of one length still share a batch


def test_padding_would_have_changed_the_routing():
    """The test above is not empty: the same model, padded, gives other numbers."""
    net = model("flowhn_fac")
    careless = FlowHNLM(SimpleNamespace(body=net.body, lm_head=net.lm_head), tokenizer(), max_length=MAX_LENGTH)
    right = adapter("flowhn_fac").loglikelihood(requests(*PAIRS))
    wrong = careless.loglikelihood(requests(*PAIRS))
    assert max(abs(a - b) for (a, _), (b, _) in zip(right, wrong, strict=True)) > 0.1


def test_a_split_in_windows_may_be_padded(monkeypatch):
    window = "split.window=8"
    net = model("flowhn_fac", window)
    assert not net.length_dependent
    batches = []
    monkeypatch.setattr(net, "body", lambda ids, real=net.body: batches.append(ids.shape) or real(ids))
    found = adapter("flowhn_fac", window).loglikelihood(requests(*PAIRS))
    assert len(batches) == 1
    assert_close(found, [naive("flowhn_fac", *encoded(*pair), window) for pair in PAIRS])


def test_progress_counts_every_request():
    told = []
    adapter(batch_tokens=64, on_progress=lambda done, total: told.append((done, total))).loglikelihood(requests(*PAIRS))
    assert told[-1] == (len(PAIRS), len(PAIRS))
    assert told == sorted(told)
    assert len(told) > 2


def test_autocast_computes_in_the_type_asked_for(monkeypatch):
    types = []
    net = model("llama")
    hook = net.lm_head.register_forward_hook(lambda module, inputs, output: types.append(output.dtype))
    try:
        half = adapter(dtype=torch.bfloat16).loglikelihood(requests(*PAIRS))
    finally:
        hook.remove()
    assert set(types) == {torch.bfloat16}
    assert [value for value, _ in half] == pytest.approx(
        [value for value, _ in adapter().loglikelihood(requests(*PAIRS))], rel=0.1, abs=0.5
    )
