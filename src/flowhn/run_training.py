"""The training part of a run: network, batch plan, steps, and what is kept when it is done."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowhn.config import build_model
from flowhn.errors import UserError
from flowhn.run_balance import balance_by_time
from flowhn.run_folder import (
    TRAINED_NAME,
    WEIGHTS_NAME,
    copy_tokenizer,
    describe_run,
    file_sha256,
    save_weights,
    stored_hashes,
    tokenizer_hash,
    write_json,
)
from flowhn.run_tracking import LOGGER, is_tracked, logger_options
from flowhn.runs import Progress, Run, process_rank


@dataclass(frozen=True)
class Trained:
    """A trained network with what its record needs; ``fit`` holds FitResult's fields as plain values."""

    model: Any
    hardware: Any
    fit: dict[str, Any]


def train_run(run: Run, prepared: Any, on_progress: Callable[[Progress], None], say: Callable[[str], None]) -> Trained:
    """Train, or load what an earlier call trained before it was stopped in the evaluation.

    Raises:
        UserError: what an earlier call trained is damaged, and there is no checkpoint to go on from.
    """
    from flowhn.training import resolve_hardware

    config, folder = run.config, run.folder
    hardware = resolve_hardware(config)
    _set_determinism(config["trainer"]["deterministic"])
    balance_by_time(run, hardware, say)
    model = build_model(config)
    if (fitted := _load_trained(run, model, say)) is not None:
        return Trained(model.to(hardware.device).eval(), hardware, fitted)
    try:
        result = fit_run(run, model, prepared, hardware, on_progress, say)
    except RuntimeError as error:
        _explain_determinism(error)
        raise
    if result.weights is not None:  # the trained network is sharded; what follows is done by one process
        model = build_model(config).to(next(iter(result.weights.values())).dtype)
        model.load_state_dict(result.weights)
    fitted = {key: value for key, value in vars(result).items() if key not in ("skipped", "weights")}
    fitted["kernels"] = _kernels(model, hardware)
    save_weights(model, folder)
    copy_tokenizer(prepared, folder)
    describe_run(run, tokenizer_sha256=tokenizer_hash(folder), weights_sha256=file_sha256(folder / WEIGHTS_NAME))
    write_json(folder / TRAINED_NAME, fitted)
    return Trained(model.to(hardware.device).eval(), hardware, fitted)


