"""Checkpoints of sharded training on disk: a folder with one file for each process (torch.distributed.checkpoint).

``step-00000120.ckpt/`` holds ``__<rank>_0.distcp`` (tensors), ``.metadata`` (where each piece lies) and ``rest.pt`` (step,
schedule, callbacks: plain values). It is written as ``step-00000120.ckpt.tmp/``, flushed and renamed; its manifest, beside
it as for a single file, has the size and the SHA-256 of each file. Every tensor has the same name for any number of
devices, so that another number can go on from it.

torch reads ``.metadata`` with pickle; here only the classes that belong in it are let through.
"""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from flowhn.errors import UserError
from flowhn.reporting.record import sync_folder
from flowhn.training.checkpoints import STATE_KEY, sha256_of, write_json_durably
from flowhn.training.lit_lm import check_same_shapes

REST_NAME = "rest.pt"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
        "BytesStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath", "Path"},
}  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    """Reads nothing but what :class:`torch.distributed.checkpoint.Metadata` is made of."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")


class SafeReader(dcp.FileSystemReader):
    """torch's reader with the metadata read through :class:`_MetadataUnpickler`; tensors are read with ``weights_only``."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The folder's metadata.

        Raises:
            UserError: it is damaged, or holds anything but the description of tensors.
        """
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
            described = metadata.state_dict_metadata
            if not all(isinstance(value, TensorStorageMetadata) for value in described.values()):
                raise pickle.UnpicklingError("it holds more than tensors")
        except (pickle.UnpicklingError, EOFError, OSError, AttributeError, ValueError, TypeError, IndexError) as error:
            raise UserError(f"the checkpoint {path.parent} does not hold plain tensors ({error}); delete it") from error
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def save_sharded(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint dictionary of :class:`~flowhn.training.sharded.ShardedStrategy`; all processes together.

    Raises:
        CheckpointException: a process could not write its share.
    """
    rest = dict(checkpoint)
    weights, states = rest.pop("state_dict"), rest.pop("optimizer_states", [])
    tensors: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in weights.items()}
    for name, state in states[0]["state"].items() if states else ():
        tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
    rest["param_groups"] = states[0]["param_groups"] if states else []
    temporary = path.with_name(path.name + ".tmp")
    first = dist.get_rank() == 0
    _together(lambda: _make_room(path, temporary) if first else None)
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(temporary, single_file_per_rank=True, sync_files=True))
    rank = dist.get_rank()
    own = {file.name: _about(file) for file in temporary.glob(f"__{rank}_*.distcp")}
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    _together(lambda: _finish(path, temporary, rest, gathered) if first else None)


def _together(action: Callable[[], Any]) -> None:
    """Do it on the first process; a failure there is raised in all of them."""
    error: OSError | None = None
    try:
        action()
    except OSError as caught:
        error = caught
    told = [None if error is None else (error.errno, error.strerror)]
    dist.broadcast_object_list(told, src=0)
    if told[0] is not None:
        raise dcp.CheckpointException("the checkpoint cannot be written", {0: (OSError(*told[0]), None)})


def _make_room(path: Path, temporary: Path) -> None:
    path.with_suffix(".json").unlink(missing_ok=True)  # an old manifest must not vouch for the new folder
    for old in (temporary, path):
        shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)
    temporary.mkdir(parents=True)


def _finish(path: Path, temporary: Path, rest: dict[str, Any], gathered: list[dict[str, Any]]) -> None:
    with (temporary / REST_NAME).open("wb") as file:
        torch.save(rest, file)
        file.flush()
        os.fsync(file.fileno())
    files = {name: about for own in gathered for name, about in own.items()}
    files |= {name: _about(temporary / name) for name in (REST_NAME, ".metadata")}
    sync_folder(temporary)
    os.replace(temporary, path)
    sync_folder(path.parent)
    own = rest.get(STATE_KEY, {})
    manifest = {key: own.get(key) for key in ("step", "samples_seen", "run_id")}
    write_json_durably(path.with_suffix(".json"), manifest | {"files": files})


def _about(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def moments(parameter: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a parameter before its first step, sharded like it."""
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"step": step} | {key: torch.zeros_like(parameter.detach()) for key in _MOMENTS}


def _rest(path: Path) -> dict[str, Any]:
    try:
        rest = torch.load(path / REST_NAME, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, OSError) as error:
        raise UserError(f"the checkpoint {path} does not hold plain tensors and numbers; delete it") from error
    if not isinstance(rest, dict) or "param_groups" not in rest:
        raise UserError(f"the checkpoint {path} was not written by flowhn; move it away")
    return rest


def load_into(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Read each process's share of a folder that any number of processes wrote; returns the rest of the checkpoint.

    Raises:
        UserError: damaged, or of another model.
    """
    rest, reader = _rest(path), SafeReader(path)
    described = reader.read_metadata().state_dict_metadata
    own = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    _compare(path, described, own)
    names = {name: parameter for name, parameter in model.named_parameters()}
    states = {name: moments(p) for name, p in names.items() if f"optimizer.{name}.step" in described}
    flat = {f"optimizer.{name}.{key}": value for name, state in states.items() for key, value in state.items()}
    dcp.load(own | flat, storage_reader=reader)
    for name, state in states.items():
        optimizer.state[names[name]] = state
    for mine, theirs in zip(optimizer.param_groups, rest["param_groups"], strict=True):
        mine.update({key: value for key, value in theirs.items() if key != "params"})
    return {key: value for key, value in rest.items() if key != "param_groups"}


def _compare(path: Path, described: dict[str, Any], own: dict[str, Tensor]) -> None:
    prefix = "model."
    theirs = {name.removeprefix(prefix): tuple(d.size) for name, d in described.items() if name.startswith(prefix)}
    mine = {name.removeprefix(prefix): tuple(tensor.shape) for name, tensor in own.items()}
    check_same_shapes(theirs, mine, what=f"the checkpoint {path}")


def _whole(path: Path, prefix: str) -> dict[str, Tensor]:
    """Tensors whose names begin with ``prefix``, whole, on the CPU, in this process alone."""
    reader = SafeReader(path)
    found = {
        name: torch.empty(about.size, dtype=about.properties.dtype)
        for name, about in reader.read_metadata().state_dict_metadata.items()
        if name.startswith(prefix)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*intent is to load in a single process.*")
        dcp.load(found, storage_reader=reader, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


def read_weights(path: Path) -> dict[str, Tensor]:
    """The whole weights of a sharded checkpoint, by their names in the LightningModule (``net.embedding.weight``)."""
    return _whole(path, "model.")


def read_plain(path: Path) -> dict[str, Any]:
    """A sharded checkpoint as the dictionary that a single process would have written.

    Raises:
        UserError: damaged, or holding more than tensors and plain values.
    """
    rest = _rest(path)
    groups, tensors = rest.pop("param_groups"), _whole(path, "optimizer.")
    state: dict[int, dict[str, Tensor]] = {}
    number, plain = 0, []
    for group in groups:
        numbers = range(number, number + len(group["params"]))
        for index, name in zip(numbers, group["params"], strict=True):
            own = {key: tensors[f"{name}.{key}"] for key in ("step", *_MOMENTS) if f"{name}.{key}" in tensors}
            if own:
                state[index] = own
        plain.append({**group, "params": list(numbers)})
        number += len(group["params"])
    return rest | {"state_dict": read_weights(path), "optimizer_states": [{"state": state, "param_groups": plain}]}
