"""The recipe of one run: data, model, training, evaluation, record. Entries call :func:`run`; nothing else does.

A run lives in ``<output_dir>/runs/<name>-<run id>/``; the run id is a hash of everything that decides its result, so the
same configuration always meets its own folder again: a finished run is not repeated, a stopped one goes on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import DictConfig

from flowhn.config import build_model, identity, to_dict
from flowhn.errors import UserError
from flowhn.reporting.record import RunRecord, config_hash, environment, read_record, write_record

RECORD_NAME = "record.json"
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
TRAINED_NAME = "trained.json"  # training is done, the evaluation is not


@dataclass(frozen=True)
class Progress:
    """What a display shows of a run: phase (``data``, ``train``, ``eval``), position, speed in tokens/s and loss."""

    phase: str
    done: float = 0
    total: float = 0
    tokens_per_second: float | None = None
    loss: float | None = None
    text: str = ""


@dataclass(frozen=True)
class Run:
    """A configuration together with the folder and the id that follow from it."""

    config: dict[str, Any]
    run_id: str
    name: str
    folder: Path

    @property
    def record_path(self) -> Path:
        return self.folder / RECORD_NAME

    def record(self) -> RunRecord | None:
        """The finished run's record, or None. A broken record is an error, never silently repeated or overwritten."""
        if not self.record_path.is_file():
            return None
        record = read_record(self.record_path)
        if record.run_id != self.run_id:
            raise UserError(f"{self.record_path} belongs to another run ({record.run_id}); move it away or use --force")
        return record


def process_rank() -> int:
    """Number of this process among those of one run: 0 for the first or only one. Set by torchrun, Slurm or Lightning."""
    return next((int(os.environ[key]) for key in ("RANK", "SLURM_PROCID", "LOCAL_RANK") if key in os.environ), 0)


def cell_name(config: Mapping[str, Any]) -> str:
    """The run's name in tables: the model, with its split strategy for FlowHN (``flowhn_fac``)."""
    if config.get("cell"):
        return str(config["cell"])
    choices = config["choices"]
    return f"{choices['model']}_{choices['split']}" if choices["model"] == "flowhn" else choices["model"]


def plan(cfg: DictConfig) -> Run:
    """Name a composed configuration: its id, its folder. Imports neither torch nor lightning."""
    config = to_dict(cfg)
    run_id = config_hash(identity(config))
    name = f"{cell_name(config)}-{config['choices']['size']}-{config['budget']}-s{config['seed']}"
    return Run(config, run_id, name, Path(config["output_dir"]) / "runs" / f"{name}-{run_id}")


def count_parameters(config: Mapping[str, Any]) -> int:
    """Parameters of a configuration's model, counted on the meta device (nothing is allocated)."""
    import torch

    with torch.device("meta"):
        return build_model(config).num_parameters()


def summary(record: RunRecord) -> str:
    """One line for a finished run: loss, speed, evaluation average, time."""
    parts = []
    if record.losses["final_val"] is not None:
        parts.append(f"validation loss {record.losses['final_val']:.3f}")
    if record.throughput["tps"] is not None:
        parts.append(f"{record.throughput['tps']:,.0f} tok/s")
    tasks = record.evaluation["tasks"].values()
    accuracies = [100 * value for task in tasks if (value := task.get(task.get("metric", "acc"))) is not None]
    if accuracies:
        parts.append(f"mean accuracy {sum(accuracies) / len(accuracies):.1f} %")
    return ", ".join([*parts, f"{record.wall_seconds['total']:.0f} s"])


