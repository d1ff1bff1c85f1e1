"""Issue 5's training on a machine with one or several GPUs that is lent for minutes: what to run, in which order, until when.

    python scripts/accuracy_session.py daemon --work DIR ...    prepare, then one process per GPU; ends by itself at --seconds
    python scripts/accuracy_session.py pack --work DIR --out FILE.tgz    records (and long-context results) into one file
    python scripts/accuracy_session.py keep FILE.tgz [--setting NAME]    that file into experiments/, rates into table1.yaml

scripts/accuracy_session.sh calls it and holds the plan with its arithmetic. Jobs wait in one list, what matters most first: learning rates
(table1_lr), the ten models, second seeds, FAC variants (beyond), long context. Each GPU takes the next job that is ready and fits into the time
left. Where the ten models are trained, the learning rates chosen from this session's own records go into their command lines; a session without
them takes the committed rates, and what it tries itself comes last.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from accuracy_jobs import PREPARE_SECONDS, Job, Session, planned, timetable
from accuracy_keep import keep, pack

ROOT = Path(__file__).resolve().parents[1]
LONG_RESULT = "eval-long_context.json"
GIVEN = "FLOWHN_SESSION_GPUS"  # CUDA_VISIBLE_DEVICES as the daemon was started with it
WARM_AT_MOST = 4  # models that a GPU compiles while the data are prepared: its jobs wait for that


def run_job(session: Session, job: Job, workshop: Any) -> tuple[str, bool]:
    """Do a job; returns a line for the log, and whether there was anything to do."""
    from flowhn.run_folder import WEIGHTS_NAME

    run = session.run_of(job)
    if job.kind == "long":
        return run_long(session, run, workshop)
    old = run.record()
    asked = (run.folder / WEIGHTS_NAME).is_file() or (run.folder / LONG_RESULT).is_file()
    if old is not None and (asked or not session.wants_weights(job)):
        return "its record is there already", False
    # A record from another machine came without the weights that are asked next: train again.
    kept = None if old is None else run.record_path.read_bytes()
    run.record_path.unlink(missing_ok=True)
    try:
        return train(session, job, run, workshop), True
    except BaseException:
        if kept is not None:
            run.record_path.write_bytes(kept)
        raise


def train(session: Session, job: Job, run: Any, workshop: Any) -> str:
    """Train and evaluate, with half the micro-batch where memory is short."""
    from flowhn.errors import UserError
    from flowhn.experiment import summary

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


def run_long(session: Session, run: Any, workshop: Any) -> tuple[str, bool]:
    from flowhn.run_folder import write_json
    from flowhn.run_long_context import asked_of, evaluate_long, long_suite

    suite = long_suite(session.args.long_override)
    path = run.folder / LONG_RESULT
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")).get("asked") == asked_of(suite):
        return "its result is there already", False
    result = evaluate_long(run, suite, workshop) | {"asked": asked_of(suite)}  # else reproduce.sh would ask again
    write_json(path, result)
    return f"{result['seconds']:.0f} s", True


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
        os.execv(
            sys.executable,
            [sys.executable, __file__, "worker", *sys.argv[2:], "--begun", str(session.args.begun), "--gpu", str(gpu)],
        )
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
            told, counts = run_job(session, job, workshop)
            spoilt = False
        except BaseException as error:  # one failed job must not end the session
            told, counts, spoilt = f"FAILED: {error!r}", False, not isinstance(error, UserError)
            (session.work / f"error-{job.name}.txt").write_text(traceback.format_exc(), encoding="utf-8")
        session.finish(job, time.time() - begun, counts=counts)
        session.say(f"GPU {gpu}: {job.name} in {time.time() - begun:.0f} s (planned {job.seconds():.0f}): {told}")
        if spoilt:
            os._exit(3)  # a CUDA error stays with the process
        free_memory()


def goes_on(workers: dict[int, Any], gpus: int) -> bool:
    """Whether a GPU has no worker yet, or one that runs or ended after a failure and has to be started again."""
    return len(workers) < gpus or any(process.exitcode != 0 for process in workers.values())


def choose_gpu(gpu: int) -> None:
    """Give this process the GPU of this number among those that the daemon was given, however often it is asked."""
    given = os.environ.setdefault(GIVEN, os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    os.environ["CUDA_VISIBLE_DEVICES"] = given.split(",")[gpu] if given else str(gpu)


def check_gpus(gpus: int) -> None:
    """Raises UserError where fewer GPUs were given than asked for: their workers could only fail and be started again."""
    from flowhn.errors import UserError

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given and len(given.split(",")) < gpus:
        raise UserError(f"--gpus={gpus} is more than CUDA_VISIBLE_DEVICES={given} names; ask for as many as it has")


def to_warm(session: Session, gpu: int) -> list[Job]:
    """The first jobs of each model that this session trains, dealt to its GPUs; the learning rate compiles nothing anew."""
    from flowhn.artefacts import cells_at, load_artefact

    first: dict[tuple[str, ...], Job] = {}
    for job in session.jobs:
        words = cells_at(load_artefact(job.artefact), session.args.size, [job.cell])[job.cell]
        first.setdefault(tuple(word for word in words if not word.startswith("lr=")), job)
    return list(first.values())[gpu :: session.args.gpus][:WARM_AT_MOST]


def warm(session: Session, gpu: int) -> None:
    """Compile models on random tokens until the data are ready: the cache on disk then serves the real runs."""
    choose_gpu(gpu)
    from flowhn.artefacts import load_artefact, plan_cells
    from flowhn.experiment import Workshop
    from flowhn.training.resume import CheckpointKeeper

    CheckpointKeeper.save = lambda keeper, trainer: None
    workshop = Workshop()
    for job in to_warm(session, gpu):
        if (session.work / "prepared").exists():
            return
        words = [
            f"size={session.args.size}",
            "data=random",
            "eval=none",
            "val_points=0",
            "logger=none",
            f"models=[{job.cell}]",
            "seeds=[0]",
        ]
        words += [
            "budget=3",
            f"output_dir={session.work / 'warm'}",
            f"cache_dir={session.work / 'warm' / 'cache'}",
            *session.args.override,
        ]
        begun = time.time()
        try:
            workshop.run(
                next(iter(plan_cells(load_artefact(job.artefact), words).wanted.values())),
                lambda progress: None,
                say=lambda text: None,
            )
            session.say(f"GPU {gpu}: compiled {job.cell} in {time.time() - begun:.0f} s")
        except Exception as error:  # only a warm-up
            session.say(f"GPU {gpu}: compiling {job.cell} failed: {error!r}")


def prepare_data(session: Session) -> None:
    from flowhn.experiment import Workshop

    begun = time.time()
    prepared = Workshop().prepare(session.run_of(session.jobs[0]).config)
    session.say(
        f"data prepared in {time.time() - begun:.0f} s: {prepared.stats['n_train_tokens']:,} tokens, {prepared.stats['n_val_tokens']:,} validation"
    )


def build_long_questions(config: dict[str, Any], prepared: Any, workshop: Any, words: list[str]) -> None:
    """In the process that is forked: the first model asked on each GPU would otherwise wait two minutes for them."""
    from flowhn.run_long_context import long_suite

    workshop.prepare(config)
    tokenizer = workshop.tokenizer(prepared)
    suite = long_suite(words)
    workshop.evaluator(config, suite=suite, tokenizer=tokenizer, heldout_file=prepared.heldout_file).encode(tokenizer)


def daemon(args: argparse.Namespace) -> None:
    """Prepare once, then one process per GPU, forked so that all of them share data, questions and their tokens."""
    check_gpus(args.gpus)
    session = Session(args)
    session.describe()
    session.say(
        f"{len(session.jobs)} jobs, {sum(job.seconds() for job in session.jobs):.0f} GPU-seconds planned, {args.seconds:.0f} s on {args.gpus} GPUs"
    )
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
        session.say("the data could not be prepared; see daemon.log")
        raise SystemExit(1)
    prepared = workshop.prepare(session.run_of(session.jobs[0]).config)
    if config is not None:
        begun = time.time()
        workshop.prepare(config)
        evaluator.encode(workshop.tokenizer(prepared))
        session.say(f"requests tokenised in {time.time() - begun:.0f} s")
    if long := [job for job in session.jobs if job.kind == "long"]:
        begun = time.time()
        try:
            build_long_questions(session.run_of(long[0]).config, prepared, workshop, args.long_override)
            session.say(f"long contexts built and tokenised in {time.time() - begun:.0f} s")
        except Exception as error:  # the other jobs do without; these will say it again
            session.say(f"long contexts could not be built: {error!r}")
    import flowhn.training  # noqa: F401  (imported once, before the fork)

    while args.hold and Path(args.hold).exists():
        time.sleep(0.5)
    workers: dict[int, Any] = {}
    while goes_on(workers, args.gpus):
        for gpu in range(args.gpus):
            warming = bool(warmers) and warmers[gpu].poll() is None
            old = workers.get(gpu)
            if (old is None and not warming) or (old is not None and old.exitcode not in (None, 0)):
                workers[gpu] = context.Process(target=worker, args=(session, gpu, workshop))
                workers[gpu].start()
        time.sleep(0.5)
    session.say("all jobs that fit are done")
    (session.work / "finished").touch()


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("daemon", "warm", "worker", "pack", "keep", "plan"))
    parser.add_argument("file", nargs="?", help="keep: the packed file")
    parser.add_argument("--work", default="/tmp/accuracy")
    parser.add_argument("--out", default="accuracy.tgz")
    parser.add_argument("--commit", default=os.environ.get("COMMIT"))
    parser.add_argument("--into", default=str(ROOT / "experiments"))
    parser.add_argument(
        "--rates",
        default=str(ROOT / "configs" / "artefacts" / "table1.yaml"),
        help="keep: where the rates go; empty: nowhere",
    )
    parser.add_argument(
        "--setting", default="", help="keep: the folder's name; empty: size, files and the session's tokens"
    )
    parser.add_argument("--seconds", type=float, default=800.0, help="no job is begun that would end later than this")
    parser.add_argument("--begun", type=float, default=time.time())
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--gpu", type=int, default=0)
    parser.add_argument("--size", default="135m")
    parser.add_argument("--tokens", type=int, default=30_000_000)
    parser.add_argument("--lr-tokens", type=int, default=4_000_000)
    parser.add_argument("--kinds", default="lr,table,seed,variant,long")
    parser.add_argument("--extra", action="append", default=[], help="one more row of Table 1, cell:seed")
    parser.add_argument(
        "--variants", default="", help="rows of beyond, or row:seed, with commas; all, where none is named"
    )
    parser.add_argument(
        "--rows",
        default="",
        help="models of Table 1 to train, in this order, with commas; all ten, where none is named",
    )
    parser.add_argument(
        "--tries", default="", help="rows of table1_lr to try, with commas; those of --kinds, where none is named"
    )
    parser.add_argument(
        "--replace",
        action="store_true",
        help="keep: rows of Table 1 count although others were not trained beside them",
    )
    parser.add_argument("--long-seed", type=int, default=0, help="the seed of the models asked over long contexts")
    parser.add_argument("--data", default="data")
    parser.add_argument("--valid", default="valid")
    parser.add_argument("--eval", default="paper")
    parser.add_argument("--eval-dir", default="eval")
    parser.add_argument("--hold", default="", help="prepare, but begin to train when this file is gone")
    parser.add_argument("--no-warm", dest="warm", action="store_false")
    parser.add_argument("--override", action="append", default=[], help="one more key=value for every run")
    parser.add_argument(
        "--long-override", action="append", default=[], help="one more key=value for the long-context suite"
    )
    return parser.parse_args(argv)


def main() -> None:
    from flowhn.errors import UserError

    args = parse(sys.argv[1:])
    try:
        if args.command == "warm":
            warm(Session(args), args.gpu)
        elif args.command == "worker":
            worker(Session(args), args.gpu, None)
        else:
            {"daemon": daemon, "pack": pack, "plan": show_plan, "keep": keep}[args.command](args)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(2) from None


def show_plan(args: argparse.Namespace) -> None:
    """Each job with its seconds, and when it would end on one and on two GPUs."""
    jobs = planned(args)
    ends = [timetable(jobs, gpus=gpus, seconds=args.seconds) for gpus in (1, 2)]
    sys.stdout.write(
        f"{'job':<34}{'seconds':>9}{'1 GPU: ends at':>18}{'2 GPUs: ends at':>18}\n"
        f"{'preparing (assumed)':<34}{PREPARE_SECONDS:9.0f}{PREPARE_SECONDS:18.0f}{PREPARE_SECONDS:18.0f}\n"
    )
    for job in jobs:
        told = [f"{end[job.name]:18.0f}" if job.name in end else f"{'does not fit':>18}" for end in ends]
        sys.stdout.write(f"{job.name:<34}{job.seconds():9.0f}{''.join(told)}\n")
    fitting = [f"{len(end)} of {len(jobs)} jobs" for end in ends]
    total = sum(job.seconds() for job in jobs)
    sys.stdout.write(f"{f'all, within {args.seconds:.0f} s':<34}{total:9.0f}{fitting[0]:>18}{fitting[1]:>18}\n")


if __name__ == "__main__":
    main()
