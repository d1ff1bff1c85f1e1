"""Draw every folder below experiments/ again from its committed records, and the table in README.md from those of Table 1.

python scripts/refresh_experiments.py            write
python scripts/refresh_experiments.py --check    only tell what is not up to date (exit code 1)
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import yaml
from matplotlib.figure import Figure

from flowhn.reporting.ablations import ABLATIONS, COMMAND, README, overview, settings, write_ablation
from flowhn.reporting.artefact import write_artefact
from flowhn.reporting.bench import find_bench_records, write_bench
from flowhn.reporting.branches import FOLDER_NAME as MEASUREMENTS
from flowhn.reporting.branches import find_measurements, write_branches
from flowhn.reporting.goals import goals, readable_goals
from flowhn.reporting.long_context import write_long_context
from flowhn.reporting.missed import missed_lines
from flowhn.reporting.record import find_records
from flowhn.reporting.routing import reach_table
from flowhn.reporting.speeds import day_spreads, other_code, repeats
from flowhn.reporting.style import in_order
from flowhn.reporting.summary import accuracy_block
from flowhn.reporting.tables import table1

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "experiments" / "table1" / "tiny-docs-laptop"
BEGIN = "<!-- table1 begins: written by scripts/refresh_experiments.py from experiments/table1/tiny-docs-laptop -->"
END = "<!-- table1 ends -->"
ACCURACY = "135m-files-60M"  # the setting of README's section on accuracy
ACCURACY_BEGIN = (
    f"<!-- accuracy begins: written by scripts/refresh_experiments.py from experiments/table1/{ACCURACY} -->"
)
ACCURACY_END = "<!-- accuracy ends -->"
ABLATIONS_BEGIN = (
    "<!-- ablations begin: written by scripts/refresh_experiments.py from configs/artefacts and experiments -->"
)
ABLATIONS_END = "<!-- ablations end -->"
FIGURE4 = ROOT / "experiments" / "figure4"
FIGURE4_BEGIN = "<!-- figure4 begins: written by scripts/refresh_experiments.py from the records beside it -->"
FIGURE4_END = "<!-- figure4 ends -->"


def block() -> str:
    """The README's table, from the committed records."""
    records = find_records(SOURCE / "records")
    frame = table1(records, size="tiny")
    task = frame.attrs["tasks"][0]
    lines = [
        "| model | parameters | validation loss | tokens/s | MFU % | continuation accuracy % | paper, 135M: tokens/s | paper, 135M: average of six % |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in frame.to_dict("records"):
        mfu = "" if pd.isna(row["mfu"]) else f"{row['mfu']:.1f}"
        lines.append(
            f"| {row['model']} | {row['parameters'] / 1e6:.2f}M | {row['val_loss']:.3f} | {row['tps']:,.0f} | {mfu} | "
            f"{row[task]:.1f} ± {row[f'{task}_stderr']:.1f} | {row['paper_tps']:,.0f} | {row['paper_average']:.2f} |"
        )
    first = records[0]
    minutes = sum(record.wall_seconds["total"] for record in records) / 60
    lines += [
        "",
        f"Made by `./reproduce.sh` on {first.device['name']} with {first.device['count']} threads: {len(records)} models of size tiny, "
        f"{first.tokens:,} tokens each, {minutes:.1f} minutes in all, commit `{(first.git['commit'] or 'unknown')[:7]}`. Unigram entropy of the text: "
        f"{first.losses['unigram_entropy']:.2f} nats; guessing a continuation: 25 %. **Our columns and the paper's are not comparable** (size, text, "
        "tokens, device): they stand side by side so that you can compare the order of rows. "
        "Full table, figures, verdicts and records: [experiments/table1/tiny-docs-laptop](experiments/table1/tiny-docs-laptop/table.md).",
        "",
        "![validation loss over tokens, all models](experiments/table1/tiny-docs-laptop/loss.png)",
    ]
    return "\n".join(lines)


def figure4_block() -> str:
    """The part of experiments/figure4/README.md that comes from records: the newest table, why goals are missed, repeats."""
    _, _, body = (FIGURE4 / "h200" / "table.md").read_text(encoding="utf-8").partition("\n\n")
    parts = [body.strip()]
    beside = [
        readable_goals(found).assign(records=f"[bench/{folder.name}](../bench/{folder.name}/table.md)")
        for folder in settings(ROOT / "experiments" / "bench")
        if not (found := goals(find_bench_records(folder / "records"))).empty
    ]
    if beside:
        table = pd.concat(beside, ignore_index=True).fillna("")
        parts += ["**Goals of other cases**", table.to_markdown(index=False, disable_numparse=True)]
    missed = missed_lines(find_bench_records(FIGURE4 / "h200" / "records"), product_flops)
    if missed:
        parts += ["**Why goals are missed**", "\n".join(missed)]
    again, other = repeats(ROOT / "experiments"), other_code(ROOT / "experiments")
    parts += ["**Repeats: the same cells with the same code**", "No cell was timed twice with the same code yet."]
    if not again.empty:
        parts[-1] = again.to_markdown(index=False, disable_numparse=True)
    if not other.empty:
        parts += ["**The same cells with other code**", other.to_markdown(index=False, disable_numparse=True)]
    return "\n\n".join(parts)


def product_flops(record: Mapping[str, Any]) -> float:
    """Training FLOPs per token of a benchmark record's linear layers (LM head included), each on the tokens that reach it: forward,
    and twice that for the gradients of input and weight."""
    import torch

    from flowhn.config import build_model

    total = 0

    def count(layer: torch.nn.Linear, inputs: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        nonlocal total
        total += 2 * layer.weight.numel() * (inputs[0].numel() // layer.in_features)

    with torch.device("meta"), torch.no_grad():
        net = build_model(record["config"])
        for layer in net.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.register_forward_hook(count)
        net(torch.zeros(1, record["seq_len"], dtype=torch.long))
    return 3 * total / record["seq_len"]


def figure4_readme() -> tuple[str, str]:
    """experiments/figure4/README.md as it is and as it should be."""
    text = (FIGURE4 / "README.md").read_text(encoding="utf-8")
    head, rest = text.split(FIGURE4_BEGIN)
    _, tail = rest.split(FIGURE4_END)
    return text, f"{head}{FIGURE4_BEGIN}\n{figure4_block()}\n{FIGURE4_END}{tail}"


def ablations_block() -> str:
    """The README's list of ablations; minutes are those of the committed laptop records."""
    lines = ["| question | command | minutes on a laptop |", "|---|---|---|"]
    for name in ABLATIONS:
        artefact = yaml.safe_load((ROOT / "configs" / "artefacts" / f"{name}.yaml").read_text(encoding="utf-8"))
        folder = ROOT / "experiments" / name
        laptop = next((path for path in settings(folder) if path.name.endswith("laptop")), None)
        minutes, question = "not run yet", artefact["question"]
        if laptop is not None:
            minutes = f"{ABLATIONS[name].table(laptop).attrs['seconds'] / 60:.1f}"
            question = f"[{question}](experiments/{name}/README.md)"
        lines.append(f"| {question} | `./reproduce.sh {name}` | {minutes} |")
    return "\n".join(lines)


def redraw(source: Path, target: Path) -> None:
    """Write the tables and figures of ``experiments/<artefact>/<setting>`` into ``target``, from its records."""
    name = source.parent.name
    if name == "bench":
        return redraw_bench(source, target)
    if name == "long_context":
        write_long_context(source / "evals", target)
        return None
    if name == "branches":
        return redraw_branches(source, target)
    artefact = yaml.safe_load((ROOT / "configs" / "artefacts" / f"{name}.yaml").read_text(encoding="utf-8"))
    if "bench" in artefact and name not in ABLATIONS:
        write_bench(find_bench_records(source / "records"), target, title=artefact["title"])
        return None
    if name in ABLATIONS:
        if source != target:
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("table.*", "*.png"))
        command = (source / COMMAND).read_text(encoding="utf-8").strip()
        write_ablation(name, target, title=artefact["title"], command=command)
        return None
    records = find_records(source / "records")
    cells = [cell for cell in artefact["cells"] if any(record.cell == cell for record in records)]
    if source != target and (source / "overlap.json").is_file():
        shutil.copyfile(source / "overlap.json", target / "overlap.json")
    beside = find_records(ROOT / "experiments" / "table1" / source.name / "records") if name == "table1_lr" else []
    write_artefact(
        records, target, title=artefact["title"], figures=artefact["figures"], expected=cells, beside=beside,
        tables=artefact.get("tables", ["verdicts"]), gap=artefact.get("gap"), days=day_spreads(ROOT / "experiments"),
    )  # fmt: skip
    return None


def readme_of(folder: Path) -> str:
    """What README.md of an ablation's folder should be."""
    artefact = yaml.safe_load((ROOT / "configs" / "artefacts" / f"{folder.name}.yaml").read_text(encoding="utf-8"))
    return overview(folder.name, folder, artefact)


def redraw_bench(source: Path, target: Path) -> None:
    """Write the tables and figures of ``experiments/bench/<case>`` into ``target``, from its records."""
    case = yaml.safe_load((ROOT / "configs" / "bench" / f"{source.name}.yaml").read_text(encoding="utf-8"))
    write_bench(find_bench_records(source / "records"), target, title=case["title"])


def redraw_branches(source: Path, target: Path) -> None:
    """Write the table and figure of ``experiments/branches/<setting>`` into ``target``, from its measurements."""
    artefact = yaml.safe_load((ROOT / "configs" / "artefacts" / "branches.yaml").read_text(encoding="utf-8"))
    write_branches(find_measurements(source / MEASUREMENTS), target, title=artefact["title"])


def all_settings() -> list[Path]:
    """The folders below experiments/ that hold records."""
    known = sorted({path.stem for path in (ROOT / "configs" / "artefacts").glob("*.yaml")} | {"bench"})
    measured = [path.parent for path in sorted((ROOT / "experiments" / "branches").glob(f"*/{MEASUREMENTS}"))]
    measured += [path.parent for path in sorted((ROOT / "experiments" / "long_context").glob("*/evals"))]
    return [setting for name in known for setting in settings(ROOT / "experiments" / name)] + measured


def ablations() -> list[Path]:
    """The folders of ablations that have a setting with records."""
    return [folder for name in ABLATIONS if settings(folder := ROOT / "experiments" / name)]


def stale(source: Path) -> list[str]:
    """Names of the text files of a folder that its records would not give.

    Pictures differ by matplotlib's version: they are laid out, but not drawn.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(Figure, "savefig", lambda _, path, **options: path.touch()),
    ):
        redraw(source, Path(folder))
        fresh = {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.suffix in (".md", ".csv")}
    return [name for name, content in fresh.items() if (source / name).read_bytes() != content]


def seen_by_splits() -> pd.DataFrame | None:
    """What a token of each FlowHN model of that section can have seen after its last block, from the routes of its own config."""
    import torch

    from flowhn.config import build_model
    from flowhn.models.splits import BranchCost

    routes = {}
    for record in find_records(ROOT / "experiments" / "table1" / ACCURACY / "records"):
        if record.model != "flowhn" or record.cell in routes:
            continue
        with torch.device("meta"):
            blocks = build_model(record.config).layers
        cost = BranchCost(blocks[0].attention.flops, blocks[0].ssm.flops)
        routes[record.cell] = [blocks[0].split(record.seq_len, layer, cost) for layer in range(len(blocks))]
    if not routes:
        return None
    frame = reach_table({cell: routes[cell] for cell in in_order(routes)})
    return frame[frame["blocks"] == frame.groupby("cell")["blocks"].transform("max")]


def readme() -> tuple[str, str]:
    """The README as it is and as it should be."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    gap = yaml.safe_load((ROOT / "configs" / "artefacts" / "beyond.yaml").read_text(encoding="utf-8"))["gap"]
    parts = (
        (BEGIN, END, block()),
        (ABLATIONS_BEGIN, ABLATIONS_END, ablations_block()),
        (ACCURACY_BEGIN, ACCURACY_END, accuracy_block(ROOT / "experiments", ACCURACY, gap=gap, seen=seen_by_splits())),
    )
    new = text
    for begin, end, content in parts:
        head, rest = new.split(begin)
        _, tail = rest.split(end)
        new = f"{head}{begin}\n{content}\n{end}{tail}"
    return text, new


def main() -> int:
    """Write, or check and say what is stale."""
    if "--check" in sys.argv[1:]:
        found = [f"{source.relative_to(ROOT)}/{name}" for source in all_settings() for name in stale(source)]
        found += [
            f"{folder.relative_to(ROOT)}/{README}"
            for folder in ablations()
            if not (folder / README).is_file() or (folder / README).read_text(encoding="utf-8") != readme_of(folder)
        ]
        old, new = readme()
        found += ["README.md"] if old != new else []
        old, new = figure4_readme()
        found += ["experiments/figure4/README.md"] if old != new else []
        for name in found:
            print(f"{name} is not what the committed records give; run scripts/refresh_experiments.py")
        return int(bool(found))
    for source in all_settings():
        redraw(source, source)
    for folder in ablations():
        (folder / README).write_text(readme_of(folder), encoding="utf-8")
    (ROOT / "README.md").write_text(readme()[1], encoding="utf-8")
    (FIGURE4 / "README.md").write_text(figure4_readme()[1], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
