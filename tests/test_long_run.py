"""scripts/long_run.py at a small size: kills in the preparation lose little and change nothing, memory and logs stay bounded."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flowhn.data import prepare
from flowhn.data.disk import disk_estimate
from flowhn.errors import UserError
from script_loading import SCRIPTS, load_script

MIB = 2**20


data = load_script("long_run_data")
limits = load_script("long_run_limits")
long_run = load_script("long_run")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.slow  # .ci/run runs it
def test_a_killed_preparation_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "ORPHAN_SECONDS", 0.1)
    told, make = [], data.make_corpus

    def make_and_ask(folder, *args, **options):
        written = make(folder, *args, **options)
        spec = {"name": "files", "path": str(folder), "val_fraction": 0.02}
        told.append(disk_estimate(spec, vocab_size=600, seq_len=data.SEQ_LEN))
        return written

    monkeypatch.setattr(data, "make_corpus", make_and_ask)
    result = data.data_preparation(tmp_path, n_bytes=2_000_000, n_files=3, seed=0, vocab_size=600)
    assert result["same_rows"]
    assert result["corpus_bytes"] == pytest.approx(2_000_000, rel=0.01)
    assert result["below_2_gib"]
    assert 50 * MIB < result["peak_rss_bytes"] < 600 * MIB
    killed, whole = result["killed"], result["never_killed"]
    at_peak, after = told[0]
    assert whole["peak_disk_bytes"] < at_peak < 4 * whole["peak_disk_bytes"]
    assert whole["cache_bytes"] < after < 4 * whole["cache_bytes"]
    assert killed["sha256"] == whole["sha256"]
    assert killed["tokens"] == whole["tokens"] > 200_000
    assert whole["kills"] == []
    by_stage = {kill["while"]: kill for kill in killed["kills"]}
    assert list(by_stage) == ["reading", "tokenising", "rows"]
    if by_stage["tokenising"]["killed"]:
        assert by_stage["tokenising"]["token_shards_kept"] >= 1
        assert by_stage["tokenising"]["token_shards_torn"] <= 1
        assert by_stage["tokenising"]["next_began_with"].startswith("going on")
    assert any(kill["killed"] for kill in killed["kills"])
    assert not list(tmp_path.glob("cache-*"))
    assert not (tmp_path / "corpus").exists()


def _attempt(tmp_path: Path, corpus: Path, **changes):
    spec = {
        "name": "files",
        "path": str(corpus),
        "val_fraction": 0.02,
        "tokenizer": "train",
        "packing": "pack",
    } | changes
    given = {"spec": spec, "vocab_size": 400, "seq_len": 64, "cache": str(tmp_path / "cache"), "shard_chars": 100_000}
    arguments = tmp_path / "arguments.json"
    arguments.write_text(json.dumps(given), encoding="utf-8")
    (tmp_path / "cache").mkdir(exist_ok=True)
    return data.Attempt(arguments, tmp_path / "cache")


@pytest.mark.slow  # .ci/run runs it
def test_a_killed_preparation_leaves_no_process_and_no_lock(tmp_path):
    (tmp_path / "corpus").mkdir()
    data.make_corpus(tmp_path / "corpus", 3_000_000, n_files=1, seed=1)
    attempt = _attempt(tmp_path, tmp_path / "corpus", num_proc=2)
    assert attempt.wait(lambda _: data._count(tmp_path / "cache", "train-*.tokens") >= 2)
    children = psutil.Process(attempt.process.pid).children(recursive=True)
    assert len(children) >= 2
    attempt.process.kill()
    attempt.end()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    begun = time.monotonic()
    again = _attempt(tmp_path, tmp_path / "corpus", num_proc=2)
    again.wait()
    again.end()
    assert again.process.returncode == 0
    assert not any("waiting" in line for _, line in again.stages)
    assert again.stages[0][1].startswith("going on")
    assert time.monotonic() - begun < 60


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="the other processes must inherit the fault")
def test_a_killed_tokenising_process_is_named(tmp_path, monkeypatch):
    from flowhn.data import shards

    def die(*args):
        psutil.Process().kill()

    monkeypatch.setattr(shards, "_tokenise_shard", die)
    tokenizer = tmp_path / "tokenizer.json"
    shards_work = tmp_path / "work"
    shards_work.mkdir()
    from flowhn.data.tokenization import train_bpe

    train_bpe(iter(["some words"]), vocab_size=260).save(str(tokenizer))
    with pytest.raises(UserError, match=r"data\.num_proc"):
        shards.tokenise(shards_work, "train", tokenizer, n_shards=4, vocab_size=260, num_proc=2)


def test_random_data_say_their_size_exactly(tmp_path):
    spec = {"name": "random", "n_rows": 2000, "n_val_rows": 100, "seed": 0}
    prepared = prepare(spec, vocab_size=300, seq_len=64, cache_dir=tmp_path)
    _, after = disk_estimate(spec, vocab_size=300, seq_len=64)
    assert data.disk_bytes(tmp_path) <= after < 1.05 * data.disk_bytes(prepared.dir)


def test_sampled_pieces_are_every_so_many(tmp_path):
    from flowhn.data import shards

    writer = shards._PieceWriter(tmp_path, "train")
    for number in range(300):
        writer.add(f"document {number}")
        if number % 70 == 69:
            writer.close()
    writer.close()
    assert writer.counts["shards"] == 5
    for stride in (1, 3, 64, 301):
        sample = list(shards.sample_pieces(tmp_path, "train", 5, stride))
        assert sample == [f"document {number}" for number in range(0, 300, stride)]


@pytest.mark.slow  # .ci/run runs it
def test_training_and_its_logs_stay_bounded(tmp_path):
    memory, logs = long_run.training(tmp_path, steps=300)
    assert memory["steps"] == logs["steps"] == 300
    assert memory["last_bytes"] - memory["first_bytes"] < 5 * MIB
    assert memory["first_bytes"] > 100 * MIB
    assert 100 < logs["metrics_csv_lines"] <= 600  # at most 500 points and the validations
    assert logs["written_at_most_bytes"] >= logs["run_folder_bytes"] > logs["files_bytes"]["model.safetensors"]
    assert logs["dry_run_disk_while_running_bytes"] > logs["dry_run_disk_after_bytes"] > 4 * memory["parameters"] * 0.9
    assert logs["written_at_most_bytes"] <= logs["dry_run_disk_while_running_bytes"]
    # Not against the peak, which sampling misses: three checkpoints of weights and two moments, and the run's folder.
    largest = 3 * 12 * memory["parameters"] + logs["run_folder_bytes"]
    assert logs["dry_run_disk_while_running_bytes"] < 2 * largest
    assert logs["run_folder_bytes"] <= logs["dry_run_disk_after_bytes"] < 2 * logs["run_folder_bytes"]
    assert logs["data_cache_bytes"] <= logs["dry_run_data_cache_bytes"] < 2 * logs["data_cache_bytes"]
    assert limits.failures({"training": memory, "logs": logs}) == []


def test_slope_of_a_leak_is_found():
    leak = [(x / 100, 1000 * MIB + int(5 * MIB * x / 10)) for x in range(100)]
    found = long_run.slope(leak, 10)
    assert found["slope_bytes"] == pytest.approx(5 * MIB, rel=0.01)
    flat = [(x / 100, 1000 * MIB + 4096 * (x % 3)) for x in range(100)]
    found = long_run.slope(flat, 10)
    assert abs(found["slope_bytes"]) < 1000
    with pytest.raises(RuntimeError, match="too few"):
        long_run.slope(flat[:10], 10)


def test_evaluation_memory_is_flat():
    found = long_run.evaluation(rounds=30)
    assert found["batches"] > 200
    assert found["highest_bytes"] - found["first_bytes"] < 20 * MIB


def _measured() -> dict:
    """Figures that hold, as the script writes them."""
    made = {"peak_rss_bytes": 900 * MIB, "kills": [{"while": "rows", "killed": True, "token_shards_kept": 5}]}
    memory = {"first_bytes": 500 * MIB, "highest_bytes": 510 * MIB, "slope_bytes": 0.1 * MIB}
    logs = {"steps": 10_000, "metrics_csv_bytes": 26_000, "terminal_output_bytes": 4000, "written_at_most_bytes": 100,
            "dry_run_disk_while_running_bytes": 150, "run_folder_bytes": 10, "dry_run_disk_after_bytes": 20,
            "data_cache_bytes": 5, "dry_run_data_cache_bytes": 6}  # fmt: skip
    return {
        "data_preparation": {"killed": made, "never_killed": {**made, "kills": []}, "same_rows": True},
        "training": {"steps": 10_000, **memory},
        "evaluation": {"batches": 12_000, **memory},
        "logs": logs,
    }


@pytest.mark.parametrize(
    ("part", "key", "value", "said"),
    [
        ("data_preparation", "never_killed", {"peak_rss_bytes": 3 * 2**30}, "peak memory of the preparation"),
        ("data_preparation", "killed", {"peak_rss_bytes": 1, "kills": []}, "kills that hit"),
        ("data_preparation", "same_rows", False, "the same rows"),
        ("training", "slope_bytes", 2 * MIB, "training: slope"),
        ("training", "highest_bytes", 540 * MIB, "training: growth"),
        ("evaluation", "slope_bytes", 2 * MIB, "evaluation: slope"),
        ("logs", "metrics_csv_bytes", 2_000_000, "metrics.csv"),
        ("logs", "terminal_output_bytes", 2_000_000, "output on the terminal"),
        ("logs", "written_at_most_bytes", 151, "run: most disk while running"),
        ("logs", "run_folder_bytes", 21, "run: disk after"),
        ("logs", "dry_run_data_cache_bytes", None, "prepared data"),
    ],
)
def test_a_figure_over_its_limit_fails_the_script(part, key, value, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(long_run, "measure", lambda name, folder, args: {name: dict(measured[name])})
    measured = _measured()
    out = tmp_path / "long_run.json"
    out.write_text(json.dumps({"logs": measured["logs"]}), encoding="utf-8")
    assert long_run.main(["--out", str(out)]) == 0
    measured[part][key] = value
    out.write_text(json.dumps({"logs": measured["logs"]}), encoding="utf-8")
    assert long_run.main(["--out", str(out)]) == 1
    (failure,) = json.loads(out.read_text(encoding="utf-8"))["failures"]
    assert failure.startswith(said)
    assert failure in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_two_gigabytes_and_ten_thousand_steps(tmp_path):
    out = tmp_path / "long_run.json"
    subprocess.run([sys.executable, SCRIPTS / "long_run.py", "--out", out, "--work", tmp_path], check=True)
    result = json.loads(out.read_text(encoding="utf-8"))
    assert set(long_run.PARTS) <= set(result)
    assert result["failures"] == []
    assert result["logs"]["metrics_csv_lines"] < 1100
