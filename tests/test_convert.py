"""flowhn-convert on the command line: the kinds of file it takes, and one sentence for each that it does not."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import flowhn.convert
from flowhn.cli import run_entry
from test_oracle_published import CONFIG, random_weights


class Bomb:
    """Leaves a mark when it is unpickled by anything that runs code."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def case(tmp_path):
    """A folder with good weights, as both kinds of file, and their config."""
    weights = random_weights(CONFIG)
    save_file(weights, tmp_path / "good.safetensors")
    torch.save(weights, tmp_path / "good.pth")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def run(folder: Path, weights: str, config: str = "config.json", out: str = "out") -> int:
    argv = ["published", str(folder / weights), "--config", str(folder / config), "--out", str(folder / out)]
    with pytest.raises(SystemExit) as end:
        run_entry(flowhn.convert._main, argv)
    return end.value.code


def refused(capsys, folder: Path, weights: str, config: str = "config.json", out: str = "out") -> str:
    """The message of a refusal: exit code 2, one line, nothing written."""
    assert run(folder, weights, config, out) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert len(captured.err.splitlines()) == 1, captured.err
    assert not (folder / "out" / "config.json").exists()
    return captured.err


def test_pth_checkpoint_and_prefixed_names_give_the_same_folder_as_safetensors(case, capsys):
    weights = random_weights(CONFIG)
    torch.save({"epoch": 3, "model_state_dict": weights}, case / "checkpoint.pth")
    wrapped = {
        "parallel.pt": {f"module.{name}": tensor for name, tensor in weights.items()},
        "compiled.pth": {f"module._orig_mod.{name}": tensor for name, tensor in weights.items()},
        "fsdp.pth": {k.replace(".atten.", ".atten._fsdp_wrapped_module."): v for k, v in weights.items()},
        "lightning.pth": {"state_dict": {f"model._orig_mod.{name}": tensor for name, tensor in weights.items()}},
        "nested.bin": {"step": 7, "model": {"state_dict": weights}, "optimizer": {"lr": 0.1}},
        "deepspeed.pt": {"module": {f"module.{name}": t for name, t in weights.items()}, "global_steps": 7},
        "net.pth": {"net": weights, "epoch": 3},
        "lightning.ckpt": {
            "state_dict": {f"net.{name}": tensor for name, tensor in weights.items()},
            "epoch": 0,
            "pytorch-lightning_version": "2.5.0",
            "optimizer_states": [{"state": {}}],
            "callbacks": {},
        },
        "rotary.pth": weights | {"model.layers.0.atten.self_attn.rotary_emb.inv_freq": torch.ones(2)},
        "joint_rotary.pth": {"module": {f"module.{k}": v for k, v in (weights | {"inv_freq": torch.ones(2)}).items()}},
    }
    for name, content in wrapped.items():
        torch.save(content, case / name)
    assert run(case, "good.safetensors", out="reference") == 0
    assert "written: " in capsys.readouterr().out
    wanted = load_file(case / "reference" / "model.safetensors")
    for name in ("good.pth", "checkpoint.pth", *wrapped):
        assert run(case, name, out=f"from_{name}") == 0
        got = load_file(case / f"from_{name}" / "model.safetensors")
        assert got.keys() == wanted.keys()
        assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    assert not flowhn.load(case / "from_good.pth").training


def test_tied_and_half_precision_weights_are_taken(case):
    weights = random_weights(CONFIG)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    torch.save({name: tensor.bfloat16() for name, tensor in weights.items()}, case / "half.pth")
    torch.save(weights, case / "tied.pth")
    assert run(case, "half.pth", out="half") == 0
    assert run(case, "tied.pth", out="tied") == 0
    model = flowhn.load(case / "tied")
    assert torch.equal(model.lm_head.weight, model.embedding.weight)
    assert {p.dtype for p in flowhn.load(case / "half").parameters()} == {torch.float32}


def test_a_pickled_module_is_refused_and_told_how_to_save_a_state_dict(case, capsys):
    torch.save(nn.Linear(2, 2), case / "module.pth")
    message = refused(capsys, case, "module.pth")
    assert "pickled module" in message
    assert "torch.save(model.state_dict(), 'weights.pth')" in message


def test_nothing_in_a_pth_is_executed(case, capsys):
    torch.save({"lm_head.weight": Bomb(case / "mark")}, case / "bomb.pth")
    (case / "plain.pth").write_bytes(pickle.dumps(Bomb(case / "mark")))
    assert "pickled module" in refused(capsys, case, "bomb.pth")
    assert "not a whole file of torch.save" in refused(capsys, case, "plain.pth")
    assert not (case / "mark").exists()
    torch.load(case / "bomb.pth", weights_only=False)  # the mark does come when the pickle is trusted
    assert (case / "mark").exists()


@pytest.mark.parametrize("name", ["good.pth", "good.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_file_is_refused(case, capsys, name, share):
    whole = (case / name).read_bytes()
    (case / f"cut_{name}").write_bytes(whole[: int(share * len(whole))])
    assert "not a whole" in refused(capsys, case, f"cut_{name}")


@pytest.mark.parametrize("name", ["noise.pth", "noise.safetensors"])
def test_noise_is_refused(case, capsys, name):
    (case / name).write_bytes(bytes(range(256)) * 20)
    assert "not a whole" in refused(capsys, case, name)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {}, torch.zeros(3), {"lm_head.weight": [1.0]}])
