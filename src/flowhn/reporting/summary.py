"""The README's section on accuracy, from the committed records of one setting: table, verdicts, what lies beyond the paper."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from flowhn.reporting import paper, style
from flowhn.reporting.ablation_answers import depth_answer
from flowhn.reporting.ablation_tables import depth_table
from flowhn.reporting.adapter import adapter_lines
from flowhn.reporting.bench import commit_of
from flowhn.reporting.long_context import answer, read_results
from flowhn.reporting.rate_lines import rate_lines
from flowhn.reporting.reasons import depth_lines, equal_cost_lines, lack_lines
from flowhn.reporting.record import RunRecord, find_records
from flowhn.reporting.speeds import DaySpread, day_spreads, newest_speeds
from flowhn.reporting.style import long_name, size_name
from flowhn.reporting.tables import DASH, SLIP, table1
from flowhn.reporting.variant_lines import beyond_lines, budget_words, fastest_lines, gap_of
from flowhn.reporting.verdicts import BIASED, INTERVAL, verdicts


def accuracy_block(experiments: Path, setting: str, *, gap: dict[str, Any], seen: pd.DataFrame | None = None) -> str:
    """Markdown from ``experiments/{table1,beyond,long_context}/<setting>`` and the rates tried on as much text or less.

    Parts without records are left out; variants and long contexts of another budget with more rows stand beside them, as such.

    Args:
        experiments: the folder; links are written relative to its parent.
        gap: ``{of, to}`` of the variants' table.
        seen: what a token of each split can have seen (:func:`flowhn.reporting.reasons.depth_lines`).

    Raises:
        UserError: the records cannot make one table.
    """
    records = find_records(experiments / "table1" / setting / "records")
    adapter = adapter_lines(experiments / "hflm" / "comparison.json")
    if not records:
        return "\n".join(["The records of this table are not there yet; the command above makes them.", *adapter])
    size = records[0].size
    parts = [
        _table(records, size),
        "",
        _made(records, setting),
        "",
        *_verdict_lines(records, size, experiments),
        "",
    ]
    parts += rate_lines(experiments, setting, records)
    parts += [*equal_cost_lines(records, size), *depth_lines(records, size, seen, depths=_depths(experiments))]
    variants = []
    for folder in _with_records(experiments / "beyond", setting):
        told = budget_words(find_records(experiments / "beyond" / folder / "records")) if folder != setting else ""
        variants.append((gap_of(experiments, folder, size, gap), folder, told))
    parts += next((lines for frame, _, told in variants if (lines := lack_lines(frame, when=told))), [])
    shown = {f"loss_vs_{axis.lower()}": f"validation loss over training {axis}" for axis in ("time", "FLOPs")}
    parts += _pictures(experiments, "table1", setting, shown)
    days = day_spreads(experiments).get(_devices(records)[0])
    for frame, folder, told in variants:
        parts += beyond_lines(frame, folder, gap, when=told, days=days)
        if folder == setting:
            parts += fastest_lines(frame, experiments, folder, records, gap)
        if frame is not None:
            parts += _pictures(experiments, "beyond", folder, {"gap": "validation loss over speed of all variants"})
    for long in _with_records(experiments / "long_context", setting, name="evals"):
        if not (experiments / "long_context" / long / "long_context.png").is_file():
            continue
        which = f" ({long})" if long != setting else ""
        parts += [
            f"Beyond the trained length{which}: {answer(read_results(experiments / 'long_context' / long / 'evals'))} "
            f"[experiments/long_context](experiments/long_context/{long}/table.md).",
            "",
            *_pictures(experiments, "long_context", long, {"long_context": "exact match and choice over length"}),
        ]
    return "\n".join([*parts, *adapter]).rstrip()


def _number(value: Any, form: str) -> str:
    return DASH if value is None or pd.isna(value) else format(value, form)


def _table(records: Sequence[RunRecord], size: str) -> str:
    frame = table1(records, size=size)
    slips = {tuple(pair) for pair in frame.attrs["slip_cells"]}
    lines = [
        "| model | seeds | val loss | tokens/s | average of six % | LAMBADA % | paper: tokens/s | paper: average |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in frame.to_dict("records"):
        mark = SLIP if (row["cell"], "paper_average") in slips else ""
        accuracies = [
            f"{_number(row.get(name), '.2f')} ± {_number(row.get(f'{name}_stderr'), '.2f')}"
            for name in ("average", "lambada_openai")
        ]
        lines.append(
            f"| {row['model']} | {row['seeds']} | {_number(row['val_loss'], '.3f')} | {_number(row['tps'], ',.0f')} | "
            f"{accuracies[0]} | {accuracies[1]} | {_number(row['paper_tps'], ',.0f')} | "
            f"{_number(row['paper_average'], '.2f')}{mark} |"
        )
    if slips:
        lines += ["", f"{SLIP} a slip in print, shown as printed; the full table lists them."]
    return "\n".join(lines)


def _made(records: Sequence[RunRecord], setting: str) -> str:
    devices = ", ".join(_devices(records))
    first = records[0]
    return (
        f"{len(records)} runs of {first.tokens:,} tokens on {devices}, {size_name(first.size)}, the same batches in the same "
        f"order for a seed; ± one standard error. The paper's columns are its {size_name(first.size)} at 1B tokens of other "
        f"text: compare the order, not the values. Full table, verdicts and records: "
        f"[experiments/table1/{setting}](experiments/table1/{setting}/table.md)."
    )


def _ratio(value: float) -> str:
    """Two decimals; three where two would read as even."""
    return f"{value:.3f}x" if f"{value:.2f}" == "1.00" and value != 1 else f"{value:.2f}x"


def _verdict_lines(records: Sequence[RunRecord], size: str, experiments: Path) -> list[str]:
    days = day_spreads(experiments)
    frame = verdicts(records, size=size, days=days)
    lines = [
        f"| claim of the paper | printed | ours | {INTERVAL} | without BoolQ | verdict |",
        "|---|---|---|---|---|---|",
    ]
    slips = {cell for cell, column in table1(records, size=size).attrs["slip_cells"] if column == "paper_average"}
    for row in frame.to_dict("records"):
        against = "" if pd.isna(row["second"]) else f" ({long_name(row['second'])})"
        if row["verdict"] == "not testable":
            lines.append(f"| {row['sentence']}{against} | {DASH} | {DASH} | {DASH} | {DASH} | not testable |")
            continue
        points = row["quantity"] == "average"
        form = "{:+.2f}".format if points else _ratio
        ours, low, high = (form(row[key]) for key in ("difference", "low", "high"))
        printed = DASH if pd.isna(row["printed"]) else form(row["printed"])
        printed += SLIP if points and slips & {row["first"], row["second"]} else ""
        holds = {"yes": "holds", "no": "does not hold", "partly": "partly", "undecided": "open"}.get(
            row["holds"], row["holds"]
        )
        rest = "" if pd.isna(row["rest"]) else f"{row['rest_low']:+.2f} to {row['rest_high']:+.2f}"
        lines.append(
            f"| {row['sentence']}{against} | {printed} | {ours} | {low} to {high} | {rest} | {row['verdict']}: {holds} |"
        )
    newer = _newer_speeds(records, size, experiments, frame)
    judged = frame[(frame["quantity"] == "average") & (frame["verdict"] != "not testable")]
    if len(judged) and not judged["holds"].isin(["yes", "no"]).any():
        lines += ["", "**No claim on accuracy is decided at this budget.**"]
    return [*lines, "", *_caution(records, size), *_speed_caution(records, days), *newer]


def _newer_speeds(records: Sequence[RunRecord], size: str, experiments: Path, frame: pd.DataFrame) -> list[str]:
    """The same ratios of speed in figure 4, which was timed apart, by code of its own."""
    told = []
    own = sorted({str((record.git or {}).get("commit", "unknown"))[:7] for record in records})
    for device in _devices(records):
        timed = newest_speeds(experiments, device, size)
        words = {"tps": "tokens/s", "mfu": "MFU"}
        ratios = [
            f"{style.name(row['first'])}'s {words[row['quantity']]} over {style.name(row['second'])}'s "
            f"{_ratio(timed[row['first']][row['quantity']] / timed[row['second']][row['quantity']])}"
            for row in frame.to_dict("records")
            if row["quantity"] in words
            and all(timed.get(row[key], {}).get(row["quantity"]) for key in ("first", "second"))
        ]
        if ratios:
            some = next(iter(timed.values()))
            told += [
                "",
                f"These are the speeds of the training runs themselves (code {', '.join(own)}). In "
                f"[figure 4](experiments/figure4/README.md), timed apart ({commit_of(some)}, {device}): "
                f"{', '.join(ratios)}.",
            ]
    return told


def _speed_caution(records: Sequence[RunRecord], days: Mapping[str, DaySpread]) -> list[str]:
    """What the band of a ratio of speeds is."""
    between = ""
    for name in _devices(records):
        if name not in days:
            continue
        share = f"{100 * days[name].share:.1f} %"
        between += (
            f" Repeats of a cell with the same code on {name} differ by up to {share} (experiments/figure4)"
            if days[name].same_code
            else f" No cell was timed twice with the same code on {name} yet; with other code one differs by up to {share} "
            "(experiments/figure4)"
        )
        between += ", which counts where it is more."
    return ["", f"Speeds: the spread of both models' speeds within their runs and between seeds.{between}"]


def _devices(records: Sequence[RunRecord]) -> list[str]:
    return sorted({str(record.device["name"]) for record in records})


def _caution(records: Sequence[RunRecord], size: str) -> list[str]:
    """What the averages rest on: BoolQ's spread beside that of the other five, and the order by validation loss."""
    frame = table1(records, size=size)
    frame = frame[frame["seeds"] > 0]
    if not set(paper.TASKS) <= set(frame.columns):
        return []
    rest = frame[[task for task in paper.TASKS if task != BIASED]].mean(axis=1)
    order = ", ".join(long_name(cell) for cell in frame.sort_values("val_loss")["cell"])
    return [
        f"BoolQ alone lies between {frame[BIASED].min():.1f} and {frame[BIASED].max():.1f} % (always no: 37.8, always yes: "
        f"62.2), the mean of the other five between {rest.min():.1f} and {rest.max():.1f} % (guessing: 35.0): a verdict that "
        "does not stand without BoolQ, or not without BoolQ and one task more, says little and is marked by them. Where a model "
        "is to be the best of all, both intervals are wider than 95 %, because the one to beat was picked by the same answers. "
        f"By validation loss, best first: {order}.",
    ]


