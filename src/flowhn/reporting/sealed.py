"""JSON records with a schema's name and a hash of their content, for everything that is not a training run's record."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowhn.errors import UserError


def write_sealed(path: Path, content: Mapping[str, Any], *, schema: str) -> None:
    """Write a record atomically, with the hash that :func:`read_sealed` checks."""
    content = {"schema": schema, **content}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_sealed(path: Path, *, schema: str) -> dict[str, Any]:
    """Read and check a record.

    Raises:
        UserError: it is missing, not JSON, of another schema, or was edited.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        told = content.pop("sha256")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"the record {path} cannot be read ({error}); delete it to measure again") from error
    if content.get("schema") != schema or told != _digest(content):
        raise UserError(f"the record {path} was edited or is of another schema; delete it to measure again")
    return content


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
