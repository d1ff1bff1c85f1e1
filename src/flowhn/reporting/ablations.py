"""The ablations: for each artefact a table, a figure and an answer, all from the records of one folder.

A folder ``experiments/<artefact>/<setting>/`` holds ``records/*.json``; those of ``scaling_*`` are benchmark records, and
``scaling_size`` has ``counts.json`` (parameters and FLOPs of all sizes) beside them. ``command.txt`` is what made it.
:data:`ABLATIONS` maps an artefact's name to its functions; a notebook or a report calls ``ABLATIONS[name].table(folder)`` and
``.figure(frame)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from flowhn.errors import UserError
from flowhn.reporting import ablation_answers as answers
from flowhn.reporting import ablation_figures as figures
from flowhn.reporting import ablation_tables as tables
from flowhn.reporting import scaling
from flowhn.reporting.tables import write_table

TABLE, FIGURE, README = "table", "figure.png", "README.md"
COMMAND = "command.txt"  # what made the setting: one line that can be given again


@dataclass(frozen=True)
class Ablation:
    """How an artefact's records become a table, a figure and two sentences.

    ``table(folder)`` reads ``folder/records``; ``figure(frame, path=None)`` draws that table and writes it where a path is
    given; ``answer(frame)`` says in two sentences what the numbers are, ``scale(frame)`` in one what they were made from;
    ``limits`` is what they cannot say.
    """

    table: Callable[[Path], pd.DataFrame]
    figure: Callable[..., Figure]
    answer: Callable[[pd.DataFrame], str]
    limits: str
    scale: Callable[[pd.DataFrame], str] = tables.scale


ABLATIONS: dict[str, Ablation] = {
    "ablation_split": Ablation(tables.split_table, figures.split_figure, answers.split_answer, answers.SPLIT_LIMITS),
    "ablation_fusion": Ablation(
        tables.fusion_table, figures.fusion_figure, answers.fusion_answer, answers.FUSION_LIMITS
    ),
    "ablation_ratio": Ablation(tables.ratio_table, figures.ratio_figure, answers.ratio_answer, answers.RATIO_LIMITS),
    "ablation_ssm": Ablation(tables.ssm_table, figures.ssm_figure, answers.ssm_answer, answers.SSM_LIMITS),
    "ablation_balance": Ablation(
        tables.balance_table, figures.balance_figure, answers.balance_answer, answers.BALANCE_LIMITS
    ),
    "ablation_depth": Ablation(tables.depth_table, figures.depth_figure, answers.depth_answer, answers.DEPTH_LIMITS),
    "scaling_size": Ablation(
        scaling.size_table, scaling.size_figure, scaling.size_answer, scaling.SIZE_LIMITS, scaling.scale
    ),
    "scaling_length": Ablation(
        scaling.length_table, scaling.length_figure, scaling.length_answer, scaling.LENGTH_LIMITS, scaling.scale
    ),
}


def settings(folder: Path) -> list[Path]:
    """The settings (subfolders with records) of an artefact's folder, sorted by name."""
    return [path.parent for path in sorted(Path(folder).glob("*/records")) if any(path.glob("*.json"))]


def write_ablation(name: str, folder: Path, *, title: str, command: str) -> list[Path]:
    """Write ``table.md``, ``table.csv``, ``figure.png`` and ``command.txt`` of one setting from ``folder/records``.

    Returns:
        The paths.

    Raises:
        UserError: the folder has no records, or they cannot make one table.
    """
    ablation = ABLATIONS[name]
    frame = ablation.table(folder)
    written = list(write_table(tables.readable(frame), folder, title=title, notes=tables.notes(frame), full=frame))
    (folder / COMMAND).write_text(f"{command}\n", encoding="utf-8")
    figure = folder / FIGURE
    try:
        ablation.figure(frame, figure)
    except UserError as error:  # too short to have the numbers: no picture that contradicts the table
        figure.unlink(missing_ok=True)
        written += write_table(
            tables.readable(frame),
            folder,
            title=title,
            notes=[*tables.notes(frame), f"No figure: {error}."],
            full=frame,
        )
    else:
        written.append(figure)
    return list(dict.fromkeys(written))


def overview(name: str, folder: Path, artefact: Mapping[str, Any]) -> str:
    """The text of an artefact's ``README.md``: question, then for each setting command, figure, answer and table.

    Args:
        artefact: its YAML; ``title``, ``question`` and ``claim`` are read.
    """
    ablation = ABLATIONS[name]
    claim = artefact["claim"]
    parts = [
        f"# {artefact['title']}",
        f"**Question.** {artefact['question']}",
        f"**The paper.** {claim[0].upper()}{claim[1:]}.",
    ]
    for setting in settings(folder):
        frame = ablation.table(setting)
        parts += [f"## {setting.name}", f"```bash\n{(setting / COMMAND).read_text(encoding='utf-8').strip()}\n```"]
        if (setting / FIGURE).is_file():
            parts.append(f"![{artefact['title']}]({setting.name}/{FIGURE})")
        parts += [
            f"**Answer.** {ablation.answer(frame)}",
            f"**How far this goes.** {ablation.scale(frame)} {ablation.limits}",
            f"Numbers: [table]({setting.name}/{TABLE}.md), [CSV]({setting.name}/{TABLE}.csv), [records]({setting.name}/records).",
        ]
    return "\n\n".join(parts) + "\n"


def write_overview(name: str, folder: Path, artefact: Mapping[str, Any]) -> Path:
    """Write :func:`overview` into the folder; returns the path."""
    path = Path(folder) / README
    path.write_text(overview(name, folder, artefact), encoding="utf-8")
    return path
