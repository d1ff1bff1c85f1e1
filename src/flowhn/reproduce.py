"""``flowhn-reproduce``: one command per artefact of the paper (``reproduce.sh`` sets up the environment and calls it)."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flowhn import run_report
from flowhn.artefacts import Artefact, Plan, artefact_files, load_artefact, plan_cells
from flowhn.cli import run_entry
from flowhn.errors import UserError
from flowhn.run_tracking import track_artefact
from flowhn.runs import Run

EPILOG = """examples:
  ./reproduce.sh                                                Table 1 at laptop scale, from nothing
  ./reproduce.sh table1 size=135m data=slimpajama eval=paper budget=paper    the paper's own setting (one GPU)
  ./reproduce.sh table1 models=[llama,flowhn_fac] seeds=[0,1]   some cells, two seeds
  ./reproduce.sh ablation_split ablation_ratio                  two ablations; runs that they share are trained once
  ./reproduce.sh --dry-run table1 size=1b                       what would run: parameters, tokens, disk
"""


def main() -> None:
    """Entry point of ``flowhn-reproduce``."""
    run_entry(_main)


def _main(argv: Sequence[str]) -> int:
    args = _parse(argv)
    if args.list:
        return _list()
    if run_report.NAME in args.artefacts:
        if len(args.artefacts) > 1:
            raise UserError(
                f"{run_report.NAME} shows what is there and is made alone; run ./reproduce.sh {run_report.NAME} after the others"
            )
        _say(f"written: {run_report.make_report(args.overrides)}")
        return 0
    return max([_make(load_artefact(name), args) for name in args.artefacts])


def _make(artefact: Artefact, args: argparse.Namespace) -> int:
    """One artefact, from its missing runs to its folder; returns the exit code."""
    if artefact.bench is not None:
        return _make_timed(artefact, args)
    wanted = plan_cells(artefact, args.overrides)
    if args.dry_run:
        return _dry_run(artefact.name, wanted.wanted)
    if args.force:
        for run in wanted.wanted.values():
            shutil.rmtree(run.folder, ignore_errors=True)
    failed = _run_missing(artefact.title, wanted.wanted)
    folder = _write(artefact, wanted, _command(artefact, args))
    _show(artefact, folder, keep=args.keep)
    if folder is not None:
        track_artefact(artefact.name, folder, next(iter(wanted.wanted.values())).config, say=_say)
    for cell, reason in failed.items():
        sys.stderr.write(f"error: {cell} has no record: {reason}\n")
    return 2 if failed else 0


def _make_timed(artefact: Artefact, args: argparse.Namespace) -> int:
    """An artefact that flowhn-bench times."""
    from flowhn.reporting.ablations import ABLATIONS, write_ablation
    from flowhn.reporting.bench import find_bench_records, write_bench
    from flowhn.timed_artefacts import bench_words, collect, command, measure

    budget, words = bench_words(artefact, args.overrides)
    if args.dry_run:
        sys.stdout.write(f"{artefact.name}: {command(words)}\n")
        return 0
    code = measure(words, force=args.force)
    folder = collect(artefact, budget, words)
    if folder is not None and artefact.name in ABLATIONS:
        write_ablation(artefact.name, folder, title=artefact.title, command=_command(artefact, args))
    elif folder is not None:
        write_bench(find_bench_records(folder / "records"), folder, title=artefact.title)
    _show(artefact, folder, keep=args.keep)
    return code


def _command(artefact: Artefact, args: argparse.Namespace) -> str:
    """The command that makes this again, without what is only about this machine's folders."""
    words = [word for word in args.overrides if not word.startswith(("output_dir=", "cache_dir="))]
    return shlex.join(["./reproduce.sh", artefact.name, *words])


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="reproduce.sh",
        description="Make a table or figure of the FlowHN paper. Finished runs are kept and never repeated.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "words", nargs="*", metavar="artefact | key=value",
        help="what to make, one or more (see --list; default: table1), and Hydra overrides; also models=[...] seeds=[...]",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="the artefacts and the paper's claim behind each")
    parser.add_argument("--dry-run", action="store_true", help="show the runs, their size and which records exist")
    parser.add_argument("--force", action="store_true", help="run again although records exist (they are deleted)")
    parser.add_argument("--keep", action="store_true", help="copy table, figures and records to experiments/")
    args = parser.parse_intermixed_args(list(argv))
    args.artefacts = [word for word in args.words if "=" not in word] or ["table1"]
    args.overrides = [word for word in args.words if "=" in word]
    return args


def _list() -> int:
    for name in artefact_files():
        artefact = load_artefact(name)
        sys.stdout.write(f"{name:<20} {artefact.title}\n{'':<20} {artefact.question or artefact.claim}\n")
    _say(f"{run_report.NAME:<20} {run_report.TITLE}")
    return 0


def _run_missing(title: str, runs: dict[str, Run]) -> dict[str, str]:
    """Run every cell without a record; returns the reason for each that failed."""
    missing = {cell: run for cell, run in runs.items() if run.record() is None}
    if not missing:
        return {}
    from flowhn.display import Display
    from flowhn.experiment import Workshop, summary

    failed: dict[str, str] = {}
    workshop = Workshop()
    with Display(title=title, n_runs=len(missing)) as display:
        for cell, run in missing.items():
            watch = display.watch(cell)
            workshop.prepare(run.config, watch)  # bad data stops everything: every cell reads the same
            try:
                record = workshop.run(run, watch, say=display.say)
            except UserError as error:
                failed[cell] = str(error)
                display.finish(cell, f"failed: {error}")
            else:
                display.finish(cell, summary(record))
    return failed


