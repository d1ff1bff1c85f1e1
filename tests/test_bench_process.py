"""A cell's process: what comes back when it fails, hangs, or is one of many."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from flowhn import bench_process
from flowhn.bench_process import run_cell


def _gone(pid: int) -> bool:
    """Whether a process ends within ten seconds; one that nobody has asked for its code yet counts."""
    for _ in range(100):
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.1)
    return False


def _fails(spec, answer, log):
    Path(log).write_text("first line\nValueError: the last line\n", encoding="utf-8")
    raise SystemExit(1)


def _hangs(spec, answer, log):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(spec["pids"]).write_text(f"{os.getpid()} {child.pid}", encoding="utf-8")
    time.sleep(600)


def test_a_cell_that_breaks_gives_its_last_line():
    found = run_cell({"overrides": ["size=nonsense"], "precision": "auto", "compile": "auto"}, 120)
    assert found["status"] == "failed"
    assert "nonsense" in found["reason"]


def test_a_cell_that_hangs_is_killed_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_process, "_measure", _answers)
    run_cell({}, 60)  # the server has begun
    monkeypatch.setattr(bench_process, "_measure", _hangs)
    pids = tmp_path / "pids"
    found = run_cell({"pids": str(pids)}, 4)
    assert found["status"] == "timed out"
    assert "cell_timeout_s" in found["reason"]
    assert all(_gone(int(pid)) for pid in pids.read_text().split())


def test_a_process_that_ends_without_an_answer_is_a_finding(monkeypatch):
    monkeypatch.setattr(bench_process, "_measure", _fails)
    assert run_cell({}, 60) == {"status": "failed", "reason": "ValueError: the last line"}


def test_where_a_forked_process_cannot_use_the_device_a_fresh_one_is_asked(monkeypatch):
    asked, real = [], bench_process._context

    def context(method):
        asked.append(method)
        return real(method)

    monkeypatch.setattr(bench_process, "_context", context)
    monkeypatch.setattr(bench_process, "_measure", _refuses)
    found = run_cell({}, 60)
    assert asked == [bench_process.FORKED, bench_process.FRESH]
    assert found["status"] == "failed"


def _refuses(spec, answer, log):
    os._exit(bench_process._CANNOT_USE_DEVICE)


def _is_killed(spec, answer, log):
    Path(log).write_text("a warning of before\n", encoding="utf-8")
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_process_wrote_before_a_signal_is_told():
    assert bench_process._reason(-6, ["a", "CUDA error"]) == "killed by signal 6: CUDA error"
    assert bench_process._reason(-6, []) == "killed by signal 6"
    assert bench_process._reason(None, ["a", "b"]) == "b"


def test_a_killed_cell_says_so(monkeypatch):
    monkeypatch.setattr(bench_process, "_measure", _is_killed)
    found = run_cell({}, 60)
    assert found["status"] == "failed"
    assert "signal 9" in found["reason"]
    assert "batch=" in found["reason"]


def _answers(spec, answer, log):
    Path(answer).write_text('{"status": "done"}', encoding="utf-8")


def test_threads_that_start_processes_lose_no_answer(monkeypatch):
    monkeypatch.setattr(bench_process, "_measure", _answers)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: run_cell({}, 60)["status"], range(40)))
    assert found == ["done"] * 40


def _waits(spec, answer, log):
    Path(spec["pids"]).write_text(str(os.getpid()), encoding="utf-8")
    bench_process._end_with_parent()


@pytest.mark.slow  # .ci/run runs it
def test_a_cell_ends_when_its_benchmark_is_gone(tmp_path):
    """A plain kill of the benchmark alone: the cell must not keep the GPU, nor the caller's pipe open."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import test_bench_process as t\n"
        "from flowhn import bench_process\n"
        "bench_process._measure = t._waits\n"
        "if __name__ == '__main__':\n"
        "    bench_process.run_cell({'pids': sys.argv[2]}, 600)\n"
    )
    script, pids = tmp_path / "script.py", tmp_path / "pids"
    script.write_text(code, encoding="utf-8")
    words = [sys.executable, str(script), str(Path(__file__).parent), str(pids)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    until = time.monotonic() + 60
    while not (pids.is_file() and pids.read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    process.terminate()
    process.communicate(timeout=20)
    assert _gone(int(pids.read_text()))


@pytest.mark.gpu
def test_a_forked_cell_can_use_the_gpu():
    words = ["model=llama", "size=tiny", "seq_len=128", "global_batch_tokens=128"]
    spec = {
        "cell": "llama", "size": "tiny", "seq_len": 128, "protocol": "optimised", "peer": None, "batch": 2, "first_batch": 2,
        "overrides": words, "repeat": 0, "seed": 0, "windows": 1, "steps_per_window": 1, "warmup_steps": 1, "profile": False,
        "precision": "auto", "compile": False,
    }  # fmt: skip
    found = run_cell(spec, 200, method=bench_process.FORKED)
    assert found.get("status") == "done", found
    assert found["device"]["type"] == "cuda"
