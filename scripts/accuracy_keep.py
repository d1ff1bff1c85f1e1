"""What scripts/accuracy_session.py brings home: packed on the machine, sorted into experiments/ at home."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from accuracy_jobs import ABOUT

Tier = dict[str, Any]  # learning rates by model, of runs of at most ``max_tokens``
MAX_TOKENS = 100_000_000  # longest run that rates tried at a few million tokens are taken for


def pack(args: argparse.Namespace) -> None:
    """Records, long-context results and logs into one file; the commit is filled in, because the machine has no .git."""
    from flowhn.reporting.record import read_record, write_record
    from flowhn.run_folder import write_json

    work = Path(args.work)
    results = sorted(work.glob("runs/*/eval-*.json"))
    paths = [*sorted(work.glob("runs/*/record.json")), *results, *sorted(work.glob("*.log"))]
    paths += [*sorted(work.glob("error-*.txt")), *work.glob(ABOUT)]
    with tarfile.open(args.out, "w:gz") as archive:
        for path in paths:
            if not path.exists():  # the daemon trains that row again
                continue
            if path.name == "record.json" and args.commit:
                record = read_record(path)
                if record.git.get("commit") is None:
                    write_record(path, replace(record, git=_named(args.commit)))
            elif path in results and args.commit:
                result = json.loads(path.read_text(encoding="utf-8"))
                holders = [holder for holder in (result, result.get("training")) if holder and "git" in holder]
                unnamed = [holder for holder in holders if not (holder["git"] or {}).get("commit")]
                for holder in unnamed:
                    holder["git"] = _named(args.commit)
                if unnamed:
                    write_json(path, result)
            archive.add(path, arcname=str(path.relative_to(work)))
    sys.stdout.write(f"{args.out}: {Path(args.out).stat().st_size / 1e6:.2f} MB\n")


def _named(commit: str) -> dict[str, Any]:
    return {"commit": commit, "dirty": False}


def keep(args: argparse.Namespace) -> None:
    """Sort a packed file's records into experiments/, with the commands that plan them, and the chosen rates into table1.yaml.

    Raises:
        UserError: records that cannot stand in one table; nothing is written then.
    """
    from flowhn.artefacts import load_artefact
    from flowhn.reporting.cells import pool
    from flowhn.reporting.rates import with_table_rows
    from flowhn.reporting.record import find_records, write_record

    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(args.file) as archive:
            archive.extractall(folder, filter="data")
        records = find_records(Path(folder))
        paths = sorted(Path(folder).glob("runs/*/eval-long_context.json"))
        results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        about = _about(args, Path(folder) / ABOUT)
    into, trains = Path(args.into), "table" in about["kinds"]
    cells = {name: load_artefact(name).cells for name in ("table1", "table1_lr", "beyond")}
    rates = [record for record in records if record.cell in cells["table1_lr"]]
    about["lr_tokens"] = _budget(rates, about["lr_tokens"])
    args.setting = args.setting or f"{about['size']}-files-{_short(about['tokens'])}"
    # Rates are tried at a budget of their own, and serve tables of several.
    stem = args.setting.rpartition("-")[0]
    folders = dict.fromkeys(cells, args.setting) | {"table1_lr": f"{stem}-{_short(about['lr_tokens'])}"}
    before = {name: find_records(into / name / folders[name] / "records") for name in cells}

    def new(name: str) -> list[Any]:
        return [record for record in records if record.cell in cells[name]]

    missing = sorted(set(cells["table1"]) - {record.cell for record in new("table1")})
    if trains and missing and before["table1"] and not args.replace:
        trains = False
        sys.stdout.write(f"table1 keeps its rows: this session did not come to {', '.join(missing)}\n")
    # Rows of Table 1 are compared in speed: those of the session that trained all ten stay, and a second measurement of
    # one of them (--extra flowhn_fac:0) does not replace it there. It is for the variants, which were timed beside it: in
    # beyond the newest measurement counts. Where rows are to replace theirs, seeds at another learning rate cannot be pooled with them.
    gives_way = {name: _at_other_rates(before[name], new(name)) for name in ("table1", "beyond") if args.replace}
    for name, old in gives_way.items():
        before[name] = [record for record in before[name] if record not in old]
    kept = {"table1": _merge(before["table1"], new("table1"), newest=trains)}
    # What a row that gives way had shown of its rate stays on record, beside those tried on runs as long.
    shown = _as_tries(gives_way.get("table1", [])) if about["lr_tokens"] == about["tokens"] else []
    kept["table1_lr"] = _merge(before["table1_lr"], [*shown, *new("table1_lr")], newest=True)
    variants = {record.cell for record in before["beyond"] + new("beyond")} - set(cells["table1"])
    if variants:  # else there is nothing to compare
        # The rows to reach are those of Table 1, all seeds: a table needs a seed that all of its rows share.
        rows = [record for record in kept["table1"].values() if record.cell in cells["beyond"]]
        kept["beyond"] = _merge(before["beyond"], [*rows, *new("beyond")], newest=True)
    for own in kept.values():
        for size in {record.size for record in own.values()}:
            pool(own.values(), size)
    for name, own in kept.items():
        target = into / name / folders[name]
        gone = {(record.cell, record.seed) for record in gives_way.get(name, [])} - set(own)
        for cell, seed in gone:
            (target / "records" / f"{cell}-s{seed}.json").unlink(missing_ok=True)
        for (cell, seed), record in own.items():
            write_record(target / "records" / f"{cell}-s{seed}.json", record)
        sys.stdout.write(f"{name}: {len(new(name))} records of this session, {len(own)} in {target / 'records'}\n")
        if own:
            held = {cell for cell, _ in own} if name in ("table1_lr", "beyond") else set()
            _write_command(target, name, about, models=[cell for cell in cells[name] if cell in held])
    evals = into / "long_context" / args.setting / "evals"
    for result in results:
        evals.mkdir(parents=True, exist_ok=True)
        path = evals / f"{result['cell']}-s{result['seed']}.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"long_context: {len(results)} results\n")
    if results:
        asked = {json.loads(path.read_text(encoding="utf-8"))["cell"] for path in evals.glob("*.json")}
        models = [cell for cell in load_artefact("long_context").cells if cell in asked]
        _write_command(evals.parent, "long_context", about, models=models)
    if args.rates and args.replace and trains:
        write_rows_rates(Path(args.rates), list(kept["table1"].values()), about["tokens"])
    elif args.rates and new("table1_lr"):
        tried = with_table_rows(list(kept["table1_lr"].values()), kept["table1"].values())
        short = about["lr_tokens"] < about["tokens"]  # rates of whole runs are for those who read them to take up
        if short and (trains or not before["table1"]):
            write_rates(Path(args.rates), tried, about["tokens"])
        else:
            _tell_rates(Path(args.rates), tried, about["tokens"])


def _about(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    """What the session was asked for: its own word, else the command line's defaults (files packed by earlier versions)."""
    told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"kinds": args.kinds.split(",")}
    return {**vars(args), **told}


