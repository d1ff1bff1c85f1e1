"""Sharded training (FSDP2) on one process: the same numbers, checkpoints that any strategy goes on from, no pickle."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from flowhn.config import build_model, compose, to_dict
from flowhn.convert import _main as convert
from flowhn.errors import UserError
from flowhn.training import latest_valid_checkpoint, resolve_hardware
from flowhn.training.checkpoints import AtomicCheckpointIO, manifest_path, prune, read_weights, sha256_of
from flowhn.training.loop import CHECKPOINTS
from flowhn.training.optim import parameter_groups
from flowhn.training.sharded import mark_parameters, parameter_marks
from flowhn.training.sharded_checkpoint import SafeReader
from test_resume import KillAt, Killed, points, run

CONFIG = {
    "checkpoint": {"every_n_steps": 2, "seconds": None, "keep": 2},
    "throughput": {"peak_flops": 1e12},
    "log_every": 2,
}
FSDP = {"trainer_cfg": CONFIG | {"strategy": "fsdp"}}
ALONE = {"trainer_cfg": CONFIG}


@pytest.fixture(scope="module", autouse=True)
def _no_dropout():
    """Strategies of several processes seed anew when they start, so that dropout would draw other numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Dropout, "forward", lambda self, x: x)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"), **ALONE)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder that a killed sharded run left behind."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Killed):
        run(folder, callbacks=(KillAt("train", 11),), **FSDP)  # in step 6
    return folder


def close(one, other) -> None:
    for mine, theirs in zip(points(one), points(other), strict=True):
        assert [point[0] for point in mine] == [point[0] for point in theirs]
        assert [point[1] for point in mine] == pytest.approx([point[1] for point in theirs], abs=1e-6)


def test_a_sharded_run_gives_the_same_losses_and_whole_weights(tmp_path, whole):
    result, _, _ = run(tmp_path, **FSDP)
    close(result, whole[0])
    assert result.steps == whole[0].steps
    for name, tensor in result.weights.items():
        assert type(tensor) is torch.Tensor
        assert torch.allclose(tensor, whole[1][f"net.{name}"], atol=1e-5)
    newest = latest_valid_checkpoint(tmp_path / CHECKPOINTS, content=True)
    assert newest.path.is_dir()
    assert newest.manifest["step"] == result.steps
    assert len([path for path in (tmp_path / CHECKPOINTS).glob("step-*.ckpt")]) == 2  # the last two are kept
    assert "LOCAL_RANK" not in os.environ  # a next run starts processes of its own
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("options", [FSDP, ALONE], ids=["fsdp", "alone"])
def test_a_sharded_checkpoint_is_gone_on_from(tmp_path, stopped, whole, options):
    shutil.copytree(stopped, tmp_path / "run")
    result, _, said = run(tmp_path / "run", **options)
    assert any("going on from" in text for text in said)
    assert result.resumed == 1
    close(result, whole[0])


def test_a_single_file_is_gone_on_from_by_a_sharded_run(tmp_path, whole):
    with pytest.raises(Killed):
        run(tmp_path, callbacks=(KillAt("train", 11),), **ALONE)
    result, _, _ = run(tmp_path, **FSDP)
    assert result.resumed == 1
    close(result, whole[0])


def test_both_forms_hold_the_same(tmp_path, stopped):
    with pytest.raises(Killed):
        run(tmp_path, callbacks=(KillAt("train", 11),), **ALONE)
    io = AtomicCheckpointIO()
    mine = io.load_checkpoint(latest_valid_checkpoint(stopped / CHECKPOINTS).path)
    theirs = io.load_checkpoint(latest_valid_checkpoint(tmp_path / CHECKPOINTS).path)
    assert set(mine) == set(theirs)
    assert mine["state_dict"].keys() == theirs["state_dict"].keys()
    (my_state,), (their_state,) = mine["optimizer_states"], theirs["optimizer_states"]
    assert my_state["state"].keys() == their_state["state"].keys()
    for number, state in my_state["state"].items():
        for key, value in state.items():
            assert torch.allclose(value, their_state["state"][number][key], atol=1e-6), (number, key)
    for group, other in zip(my_state["param_groups"], their_state["param_groups"], strict=True):
        assert group == other


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "manifest"])
def test_a_torn_sharded_checkpoint_is_named_and_the_one_before_used(tmp_path, stopped, whole, damage):
    shutil.copytree(stopped, tmp_path / "run")
    newest = latest_valid_checkpoint(tmp_path / "run" / CHECKPOINTS).path
    shard = next(newest.glob("*.distcp"))
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "flip":
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(bytes(content))
    elif damage == "gone":
        shard.unlink()
    else:
        manifest_path(newest).unlink()
    result, _, said = run(tmp_path / "run", **FSDP)
    assert [path for path, _ in result.skipped] == [newest]
    assert any(newest.name in text for text in said)
    close(result, whole[0])


