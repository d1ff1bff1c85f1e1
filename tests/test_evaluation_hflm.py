"""Request by request the numbers of lm-eval's own ``HFLM`` on the same weights, with padding and batching on."""

from __future__ import annotations

import json
import os
import random
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

from flowhn.config import build_model, compose
from flowhn.data.tokenization import TextTokenizer, train_bpe
from flowhn.evaluation import Evaluator, FlowHNLM
from flowhn.evaluation.suites import PAPER_TASKS
from flowhn.models.convert import from_transformers

RECORD = os.environ.get("FLOWHN_HFLM_RECORD")  # where the slow test writes what it measured
DATA_DIR = os.environ.get("FLOWHN_EVAL_DATA_DIR")  # folder with the paper's tasks, for the slow test
SENTENCE = "the cat sat on a mat and the dog ran to the red house where nobody lived for many long years"
MAX_LENGTH = 48


class WrappedConfig(PretrainedConfig):
    model_type = "flowhn_in_a_test"


class Wrapped(PreTrainedModel):
    """One of our models in the least that ``HFLM`` takes."""

    config_class = WrappedConfig

    def __init__(self, net: nn.Module) -> None:
        super().__init__(WrappedConfig(vocab_size=net.vocab_size))
        self.net = net

    def forward(self, input_ids, **options):
        return CausalLMOutput(logits=self.net(input_ids))


def text(n_words: int, seed: int) -> str:
    return " ".join(random.Random(seed).choices(SENTENCE.split(" "), k=n_words))


def tokenizers(texts: list[str], vocab_size: int) -> tuple[TextTokenizer, PreTrainedTokenizerFast]:
    backend = train_bpe(iter(texts), vocab_size=vocab_size)
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    return TextTokenizer(backend=backend, eos_id=0), hf


def hflm(model: nn.Module, tokenizer: PreTrainedTokenizerFast, *, batch_size: int, max_length: int):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length, device="cpu")


def llama(vocab_size: int, max_length: int, **sizes: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, **sizes}
    config = LlamaConfig(
        vocab_size=vocab_size,
        num_key_value_heads=2,
        max_position_embeddings=max_length,
        initializer_range=0.1,  # answers differ clearly
        eos_token_id=0,
        bos_token_id=None,
        pad_token_id=None,
        **sizes,
    )
    return LlamaForCausalLM(config).eval()


def flowhn(vocab_size: int, *overrides: str) -> nn.Module:
    torch.manual_seed(0)
    words = ["model=flowhn", "split=fac", "size=tiny", f"vocab_size={vocab_size}", *overrides]
    net = build_model(compose("train", words)).eval()
    with torch.no_grad():
        net.lm_head.weight.mul_(20)
    return net


@pytest.fixture(scope="module")
def both():
    return tokenizers([text(40, seed) for seed in range(50)], 320)


def pairs() -> list[SimpleNamespace]:
    asked = [(text(n, n), f" {text(n % 5 + 1, n + 50)}") for n in range(1, 30)]
    asked += [(text(8, 1), f" {word}") for word in ("cat", "dog", "mat", "house")]
    asked += [("", text(6, 3)), (text(90, 4), " red house"), ("the cat ", "sat on")]
    return [SimpleNamespace(args=pair) for pair in asked]


def agree(compare, name: str, ours, theirs, tolerance: float = 1e-4) -> None:
    assert len(ours) == len(theirs)
    largest = max(abs(a - b) for (a, _), (b, _) in zip(ours, theirs, strict=True))
    compare(name, "lm-eval's HFLM, request by request", "log-likelihoods", largest, tolerance)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def check(compare, name: str, net, reference, both, batch_size: int) -> None:
    ours = FlowHNLM(net, both[0], max_length=MAX_LENGTH, batch_tokens=400)
    theirs = hflm(reference, both[1], batch_size=batch_size, max_length=MAX_LENGTH)
    agree(compare, name, ours.loglikelihood(pairs()), theirs.loglikelihood(pairs(), disable_tqdm=True))
    rolling = [SimpleNamespace(args=(text(n, n),)) for n in (1, 20, 70, 150)]
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(
        theirs.loglikelihood_rolling(rolling, disable_tqdm=True), abs=1e-3, rel=1e-6
    )


def test_llama_by_transformers_and_by_us(both, compare):
    reference = llama(320, MAX_LENGTH)
    check(compare, "llama", from_transformers(reference).eval(), reference, both, batch_size=7)


