"""``flowhn-doctor`` and the kernel checks behind it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flowhn import doctor
from flowhn.benchmark import kernel_checks
from flowhn.benchmark.kernel_checks import MIXERS, check_kernel
from flowhn.models.mixers import Mamba1
from flowhn.training.hardware import Hardware


def findings(capsys, *words: str) -> tuple[int, dict[str, dict]]:
    code = doctor._main(["--json", "--no-hub", *words])
    return code, {finding["topic"]: finding for finding in json.loads(capsys.readouterr().out)}


def test_this_machine_can_run_the_main_job(capsys, tmp_path):
    code, found = findings(capsys, "--output-dir", str(tmp_path))
    assert code == 0
    assert {"Python", "packages", "torch", "device", "peak for MFU", "disk", "memory", "main job"} <= found.keys()
    assert {f"kernel of {mixer}" for mixer in MIXERS} <= found.keys()
    assert found["main job"]["state"] == "ok"
    assert f"one step on {'cuda' if torch.cuda.is_available() else 'cpu'}, precision " in found["main job"]["text"]
    if not torch.cuda.is_available():
        assert found["package mamba_ssm"]["state"] == "note"
        assert "flowhn[gpu]" in found["package mamba_ssm"]["mend"]


def test_a_full_disk_fails_the_main_job(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "NEEDED_BYTES", 10**18)
    code, found = findings(capsys, "--output-dir", str(tmp_path))
    assert code == 1
    assert found["disk"]["state"] == "fail"
    assert "output_dir=" in found["disk"]["mend"]


def test_too_little_memory_fails_the_main_job(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "_NEEDED_MEMORY", 10**18)
    code, found = findings(capsys)
    assert code == 1
    assert found["memory"]["state"] == "fail"
    assert found["memory"]["mend"]


def test_the_main_job_is_tried_on_the_device_that_it_takes(monkeypatch):
    """A device that stands for a broken GPU: nothing comes back from it."""
    broken = Hardware(torch.device("meta"), 1, "32-true", False)
    monkeypatch.setattr("flowhn.training.resolve_hardware", lambda config: broken)
    (finding,) = [finding for finding in doctor.examine(Path(), ask_hub=False) if finding.topic == "training"]
    assert finding.state == "fail"
    assert "meta" in finding.text


def test_a_missing_package_fails_and_says_how_to_install(capsys, monkeypatch):
    real = doctor.metadata.version

    def version(name):
        if name == "lm-eval":
            raise doctor.metadata.PackageNotFoundError(name)
        return "1.0" if name == "lightning" else real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    code, found = findings(capsys)
    assert code == 1
    assert "lm-eval is missing" in found["packages"]["text"]
    assert "lightning 1.0" in found["packages"]["text"]
    assert found["packages"]["mend"]


def test_a_check_that_breaks_is_a_finding_and_the_rest_goes_on(capsys, monkeypatch):
    def _device():
        raise RuntimeError("driver too old")
        yield

    monkeypatch.setattr(doctor, "_device", _device)
    code, found = findings(capsys)
    assert code == 1
    assert "driver too old" in found["device"]["text"]
    assert found["main job"]["state"] == "ok"


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_plain_kernels_are_right(mixer):
    check = check_kernel(mixer, "auto", "cpu")
    assert check.correct, check
    assert check.tokens_per_second > 0


def test_a_wrong_kernel_is_caught(monkeypatch, capsys):
    class Wrong(Mamba1):
        def forward(self, x):
            return 1.1 * super().forward(x) if self.backend == "auto" else super().forward(x)

    monkeypatch.setitem(
        kernel_checks._MIXERS, "mamba1", lambda backend: Wrong(d_model=64, bcdt_rms_norm=True, backend=backend)
    )
    assert not check_kernel("mamba1", "auto", "cpu").correct
    code, found = findings(capsys)
    assert code == 1
    assert "wrong here" in found["kernel of mamba1"]["text"]


def test_a_kernel_that_does_not_run_is_a_result():
    check = check_kernel("mamba1", "mamba_ssm", "cpu")
    assert not check.correct
    assert "mamba_ssm" in check.error


def test_the_screen_names_what_fails(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "NEEDED_BYTES", 10**18)
    assert doctor._main(["--no-hub", "--output-dir", str(tmp_path)]) == 1
    assert "the main job cannot run here: disk" in capsys.readouterr().out
