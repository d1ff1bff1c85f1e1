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
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from flowhn.errors import UserError

SCHEMA_VERSION = 1
MAX_TRAIN_POINTS = (
    10_000  # of a run's training curve, in its record and in metrics.csv, which is then about 1 MB at most
)
_PACKAGES = ("flowhn", "torch", "lightning", "hydra-core", "datasets", "tokenizers", "transformers", "torchdata",
             "lm-eval", "mamba-ssm", "causal-conv1d", "flash-attn", "triton", "numpy")  # fmt: skip


@dataclass(kw_only=True)
class RunRecord:
    """One run. ``tokens`` and ``tps`` count all devices; losses are nats per token; times are seconds, memory bytes.

    ``losses.train`` holds ``[tokens, loss]``, ``losses.val`` ``[tokens, loss, seconds of training]``;
    ``throughput.mfu`` is a share (0 to 1) or null where the device's peak is unknown; ``evaluation.tasks`` holds shares
    (0 to 1), and optionally ``correct``: per metric a string of 0 and 1, one per question. Unknown figures are null.
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
    """First 12 hex digits of the SHA-256 of the canonical JSON (keys sorted, no spaces, ASCII)."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def environment() -> dict[str, Any]:
    """``git`` (commit, dirty) of the checkout the package runs from, and ``versions`` of Python, platform and packages.

    Nothing is read from environment variables. ``git`` is null where git is missing or the package is not run from its
    own checkout; ``dirty`` looks at ``src`` and ``configs``, the files that decide a result.
    """
    return {"git": _git(), "versions": _versions()}


def write_record(path: Path, record: RunRecord) -> None:
    """Write atomically: a reader finds the old file, the new one or none. NaN and infinities become null.

    Raises:
        UserError: a field has a type that :func:`read_record` would refuse.
        OSError: the disk refused; the old file is untouched.
    """
    path = Path(path)
    content = _canonical(asdict(record))
    _check(content, path)
    content["sha256"] = _digest(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp gives 0600, which would lock out other users of a shared folder
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def read_record(path: Path) -> RunRecord:
    """Read and check a record.

    Raises:
        UserError: it is missing, half-written, edited, of another schema, lacks a field or has one of a wrong type.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise UserError(f"there is no record {path}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"the record {path} cannot be read ({error}); delete it to run again") from error
    if not isinstance(content, dict):
        raise UserError(f"the record {path} is not a run record; delete it to run again")
    version = content.get("schema_version")
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
        raise UserError(
            f"the record {path} has schema_version {version!r} and this flowhn reads {SCHEMA_VERSION}; install a newer "
            "flowhn, or delete the record to run again"
        )
    told = content.pop("sha256", None)
    _check(content, path)
    if told != _digest(content):
        raise UserError(f"the record {path} was edited after it was written (sha256 differs); delete it to run again")
    return RunRecord(**{f.name: content[f.name] for f in fields(RunRecord)})


def find_records(root: Path, skip_broken: bool = False) -> list[RunRecord]:
    """All records below a folder, sorted by path: files named ``record.json``, and JSON files in folders ``records``.

    Args:
        root: the folder; one that does not exist has no records.
        skip_broken: leave out records that :func:`read_record` refuses, instead of raising its UserError.
    """
    found = []
    for path in sorted(Path(root).rglob("*.json")):
        if path.name.startswith(".") or not (path.name == "record.json" or path.parent.name == "records"):
            continue
        try:
            found.append(read_record(path))
        except UserError:
            if not skip_broken:
                raise
    return found


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_points(width: int) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        return isinstance(value, list) and all(
            isinstance(point, list)
            and len(point) == width
            and _is_number(point[0])
            and all(part is None or _is_number(part) for part in point[1:])
            for point in value
        )

    return check


def _or_null(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "str": (lambda value: isinstance(value, str), "a text"),
    "str | None": (_or_null(lambda value: isinstance(value, str)), "a text or null"),
    "int": (_is_int, "a whole number"),
    "dict[str, Any]": (lambda value: isinstance(value, dict), "an object"),
}
# What tables and figures read from inside the objects: (object, key) -> check, what it should be. All must be there.
_INNER: dict[tuple[str, str], tuple[Callable[[Any], bool], str]] = {
    ("device", "type"): (lambda value: isinstance(value, str), "a text"),
    ("device", "name"): (_or_null(lambda value: isinstance(value, str)), "a text or null"),
    ("losses", "train"): (_is_points(2), "a list of [tokens, loss]"),
    ("losses", "val"): (_is_points(3), "a list of [tokens, loss, seconds]"),
    ("losses", "final_val"): (_or_null(_is_number), "a number or null"),
    ("losses", "unigram_entropy"): (_or_null(_is_number), "a number or null"),
    ("throughput", "tps"): (_or_null(_is_number), "a number or null"),
    ("throughput", "mfu"): (_or_null(_is_number), "a number or null"),
    ("throughput", "flops_per_token"): (_or_null(_is_number), "a number or null"),
    ("evaluation", "tasks"): (lambda value: isinstance(value, dict), "an object"),
}
_TASK_NUMBERS = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "acc_mutual_info", "n", "chance")


def _check(content: Mapping[str, Any], path: Path) -> None:
    """Raise a UserError for the first field that is missing or of a wrong type."""

    def refuse(key: str, wanted: str) -> UserError:
        return UserError(f"the record {path} is broken: {key} must be {wanted}; delete it to run again")

    for item in fields(RunRecord):
        if item.name not in content:
            raise UserError(f"the record {path} lacks {item.name}; delete it to run again")
        check, wanted = _CHECKS[str(item.type)]
        if not check(content[item.name]):
            raise refuse(item.name, wanted)
    for (outer, key), (check, wanted) in _INNER.items():
        if key not in content[outer]:
            raise UserError(f"the record {path} lacks {outer}.{key}; delete it to run again")
        if not check(content[outer][key]):
            raise refuse(f"{outer}.{key}", wanted)
    for task, result in content["evaluation"]["tasks"].items():
        if not isinstance(result, dict):
            raise refuse(f"evaluation.tasks.{task}", "an object")
        for key in _TASK_NUMBERS:
            if result.get(key) is not None and not _is_number(result[key]):
                raise refuse(f"evaluation.tasks.{task}.{key}", "a number or null")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _canonical(content: Any) -> Any:
    """Only what JSON gives back unchanged: text keys, lists for tuples, null for NaN, numbers for array scalars."""
    return json.loads(json.dumps(_finite(content), default=str, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if not isinstance(value, bool | int | float | str | None) and hasattr(value, "item"):
        value = value.item()  # numpy and torch scalars, without importing either
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut. Windows cannot open folders, some network file systems refuse; both do without."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _git() -> dict[str, Any]:
    here = Path(__file__).resolve()
    # GIT_DIR and the like, set inside git's hooks, would point to another repository than the package's.
    clean = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here.parent), *words],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
                env=clean,
            )
        except (OSError, ValueError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    top = ask("rev-parse", "--show-toplevel")
    # An installed package may lie in the .venv of somebody else's repository: only a checkout's src/flowhn counts.
    if top is None or Path(top).resolve() != here.parents[3]:
        return {"commit": None, "dirty": None}
    commit, status = ask("rev-parse", "HEAD"), ask("status", "--porcelain", "--", ":/src", ":/configs")
    return {"commit": commit, "dirty": None if commit is None or status is None else bool(status)}


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
