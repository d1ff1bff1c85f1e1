#!/usr/bin/env python3
"""The records of experiments/faithful: what was compared with what, and the largest difference seen.

    python scripts/oracles.py run                   CPU oracles: runs their tests, writes experiments/faithful/oracles.json
    python scripts/oracles.py gather SEEN FILE      a record of what tests wrote with FLOWHN_SEEN=SEEN (on a GPU machine)
    python scripts/oracles.py cost                  what a decoded token costs at 135m: experiments/faithful/decode_cost.md
    python scripts/oracles.py readme                from these: experiments/faithful/table.md and the tables of README.md
    python scripts/oracles.py check                 only tell whether table.md and README.md are what the records give

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
COST = "decode_cost.md"
BEGIN = "<!-- {} begins: written by scripts/oracles.py from experiments/faithful -->"
END = "<!-- {} ends -->"
# Model -> the first words of its subjects and of its oracle in the record, and what the README says of that oracle.
MODELS = {
    "llama": ("llama", "transformers LlamaForCausalLM, random", "transformers' `LlamaForCausalLM`"),
    "mamba1": ("mamba1", "transformers MambaForCausalLM, random", "transformers' `MambaForCausalLM`"),
    "mamba2": ("mamba2", "transformers Mamba2ForCausalLM, random", "transformers' `Mamba2ForCausalLM`"),
    "jamba": ("jamba", "transformers JambaForCausalLM, random", "transformers' `JambaForCausalLM`, dense"),
    "shm": ("shm", "transformers JambaForCausalLM of", "transformers' `JambaForCausalLM` with period 2"),
    "hymba": ("hymba", "explicit loops", "loops over tokens, heads and states"),
    "flowhn_no": ("FlowHN No_Split", "the published", "the published code, mode A"),
    "flowhn_ae": ("FlowHN AE_Split", "the published", "its computation restated, mode B"),
    "flowhn_fa": ("FlowHN FA_Split", "the published", "the published code, mode C"),
    "flowhn_fac": ("FlowHN published mode D", "the published", "its computation restated, mode D"),
}
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
    if os.environ.get("COMMIT"):
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
    tests, before = [f"tests/{name}" for name in SUITES], environment()
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", *tests]
        code = subprocess.run(words, cwd=ROOT, env={**os.environ, "FLOWHN_SEEN": folder}).returncode
        record = {**gather(Path(folder), "python scripts/oracles.py run"), **before}
        write(record, FOLDER / "oracles.json")
    return code


def cost() -> int:
    from flowhn.generate import cost_table

    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / COST).write_text(cost_table(None, size="135m", window=None))
    return 0


def number(value: float | None) -> str:
    return "not finite" if value is None else "0" if value == 0 else f"{value:.1e}".replace("e-0", "e-")


def largest(record: dict[str, Any], subject: str, oracle: str, quantity: str) -> float | None:
    """Of all groups whose names begin with these words; -1 where there is none, None where one was not finite."""
    names = {"subject": subject, "oracle": oracle, "quantity": quantity}
    found = [c["largest"] for c in record["checks"] if all(c[key].startswith(word) for key, word in names.items())]
    return None if None in found else max(found, default=-1.0)


def models_table(record: dict[str, Any]) -> list[str]:
    lines = [
        "| model | compared with | logits | gradients | cached decoding | exported | accuracies, `hf` backend | bf16, of Llama's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell, (subject, oracle, words) in MODELS.items():
        cells = [largest(record, subject, oracle, "logits"), largest(record, subject, oracle, "gradients")]
        cells.append(largest(record, cell, "its own forward pass", "logits of cached"))
        cells.append(largest(record, cell, "its export", "logits"))
        cells.append(largest(record, cell, "lm-eval's hf backend", "accuracies"))
        share = largest(record, cell, "Llama's own difference", "logits")
        shown = ["" if value == -1 else number(value) for value in cells]
        lines.append(f"| `{cell}` | {words} | {' | '.join(shown)} | {share:.2f} |")
    return lines


def summary(record: dict[str, Any]) -> str:
    outcomes, device = record["tests"]["outcomes"], record["device"]
    told = ", ".join(f"{count} {name}" for name, count in sorted(outcomes.items()))
    versions = record["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions)
    commit = (record["git"]["commit"] or "unknown")[:7] + ("` with changes" if record["git"]["dirty"] else "`")
    return f"{device['name']}, {packages}, commit `{commit}; tests: {told}"


def kernels_table(record: dict[str, Any]) -> list[str]:
    """Subject and oracle on one line, its quantities side by side."""
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for check in record["checks"]:
        rows.setdefault((check["subject"], check["oracle"]), []).append(check)
    lines = ["| what | compared with | largest difference (allowed) | cases |", "|---|---|---|---|"]
    for (subject, oracle), checks in rows.items():
        told = ", ".join(
            f"{c['quantity']} {'**' if not c['passed'] else ''}{number(c['largest'])}{'**' if not c['passed'] else ''}"
            f" ({number(c['limit'])})" for c in checks
        )  # fmt: skip
        lines.append(f"| {subject} | {oracle} | {told} | {max(c['cases'] for c in checks)} |")
    return lines


def faithful_block() -> list[str]:
    record = json.loads((FOLDER / "oracles.json").read_text())
    lines = [*models_table(record), "", f"Made by `python scripts/oracles.py run` on {summary(record)}."]
    if (FOLDER / "gpu.json").is_file():
        gpu = json.loads((FOLDER / "gpu.json").read_text())
        failed = [check for check in gpu["checks"] if not check["passed"]]
        lines += [
            "",
            f"Kernels against plain paths, forward and gradients, on {summary(gpu)}: {len(gpu['checks'])} comparisons, {len(failed)} "
            "beyond their limit ([all of them](experiments/faithful/table.md)).",
        ]
    return lines


def decode_block() -> list[str]:
    lines = (FOLDER / COST).read_text().splitlines()
    wanted = ("| model", "|---", "| llama ", "| shm ", "| flowhn_no ", "| flowhn_fac ")
    return [lines[0], "", *(line for line in lines if line.startswith(wanted))]


def outputs() -> dict[Path, str]:
    """Path -> what it should hold."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, block in (("faithful", faithful_block()), ("decoding", decode_block())):
        head, rest = text.split(BEGIN.format(name))
        _, tail = rest.split(END.format(name))
        text = f"{head}{BEGIN.format(name)}\n" + "\n".join(block) + f"\n{END.format(name)}{tail}"
    table = ["# Every comparison: what with what, and the largest difference seen", ""]
    table += ["Written by `python scripts/oracles.py readme` from the records beside it."]
    for name in ("oracles.json", "gpu.json"):
        if (FOLDER / name).is_file():
            record = json.loads((FOLDER / name).read_text())
            table += ["", f"## {name}: {summary(record)}", "", *kernels_table(record)]
            rest = [f"- {t['outcome']}: `{t['test']}`: {t['reason']}" for t in record["tests"]["not_passed"]]
            table += ["", "Not passed:", "", *rest] if rest else []
    return {ROOT / "README.md": text, FOLDER / "table.md": "\n".join(table) + "\n"}


def readme(*, check: bool) -> int:
    stale = [path for path, text in outputs().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if check:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what the records give; run python scripts/oracles.py readme")
        return int(bool(stale))
    for path, text in outputs().items():
        path.write_text(text, encoding="utf-8")
    return 0


def main(words: list[str]) -> int:
    match words:
        case ["run"]:
            return run()
        case ["gather", folder, file]:
            write(gather(Path(folder), "scripts/device_session.sh tests"), Path(file))
            return 0
        case ["cost"]:
            return cost()
        case ["readme"] | ["check"]:
            return readme(check=words == ["check"])
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
