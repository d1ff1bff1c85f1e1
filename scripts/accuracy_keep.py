"""What scripts/accuracy_session.py brings home: packed on the machine, sorted into experiments/ at home."""

from __future__ import annotations

import argparse
import json
import re
import sys
import tarfile
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

MAX_TOKENS = 100_000_000  # longest run that rates tried at a few million tokens are taken for


def pack(args: argparse.Namespace) -> None:
    """Records, long-context results and logs into one file; the commit is filled in, because the machine has no .git."""
    from flowhn.reporting.record import read_record, write_record

    work = Path(args.work)
    with tarfile.open(args.out, "w:gz") as archive:
        for path in sorted(
            [
                *work.glob("runs/*/record.json"),
                *work.glob("runs/*/eval-*.json"),
                *work.glob("*.log"),
                *work.glob("error-*.txt"),
            ]
        ):
            if path.name == "record.json" and args.commit:
                record = read_record(path)
                if record.git.get("commit") is None:
                    write_record(path, replace(record, git={"commit": args.commit, "dirty": False}))
            archive.add(path, arcname=str(path.relative_to(work)))
    sys.stdout.write(f"{args.out}: {Path(args.out).stat().st_size / 1e6:.2f} MB\n")


def keep(args: argparse.Namespace) -> None:
    """Sort a packed file's records into experiments/ and write the chosen learning rates into configs/artefacts/table1.yaml."""
    from flowhn.artefacts import load_artefact
    from flowhn.reporting.record import find_records, write_record

    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(args.file) as archive:
            archive.extractall(folder, filter="data")
        records = find_records(Path(folder))
        for name in ("table1", "table1_lr", "beyond"):
            cells = load_artefact(name).cells
            mine = [record for record in records if record.cell in cells]
            target = Path(args.into) / name / args.setting / "records"
            for record in mine:
                write_record(target / f"{record.cell}-s{record.seed}.json", record)
            sys.stdout.write(f"{name}: {len(mine)} records in {target}\n")
        results = [
            json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(Path(folder).glob("runs/*/eval-long_context.json"))
        ]
        for result in results:
            path = (
                Path(args.into) / "long_context" / args.setting / "evals" / f"{result['cell']}-s{result['seed']}.json"
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        sys.stdout.write(f"long_context: {len(results)} results\n")
        tried = []
        if any(record.artefact == "table1_lr" for record in records):  # with those of earlier sessions
            tried = find_records(Path(args.into) / "table1_lr" / args.setting / "records")
    if tried and args.rates:
        write_rates(Path(args.rates), tried)


def write_rates(path: Path, records: list[Any]) -> None:
    """Put the chosen rates into the ``lr`` line of ``configs/artefacts/table1.yaml``, beside those of other sizes."""
    from flowhn.reporting.rates import chosen_rates

    text = path.read_text(encoding="utf-8")
    line = re.search(r"^lr:.*$", text, re.MULTILINE)
    if line is None:
        raise SystemExit(f"{path} has no line lr:")
    rates = yaml.safe_load(line[0])["lr"] or {}
    chosen = chosen_rates(records)
    order = ("llama", "mamba1", "mamba2", "jamba", "shm", "hymba", "flowhn", "flowhn_no")
    rates[records[0].size] = {"max_tokens": MAX_TOKENS, **{model: chosen[model] for model in order if model in chosen}}
    told = ", ".join(
        f"{size}: {{{', '.join(f'{k}: {_plain(v)}' for k, v in own.items())}}}" for size, own in rates.items()
    )
    path.write_text(text.replace(line[0], f"lr: {{{told}}}"), encoding="utf-8")
    sys.stdout.write(f"{path}: {told}\n")


def _plain(value: float) -> str:
    """A number as YAML reads it back: 2.0e-3, not 2e-3, which would be a text."""
    return str(value) if isinstance(value, int) else f"{value:.1e}".replace("e-0", "e-")