def test_a_proportional_split_at_batch_size_one(both, compare):
    net = flowhn(320)
    assert net.length_dependent
    check(compare, "flowhn_fac, batch size 1", net, Wrapped(net), both, batch_size=1)


def test_a_split_in_windows_at_any_batch_size(both, compare):
    net = flowhn(320, "split.window=16")
    check(compare, "flowhn_fac, split.window=16, batch size 7", net, Wrapped(net), both, batch_size=7)


def test_generation(both):
    reference = llama(320, MAX_LENGTH)
    asked = [SimpleNamespace(args=(text(n, n), {"until": ["zz"], "max_gen_toks": 10})) for n in (3, 5, 9)]
    ours = FlowHNLM(from_transformers(reference).eval(), both[0], max_length=MAX_LENGTH).generate_until(asked)
    assert ours == hflm(reference, both[1], batch_size=3, max_length=MAX_LENGTH).generate_until(asked)
    assert len(set(ours)) == 3


# --- real requests: FLOWHN_EVAL_DATA_DIR=FOLDER pytest -m slow -s tests/test_evaluation_hflm.py


def _real_requests(folder: str, work_dir: Path, number: int) -> list:
    """``number`` requests of the six tasks, drawn evenly from each, whole questions apart from the last."""
    tasks = [task for task in PAPER_TASKS if task != "lambada_openai"]
    suite = {"name": "paper", "tasks": tasks, "data_dir": folder, "limit": 100}
    evaluator = Evaluator(suite=suite, heldout_file=None, work_dir=work_dir, seed=0)
    drawn: list = []
    for place, task in enumerate(evaluator.tasks.values()):
        share = number // len(tasks) + (place < number % len(tasks))
        drawn += task.instances[:share]
    return drawn


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not DATA_DIR, reason="FLOWHN_EVAL_DATA_DIR is not set")
def test_500_real_requests_agree_and_are_no_slower(tmp_path, compare):
    asked = _real_requests(DATA_DIR, tmp_path, 500)
    assert len(asked) == 500
    ours_tokenizer, hf_tokenizer = tokenizers([" ".join(request.args) for request in asked], 8192)
    reference = llama(8192, 1024, hidden_size=256, intermediate_size=704, num_hidden_layers=6)
    net = from_transformers(reference).eval()
    theirs = hflm(reference, hf_tokenizer, batch_size=8, max_length=1024)  # its fastest on CPU, of 1 to 32
    found, seconds = {}, {"ours": [], "hflm": []}
    for _ in range(3):
        ours = FlowHNLM(net, ours_tokenizer, max_length=1024)  # a new one: it keeps the tokens of requests it has seen
        for name, lm in (("ours", ours), ("hflm", theirs)):
            begun = time.perf_counter()
            found[name] = lm.loglikelihood(asked, disable_tqdm=True)
            seconds[name].append(time.perf_counter() - begun)
    largest = max(abs(a - b) for (a, _), (b, _) in zip(found["ours"], found["hflm"], strict=True))
    print(f"\n500 requests: largest difference {largest:.2e}; seconds {seconds}")
    agree(compare, "llama, 500 requests of six tasks", found["ours"], found["hflm"])
    assert min(seconds["ours"]) <= min(seconds["hflm"])
    rolling = [SimpleNamespace(args=(request.args[0] * 8,)) for request in asked[:20]]
    differences = [
        abs(a - b) / abs(b)
        for a, b in zip(
            ours.loglikelihood_rolling(rolling), theirs.loglikelihood_rolling(rolling, disable_tqdm=True), strict=True
        )
    ]
    print(f"rolling: largest relative difference {max(differences):.2e}")
    assert max(differences) < 1e-5
    if RECORD:
        record = {
            "requests": len(asked), "tasks": [task for task in PAPER_TASKS if task != "lambada_openai"],
            "model": "Llama, d_model 256, 6 layers, vocabulary 8,192", "hflm_batch_size": 8, "threads": torch.get_num_threads(),
            "largest_difference": largest, "rolling_largest_relative_difference": max(differences),
            "seconds_ours": seconds["ours"], "seconds_hflm": seconds["hflm"],
            "versions": {"torch": torch.__version__, "lm_eval": metadata.version("lm_eval")},
        }  # fmt: skip
        Path(RECORD).parent.mkdir(parents=True, exist_ok=True)
        Path(RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
