"""docs/reliability.md: kills survived, inputs tried, processes compared, memory of long runs; one command for all of it.

    python scripts/reliability.py                        measure everything (an hour), then write the page
    python scripts/reliability.py --only faults          measure one part again
    python scripts/reliability.py --reuse DIR            take the parts' JSON files from DIR and write the page
    python scripts/reliability.py --reuse docs/reliability --check     is the page what its files give?

Each part is a script that writes one JSON file; the files lie in docs/reliability/ and hold all that the page says.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import long_run_limits

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "reliability"
PAGE = ROOT / "docs" / "reliability.md"
# Part -> its script with its arguments; "--out FILE" is added.
PARTS: dict[str, tuple[str, ...]] = {
    "faults": ("fault_injection.py", "--kills", "30", "--seed", "20261124"),
    "bad_input": ("bad_input.py", "--count", "300", "--seed", "20261124"),
    "processes": ("compare_processes.py",),
    "long_run": ("long_run.py",),
}
HEAD = """# Reliability, in numbers

Written by `python scripts/reliability.py` from the files in `docs/reliability/`; change those by measuring again, never
this page.
"""


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; numbers are right-aligned by the first row."""
    first = rows[0] if rows else head
    marks = ["---:" if isinstance(cell, int | float) and not isinstance(cell, bool) else "---" for cell in first]
    lines = [head, marks, *([shown(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def shown(value: Any) -> str:
    """A figure for a reader."""
    if value is None:
        return "not measured"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {shown(item)}" for name, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(shown(item) for item in value) or "none"
    return str(value).replace("|", "\\|")


def failures(found: Sequence[Any], none: str) -> str:
    """The list of what went wrong, or a sentence that nothing did."""
    return none + "\n" if not found else "".join(f"- {shown(item)}\n" for item in found)


STATIONS = {
    "start": "starting, imports",
    "between": "between runs, or ending",
    "run": "between a run's stations",
    "data": "data preparation",
    "training": "training, at a step",
    "checkpoint": "writing a checkpoint",
    "weights": "writing the weights",
    "record": "writing the record",
    "table": "drawing the table",
}


def faults(result: Mapping[str, Any]) -> str:
    names, kills = ("SIGKILL", "SIGTERM", "SIGINT"), result["list"]
    hits = [
        [STATIONS.get(phase, phase), *(sum(k["hit"] == phase and k["signal"] == name for k in kills) for name in names)]
        for phase in result["by_phase"]
    ]
    codes = {name: sorted({kill["code"] for kill in kills if kill["signal"] == name}) for name in names}
    saved, terms = sum("saved_step" in kill for kill in kills), result["by_signal"].get("SIGTERM", 0)
    return (
        f"{result['kills']} kills at random moments, {result['fresh_processes']} of them of freshly started processes "
        f"(seed {result['seed']}, torch {result['torch']}): {result['sweeps']} sweeps of three runs, {result['restarts']} "
        f"restarts, {result['seconds']:,.0f} s. Compared with a sweep that was left alone: "
        f"{result['batch_losses_compared']} batch losses, the validation losses, the evaluation and the SHA-256 of the "
        "final weights, bit for bit; and `resumed` of the records with the continuations that were seen.\n\n"
        + table(["the process was", *names], hits)
        + f"\nSIGTERM ended the process within {shown(result['sigterm_seconds_longest'])} s (30 allowed). {saved} of {terms} "
        "came in training after a finished step: each wrote a checkpoint of the last finished step and exited with 143. "
        "Elsewhere nothing waits to be saved and the signal itself ends the process, which a shell reports as 143 too.\n"
        "\nExit codes (negative: ended by that signal; 0: the sweep was already done): "
        + "; ".join(f"{name} {shown(found)}" for name, found in codes.items())
        + f". SIGINT that Python itself dropped (inside a destructor): {sum(kill.get('dropped', False) for kill in kills)}.\n\n"
        + failures(result["differences"], "Differences: none.")
    )


def bad_input(result: Mapping[str, Any]) -> str:
    kinds = [
        [kind, counts["tried"], counts["refused"], counts["unharmed"]] for kind, counts in result["by_kind"].items()
    ]
    return (
        f"{shown(result['inputs'])} broken inputs. Refused: one sentence and exit code 2. Unharmed: went on with a right "
        "result.\n\n"
        + table(["kind", "tried", "refused", "unharmed"], kinds)
        + "\n"
        + (
            "On file systems of their own (tmpfs mounted in a user namespace):\n\n"
            + table(
                ["what", "exit code", "said"], [[m["what"], m["code"], m["said"] or "done"] for m in result["mounts"]]
            )
            + "\n"
            if result.get("mounts")
            else ""
        )
        + failures(result["failures"], "Failures (a traceback, a hang, a wrong table, a lost record): none.")
        + rest(result, "inputs", "by_kind", "failures", "mounts")
    )


def processes(result: Mapping[str, Any]) -> str:
    parts = {
        "rows": (
            "The same run on one process and on several, batch loss by batch loss; global batch, data and seed are the same.",
            {"model": "model", "strategy": "strategy", "processes": "processes", "batch_losses": "batch losses",
             "max_loss_difference": "largest difference", "max_weight_difference": "of a final weight"},
        ),
        "resume": (
            "Stopped by SIGTERM on some processes and gone on with on others, in double precision, against a run that was "
            "never stopped. `flowhn-convert checkpoint` made one safetensors file of each checkpoint.",
            {"stations": "ran by", "stopped": "exit codes", "resumed": "resumed", "max_loss_difference": "largest difference",
             "max_weight_difference": "of a final weight"},
        ),
        "lost": (
            "One process killed (SIGKILL) in training: how soon the job ends; then the same command again, to its end.",
            {"strategy": "strategy", "processes": "processes", "killed": "killed", "code": "exit code",
             "seconds_to_end": "seconds to the end", "left_over": "left running", "max_loss_difference": "largest difference"},
        ),
        "launch": (
            "Started in other ways, two processes each.",
            {"launcher": "started by", "strategy": "strategy", "codes": "exit codes",
             "max_loss_difference": "largest difference"},
        ),
    }  # fmt: skip
    text = ""
    for part, (sentence, columns) in parts.items():
        rows = [[_cell(row.get(key)) for key in columns] for row in result.get(part, [])]
        text += f"{sentence}\n\n" + (table(list(columns.values()), rows) if rows else "Not measured.\n") + "\n"
    ends = {row["said"] for row in result.get("lost", []) if row.get("said")}
    if ends:
        text += f"What such a job says, for example: `{shown(sorted(ends)[0])}`\n\n"
    rows = result.get("rows", [])
    worst = max((row["max_loss_difference"] for row in rows), default=None)
    counted = f"{len(rows)} comparisons; largest difference of a loss {shown(worst)} ({result.get('limit', 1e-5):g} allowed).\n\n"
    return text + counted + failures(result.get("failures", []), "Failures: none.") + rest(
        result, *parts, "failures", "limit"
    )  # fmt: skip


def _cell(value: Any) -> Any:
    """A cell of the tables above: what a list of stops ended with, stations in their order."""
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return ", ".join(str(stop["code"]) for stop in value)
    return ", then ".join(value) if isinstance(value, list) and value and isinstance(value[0], str) else value


def long_run(result: Mapping[str, Any]) -> str:
    limits = [
        [what, long_run_limits.number(measured), limit, holds]
        for what, measured, limit, holds in long_run_limits.checks(result)
    ]
    text = "Memory is that of a process with its children, mapped files included.\n\n"
    text += table(["figure", "measured", "limit", "holds"], limits) + "\n"
    for part, figures in result.items():
        if part == "data_preparation":
            text += _preparation(figures)
        elif isinstance(figures, Mapping) and part not in ("commit", "versions", "machine"):
            rows = [
                [name.removesuffix("_bytes").replace("_", " "), _figure(name, value)]
                for name, value in figures.items()
                if not _is_long(value)
            ]
            text += table([part.replace("_", " "), "measured"], rows) + "\n"
    text += failures(long_run_limits.failures(result), "Failures (a figure over its limit): none.")
    used = [part for part, figures in result.items() if isinstance(figures, Mapping)]
    return text + rest(result, "failures", *(part for part in used if part not in ("commit", "versions", "machine")))


def _preparation(part: Mapping[str, Any]) -> str:
    about = (
        f"Data preparation: {long_run_limits.size(part['corpus_bytes'])} of text in {part['corpus_files']} files (seed "
        f"{part['seed']}), vocabulary {part['vocab_size']:,}, rows of {part['seq_len']:,} tokens."
    )
    text = f"{about}\n\n" + table(*long_run_limits.preparation_table(part)) + "\n"
    loads = part.get("load_average_before_and_after")
    if loads:
        text += f"Load average before and after: {shown(loads)} (other work on the machine slows it).\n\n"
    return text + table(*long_run_limits.kill_rows(part)) + "\n"


def _figure(name: str, value: Any) -> str:
    """Bytes with their unit; anything else as everywhere."""
    if name.endswith("_bytes") and isinstance(value, int | float):
        return long_run_limits.size(value)
    if isinstance(value, Mapping) and name.endswith("_bytes"):
        return ", ".join(f"{key} {long_run_limits.size(item)}" for key, item in value.items())
    return shown(value)


def _is_long(value: Any) -> bool:
    """A series is for the file, not for the page."""
    return isinstance(value, list) and len(value) > 8


def rest(result: Mapping[str, Any], *used: str) -> str:
    """What else a file says, in one line."""
    more = [f"{key.replace('_', ' ')}: {shown(value)}" for key, value in result.items() if key not in used
            and not _is_long(value)]  # fmt: skip
    return f"\n{'; '.join(more)}.\n" if more else ""


SECTIONS: dict[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = {
    "faults": ("Killed and started again", faults),
    "bad_input": ("Bad input", bad_input),
    "processes": ("More than one process", processes),
    "long_run": ("Long runs", long_run),
}


def page(folder: Path) -> str:
    """The whole page from the JSON files of a folder; a part without its file is said to be missing."""
    text = HEAD
    for part, (title, section) in SECTIONS.items():
        path = folder / f"{part}.json"
        text += f"\n## {title}\n\n"
        if path.is_file():
            text += section(json.loads(path.read_text(encoding="utf-8")))
        else:
            text += f"Missing: `{part}.json`, which `scripts/{PARTS[part][0]}` writes.\n"
    return text


def measure(part: str) -> bool:
    """Run one part's script; its file is replaced only when there is a new one."""
    script, *arguments = PARTS[part]
    if not (ROOT / "scripts" / script).is_file():
        sys.stderr.write(f"error: {part} cannot be measured: there is no scripts/{script}\n")
        return False
    out = FOLDER / f".{part}.new"
    done = subprocess.run([sys.executable, ROOT / "scripts" / script, *arguments, "--out", out], cwd=ROOT)
    if out.is_file():
        out.replace(FOLDER / f"{part}.json")
    if done.returncode:
        sys.stderr.write(f"error: scripts/{script} ended with code {done.returncode}\n")
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reuse", type=Path, metavar="DIR", help="measure nothing; the parts' files lie in DIR")
    parser.add_argument("--only", choices=PARTS, action="append", help="measure this part; the others stay as they are")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when the page is another")
    args = parser.parse_args()
    if args.check:
        same = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page(args.reuse or FOLDER)
        print(f"{PAGE.relative_to(ROOT)} {'is' if same else 'is not'} what {args.reuse or FOLDER} gives")
        return 0 if same else 1
    FOLDER.mkdir(parents=True, exist_ok=True)
    failed = False
    if args.reuse is None:
        for part in args.only or PARTS:
            failed |= not measure(part)
    elif args.reuse.resolve() != FOLDER:
        for path in sorted(args.reuse.glob("*.json")):
            if path.stem in PARTS:
                shutil.copyfile(path, FOLDER / path.name)
    PAGE.write_text(page(FOLDER), encoding="utf-8")
    missing = [part for part in PARTS if not (FOLDER / f"{part}.json").is_file()]
    print(f"written: {PAGE}" + (f"; missing: {', '.join(missing)}" if missing else ""))
    return 1 if failed or missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
