"""What a folder or file from somebody else can do: nothing but be read or refused."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import torch

import flowhn
from flowhn.config import build_model, check_targets, compose, groups, to_dict
from flowhn.errors import UserError
from flowhn.run_folder import CONFIG_NAME, WEIGHTS_NAME, save_weights

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(tmp_path):
    """The folder of a run as training leaves it."""
    config = to_dict(compose("train", ["model=llama", "size=tiny"]))
    (tmp_path / CONFIG_NAME).write_text(json.dumps({"run_id": "x", "name": "x", "config": config}))
    save_weights(build_model(config), tmp_path)
    return tmp_path


def tamper(run: Path, change) -> None:
    content = json.loads((run / CONFIG_NAME).read_text())
    change(content["config"]["model"])
    (run / CONFIG_NAME).write_text(json.dumps(content))


def test_an_honest_run_loads(run):
    assert flowhn.load(run)(torch.tensor([[1, 2]])).shape == (1, 2, 2048)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "torch.load",
        "torch.hub.load",
        "flowhn.models.torch.load",
        "flowhn.models.lm.torch.hub.load",
        "flowhn.models.from_transformers",
        "flowhn.models",
        "builtins.eval",
        ["flowhn.models.CausalLM"],
    ],
)
def test_a_run_whose_config_names_something_else_is_refused(run, target):
    tamper(run, lambda model: model["blocks"].update(extra={"_target_": target, "_args_": ["touch /tmp/owned"]}))
    with pytest.raises(UserError, match=r"not a class of flowhn\.models"):
        flowhn.load(run)


def test_trust_lets_own_classes_through(run):
    tamper(run, lambda model: model.update(_target_="flowhn.models.lm.CausalLM"))
    with pytest.raises(UserError, match="trust=True"):
        flowhn.load(run)
    assert flowhn.load(run, trust=True).vocab_size == 2048


@pytest.mark.parametrize("split", groups()["split"])
def test_every_config_that_we_ship_passes(split):
    for model in groups()["model"]:
        check_targets(to_dict(compose("train", [f"model={model}", f"split={split}"]))["model"])


def test_weights_are_only_read_as_safetensors(run):
    torch.save({"x": torch.zeros(1)}, run / WEIGHTS_NAME)
    with pytest.raises(UserError, match="damaged"):
        flowhn.load(run)


def test_nothing_in_the_package_unpickles():
    """Every torch.load says weights_only=True, nobody uses pickle's loaders, and remote code is never trusted."""
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name == "torch.load":
                assert options.get("weights_only") == "True", f"{path}: {ast.unparse(node)}"
            assert name not in {"pickle.load", "pickle.loads", "joblib.load", "eval", "exec", "yaml.load"}, (
                f"{path}: {name}"
            )
            assert options.get("trust_remote_code", "False") == "False", f"{path}: {ast.unparse(node)}"
            if name == "np.load":
                assert options.get("allow_pickle", "False") == "False", f"{path}: {ast.unparse(node)}"


def test_records_hold_nothing_from_the_environment(monkeypatch):
    from flowhn.reporting.record import environment

    secret = "hf_abcdefghijklmnop0123456789"
    for key in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, secret)
    config = to_dict(compose("train", ["logger=wandb"]))
    text = json.dumps(environment()) + json.dumps(config)
    assert secret not in text
    assert not re.search(r"(?i)api_key|secret|password", text)
