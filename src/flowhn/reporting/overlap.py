"""What ``overlap.json`` beside a table says about training text and questions, as notes below the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flowhn.errors import UserError
from flowhn.reporting.style import task_name

FILE_NAME = "overlap.json"


def overlap_notes(folder: Path) -> list[str]:
    """One sentence where the folder has the file, else nothing.

    Raises:
        UserError: the file is damaged.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        told = ", ".join(
            f"{task_name(task)} {one['overlapping']:,} of {_long_enough(one):,} ({_percent(one)})"
            for task, one in content["tasks"].items()
        )
        n, read = int(content["n"]), content.get("train")  # files of older versions do not say what was read
        where = "" if read is None else f" ({read['documents']:,} documents, {read['words']:,} words, {_files(read)})"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); delete it and run again") from error
    short = sum(one.get("short", 0) for one in content["tasks"].values())
    rest = f" {short:,} questions are shorter than that and not counted." if short else ""
    return [f"Questions of which at least one run of {n} words stands in the training text{where}: {told}.{rest}"]


def _files(read: dict[str, Any]) -> str:
    names = [str(name) for name in read["files"]]
    return ", ".join(names) if len(names) <= 4 else f"{len(names)} files from {names[0]} to {names[-1]}"


def _long_enough(one: dict[str, int]) -> int:
    return one["questions"] - one.get("short", 0)


def _percent(one: dict[str, int]) -> str:
    return f"{100 * one['overlapping'] / _long_enough(one):.1f} %" if _long_enough(one) else "none asked"