def _merge(old: list[Any], new: list[Any], *, newest: bool) -> dict[tuple[str, int], Any]:
    """Records by cell and seed; of two the newest counts, or else the one that was there before."""
    kept = {(record.cell, record.seed): record for record in old}
    for record in new:
        other = kept.setdefault((record.cell, record.seed), record)
        if newest and record.created > other.created:
            kept[record.cell, record.seed] = record
    return kept


def _at_other_rates(old: list[Any], new: list[Any]) -> list[Any]:
    """Rows of newly trained models that had another learning rate."""
    rates = {record.cell: record.config.get("lr") for record in new}
    return [record for record in old if record.cell in rates and record.config.get("lr") != rates[record.cell]]


def _write_command(folder: Path, name: str, about: dict[str, Any], *, models: Sequence[str] = ()) -> None:
    """The words that plan an artefact; those that are there stay, for its first records were made by them.

    ``models``: the cells that have a record, where a session may do some alone; then the words are written anew.
    """
    from flowhn.artefacts import load_artefact

    path = folder / "command.txt"
    if path.exists() and not models:
        return
    tokens = about["lr_tokens"] if name == "table1_lr" else about["tokens"]
    words = ["./reproduce.sh", name]
    words += [f"models=[{','.join(models)}]"] if models and len(models) < len(load_artefact(name).cells) else []
    words += [f"size={about['size']}", f"budget={_short(tokens)}"]
    words += [] if name == "table1_lr" else ["val_points=10"]
    words += ["data=files", "data.path=TEXT", "data.val_path=VALID"]
    if name != "table1_lr":
        words += [f"eval={about['eval']}", *(["eval.data_dir=EVAL"] if about["eval"] == "paper" else [])]
    words += about["override"]
    if name == "long_context":
        words += [f"seeds=[{about['long_seed']}]"]
    path.write_text(" ".join(map(shlex.quote, words)) + "\n", encoding="utf-8")


def _budget(tried: list[Any], tokens: int) -> int:
    """The tokens at which learning rates were tried; ``tokens`` where none were.

    Raises:
        UserError: they were tried at several budgets.
    """
    from flowhn.errors import UserError

    budgets = sorted({int(record.config.get("tokens", tokens)) for record in tried} or {tokens})
    if len(budgets) > 1:
        raise UserError(
            f"learning rates were tried at {' and '.join(f'{budget:,}' for budget in budgets)} tokens; pack and keep the runs of "
            "each budget by themselves"
        )
    return budgets[0]


def _short(tokens: int) -> str:
    return f"{tokens // 1_000_000}M" if tokens % 1_000_000 == 0 else str(tokens)


