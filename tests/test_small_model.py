"""The one trained model that is kept: it loads by every way that its README tells, and its record's numbers come back."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowhn import evaluate, generate
from flowhn.errors import UserError
from flowhn.hf import FlowHNForCausalLM
from flowhn.loading import load_run
from flowhn.reporting.record import read_record

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import keep_model  # noqa: E402

FOLDER = ROOT / "experiments" / "small_model"
RECORD = read_record(FOLDER / "record.json")
CHECK = json.loads((FOLDER / "check.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def loaded():
    return load_run(FOLDER)


def test_the_folder_is_small_and_has_no_pickle(loaded):
    files = [path for path in FOLDER.iterdir() if not path.name.startswith("eval-")]
    assert {path.suffix for path in files} == {".json", ".md", ".txt", ".py", ".safetensors"}
    assert sum(path.stat().st_size for path in files) < 3_000_000
    assert RECORD.git["commit"]
    assert not RECORD.git["dirty"]
    assert loaded.model.num_parameters() == RECORD.parameters
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == keep_model.readme(FOLDER)
    assert (FOLDER / "command.txt").read_text(encoding="utf-8") == keep_model.COMMAND


def test_a_fixed_text_has_the_recorded_loss(loaded):
    assert CHECK["text"] == keep_model.TEXT
    assert keep_model.text_loss(loaded.model, loaded.tokenizer) == pytest.approx(CHECK["loss"], abs=1e-3)


def test_transformers_gives_the_same_logits_and_tokens(loaded, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # where transformers copies the two small files of the folder to
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
    assert isinstance(model, FlowHNForCausalLM)
    inputs = AutoTokenizer.from_pretrained(FOLDER)(CHECK["text"], return_tensors="pt")
    ids = inputs["input_ids"]
    assert ids[0].tolist() == loaded.tokenizer.encode(CHECK["text"])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, loaded.model(ids), rtol=0, atol=1e-5)
    prompt = torch.tensor([loaded.tokenizer.encode(CHECK["prompt"])])
    mask = torch.ones_like(prompt)
    made = model.generate(prompt, attention_mask=mask, max_new_tokens=CHECK["max_new_tokens"], eos_token_id=None)
    assert loaded.tokenizer.decode(made[0].tolist()) == CHECK["prompt"] + CHECK["continuation"]


def test_generate_says_what_the_readme_tells(capsys):
    words = [str(FOLDER), "--prompt", CHECK["prompt"], "--max-new-tokens", str(CHECK["max_new_tokens"])]
    assert generate._main(words) == 0
    assert capsys.readouterr().out == CHECK["prompt"] + CHECK["continuation"] + "\n"


@pytest.mark.slow  # .ci/run runs it
@pytest.mark.skipif(
    platform.python_version() != RECORD.versions["python"], reason="another Python has other documentation"
)
def test_eval_gives_the_records_loss_and_accuracies_again(tmp_path, capsys):
    copy = tmp_path / "model"
    shutil.copytree(FOLDER, copy, ignore=shutil.ignore_patterns("eval-*"))
    assert evaluate._main([str(copy), "--val-loss", f"cache_dir={tmp_path}/cache", "device=cpu"]) == 0
    assert "validation loss" in capsys.readouterr().out
    result = json.loads((copy / "eval-docs.json").read_text())
    if result["validation"]["data_sha256"] != RECORD.data["sha256"]:
        pytest.skip("this Python has other documentation than the record's (a distribution's changes)")
    assert result["validation"]["loss"] == pytest.approx(RECORD.losses["final_val"], abs=1e-3)
    for task, numbers in RECORD.evaluation["tasks"].items():
        for name in {"acc", "acc_norm", "acc_mutual_info"} & set(numbers):
            # another CPU may turn one question over
            assert result["tasks"][task][name] == pytest.approx(numbers[name], abs=1.5 / numbers["n"])


def test_an_export_that_does_not_tell_its_run_is_refused(tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(FOLDER, copy, ignore=shutil.ignore_patterns("eval-*"))
    config = json.loads((copy / "config.json").read_text())
    del config["run"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="damaged"):
        load_run(copy)
    config["run"] = json.loads((FOLDER / "config.json").read_text())["run"]
    config["net"]["_target_"] = "os.system"
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError):
        load_run(copy)


def test_weights_are_float32():
    weights = load_file(FOLDER / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
