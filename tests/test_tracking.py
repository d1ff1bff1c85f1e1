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
from flowhn.run_tracking import check_tracking, is_offline, is_tracked, logger_options
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

    found: dict = {"history": [], "summary": {}, "artifacts": {}, "config": {}, "exit_code": None}
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
        elif kind == "exit":
            found["exit_code"] = record.exit.exit_code
    return found


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """With logger=wandb and no key: two models of Table 1, a model that dies in its evaluation, a timed artefact.

    In a process of their own: wandb changes its process.
    """
    folder = tmp_path_factory.mktemp("wandb")
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    env |= {"WANDB_BASE_URL": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"}  # nobody listens there
    words = [*_WORDS, "logger=wandb", f"cache_dir={folder}/cache"]
    calls = [
        ["table1", "models=[llama,flowhn_fac]", *words, f"output_dir={folder}/trained"],
        ["figure4", "budget=smoke", "models=[llama]", "logger=wandb", f"output_dir={folder}/timed"],
        ["table1", "models=[shm]", *words, f"output_dir={folder}/failed"],
    ]
    (folder / "calls.json").write_text(json.dumps(calls))
    done = subprocess.run(
        [sys.executable, "-c", _CALLS, str(folder / "calls.json")], env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done, folder


_CALLS = """
import json, sys
from pathlib import Path
from flowhn import experiment, reproduce
trained, timed, failed = json.loads(Path(sys.argv[1]).read_text())
assert reproduce._main(trained) == 0
assert reproduce._main(timed) == 0
def die(*args, **options):
    raise ZeroDivisionError("a fault")
experiment.Workshop._evaluate = die
assert reproduce._main(failed) == 2
"""


@pytest.fixture(scope="module")
def tracked(calls):
    """What the two trained models and their table sent."""
    done, folder = calls
    return runs_of(folder / "trained"), done, folder / "trained"


def runs_of(folder: Path) -> dict[str, dict]:
    return {path.stem.removeprefix("run-"): sent(path) for path in folder.rglob("*.wandb")}


@pytest.mark.slow  # .ci/run runs it
def test_each_run_is_its_own_and_in_the_artefacts_group(tracked):
    runs, done, _ = tracked
    assert len(runs) == 3, "two trainings and the artefact, none merged into another"
    assert {run["run"].run_group for run in runs.values()} == {"table1"}
    assert {run["run"].project for run in runs.values()} == {"flowhn"}
    kinds = sorted((run["run"].job_type, run["run"].display_name.split("-")[0]) for run in runs.values())
    assert kinds == [("artefact", "table1"), ("train", "flowhn_fac"), ("train", "llama")]
    assert {run["exit_code"] for run in runs.values()} == {0}
    assert (done.stdout + done.stderr).count("W&B, offline: wandb sync ") == 5


@pytest.mark.slow  # .ci/run runs it
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


@pytest.mark.slow  # .ci/run runs it
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


@pytest.mark.slow  # .ci/run runs it
def test_a_timed_artefact_sends_its_table_figure_and_records(calls):
    (run,) = runs_of(calls[1] / "timed").values()
    assert (run["run"].job_type, run["run"].run_group, run["exit_code"]) == ("artefact", "figure4", 0)
    logged = {key: value for row in run["history"] for key, value in row.items()}
    assert logged["tables/table/nrows"] == 1
    assert logged["figures/figure4/_type"] == "image-file"
    kind, names = run["artifacts"]["figure4-smoke"]
    assert kind == "artefact"
    assert {"table.md", "command.txt"} < set(names)
    assert any(name.startswith("records/llama-tiny-") for name in names)


@pytest.mark.slow  # .ci/run runs it
def test_a_run_that_dies_is_told_as_failed(calls):
    done, folder = calls
    (run,) = runs_of(folder / "failed").values()
    assert run["run"].job_type == "train"
    assert run["exit_code"] == 1
    assert not run["artifacts"], "there is no record to send"
    assert "error: shm has no record: ZeroDivisionError: a fault (traceback: " in done.stderr


def test_disabled_by_the_environment_nothing_is_tracked(monkeypatch):
    from flowhn.run_training import _loggers

    run = plan(compose("train", ["logger=wandb"]))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert is_tracked(run.config)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert not is_tracked(run.config)
    assert [type(logger).__name__ for logger in _loggers(run)] == ["CSVLogger"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_tracking(run.config)  # nor is the package needed


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
