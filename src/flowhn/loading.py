"""Finished runs back from disk: the configuration, the network with its weights, the tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flowhn.config import build_model, check_targets
from flowhn.data.prepared import TOKENIZER_NAMES
from flowhn.data.tokenization import TextTokenizer, open_tokenizer
from flowhn.errors import UserError
from flowhn.models import CausalLM
from flowhn.run_folder import CONFIG_NAME, WEIGHTS_NAME, tokenizer_hash


@dataclass(frozen=True)
class LoadedRun:
    """A finished run: ``folder``, resolved ``config``, ``model`` (eval mode, fp32), ``tokenizer`` (None for random tokens)."""

    folder: Path
    config: dict[str, Any]
    model: CausalLM
    tokenizer: TextTokenizer | None


def load_run(folder: str | Path, *, device: str | torch.device = "cpu", trust: bool = False) -> LoadedRun:
    """Load a run's folder (``outputs/runs/...``).

    Args:
        folder: the run.
        device: where the model goes.
        trust: also build classes from outside ``flowhn.models`` that the run's config names (a split of one's own).

    Raises:
        UserError: no such run, a run that is not finished, weights that are damaged or belong to another model, or a
            config that names foreign classes without ``trust``.
    """
    folder = Path(folder)
    if not (folder / CONFIG_NAME).is_file():
        raise UserError(f"{folder} is not the folder of a run (no {CONFIG_NAME}); give one of outputs/runs/")
    try:
        content = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        config, wanted = content["config"], content.get("tokenizer_sha256")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / CONFIG_NAME} is damaged; train the run again or restore the file") from error
    if not (folder / WEIGHTS_NAME).is_file():
        raise UserError(
            f"{folder} has no {WEIGHTS_NAME}: its training is not finished; run its command again to finish it"
        )
    if not trust:
        check_targets(config["model"])
    model = build_model(config)
    load_weights(model, folder / WEIGHTS_NAME)
    if wanted is not None and (found := tokenizer_hash(folder)) not in (None, wanted):
        raise UserError(
            f"the tokenizer in {folder} is not the one it was trained with ({found[:8]} instead of {wanted[:8]}); restore it"
        )
    tokenizer = next((folder / name for name in TOKENIZER_NAMES if (folder / name).exists()), None)
    return LoadedRun(folder, config, model.to(device).eval(), open_tokenizer(tokenizer) if tokenizer else None)


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Put a safetensors file's weights into ``model``.

    Raises:
        UserError: the file is damaged, or is of another model (the first name or shape that differs is told).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"the weights {path} are damaged ({error}); train the run again or restore the file") from error
    own = model.state_dict()
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
    model.load_state_dict(weights)
