"""Issue 5's training on a machine with one or several GPUs that is lent for minutes: what to run, in which order, until when.

    python scripts/accuracy_session.py daemon --work DIR ...    prepare, then one process per GPU; ends by itself at --seconds
    python scripts/accuracy_session.py pack --work DIR --out FILE.tgz    records (and long-context results) into one file
    python scripts/accuracy_session.py keep FILE.tgz [--setting 135m-files-30M]    that file into experiments/, rates into table1.yaml

scripts/accuracy_session.sh calls it and holds the plan with its arithmetic. Jobs wait in one list, what matters most first: learning rates
(table1_lr), the ten models, second seeds, FAC variants (beyond), long context. Each GPU takes the next job that is ready and fits into the time
left. The learning rates chosen from this session's own records go into the later jobs' command lines.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TASKS = "[arc_easy,arc_challenge,winogrande,piqa,hellaswag,boolq,lambada_openai]"
# Tokens/s of training that the plan assumes (135m, one H200): longest first, and what no longer fits is not begun.
SPEED = {"flowhn_no": 700e3, "llama": 830e3, "shm": 640e3, "jamba": 640e3, "mamba2": 470e3, "mamba1": 400e3, "hymba": 300e3}
FAC_SPEED = 900e3  # of all other FlowHN rows
COMPILE_SECONDS, EVAL_SECONDS, LONG_SECONDS = 25.0, 25.0, 60.0
LONGEST_FIRST = ("hymba", "mamba1", "mamba2", "shm", "jamba", "flowhn_no", "llama", "flowhn_fac", "flowhn_ae", "flowhn_fa")
VARIANTS = ("fac_keys_rope", "fac_keys", "fac_rope", "fac_keys_rope_window", "fac_window", "fac_thin", "fac_keys_rope_cross", "fac_ratio")
LONG_MODELS = ("flowhn_fac", "flowhn_no", "llama", "mamba2", "shm")
WARM = (("flowhn_fac", "mamba2", "llama", "hymba"), ("shm", "flowhn_no", "mamba1", "jamba"))  # compiled while the data are prepared


@dataclass(frozen=True)
class Job:
    """One row of the plan: a cell of an artefact with its seed; ``kind`` is lr, table, seed, variant or long."""

    kind: str
    artefact: str
    cell: str
    seed: int
    tokens: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.cell}-s{self.seed}"

    def seconds(self) -> float:
        """How long the plan expects it to take."""
        if self.kind == "long":
            return LONG_SECONDS
        model = {"flowhn": "flowhn_fac", "hybrid": "shm", "mamba": "mamba2"}.get(self.cell.split("_")[0], self.cell)
        model = self.cell if self.cell in SPEED else model
        training = self.tokens / SPEED.get(model, FAC_SPEED)
        return training + COMPILE_SECONDS + (0 if self.kind == "lr" else EVAL_SECONDS)


def plan_jobs(tokens: int, lr_tokens: int, kinds: str) -> list[Job]:
    """All jobs, what matters most first."""
    from flowhn.artefacts import load_artefact

    jobs = [Job("lr", "table1_lr", cell, 0, lr_tokens) for cell in load_artefact("table1_lr").cells]
    jobs += [Job("table", "table1", cell, 0, tokens) for cell in LONGEST_FIRST]
    jobs += [Job("seed", "table1", cell, 1, tokens) for cell in ("flowhn_no", "flowhn_fac", "shm")]
    jobs += [Job("variant", "beyond", cell, 0, tokens) for cell in VARIANTS]
    jobs += [Job("long", "table1", cell, 0, tokens) for cell in LONG_MODELS]
    return [job for job in jobs if job.kind in kinds.split(",")]


class Session:
    """The folder of a session and what its processes share there: claims, records, the log."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.work = Path(args.work)
        self.jobs = plan_jobs(args.tokens, args.lr_tokens, args.kinds)
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
        from flowhn.artefacts import last_wins, load_artefact
        from flowhn.config import compose
        from flowhn.runs import plan

        words = [f"size={self.args.size}", f"budget={job.tokens}", "data=files", f"data.path={self.args.data}"]
        words += [f"data.val_path={self.args.valid}", f"output_dir={self.work}", f"cache_dir={self.work / 'cache'}"]
        words += ["logger=none", f"seed={job.seed}", *self.args.override]
        if job.kind != "lr":
            words += [f"eval={self.args.eval}", "val_points=10"]
            if self.args.eval == "paper":
                words += [f"eval.data_dir={self.args.eval_dir}", f"eval.tasks={TASKS}"]
            if (rate := self.rate(job)) is not None:
                words.append(f"lr={rate}")
        artefact = load_artefact(job.artefact)
        names = [f"cell={job.cell}", f"artefact={job.artefact}"]
        return plan(compose("train", last_wins([*artefact.overrides, *artefact.cells[job.cell], *words, *names])))

    def lr_records(self) -> list[Any]:
        from flowhn.reporting.record import find_records

        return [record for record in find_records(self.work / "runs", skip_broken=True) if record.artefact == "table1_lr"]

    def rate(self, job: Job) -> float | None:
        from flowhn.reporting.rates import chosen_rates

        if not self._tuned:
            self._tuned = chosen_rates(self.lr_records())
        return self._tuned.get("flowhn" if job.cell.startswith(("flowhn", "fac")) else job.cell)

    def finished(self, job: Job) -> bool:
        return (self.claims / f"{job.name}.done").exists()

    def ready(self, job: Job) -> bool:
        """Learning rates come first; a long-context job needs its trained model."""
        if job.kind == "long":
            table = [other for other in self.jobs if other.kind == "table" and other.cell == job.cell]
            return all(self.finished(other) for other in table)
        return job.kind == "lr" or all(self.finished(other) for other in self.jobs if other.kind == "lr")

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
            if (self.claims / job.name).exists() or job.seconds() > self.left():
                continue
            if not self.ready(job):
                waiting = True
            elif self.claim(job):
                return job
        return "wait" if waiting else "done"


