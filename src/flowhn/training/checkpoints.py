"""Checkpoint files that are either whole or not there.

``step-00000120.ckpt`` is written to a temporary name in the same folder, flushed to disk and renamed; then, in the
same way, ``step-00000120.json``: its manifest with SHA-256, size, step and run id. A checkpoint counts only with a
manifest whose hash fits, so a file torn by a kill, a full disk or a failing one is recognised, named and skipped, and
the one before is used. Sharded training writes a folder of that name instead, whose manifest has a hash for each file.
Files are read with ``torch.load(weights_only=True)``: tensors and plain containers, nothing that could run code.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from flowhn.errors import UserError
from flowhn.reporting.record import sync_folder

STATE_KEY = "flowhn"  # our own part of a checkpoint: step, samples_seen, run_id, random states, ...
_PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "callbacks")  # of Lightning, that going on needs
_OWN_PARTS = ("step", "samples_seen", "run_id", "resumed", "wall_seconds", "random_state")
_NAME = re.compile(r"step-(\d+)\.ckpt")
_BLOCK = 1 << 22


@dataclass(frozen=True)
class CheckpointSearch:
    """A folder's newest whole checkpoint (None: there is none) and, newest first, the skipped ones with the reason."""

    path: Path | None
    manifest: dict[str, Any] = field(default_factory=dict)
    skipped: list[tuple[Path, str]] = field(default_factory=list)


def checkpoint_path(folder: Path, step: int) -> Path:
    """File of the checkpoint after optimiser step ``step``."""
    return folder / f"step-{step:08d}.ckpt"


def manifest_path(path: Path) -> Path:
    """The manifest beside a checkpoint file."""
    return path.with_suffix(".json")


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _steps(folder: Path) -> dict[int, Path]:
    found = {}
    if folder.is_dir():
        for path in folder.iterdir():
            if match := _NAME.fullmatch(path.name):
                found[int(match[1])] = path
    return dict(sorted(found.items(), reverse=True))


def _fault(path: Path) -> tuple[dict[str, Any], str | None]:
    """The manifest of a checkpoint and what is wrong with the pair; the reason is None when it is whole."""
    try:
        manifest = json.loads(manifest_path(path).read_text(encoding="utf-8"))
        files = manifest["files"] if path.is_dir() else {"": manifest}
        wanted = [(path / name if name else path, about["bytes"], about["sha256"]) for name, about in files.items()]
    except FileNotFoundError:
        return {}, "its manifest is missing, so writing it was interrupted"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return {}, f"its manifest cannot be read ({type(error).__name__})"
    for file, size, digest in wanted:
        what = "it" if file == path else f"its file {file.name}"
        try:
            if file.stat().st_size != size:
                return manifest, f"{what} has {file.stat().st_size} bytes instead of {size}"
            if sha256_of(file) != digest:
                return manifest, f"the content of {what} does not match its hash"
        except OSError as error:
            return manifest, f"{what} cannot be read ({error.strerror})"
    return manifest, None


def _lack(content: Any, *, sharded: bool = False) -> str | None:
    """What a read checkpoint lacks to go on from; None when it is all there."""
    if not isinstance(content, dict):
        return f"it holds a {type(content).__name__}, not what flowhn writes"
    own = content.get(STATE_KEY)
    if not isinstance(own, dict):
        return "it was not written by flowhn"
    missing = [key for key in _PARTS[2 if sharded else 0 :] if key not in content]
    missing += [key for key in _OWN_PARTS if key not in own]
    return f"it lacks {missing[0]}" if missing else None


def _content_fault(path: Path) -> str | None:
    """Whether a file with the right hash can be gone on from; its tensors are mapped and not read."""
    file = path / "rest.pt" if path.is_dir() else path
    try:
        return _lack(torch.load(file, map_location="cpu", weights_only=True, mmap=True), sharded=path.is_dir())
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError, AttributeError, TypeError, OSError):
        return "it does not hold plain tensors and numbers"


