"""The jobs of scripts/accuracy_session.py: their list, what each run is, and which one a GPU takes next."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Tokens/s of training that the plan assumes (135m, one H200): longest first, and what no longer fits is not begun.
SPEED = {
    "flowhn_no": 700e3,
    "llama": 800e3,
    "shm": 700e3,
    "jamba": 660e3,
    "mamba2": 700e3,
    "mamba1": 450e3,
    "hymba": 440e3,
}
FAC_SPEED = 950e3  # of all other FlowHN rows
# Measured on one H200: on 25 November 2026. Questions over long contexts are made before the first job: 8 to 20 s a model.
COMPILE_SECONDS, EVAL_SECONDS, LONG_SECONDS = 10.0, 18.0, 12.0
PREPARE_SECONDS = 80.0  # assumed by the plan for data and questions, before the first job
EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
COMMITTED = EXPERIMENTS / "table1_lr"  # learning rates of earlier sessions
ABOUT = "session.json"  # in the work folder: what was asked for, for those who sort the records at home
LONGEST_FIRST = (
    "hymba",
    "mamba1",
    "jamba",
    "mamba2",
    "shm",
    "flowhn_no",
    "llama",
    "flowhn_fac",
    "flowhn_ae",
    "flowhn_fa",
)
VARIANTS = (  # what may reach the goal, and what its parts do alone
    "fac_keys_rope_conv_sum",
    "fac_rope_conv_sum",
    "fac_keys_rope_conv",
    "fac_keys_rope_conv_gated",
    "fac_conv",
    "fac_sum",
    "fac_keys_rope_sum",
    "fac_rope_conv",
    "fac_keys_rope",
    "flowhn_no_conv",
    "flowhn_no_sum",
    "fac_rope",
    "fac_keys",
)
LATER_VARIANTS = (  # after the long contexts: they fell short, or only make a row faster
    "fac_thin",
    "fac_keys_rope_window",
    "fac_rope_thin",
    "fac_ratio",
    "fac_window",
    "fac_keys_rope_cross",
    "fac_bf16_residual",
    "fac_keys_rope_conv_gated_bf16",
    "fac_gated",
    "fac_gated_shared",
    "fac_keys_rope_conv_gated_bf16_shared",
    "fac_mamba2",
    "fac_mamba2_keys_rope_conv_gated_bf16",
    "fac_mamba2_keys_rope_conv_gated_bf16_shared",
)
PROBES = (
    "flowhn_2.5e-4",
    "flowhn_no_5e-4",
    "flowhn_no_1e-3",
    "flowhn_no_2e-3",
)  # rates of table1_lr that only kinds=probe plans
LONG_MODELS = ("flowhn_fac", "flowhn_no", "llama", "mamba2", "shm")
SECOND_SEEDS = ("flowhn_fac", "flowhn_no", "shm")  # Llama's of table1.yaml comes with the long contexts
BASE = "flowhn_fac"  # what the speed of the variants is compared with


@dataclass(frozen=True)
class Job:
    """One row of the plan: a cell of an artefact with its seed; ``kind`` is lr, probe, table, seed, variant or long.

    ``then``: seconds of a later job without which this one is not worth its time; it begins only where both fit.
    """

    kind: str
    artefact: str
    cell: str
    seed: int
    tokens: int
    then: float = 0.0

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


def plan_jobs(
    tokens: int,
    lr_tokens: int,
    kinds: str,
    *,
    extra: Sequence[str] = (),
    long_seed: int = 0,
    committed: Collection[tuple[str, int]] = (),
    variants: Collection[str] = (),
    rows: Sequence[str] = (),
    tries: Collection[str] = (),
) -> list[Job]:
    """All jobs, what matters most first.

    Where the ten models are trained, learning rates come before them; elsewhere nothing depends on them and they come last.
    Then a second measurement of FAC_Split (the variants' speed is compared with one of the same machine), second seeds,
    variants, long context, the other variants. Models that are asked over long contexts are trained in the same session: those that no other
    job trains come right before they are asked.

    Args:
        tokens, lr_tokens: of a run and of a learning-rate probe.
        kinds: the kinds of job wanted, with commas.
        extra: more rows of Table 1 as ``cell:seed``, whether or not they are committed.
        long_seed: which seed of the models is asked over long contexts.
        committed: cells and seeds that need no second seed, because their records are there already.
        variants: rows of ``beyond`` as ``cell`` or ``cell:seed``, ahead of all but their rates; where none is named all of them, in
            their place.
        rows: the models of Table 1 that are trained, in this order and ahead of the variants; where none is named all ten.
        tries: rows of ``table1_lr`` that are tried; where none is named those that ``kinds`` names.

    Raises:
        UserError: a variant that ``beyond`` has not, or a row or rate that is none.
    """
    from flowhn.artefacts import load_artefact
    from flowhn.errors import UserError

    wanted = kinds.split(",")
    rates = [
        Job("probe" if cell in PROBES else "lr", "table1_lr", cell, 0, lr_tokens)
        for cell in load_artefact("table1_lr").cells
    ]
    for key, names, known in (("rows", rows, LONGEST_FIRST), ("tries", tries, [job.cell for job in rates])):
        if unknown := [name for name in names if name not in known]:
            raise UserError(f"--{key}={unknown[0]} is not one of {', '.join(known)}")
    rates = [job for job in rates if (job.cell in tries if tries else job.kind in wanted)]
    table = [Job("table", "table1", cell, 0, tokens) for cell in rows or LONGEST_FIRST if "table" in wanted]
    more = [(cell, int(seed)) for cell, _, seed in (one.partition(":") for one in extra)]
    asked = [(cell, long_seed) for cell in LONG_MODELS if "long" in wanted]
    seconds = [(cell, 1) for cell in SECOND_SEEDS if "seed" in wanted and (cell, 1) not in committed]
    # An extra row that is asked over long contexts waits for its turn there: without that it is worth least.
    now = [row for row in more if row[0] == BASE] + seconds + [row for row in more if row not in asked]
    trained = [(job.cell, job.seed) for job in table]
    seeds = [Job("seed", "table1", *row, tokens) for row in dict.fromkeys(now) if row not in trained]
    trained += [(job.cell, job.seed) for job in seeds]
    named = [(cell, seed or "0") for cell, _, seed in (one.partition(":") for one in variants)]
    for cell, seed in named:
        if cell not in (*VARIANTS, *LATER_VARIANTS) or not seed.isdecimal():
            raise UserError(f"--variants={cell}:{seed} is no row of beyond that is planned here; see VARIANTS")
    first, later = (
        [Job("variant", "beyond", cell, 0, tokens) for cell in cells if "variant" in wanted and not variants]
        for cells in (VARIANTS, LATER_VARIANTS)
    )
    long: list[Job] = []
    for row in sorted(asked, key=lambda row: row not in trained):
        job = Job("long", "table1", *row, tokens)
        long += [job] if row in trained else [Job("seed", "table1", *row, tokens, then=job.seconds()), job]
    late = [] if table else rates
    ahead: list[Job] = []
    if named:  # what was asked for by name is what the session is for; its speeds stand beside FAC_Split's
        ahead = [job for job in [*table, *seeds] if (job.cell, job.seed) == (BASE, 0)]
        ahead += [Job("variant", "beyond", cell, int(seed), tokens) for cell, seed in named if "variant" in wanted]
    ahead = [*table, *ahead] if rows else ahead
    order = [*(rates if table else []), *ahead, *table, *seeds, *first, *long, *later, *late]
    return list(dict.fromkeys(order))


def committed_rows(size: str, tokens: int) -> set[tuple[str, int]]:
    """Cells and seeds of Table 1 whose records of this size and budget are committed."""
    from flowhn.reporting.record import find_records

    found = [record for record in find_records(EXPERIMENTS / "table1") if record.size == size]
    return {(r.cell, r.seed) for r in found if 0 <= r.tokens - tokens < r.global_batch_tokens}


def planned(args: argparse.Namespace) -> list[Job]:
    """The jobs that a command line asks for."""
    return plan_jobs(
        args.tokens, args.lr_tokens, args.kinds, extra=args.extra, long_seed=args.long_seed,
        committed=() if "table" in args.kinds.split(",") else committed_rows(args.size, args.tokens),
        **{key: [name for name in getattr(args, key, "").split(",") if name] for key in ("variants", "rows", "tries")},
    )  # fmt: skip


def trainer(jobs: Sequence[Job], job: Job) -> Job:
    """The job that trains the model which a long-context job asks."""
    return next(j for j in jobs if j.kind in ("table", "seed") and (j.cell, j.seed) == (job.cell, job.seed))


def timetable(jobs: Sequence[Job], *, gpus: int, seconds: float) -> dict[str, float]:
    """When each job would end, in seconds, by name; those that do not fit are missing. As :meth:`Session.next_job` takes them."""
    gate = any(job.kind == "table" for job in jobs)
    free, ends = [PREPARE_SECONDS] * gpus, {}
    while free:
        free.sort()
        now = free[0]
        open_jobs = [job for job in jobs if job.name not in ends and now + job.seconds() + job.then <= seconds]
        before = max((ends.get(job.name, 1e9) for job in jobs if job.is_rate), default=0.0) if gate else 0.0

        def start(job: Job, before: float = before) -> float:
            if job.kind == "long":
                return ends.get(trainer(jobs, job).name, 1e9)
            return 0.0 if job.is_rate else before

        job = next((job for job in open_jobs if start(job) <= now), None)
        if job is not None:
            ends[job.name] = free[0] = now + job.seconds()
            continue
        later = [end for end in ends.values() if end > now]
        if later and any(start(job) < 1e9 for job in open_jobs):
            free[0] = min(later)
        else:
            free.pop(0)
    return ends


class Session:
    """The folder of a session and what its processes share there: claims, records, the log."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.work = Path(args.work)
        self.jobs = planned(args)
        self.claims = self.work / "claims"
        self.claims.mkdir(parents=True, exist_ok=True)
        self._tuned: dict[str, float] = {}
        known = self.work / ABOUT  # of an earlier call, whose records this one goes on from
        earlier = json.loads(known.read_text(encoding="utf-8"))["kinds"] if known.is_file() else []
        self.kinds = sorted({*earlier, *args.kinds.split(",")})

    def describe(self) -> None:
        """Write down what is asked for: at home it decides what the records may replace."""
        keys = ("size", "tokens", "lr_tokens", "eval", "override", "extra", "long_seed", "long_override")
        about = {"kinds": self.kinds} | {key: getattr(self.args, key) for key in keys}
        (self.work / ABOUT).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

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
        """This session's, and where it has some, the committed ones of the same data, size and tokens, Table 1's rows among them."""
        from flowhn.reporting.rates import with_table_rows
        from flowhn.reporting.record import find_records

        runs = find_records(self.work / "runs", skip_broken=True)
        own = [record for record in runs if record.artefact == "table1_lr"]
        if not own:
            return []

        def kind(record: Any) -> tuple[Any, ...]:
            return record.size, record.tokens, record.data.get("sha256")

        cells = {record.cell for record in own}
        kept = [record for record in find_records(COMMITTED) if kind(record) == kind(own[0])]
        tried = own + [record for record in kept if record.cell not in cells]
        return with_table_rows(tried, find_records(COMMITTED.parent / "table1"))

    def rate(self, job: Job) -> float | None:
        """The learning rate of a job; None where the size's own holds.

        Rates tried in this session serve it only where it trains the ten models: seeds and variants stand in one table with
        records of an earlier session, and have to be trained as those were.
        """
        from flowhn.artefacts import load_artefact, rates_for
        from flowhn.reporting.rates import chosen_rates

        if not self._tuned and "table" in self.kinds and all(self.finished(one) for one in self.jobs if one.is_rate):
            self._tuned = chosen_rates(self.lr_records())
        own = job.cell if job.cell.startswith("flowhn_no") else ""  # where it was tried itself
        model = "flowhn" if job.cell.startswith(("flowhn", "fac")) else job.cell
        committed = rates_for(load_artefact(job.artefact), self.args.size, job.tokens)  # of an earlier session
        names = [name for name in ("flowhn_no" if own else "", model) if name]
        return next((rates[name] for name in names for rates in (self._tuned, committed) if name in rates), None)

    def finished(self, job: Job) -> bool:
        return (self.claims / f"{job.name}.done").exists()

    def finish(self, job: Job, seconds: float, *, counts: bool = True) -> None:
        """Mark a job as over and remember how long it took beside the plan, unless it was skipped or failed."""
        told = f"{seconds / job.seconds():.3f}" if counts else ""
        (self.claims / f"{job.name}.done").write_text(told, encoding="utf-8")

    def pace(self) -> float:
        """Time that trained and evaluated jobs took, as a share of the plan; 1 until three are done."""
        done = [job for job in self.jobs if job.kind in ("table", "seed", "variant") and self.finished(job)]
        told = [(self.claims / f"{job.name}.done").read_text(encoding="utf-8") for job in done]
        shares = [float(text) for text in told if text]
        return min(2.0, max(0.4, 1.1 * sum(shares) / len(shares))) if len(shares) >= 3 else 1.0

    def ready(self, job: Job) -> bool:
        """A long-context job needs its trained model; the ten models need the learning rates."""
        if job.kind == "long":
            return self.finished(trainer(self.jobs, job))
        if job.is_rate or "table" not in self.args.kinds.split(","):
            return True
        return all(self.finished(other) for other in self.jobs if other.is_rate)

    def fits(self, job: Job) -> bool:
        """Whether it would end in time; a long-context job also needs a model that is being trained or can be."""
        if job.kind == "long" and not (self.claims / (before := trainer(self.jobs, job)).name).exists():
            return self.fits(before)
        return self.pace() * (job.seconds() + job.then) <= self.left()

    def wants_weights(self, job: Job) -> bool:
        """Whether a job of this session still has to ask the model that this one trains."""
        return any(
            (j.cell, j.seed) == (job.cell, job.seed) for j in self.jobs if j.kind == "long" and not self.finished(j)
        )

    def claim(self, job: Job) -> bool:
        try:
            os.close(os.open(self.claims / job.name, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        return True

    def next_job(self) -> Job | str:
        """A claimed job; "wait" when one is not ready yet; "done"."""
        waiting = False
        for job in self.jobs:
            if (self.claims / job.name).exists() or not self.fits(job):
                continue
            if not self.ready(job):
                waiting = True
            elif self.claim(job):
                return job
        return "wait" if waiting else "done"