def run_job(session: Session, job: Job, workshop: Any) -> str:
    """Do a job; returns a line for the log."""
    from flowhn.errors import UserError
    from flowhn.experiment import summary

    run = session.run_of(job)
    if job.kind == "long":
        return run_long(session, job, run, workshop)
    try:
        record = workshop.run(run, lambda progress: None, say=session.say)
    except UserError as error:
        if "micro_batch_size" not in str(error):
            raise
        session.say(f"{job.name}: {error}")
        free_memory()
        halved = dict(run.config, micro_batch_size=run.config["global_batch_tokens"] // run.config["seq_len"] // 2)
        record = workshop.run(replace(run, config=halved), lambda progress: None, say=session.say)
    return f"lr {run.config['lr']:g}, {summary(record)}, training {record.wall_seconds['train']:.0f} s"


def run_long(session: Session, job: Job, run: Any, workshop: Any) -> str:
    from flowhn.config import compose, to_dict
    from flowhn.loading import load_run
    from flowhn.run_folder import write_json
    from flowhn.training import resolve_hardware

    suite = to_dict(compose("train", ["eval=long_context", *session.args.long_override]))["eval"]
    hardware = resolve_hardware(run.config)
    loaded = load_run(run.folder, device=hardware.device)
    result = workshop.evaluate(
        loaded.model, loaded.tokenizer, run.config, suite=suite, hardware=hardware,
        heldout_file=workshop.prepare(run.config).heldout_file,
    )  # fmt: skip
    named = {"cell": job.cell, "seed": job.seed, "run_id": run.run_id, "size": session.args.size, "seq_len": run.config["seq_len"]}
    write_json(run.folder / "eval-long_context.json", named | result)
    return f"{result['seconds']:.0f} s"


def free_memory() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device_works() -> bool:
    """Whether this (forked) process can use the GPU that the machine has."""
    import torch

    if not Path("/dev/nvidia0").exists():
        return True
    try:
        return bool(torch.zeros(1, device="cuda").cpu() == 0)
    except (RuntimeError, AssertionError):
        return False


def worker(session: Session, gpu: int, workshop: Any) -> None:
    """Take jobs until none is left that fits. Ends with code 3 after a failure that may have spoilt the process."""
    from flowhn.errors import UserError

    choose_gpu(gpu)
    if workshop is not None and not device_works():  # the parent touched CUDA: begin as a process of its own
        session.say(f"GPU {gpu}: the forked process cannot use it; starting a fresh one")
        os.execv(sys.executable, [sys.executable, __file__, "worker", *sys.argv[2:], "--begun", str(session.args.begun), "--gpu", str(gpu)])
    if workshop is None:
        from flowhn.experiment import Workshop

        workshop = Workshop()
    from flowhn.training.resume import CheckpointKeeper

    # The machine goes back within minutes: a stopped run begins again, and a checkpoint of 1.6 GB for each run would cost a run's time.
    CheckpointKeeper.save = lambda keeper, trainer: None
    while isinstance(job := session.next_job(), Job) or job == "wait":
        if job == "wait":
            time.sleep(1.0)
            continue
        begun = time.time()
        try:
            told = run_job(session, job, workshop)
            spoilt = False
        except BaseException as error:  # one failed job must not end the session
            told, spoilt = f"FAILED: {error!r}", not isinstance(error, UserError)
            (session.work / f"error-{job.name}.txt").write_text(traceback.format_exc(), encoding="utf-8")
        (session.claims / f"{job.name}.done").touch()
        session.say(f"GPU {gpu}: {job.name} in {time.time() - begun:.0f} s (planned {job.seconds():.0f}): {told}")
        if spoilt:
            os._exit(3)  # a CUDA error stays with the process
        free_memory()


def choose_gpu(gpu: int) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)


