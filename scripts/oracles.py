#!/usr/bin/env python3
"""The records of experiments/faithful: what was compared with what, and the largest difference seen.

    python scripts/oracles.py run                   CPU oracles: runs their tests, writes experiments/faithful/oracles.json
    python scripts/oracles.py gather SEEN FILE      a record of what tests wrote with FLOWHN_SEEN=SEEN (on a GPU machine)
    python scripts/oracles.py readme                writes the tables of README.md's section "How faithful"

``run`` takes the published code's cases from FLOWHN_PUBLISHED_CASES. COMMIT=... names the code where there is no .git.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from flowhn.benchmark import describe_device
from flowhn.reporting.record import environment

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "experiments" / "faithful"
BEGIN = "<!-- faithful begins: written by scripts/oracles.py from experiments/faithful -->"
END = "<!-- faithful ends -->"
SUITES = (
    "test_scan.py", "test_oracle_published.py", "test_oracle_hymba.py", "test_oracle_bfloat16.py", "test_generation.py",
    "test_evaluation_hflm.py", "test_oracle_transformers.py", "test_export.py",
)  # fmt: skip


def gather(folder: Path, command: str) -> dict[str, Any]:
    """One record of all lines under ``folder``: checks grouped by what was compared, tests by outcome."""
    lines = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]
    if not lines:
        raise SystemExit(f"{folder} holds no comparison; run the tests with FLOWHN_SEEN={folder}")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for line in lines:
        if line["kind"] == "check":
            key = tuple(line[name] for name in ("subject", "oracle", "quantity", "limit"))
            groups.setdefault(key, []).append(line)
    tests = [line for line in lines if line["kind"] == "test"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = {
        "schema": 1,
        "command": command,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment(),
        "device": describe_device(device),
        "checks": [_group(key, found) for key, found in sorted(groups.items())],
        "tests": {
            "outcomes": dict(Counter(line["outcome"] for line in tests)),
            "seconds": round(sum(line["seconds"] for line in tests), 1),
            "not_passed": [line for line in tests if line["outcome"] != "passed"],
        },
    }
    if record["git"]["commit"] is None and os.environ.get("COMMIT"):
        record["git"] = {"commit": os.environ["COMMIT"], "dirty": None}
    return record


def _group(key: tuple[Any, ...], found: list[dict[str, Any]]) -> dict[str, Any]:
    """The largest difference of a group; null where one was not finite."""
    differences = [line["difference"] for line in found]
    largest = None if None in differences else float(f"{max(differences):.3g}")
    fields = dict(zip(("subject", "oracle", "quantity", "limit"), key, strict=True))
    passed = all(line["passed"] for line in found)
    return {
        **fields,
        "cases": len(found),
        "largest": largest,
        "passed": passed,
        "tests": sorted({f["test"] for f in found}),
    }


def write(record: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    failed = [check for check in record["checks"] if not check["passed"]]
    print(
        f"{path}: {len(record['checks'])} comparisons, {len(failed)} beyond their limit; tests {record['tests']['outcomes']}"
    )
    for check in failed:
        print(
            f"  {check['subject']} against {check['oracle']}, {check['quantity']}: {check['largest']} > {check['limit']}"
        )


def run() -> int:
    """Every oracle test, the slow ones too; the record is written whatever fails."""
    tests = [f"tests/{name}" for name in SUITES]
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", *tests]
        code = subprocess.run(words, cwd=ROOT, env={**os.environ, "FLOWHN_SEEN": folder}).returncode
        write(gather(Path(folder), "python scripts/oracles.py run"), FOLDER / "oracles.json")
    return code


def main(words: list[str]) -> int:
    match words:
        case ["run"]:
            return run()
        case ["gather", folder, file]:
            write(gather(Path(folder), "scripts/device_session.sh tests"), Path(file))
            return 0
        case ["readme"]:
            raise SystemExit("not yet")
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
