"""The record of a run: one JSON file with what was run, on what, and what came out. Tables are built from these alone.

Standard library only, so that ``flowhn-reproduce`` can tell within a second which runs exist.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import subprocess
import tempfile
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from flowhn.errors import UserError

SCHEMA_VERSION = 1
_PACKAGES = ("torch", "lightning", "hydra-core", "datasets", "tokenizers", "transformers", "torchdata", "lm-eval",
             "mamba-ssm", "causal-conv1d", "flash-attn", "triton", "numpy")  # fmt: skip


@dataclass(kw_only=True)
class RunRecord:
    """One run. ``tokens`` and ``tps`` count all devices; losses are nats per token; times are seconds, memory bytes.

    ``losses.train`` holds ``[tokens, loss]``, ``losses.val`` ``[tokens, loss, seconds of training]``; ``throughput.mfu`` is a
    share (0 to 1) or null where the device's peak is unknown; unknown figures are null throughout.
    """

    run_id: str
    artefact: str | None
    cell: str
    model: str
    size: str
    seed: int
    status: str
    created: str
    config: dict[str, Any]
    git: dict[str, Any]
    versions: dict[str, Any]
    device: dict[str, Any]
    kernels: dict[str, Any]
    parameters: int
    tokens: int
    steps: int
    seq_len: int
    global_batch_tokens: int
    data: dict[str, Any]
    losses: dict[str, Any]
    throughput: dict[str, Any]
    memory: dict[str, Any]
    evaluation: dict[str, Any]
    wall_seconds: dict[str, Any]
    resumed: int
    schema_version: int = field(default=SCHEMA_VERSION)


def config_hash(config: Any) -> str:
    """First 12 hex digits of the SHA-256 of the canonical JSON."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def environment() -> dict[str, Any]:
    """``git`` (commit, dirty) of the checkout that the package runs from, and ``versions`` of Python and the packages."""
    return {"git": _git(), "versions": _versions()}


def write_record(path: Path, record: RunRecord) -> None:
    """Write atomically: a reader finds the old file, the new one or none. NaN and infinities become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = _finite(asdict(record))
    content["sha256"] = _digest(content)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_record(path: Path) -> RunRecord:
    """Read and check a record.

    Raises:
        UserError: it is missing, half-written, edited, of a newer schema, or lacks a field.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"there is no record {path}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"the record {path} cannot be read ({error}); delete it to run again") from error
    if not isinstance(content, dict):
        raise UserError(f"the record {path} is not a run record; delete it to run again")
    if not isinstance(content.get("schema_version"), int) or content["schema_version"] > SCHEMA_VERSION:
        raise UserError(f"the record {path} has schema_version {content.get('schema_version')}; this flowhn reads {SCHEMA_VERSION}")
    told = content.pop("sha256", None)
    if told != _digest(content):
        raise UserError(f"the record {path} was edited after it was written (sha256 differs); delete it to run again")
    missing = [f.name for f in fields(RunRecord) if f.name not in content]
    if missing:
        raise UserError(f"the record {path} lacks {missing[0]}; delete it to run again")
    return RunRecord(**{f.name: content[f.name] for f in fields(RunRecord)})


def find_records(root: Path) -> list[RunRecord]:
    """All records below a folder, sorted by path."""
    return [read_record(path) for path in sorted(root.rglob("*.json")) if path.name == "record.json" or path.parent.name == "records"]


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _git() -> dict[str, Any]:
    here = Path(__file__).resolve().parent

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    commit, status = ask("rev-parse", "HEAD"), ask("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if commit is None else bool(status)}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("flowhn", *_PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
