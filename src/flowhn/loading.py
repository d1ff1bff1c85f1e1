"""Finished runs back from disk: the configuration, the network with its weights, the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flowhn.config import build_model, check_resolved, check_targets
from flowhn.data.prepared import TOKENIZER_NAMES
from flowhn.data.tokenization import TextTokenizer, open_tokenizer
from flowhn.errors import UserError
from flowhn.models import CausalLM
from flowhn.own_classes import look_here
from flowhn.run_folder import CONFIG_NAME, WEIGHTS_NAME, file_sha256, tokenizer_hash

EXPORTED_TYPE = "flowhn"  # model_type in the config.json of a folder that flowhn-export wrote
_EXPORTED_PREFIX = "net."  # of the weights' names there
_NEEDED = ("model", "vocab_size", "seq_len", "data", "eval", "choices")  # what loading, evaluation and export read


@dataclass(frozen=True)
class LoadedRun:
    """A finished run: ``folder``, resolved ``config``, ``model`` (eval mode, fp32), ``tokenizer`` (None for random tokens)."""

    folder: Path
    config: dict[str, Any]
    model: CausalLM
    tokenizer: TextTokenizer | None


def load_run(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    trust: bool = False,
    config: Mapping[str, Any] | None = None,
) -> LoadedRun:
    """Load a run's folder (``outputs/runs/...``), or what ``flowhn-export`` made of one.

    Args:
        folder: the run, or its export.
        device: where the model goes.
        trust: also build classes from outside ``flowhn.models`` that the run's config names (a split of one's own).
        config: the caller's own configuration of this run. The model is built from it and not from the folder's, so that
            own classes need no trust in what lies there.

    Raises:
        UserError: no such run, a run that is not finished, weights that are damaged or belong to another model, or a
            config that names foreign classes without ``trust`` or that is not resolved.
    """
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file():
        raise UserError(f"{folder} is not the folder of a run (no {CONFIG_NAME}); give one of outputs/runs/")
    try:
        content = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        exported = content.get("model_type") == EXPORTED_TYPE
        stored = {**content["run"], "model": content["net"]} if exported else content["config"]
        wanted = content.get("tokenizer_sha256")
        lacks = next((key for key in _NEEDED if key not in stored), None)
        if lacks or not isinstance(stored["model"], dict):
            raise KeyError(lacks or "model")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder / CONFIG_NAME} is damaged; train the run again or restore the file") from error
    if not (folder / WEIGHTS_NAME).is_file():
        raise UserError(
            f"{folder} has no {WEIGHTS_NAME}: its training is not finished; run its command again to finish it"
        )
    if config is None:
        config = stored
        if trust:
            look_here()
            check_resolved(config["model"])
        else:
            check_targets(config["model"])
    model = build_model(config)
    prefix = _EXPORTED_PREFIX if exported else ""
    load_weights(model, folder / WEIGHTS_NAME, sha256=content.get("weights_sha256"), prefix=prefix)
    if wanted is not None and (found := tokenizer_hash(folder)) not in (None, wanted):
        raise UserError(
            f"the tokenizer in {folder} is not the one it was trained with ({found[:8]} instead of {wanted[:8]}); restore it"
        )
    tokenizer = next((folder / name for name in TOKENIZER_NAMES if (folder / name).exists()), None)
    return LoadedRun(folder, dict(config), model.to(device).eval(), open_tokenizer(tokenizer) if tokenizer else None)


def load_weights(model: torch.nn.Module, path: Path, *, sha256: str | None = None, prefix: str = "") -> None:
    """Put a safetensors file's weights into ``model``.

    Args:
        model: the network.
        path: the file.
        sha256: what its bytes must hash to; null where nothing is known.
        prefix: of every name in the file. With one, a weight that the model ties to another may be missing.

    Raises:
        UserError: the file is damaged, holds values that are no finite floating-point numbers, or is of another model (the
            first name or shape that differs is told).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(path)
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"the weights {path} are damaged ({reason}); train the run again or restore the file"
        ) from error
    if sha256 is not None and sha256 != file_sha256(path):
        raise UserError(
            f"the weights {path} are damaged (not the bytes that training wrote); train the run again or restore the file"
        )
    own = model.state_dict()
    if prefix:
        weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
        _add_tied(weights, own)
    missing, unknown = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    if missing or unknown:
        first = f"it lacks {missing[0]}" if missing else f"it has {unknown[0]}, which the model has not"
        raise UserError(f"the weights {path} are of another model ({first}); use the config of the run that made them")
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise UserError(
                f"the weights {path} are of another model ({name} is {tuple(tensor.shape)}, expected "
                f"{tuple(own[name].shape)}); use the config of the run that made them"
            )
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            what = "values that are not finite" if tensor.is_floating_point() else f"{tensor.dtype}, not floating point"
            raise UserError(
                f"the weights {path} cannot be used ({name} has {what}); train the run again or restore the file"
            )
    model.load_state_dict(weights)


def _add_tied(weights: dict[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> None:
    """Give each missing name of ``own`` the weights of a name that shares its memory: transformers stores it once."""
    stored = {own[name].data_ptr(): tensor for name, tensor in weights.items() if name in own and own[name].numel()}
    for name, tensor in own.items():
        if name not in weights and tensor.data_ptr() in stored:
            weights[name] = stored[tensor.data_ptr()]
