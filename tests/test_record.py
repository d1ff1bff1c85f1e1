"""Run records: written whole or not at all, read back equal, and refused when anything about them is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from flowhn.errors import UserError
from flowhn.reporting import record as module
from flowhn.reporting.record import (
    SCHEMA_VERSION,
    RunRecord,
    config_hash,
    environment,
    find_records,
    read_record,
    write_record,
)


def make_record(**changes) -> RunRecord:
    record = RunRecord(
        run_id="0123456789ab", artefact="table1", cell="flowhn_fac", model="flowhn", size="tiny", seed=0, status="done",
        created="2026-11-24T04:00:00+00:00", config={"seed": 0}, git={"commit": None, "dirty": None}, versions={},
        device={"type": "cpu", "name": "a processor", "count": 2, "cpu": "a processor", "memory_bytes": 1},
        kernels={"ssm": "torch", "attention": "sdpa"}, parameters=700_000, tokens=160_000, steps=78, seq_len=128,
        global_batch_tokens=2048, data={"name": "docs", "sha256": "00"},
        losses={"train": [[2048, 7.5]], "val": [[2048, 7.4, 1.5]], "final_val": 7.4, "unigram_entropy": 6.3},
        throughput={"tps": 7000.0, "mfu": 0.1, "flops_per_token": 2.4e6, "peak_source": "measured matmul"},
        memory={"peak_bytes": 1, "kind": "rss"}, evaluation={"suite": "docs", "tasks": {}},
        wall_seconds={"train": 1.0, "eval": 1.0, "total": 2.0}, resumed=0,
    )  # fmt: skip
    return replace(record, **changes)


def rewrite(path: Path, change, *, resign: bool) -> None:
    """Edit a record by hand; with ``resign`` also mend its hash, as somebody who means to would."""
    content = json.loads(path.read_text())
    change(content)
    if resign:
        content.pop("sha256")
        content["sha256"] = module._digest(content)
    path.write_text(json.dumps(content))


def test_a_record_comes_back_equal(tmp_path):
    write_record(tmp_path / "runs" / "a" / "record.json", make_record())
    assert read_record(tmp_path / "runs" / "a" / "record.json") == make_record()


def test_what_json_cannot_hold_becomes_null_or_plain_and_still_reads(tmp_path):
    throughput = {
        "tps": np.float32(1.5),
        "mfu": float("nan"),
        "flops_per_token": float("inf"),
        "n": np.int64(3),
        4: (1, 2),
    }
    write_record(tmp_path / "record.json", make_record(throughput=throughput))
    text = (tmp_path / "record.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    expected = {"tps": 1.5, "mfu": None, "flops_per_token": None, "n": 3, "4": [1, 2]}
    assert read_record(tmp_path / "record.json").throughput == expected


def test_a_killed_write_leaves_the_old_record(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    write_record(path, make_record())

    def killed(source, target):
        assert read_record(Path(source)).seed == 1  # complete before it gets the name
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_record(path, make_record(seed=1))
    assert read_record(path) == make_record()
    assert [item.name for item in tmp_path.iterdir()] == ["record.json"]


def test_a_record_that_could_not_be_read_is_not_written(tmp_path):
    with pytest.raises(UserError, match="parameters must be a whole number"):
        write_record(tmp_path / "record.json", make_record(parameters=1.5))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_half_written_is_refused(tmp_path, share):
    path = tmp_path / "record.json"
    write_record(path, make_record())
    text = path.read_text()
    path.write_text(text[: int(share * len(text)) - 2 if share else 0])
    with pytest.raises(UserError, match=re.escape(str(path))):
        read_record(path)


def test_an_edited_number_is_noticed(tmp_path):
    path = tmp_path / "record.json"
    write_record(path, make_record())
    rewrite(path, lambda content: content["losses"].update(final_val=1.0), resign=False)
    with pytest.raises(UserError, match="edited after it was written"):
        read_record(path)
    rewrite(path, lambda content: content.pop("sha256"), resign=False)
    with pytest.raises(UserError, match="edited after it was written"):
        read_record(path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda c: c.update(seed="0"), "seed must be a whole number"),
        (lambda c: c.update(seed=True), "seed must be a whole number"),
        (lambda c: c.update(cell=None), "cell must be a text"),
        (lambda c: c.update(device=[]), "device must be an object"),
        (lambda c: c.pop("kernels"), "lacks kernels"),
        (lambda c: c["losses"].pop("val"), "lacks losses.val"),
        (lambda c: c["losses"].update(val=[[1, 2]]), r"losses.val must be a list of \[tokens, loss, seconds\]"),
        (lambda c: c["throughput"].update(tps="fast"), "throughput.tps must be a number or null"),
        (lambda c: c["evaluation"].update(tasks={"piqa": 0.5}), "evaluation.tasks.piqa must be an object"),
        (lambda c: c["evaluation"].update(tasks={"piqa": {"acc": "50"}}), "evaluation.tasks.piqa.acc must be a number"),
        (lambda c: c.update(schema_version=SCHEMA_VERSION + 1), f"schema_version {SCHEMA_VERSION + 1}"),
        (lambda c: c.update(schema_version="1"), "schema_version '1'"),
    ],
)
def test_wrong_types_are_refused_by_name_even_with_a_mended_hash(tmp_path, change, told):
    path = tmp_path / "record.json"
    write_record(path, make_record())
    rewrite(path, change, resign=True)
    with pytest.raises(UserError, match=told) as caught:
        read_record(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", '{"schema_version": 1, "seed": NaN}', "\x00\xff", "[" * 100_000]
)
def test_anything_else_is_refused(tmp_path, text):
    (tmp_path / "record.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError):
        read_record(tmp_path / "record.json")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no record"):
        read_record(tmp_path / "record.json")


def test_find_records_is_sorted_and_knows_both_places(tmp_path):
    write_record(tmp_path / "runs" / "b" / "record.json", make_record(seed=2))
    write_record(tmp_path / "runs" / "a" / "record.json", make_record(seed=1))
    write_record(tmp_path / "table1" / "records" / "x.json", make_record(seed=3))
    (tmp_path / "runs" / "a" / "config.json").write_text("{}")
    assert [record.seed for record in find_records(tmp_path)] == [1, 2, 3]
    assert find_records(tmp_path / "none") == []
    (tmp_path / "runs" / "b" / "record.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        find_records(tmp_path)
    assert [record.seed for record in find_records(tmp_path, skip_broken=True)] == [1, 3]


def test_config_hash_ignores_key_order_alone():
    assert config_hash({"a": 1, "b": [1, 2]}) == config_hash({"b": [1, 2], "a": 1})
    assert len({config_hash({"a": 1}), config_hash({"a": "1"}), config_hash({"a": [1]}), config_hash({"b": 1})}) == 4
    assert re.fullmatch("[0-9a-f]{12}", config_hash({}))


def test_environment_has_versions_and_no_secrets(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-word")
    found = environment()
    assert found["versions"]["torch"]
    assert found["versions"]["python"]
    assert "a-secret-word" not in json.dumps(found)


def test_no_git_program_means_null(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment()["git"] == {"commit": None, "dirty": None}


def test_git_of_the_own_checkout_only(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True, capture_output=True
        )

    own = tmp_path / "src" / "flowhn" / "reporting" / "record.py"
    installed = tmp_path / ".venv" / "lib" / "python3.11" / "site-packages" / "flowhn" / "reporting" / "record.py"
    for path in (own, installed):
        path.parent.mkdir(parents=True)
        path.write_text("a")
    git("init", "-q")
    git("add", "src")
    git("commit", "-qm", "a")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))  # as set inside a hook
    monkeypatch.setattr(module, "__file__", str(own))
    assert re.fullmatch("[0-9a-f]{40}", environment()["git"]["commit"])
    assert environment()["git"]["dirty"] is False
    own.write_text("b")
    assert environment()["git"]["dirty"] is True
    monkeypatch.setattr(module, "__file__", str(installed))
    assert environment()["git"] == {"commit": None, "dirty": None}


def test_schema_fields_are_those_of_the_file(tmp_path):
    write_record(tmp_path / "record.json", make_record())
    assert set(json.loads((tmp_path / "record.json").read_text())) == {*asdict(make_record()), "sha256"}
