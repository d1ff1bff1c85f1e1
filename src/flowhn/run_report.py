"""``./reproduce.sh report``: one HTML page of the committed experiments and of this machine's outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

from flowhn.artefacts import Artefact, artefact_files, load_artefact
from flowhn.config import config_dir
from flowhn.errors import UserError

if TYPE_CHECKING:
    from flowhn.reporting.report import Source

NAME = "report"
TITLE = "One HTML page of all tables, figures and records, committed and local"


def make_report(overrides: Sequence[str]) -> Path:
    """Write ``<output_dir>/report.html`` and return its path.

    Raises:
        UserError: an override other than ``output_dir=``; there is nothing to show.
    """
    from flowhn.reporting.report import write_report

    path = _path(overrides)
    return write_report(_found(path), path)


def plan_report(overrides: Sequence[str]) -> str:
    """What :func:`make_report` would write, as text.

    Raises:
        UserError: an override other than ``output_dir=``.
    """
    path = _path(overrides)
    found = [source.folder.as_posix() for source in _found(path)]
    return "\n".join([f"{NAME}: would write {path} from {len(found)} folders", *(f"  {folder}" for folder in found)])


def _path(overrides: Sequence[str]) -> Path:
    for word in overrides:
        if not word.startswith("output_dir="):
            raise UserError(f"{word} has no meaning for {NAME}, which shows what is there; only output_dir= can be set")
    return Path(next((word.partition("=")[2] for word in overrides), "outputs")) / f"{NAME}.html"


def _found(path: Path) -> list[Source]:
    """The committed folders, then those beside the page."""
    return [*_sources(Path("experiments"), committed=True), *_sources(path.parent, committed=False)]


def _sources(root: Path, committed: bool) -> Iterator[Source]:
    """Everything with a table below ``experiments/`` or ``outputs/``: Table 1 first, then the others, then benchmarks."""
    from flowhn.reporting.report import Source

    for name in sorted(artefact_files(), key=lambda name: (name != "table1", name)):
        artefact = load_artefact(name)
        for folder in _tables(root / name):
            yield Source(
                folder=folder,
                artefact=name,
                title=artefact.title,
                about=_about(artefact, folder),
                committed=committed,
            )
    for folder in _tables(root / "bench"):
        case = config_dir() / "bench" / f"{folder.name}.yaml"
        title = OmegaConf.load(case).title if case.is_file() else folder.name
        yield Source(
            folder=folder,
            artefact="bench",
            title=title,
            committed=committed,
        )


def _tables(folder: Path) -> list[Path]:
    return [path.parent for path in sorted(folder.glob("*/table.md"))]


def _about(artefact: Artefact, folder: Path) -> dict[str, str]:
    about = {"Question": artefact.question} if artefact.question else {}
    about["The paper"] = artefact.claim
    if artefact.question:
        from flowhn.reporting.ablations import ABLATIONS

        ablation = ABLATIONS[artefact.name]
        about["Answer"] = ablation.answer(ablation.table(folder))
        about["How far this goes"] = ablation.limits
    return about
