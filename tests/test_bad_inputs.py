"""Broken input in numbers: each ends in one sentence and exit code 2 or goes on unharmed (see bad_inputs.py)."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys

import pytest

from bad_inputs import KINDS, Bad, draw, train_argv
from bad_inputs_campaign import _MODULES, call, campaign, fault_of, make_stage, records_below
from bad_inputs_places import MOUNTS, can_mount, on_a_mount

QUICK = 60
THOROUGH = 300


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return make_stage(tmp_path_factory.mktemp("bad").resolve() / "stage")


def throw_all(stage, seed: int, count: int, **options) -> None:
    faults = [
        f"{number} {bad.kind}: {bad.what}\n{outcome.fault}"
        for number, bad, _, outcome in campaign(stage, seed=seed, numbers=range(count), **options)
        if outcome.fault
    ]
    assert not faults, f"seed {seed} (scripts/bad_input.py --seed {seed} --only NUMBER)\n" + "\n\n".join(faults)


@pytest.mark.slow  # .ci/run runs it
def test_sixty_inputs(stage):
    throw_all(stage, int(os.environ.get("FLOWHN_BAD_INPUT_SEED", "7")), QUICK)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_three_hundred_inputs_of_a_new_seed(stage):
    throw_all(stage, secrets.randbelow(10**6), THOROUGH, processes=10)


def test_an_input_is_made_from_seed_and_number_alone(stage):
    for number in range(12):
        first, again = draw(stage, 5, number), draw(stage, 5, number)
        assert (first.kind, first.what, first.argv) == (again.kind, again.what, again.argv)
    assert sum(share for share, _ in KINDS.values()) <= THOROUGH // 2  # every kind is thrown at least twice


@pytest.mark.parametrize(
    ("code", "said", "word"),
    [
        (None, "", "traceback"),
        (2, "error: seed is wrong\nTraceback (most recent call last):", "traceback"),
        (1, "error: seed is wrong", "exit code 1"),
        (2, "", "0 sentences"),
        (2, "error: seed\nerror: seed", "2 sentences"),
        (2, "error: something is wrong", "names none"),
        (2, "error: seed " + "x" * 2000, "characters"),
        (0, "", "went on"),
    ],
)
def test_the_judge_sees_each_fault(code, said, word):
    assert word in fault_of(Bad("k", "w", "train", (), ("seed",)), code, said)


def test_the_judge_lets_a_good_refusal_and_an_unharmed_run_through():
    assert fault_of(Bad("k", "w", "train", (), ("seed",)), 2, "[1/1] run\nerror: seed=x must be whole\n") is None
    assert fault_of(Bad("k", "w", "train", (), ("seed",), must_refuse=False), 0, "") is None


def test_good_input_still_works(stage, tmp_path):
    assert call("train", train_argv(stage, tmp_path))[0] == 0
    assert len(records_below(tmp_path)) == 1


def test_what_is_told_of_common_mistakes(stage, tmp_path):
    def said(command: str, *argv: str) -> str:
        code, text, _ = call(command, argv)
        assert code == 2
        return text

    assert "data.packing does not exist with data=random" in said("train", "data=random", "data.packing=pad")
    (tmp_path / "a.txt").write_text("text " * 50, encoding="utf-16")
    path = f"data.path={tmp_path / 'a.txt'}"
    assert "is UTF-16, not UTF-8" in said("train", *train_argv(stage, tmp_path, "data=files", path))
    (tmp_path / "a.parquet.gz").write_bytes(b"x")
    path = f"data.path={tmp_path / 'a.parquet.gz'}"
    assert "unpack it" in said("train", *train_argv(stage, tmp_path, "data=files", path))
    assert "eval=none has no tasks" in said("eval", str(stage.text_run), "eval=none")
    assert not (stage.text_run / "eval-none.json").exists()


@pytest.mark.skipif(not can_mount(), reason="no tmpfs can be mounted in a user namespace here")
@pytest.mark.parametrize(
    "number", [0, *(pytest.param(number, marks=pytest.mark.slow) for number in range(1, len(MOUNTS)))]
)
def test_small_and_read_only_file_systems(stage, tmp_path, number):
    what, code, said = on_a_mount(stage, tmp_path, number)
    enough = "enough" in what
    assert fault_of(Bad("mounts", what, "train", (), (), not enough), code, said) is None
    assert (code == 0) == enough


@pytest.mark.slow
def test_two_processes_in_one_folder(stage, tmp_path):
    """One trains; the other waits for nothing, says why, or finds the finished record. There is one whole record."""
    argv = train_argv(stage, tmp_path, "budget=20000")
    words = [sys.executable, "-m", f"flowhn.{_MODULES.get('train', 'train')}", *argv]
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=200)[1] for process in both]
    codes = sorted(process.returncode for process in both)
    assert codes in ([0, 0], [0, 2]), said
    assert all("Traceback" not in text for text in said)
    assert codes == [0, 0] or any("another process works in" in text for text in said)
    assert len(records_below(tmp_path)) == 1
