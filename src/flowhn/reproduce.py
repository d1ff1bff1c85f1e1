"""``flowhn-reproduce``: one command per artefact of the paper (``reproduce.sh`` sets up the environment and calls it)."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from flowhn.cli import run_entry
from flowhn.config import compose, config_dir, nearest
from flowhn.errors import UserError
from flowhn.runs import Run, plan

EPILOG = """examples:
  ./reproduce.sh                                                Table 1 at laptop scale, from nothing
  ./reproduce.sh table1 size=135m data=slimpajama eval=paper budget=paper    the paper's own setting (one GPU)
  ./reproduce.sh table1 models=[llama,flowhn_fac] seeds=[0,1]   some cells, two seeds
  ./reproduce.sh --dry-run table1 size=1b                       what would run: parameters, tokens, disk
"""


def main() -> None:
    """Entry point of ``flowhn-reproduce``."""
    run_entry(_main)


def _main(argv: Sequence[str]) -> int:
    args = _parse(argv)
    if args.list:
        return _list()
    name, artefact = _artefact(args.artefact)
    wanted, others = _plan_cells(name, artefact, args.overrides)
    if args.dry_run:
        return _dry_run(name, wanted)
    if args.force:
        for run in wanted.values():
            shutil.rmtree(run.folder, ignore_errors=True)
    failed = _run_missing(artefact, wanted)
    folder = _write(name, artefact, wanted, others)
    if folder is not None:
        _show(folder)
    if args.keep and folder is not None:
        kept = Path("experiments") / name / folder.name
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(folder, kept)
        sys.stdout.write(f"kept in {kept}: commit it to share the result\n")
    for cell, reason in failed.items():
        sys.stderr.write(f"error: {cell} has no record: {reason}\n")
    return 2 if failed else 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="reproduce.sh",
        description="Make a table or figure of the FlowHN paper. Finished runs are kept and never repeated.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("artefact", nargs="?", default="table1", help="what to make (see --list); default: table1")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="Hydra overrides; also models=[...] seeds=[...]"
    )
    parser.add_argument("--list", action="store_true", help="the artefacts and the paper's claim behind each")
    parser.add_argument("--dry-run", action="store_true", help="show the runs, their size and which records exist")
    parser.add_argument("--force", action="store_true", help="run again although records exist (they are deleted)")
    parser.add_argument("--keep", action="store_true", help="copy table, figures and records to experiments/")
    args = parser.parse_intermixed_args(list(argv))
    if "=" in args.artefact:
        args.overrides.insert(0, args.artefact)
        args.artefact = "table1"
    return args


def _artefacts() -> dict[str, Path]:
    return {path.stem: path for path in sorted((config_dir() / "artefacts").glob("*.yaml"))}


def _artefact(name: str) -> tuple[str, dict[str, Any]]:
    known = _artefacts()
    if name not in known:
        raise UserError(f"there is no artefact {name}; {nearest(name, known)}")
    return name, OmegaConf.to_container(OmegaConf.load(known[name]))


def _list() -> int:
    for name, path in _artefacts().items():
        artefact = OmegaConf.load(path)
        sys.stdout.write(f"{name:<20} {artefact.title}\n{'':<20} {artefact.claim}\n")
    return 0


def _selection(overrides: Sequence[str], keys: Sequence[str]) -> tuple[list[str] | None, list[str]]:
    """Take ``models=[a,b]`` (or ``model=a``) out of the overrides; returns the chosen names and the rest."""
    chosen, rest = None, []
    for override in overrides:
        key, _, value = override.partition("=")
        if key in keys:
            chosen = [item.strip() for item in value.strip("[]").split(",") if item.strip()]
        else:
            rest.append(override)
    return chosen, rest


def _plan_cells(name: str, artefact: dict[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Run], dict[str, Run]]:
    """The runs asked for, and the artefact's other cells (their records, where they exist, stay in the table)."""
    models, overrides = _selection(overrides, ("models", "model"))
    seeds, overrides = _selection(overrides, ("seeds",))
    cells = artefact["cells"]
    for cell in models or ():
        if cell not in cells:
            raise UserError(f"models={cell} is not a cell of {name}; {nearest(cell, cells)}")
    if models is not None and not models:
        raise UserError(f"models=[] selects nothing; choose from {', '.join(cells)}")
    if seeds is not None and not (seeds and all(seed.isdigit() for seed in seeds)):
        raise UserError(f"seeds={','.join(seeds)} must be whole numbers, for example seeds=[0,1,2]")
    _refuse_what_cells_set(name, cells, overrides)
    wanted: dict[str, Run] = {}
    others: dict[str, Run] = {}
    for cell in cells:
        for seed in seeds or [None]:
            own = [*artefact["overrides"], *cells[cell], *overrides, f"cell={cell}", f"artefact={name}"]
            own += [] if seed is None else [f"seed={seed}"]
            label = cell if seed is None else f"{cell} seed {seed}"
            into = wanted if models is None or cell in models else others
            into[label] = plan(compose("train", _last_wins(own)))
    return wanted, others


