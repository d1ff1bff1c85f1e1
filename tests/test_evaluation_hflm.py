"""Request by request the numbers of lm-eval's own ``HFLM`` on the same weights, with padding and batching on."""

from __future__ import annotations

import json
import os
import random
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutput

from flowhn.benchmark import describe_device
from flowhn.config import build_model, compose
from flowhn.data.tokenization import TextTokenizer, train_bpe
from flowhn.evaluation import Evaluator, FlowHNLM
from flowhn.evaluation.suites import PAPER_TASKS
from flowhn.models.convert import from_transformers
from flowhn.reporting.record import environment
from widened import Widened

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


def hflm(model: nn.Module, tokenizer: PreTrainedTokenizerFast, *, batch_size: int, max_length: int, **options: str):
    from lm_eval.models.huggingface import HFLM

    options |= {"batch_size": batch_size, "max_length": max_length, "device": "cpu"}
    return HFLM(pretrained=model, tokenizer=tokenizer, **options)


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


def test_in_float64_the_adapters_give_the_same_sums(both, compare):
    """The same float64 network behind both, padded and batched: no rounding hides a difference."""
    for name, words in {"flowhn_fac, split.window=16": ("split.window=16",), "mamba2": ("model=mamba2",)}.items():
        net = flowhn(320, *words).double()
        with Widened():
            ours = FlowHNLM(net, both[0], max_length=MAX_LENGTH, batch_tokens=400).loglikelihood(pairs())
            theirs = hflm(Wrapped(net), both[1], batch_size=7, max_length=MAX_LENGTH)
            theirs = theirs.loglikelihood(pairs(), disable_tqdm=True)
        agree(compare, f"{name}, float64, batch size 7", ours, theirs, 1e-10)


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

LIMIT = {"float32": 1e-4, "float64": 1e-9}  # of a log-likelihood, in nats
BATCH = 8  # HFLM's fastest on CPU, of 1 to 32
LLAMA = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6}
MODELS = {
    "llama": "Llama, d_model 256, 6 layers",
    "flowhn_fac": "FlowHN FAC_Split, split.window=64, d_model 80, 3 blocks",
    "mamba2": "Mamba-2, d_model 80, 8 layers",
}