class _Attack:
    def __reduce__(self):
        return os.system, ("touch owned",)


@pytest.mark.parametrize("name", [".metadata", "rest.pt"])
def test_code_in_a_sharded_checkpoint_is_never_run(tmp_path, stopped, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(stopped, tmp_path / "run")
    newest = latest_valid_checkpoint(tmp_path / "run" / CHECKPOINTS).path
    (newest / name).write_bytes(pickle.dumps(_Attack()))
    manifest = json.loads(manifest_path(newest).read_text())
    manifest["files"][name] = {"bytes": (newest / name).stat().st_size, "sha256": sha256_of(newest / name)}
    manifest_path(newest).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="plain tensors"):
        AtomicCheckpointIO().load_checkpoint(newest)
    with pytest.raises(UserError, match=r"plain tensors|error"):
        SafeReader(newest).read_metadata() if name == ".metadata" else read_plain_rest(newest)
    assert not (tmp_path / "owned").exists()


def read_plain_rest(path: Path) -> None:
    from flowhn.training.sharded_checkpoint import read_plain

    read_plain(path)


def test_flowhn_convert_makes_one_safetensors_file(tmp_path, stopped, capsys):
    newest = latest_valid_checkpoint(stopped / CHECKPOINTS).path
    out = tmp_path / "below" / "weights.safetensors"
    assert convert(["checkpoint", str(newest), "--out", str(out)]) == 0
    weights = load_file(out)
    whole = read_weights(newest)
    assert {f"net.{name}" for name in weights} == set(whole)
    assert all(torch.equal(tensor, whole[f"net.{name}"]) for name, tensor in weights.items())
    with pytest.raises(UserError, match="does not exist"):
        convert(["checkpoint", str(tmp_path / "none.ckpt"), "--out", str(out)])
    with pytest.raises(UserError, match="safetensors"):
        convert(["checkpoint", str(newest), "--out", str(tmp_path / "x.bin")])


def test_pruning_takes_folders_and_what_kills_left_behind(tmp_path):
    for step in (1, 2, 3):
        folder = tmp_path / f"step-{step:08d}.ckpt"
        folder.mkdir()
        (folder / "x").touch()
        manifest_path(folder).write_text("{}")
    (tmp_path / "step-00000004.ckpt.tmp").mkdir()
    prune(tmp_path, newest=3, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-00000002.ckpt", "step-00000002.json", "step-00000003.ckpt", "step-00000003.json"
    ]  # fmt: skip


def test_what_does_not_decay_stays_so_when_parameters_are_made_anew():
    """Sharding and moving a sharded network make new parameters, without what the mixers wrote on the old ones."""
    net = build_model(to_dict(compose("train", ["model=mamba1", "size.n_layers.mamba1=1"])))
    marks, before = parameter_marks(net), [len(group["params"]) for group in parameter_groups(net, 0.1)]
    for module in net.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))
    assert [len(group["params"]) for group in parameter_groups(net, 0.1)] != before
    mark_parameters(net, marks)
    assert [len(group["params"]) for group in parameter_groups(net, 0.1)] == before


@pytest.mark.parametrize(
    ("variables", "words", "sentence"),
    [
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, [], "trainer.num_nodes=2"),
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, ["trainer.devices=3"], "torchrun"),
        ({"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "job"}, ["trainer.devices=1"], "Slurm started 2"),
        ({}, ["precision=16-mixed", "trainer=fsdp"], "bf16-mixed"),
    ],
)
def test_devices_that_do_not_fit_are_one_sentence(variables, words, sentence, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    trainer = [] if "trainer=fsdp" in words else ["trainer=ddp"]
    with pytest.raises(UserError, match=sentence):
        resolve_hardware(to_dict(compose("train", [*trainer, "device=cpu", *words])))


def test_devices_are_what_the_launcher_started(monkeypatch):
    config = to_dict(compose("train", ["trainer=ddp", "device=cpu"]))
    assert resolve_hardware(config).n_devices == 1
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_NNODES", "2")
    monkeypatch.setenv("SLURM_JOB_NAME", "job")
    assert resolve_hardware(config | {"trainer": config["trainer"] | {"num_nodes": 2}}).n_devices == 8
