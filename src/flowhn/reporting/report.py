"""One self-contained HTML page of everything that has records: tables, figures, commands, and behind every number its record.

The page loads nothing: figures are data URIs, style and script stand in it, and its content security policy forbids the rest.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from flowhn.errors import UserError
from flowhn.reporting.record import environment
from flowhn.reporting.report_tables import PAPER_ANCHOR, render
from flowhn.reporting.style import long_name, size_name

TEMPLATE = "report.html.j2"
_RECORD_FOLDERS = ("records", "measurements", "evals")
_TABLES = ("table", "verdicts", "rates", "gap")
_LONGEST_LIST = 8  # entries of a list that the page shows of a record


@dataclass(frozen=True, kw_only=True)
class Source:
    """A folder that goes into the page.

    Attributes:
        folder: with ``table.md``, ``table.csv``, ``*.png``, ``records`` (or ``measurements``, ``evals``), and what makes it again
            in ``command.txt``.
        artefact: its name, as ``reproduce.sh`` takes it.
        title: for the heading.
        about: sentences before the table: question, the paper's claim, the answer.
        committed: whether it lies in ``experiments/``; else it is this machine's output.
    """

    folder: Path
    artefact: str
    title: str
    about: Mapping[str, str] = field(default_factory=dict)
    committed: bool = True


def write_report(sources: Sequence[Source], path: Path) -> Path:
    """Write the page.

    Raises:
        UserError: there is nothing to show, or a record cannot be read.
    """
    if not sources:
        raise UserError(
            "there is nothing to report: no experiments/ and no outputs/ with a table; run ./reproduce.sh first"
        )
    sections = [_section(number, source) for number, source in enumerate(sources)]
    jinja = Environment(
        loader=PackageLoader("flowhn.reporting"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    text = jinja.get_template(TEMPLATE).render(
        sections=sections,
        paper_anchor=PAPER_ANCHOR,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        commit=(environment()["git"]["commit"] or "unknown")[:7],
        n_records=sum(len(section["records"]) for section in sections),
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


def _section(number: int, source: Source) -> dict[str, Any]:
    records = _records(source.folder, f"s{number}")
    tables = []
    for name in _TABLES:
        path = source.folder / f"{name}.md"
        if path.is_file():
            links = _links(source.folder, name, records)
            text = path.read_text(encoding="utf-8")
            tables.append(render(text, links, f"s{number}-records", drop_title=name == "table"))
    command = source.folder / "command.txt"
    return {
        "id": f"s{number}",
        "title": source.title,
        "setting": source.folder.name,
        "artefact": source.artefact,
        "committed": source.committed,
        "about": dict(source.about),
        "command": command.read_text(encoding="utf-8").strip() if command.is_file() else None,
        "tables": tables,
        "figures": [_figure(path) for path in sorted(source.folder.glob("*.png"))],
        "records": records,
        "path": source.folder.as_posix(),
    }


def _figure(path: Path) -> dict[str, Any]:
    """A picture as a data URI, with its size: the page keeps its place, so that a link to a record lands where it should."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    with Image.open(path) as picture:
        width, height = picture.size
    return {
        "name": path.stem.replace("_", " "),
        "uri": f"data:image/png;base64,{data}",
        "width": width,
        "height": height,
    }


def _records(folder: Path, prefix: str) -> list[dict[str, Any]]:
    """What the page says of each record: an anchor, a line, the facts a reader asks for, and the JSON, long lists cut."""
    paths = [path for name in _RECORD_FOLDERS for path in sorted((folder / name).glob("*.json"))]
    found = []
    for number, path in enumerate(paths):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            cell, device, git = str(content["cell"]), content["device"], content["git"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"the record {path} cannot be read ({error}); delete it and make its table again"
            ) from error
        commit = (git["commit"] or "unknown")[:7] + (" (with changes)" if git["dirty"] else "")
        versions = content.get("versions", {})
        facts = {
            "file": path.as_posix(),
            "cell": cell,
            "size, seed": f"{size_name(str(content.get('size')))}, {content.get('seed', content.get('repeat'))}",
            "status": str(content.get("status", "done")),
            "measured": str(content.get("created")),
            "commit": commit,
            "device": f"{device.get('name') or device.get('type')} ({device.get('type')}, {device.get('count')})",
            "software": ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "lightning") if name in versions),
            "run id": str(content.get("run_id", "–")),
            "sha256": str(content.get("sha256", "–")),
        }  # fmt: skip
        found.append(
            {
                "id": f"{prefix}-r{number}",
                "cell": cell,
                "name": long_name(cell),
                "line": f"{long_name(cell)}, {facts['device']}, commit {commit}, {facts['measured'][:10]}",
                "facts": facts,
                "json": json.dumps(_shortened(content), indent=1, ensure_ascii=False),
            }
        )
    return found


def _shortened(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _shortened(item) for key, item in value.items()}
    if isinstance(value, list):
        shown = [_shortened(item) for item in value[:_LONGEST_LIST]]
        return [*shown, f"... {len(value) - len(shown)} more in the file"] if len(value) > len(shown) else shown
    return value


def _links(folder: Path, name: str, records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Where a table's rows come from: by number of the row (from the CSV's cells) and by the name in its first column."""
    anchors: dict[str, str] = {}
    for record in records:
        anchors.setdefault(record["cell"], record["id"])
    rows: list[str | None] = []
    csv = folder / f"{name}.csv"
    if csv.is_file():
        frame = pd.read_csv(csv)
        column = next((column for column in ("cell", "first") if column in frame), None)
        if column:
            rows = [anchors.get(str(cell)) for cell in frame[column]]
    names = {record["name"]: anchors[record["cell"]] for record in records} | anchors
    return {"rows": rows, "names": names}
