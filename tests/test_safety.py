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


class _Touches:
    """A pickle that writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.fixture
def evil(tmp_path):
    """Places of a pickle and of the file that appears when somebody reads it."""
    owned, pickled = tmp_path / "owned", tmp_path / "evil.pt"
    torch.save(_Touches(owned), pickled)
    return pickled, owned


def test_the_pickle_of_these_tests_is_one(evil):
    pickled, owned = evil
    torch.load(pickled, weights_only=False)
    assert owned.exists()


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("place", ["value", "list", "key", "escaped", "resolver", "part of a target"])
def test_an_interpolation_in_a_runs_config_is_never_resolved(run, evil, place, trust, monkeypatch):
    """What was checked must be what is built: Hydra would resolve ``${oc.create:...}`` after the check, and call its target."""
    pickled, owned = evil
    monkeypatch.setenv("SECRET_KEY", "hunter2")
    code = f"${{oc.create:{{_target_:torch.load,f:'{pickled}',weights_only:false}}}}"
    changes = {
        "value": lambda model: model.update(norm_eps=code),
        "list": lambda model: model["blocks"].update(extra=[[code]]),
        "key": lambda model: model["blocks"].update({code: 1}),
        "escaped": lambda model: model.update(norm_eps="\\\\" + code),
        "resolver": lambda model: model.update(norm_eps="${oc.env:SECRET_KEY}"),
        "part of a target": lambda model: model.update(extra={"_target_": "${.name}", "name": "torch.load"}),
    }
    tamper(run, changes[place])
    with pytest.raises(UserError, match=r"interpolation|not a class of flowhn\.models") as refused:
        flowhn.load(run, trust=trust)
    assert not owned.exists()
    assert "hunter2" not in str(refused.value)


def test_a_caller_with_its_own_config_builds_nothing_from_the_folders(run):
    from flowhn.loading import load_run

    config = json.loads((run / CONFIG_NAME).read_text())["config"]
    tamper(run, lambda model: model.update(_target_="os.system", command="touch owned"))
    assert load_run(run, config=config).model.vocab_size == 2048


def test_nothing_in_the_package_trusts_a_folder_by_itself():
    """``trust`` comes from a user's ``--trust`` or from a caller of ``flowhn.load``; no module sets it."""
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                assert not [k for k in node.keywords if k.arg == "trust" and isinstance(k.value, ast.Constant)], path


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


def test_names_in_data_files_stay_names(tmp_path):
    """Ids and paths inside a corpus decide no file's place: nothing appears outside of the cache."""
    from flowhn.data import prepare

    inside, cache = tmp_path / "in", tmp_path / "a" / "b" / "cache"
    inside.mkdir()
    text = "some words stand here and make a line of text\n" * 40
    names = ("../../owned", "/tmp/flowhn-owned", "..\\owned", "a/../../../owned")
    rows = [{"id": name, "path": name, "text": f"{name} {n}\n{text}"} for n, name in enumerate(names * 4)]
    (inside / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    spec = {"name": "files", "path": str(inside), "val_fraction": 0.2, "tokenizer": "train"}
    prepared = prepare(spec, vocab_size=300, seq_len=16, cache_dir=cache)
    outside = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_relative_to(cache)]
    assert outside == [inside / "corpus.jsonl"]
    assert not Path("/tmp/flowhn-owned").exists()
    assert prepared.dir.is_relative_to(cache)


@pytest.mark.parametrize("cell", ["../../owned", "/tmp/owned", "a/b", "..", "a\\..\\b", "."])
def test_a_name_cannot_lead_out_of_the_output_folder(cell):
    with pytest.raises(UserError, match="cell"):
        compose("train", [f"cell='{cell}'"])


def test_an_experiments_folder_name_is_made_of_checked_words():
    """What a run's folder is named after is checked or hashed: no part of a config can hold a path separator."""
    from flowhn.runs import plan

    run = plan(compose("train", ["cell=mine", "output_dir=out"]))
    assert run.folder.parent == Path("out/runs")
    assert "/" not in run.name
    with pytest.raises(UserError, match="budget"):
        compose("train", ["budget=../../1"])


def test_secrets_reach_no_file_of_a_run_and_no_log(tmp_path, monkeypatch, capfd):
    """A whole tiny run, and one that fails, with secrets in the environment: none of them is anywhere afterwards."""
    from flowhn.cli import run_entry
    from flowhn.train import _main

    secret = "hf_abcdefghijklmnop0123456789"
    for key in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, secret)
    argv = ["model=llama", "size=tiny", "budget=512", "data=random", "data.n_rows=16", "data.n_val_rows=4", "eval=none"]
    argv += ["trainer=cpu", "logger=csv", f"output_dir={tmp_path / 'out'}", f"cache_dir={tmp_path / 'cache'}"]
    for more, code in (([], 0), (["data=files", f"data.path={tmp_path / 'none'}"], 2)):
        words = {word.partition("=")[0]: word for word in argv}
        if more:
            words = {key: word for key, word in words.items() if not key.startswith("data.")}
            words |= {word.partition("=")[0]: word for word in more}
        with pytest.raises(SystemExit) as ended:
            run_entry(_main, list(words.values()))
        assert ended.value.code == code
    said = "".join(capfd.readouterr())
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert secret not in said
    assert not [path for path in files if secret.encode() in path.read_bytes()]


def test_flipped_weights_are_refused_where_their_hash_is_known(run):
    from flowhn.run_folder import file_sha256

    content = json.loads((run / CONFIG_NAME).read_text())
    content["weights_sha256"] = file_sha256(run / WEIGHTS_NAME)
    (run / CONFIG_NAME).write_text(json.dumps(content))
    flowhn.load(run)
    data = bytearray((run / WEIGHTS_NAME).read_bytes())
    data[-100] ^= 1
    (run / WEIGHTS_NAME).write_bytes(bytes(data))
    with pytest.raises(UserError, match="not the bytes that training wrote"):
        flowhn.load(run)


def test_weights_that_are_no_numbers_are_refused(run):
    from safetensors.torch import load_file, save_file

    weights = load_file(run / WEIGHTS_NAME)
    name = sorted(weights)[0]
    for bad in (weights[name] * torch.nan, weights[name].to(torch.int64)):
        save_file({**weights, name: bad}, run / WEIGHTS_NAME)
        with pytest.raises(UserError, match=name):
            flowhn.load(run)
