"""The jobs of scripts/accuracy_session.py: their list, what each run is, and which one a GPU takes next."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Tokens/s of training that the plan assumes (135m, one H200): longest first, and what no longer fits is not begun.
SPEED = {
    "flowhn_no": 700e3,
    "llama": 830e3,
    "shm": 640e3,
    "jamba": 640e3,
    "mamba2": 470e3,
    "mamba1": 400e3,
    "hymba": 300e3,
}
FAC_SPEED = 900e3  # of all other FlowHN rows
COMPILE_SECONDS, EVAL_SECONDS, LONG_SECONDS = 10.0, 18.0, 60.0  # the first two measured in the first session
COMMITTED = Path(__file__).resolve().parents[1] / "experiments" / "table1_lr"  # learning rates of earlier sessions
LONGEST_FIRST = (
    "hymba",
    "mamba1",
    "mamba2",
    "shm",
    "jamba",
    "flowhn_no",
    "llama",
    "flowhn_fac",
    "flowhn_ae",
    "flowhn_fa",
)
VARIANTS = (
    "fac_keys_rope",
    "fac_keys",
    "fac_rope",
    "fac_keys_rope_window",
    "fac_window",
    "fac_thin",
    "fac_keys_rope_cross",
    "fac_ratio",
)
PROBES = ("flowhn_2.5e-4", "flowhn_no_5e-4", "flowhn_no_1e-3")  # rates of table1_lr that only kinds=probe plans
LONG_MODELS = ("flowhn_fac", "flowhn_no", "llama", "mamba2", "shm")


@dataclass(frozen=True)
class Job:
    """One row of the plan: a cell of an artefact with its seed; ``kind`` is lr, probe, table, seed, variant or long."""

    kind: str
    artefact: str
    cell: str
    seed: int
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.cell}-s{self.seed}"

    @property
    def is_rate(self) -> bool:
        """Whether it tries a learning rate: short, without evaluation, before all others."""
        return self.kind in ("lr", "probe")

    def seconds(self) -> float:
        """How long the plan expects it to take."""
        if self.kind == "long":
            return LONG_SECONDS
        model = {"flowhn": "flowhn_fac", "hybrid": "shm", "mamba": "mamba2"}.get(self.cell.split("_")[0], self.cell)
        model = self.cell if self.cell in SPEED else "flowhn_no" if self.cell.startswith("flowhn_no") else model
        training = self.tokens / SPEED.get(model, FAC_SPEED)
        return training + COMPILE_SECONDS + (0 if self.is_rate else EVAL_SECONDS)


def plan_jobs(tokens: int, lr_tokens: int, kinds: str, *, extra: Sequence[str] = (), long_seed: int = 0) -> list[Job]:
    """All jobs, what matters most first.

    Args:
        tokens, lr_tokens: of a run and of a learning-rate probe.
        kinds: the kinds of job wanted, with commas.
        extra: more rows of Table 1 as ``cell:seed``.
        long_seed: which seed of the models is asked over long contexts; it has to be trained in the same session.
    """
    from flowhn.artefacts import load_artefact

    rates = load_artefact("table1_lr").cells
    jobs = [Job("probe" if cell in PROBES else "lr", "table1_lr", cell, 0, lr_tokens) for cell in rates]
    jobs += [Job("table", "table1", cell, 0, tokens) for cell in LONGEST_FIRST]
    jobs += [Job("seed", "table1", cell, 1, tokens) for cell in ("flowhn_no", "flowhn_fac", "shm")]
    jobs += [Job("seed", "table1", cell, int(seed), tokens) for cell, _, seed in (one.partition(":") for one in extra)]
    jobs += [Job("variant", "beyond", cell, 0, tokens) for cell in VARIANTS]
    jobs += [Job("long", "table1", cell, long_seed, tokens) for cell in LONG_MODELS]
    return [job for job in jobs if job.kind in kinds.split(",")]


class Session:
    """The folder of a session and what its processes share there: claims, records, the log."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.work = Path(args.work)
        self.jobs = plan_jobs(args.tokens, args.lr_tokens, args.kinds, extra=args.extra, long_seed=args.long_seed)
        self.claims = self.work / "claims"
        self.claims.mkdir(parents=True, exist_ok=True)
        self._tuned: dict[str, float] = {}

    def say(self, text: str) -> None:
        with (self.work / "session.log").open("a", encoding="utf-8") as log:
            log.write(f"{time.time() - self.args.begun:7.1f} s  {text}\n")

    def left(self) -> float:
        return self.args.begun + self.args.seconds - time.time()

    def run_of(self, job: Job) -> Any:
        """The run of a job, with the learning rate that this session's records choose for its model.

        The same run as ``./reproduce.sh`` plans for that row (a test compares their ids), without composing the other rows.
        """
        from flowhn.artefacts import cells_at, last_wins, load_artefact
        from flowhn.config import compose
        from flowhn.runs import plan

        words = [f"size={self.args.size}", f"budget={job.tokens}", "data=files", f"data.path={self.args.data}"]
        words += [f"data.val_path={self.args.valid}", f"output_dir={self.work}", f"cache_dir={self.work / 'cache'}"]
        words += ["logger=none", f"seed={job.seed}", *self.args.override]
        if not job.is_rate:
            words += [f"eval={self.args.eval}", "val_points=10"]
            if self.args.eval == "paper":
                words += [f"eval.data_dir={self.args.eval_dir}"]
            if (rate := self.rate(job)) is not None:
                words.append(f"lr={rate}")
        artefact = load_artefact(job.artefact)
        names = [f"cell={job.cell}", f"artefact={job.artefact}"]
        own = cells_at(artefact, self.args.size, [job.cell])[job.cell]
        return plan(compose("train", last_wins([*artefact.overrides, *own, *words, *names])))

    def lr_records(self) -> list[Any]:
        """This session's, and where it has some, the committed ones of the same data, size and tokens."""
        from flowhn.reporting.record import find_records

        runs = find_records(self.work / "runs", skip_broken=True)
        own = [record for record in runs if record.artefact == "table1_lr"]
        if not own:
            return []

        def kind(record: Any) -> tuple[Any, ...]:
            return record.size, record.tokens, record.data.get("sha256")

        cells = {record.cell for record in own}
        kept = find_records(COMMITTED)
        return own + [record for record in kept if record.cell not in cells and kind(record) == kind(own[0])]

    def rate(self, job: Job) -> float | None:
        from flowhn.artefacts import load_artefact
        from flowhn.reporting.rates import chosen_rates

        if not self._tuned:
            self._tuned = chosen_rates(self.lr_records())
        own = job.cell if job.cell == "flowhn_no" else ""  # where it was tried itself
        model = "flowhn" if job.cell.startswith(("flowhn", "fac")) else job.cell
        committed = load_artefact(job.artefact).lr.get(self.args.size, {})  # of an earlier session
        if job.tokens > committed.get("max_tokens", 0):
            committed = {}
        for rates in (self._tuned, committed):
            if model in rates:
                return rates.get(own, rates[model])
        return None

    def finished(self, job: Job) -> bool:
        return (self.claims / f"{job.name}.done").exists()

    def finish(self, job: Job, seconds: float) -> None:
        """Mark a job as done (or failed) and remember how long it took beside the plan."""
        (self.claims / f"{job.name}.done").write_text(f"{seconds / job.seconds():.3f}", encoding="utf-8")

    def pace(self) -> float:
        """Time that trained and evaluated jobs took, as a share of the plan; 1 until three are done."""
        done = [job for job in self.jobs if job.kind in ("table", "seed", "variant") and self.finished(job)]
        shares = [float((self.claims / f"{job.name}.done").read_text(encoding="utf-8")) for job in done]
        return min(2.0, max(0.4, 1.1 * sum(shares) / len(shares))) if len(shares) >= 3 else 1.0

    def ready(self, job: Job) -> bool:
        """Learning rates come first; a long-context job needs its trained model."""
        if job.kind == "long":
            trained = [other for other in self.jobs if other.kind in ("table", "seed") and other.cell == job.cell]
            return all(self.finished(other) for other in trained if other.seed == job.seed)
        return job.is_rate or all(self.finished(other) for other in self.jobs if other.is_rate)

    def claim(self, job: Job) -> bool:
        try:
            os.close(os.open(self.claims / job.name, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def next_job(self) -> Job | str:
        """A claimed job; "wait" when one is not ready yet; "done"."""
        waiting, pace = False, self.pace()
        for job in self.jobs:
            if (self.claims / job.name).exists() or pace * job.seconds() > self.left():
                continue
            if not self.ready(job):
                waiting = True
            elif self.claim(job):
                return job
        return "wait" if waiting else "done"
