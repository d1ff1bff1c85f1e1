"""logger=wandb, offline: what lies in the .wandb files is what ``wandb sync`` would send."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowhn.config import compose
from flowhn.errors import UserError
from flowhn.run_tracking import is_offline, logger_options
from flowhn.runs import plan

pytest.importorskip("wandb", reason="wandb is not installed (pip install 'flowhn[wandb]')")

_BLOCK = 32768
_WORDS = ["budget=2048", "data=random", "data.n_rows=16", "data.n_val_rows=4", "eval=none", "val_points=1", "val_rows=2",
          "trainer=cpu", "trainer.log_every=1", "trainer.throughput.warmup_steps=1",
          "trainer.throughput.window_steps=1"]  # fmt: skip


def payloads(path: Path) -> Iterator[bytes]:
    """Records of a .wandb file: LevelDB's log format behind seven bytes of header (what ``wandb sync`` reads)."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, whole = 7, b""
    while at + 7 <= len(data):
        if _BLOCK - at % _BLOCK < 7:  # a block's tail is too short for a head
            at += _BLOCK - at % _BLOCK
            continue
        checksum, length = int.from_bytes(data[at : at + 4], "little"), int.from_bytes(data[at + 4 : at + 6], "little")
        kind = data[at + 6]
        part = data[at + 7 : at + 7 + length]
        assert checksum == zlib.crc32(part, zlib.crc32(bytes([kind]))), f"{path} is damaged at byte {at}"
        whole = part if kind in (1, 2) else whole + part  # full, first; middle, last
        if kind in (1, 4):
            yield whole
        at += 7 + length


def sent(path: Path) -> dict:
    """A .wandb file's run, config, history rows, final summary and artifacts."""
    from wandb.proto import wandb_internal_pb2

    found: dict = {"history": [], "summary": {}, "artifacts": {}, "config": {}}
    for payload in payloads(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(payload)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["run"] = record.run
            found["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            found["history"].append(row)
        elif kind == "summary":
            found["summary"] |= {
                i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.summary.update
            }
        elif kind == "artifact":
            names = [entry.path for entry in record.artifact.manifest.contents]
            found["artifacts"][record.artifact.name] = (record.artifact.type, names)
        found["ended"] = found.get("ended", False) or kind == "exit"
    return found


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """Two models of Table 1 with logger=wandb and no key, in a process of their own: wandb changes its process."""
    folder = tmp_path_factory.mktemp("wandb")
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    env |= {"WANDB_BASE_URL": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"}  # nobody listens there
    words = ["table1", "models=[llama,flowhn_fac]", *_WORDS, "logger=wandb"]
    words += [f"output_dir={folder}", f"cache_dir={folder}/cache"]
    done = subprocess.run(
        [sys.executable, "-m", "flowhn.reproduce", *words], env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return {path.stem.removeprefix("run-"): sent(path) for path in folder.rglob("*.wandb")}, done, folder


def test_each_run_is_its_own_and_in_the_artefacts_group(tracked):
    runs, done, _ = tracked
    assert len(runs) == 3, "two trainings and the artefact, none merged into another"
    assert {run["run"].run_group for run in runs.values()} == {"table1"}
    assert {run["run"].project for run in runs.values()} == {"flowhn"}
    kinds = sorted((run["run"].job_type, run["run"].display_name.split("-")[0]) for run in runs.values())
    assert kinds == [("artefact", "table1"), ("train", "flowhn_fac"), ("train", "llama")]
    assert all(run["ended"] for run in runs.values())
    assert (done.stdout + done.stderr).count("W&B, offline: wandb sync ") == 3


def test_a_run_sends_curves_config_figures_and_its_record(tracked):
    runs, _, folder = tracked
    record = json.loads(next(folder.glob("runs/flowhn_fac-*/record.json")).read_text())
    run = runs[record["run_id"]]
    train = [row["train/loss"] for row in run["history"] if "train/loss" in row]
    assert train == pytest.approx([loss for _, loss in record["losses"]["train"]])
    assert [row["tokens"] for row in run["history"] if "val/loss" in row] == [2048]
    assert run["config"]["choices"]["split"] == "fac"
    assert run["config"]["tokens"] == 2048
    assert run["summary"]["final/val_loss"] == pytest.approx(record["losses"]["final_val"])
    assert run["summary"]["final/tokens_per_second"] == pytest.approx(record["throughput"]["tps"])
    assert run["artifacts"][f"record-{record['run_id']}"] == ("record", ["record.json"])


def test_the_artefact_sends_tables_figures_and_its_folder(tracked):
    runs, _, _ = tracked
    run = next(run for run in runs.values() if run["run"].job_type == "artefact")
    logged = {key: value for row in run["history"] for key, value in row.items()}
    assert logged["tables/table/_type"] == "table-file"
    assert logged["tables/table/nrows"] == 2
    assert logged["figures/figure4/_type"] == "image-file"
    kind, names = run["artifacts"]["table1-tiny-random-2048"]
    assert kind == "artefact"
    assert {"table.md", "table.csv", "figure4.png", "loss.png", "records/llama-s0.json"} <= set(names)


def test_offline_unless_there_is_a_key(monkeypatch):
    for key in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(key, raising=False)
    assert is_offline()
    monkeypatch.setenv("WANDB_MODE", "online")
    assert not is_offline()
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert not is_offline()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert is_offline()


def test_without_wandb_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="FLOWHN_EXTRAS=wandb"):
        logger_options(plan(compose("train", ["logger=wandb"])))
