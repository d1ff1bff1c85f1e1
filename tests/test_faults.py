"""Kills at random moments lose nothing; deterministic=true gives the same bits; docs/reliability.md is its files' page."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowhn.config import compose
from flowhn.errors import UserError
from flowhn.experiment import Workshop
from flowhn.runs import plan
from flowhn.training.interrupts import StopRequest

ROOT = Path(__file__).resolve().parents[1]
TINY = ["model=flowhn", "data=random", "eval=none", "budget=2048", "val_points=2", "val_rows=4", "logger=none",
        "size.n_layers.flowhn=1", "trainer.throughput.peak_flops=1e11"]  # fmt: skip


def campaign(folder: Path, *words: str) -> dict:
    out = folder / "result.json"
    command = [
        sys.executable,
        ROOT / "scripts" / "fault_injection.py",
        "--out",
        out,
        "--folder",
        folder / "work",
        *words,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
    print(done.stdout)  # the seed, for replay
    assert out.is_file(), done.stderr[-3000:]
    result = json.loads(out.read_text())
    assert result["differences"] == []
    assert done.returncode == 0
    return result


@pytest.mark.slow  # .ci/run runs it
def test_five_kills_lose_nothing(tmp_path):
    result = campaign(tmp_path, "--kills", "5", "--warm")
    assert result["kills"] == len(result["list"]) == 5
    assert result["batch_losses_compared"] == 48 * result["sweeps"]  # three runs of 16 steps


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thirty_kills_lose_nothing(tmp_path):
    result = campaign(tmp_path, "--kills", "30")
    assert result["kills"] == 30
    assert set(result["by_signal"]) == {"SIGKILL", "SIGTERM", "SIGINT"}
    assert len(result["by_phase"]) >= 5


@pytest.mark.parametrize("damage", ["weights", "batch losses", "evaluation", "record"])
def test_a_difference_is_found(damage, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import fault_injection

    def sweep() -> dict:
        return {"llama": {"batch losses": [[512, 7.0]], "validation losses": [], "evaluation": {}, "weights": "a",
                          "resumed": 0}}  # fmt: skip

    found = sweep()
    found["llama"]["resumed"] = 3  # is not a difference
    assert fault_injection.differences(sweep(), found, "s") == []
    if damage == "record":
        del found["llama"]
    else:
        found["llama"][damage] = "other"
    (said,) = fault_injection.differences(sweep(), found, "s")
    assert damage in said


def test_the_plan_of_a_campaign_is_its_seeds(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import fault_injection

    def drawn(seed: int) -> list:
        return fault_injection.Campaign(tmp_path, kills=30, seed=seed, warm=False, cold=0).plan

    assert drawn(3) == drawn(3) != drawn(4)
    assert {aim["aimed_at"] for aim in drawn(3)} == set(fault_injection.PHASES)


@pytest.mark.parametrize(("signum", "expected"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_after_the_last_look_is_not_lost(signum, expected):
    def body(error: Exception | None) -> None:
        with StopRequest() as stop:
            stop.defers = True
            os.kill(os.getpid(), signum)
            assert stop.requested
            if error is not None:
                raise error

    with pytest.raises(expected):
        body(None)
    with pytest.raises(ValueError, match="its own"):  # what the body raised stays what it is
        body(ValueError("its own"))


def train(folder: Path, *words: str):
    run = plan(compose("train", [*TINY, f"output_dir={folder}/out", f"cache_dir={folder.parent}/cache", *words]))
    record = Workshop().run(run, lambda progress: None, lambda text: None)
    return run, record, hashlib.sha256((run.folder / "model.safetensors").read_bytes()).hexdigest()


def test_deterministic_gives_the_same_bits_twice(tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        first, second = (train(tmp_path / name, "deterministic=true") for name in ("a", "b"))
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert first[2] == second[2]
        assert first[1].losses["train"] == second[1].losses["train"]
        assert len(first[1].losses["train"]) == 4
        train(tmp_path / "c")
        assert not torch.are_deterministic_algorithms_enabled()  # the next run in this process did not ask
    finally:
        torch.use_deterministic_algorithms(False)
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def test_deterministic_is_part_of_a_runs_identity():
    def run_id(*words: str) -> str:
        return plan(compose("train", [*TINY, *words])).run_id

    assert run_id() == run_id("deterministic=false")
    assert run_id("deterministic=true") == run_id("trainer.deterministic=true") != run_id()
    with pytest.raises(UserError, match=r"^deterministic='abc' must be true or false"):
        compose("train", ["deterministic=abc"])


@pytest.mark.parametrize("text", ["cumsum_cuda_kernel does not have a deterministic implementation, but", "another"])
def test_an_operation_without_a_deterministic_form_is_one_sentence(tmp_path, monkeypatch, text):
    def fails(*args):
        raise RuntimeError(text)

    monkeypatch.setattr("flowhn.run_training.fit_run", fails)
    kind, sentence = (
        (RuntimeError, "^another$") if text == "another" else (UserError, "cumsum_cuda_kernel has no determ")
    )
    with pytest.raises(kind, match=sentence):
        train(tmp_path / "a")


def test_the_reliability_page_is_what_its_files_give():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "reliability.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_names_what_is_missing_and_what_failed(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import reliability

    counts = {"yaml": {"tried": 3, "refused": 2, "unharmed": 0}}
    (tmp_path / "bad_input.json").write_text(
        json.dumps({"inputs": 3, "by_kind": counts, "failures": ["a traceback | here"]})
    )
    text = reliability.page(tmp_path)
    assert "- a traceback \\| here" in text
    assert "| yaml | 3 | 2 | 0 |" in text
    for name in ("faults", "processes", "long_run"):
        assert f"Missing: `{name}.json`" in text
