"""An exported run: all ten load and generate where only transformers is imported; lm-eval's own backend agrees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowhn import export
from flowhn.config import build_model, compose, to_dict
from flowhn.data.tokenization import train_bpe
from flowhn.errors import UserError
from flowhn.hf import FlowHNForCausalLM
from flowhn.hf.build import build_net
from flowhn.loading import load_run

CELLS = (
    "llama", "mamba1", "mamba2", "jamba", "shm", "hymba", "flowhn_no", "flowhn_ae", "flowhn_fa", "flowhn_fac",
)  # fmt: skip
SPLIT = ("flowhn_ae", "flowhn_fa", "flowhn_fac")
TEXT = "the cat sat on a mat, und das Mädchen las — ein Buch"

# What a user writes: transformers alone, no word of flowhn. Prints one line of JSON for each folder.
USER = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    inputs = tokenizer("the cat sat <|endoftext|> on a", return_tensors="pt")
    ids = inputs["input_ids"]
    made = {}
    for name, options in {
        "greedy": {}, "recomputed": {"use_cache": False}, "beams": {"num_beams": 3},
        "beams_recomputed": {"num_beams": 3, "use_cache": False},
    }.items():
        made[name] = model.generate(**inputs, max_new_tokens=12, **options)[0].tolist()
    with torch.no_grad():
        logits = model(ids).logits
        loss = model(ids, labels=ids).loss
        kept = model(ids, logits_to_keep=2).logits
    torch.save(logits, folder + ".logits")
    print(json.dumps({
        "ids": ids[0].tolist(), "eos": [tokenizer.eos_token_id, model.generation_config.eos_token_id],
        "loss": float(loss),
        "kept": kept.shape[1] == 2 and torch.allclose(kept, logits[:, -2:], atol=1e-5), "layers": model.config.num_hidden_layers,
        "vocab": model.config.vocab_size, "heavy": sorted({"hydra", "lightning", "lm_eval"} & set(sys.modules)), **made,
    }))
"""


def write_run(folder: Path, cell: str, *overrides: str) -> Path:
    """The folder of a finished run with random weights (three times as large as drawn) and a small tokenizer."""
    model, _, split = cell.partition("_")
    words = [f"model={model}", f"split={split or 'fac'}", "size=tiny", "seq_len=16", "vocab_size=320", *overrides]
    config = to_dict(compose("train", words))
    torch.manual_seed(0)
    net = build_model(config)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 2 and parameter.std() < 0.05:
                parameter.mul_(3)
    folder.mkdir(parents=True)
    train_bpe(iter([TEXT] * 9), vocab_size=320).save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"config": config}))
    save_file({name: tensor.clone() for name, tensor in net.state_dict().items()}, folder / "model.safetensors")
    return folder


