"""What lies in a run's folder, and how it gets there: configuration, weights, tokenizer.

Files are written under another name, flushed to disk and renamed, so that a reader finds the old one or the new one, never
half of it, after a power cut too: the checkpoints are deleted when the last of them is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from flowhn.errors import UserError
from flowhn.reporting.record import sync_folder

RECORD_NAME = "record.json"
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
TRAINED_NAME = "trained.json"  # training is done, the evaluation is not
HASHES = ("tokenizer_sha256", "weights_sha256")  # in config.json, once training is done


def save_weights(model: Any, folder: Path) -> None:
    """Write the network's weights as safetensors.

    Raises:
        UserError: the disk is full or not writable; nothing is left behind.
    """
    save_tensors(model.state_dict(), folder / WEIGHTS_NAME)


def save_tensors(tensors: Mapping[str, Any], path: Path) -> None:
    """Write tensors as one safetensors file.

    Raises:
        UserError: the disk is full or not writable; nothing is left behind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        save_file(weights, temporary, metadata={"format": "pt"})
        sync(temporary)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path} cannot be written ({error}); free some space or set output_dir= elsewhere and run again"
        ) from error
    os.replace(temporary, path)
    sync(path.parent)


def copy_tokenizer(prepared: Any, folder: Path) -> None:
    """Put the tokenizer of prepared data beside the weights; random tokens have none."""
    source = prepared.tokenizer_file
    if source is None:
        return
    target = folder / source.name
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True)
    else:
        shutil.copyfile(source, target)
    for path in (target, *target.rglob("*")):
        sync(path)


def sync(path: Path) -> None:
    """Flush a file, or what a folder lists, to disk.

    Raises:
        OSError: the disk refused a file's content.
    """
    if path.is_dir():
        sync_folder(path)
    else:
        with path.open("r+b") as file:
            os.fsync(file.fileno())


def describe_run(run: Any, **hashes: str | None) -> None:
    """Write ``config.json`` of a :class:`~flowhn.runs.Run`: its id, name, configuration and, of a trained one, ``HASHES``.

    Without ``hashes`` those of a training that is done stay: they are all that tells damaged weights from whole ones.
    """
    if not hashes and (run.folder / TRAINED_NAME).is_file():
        hashes = stored_hashes(run.folder)
    write_json(run.folder / CONFIG_NAME, {"run_id": run.run_id, "name": run.name, "config": run.config} | hashes)


def stored_hashes(folder: Path) -> dict[str, str | None]:
    """Those of ``HASHES`` that a run's ``config.json`` tells; none where it cannot be read."""
    try:
        content = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        return {key: content[key] for key in HASHES if key in content}
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_hash(folder: Path) -> str | None:
    """SHA-256 over the files of a run's tokenizer, None where it has none; another tokenizer would give other tokens."""
    from flowhn.data.prepared import TOKENIZER_NAMES

    place = next((folder / name for name in TOKENIZER_NAMES if (folder / name).exists()), None)
    if place is None:
        return None
    digest = hashlib.sha256()
    for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that a reader finds the old file or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
