"""Exit codes and messages of the command-line entries."""

from __future__ import annotations

import contextlib
import errno
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flowhn.cli import heed_interrupts, run_entry
from flowhn.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def code_of(body, argv=()) -> int:
    with pytest.raises(SystemExit) as raised:
        run_entry(body, list(argv))
    return raised.value.code


def fail_with(error: BaseException):
    def body(argv):
        raise error

    return body


def test_success_is_0_and_a_returned_code_is_kept():
    assert code_of(lambda argv: None) == 0
    assert code_of(lambda argv: 3) == 3


def test_bad_input_is_one_sentence_and_2(capsys):
    assert code_of(fail_with(UserError("seed=x must be a whole number"))) == 2
    assert capsys.readouterr().err == "error: seed=x must be a whole number\n"


def test_debug_lets_the_traceback_through():
    with pytest.raises(UserError):
        run_entry(fail_with(UserError("no")), ["debug=true"])


def test_a_full_disk_says_what_to_do(capsys):
    assert code_of(fail_with(OSError(errno.ENOSPC, "No space left on device", "/data/x"))) == 2
    said = capsys.readouterr().err
    assert "the disk is full" in said
    assert "/data/x" in said


def test_another_system_error_is_not_hidden():
    with pytest.raises(OSError, match="strange"):
        run_entry(fail_with(OSError(errno.EIO, "strange")), [])


def test_ctrl_c_is_130(capsys):
    assert code_of(fail_with(KeyboardInterrupt())) == 130
    assert "goes on from the last checkpoint" in capsys.readouterr().err


def test_a_reader_that_goes_away_leaves_no_traceback():
    code = (
        "from flowhn.cli import run_entry; run_entry(lambda argv: [print('x' * 100) for _ in range(10000)] and 0, [])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True
    )
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(30) == 141
    assert process.stderr.read() == ""


def test_an_interrupt_that_a_library_swallows_is_heeded_afterwards():
    before, after = signal.getsignal(signal.SIGINT), []

    def swallow() -> None:
        with contextlib.suppress(BaseException):  # what some libraries do while they are imported
            signal.raise_signal(signal.SIGINT)
        after.append("went on")

    with pytest.raises(KeyboardInterrupt), heed_interrupts():
        swallow()
    assert after == ["went on"]
    assert signal.getsignal(signal.SIGINT) is before
    with heed_interrupts():
        pass
