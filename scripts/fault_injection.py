"""Kill a small sweep again and again, and compare what it ends with to a sweep that was left alone.

    python scripts/fault_injection.py --kills 30 --seed 7 --out faults.json

The sweep is ``flowhn-reproduce table1`` with three tiny models: data preparation, training with validation and
checkpoints, evaluation, records, table. A process is killed (SIGKILL, SIGTERM or SIGINT) in a phase that the seed picks,
at a random moment of it, and the same command is started again until the sweep is done; a sweep that is done before
all kills are spent is followed by another in a fresh folder. Then every batch loss, validation loss, evaluation figure
and the SHA-256 of each run's weights must equal the undisturbed sweep's; ``resumed`` must be the number of
continuations that were seen; SIGTERM must end the process within 30 s with the code that schedulers requeue on (143),
with a checkpoint of the last finished step. The seed decides signals, phases and delays; the moments in the program
that they hit also depend on the machine's speed. Exit code 0 when nothing differs.

``--warm`` forks the processes from one that has everything imported, which saves seconds for each; ``--cold N`` keeps N
of them fresh processes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here or in a child

import fault_child
from fault_process import Child

MODELS = "models=[llama,mamba2,flowhn_fac]"
SMALL = ["budget=8192", "val_points=4", "val_rows=16", "eval.limit=8", "size.n_layers.llama=1", "size.n_layers.mamba2=1",
         "size.n_layers.flowhn=1", "trainer.throughput.peak_flops=1e11", "trainer.checkpoint.every_n_steps=3"]  # fmt: skip
PHASES = ("start", "data", "step", "checkpoint", "validation", "training", "weights", "evaluation", "record", "table")
# Phase -> longest delay in seconds between its beginning (or the process's) and the kill, on this sweep.
DELAYS = {"start": 6.0, "data": 4.0, "step": 0.2, "checkpoint": 0.01, "validation": 0.04, "training": 1.0, "weights": 0.01,
          "evaluation": 0.8, "record": 0.01, "table": 0.4}  # fmt: skip
WARM_START_DELAY = 0.3
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
WITHIN = 30.0  # seconds for SIGTERM


def outcome(folder: Path) -> dict[str, Any]:
    """What must be equal of a finished sweep, for each model; ``resumed`` besides."""
    found = {}
    for path in sorted(folder.glob("runs/*/record.json")):
        record = json.loads(path.read_text())
        found[record["cell"]] = {
            "batch losses": record["losses"]["train"],
            "validation losses": [point[:2] for point in record["losses"]["val"]],
            "evaluation": record["evaluation"],
            "steps": record["steps"],
            "weights": hashlib.sha256((path.parent / "model.safetensors").read_bytes()).hexdigest(),
            "resumed": record["resumed"],
        }
    return found


def differences(wanted: dict[str, Any], found: dict[str, Any], where: str) -> list[str]:
    """One sentence for each thing in which two sweeps differ."""
    out = [f"{where}: {cell} has no record" for cell in sorted(set(wanted) - set(found))]
    for cell in sorted(set(wanted) & set(found)):
        out += [f"{where}: {cell}: {key} differ" for key in wanted[cell]
                if key != "resumed" and wanted[cell][key] != found[cell][key]]  # fmt: skip
    return out


class Campaign:
    """Kills until all are spent, then compares."""

    def __init__(self, folder: Path, *, kills: int, seed: int, warm: bool, cold: int) -> None:
        self.folder, self.n_kills, self.warm, self.cold = folder, kills, warm, cold
        self.random = random.Random(seed)
        self.kills: list[dict[str, Any]] = []
        self.faults: list[str] = []
        self.restarts = self.rounds = self.missed = 0
        self.batch_losses = 0
        self._phases: list[str] = []
        self.plan = [self._aim() for _ in range(kills)]  # drawn beforehand: the same for a seed whatever happens

    def _words(self, name: str) -> list[str]:
        return [
            "table1",
            MODELS,
            *SMALL,
            f"output_dir={self.folder / name}",
            f"cache_dir={self.folder / name / 'cache'}",
        ]

    def _start(self, name: str, log: str) -> Child:
        warm = self.warm and len(self.kills) >= self.cold
        return Child(self._words(name), self.folder / f"{log}.log", warm=warm)

    def reference(self) -> dict[str, Any]:
        child = self._start("reference", "reference")
        if child.join() != 0:
            raise SystemExit(f"the undisturbed sweep ended with code {child.code}: see {self.folder}/reference.log")
        return outcome(self.folder / "reference")

    def run(self) -> None:
        wanted = self.reference()
        while len(self.kills) < self.n_kills:
            self.rounds += 1
            name = f"sweep{self.rounds}"
            resumed = [0, 0]  # continuations that ended, that began
            while not self._attempt(name, resumed):
                self.restarts += 1
            found = outcome(self.folder / name)
            self.faults += differences(wanted, found, name)
            total = sum(run["resumed"] for run in found.values())
            if not resumed[0] <= total <= resumed[1]:
                self.faults.append(f"{name}: the records say resumed={total}, seen were {resumed[0]} to {resumed[1]}")
            self.batch_losses += sum(len(run["batch losses"]) for run in found.values())

    def _attempt(self, name: str, resumed: list[int]) -> bool:
        """One process, killed if a kill is left and its moment comes; returns whether the sweep is done."""
        aim = dict(self.plan[len(self.kills)]) if len(self.kills) < self.n_kills else None
        if aim and aim["aimed_at"] == "data":
            shutil.rmtree(self.folder / name / "cache", ignore_errors=True)  # as on a machine that starts afresh
        child = self._start(name, name)
        killed = aim is not None and self._kill(child, aim, name)
        code = child.join()
        resumed[0] += child.counts["-resume"]
        resumed[1] += child.counts["resume"]
        if killed and aim:
            self._judge(child, aim, code, name)
        elif code != 0:
            self.faults.append(f"{name}: an undisturbed start ended with code {code}: see {self.folder}/{name}.log")
            return True
        else:
            self.missed += aim is not None
        return code == 0

    def _aim(self) -> dict[str, Any]:
        if not self._phases:
            self._phases = self.random.sample(PHASES, len(PHASES))
        phase = self._phases.pop()
        return {
            "signal": self.random.choice(SIGNALS),
            "aimed_at": phase,
            "times": self.random.randint(1, 8) if phase == "step" else self.random.randint(1, 2) if phase in ("checkpoint", "validation") else 1,
            "share": self.random.random(),
        }  # fmt: skip

    def _kill(self, child: Child, aim: dict[str, Any], name: str) -> bool:
        if not child.wait_until(aim["aimed_at"], aim["times"]):
            return False
        longest = WARM_START_DELAY if aim["aimed_at"] == "start" and self.warm else DELAYS[aim["aimed_at"]]
        moment = time.monotonic() + aim["share"] * longest
        while (left := moment - time.monotonic()) > 0:
            if not child.listen(left):
                return False
        child.listen(0)
        aim["hit"], aim["after_seconds"] = child.phase(), round(time.monotonic() - child.begun, 2)
        aim["steps_done"] = child.steps_done
        aim["late"] = bool(child.counts["-table"])  # all is written: whatever the code, nothing is left to lose
        aim["at"] = time.monotonic()
        os.kill(child.pid, aim["signal"])
        return True

    def _judge(self, child: Child, aim: dict[str, Any], code: int, name: str) -> None:
        number = aim.pop("signal")
        seconds = time.monotonic() - aim.pop("at")
        kill = {"signal": number.name, **aim, "code": code, "seconds_to_end": round(seconds, 2), "sweep": name}
        kill["share"] = round(kill["share"], 4)
        self.kills.append(kill)
        print(f"kill {len(self.kills)}/{self.n_kills}: {number.name} in {kill['hit']} (aimed at {kill['aimed_at']}), code {code}, "
              f"{seconds:.1f} s", flush=True)  # fmt: skip
        allowed = {signal.SIGKILL: {-9}, signal.SIGTERM: {-15, 143}, signal.SIGINT: {-2, 130}}[number]
        saving = (
            number is signal.SIGTERM and kill["hit"] in ("training", "checkpoint", "validation") and kill["steps_done"]
        )
        if saving:
            allowed = {143}
        elif number is signal.SIGINT and kill["hit"] == "start":
            allowed.add(1)  # Python's own, while it starts and imports
        if (
            number is signal.SIGINT and code == 0
        ):  # Python drops a KeyboardInterrupt that falls into a destructor, and says so
            kill["dropped"] = "Exception ignored in" in (self.folder / f"{name}.log").read_text(errors="replace")
        if code not in allowed and not kill["late"] and not kill.get("dropped"):
            self.faults.append(f"kill {len(self.kills)}: {number.name} in {kill['hit']} gave the code {code}")
        if number is signal.SIGTERM and seconds > WITHIN:
            self.faults.append(f"kill {len(self.kills)}: SIGTERM took {seconds:.0f} s")
        if saving:
            steps = [int(path.stem[5:]) for path in (self.folder / name).glob("runs/*/checkpoints/step-*.json")]
            kill["saved_step"] = max(steps, default=0)
            if kill["saved_step"] < kill["steps_done"]:
                self.faults.append(
                    f"kill {len(self.kills)}: SIGTERM after step {kill['steps_done']} saved {kill['saved_step']}"
                )

    def result(self, seed: int, seconds: float) -> dict[str, Any]:
        by_signal, by_phase = (Counter(kill[key] for kill in self.kills) for key in ("signal", "hit"))
        terms = [kill["seconds_to_end"] for kill in self.kills if kill["signal"] == "SIGTERM"]
        return {
            "seed": seed,
            "kills": len(self.kills),
            "by_signal": dict(sorted(by_signal.items())),
            "by_phase": dict(sorted(by_phase.items())),
            "sweeps": self.rounds,
            "restarts": self.restarts,
            "missed": self.missed,
            "batch_losses_compared": self.batch_losses,
            "sigterm_seconds_longest": max(terms, default=None),
            "differences": self.faults,
            "seconds": round(seconds, 1),
            "fresh_processes": min(self.cold, len(self.kills)) if self.warm else len(self.kills),
            "torch": version("torch"),
            "list": self.kills,
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=None, help="replays a campaign; default: a new one, printed")
    parser.add_argument("--warm", action="store_true", help="fork from a process that has everything imported")
    parser.add_argument("--cold", type=int, default=0, help="with --warm: so many kills hit fresh processes first")
    parser.add_argument("--out", type=Path, default=None, help="write the result as JSON")
    parser.add_argument("--folder", type=Path, default=None, help="work here and keep it; default: a temporary folder")
    args = parser.parse_args()
    # A shell's background jobs ignore SIGINT, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    begun = time.monotonic()
    folder = (args.folder or Path(tempfile.mkdtemp(prefix="flowhn-faults-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        parser.error(f"{folder} is not empty")
    if args.warm:
        fault_child.import_all()
    campaign = Campaign(folder, kills=args.kills, seed=seed, warm=args.warm, cold=args.cold)
    campaign.run()
    result = campaign.result(seed, time.monotonic() - begun)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "list"}, indent=1))
    if not result["differences"] and args.folder is None:
        shutil.rmtree(folder)
    return 1 if result["differences"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