def latest_valid_checkpoint(folder: Path, *, content: bool = False) -> CheckpointSearch:
    """Find the newest checkpoint of a folder whose hash fits.

    Args:
        folder: may be missing.
        content: it also has to hold plain tensors and what a run goes on from; it is opened for that.
    """
    skipped = []
    for path in _steps(folder).values():
        manifest, reason = _fault(path)
        if content and reason is None:
            reason = _content_fault(path)
        if reason is None:
            return CheckpointSearch(path, manifest, skipped)
        skipped.append((path, reason))
    return CheckpointSearch(None, {}, skipped)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The whole weights in a checkpoint, a file or a folder, after checking its hashes; optimiser states are not read.

    Raises:
        UserError: missing, torn, or holding anything but tensors and plain containers.
    """
    if path.is_dir():
        _refuse_torn(path)
        from flowhn.training.sharded_checkpoint import read_weights as read_sharded

        return read_sharded(path)
    return AtomicCheckpointIO().load_checkpoint(path)["state_dict"]


def _refuse_torn(path: Path) -> None:
    if not path.exists():
        raise UserError(f"the checkpoint {path} does not exist")
    _, reason = _fault(path)
    if reason is not None:
        raise UserError(f"the checkpoint {path} cannot be used: {reason}; delete it to go on from the one before")


def prune(folder: Path, *, newest: int, keep: int) -> None:
    """Keep the ``keep`` newest checkpoints up to step ``newest`` and delete every other, with what kills left behind.

    Steps above ``newest`` are files that were skipped when the run resumed before them.
    """
    steps = [step for step, path in _steps(folder).items() if step <= newest and manifest_path(path).exists()]
    names = {checkpoint_path(folder, step).stem for step in steps[:keep]}
    for path in folder.glob("step-*"):
        if path.name.split(".")[0] not in names or path.name.endswith(".tmp"):
            remove(path)


def remove(path: Path) -> None:
    """Delete a file or a folder that may be gone already."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


class _Watched:
    """A file that remembers the first failed write: torch's zip writer hides it behind a RuntimeError of its own."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self.file.flush()


def write_durably(path: Path, write: Any) -> None:
    """Call ``write(file)`` on a temporary file beside ``path``, flush it to disk and rename it to ``path``.

    Raises:
        UserError: no space, no permission, a read-only disk. Nothing is left behind and ``path`` is as before.
    """
    temporary = path.with_name(path.name + ".tmp")
    watched = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            watched = _Watched(file)
            write(watched)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        with suppress(OSError):
            temporary.unlink()
        cause = error if isinstance(error, OSError) else watched.error if watched else None
        if cause is None:
            raise
        raise space_error(path, cause) from error


def space_error(path: Path, cause: OSError) -> UserError:
    """The sentence for a checkpoint that could not be written."""
    full = cause.errno in (errno.ENOSPC, errno.EDQUOT)
    what = "no space is left on the disk" if full else cause.strerror or type(cause).__name__
    return UserError(f"{path} cannot be written: {what}; free space or set output_dir= to another disk")


def write_json_durably(path: Path, content: Mapping[str, Any]) -> None:
    """Write a small JSON file, atomically and flushed."""
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    write_durably(path, lambda file: file.write(text.encode()))


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's checkpoint plugin for the files described at the top of this module."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``path`` and its manifest.

        Raises:
            UserError: the disk is full or not writable; earlier checkpoints are untouched.
        """
        path = Path(path)
        with suppress(FileNotFoundError):  # an old manifest must not vouch for the new file
            manifest_path(path).unlink()
        if path.is_dir():  # of sharded training, which was stopped at the same step
            remove(path)
        write_durably(path, lambda file: torch.save(checkpoint, file))
        own = checkpoint.get(STATE_KEY, {})
        write_json_durably(
            manifest_path(path),
            {
                "sha256": sha256_of(path),
                "bytes": path.stat().st_size,
                "step": own.get("step"),
                "samples_seen": own.get("samples_seen"),
                "run_id": own.get("run_id"),
            },
        )

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint after checking its hash, always with ``weights_only=True`` and onto the CPU by default.

        Raises:
            UserError: missing, torn, or holding anything but tensors and plain containers.
        """
        path = Path(path)
        _refuse_torn(path)
        if path.is_dir():
            from flowhn.training.sharded_checkpoint import read_plain

            return read_plain(path)
        try:
            content = torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
            raise UserError(f"the checkpoint {path} does not hold plain tensors and numbers; delete it") from error
        if not isinstance(content, dict):
            raise UserError(f"the checkpoint {path} cannot be used: {_lack(content)}; move it away")
        return content

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint and its manifest."""
        for name in (manifest_path(Path(path)), Path(path)):
            remove(name)