def warm(session: Session, gpu: int) -> None:
    """Compile models on random tokens until the data are ready: the cache on disk then serves the real runs."""
    choose_gpu(gpu)
    from flowhn.artefacts import load_artefact, plan_cells
    from flowhn.experiment import Workshop
    from flowhn.training.resume import CheckpointKeeper

    CheckpointKeeper.save = lambda keeper, trainer: None
    workshop = Workshop()
    for cell in WARM[gpu % len(WARM)]:
        if (session.work / "prepared").exists():
            return
        words = [f"size={session.args.size}", "data=random", "eval=none", "val_points=0", "logger=none", f"models=[{cell}]", "seeds=[0]"]
        words += ["budget=3", f"output_dir={session.work / 'warm'}", f"cache_dir={session.work / 'warm' / 'cache'}", *session.args.override]
        begun = time.time()
        try:
            workshop.run(next(iter(plan_cells(load_artefact("table1"), words).wanted.values())), lambda progress: None, say=lambda text: None)
            session.say(f"GPU {gpu}: compiled {cell} in {time.time() - begun:.0f} s")
        except Exception as error:  # only a warm-up
            session.say(f"GPU {gpu}: compiling {cell} failed: {error!r}")


def prepare_data(session: Session) -> None:
    from flowhn.experiment import Workshop

    begun = time.time()
    prepared = Workshop().prepare(session.run_of(session.jobs[0]).config)
    session.say(f"data prepared in {time.time() - begun:.0f} s: {prepared.stats['n_train_tokens']:,} tokens, {prepared.stats['n_val_tokens']:,} validation")


def daemon(args: argparse.Namespace) -> None:
    """Prepare once, then one process per GPU, forked so that all of them share data, questions and their tokens."""
    session = Session(args)
    session.say(f"{len(session.jobs)} jobs, {sum(job.seconds() for job in session.jobs):.0f} GPU-seconds planned, {args.seconds:.0f} s on {args.gpus} GPUs")
    (session.work / "prepared").unlink(missing_ok=True)
    for claim in session.claims.iterdir():  # of a daemon that is gone
        claim.unlink()
    warmers = []
    if args.warm:
        words = [sys.executable, __file__, "warm", *sys.argv[2:], "--begun", str(args.begun)]
        warmers = [subprocess.Popen([*words, "--gpu", str(gpu)]) for gpu in range(args.gpus)]
    context = multiprocessing.get_context("fork")
    data = context.Process(target=prepare_data, args=(session,))
    data.start()
    from flowhn.experiment import Workshop

    workshop = Workshop()
    main_jobs = [job for job in session.jobs if job.kind in ("table", "seed", "variant")]
    begun, config = time.time(), None
    if main_jobs and args.eval == "paper":
        config = session.run_of(main_jobs[0]).config
        evaluator = workshop.evaluator(config, suite=config["eval"], tokenizer=None, heldout_file=None)
        session.say(f"evaluation requests built in {time.time() - begun:.0f} s")
    data.join()
    (session.work / "prepared").touch()
    if data.exitcode:
        session.say("the data could not be prepared; see daemon.out")
        raise SystemExit(1)
    prepared = workshop.prepare(session.run_of(session.jobs[0]).config)
    if config is not None:
        begun = time.time()
        workshop.prepare(config)
        evaluator.encode(workshop.tokenizer(prepared))
        session.say(f"requests tokenised in {time.time() - begun:.0f} s")
    import flowhn.training  # noqa: F401  (imported once, before the fork)

    workers: dict[int, Any] = {}
    while len(workers) < args.gpus or any(process.is_alive() for process in workers.values()):
        for gpu in range(args.gpus):
            warming = bool(warmers) and warmers[gpu].poll() is None
            old = workers.get(gpu)
            if (old is None and not warming) or (old is not None and old.exitcode not in (None, 0)):
                workers[gpu] = context.Process(target=worker, args=(session, gpu, workshop))
                workers[gpu].start()
        time.sleep(0.5)
    session.say("all jobs that fit are done")
    (session.work / "finished").touch()


def pack(args: argparse.Namespace) -> None:
    """Records, long-context results and logs into one file; the commit is filled in, because the machine has no .git."""
    from flowhn.reporting.record import read_record, write_record

    work = Path(args.work)
    with tarfile.open(args.out, "w:gz") as archive:
        for path in sorted([*work.glob("runs/*/record.json"), *work.glob("runs/*/eval-*.json"), *work.glob("*.log"), *work.glob("error-*.txt")]):
            if path.name == "record.json" and args.commit:
                record = read_record(path)
                if record.git.get("commit") is None:
                    write_record(path, replace(record, git={"commit": args.commit, "dirty": False}))
            archive.add(path, arcname=str(path.relative_to(work)))
    sys.stdout.write(f"{args.out}: {Path(args.out).stat().st_size / 1e6:.2f} MB\n")