def _with_records(folder: Path, setting: str, *, name: str = "records") -> list[str]:
    """This setting where ``folder`` has it, and that of its size and text (all but the last word) with most rows, if more."""
    stem = setting.rpartition("-")[0]
    found = [path.parent.name for path in folder.glob(f"{stem}-*/{name}")] if stem else []
    own = [setting] if (folder / setting / name).is_dir() else []

    def rows(one: str) -> int:
        return len({path.name.rpartition("-s")[0] for path in (folder / one / name).glob("*.json")})

    def tokens(one: str) -> int:
        contents = (json.loads(path.read_text(encoding="utf-8")) for path in (folder / one / name).glob("*.json"))
        return max((content.get("tokens", 0) for content in contents), default=0)

    others = sorted((one for one in found if one != setting), key=lambda one: (rows(one), tokens(one)))
    return own + [one for one in others[-1:] if not own or rows(one) > rows(setting)]


def _pictures(experiments: Path, artefact: str, setting: str, names: dict[str, str]) -> list[str]:
    lines = []
    for name, shows in names.items():
        if (experiments / artefact / setting / f"{name}.png").is_file():
            lines.append(f"![{shows}](experiments/{artefact}/{setting}/{name}.png)")
    return [*lines, ""] if lines else []


def _depths(experiments: Path) -> str:
    """What the ablation of depth found, with its link; empty where it has no records."""
    folder = experiments / "ablation_depth"
    found = [
        f"`{setting.name}`: {depth_answer(depth_table(setting))}"
        for setting in sorted(path.parent for path in folder.glob("*/records"))
    ]
    return f"[experiments/ablation_depth](experiments/ablation_depth/README.md), {' '.join(found)}" if found else ""
