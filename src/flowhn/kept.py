"""``--keep``: an artefact's folder, copied to ``experiments/`` without losing a record that lies there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from flowhn.errors import UserError

_LONGEST_LIST = 6


def keep_folder(folder: Path, kept: Path) -> None:
    """Put a copy of ``folder`` in the place of ``kept``; a reader finds the old one or the new one.

    Raises:
        UserError: ``kept`` has records (or other JSON, such as counts) that ``folder`` lacks; nothing is changed.
    """
    there = sorted(path.relative_to(kept).as_posix() for path in kept.rglob("*.json"))
    lost = [name for name in there if not (folder / name).is_file()]
    if lost:
        shown = ", ".join(lost[:_LONGEST_LIST]) + (", ..." if len(lost) > _LONGEST_LIST else "")
        raise UserError(
            f"--keep would delete {len(lost)} of {len(there)} records in {kept} that {folder} lacks ({shown}); make these rows "
            "too (the same command without models=), or move that folder away first"
        )
    kept.parent.mkdir(parents=True, exist_ok=True)
    new, old = (kept.with_name(f".{kept.name}.{os.getpid()}.{what}") for what in ("new", "old"))
    shutil.copytree(folder, new)
    if kept.exists():
        os.replace(kept, old)
    os.replace(new, kept)
    shutil.rmtree(old, ignore_errors=True)
