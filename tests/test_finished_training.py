"""A run stopped in its evaluation: hashes stay, damaged weights are trained again from the checkpoint, no second evaluation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import flowhn
import flowhn.experiment
from flowhn import run_folder
from flowhn.config import compose
from flowhn.errors import UserError
from flowhn.experiment import Workshop
from flowhn.run_folder import CONFIG_NAME, TRAINED_NAME, WEIGHTS_NAME, file_sha256
from flowhn.runs import Run, plan

WORDS = [
    "model=llama", "size=tiny", "size.d_model=16", "size.n_heads=2", "size.n_kv_heads=1", "size.n_layers.llama=1",
    "size.d_ff.llama=16", "vocab_size=300", "seq_len=16", "global_batch_tokens=64", "budget=512", "eval=none",
    "logger=none", "trainer=cpu", "val_points=1", "val_rows=2", "data=files", "data.val_fraction=0.2",
]  # fmt: skip


def planned(root: Path, text: Path) -> Run:
    files = [f"data.path={text}", f"output_dir={root / 'out'}", f"cache_dir={root / 'cache'}"]
    return plan(compose("train", [*WORDS, *files]))


def work(run: Run, said: list[str] | None = None):
    return Workshop().run(run, lambda progress: None, say=(said if said is not None else []).append)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run of text whose training is done and whose record is not written: as a kill in the evaluation leaves it."""
    root = tmp_path_factory.mktemp("stopped")
    (root / "text.txt").write_text("Some words make a line of text here.\n\n" * 400, encoding="utf-8")
    run = planned(root, root / "text.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flowhn.experiment, "write_record", _die)
        with pytest.raises(KeyboardInterrupt):
            work(run)
    return run


def _die(*args):
    raise KeyboardInterrupt


@pytest.fixture
def run(stopped, tmp_path):
    """A copy of it of the test's own."""
    root = tmp_path / "copy"
    shutil.copytree(stopped.folder.parents[2], root)
    own = planned(root, Path(stopped.config["data"]["path"]))
    assert own.folder.is_dir()
    return own


def stored(run: Run) -> dict:
    return json.loads((run.folder / CONFIG_NAME).read_text())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(bytes(data))


def test_training_writes_the_hashes_of_what_it_made(run):
    assert stored(run)["weights_sha256"] == file_sha256(run.folder / WEIGHTS_NAME)
    assert stored(run)["tokenizer_sha256"] == run_folder.tokenizer_hash(run.folder)
    flowhn.load(run.folder)
    flip(run.folder / WEIGHTS_NAME)
    with pytest.raises(UserError, match="not the bytes that training wrote"):
        flowhn.load(run.folder)


def test_a_run_that_goes_on_in_its_evaluation_keeps_the_hashes(run):
    before = {key: stored(run)[key] for key in run_folder.HASHES}
    assert all(before.values())
    assert work(run).status == "done"
    assert {key: stored(run)[key] for key in run_folder.HASHES} == before
    assert stored(run)["config"] == run.config


@pytest.mark.parametrize("damage", ["a bit", "cut", "trained.json", "no hash"])
def test_damaged_weights_are_made_again_from_the_checkpoint(run, damage):
    """A power cut or a bad disk after training: the last checkpoint has the same weights, and they come out again."""
    weights, wanted, said = run.folder / WEIGHTS_NAME, file_sha256(run.folder / WEIGHTS_NAME), []
    if damage == "a bit":
        flip(weights)
    elif damage == "trained.json":
        (run.folder / TRAINED_NAME).write_text("{", encoding="utf-8")
    else:
        weights.write_bytes(weights.read_bytes()[:-50])
    if damage == "no hash":  # of a run that an earlier version trained
        content = stored(run)
        del content["weights_sha256"]
        (run.folder / CONFIG_NAME).write_text(json.dumps(content), encoding="utf-8")
    assert work(run, said).status == "done"
    assert file_sha256(weights) == wanted == stored(run)["weights_sha256"]
    assert any("damaged" in line and "goes on from the checkpoint" in line for line in said)


def test_damaged_weights_without_a_checkpoint_are_one_sentence(run):
    flip(run.folder / WEIGHTS_NAME)
    shutil.rmtree(run.folder / "checkpoints")
    with pytest.raises(UserError, match=r"damaged .*no checkpoint to go on from; run again with --force"):
        work(run)
    assert (run.folder / TRAINED_NAME).is_file()  # nothing is lost
    assert not run.record_path.exists()


def test_whoever_waited_for_the_lock_finds_the_record(run, monkeypatch):
    """The record is looked for again inside the lock: it may have been written between the first look and the lock."""
    import filelock

    take, workshop = filelock.FileLock.acquire, Workshop()

    def finish_first(lock, *args, **options):
        if Path(lock.lock_file).parent == run.folder and not run.record_path.exists():
            monkeypatch.setattr(filelock.FileLock, "acquire", take)
            work(run)  # another process, in between
        return take(lock, *args, **options)

    monkeypatch.setattr(filelock.FileLock, "acquire", finish_first)
    monkeypatch.setattr(workshop, "_run_locked", lambda *args: pytest.fail("evaluated again"))
    assert workshop.run(run, lambda progress: None, say=lambda text: None).run_id == run.run_id


def test_files_are_on_disk_before_their_names_are(tmp_path, monkeypatch):
    """fsync of the content, then the rename, then fsync of the folder: the order that a power cut cannot spoil."""
    import torch

    done: list[str] = []
    sync, replace = run_folder.sync, run_folder.os.replace
    monkeypatch.setattr(
        run_folder, "sync", lambda path: (done.append("folder" if path.is_dir() else "file"), sync(path))
    )
    monkeypatch.setattr(run_folder.os, "replace", lambda *names: (done.append("rename"), replace(*names)))
    run_folder.save_tensors({"x": torch.zeros(2)}, tmp_path / "x.safetensors")
    run_folder.write_json(tmp_path / "x.json", {})
    assert done == ["file", "rename", "folder"] * 2