def trained_before(folder: Path) -> tuple[dict[str, Any] | None, str | None]:
    """What ``trained.json`` of a run's folder says (None: training is not done, or damaged), and what is damaged.

    Each process of a run asks for itself, with the same answer: all train, or none.
    """
    done, weights = folder / TRAINED_NAME, folder / WEIGHTS_NAME
    if not done.is_file() or not weights.is_file():
        return None, None
    try:
        fitted = json.loads(done.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        fitted = None
    if not isinstance(fitted, dict) or "curves" not in fitted:
        return None, f"{done} is damaged"
    wanted = stored_hashes(folder).get("weights_sha256")
    if wanted is not None and wanted != file_sha256(weights):
        return None, f"the weights {weights} are damaged (not the bytes that training wrote)"
    return fitted, None


def _load_trained(run: Run, model: Any, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Put the trained weights into ``model``; None: train, from the newest checkpoint where these were damaged."""
    from flowhn.loading import load_weights
    from flowhn.training.checkpoints import latest_valid_checkpoint
    from flowhn.training.loop import CHECKPOINTS

    fitted, fault = trained_before(run.folder)
    if fitted is not None:
        try:
            load_weights(model, run.folder / WEIGHTS_NAME)
        except UserError as error:
            fault = str(error).partition("; ")[0]
        else:
            return fitted
    if fault is not None:
        if latest_valid_checkpoint(run.folder / CHECKPOINTS, content=True).path is None:
            raise UserError(f"{fault}, and there is no checkpoint to go on from; run again with --force")
        say(f"{fault}; training goes on from the checkpoint")
        (run.folder / TRAINED_NAME).unlink(missing_ok=True)
    return None


def _set_determinism(wanted: bool) -> None:
    """Before the first matrix product: cuBLAS reads its setting when it starts, and that is before Lightning's trainer.

    Said for every run, so that one that did not ask does not inherit it from the run before in the same process.
    """
    import torch

    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)


def _explain_determinism(error: RuntimeError) -> None:
    """torch's several lines on an operation that has no deterministic form on this device, as one sentence.

    Raises:
        UserError: it was that.
    """
    operation, found, _ = str(error).partition(" does not have a deterministic implementation")
    if found:
        raise UserError(
            f"deterministic=true is not possible here: {operation} has no deterministic implementation on this device; "
            "choose other kernels= or another fusion=, use device=cpu, or set deterministic=false"
        ) from error


def fit_run(
    run: Run,
    model: Any,
    prepared: Any,
    hardware: Any,
    on_progress: Callable[[Progress], None],
    say: Callable[[str], None],
) -> Any:
    from flowhn.data import TokenDataModule
    from flowhn.training import LitLM, batch_plan, fit, validation_steps

    config = run.config
    micro, accumulate = batch_plan(
        global_batch_tokens=config["global_batch_tokens"],
        seq_len=config["seq_len"],
        micro_batch_size=config["micro_batch_size"],
        n_devices=hardware.n_devices,
    )
    steps = total_steps(config, prepared)
    kernels = _kernels(model, hardware)
    taken = ", ".join(f"{kind} by {kernel}" for kind, kernel in kernels.items() if kernel)
    say(f"{run.name}: {hardware.device}, {hardware.precision}, {taken}")
    data = TokenDataModule(
        prepared=prepared,
        batch_size=micro,
        val_batch_size=micro,
        seed=config["seed"],
        n_train_samples=steps * (config["global_batch_tokens"] // config["seq_len"]),
        val_rows=config["val_rows"],
    )
    lit = LitLM(
        net=model,
        optimizer=config["optimizer"],
        schedule={**config["schedule"], "total_steps": steps},
        compile=hardware.compile,
        labels_per_row=_labels_per_row(config, prepared),
    )
    return fit(
        lit,
        data,
        hardware=hardware,
        trainer_cfg=config["trainer"],
        total_steps=steps,
        tokens_per_step=real_tokens_per_step(config, prepared),
        samples_per_step=config["global_batch_tokens"] // config["seq_len"],
        seq_len=config["seq_len"],
        run_dir=run.folder,
        run_id=run.run_id,
        accumulate=accumulate,
        val_steps=validation_steps(steps, config["val_points"]),
        clip_grad_norm=config["clip_grad_norm"],
        loggers=[] if process_rank() else _loggers(run),
        on_progress=lambda step, total, speed, loss: on_progress(Progress("train", step, total, speed, loss)),
        say=say,
    )


def _labels_per_row(config: Mapping[str, Any], prepared: Any) -> float | None:
    """Mean labels of a row that count, where rows have padding that does not; None where every label counts."""
    ignores = config["data"].get("packing") == "pad" and not config["data"].get("loss_on_padding", True)
    return max(1.0, prepared.tokens_per_row - 1) if ignores else None


def total_steps(config: Mapping[str, Any], prepared: Any) -> int:
    """Optimiser steps of a run: the token budget over the tokens of a step, rounded up.

    With ``data.packing=pad`` only real tokens count toward the budget (published code), so a step counts for the mean
    number of real tokens in its rows.
    """
    return max(1, math.ceil(config["tokens"] / real_tokens_per_step(config, prepared)))


def real_tokens_per_step(config: Mapping[str, Any], prepared: Any) -> int:
    """Tokens of an optimiser step that are not padding, on average over the data; all of them when rows are packed."""
    rows = config["global_batch_tokens"] // config["seq_len"]
    return max(1, round(rows * min(prepared.tokens_per_row, config["seq_len"])))


def _kernels(model: Any, hardware: Any) -> dict[str, str | None]:
    from flowhn.models.kernels import kernels_used

    return kernels_used(model, hardware.device.type)


def _loggers(run: Run) -> list[Any]:
    from hydra.utils import instantiate

    made = []
    for name, spec in run.config["logger"].items():
        if name == LOGGER and not is_tracked(run.config):
            continue
        options = {"save_dir": str(run.folder)}
        if name == LOGGER:
            options |= logger_options(run)
        made.append(instantiate(spec, _convert_="all")(**options))
    return made
