"""A run that was stopped and continued equals one that never stopped, bit for bit; torn checkpoints are skipped."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule
from torch import nn
from torch.utils.data import DataLoader

from flowhn.errors import UserError
from flowhn.training import Hardware, LitLM, fit, latest_valid_checkpoint, seed_everything
from flowhn.training.checkpoints import (
    AtomicCheckpointIO,
    checkpoint_path,
    manifest_path,
    sha256_of,
    write_durably,
)
from flowhn.training.loop import CHECKPOINTS
from flowhn.training.resume import random_state, set_random_state

VOCAB, SEQ, MICRO, ACCUMULATE, STEPS, ROWS = 32, 8, 2, 2, 9, 10  # 36 samples: more than three passes over 10 rows
PER_STEP = MICRO * ACCUMULATE


class Tiny(nn.Module):
    """The least network with the interface of CausalLM; a dropout makes the run depend on the random state."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 16)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Dropout(0.1)) for _ in range(2))
        self.norm = nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, VOCAB, bias=False)

    def body(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.norm(x)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.body(input_ids))

    def flops(self, n_tokens: int) -> int:
        return 2 * n_tokens * (2 * 16 * 16 + 16 * VOCAB)


class Rows(LightningDataModule):
    """Rows in an order that is a pure function of the global sample index; notes what it served."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.rows = torch.randint(0, VOCAB, (ROWS, SEQ + 1), generator=generator)
        self.start = 0

    def set_start(self, samples_seen: int) -> None:
        self.start = samples_seen

    def _collate(self, picked: list[int]) -> dict[str, torch.Tensor]:
        rows = self.rows[torch.tensor(picked)]
        labels = rows[:, 1:].clone()
        labels[:, -1] = -100
        return {"input_ids": rows[:, :-1], "labels": labels}

    def _row(self, sample: int) -> int:
        epoch, position = divmod(sample, ROWS)
        return int(torch.randperm(ROWS, generator=torch.Generator().manual_seed(epoch))[position])

    def train_dataloader(self) -> DataLoader:
        order = [self._row(sample) for sample in range(self.start, STEPS * PER_STEP)]
        return DataLoader(order, batch_size=MICRO, collate_fn=self._collate)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(list(range(5)), batch_size=2, collate_fn=self._collate)


class Killed(RuntimeError):
    """Stands for a kill: nothing is saved after it."""


class KillAt(Callback):
    """Raises at the n-th call of a hook, counted over micro-batches or validation batches."""

    def __init__(self, hook: str, calls: int) -> None:
        self.hook, self.calls = hook, calls

    def _count(self, hook: str) -> None:
        if hook == self.hook:
            self.calls -= 1
            if self.calls == 0:
                raise Killed

    def on_train_batch_start(self, *args: object) -> None:
        self._count("train")

    def on_validation_batch_start(self, *args: object) -> None:
        self._count("validation")

    def on_train_end(self, *args: object) -> None:
        self._count("end")


def run(folder: Path, *, callbacks: tuple = (), every: int | None = 1, run_id: str = "a", **options):
    """One call of ``fit`` as a fresh process would make it; returns its result, weights and what it said."""
    seed_everything(3)
    schedule = {"warmup_fraction": 0.2, "min_lr_ratio": 0.1, "total_steps": STEPS}
    lit = LitLM(net=Tiny(), optimizer={"name": "adamw", "lr": 1e-2}, schedule=schedule)
    said: list[str] = []
    arguments = {
        "hardware": Hardware(torch.device("cpu"), 1, "32-true", False),
        "trainer_cfg": {
            "checkpoint": {"every_n_steps": every, "seconds": None, "keep": 2},
            "throughput": {"peak_flops": 1e12},
            "log_every": 2,
        },
        "total_steps": STEPS,
        "tokens_per_step": PER_STEP * SEQ,
        "seq_len": SEQ,
        "run_dir": folder,
        "run_id": run_id,
        "accumulate": ACCUMULATE,
        "val_steps": (3, 6, 9),
        "clip_grad_norm": 1.0,
    }
    result = fit(lit, Rows(), callbacks=callbacks, say=said.append, **{**arguments, **options})
    return result, {name: tensor.clone() for name, tensor in lit.state_dict().items()}, said


def points(result) -> tuple:
    """Both curves without the wall time."""
    return result.curves["train"], [point[:2] for point in result.curves["val"]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"), every=None)


def assert_same(whole, other) -> None:
    assert points(whole[0]) == points(other[0])
    for name, tensor in whole[1].items():
        assert torch.equal(tensor, other[1][name]), name


def test_uninterrupted_run_is_complete(whole):
    result = whole[0]
    tokens = PER_STEP * SEQ
    assert [point[0] for point in result.curves["train"]] == [step * tokens for step in (2, 4, 6, 8, 9)]
    assert [point[0] for point in result.curves["val"]] == [step * tokens for step in (3, 6, 9)]
    assert (result.steps, result.resumed) == (STEPS, 0)


# Micro-batches 1 to 18, two a step: 6 is in the middle of an accumulation, 7 right after the validation of step 3, 11
# and 12 in the third pass over the data, 18 within the last step. A validation has three batches.
@pytest.mark.parametrize(
    ("hook", "calls", "every"),
    [
        *[("train", 1, 1), ("train", 6, 1), ("train", 7, 1), ("train", 12, 1), ("train", 11, 2), ("train", 18, 4)],
        *[("validation", 1, 1), ("validation", 5, 3), ("validation", 8, 1), ("end", 1, 1)],
    ],
)
def test_killed_run_continues_bit_for_bit(tmp_path, whole, hook, calls, every):
    with pytest.raises(Killed):
        run(tmp_path, callbacks=(KillAt(hook, calls),), every=every)
    resumed = run(tmp_path, every=every)
    assert_same(whole, resumed)
    assert resumed[0].resumed == (0 if (hook, calls) == ("train", 1) else 1)


def test_killed_at_every_start_still_arrives(tmp_path, whole):
    kills = 0
    while True:
        try:
            result = run(tmp_path, callbacks=(KillAt("train", 4),))
            break
        except Killed:
            kills += 1
    assert_same(whole, result)
    assert result[0].resumed == kills == 8


def test_resume_is_counted_when_killed_before_the_next_checkpoint(tmp_path):
    for _ in range(3):
        with pytest.raises(Killed):
            run(tmp_path, callbacks=(KillAt("train", 6),), every=2)
    assert run(tmp_path, every=2)[0].resumed == 3


@pytest.mark.parametrize(
    ("signum", "expected"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)], ids=["int", "term"]
)
@pytest.mark.parametrize(
    ("hook", "calls"), [("train", 1), ("train", 8), ("validation", 2), ("validation", 9), ("end", 1)]
)
def test_signal_saves_the_last_step(tmp_path, whole, signum, expected, hook, calls):
    class Signal(KillAt):
        def _count(self, hook: str) -> None:
            try:
                super()._count(hook)
            except Killed:
                os.kill(os.getpid(), signum)

    before = signal.getsignal(signum)
    with pytest.raises(expected) as stopped:
        run(tmp_path, callbacks=(Signal(hook, calls),), every=None)
    if expected is SystemExit:
        assert stopped.value.code == 143
    assert signal.getsignal(signum) == before
    step = {("train", 1): None, ("train", 8): 4, ("validation", 2): 3}.get((hook, calls), 9)
    assert latest_valid_checkpoint(tmp_path / "checkpoints").manifest.get("step") == step
    assert_same(whole, run(tmp_path, every=None))


def test_runs_outside_the_main_thread(tmp_path, whole):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path)))
    thread.start()
    thread.join()
    assert_same(whole, results[0])


@pytest.mark.parametrize("damage", ["truncate", "flip", "no manifest", "empty manifest", "temporary"])
def test_torn_checkpoint_is_named_and_skipped(tmp_path, whole, damage):
    with pytest.raises(Killed):
        run(tmp_path, callbacks=(KillAt("train", 11),))
    folder = tmp_path / "checkpoints"
    newest = checkpoint_path(folder, 5)
    assert latest_valid_checkpoint(folder).path == newest
    content = newest.read_bytes()
    if damage == "truncate":
        newest.write_bytes(content[:-100])
    elif damage == "flip":
        newest.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    elif damage == "no manifest":
        manifest_path(newest).unlink()
    elif damage == "empty manifest":
        manifest_path(newest).write_text("")
    else:
        newest.rename(newest.with_name(newest.name + ".tmp"))
    search = latest_valid_checkpoint(folder)
    assert search.path == checkpoint_path(folder, 4)
    assert [path for path, _ in search.skipped] == ([] if damage == "temporary" else [newest])
    resumed = run(tmp_path)
    assert_same(whole, resumed)
    assert damage == "temporary" or str(newest) in resumed[2][0]
    assert not list(folder.glob("*.tmp"))


def test_all_checkpoints_torn_starts_over(tmp_path, whole):
    with pytest.raises(Killed):
        run(tmp_path, callbacks=(KillAt("train", 11),))
    for path in (tmp_path / "checkpoints").glob("*.ckpt"):
        path.write_bytes(b"torn")
    resumed = run(tmp_path)
    assert_same(whole, resumed)
    assert len(resumed[0].skipped) == 2


def test_last_two_are_kept_and_the_finished_run_is_one_of_them(tmp_path, whole):
    run(tmp_path)
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"step-0000000{step}.{kind}" for step in (8, 9) for kind in ("ckpt", "json")
    ]
    manifest = json.loads(manifest_path(checkpoint_path(folder, 9)).read_text())
    assert manifest["sha256"] == hashlib.sha256(checkpoint_path(folder, 9).read_bytes()).hexdigest()
    assert manifest["samples_seen"] == STEPS * PER_STEP
    again = run(tmp_path)
    assert_same(whole, again)
    assert again[0].throughput["n_windows"] > 0  # the windows of the first call


def test_checkpoint_of_another_configuration_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(UserError, match="another configuration"):
        run(tmp_path, run_id="b")


def test_checkpoint_of_another_model_is_refused(tmp_path, monkeypatch):
    run(tmp_path)
    monkeypatch.setattr(nn, "LayerNorm", nn.RMSNorm)  # no bias: other names in the state dict
    with pytest.raises(UserError, match="belongs to another model"):
        run(tmp_path)


def test_checkpoint_that_holds_code_is_refused(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, ("true",)

    path = checkpoint_path(tmp_path, 1)
    AtomicCheckpointIO().save_checkpoint({"state_dict": Attack()}, path)
    assert latest_valid_checkpoint(tmp_path).path == path  # its hash is right, its content is not
    (_, reason), *_ = latest_valid_checkpoint(tmp_path, content=True).skipped
    assert "plain tensors" in reason
    with pytest.raises(UserError, match="plain tensors"):
        AtomicCheckpointIO().load_checkpoint(path)


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}}, {"flowhn": {"step": 9}}, "code"])
def test_a_checkpoint_with_a_right_hash_and_foreign_content_is_skipped(tmp_path, content, whole):
    run(tmp_path)
    folder = tmp_path / CHECKPOINTS
    before = latest_valid_checkpoint(folder).path
    AtomicCheckpointIO().save_checkpoint({"x": 1}, checkpoint_path(folder, 99))
    write_durably(checkpoint_path(folder, 99), lambda file: torch.save(content, file))
    manifest = json.loads(manifest_path(checkpoint_path(folder, 99)).read_text())
    manifest |= {"sha256": sha256_of(checkpoint_path(folder, 99)), "bytes": checkpoint_path(folder, 99).stat().st_size}
    manifest_path(checkpoint_path(folder, 99)).write_text(json.dumps(manifest))
    again, _, said = run(tmp_path)
    assert latest_valid_checkpoint(folder, content=True).path == before
    assert [path.name for path, _ in again.skipped] == ["step-00000099.ckpt"]
    assert any("step-00000099.ckpt" in text for text in said)
    assert points(again) == points(whole[0])


def test_a_run_in_double_precision_goes_on_in_double_precision(tmp_path):
    double = {"hardware": Hardware(torch.device("cpu"), 1, "64-true", False)}
    unbroken, weights, _ = run(tmp_path / "unbroken", **double)
    with pytest.raises(Killed):
        run(tmp_path / "killed", callbacks=(KillAt("train", 11),), **double)
    again, others, _ = run(tmp_path / "killed", **double)
    assert again.resumed == 1
    assert points(again) == points(unbroken)
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert weights["net.lm_head.weight"].dtype == torch.float64


def test_full_disk_leaves_earlier_checkpoints_alone(tmp_path, monkeypatch):
    io = AtomicCheckpointIO()
    io.save_checkpoint({"flowhn": {"step": 1}}, checkpoint_path(tmp_path, 1))

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="no space is left"):
        io.save_checkpoint({"flowhn": {"step": 2}}, checkpoint_path(tmp_path, 2))
    assert latest_valid_checkpoint(tmp_path).path == checkpoint_path(tmp_path, 1)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_disk_that_fills_up_while_torch_writes_is_one_sentence(tmp_path, monkeypatch):
    """torch's zip writer turns the OSError of a failed write into a RuntimeError of its own."""
    io = AtomicCheckpointIO()
    io.save_checkpoint({"flowhn": {"step": 1}}, checkpoint_path(tmp_path, 1))
    real = Path.open

    class Filling:
        def __init__(self, file):
            self.file, self.left = file, 20_000

        def write(self, data):
            self.left -= len(memoryview(data).cast("B"))
            if self.left < 0:
                raise OSError(28, "No space left on device")
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *args):
            self.file.close()

    def open_(self, mode="r", *args, **kwargs):
        file = real(self, mode, *args, **kwargs)
        return Filling(file) if "w" in mode else file

    monkeypatch.setattr(Path, "open", open_)
    with pytest.raises(UserError, match="no space is left"):
        io.save_checkpoint({"flowhn": {"step": 2}, "x": torch.randn(100_000)}, checkpoint_path(tmp_path, 2))
    monkeypatch.undo()
    assert latest_valid_checkpoint(tmp_path).path == checkpoint_path(tmp_path, 1)
    assert not list(tmp_path.glob("*.tmp"))


def test_random_state_round_trip(tmp_path):
    import random

    import numpy as np

    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.gauss(0, 1)
    torch.save(random_state(), tmp_path / "state")
    first = draw()
    set_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert draw() == first
