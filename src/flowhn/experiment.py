"""The recipe of one run: data, training, evaluation, record. Entries call :meth:`Workshop.run`; nothing else does."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from flowhn.cli import heed_interrupts
from flowhn.config import build_model
from flowhn.errors import UserError
from flowhn.reporting.record import RunRecord, config_hash, environment, write_record
from flowhn.run_balance import balance_by_time
from flowhn.run_folder import describe_run
from flowhn.run_tracking import close_run
from flowhn.run_training import Trained, fit_run, real_tokens_per_step, train_run, trained_before
from flowhn.runs import Progress, Run, cell_name, process_rank


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
        self._tokenizers: dict[Path, Any] = {}

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
        record = None
        try:
            with lock.acquire(timeout=0):
                # Looked for again: another process may have written it since.
                record = run.record() or self._run_locked(run, on_progress, say)
                return record
        except Timeout:
            raise UserError(
                f"another process works in {run.folder}; wait for it or set output_dir= elsewhere"
            ) from None
        finally:
            close_run(run, record, say)

    def _help_train(self, run: Run) -> NoReturn:
        """A process beside the first (another device): takes its share of the training and ends; the first does the rest."""
        from flowhn.training import resolve_hardware, seed_everything

        if trained_before(run.folder)[0] is None:
            prepared = self.prepare(run.config)
            seed_everything(run.config["seed"])
            hardware = resolve_hardware(run.config)
            balance_by_time(run, hardware, say=lambda text: None)
            fit_run(run, build_model(run.config), prepared, hardware, lambda progress: None, lambda text: None)
        raise SystemExit(0)

    def _run_locked(self, run: Run, on_progress: Callable[[Progress], None], say: Callable[[str], None]) -> RunRecord:
        from flowhn.training import seed_everything

        begun = time.monotonic()
        describe_run(run)
        prepared = self.prepare(run.config, on_progress)
        seed_everything(run.config["seed"])
        trained = train_run(run, prepared, on_progress, say)
        with heed_interrupts():
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

        from flowhn.evaluation.suites import needs_length

        if not suite["tasks"]:
            return {"suite": suite["name"], "tasks": {}, "seconds": 0.0}
        if tokenizer is None:
            raise UserError(
                "there is no tokenizer to evaluate with: data=random has none (set eval=none); a run of other data keeps it as "
                "tokenizer.json in its folder (restore it there)"
            )
        evaluator = self.evaluator(
            config, suite=suite, tokenizer=tokenizer, heldout_file=heldout_file, on_progress=on_progress
        )
        result = evaluator.run(
            model,
            tokenizer,
            device=hardware.device,
            max_length=needs_length(suite) or config["seq_len"],
            dtype=torch.bfloat16 if hardware.precision.startswith("bf16") else None,
            on_progress=(lambda done, total: on_progress(Progress("eval", done, total))) if on_progress else None,
        )
        return {"suite": suite["name"], **result}

    def evaluator(
        self,
        config: Mapping[str, Any],
        *,
        suite: Mapping[str, Any],
        tokenizer: Any,
        heldout_file: Path | None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Any:
        """The suite's :class:`~flowhn.evaluation.Evaluator`, with its requests built; built on first use."""
        from flowhn.evaluation import Evaluator
        from flowhn.evaluation.suites import counts_tokens, needs_heldout

        # The paper's questions are the same for every text that was trained on.
        heldout_file = heldout_file if needs_heldout(suite["tasks"]) else None
        asked = {"suite": dict(suite), "heldout": str(heldout_file)}
        if counts_tokens(suite["tasks"]):
            asked["tokenizer"] = tokenizer.fingerprint
        key = config_hash(asked)
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
        return self._evaluators[key]

    def tokenizer(self, prepared: Any) -> Any:
        """The tokenizer of prepared data, one object for all runs: an evaluator keeps its requests' tokens by it."""
        from flowhn.data import load_tokenizer

        if prepared.dir not in self._tokenizers:
            self._tokenizers[prepared.dir] = load_tokenizer(prepared)
        return self._tokenizers[prepared.dir]

    def _evaluate(
        self, run: Run, prepared: Any, trained: Trained, on_progress: Callable[[Progress], None]
    ) -> dict[str, Any]:
        return self.evaluate(
            trained.model,
            self.tokenizer(prepared) if prepared.tokenizer_file else None,
            run.config,
            suite=run.config["eval"],
            hardware=trained.hardware,
            heldout_file=prepared.heldout_file,
            on_progress=on_progress,
        )


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
        throughput={**fitted["throughput"], "attention_share": _attention_share(trained.model, config["seq_len"])},
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


def _attention_share(model: Any, seq_len: int) -> float | None:
    """Share of the tokens that attention sees in the first parallel block, from 0 to 1; None in a model without one."""
    block = next((block for block in model.layers if hasattr(block, "token_split")), None)
    return None if block is None else block.token_split(seq_len).n_attn / seq_len