def _dry_run(name: str, runs: dict[str, Run]) -> int:
    from rich.console import Console
    from rich.table import Table

    from flowhn.data.disk import shown_bytes
    from flowhn.run_disk import run_bytes
    from flowhn.runs import meta_model

    table = Table(title=f"{name}: {len(runs)} runs")
    for column in (
        "cell",
        "size",
        "parameters",
        "tokens",
        "steps",
        "seed",
        "disk while running",
        "disk after",
        "record",
    ):
        table.add_column(column, justify="left" if column in ("cell", "size", "record") else "right", no_wrap=True)
    after = 0.0
    for cell, run in runs.items():
        config, model = run.config, meta_model(run.config)
        steps = -(-config["tokens"] // config["global_batch_tokens"])
        running, kept = run_bytes(config, model)
        after += kept
        table.add_row(
            cell, config["choices"]["size"], f"{model.num_parameters() / 1e6:,.2f}M", f"{config['tokens']:,}", f"{steps:,}",
            str(config["seed"]), shown_bytes(running), shown_bytes(kept), "exists" if run.record() else "missing",
        )  # fmt: skip
    console = Console(width=max(120, Console().width), soft_wrap=True)
    console.print(table)
    first = next(iter(runs.values()))
    free = shutil.disk_usage(_existing(first.folder)).free
    console.print(
        f"what stays of all runs: {shown_bytes(after)}; free on that disk: {free / 1e9:,.1f} GB; output: {first.folder.parent}"
    )
    for line in _data_disk(runs):
        console.print(line)
    return 0


def _data_disk(runs: dict[str, Run]) -> list[str]:
    """A line for each data set that the runs read: what its preparation takes and leaves in the cache, if it is not there."""
    from flowhn.data.disk import disk_estimate, shown_bytes
    from flowhn.reporting.record import config_hash

    lines = {}
    for config in (run.config for run in runs.values()):
        shape = {"vocab_size": config["vocab_size"], "seq_len": config["seq_len"]}
        key = config_hash({"data": config["data"], **shape})
        if key in lines:
            continue
        cache = Path(config["cache_dir"]) / "data"
        free = shutil.disk_usage(_existing(cache)).free
        at_peak, kept = disk_estimate(config["data"], **shape)
        lines[key] = (
            f"prepared data ({config['choices']['data']}), where the cache has it not yet: {shown_bytes(at_peak)} while it is "
            f"made, {shown_bytes(kept)} after; free on that disk: {free / 1e9:,.1f} GB; cache: {cache}"
        )
    return list(lines.values())


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.absolute().parent)


def _write(artefact: Artefact, runs: Plan, command: str) -> Path | None:
    """Tables and figures of an artefact from its records; returns their folder, None without any record.

    A run that another artefact trained first keeps its record; here it counts as the cell that it is here.
    """
    from flowhn.reporting.ablations import write_ablation
    from flowhn.reporting.artefact import keep_records, write_artefact
    from flowhn.reporting.speeds import day_spreads
    from flowhn.run_branches import measure_runs
    from flowhn.run_long_context import measure_long_context

    records = [
        replace(record, cell=run.config["cell"])
        for run in (*runs.wanted.values(), *runs.others.values())
        if (record := run.record()) is not None
    ]
    if not records:
        return None
    config = next(iter(runs.wanted.values())).config
    choices = config["choices"]
    folder = Path(config["output_dir"]) / artefact.name / f"{choices['size']}-{choices['data']}-{runs.budget}"
    if artefact.measure == "long_context":
        suite = artefact.suite.get(choices["size"], [])
        return measure_long_context({**runs.wanted, **runs.others}, folder, overrides=suite, say=_say)
    if artefact.measure is not None:
        return measure_runs({**runs.wanted, **runs.others}, folder, title=artefact.title)
    if artefact.question is not None:
        keep_records(records, folder / "records")
        write_ablation(artefact.name, folder, title=artefact.title, command=command)
    else:
        expected = list(dict.fromkeys(run.config["cell"] for run in runs.wanted.values()))
        _count_overlap(config, folder)
        write_artefact(
            records, folder, title=artefact.title, figures=artefact.figures, expected=expected,
            tables=artefact.tables, gap=artefact.gap, days=day_spreads(Path("experiments")),
        )  # fmt: skip
    return folder


def _count_overlap(config: dict[str, Any], folder: Path) -> None:
    """Put beside the table how much of the questions stands in the training text, where both are at hand."""
    from flowhn.overlap_report import is_counted, write_overlap

    if not is_counted(config):
        return
    from flowhn.experiment import Workshop

    try:
        write_overlap(config, Workshop(), folder)
    except UserError as error:  # text or questions are gone since the runs: an earlier count stays
        sys.stderr.write(f"the overlap of questions and training text was not counted: {error}\n")


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _show(artefact: Artefact, folder: Path | None, *, keep: bool) -> None:
    """Print the table, and copy the folder to experiments/ where that was asked for."""
    from flowhn.reporting.ablations import write_overview

    if folder is None:
        return
    about = {"title": artefact.title, "question": artefact.question, "claim": artefact.claim}
    sys.stdout.write((folder / "table.md").read_text(encoding="utf-8"))
    sys.stdout.write("\nwritten:\n" + "".join(f"  {path}\n" for path in sorted(folder.iterdir())))
    if artefact.question is not None:
        sys.stdout.write(f"  {write_overview(artefact.name, folder.parent, about)}\n")
    if keep:
        kept = Path("experiments") / artefact.name / folder.name
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(folder, kept)
        if artefact.question is not None:
            write_overview(artefact.name, kept.parent, about)
        sys.stdout.write(f"kept in {kept}: commit it to share the result\n")


if __name__ == "__main__":
    main()