def _refuse_what_cells_set(name: str, cells: dict[str, list[str]], overrides: Sequence[str]) -> None:
    """A key in which the cells differ is not the user's: the rows would keep their names and all be the same model."""
    own = {override.partition("=")[0]: cell for cell, words in cells.items() for override in words}
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        if key in own or key in ("cell", "artefact"):
            raise UserError(
                f"{override} would make the rows of {name} the same model under other names; select rows with models=[...], or "
                f"train one model with flowhn-train {override}"
            )


def _last_wins(overrides: Sequence[str]) -> list[str]:
    """Hydra refuses a group given twice; here the user's word replaces the artefact's."""
    return list({override.partition("=")[0]: override for override in overrides}.values())


def _run_missing(artefact: dict[str, Any], runs: dict[str, Run]) -> dict[str, str]:
    """Run every cell without a record; returns the reason for each that failed."""
    missing = {cell: run for cell, run in runs.items() if run.record() is None}
    if not missing:
        return {}
    from flowhn.display import Display
    from flowhn.experiment import Workshop, summary

    failed: dict[str, str] = {}
    workshop = Workshop()
    with Display(title=artefact["title"], n_runs=len(missing)) as display:
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

    from flowhn.runs import count_parameters

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
        config, n = run.config, count_parameters(run.config)
        steps = -(-config["tokens"] // config["global_batch_tokens"])
        # fp32: weights 4 bytes; a checkpoint holds weights and two AdamW moments; two are kept while a third is written
        after += 4 * n
        table.add_row(
            cell, config["choices"]["size"], f"{n / 1e6:,.2f}M", f"{config['tokens']:,}", f"{steps:,}", str(config["seed"]),
            _bytes(3 * 12 * n + 4 * n), _bytes(4 * n), "exists" if run.record() else "missing",
        )  # fmt: skip
    console = Console(width=max(120, Console().width))
    console.print(table)
    first = next(iter(runs.values()))
    free = shutil.disk_usage(_existing(first.folder)).free
    console.print(
        f"weights of all runs: {_bytes(after)}; free on that disk: {_bytes(free)}; output: {first.folder.parent}"
    )
    return 0


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.absolute().parent)


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.0f} {unit}"
        n /= 1000
    return f"{n:,.1f} GB"


def _write(name: str, artefact: dict[str, Any], wanted: dict[str, Run], others: dict[str, Run]) -> Path | None:
    """Tables and figures of an artefact from its records; returns their folder, None without any record."""
    from flowhn.reporting.artefact import write_artefact

    records = [record for run in (*wanted.values(), *others.values()) if (record := run.record()) is not None]
    if not records:
        return None
    config = next(iter(wanted.values())).config
    choices = config["choices"]
    folder = Path(config["output_dir"]) / name / f"{choices['size']}-{choices['data']}-{config['budget']}"
    expected = list(dict.fromkeys(run.config["cell"] for run in wanted.values()))
    write_artefact(records, folder, title=artefact["title"], figures=artefact["figures"], expected=expected)
    return folder


def _show(folder: Path) -> None:
    sys.stdout.write((folder / "table.md").read_text(encoding="utf-8"))
    sys.stdout.write("\nwritten:\n" + "".join(f"  {path}\n" for path in sorted(folder.iterdir())))


if __name__ == "__main__":
    main()
