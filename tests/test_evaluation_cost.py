"""What many models evaluated one after another do not pay for again: tokenising, templates, compilation."""

from __future__ import annotations

import copy

import torch
from torch import nn

from flowhn.evaluation import FlowHNLM
from flowhn.evaluation.evaluator import _compile_once
from test_evaluation import MAX_LENGTH, PAIRS, model, requests, tokenizer


class Counting:
    """The tests' tokenizer, counting its calls."""

    eos_id = 0

    def __init__(self) -> None:
        self.calls = 0

    def encode(self, text: str) -> list[int]:
        self.calls += 1
        return tokenizer().encode(text)

    def decode(self, ids) -> str:
        return tokenizer().decode(ids)


def test_requests_are_tokenised_once_for_all_models():
    counting, kept = Counting(), {}
    expected = FlowHNLM(model("llama"), tokenizer(), max_length=MAX_LENGTH).loglikelihood(requests(*PAIRS))
    FlowHNLM(nn.Identity(), counting, max_length=1, encoded=kept).encode(requests(*PAIRS))
    before = counting.calls
    lm = FlowHNLM(model("llama"), counting, max_length=MAX_LENGTH, encoded=kept)
    assert lm.loglikelihood(requests(*PAIRS)) == expected
    assert counting.calls - before == 1  # the pair with an empty context, which has a rule of its own
    FlowHNLM(model("mamba1"), counting, max_length=MAX_LENGTH, encoded=kept).loglikelihood(requests(*PAIRS))
    assert counting.calls - before == 2


def test_a_tokenizer_that_can_take_many_texts_is_asked_once():
    class Batches(Counting):
        def __init__(self) -> None:
            super().__init__()
            self.batches = 0

        def encode_batch(self, texts: list[str]) -> list[list[int]]:
            self.batches += 1
            return tokenizer().encode_batch(texts)

    batches, one_by_one, kept, expected = Batches(), Counting(), {}, {}
    FlowHNLM(nn.Identity(), batches, max_length=1, encoded=kept).encode(requests(*PAIRS))
    FlowHNLM(nn.Identity(), one_by_one, max_length=1, encoded=expected).encode(requests(*PAIRS))
    assert kept == expected
    assert (batches.batches, batches.calls) == (1, 0)
    assert one_by_one.calls > len(kept)


def test_a_model_fresh_from_compiled_training_is_not_compiled_for_the_questions():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    net = copy.deepcopy(model("flowhn_fac"))
    for block in net.layers:
        block.compile(backend=backend, dynamic=False)
    asked = requests(*PAIRS)
    found = FlowHNLM(net, tokenizer(), max_length=MAX_LENGTH).loglikelihood(asked)
    assert not compiled
    assert found == FlowHNLM(model("flowhn_fac"), tokenizer(), max_length=MAX_LENGTH).loglikelihood(asked)
    with torch.no_grad():
        net.body(torch.zeros(1, 8, dtype=torch.long))
    assert compiled  # training would have


def test_lm_eval_s_templates_are_compiled_once_and_its_environment_is_left_as_it_was():
    from lm_eval.utils import apply_template, env

    plain = env.from_string
    with _compile_once():
        assert [apply_template("{{a}} and {{a}}", {"a": a}) for a in ("x", "y")] == ["x and x", "y and y"]
        assert env.from_string.cache_info().misses == 1
    assert env.from_string == plain
