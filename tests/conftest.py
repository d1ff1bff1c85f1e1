"""``compare``: assert that a difference is within its limit and, where asked, write down what was seen.

With ``FLOWHN_SEEN=FOLDER`` every comparison and every test's outcome becomes a line of ``FOLDER/<process>.jsonl``;
``scripts/oracles.py`` makes the records in ``experiments/faithful`` of them. A comparison that fails is written too.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def _write(line: dict[str, object]) -> None:
    if folder := os.environ.get("FLOWHN_SEEN"):
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        with (path / f"{os.getpid()}.jsonl").open("a") as lines:
            lines.write(json.dumps(line) + "\n")


@pytest.fixture
def compare(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``compare(subject, oracle, quantity, difference, limit)``: what was compared with what, in which quantity."""

    def check(subject: str, oracle: str, quantity: str, difference: float, limit: float) -> None:
        difference = float(difference)
        passed = difference <= limit  # False for NaN
        seen = {"subject": subject, "oracle": oracle, "quantity": quantity, "limit": limit, "passed": passed}
        value = difference if math.isfinite(difference) else None
        test = request.node.nodeid.partition("[")[0]
        _write({"kind": "check", "test": test, "difference": value, **seen})
        assert passed, f"{subject} against {oracle}: {quantity} differ by {difference:.2e}, more than {limit:.0e}"

    return check


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """One line for each test: its call, or the phase that kept it from being called."""
    if report.when == "call" or report.outcome != "passed":
        reason = ""
        if report.skipped and isinstance(report.longrepr, tuple):
            reason = report.longrepr[2]
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = (crash.message if crash else str(report.longrepr)).strip().splitlines()[0][:300]
        outcome = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        _write({"kind": "test", **outcome, "reason": reason})