def keep(args: argparse.Namespace) -> None:
    """Sort a packed file's records into experiments/ and write the chosen learning rates into configs/artefacts/table1.yaml."""
    from flowhn.artefacts import load_artefact
    from flowhn.reporting.record import find_records, write_record

    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(args.file) as archive:
            archive.extractall(folder, filter="data")
        records = find_records(Path(folder))
        for name in ("table1", "table1_lr", "beyond"):
            cells = load_artefact(name).cells
            mine = [record for record in records if record.cell in cells]
            target = Path(args.into) / name / args.setting / "records"
            for record in mine:
                write_record(target / f"{record.cell}-s{record.seed}.json", record)
            sys.stdout.write(f"{name}: {len(mine)} records in {target}\n")
        results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(Path(folder).glob("runs/*/eval-long_context.json"))]
        for result in results:
            path = Path(args.into) / "long_context" / args.setting / "evals" / f"{result['cell']}-s{result['seed']}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        sys.stdout.write(f"long_context: {len(results)} results\n")
        tried = [record for record in records if record.artefact == "table1_lr"]
    if tried and args.rates:
        write_rates(Path(args.rates), tried)


def write_rates(path: Path, records: list[Any]) -> None:
    """Put the chosen rates into the line of their size in ``configs/artefacts/table1.yaml``."""
    from flowhn.reporting.rates import chosen_rates

    size = records[0].size
    rates = chosen_rates(records)
    order = ("llama", "mamba1", "mamba2", "jamba", "shm", "hymba", "flowhn")
    told = ", ".join(f"{model}: {rates[model]:.1e}".replace("e-0", "e-") for model in order if model in rates)
    lines = path.read_text(encoding="utf-8").split("\n")
    at = [number for number, line in enumerate(lines) if line.startswith(f"  {size}: {{max_tokens:")]
    if len(at) != 1:
        raise SystemExit(f"{path} has no line of learning rates for {size}")
    limit = lines[at[0]].split("max_tokens: ")[1].split(",")[0]
    lines[at[0]] = f"  {size}: {{max_tokens: {limit}, {told}}}"
    path.write_text("\n".join(lines), encoding="utf-8")
    sys.stdout.write(f"{path}: {told}\n")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("daemon", "warm", "worker", "pack", "keep", "plan"))
    parser.add_argument("file", nargs="?", help="keep: the packed file")
    parser.add_argument("--work", default="/tmp/accuracy")
    parser.add_argument("--out", default="accuracy.tgz")
    parser.add_argument("--commit", default=os.environ.get("COMMIT"))
    parser.add_argument("--into", default=str(ROOT / "experiments"))
    parser.add_argument("--rates", default=str(ROOT / "configs" / "artefacts" / "table1.yaml"), help="keep: where the rates go; empty: nowhere")
    parser.add_argument("--setting", default="135m-files-30M")
    parser.add_argument("--seconds", type=float, default=800.0, help="no job is begun that would end later than this")
    parser.add_argument("--begun", type=float, default=time.time())
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--gpu", type=int, default=0)
    parser.add_argument("--size", default="135m")
    parser.add_argument("--tokens", type=int, default=30_000_000)
    parser.add_argument("--lr-tokens", type=int, default=4_000_000)
    parser.add_argument("--kinds", default="lr,table,seed,variant,long")
    parser.add_argument("--data", default="data")
    parser.add_argument("--valid", default="valid")
    parser.add_argument("--eval", default="paper")
    parser.add_argument("--eval-dir", default="eval")
    parser.add_argument("--no-warm", dest="warm", action="store_false")
    parser.add_argument("--override", action="append", default=[], help="one more key=value for every run")
    parser.add_argument("--long-override", action="append", default=[], help="one more key=value for the long-context suite")
    return parser.parse_args(argv)


def main() -> None:
    args = parse(sys.argv[1:])
    if args.command == "warm":
        warm(Session(args), args.gpu)
    elif args.command == "worker":
        worker(Session(args), args.gpu, None)
    elif args.command == "plan":
        jobs = plan_jobs(args.tokens, args.lr_tokens, args.kinds)
        for job in jobs:
            sys.stdout.write(f"{job.name:<34}{job.seconds():6.0f} s\n")
        sys.stdout.write(f"{'all':<34}{sum(job.seconds() for job in jobs):6.0f} GPU-seconds\n")
    else:
        {"daemon": daemon, "pack": pack, "keep": keep}[args.command](args)


if __name__ == "__main__":
    main()
