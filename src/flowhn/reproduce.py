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
from flowhn.cli import EXIT_BAD_INPUT, run_entry
from flowhn.dry_run import show_plan
from flowhn.errors import UserError
from flowhn.kept import keep_folder
from flowhn.run_cells import LOG_NAME, reason, run_missing
from flowhn.run_tracking import check_tracking, track_artefact

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
        if args.dry_run:
            _say(run_report.plan_report(args.overrides))
        else:
            _say(f"written: {run_report.make_report(args.overrides)}")
        return 0
    return _make_all([load_artefact(name) for name in args.artefacts], args)


def _make_all(artefacts: Sequence[Artefact], args: argparse.Namespace) -> int:
    """One artefact after another; with several, one that fails is listed at the end and does not stop the others."""
    if len(artefacts) == 1:
        return _make(artefacts[0], args)
    failed: dict[str, str] = {}
    for artefact in artefacts:
        try:
            if _make(artefact, args):
                failed[artefact.name] = "some cells have no record; their errors stand above"
        except Exception as error:
            if "debug=true" in args.overrides:
                raise
            failed[artefact.name] = reason(error, _output_dir(args) / artefact.name / LOG_NAME)
    for name, why in failed.items():
        sys.stderr.write(f"error: {name}: {why}\n")
    return EXIT_BAD_INPUT if failed else 0


def _output_dir(args: argparse.Namespace) -> Path:
    given = [word.partition("=")[2] for word in args.overrides if word.startswith("output_dir=")]
    return Path(given[-1] if given else "outputs")


def _make(artefact: Artefact, args: argparse.Namespace) -> int:
    """One artefact, from its missing runs to its folder; returns the exit code."""
    if artefact.bench is not None:
        return _make_timed(artefact, args)
    wanted = plan_cells(artefact, args.overrides)
    if args.dry_run:
        show_plan(artefact.name, wanted.wanted)
        return 0
    config = next(iter(wanted.wanted.values())).config
    check_tracking(config)
    if args.force:
        for run in wanted.wanted.values():
            shutil.rmtree(run.folder, ignore_errors=True)
    failed = run_missing(artefact.title, wanted.wanted)
    for cell, why in failed.items():
        sys.stderr.write(f"error: {cell} has no record: {why}\n")
    command = _command(artefact, args, all_rows=any(run.record() is not None for run in wanted.others.values()))
    folder = _write(artefact, wanted, command)
    if folder is not None:
        _finish(artefact, folder, command, config, keep=args.keep)
    return EXIT_BAD_INPUT if failed else 0


def _make_timed(artefact: Artefact, args: argparse.Namespace) -> int:
    """An artefact that flowhn-bench times."""
    from flowhn.reporting.ablations import ABLATIONS, write_ablation
    from flowhn.reporting.bench import find_bench_records, write_bench
    from flowhn.timed_artefacts import bench_words, collect, measure, tracking_config
    from flowhn.timed_artefacts import command as bench_command

    budget, words = bench_words(artefact, args.overrides)
    if args.dry_run:
        _say(f"{artefact.name}: {bench_command(words)}")
        return 0
    config = tracking_config(artefact, args.overrides)
    check_tracking(config)
    code = measure(words, force=args.force)
    folder = collect(artefact, budget, words)
    if folder is None:
        return code
    command = _command(artefact, args)
    if artefact.name in ABLATIONS:
        write_ablation(artefact.name, folder, title=artefact.title, command=command)
    else:
        write_bench(find_bench_records(folder / "records"), folder, title=artefact.title)
    _finish(artefact, folder, command, config, keep=args.keep)
    return code


def _command(artefact: Artefact, args: argparse.Namespace, *, all_rows: bool = False) -> str:
    """The command that makes this again, without what is only about this machine's folders and the logger.

    Args:
        all_rows: the table has rows of earlier calls too, so a selection of this one would not make it.
    """
    left_out = ("output_dir=", "cache_dir=", "logger=", "logger.") + (("models=", "model=") if all_rows else ())
    words = [word for word in args.overrides if not word.startswith(left_out)]
    return shlex.join(["./reproduce.sh", *([artefact.name] if words or artefact.name != "table1" else []), *words])


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


def _write(artefact: Artefact, runs: Plan, command: str) -> Path | None:
    """Tables and figures of an artefact from its records; returns their folder, None without any record.

    A run that another artefact trained first keeps its record; here it counts as the cell that it is here.
    """
    from flowhn.reporting.ablations import write_ablation
    from flowhn.reporting.artefact import keep_records, write_artefact
    from flowhn.reporting.record import find_records
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
        table = find_records(folder.parent.parent / "table1" / folder.name) if artefact.name == "table1_lr" else []
        write_artefact(
            records, folder, title=artefact.title, figures=artefact.figures, expected=expected, beside=table,
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


def _finish(artefact: Artefact, folder: Path, command: str, config: dict[str, Any], *, keep: bool) -> None:
    """Note the command, print the table, tell W&B, and copy the folder to experiments/ where that was asked for."""
    from flowhn.reporting.ablations import COMMAND, write_overview

    about = {"title": artefact.title, "question": artefact.question, "claim": artefact.claim}
    (folder / COMMAND).write_text(f"{command}\n", encoding="utf-8")
    sys.stdout.write((folder / "table.md").read_text(encoding="utf-8"))
    sys.stdout.write("\nwritten:\n" + "".join(f"  {path}\n" for path in sorted(folder.iterdir())))
    if artefact.question is not None:
        sys.stdout.write(f"  {write_overview(artefact.name, folder.parent, about)}\n")
    track_artefact(artefact.name, folder, config, say=_say)
    if keep:
        kept = Path("experiments") / artefact.name / folder.name
        keep_folder(folder, kept)
        if artefact.question is not None:
            write_overview(artefact.name, kept.parent, about)
        sys.stdout.write(f"kept in {kept}: commit it to share the result\n")


if __name__ == "__main__":
    main()