def _tell_rates(path: Path, records: list[Any], tokens: int) -> None:
    """Say which rates win that the table was not trained at: its rows and later seeds of them stay comparable."""
    from flowhn.artefacts import load_artefact, rates_for
    from flowhn.reporting.rates import chosen_rates

    lr = yaml.safe_load(path.read_text(encoding="utf-8"))["lr"] or {}
    rates = rates_for(replace(load_artefact("table1"), lr=lr), records[0].size, tokens)
    used = {**rates, "flowhn_no": rates.get("flowhn_no", rates.get("flowhn"))}
    won = {model: rate for model, rate in chosen_rates(records).items() if used.get(model) != rate}
    if won:
        told = ", ".join(f"{model} {rate:g} (the table: {used.get(model)})" for model, rate in won.items())
        sys.stdout.write(
            f"{path.name} keeps the rates that the records of table1 were trained at; these won since: {told}; run kinds "
            "lr,table to train all ten at them.\n"
        )


def write_rates(path: Path, records: list[Any], tokens: int) -> None:
    """Put the chosen rates into the ``lr`` line of ``configs/artefacts/table1.yaml``, beside those of other families, lengths and sizes.

    Args:
        tokens: the length of the runs that will take them.
    """
    from flowhn.reporting.rates import chosen_rates

    def change(shorter: list[Tier], tier: Tier, longer: list[Tier]) -> list[Tier]:
        return [*shorter, {**tier, **chosen_rates(records)}, *longer]

    _change_tiers(path, records[0].size, tokens, change)


def write_rows_rates(path: Path, rows: list[Any], tokens: int) -> None:
    """Make the rates of a table's rows those of runs of its length and longer; shorter runs keep theirs.

    Args:
        rows: the table's records.
        tokens: asked for of each.
    """
    names = {"flowhn_fac": "flowhn"}  # whose rate AE_Split and FA_Split have
    own = {names.get(row.cell, row.cell): float(row.config["lr"]) for row in rows}
    own = {model: rate for model, rate in own.items() if model not in ("flowhn_ae", "flowhn_fa")}

    def change(shorter: list[Tier], tier: Tier, longer: list[Tier]) -> list[Tier]:
        cut = len(tier) > 1 and not any(one["max_tokens"] == tokens - 1 for one in shorter)
        return [*shorter, *([{**tier, "max_tokens": tokens - 1}] if cut else []), {**tier, **own}, *longer]

    _change_tiers(path, rows[0].size, tokens, change)


def _change_tiers(
    path: Path, size: str, tokens: int, change: Callable[[list[Tier], Tier, list[Tier]], list[Tier]]
) -> None:
    """Rewrite a size's rates in the one line ``lr:`` of a file.

    Args:
        tokens: the length whose rates change.
        change: from the rates of shorter runs, those of this length (of none but ``max_tokens`` where it had none) and those of
            longer ones to all of them.
    """
    text = path.read_text(encoding="utf-8")
    line = re.search(r"^lr:.*$", text, re.MULTILINE)
    if line is None:
        raise SystemExit(f"{path} has no line lr:")
    lr = yaml.safe_load(line[0])["lr"] or {}
    known = lr.get(size, [])
    tiers = sorted([known] if isinstance(known, dict) else known, key=lambda tier: tier["max_tokens"])
    shorter = [tier for tier in tiers if tier["max_tokens"] < tokens]
    tier, *longer = tiers[len(shorter) :] or [{"max_tokens": max(MAX_TOKENS, tokens)}]
    order = ("max_tokens", "llama", "mamba1", "mamba2", "jamba", "shm", "hymba", "flowhn", "flowhn_no")
    lr[size] = [{key: one[key] for key in order if key in one} for one in change(shorter, tier, longer)]
    told = ", ".join(f"{name}: {_inline(own)}" for name, own in lr.items())
    path.write_text(text.replace(line[0], f"lr: {{{told}}}"), encoding="utf-8")
    sys.stdout.write(f"{path}: {told}\n")


def _as_tries(rows: list[Any]) -> list[Any]:
    """Rows of Table 1 that stood for their family, seed 0, under the names that ``table1_lr`` has for their rates."""
    from flowhn.artefacts import load_artefact
    from flowhn.reporting.rates import family_tried

    cells = load_artefact("table1_lr").cells
    rates = {
        cell: float(next(word for word in words if word.startswith("lr=")).partition("=")[2])
        for cell, words in cells.items()
    }
    found = []
    for row in rows:
        name = next(
            (cell for cell, rate in rates.items()
             if cell.rpartition("_")[0] == family_tried(row.cell) and rate == row.config.get("lr")), None
        )  # fmt: skip
        if row.seed == 0 and name is not None:
            found.append(replace(row, cell=name, artefact="table1_lr"))
    return found


def _inline(rates: Any) -> str:
    """Rates of one length, or of several, as YAML on one line."""
    if isinstance(rates, list):
        return _inline(rates[0]) if len(rates) == 1 else f"[{', '.join(map(_inline, rates))}]"
    return f"{{{', '.join(f'{key}: {_plain(value)}' for key, value in rates.items())}}}"


def _plain(value: float) -> str:
    """A number as YAML reads it back: 2.0e-3, not 2e-3, which would be a text."""
    return str(value) if isinstance(value, int) else f"{value:.1e}".replace("e-0", "e-")