class Workshop:
    """Runs configurations one after another and keeps what they share: the prepared data and the evaluation requests."""

    def __init__(self) -> None:
        self._prepared: dict[str, Any] = {}
        self._evaluators: dict[str, Any] = {}

    def prepare(self, config: Mapping[str, Any], on_progress: Callable[[Progress], None] | None = None) -> Any:
        """Tokenised data of a configuration (built on first use, then memory-mapped).

        Raises:
            UserError: the data cannot be read or is too short.
        """
        from flowhn.data import prepare

        tell = on_progress or (lambda progress: None)
        key = config_hash({"data": config["data"], "vocab_size": config["vocab_size"], "seq_len": config["seq_len"]})
        if key not in self._prepared:
            tell(Progress("data"))
            self._prepared[key] = prepare(
                config["data"],
                vocab_size=config["vocab_size"],
                seq_len=config["seq_len"],
                cache_dir=Path(config["cache_dir"]) / "data",
                report=lambda text: tell(Progress("data", text=text)),
            )
        return self._prepared[key]

    def run(self, run: Run, on_progress: Callable[[Progress], None], say: Callable[[str], None]) -> RunRecord:
        """Train, evaluate and record one configuration; goes on where an earlier call stopped.

        Raises:
            UserError: bad configuration, data, device or checkpoint; another process works in the same folder.
        """
        from filelock import FileLock, Timeout

        if (record := run.record()) is not None:
            return record
        if process_rank():
            self._help_train(run)
        run.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run.folder / "lock")
        try:
            with lock.acquire(timeout=0):
                return self._run_locked(run, on_progress, say)
        except Timeout:
            raise UserError(
                f"another process works in {run.folder}; wait for it or set output_dir= elsewhere"
            ) from None

    def _help_train(self, run: Run) -> NoReturn:
        """A process beside the first (another device): takes its share of the training and ends; the first does the rest."""
        from flowhn.training import resolve_hardware, seed_everything

        if not (run.folder / TRAINED_NAME).is_file():
            prepared = self.prepare(run.config)
            seed_everything(run.config["seed"])
            hardware = resolve_hardware(run.config)
            _balance_by_time(run, hardware, say=lambda text: None)
            _fit(run, build_model(run.config), prepared, hardware, lambda progress: None, lambda text: None)
        raise SystemExit(0)

    def _run_locked(self, run: Run, on_progress: Callable[[Progress], None], say: Callable[[str], None]) -> RunRecord:
        from flowhn.training import seed_everything

        begun = time.monotonic()
        write_json(run.folder / CONFIG_NAME, {"run_id": run.run_id, "name": run.name, "config": run.config})
        prepared = self.prepare(run.config, on_progress)
        seed_everything(run.config["seed"])
        trained = _train(run, prepared, on_progress, say)
        evaluation = self._evaluate(run, prepared, trained, on_progress)
        record = _record(run, prepared, trained, evaluation, time.monotonic() - begun)
        write_record(run.record_path, record)
        # The optimiser's state is worth keeping only until the record exists: two checkpoints of ten 1B models are 275 GB.
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
        return record

    def evaluate(
        self,
        model: Any,
        tokenizer: Any,
        config: Mapping[str, Any],
        *,
        suite: Mapping[str, Any],
        hardware: Any,
        heldout_file: Path | None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> dict[str, Any]:
        """lm-eval results of one model, ``{suite, tasks, seconds}``; the requests are built once per suite.

        Raises:
            UserError: the suite's data is missing or there is no tokenizer.
        """
        import torch

        from flowhn.evaluation import Evaluator

        if not suite["tasks"]:
            return {"suite": suite["name"], "tasks": {}, "seconds": 0.0}
        if tokenizer is None:
            raise UserError(
                "there is no tokenizer to evaluate with: data=random has none (set eval=none); a run of other data keeps it as "
                "tokenizer.json in its folder (restore it there)"
            )
        key = config_hash({"suite": dict(suite), "heldout": str(heldout_file)})
        if key not in self._evaluators:
            if on_progress:
                on_progress(Progress("eval", text="building the evaluation requests"))
            self._evaluators[key] = Evaluator(
                suite=dict(suite),
                heldout_file=heldout_file,
                work_dir=Path(config["cache_dir"]) / "eval" / key,
                tokenizer=tokenizer,
                seed=1234,  # the same questions for every seed of a run
            )
        result = self._evaluators[key].run(
            model,
            tokenizer,
            device=hardware.device,
            max_length=suite.get("max_length") or config["seq_len"],
            dtype=torch.bfloat16 if hardware.precision.startswith("bf16") else None,
            on_progress=(lambda done, total: on_progress(Progress("eval", done, total))) if on_progress else None,
        )
        return {"suite": suite["name"], **result}

    def _evaluate(
        self, run: Run, prepared: Any, trained: Trained, on_progress: Callable[[Progress], None]
    ) -> dict[str, Any]:
        from flowhn.data import load_tokenizer

        return self.evaluate(
            trained.model,
            load_tokenizer(prepared) if prepared.tokenizer_file else None,
            run.config,
            suite=run.config["eval"],
            hardware=trained.hardware,
            heldout_file=prepared.heldout_file,
            on_progress=on_progress,
        )


@dataclass(frozen=True)
class Trained:
    """A trained network with what its record needs; ``fit`` holds FitResult's fields as plain values."""

    model: Any
    hardware: Any
    fit: dict[str, Any]


def _train(run: Run, prepared: Any, on_progress: Callable[[Progress], None], say: Callable[[str], None]) -> Trained:
    """Train, or load what an earlier call trained before it was stopped in the evaluation."""
    from flowhn.loading import load_weights
    from flowhn.training import resolve_hardware

    config, folder = run.config, run.folder
    hardware = resolve_hardware(config)
    if config["trainer"]["deterministic"]:
        import torch

        torch.use_deterministic_algorithms(True)
    _balance_by_time(run, hardware, say)
    model = build_model(config)
    done = folder / TRAINED_NAME
    if done.is_file() and (folder / WEIGHTS_NAME).is_file():
        load_weights(model, folder / WEIGHTS_NAME)
        return Trained(model.to(hardware.device).eval(), hardware, json.loads(done.read_text(encoding="utf-8")))
    result = _fit(run, model, prepared, hardware, on_progress, say)
    fitted = {key: value for key, value in asdict(result).items() if key != "skipped"}
    fitted["kernels"] = _kernels(model, hardware)
    _save_weights(model, folder)
    _copy_tokenizer(prepared, folder)
    described = {"run_id": run.run_id, "name": run.name, "config": config}
    write_json(folder / CONFIG_NAME, described | {"tokenizer_sha256": tokenizer_hash(folder)})
    write_json(done, fitted)
    return Trained(model.to(hardware.device).eval(), hardware, fitted)


def _balance_by_time(run: Run, hardware: Any, say: Callable[[str], None]) -> None:
    """Measure the cut of ``split.balance=time`` and put it into the run's config as its ratio.

    Kept in the run's folder, where a resumed run finds it, and in the cache, where runs of the same shape do.
    """
    config = run.config
    split = config["split"]
    if config["choices"]["model"] != "flowhn" or split.get("balance") != "time" or split.get("ratio") is not None:
        return
    import torch

    from flowhn.benchmark.balance import load_or_measure, measure_balance, set_ratio
    from flowhn.benchmark.timing import describe_device
    from flowhn.training import batch_plan

    rows, _ = batch_plan(
        global_batch_tokens=config["global_batch_tokens"],
        seq_len=config["seq_len"],
        micro_batch_size=config["micro_batch_size"],
        n_devices=hardware.n_devices,
    )
    bf16 = hardware.precision.startswith("bf16")

    def measure() -> Any:
        say(f"{run.name}: measuring both branches' time on this device")
        block = build_model(config).layers[0].to(hardware.device)
        return measure_balance(
            block,
            seq_len=config["seq_len"],
            batch_size=rows,
            d_model=config["size"]["d_model"],
            device=hardware.device,
            dtype=torch.bfloat16 if bf16 else None,
            compile=hardware.compile,
        )

    shape = {"model": config["model"], "rows": rows, "seq_len": config["seq_len"], "precision": hardware.precision}
    key = config_hash(
        shape | {"compile": hardware.compile, "device": describe_device(hardware.device), "torch": torch.__version__}
    )
    cached = Path(config["cache_dir"]) / "balance" / f"{key}.json"
    found = load_or_measure(run.folder / "balance.json", lambda: load_or_measure(cached, measure))
    set_ratio(config["model"], found.ratio)
    config["measured_balance"] = asdict(found)
    split["ratio"] = found.ratio
    write_json(run.folder / CONFIG_NAME, {"run_id": run.run_id, "name": run.name, "config": config})


def _fit(
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
        options = {"save_dir": str(run.folder)}
        if name == "wandb":
            options |= {
                "name": run.name,
                "id": run.run_id,
                "offline": not os.environ.get("WANDB_API_KEY"),
                "config": run.config,
            }
        made.append(instantiate(spec, _convert_="all")(**options))
    return made


def _save_weights(model: Any, folder: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    temporary = folder / f".{WEIGHTS_NAME}.tmp"
    try:
        save_file(weights, temporary, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{folder / WEIGHTS_NAME} cannot be written ({error}); free some space or set output_dir= elsewhere and run again"
        ) from error
    os.replace(temporary, folder / WEIGHTS_NAME)


def _copy_tokenizer(prepared: Any, folder: Path) -> None:
    source = prepared.tokenizer_file
    if source is None:
        return
    if source.is_dir():
        shutil.copytree(source, folder / source.name, dirs_exist_ok=True)
    else:
        shutil.copyfile(source, folder / source.name)


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
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(temporary, path)


def _record(run: Run, prepared: Any, trained: Trained, evaluation: dict[str, Any], seconds: float) -> RunRecord:
    from flowhn.benchmark import describe_device

    config, fitted = run.config, trained.fit
    val = fitted["curves"]["val"]
    return RunRecord(
        run_id=run.run_id,
        artefact=config["artefact"],
        cell=cell_name(config),
        model=config["choices"]["model"],
        size=config["choices"]["size"],
        seed=config["seed"],
        status="done",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        config=config,
        **environment(),
        device=describe_device(trained.hardware.device, trained.hardware.n_devices),
        kernels=fitted["kernels"],
        parameters=trained.model.num_parameters(),
        tokens=fitted["steps"] * real_tokens_per_step(config, prepared),
        steps=fitted["steps"],
        seq_len=config["seq_len"],
        global_batch_tokens=config["global_batch_tokens"],
        data={"name": config["data"]["name"], **prepared.stats},
        losses={
            **fitted["curves"],
            "final_val": val[-1][1] if val else None,
            "unigram_entropy": prepared.stats.get("unigram_entropy_nats"),
        },
        throughput=fitted["throughput"],
        memory=fitted["memory"],
        evaluation={"suite": evaluation["suite"], "tasks": evaluation["tasks"]},
        # Of a run that was stopped, seconds cover the last call alone and training all of them.
        wall_seconds={
            "train": fitted["wall_seconds"],
            "eval": evaluation["seconds"],
            "total": max(seconds, fitted["wall_seconds"] + evaluation["seconds"]),
        },
        resumed=fitted["resumed"],
    )