def _pair(name: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """The same random weights for us and for ``HFLM``, in ``dtype``."""
    if name == "llama":
        reference = llama(8192, 1024, **LLAMA)
        if dtype is torch.float64:
            narrow = reference
            with Widened():  # RoPE's frequencies are made here
                reference = LlamaForCausalLM(narrow.config).double().eval()
            reference.load_state_dict(narrow.state_dict())
        return from_transformers(reference).eval(), reference
    words = ["split.window=64"] if name == "flowhn_fac" else ["model=mamba2"]
    net = flowhn(8192, "seq_len=1024", *words).to(dtype)
    return net, Wrapped(net)


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


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """500 requests of the six sets, and the tokenizer, ours and transformers'."""
    asked = _real_requests(DATA_DIR, tmp_path_factory.mktemp("tasks"), 500)
    assert len(asked) == 500
    return asked, *tokenizers([" ".join(request.args) for request in asked], 8192)


def _keep(part: dict) -> None:
    """Add to the record, where one is asked for."""
    if RECORD:
        path = Path(RECORD)
        path.parent.mkdir(parents=True, exist_ok=True)
        record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        record.setdefault("models", {}).update(part.pop("models", {}))
        path.write_text(json.dumps(record | part | environment(), indent=1) + "\n", encoding="utf-8")


def _largest(found: list, other: list) -> float:
    return max(abs(a - b) for (a, _), (b, _) in zip(found, other, strict=True))


def _scores(name: str, real: tuple, dtype: torch.dtype) -> dict[str, list]:
    """What each adapter gives for the requests and (``rolling``) for 20 long texts; in float64 nothing is cast to float32."""
    asked, tokenizer, hf_tokenizer = real
    net, reference = _pair(name, dtype)
    rolling = [SimpleNamespace(args=(request.args[0] * 8,)) for request in asked[:20]]
    lms = {
        "ours": FlowHNLM(net, tokenizer, max_length=1024),
        "hflm": hflm(reference, hf_tokenizer, batch_size=BATCH, max_length=1024),
    }
    if dtype is torch.float32:  # the same float32 logits, summed in float64
        wide = {"batch_size": BATCH, "max_length": 1024, "softmax_dtype": "float64"}
        lms["hflm, sums in float64"] = hflm(reference, hf_tokenizer, **wide)
    found = {}
    with Widened() if dtype is torch.float64 else nullcontext():
        for key, lm in lms.items():
            found[key] = lm.loglikelihood(asked, disable_tqdm=True)
            if key in ("ours", "hflm"):
                sums = lm.loglikelihood_rolling(rolling, disable_tqdm=True)
                found[f"{key}, rolling"] = [(value, True) for value in sums]
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not DATA_DIR, reason="FLOWHN_EVAL_DATA_DIR is not set")
@pytest.mark.parametrize("name", MODELS)
def test_500_real_requests_agree(name, real, compare):
    """In float32 to 1e-4 and in float64 to 1e-9: what is left in float32 is rounding, and the record says whose."""
    found = {str(dtype).removeprefix("torch."): _scores(name, real, dtype) for dtype in (torch.float32, torch.float64)}
    seen: dict = {"model": f"{MODELS[name]}, vocabulary 8,192"}
    for precision, scores in found.items():
        ours, theirs = scores["ours, rolling"], scores["hflm, rolling"]
        seen[precision] = {
            "largest_difference": _largest(scores["ours"], scores["hflm"]),
            "rolling_largest_relative_difference": max(
                abs(a - b) / abs(b) for (a, _), (b, _) in zip(ours, theirs, strict=True)
            ),
        }
    exact, rounded = found["float64"]["ours"], found["float32"]
    seen["largest_log_likelihood"] = max(abs(value) for value, _ in exact)
    seen["float32"]["largest_difference_with_hflm_sums_in_float64"] = _largest(
        rounded["ours"], rounded["hflm, sums in float64"]
    )
    seen["float32"]["largest_distance_from_float64"] = {
        key: _largest(rounded[key], exact) for key in ("ours", "hflm", "hflm, sums in float64")
    }
    print(f"\n{json.dumps(seen, indent=1)}")
    _keep({"models": {name: seen}})
    for precision, scores in found.items():
        agree(
            compare, f"{name}, 500 requests of six tasks, {precision}", scores["ours"], scores["hflm"], LIMIT[precision]
        )
    assert seen["float32"]["rolling_largest_relative_difference"] < 1e-5
    assert seen["float64"]["rolling_largest_relative_difference"] < 1e-12


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not DATA_DIR, reason="FLOWHN_EVAL_DATA_DIR is not set")
def test_500_real_requests_are_no_slower(real):
    asked, tokenizer, hf_tokenizer = real
    net, reference = _pair("llama", torch.float32)
    theirs = hflm(reference, hf_tokenizer, batch_size=BATCH, max_length=1024)
    seconds: dict[str, list[float]] = {"ours": [], "hflm": []}
    for _ in range(3):
        ours = FlowHNLM(net, tokenizer, max_length=1024)  # a new one: it keeps the tokens of requests it has seen
        for name, lm in (("ours", ours), ("hflm", theirs)):
            begun = time.perf_counter()
            lm.loglikelihood(asked, disable_tqdm=True)
            seconds[name].append(time.perf_counter() - begun)
    print(f"\n500 requests: seconds {seconds}")
    _keep(
        {
            "requests": len(asked), "tasks": [task for task in PAPER_TASKS if task != "lambada_openai"], "limits": LIMIT,
            "hflm_batch_size": BATCH, "threads": torch.get_num_threads(), "device": describe_device(torch.device("cpu"), 1),
            "seconds_ours": seconds["ours"], "seconds_hflm": seconds["hflm"],
        }
    )  # fmt: skip
    assert min(seconds["ours"]) <= min(seconds["hflm"])