def offline(folder: Path) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder), "HF_MODULES_CACHE": str(folder / "modules")}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Ten exported runs (splits with a window, so that generation with and without a cache is routed alike)."""
    home = tmp_path_factory.mktemp("exports")
    for cell in CELLS:
        run = write_run(home / "runs" / cell, cell, *(["split.window=7"] if cell in SPLIT else []))
        assert export._main([str(run), str(home / "out" / cell)]) == 0
    return home


@pytest.fixture(scope="module")
def seen_by_a_user(exported):
    folders = [str(exported / "out" / cell) for cell in CELLS]
    done = subprocess.run(
        [sys.executable, "-c", USER, *folders], capture_output=True, text=True, env=offline(exported), cwd=exported
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(CELLS, map(json.loads, done.stdout.splitlines()), strict=True))


def test_a_folder_has_the_files_that_transformers_expects(exported):
    for cell in CELLS:
        folder = exported / "out" / cell
        assert {path.name for path in folder.iterdir()} == {
            "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
            "configuration_flowhn.py", "modeling_flowhn.py",
        }  # fmt: skip
        config = json.loads((folder / "config.json").read_text())
        assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_flowhn.FlowHNForCausalLM"
        assert config["model_type"] == "flowhn"
        assert config["dtype"] == "float32"
        weights = load_file(folder / "model.safetensors")
        own = load_file(exported / "runs" / cell / "model.safetensors")
        assert {name.removeprefix("net.") for name in weights} == set(own)
        assert all(torch.equal(tensor, own[name.removeprefix("net.")]) for name, tensor in weights.items())


@pytest.mark.parametrize("cell", CELLS)
def test_transformers_alone_gives_our_logits_and_generates(cell, exported, seen_by_a_user, compare):
    found, run = seen_by_a_user[cell], load_run(exported / "runs" / cell)
    assert found["ids"] == run.tokenizer.encode("the cat sat <|endoftext|> on a")  # text that spells a special token
    assert found["eos"] == [run.tokenizer.eos_id] * 2
    assert found["layers"] == len(run.model.layers)
    assert found["vocab"] == 320
    assert found["kept"]
    assert found["heavy"] == []
    with torch.no_grad():
        logits = run.model(torch.tensor([found["ids"]]))
    largest = (torch.load(f"{exported}/out/{cell}.logits") - logits).abs().max()
    compare(cell, "its export, loaded by transformers alone", "logits, float32", largest, 1e-5)
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], torch.tensor(found["ids"][1:]))
    assert found["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert found["greedy"] == found["recomputed"]
    assert found["beams"] == found["beams_recomputed"]
    text = found["ids"]
    for token in found["greedy"][len(text) :]:
        with torch.no_grad():
            assert run.model(torch.tensor([text]))[0, -1].argmax().item() == token
        text = [*text, token]
    assert len(text) == len(found["ids"]) + 12 or text[-1] == run.tokenizer.eos_id


def test_a_proportional_split_is_frozen_with_a_cache_and_recomputed_without(tmp_path):
    run = write_run(tmp_path / "run", "flowhn_fac")
    export.export_run(run, tmp_path / "out")
    model = FlowHNForCausalLM.from_pretrained(tmp_path / "out")
    net = load_run(run).model
    ids = torch.randint(320, (2, 9), generator=torch.Generator().manual_seed(0))
    assert model.config.routing_window == 16
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, net(ids), rtol=0, atol=1e-5)
        frozen = model(ids, use_cache=True).logits
        torch.testing.assert_close(frozen, net.extend(ids, net.new_cache(window=16)), rtol=0, atol=1e-5)
        assert (frozen - net(ids)).abs().max() > 1e-2
        wanted = ids
        for _ in range(6):
            wanted = torch.cat((wanted, net(wanted)[:, -1:].argmax(-1)), dim=1)
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, use_cache=False, eos_token_id=None
    )
    assert torch.equal(made, wanted)


def test_a_tied_head_is_exported_once(tmp_path):
    run = write_run(tmp_path / "run", "llama", "+model.tie_embeddings=true")
    export.export_run(run, tmp_path / "out")
    model = FlowHNForCausalLM.from_pretrained(tmp_path / "out")
    assert model.net.lm_head.weight is model.net.embedding.weight
    ids = torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, load_run(run).model(ids), rtol=0, atol=1e-5)


def test_padding_in_front_is_refused_and_behind_allowed(exported):
    model = FlowHNForCausalLM.from_pretrained(exported / "out" / "llama")
    ids = torch.arange(6).expand(2, 6)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, 4:] = 0
    with torch.no_grad():
        assert model(ids, attention_mask=mask).logits.shape == (2, 6, 320)
        with pytest.raises(UserError, match="padding"):
            model(ids, attention_mask=mask.flip(1))


def test_the_working_folder_is_filled_when_it_is_empty(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", "llama")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = Path.cwd().stat().st_ino
    assert export._main([str(run), "."]) == 0
    assert Path.cwd().stat().st_ino == before
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in Path.cwd().iterdir()}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    with pytest.raises(UserError, match="is there already"):
        export.export_run(run, Path())


def test_what_cannot_be_exported_is_said(tmp_path, exported):
    run = write_run(tmp_path / "run", "llama")
    with pytest.raises(UserError, match="is there already"):
        export.export_run(run, exported / "out" / "llama")
    with pytest.raises(UserError, match="not the folder of a run"):
        export.export_run(tmp_path, tmp_path / "out")
    config = json.loads((run / "config.json").read_text())
    config["config"]["model"]["blocks"]["attention"]["mixer"]["_target_"] = "os.system"
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"os\.system"):
        export.export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "target", ["os.system", "flowhn.models.torch.load", "flowhn.models.build", "torch.nn.Linear", 3]
)
def test_a_net_calls_nothing_but_our_classes(target):
    with pytest.raises(UserError, match="not a class of flowhn"):
        build_net({"_target_": "flowhn.models.CausalLM", "blocks": {"x": {"_target_": target, "command": "true"}}})


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("cell", CELLS)
def test_lm_eval_s_own_backend_gives_the_accuracies_of_flowhn_eval(tmp_path, tmp_path_factory, cell, compare):
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from flowhn.evaluation import Evaluator
    from flowhn.experiment import Workshop

    model, _, split = cell.partition("_")
    words = [f"model={model}", f"split={split or 'fac'}"]
    home = tmp_path_factory.getbasetemp() / "shared"
    shared = [f"output_dir={tmp_path}", f"cache_dir={home}/cache", "val_points=1", "val_rows=4"]
    command = [sys.executable, "-m", "flowhn.train", *words, "size=tiny", "budget=12000", "eval=none", *shared]
    subprocess.run(command, check=True, capture_output=True)
    (run,) = (path for path in (tmp_path / "runs").iterdir() if (path / "record.json").is_file())
    limit = 40
    command = [sys.executable, "-m", "flowhn.evaluate", str(run), f"eval.limit={limit}", f"cache_dir={home}/cache"]
    subprocess.run(command, check=True, capture_output=True)
    (ours,) = (json.loads(path.read_text())["tasks"] for path in run.glob("eval-*.json"))

    export.export_run(run, tmp_path / "out")
    config = {**load_run(run).config, "cache_dir": f"{home}/cache"}
    suite = to_dict(compose("train", [f"eval.limit={limit}"]))["eval"]
    heldout = Workshop().prepare(config).heldout_file
    tasks = Evaluator(suite=suite, heldout_file=heldout, work_dir=tmp_path / "tasks", seed=1234).tasks
    compared = 0
    # With its logits cache, HFLM mixes up requests of one text that is cut into context and continuation at two places (a
    # passage of docs_continuation whose last word docs_lastword asks for). Sums are compared without it.
    for reuses_logits in (True, False):
        options = {"batch_size": 1, "device": "cpu", "logits_cache": reuses_logits}
        backend = HFLM(pretrained=str(tmp_path / "out"), trust_remote_code=True, **options)
        theirs = evaluate(
            backend, {"tasks": dict(tasks), "groups": {}, "group_map": {}}, limit=limit, bootstrap_iters=0
        )
        for task, numbers in ours.items():
            found = {key.partition(",")[0]: value for key, value in theirs["results"][task].items()}
            for metric in {"acc", "acc_norm", "acc_mutual_info"} & set(numbers):
                assert numbers[metric] == found[metric], (task, metric)
                oracle = "lm-eval's hf backend on the exported folder, batch size 1"
                compare(cell, oracle, "accuracies", abs(numbers[metric] - found[metric]), 0.0)
                compared += 1
            if "perplexity" in numbers and not reuses_logits:
                assert numbers["perplexity"] == pytest.approx(found["perplexity"], rel=1e-5)
    assert compared == 8
    assert 0 < ours["docs_continuation"]["acc_mutual_info"] < 1
