"""A cell's process: what comes back when it fails, hangs, or is one of many."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil

from flowhn import bench_process
from flowhn.bench_process import run_cell


def _fails(spec, answer, log):
    Path(log).write_text("first line\nValueError: the last line\n", encoding="utf-8")
    raise SystemExit(1)


def _hangs(spec, answer, log):
    import subprocess
    import sys

    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(spec["pids"]).write_text(f"{os.getpid()} {child.pid}", encoding="utf-8")
    time.sleep(600)


def test_a_cell_that_breaks_gives_its_last_line():
    found = run_cell({"overrides": ["size=nonsense"], "precision": "auto", "compile": "auto"}, 120)
    assert found["status"] == "failed"
    assert "nonsense" in found["reason"]


def test_a_cell_that_hangs_is_killed_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_process, "_measure", _hangs)
    pids = tmp_path / "pids"
    found = run_cell({"pids": str(pids)}, 20)
    assert found["status"] == "timed out"
    assert "cell_timeout_s" in found["reason"]
    time.sleep(0.5)
    left = [int(pid) for pid in pids.read_text().split() if psutil.pid_exists(int(pid))]
    assert not [pid for pid in left if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def test_a_process_that_ends_without_an_answer_is_a_finding(monkeypatch):
    monkeypatch.setattr(bench_process, "_measure", _fails)
    assert run_cell({}, 60) == {"status": "failed", "reason": "ValueError: the last line"}
