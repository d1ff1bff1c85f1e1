"""One run on several processes (gloo on the CPU): the same losses, one record."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from flowhn import train
from flowhn.runs import process_rank

ROOT = Path(__file__).resolve().parents[1]


def record_of(folder: Path) -> dict:
    (path,) = folder.glob("runs/*/record.json")
    return json.loads(path.read_text())


def test_two_processes_train_what_one_does(tmp_path):
    words = ["model=flowhn", "device=cpu", "budget=4096", "val_points=2", "val_rows=6", "eval=docs", "eval.limit=4",
             f"cache_dir={tmp_path}/cache"]  # fmt: skip
    assert train._main([*words, f"output_dir={tmp_path}/one"]) == 0
    command = [sys.executable, "-m", "flowhn.train", *words, "trainer.devices=2", f"output_dir={tmp_path}/two"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = record_of(tmp_path / "one"), record_of(tmp_path / "two")
    assert [tokens for tokens, _ in one["losses"]["train"]] == [tokens for tokens, _ in two["losses"]["train"]]
    for (_, a), (_, b) in zip(one["losses"]["train"], two["losses"]["train"], strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    for a, b in zip(one["losses"]["val"], two["losses"]["val"], strict=True):
        assert a[1] == pytest.approx(b[1], abs=1e-5)
    for task, numbers in one["evaluation"]["tasks"].items():
        assert numbers["correct"] == two["evaluation"]["tasks"][task]["correct"]
    assert one["tokens"] == two["tokens"] == 4096


@pytest.mark.parametrize(
    ("environment", "rank"),
    [({}, 0), ({"LOCAL_RANK": "1"}, 1), ({"RANK": "5", "LOCAL_RANK": "1"}, 5), ({"SLURM_PROCID": "3"}, 3)],
)
def test_the_number_of_a_process_comes_from_its_launcher(environment, rank, monkeypatch):
    for key in ("RANK", "SLURM_PROCID", "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert process_rank() == rank