def test_a_pth_without_a_state_dict_is_refused(case, capsys, content):
    torch.save(content, case / "other.pth")
    assert "holds no state dict" in refused(capsys, case, "other.pth")


@pytest.mark.parametrize("keys", [["state_dict"], ["module"], ["model", "net"]])
def test_a_checkpoint_that_holds_itself_is_refused(case, capsys, keys):
    content = innermost = {}
    for key in keys[:-1]:
        innermost[key] = innermost = {}
    innermost[keys[-1]] = content
    torch.save(content, case / "round.pth")
    assert "holds no state dict" in refused(capsys, case, "round.pth")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    ("value", "dtype"), [("nan", "float32"), ("inf", "bfloat16"), ("-inf", "float16"), ("1e39", "float64")]
)
def test_weights_that_are_not_finite_are_refused(case, capsys, suffix, value, dtype):
    weights = random_weights(CONFIG)
    weights["lm_head.weight"] = weights["lm_head.weight"].to(getattr(torch, dtype))
    weights["lm_head.weight"][1, 2] = float(value)
    save = torch.save if suffix == "pth" else save_file
    save(weights, case / f"odd.{suffix}")
    said = refused(capsys, case, f"odd.{suffix}")
    assert "NaN or infinite values in lm_head.weight (1 of " in said


def test_weights_without_values_are_refused(case, capsys):
    torch.save({name: tensor.to("meta") for name, tensor in random_weights(CONFIG).items()}, case / "hollow.pth")
    assert "holds no values for " in refused(capsys, case, "hollow.pth")


def test_state_dicts_of_other_models_are_refused(case, capsys):
    weights = random_weights(CONFIG)
    gone = "model.layers.1.atten.self_attn.k_proj.weight"
    changed = {
        "foreign": ({"gpt.weight": torch.zeros(2, 2)}, "has 0 layers"),
        "short": ({k: v for k, v in weights.items() if k != gone}, f"lacks {gone}"),
        "long": (weights | {"model.extra.weight": torch.zeros(2)}, "has model.extra.weight"),
        "wide": (weights | {"lm_head.weight": torch.zeros(3, 3)}, "lm_head.weight has the shape (3, 3)"),
        "integer": (weights | {"lm_head.weight": torch.zeros(17, 12, dtype=torch.int8)}, "torch.int8"),
    }
    for name, (tensors, said) in changed.items():
        save_file(tensors, case / f"{name}.safetensors")
        assert said in refused(capsys, case, f"{name}.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mode": "E"}, "mode=E"),
        ({"mode": "a"}, "mode=a"),
        ({"mode": ["A"]}, "mode=['A']"),
        ({"mode": "B"}, "branch_proj.weight has the shape (12, 24), expected (12, 12)"),
        ({"hidden_size": 0}, "hidden_size=0"),
        ({"hidden_size": 12.0}, "hidden_size=12.0"),
        ({"hidden_size": "12"}, "hidden_size=12"),
        ({"vocab_size": True}, "vocab_size=True"),
        ({"vocab_size": 10**12}, "vocab_size=1000000000000"),
        ({"vocab_size": 18}, "expected (18, 12)"),
        ({"hidden_size": 18}, "expected (17, 18)"),
        ({"mamba_expand": 10**6, "mamba_dt_rank": 10**6, "mamba_d_state": 10**6}, "expected"),
        ({"intermediate_size": 10**6, "mamba_d_conv": 10**6}, "expected"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers=1000000"),
        ({"num_attention_heads": 5}, "num_attention_heads=5"),
        ({"num_key_value_heads": 4}, "num_key_value_heads=4"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps=-1e-06"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps=1e-6"),
        ({"mamba_dt_rank": 3}, "mamba.mamba.x_proj.weight"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(case, capsys, change, said):
    (case / "changed.json").write_text(json.dumps(CONFIG | change))
    assert said in refused(capsys, case, "good.safetensors", "changed.json")


@pytest.mark.parametrize("key", CONFIG)
def test_every_key_of_the_config_is_needed(case, capsys, key):
    (case / "short.json").write_text(json.dumps({k: v for k, v in CONFIG.items() if k != key}))
    assert f"lacks the key {key}" in refused(capsys, case, "good.safetensors", "short.json")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_config_that_is_no_json_object_is_refused(case, capsys, text):
    (case / "odd.json").write_bytes(text)
    assert "JSON" in refused(capsys, case, "good.safetensors", "odd.json")


def test_files_that_are_not_there_or_of_another_kind_are_refused(case, capsys):
    (case / "weights.npz").write_bytes(b"x")
    (case / "full").mkdir()
    (case / "full" / "kept.txt").write_text("mine")
    assert "there is no file" in refused(capsys, case, "absent.pth")
    assert "neither .safetensors nor .pth" in refused(capsys, case, "weights.npz")
    assert "cannot be read" in refused(capsys, case, "good.pth", "absent.json")
    assert "is there already" in refused(capsys, case, "good.pth", out="full")
    assert "is there already" in refused(capsys, case, "good.pth", out="config.json")
    assert [path.name for path in (case / "full").iterdir()] == ["kept.txt"]


def test_dt_rank_auto_is_a_sixteenth_of_the_width(case):
    config = CONFIG | {"mamba_dt_rank": "auto"}
    (case / "auto.json").write_text(json.dumps(config))
    save_file(random_weights(config | {"mamba_dt_rank": 1}), case / "auto.safetensors")
    assert run(case, "auto.safetensors", "auto.json") == 0
    assert flowhn.load(case / "out").layers[0].ssm.mixer.dt_rank == 1
