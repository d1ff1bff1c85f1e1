"""The same run on one and on several processes (gloo, CPU): do its losses, its restarts and its ends agree?

    python scripts/compare_processes.py --out docs/reliability/processes.json          all of it, about 20 minutes on 2 cores
    python scripts/compare_processes.py --models flowhn --processes 2 --parts losses   a minute

Parts:
    losses   every model under ddp and fsdp on 1, 2 and 4 processes against one process without either: the largest
             difference of a batch loss, of a validation loss and of a final weight.
    resume   stopped by SIGTERM on some processes, gone on with on others (and with the other strategy): the same comparison,
             and the checkpoint as one safetensors file by flowhn-convert.
    lost     one process killed (SIGKILL) in training: does the job end, how soon, with which code and sentence; and
             does the same command then end with the same losses.
    launch   started by torchrun, by two torchrun nodes, and as Slurm would (srun's variables): the same comparison.

Every run is a command that a user could give. Exit code 1 when a loss differs by more than 1e-5, or a job did not end.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import psutil

MODELS = ("llama", "hymba", "flowhn")
LIMIT = 1e-5
STEPS = 8
LONG_STEPS = 40  # of runs that are stopped: too many to be done before
# In double precision: over so many steps the rounding of another summation order grows in single precision.
STOPPED = ("precision=64-true", "trainer.checkpoint.every_n_steps=5")
HANG_SECONDS = 300
PARTS = ("losses", "resume", "lost", "launch")


class Run:
    """One run in a folder of its own; ``words`` are added to what all runs share."""

    seconds = 0.0

    def __init__(self, work: Path, name: str, *words: str, steps: int = STEPS) -> None:
        self.folder = work / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.words = [
            "device=cpu", "data=docs", "eval=none", "logger=none", "seq_len=64", "global_batch_tokens=512",
            f"budget={512 * steps}", "val_points=2", "val_rows=7", "trainer.throughput.peak_flops=1e11",
            f"cache_dir={work / 'cache'}", f"output_dir={self.folder}", *words,
        ]  # fmt: skip

    def command(self, *launcher: str) -> list[str]:
        """The command line, behind a launcher's."""
        return [*(launcher or (sys.executable,)), "-m", "flowhn.train", *self.words]

    def start(self, *launcher: str, **variables: str) -> subprocess.Popen:
        """Start it; its output goes to ``output.log`` in the folder."""
        environment = {
            key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "TORCHELASTIC"))
        }
        environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | variables
        with (self.folder / "output.log").open("ab") as log:
            return subprocess.Popen(
                self.command(*launcher), stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def finish(self, *launcher: str) -> Run:
        """Run it to its end.

        Raises:
            RuntimeError: it ended with another code than 0.
        """
        begun = time.monotonic()
        code = self.start(*launcher).wait(timeout=1200)
        self.seconds = round(time.monotonic() - begun, 1)
        if code:
            raise RuntimeError(f"{' '.join(self.command(*launcher))} ended with {code}: {self.said()[-1500:]}")
        return self

    def said(self) -> str:
        """Its output so far."""
        path = self.folder / "output.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def found(self, pattern: str) -> list[Path]:
        """Files of its folder."""
        return sorted(self.folder.glob(f"runs/*/{pattern}"))

    def record(self) -> dict[str, Any]:
        """Its record."""
        return json.loads(self.found("record.json")[0].read_text(encoding="utf-8"))


def difference(one: Run, other: Run) -> dict[str, float]:
    """Largest differences of two finished runs."""
    from safetensors.torch import load_file

    mine, theirs = one.record()["losses"], other.record()["losses"]
    weights = load_file(one.found("model.safetensors")[0]), load_file(other.found("model.safetensors")[0])
    loss = {
        kind: max(abs(a[1] - b[1]) for a, b in zip(mine[kind], theirs[kind], strict=True)) for kind in ("train", "val")
    }
    weight = max(float((weights[0][name] - weights[1][name]).abs().max()) for name in weights[0])
    return {
        "batch_losses": len(mine["train"]),
        "max_loss_difference": max(loss.values()),
        "max_weight_difference": weight,
    }


def spread(strategy: str, processes: int) -> list[str]:
    """Overrides for so many processes of this machine."""
    return [f"trainer={strategy}", "device=cpu", f"trainer.devices={processes}"]


def losses(work: Path, models: Iterable[str], counts: Iterable[int]) -> list[dict[str, Any]]:
    """Every model, strategy and number of processes against one process."""
    rows = []
    for model in models:
        alone = Run(work, f"{model}-alone", f"model={model}").finish()
        for strategy in ("ddp", "fsdp"):
            for count in counts:
                other = Run(work, f"{model}-{strategy}-{count}", f"model={model}", *spread(strategy, count)).finish()
                row = {"model": model, "strategy": strategy, "processes": count} | difference(alone, other)
                rows.append(row | {"tokens_per_second": other.record()["throughput"]["tps"]})
                print(row, flush=True)
    return rows


def wait_for(run: Run, process: subprocess.Popen, ready: Callable[[], Any]) -> None:
    """
    Raises:
        RuntimeError: the process ended first, or never came so far.
    """
    begun = time.monotonic()
    while not ready():
        if process.poll() is not None or time.monotonic() - begun > HANG_SECONDS:
            raise RuntimeError(f"not so far with code {process.poll()}: {run.said()[-1500:]}")
        time.sleep(0.1)


def training(run: Run) -> Callable[[], bool]:
    """Whether two checkpoints are whole, so that training is well under way."""
    return lambda: len(run.found("checkpoints/step-*.json")) >= 2


def resume(work: Path, plans: Iterable[tuple[tuple[str, int], ...]]) -> list[dict[str, Any]]:
    """Each plan is (strategy, processes) one after another; all but the last are stopped by SIGTERM."""
    rows = []
    words = ["model=flowhn", *STOPPED]
    alone = Run(work, "resume-alone", *words, steps=LONG_STEPS).finish()
    for number, stations in enumerate(plans):
        saved = []
        for strategy, count in stations[:-1]:
            run = Run(work, f"resume-{number}", *words, *spread(strategy, count), steps=LONG_STEPS)
            before = {path.name for path in run.found("checkpoints/step-*.json")}
            process = run.start()
            wait_for(run, process, lambda: {path.name for path in run.found("checkpoints/step-*.json")} - before)  # noqa: B023
            process.send_signal(signal.SIGTERM)
            begun = time.monotonic()
            code = process.wait(timeout=HANG_SECONDS)
            newest = run.found("checkpoints/step-*.ckpt")[-1]
            saved.append({"code": code, "seconds": round(time.monotonic() - begun, 2), "checkpoint": newest.name})
            saved[-1]["files"] = sum(1 for _ in newest.glob("*.distcp")) or 1
            saved[-1]["safetensors_tensors"] = converted(newest, work / f"converted-{number}.safetensors")
        strategy, count = stations[-1]
        last = Run(work, f"resume-{number}", *words, *spread(strategy, count), steps=LONG_STEPS).finish()
        row = {"stations": [f"{name} on {n}" for name, n in stations], "stopped": saved}
        rows.append(row | {"resumed": last.record()["resumed"]} | difference(alone, last))
        print(rows[-1], flush=True)
    return rows


def converted(checkpoint: Path, out: Path) -> int:
    """Tensors of the safetensors file that ``flowhn-convert checkpoint`` makes."""
    from safetensors import safe_open

    from flowhn.convert import _main

    out.unlink(missing_ok=True)
    _main(["checkpoint", str(checkpoint), "--out", str(out)])
    with safe_open(out, framework="pt") as file:
        return len(list(file.keys()))


def family(process: subprocess.Popen) -> list[psutil.Process]:
    """The run's processes, the first one first."""
    parent = psutil.Process(process.pid)
    others = [child for child in parent.children(recursive=True) if "flowhn.train" in " ".join(child.cmdline())]
    return [parent, *sorted(others, key=lambda child: child.create_time())]


def lost(work: Path, cases: Iterable[tuple[str, int, int]]) -> list[dict[str, Any]]:
    """Each case is (strategy, processes, which of them is killed)."""
    rows = []
    words = ["model=llama", *STOPPED]
    alone = Run(work, "lost-alone", *words, steps=LONG_STEPS).finish()
    for strategy, count, victim in cases:
        run = Run(work, f"lost-{strategy}-{count}-{victim}", *words, *spread(strategy, count), steps=LONG_STEPS)
        process = run.start()
        wait_for(run, process, training(run))
        members = family(process)
        members[victim].kill()
        begun = time.monotonic()
        code = process.wait(timeout=HANG_SECONDS)
        _, alive = psutil.wait_procs(members, timeout=HANG_SECONDS)
        seconds = time.monotonic() - begun
        said = [line for line in run.said().splitlines() if line.startswith("error:")]
        row = {"strategy": strategy, "processes": count, "killed": victim, "code": code, "left_over": len(alive)}
        row |= {"seconds_to_end": round(seconds, 2), "said": said[-1] if said else None}
        rows.append(row | difference(alone, run.finish()))
        print(rows[-1], flush=True)
    return rows


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launch(work: Path) -> list[dict[str, Any]]:
    """torchrun, two nodes of torchrun, and srun's variables; two processes each."""
    alone, rows = Run(work, "launch-alone", "model=flowhn").finish(), []
    for strategy in ("ddp", "fsdp"):
        for name, start in (("torchrun", _torchrun), ("torchrun, 2 nodes", _two_nodes), ("srun's variables", _slurm)):
            nodes = 2 if "nodes" in name else 1
            words = ["model=flowhn", f"trainer={strategy}", "device=cpu", f"trainer.num_nodes={nodes}"]
            run = Run(work, f"launch-{strategy}-{start.__name__}", *words)
            codes = [process.wait(timeout=600) for process in start(run)]
            if any(codes):
                raise RuntimeError(f"{name} ended with {codes}: {run.said()[-1500:]}")
            rows.append(
                {"launcher": name, "strategy": strategy, "processes": 2, "codes": codes} | difference(alone, run)
            )
            print(rows[-1], flush=True)
    return rows


def _torchrun(run: Run) -> list[subprocess.Popen]:
    return [run.start(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")]


def _two_nodes(run: Run) -> list[subprocess.Popen]:
    words = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
    words += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    return [run.start(*words, "--node_rank", str(node)) for node in range(2)]


def _slurm(run: Run) -> list[subprocess.Popen]:
    shared = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NUM_NODES": "1", "SLURM_NNODES": "1"}
    shared |= {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "flowhn", "SLURM_NODELIST": "localhost", "SLURM_NODEID": "0"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [run.start(**shared, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)) for rank in range(2)]


def faults(result: dict[str, Any]) -> list[str]:
    """What is not as it has to be."""
    found = []
    for part in PARTS:
        for row in result.get("rows" if part == "losses" else part, []):
            about = f"{part}: " + ", ".join(f"{key} {row[key]}" for key in list(row)[:3])
            if not row["max_loss_difference"] <= LIMIT:
                found.append(f"{about}: losses differ by {row['max_loss_difference']:.2g}")
            if part == "lost" and (row["code"] == 0 or row["left_over"]):
                found.append(f"{about}: code {row['code']}, {row['left_over']} processes left")
            if part == "resume" and any(stop["code"] != 128 + signal.SIGTERM for stop in row["stopped"]):
                found.append(f"{about}: {row['stopped']}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="write the result as JSON; parts not measured stay")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--processes", nargs="+", type=int, default=(1, 2, 4))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    args = parser.parse_args()
    from flowhn.reporting.record import environment

    result = json.loads(args.out.read_text(encoding="utf-8")) if args.out and args.out.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="flowhn-processes-") as name:
        work = Path(name)
        parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
            "losses": lambda: losses(work, args.models, args.processes),
            "resume": lambda: resume(
                work,
                [
                    (("ddp", 2), ("ddp", 1), ("ddp", 4)),
                    (("fsdp", 4), ("fsdp", 2), ("ddp", 1)),
                    (("ddp", 1), ("fsdp", 2)),
                ],
            ),
            "lost": lambda: lost(work, [("ddp", 2, 1), ("ddp", 4, 0), ("fsdp", 2, 1), ("fsdp", 4, 2)]),
            "launch": lambda: launch(work),
        }
        for part in args.parts:
            result["rows" if part == "losses" else part] = parts[part]()
            result |= {"limit": LIMIT, "failures": faults(result)}
            found = environment()
            result |= {"commit": found["git"]["commit"], "dirty": found["git"]["dirty"], "versions": found["versions"]}
            if args.out is not None:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"failures: {result['failures'] or 'none'}")
    return 1 if result["failures"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
