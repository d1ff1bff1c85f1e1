"""Throw broken inputs at the commands, in numbers, and write what came of it.

    scripts/bad_input.py --count 300 --seed 0 --out docs/reliability/bad_input.json

Every input has to end in one clear sentence and exit code 2, or go on unharmed, within 20 s. Exit code 1 and a list of
what did not; ``--only NUMBER`` throws one input of the campaign again.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from bad_inputs import Bad, Stage
from bad_inputs_campaign import LIMIT_SECONDS, campaign, fault_of, make_stage, sentences
from bad_inputs_places import MOUNTS, can_mount, on_a_mount
from flowhn.reporting.record import environment


def on_mounts(stage: Stage, folder: Path, failures: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Small and read-only file systems; what goes wrong is added to ``failures``. Empty where none can be mounted."""
    rows: list[dict[str, Any]] = []
    for number in range(len(MOUNTS) if can_mount() else 0):
        what, code, said = on_a_mount(stage, folder / f"mount-{number}", number)
        fault = fault_of(Bad("mounts", what, "train", (), (), False), code, said)
        told = sentences(said)
        sentence = told[0].replace(str(folder), "") if told else None
        rows.append({"what": what, "code": code, "said": sentence})
        if fault:
            failures.append({"kind": "mounts", "input": what, "what": fault})
            print(f"{what}\n    {fault}\n", flush=True)
    return rows


def throw_range(seed: int, numbers: range, processes: int, show: bool = False) -> dict[str, Any]:
    """Throw some inputs of a campaign, on a stage of their own; counts by kind, failures, and the longest seconds."""
    found: dict[str, Any] = {"by_kind": {}, "failures": [], "as_processes": 0, "longest_seconds": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        stage = make_stage(Path(folder).resolve() / "stage")
        for number, bad, is_process, outcome in campaign(stage, seed=seed, numbers=numbers, processes=processes):
            counts = found["by_kind"].setdefault(bad.kind, {"tried": 0, "refused": 0, "unharmed": 0})
            counts["tried"] += 1
            found["as_processes"] += is_process
            found["longest_seconds"] = max(found["longest_seconds"], 0.0 if is_process else outcome.seconds)
            if outcome.fault is None:
                counts["refused" if outcome.code else "unharmed"] += 1
            else:
                found["failures"].append({"kind": bad.kind, "input": f"{number}: {bad.what}", "what": outcome.fault})
                print(f"{number} {bad.kind}: {bad.what}\n    {outcome.fault}\n", flush=True)
            if show:
                print(f"{bad.command} {bad.argv}\n{outcome.code} {outcome.seconds:.1f} s\n{outcome.said}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Throw broken inputs at the commands.")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=None, help="drawn, and printed, when it is not given")
    parser.add_argument("--only", type=int, default=None, metavar="NUMBER", help="one input of the campaign")
    parser.add_argument("--processes", type=int, default=10, help="so many of them as processes of their own")
    parser.add_argument("--jobs", type=int, default=1, help="so many parts of the campaign at a time")
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    seed = secrets.randbelow(10**6) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    if args.only is not None:
        return 1 if throw_range(seed, range(args.only, args.only + 1), 0, show=True)["failures"] else 0
    edges = [args.count * job // args.jobs for job in range(args.jobs + 1)]
    ranges = [range(first, last) for first, last in pairwise(edges)]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        parts = list(pool.map(throw_range, repeat(seed), ranges, repeat(args.processes // args.jobs)))
    by_kind: dict[str, Counter[str]] = {}
    for part in parts:
        for name, counts in part["by_kind"].items():
            by_kind.setdefault(name, Counter(tried=0, refused=0, unharmed=0)).update(counts)
    failures = [failure for part in parts for failure in part["failures"]]
    with tempfile.TemporaryDirectory() as folder:
        stage = make_stage(Path(folder).resolve() / "stage")
        mounts = on_mounts(stage, Path(folder), failures)
    found, longest = environment(), max(part["longest_seconds"] for part in parts)
    result = {
        "inputs": args.count,
        "seed": seed,
        "by_kind": {name: dict(counts) for name, counts in sorted(by_kind.items())},
        "as_processes": sum(part["as_processes"] for part in parts),
        "limit_seconds": LIMIT_SECONDS,
        "longest_seconds": round(longest, 2),
        "mounts": mounts,
        "failures": failures,
        "commit": found["git"]["commit"],
        "dirty": found["git"]["dirty"],
        "versions": found["versions"],
    }
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{args.count} inputs, {len(failures)} failures, longest {longest:.1f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
