"""Several devices: who starts their processes, the strategy that ties them together, and what a lost one means.

Processes are started by torchrun, by Slurm (``srun``, also from a sweep's ``launcher=slurm``) or, when neither did, by the
first process itself through Lightning's launcher, which runs the same command again for every other device.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from flowhn.errors import UserError

_OWN_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_GRACE_SECONDS = 10.0  # for a process to end by itself, with its own sentence, after another one ended
_LOST = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "timed out", "timeout",
    "Connection refused", "failed to connect", "recvValue failed", "NCCL",
)  # fmt: skip
_EXIT_LOST = 1


@dataclass(frozen=True)
class Launch:
    """What a launcher outside of this program started: ``world_size`` processes, ``local_world_size`` on this node."""

    launcher: str
    world_size: int
    local_world_size: int


def outside_launch() -> Launch | None:
    """Processes that torchrun or Slurm started for this run, None when there is only this one."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env or {"RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"} <= env.keys():
        world = int(env["WORLD_SIZE"])
        name = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "the launcher"
        return Launch(name, world, int(env.get("LOCAL_WORLD_SIZE", world)))
    tasks = int(env.get("SLURM_NTASKS", 1)) if SLURMEnvironment.detect() else 1
    if tasks > 1:
        return Launch("Slurm", tasks, max(1, tasks // int(env.get("SLURM_NNODES", env.get("SLURM_JOB_NUM_NODES", 1)))))
    return None


def check_launch(n_devices: int, num_nodes: int) -> None:
    """
    Raises:
        UserError: a launcher started another number of processes than the config has devices.
    """
    launch = outside_launch()
    if launch is not None and launch.world_size != n_devices:
        nodes = max(1, launch.world_size // launch.local_world_size)
        raise UserError(
            f"{launch.launcher} started {launch.world_size} processes, the run has {n_devices} devices "
            f"(trainer.devices x trainer.num_nodes={num_nodes}); set trainer.devices={launch.local_world_size} "
            f"trainer.num_nodes={nodes}"
        )


def cluster_plugins(n_devices: int) -> list[Any]:
    """Lightning's cluster environment where its own choice would be wrong.

    Under Slurm it would requeue jobs and write checkpoints of its own; and inside a job of one task it would refuse to
    start processes for several devices.
    """
    launch = outside_launch()
    if n_devices > 1 and (launch is None or launch.launcher == "the launcher"):
        return [LightningEnvironment()]
    if "TORCHELASTIC_RUN_ID" not in os.environ and SLURMEnvironment.detect():
        return [SLURMEnvironment(auto_requeue=False)]
    return []


def build_strategy(name: str, *, n_devices: int, timeout_minutes: float) -> Any:
    """Strategy for Lightning's trainer: ``ddp``, ``fsdp``, or ``auto`` (ddp on several devices).

    Args:
        name: ``trainer.strategy``.
        n_devices: over all nodes.
        timeout_minutes: how long a collective waits for a process that does not answer.
    """
    timeout = timedelta(minutes=timeout_minutes)
    if name == "fsdp":
        from flowhn.training.sharded import ShardedStrategy

        return ShardedStrategy(data_parallel_size=n_devices, tensor_parallel_size=1, timeout=timeout)
    return WatchedDDP(timeout=timeout) if name == "ddp" or n_devices > 1 else "auto"


class WatchedLauncher(_SubprocessScriptLauncher):
    """Lightning's launcher, which kills the first process within 5 s of another one's end, without a word; this one lets it
    end with its own sentence, and says what happened when it cannot (waiting in a collective on a GPU)."""

    def launch(self, function: Any, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Start the other processes, then call ``function``."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            threads = os.environ.get("OMP_NUM_THREADS")
            if threads is None and self.num_processes > 1:  # each process would take every core
                os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.num_processes))
            self._call_children_scripts()
            if threads is None:
                os.environ.pop("OMP_NUM_THREADS", None)
            threading.Thread(target=_watch, args=(self.procs,), daemon=True).start()
        return function(*args, **kwargs)


def _watch(processes: list[subprocess.Popen]) -> None:
    """End this process when one that it started failed and the run does not notice by itself."""
    while not all(process.poll() == 0 for process in processes):
        for rank, process in enumerate(processes, start=1):
            if process.returncode:
                time.sleep(_GRACE_SECONDS)
                sys.stderr.write(
                    f"error: process {rank} of this run ended with code {process.returncode}; the others are ended too. "
                    "The same command goes on from the last checkpoint\n"
                )
                sys.stderr.flush()
                end_processes(processes)
                os._exit(_EXIT_LOST)
        time.sleep(0.5)


def end_processes(processes: list[subprocess.Popen]) -> None:
    """End what is still running of them."""
    for process in processes:
        if process.poll() is None:
            with suppress(OSError):
                process.kill()


class WatchedDDP(DDPStrategy):
    """Distributed data parallel, with :class:`WatchedLauncher`."""

    def _configure_launcher(self) -> None:
        configure_launcher(self)


def configure_launcher(strategy: Any) -> None:
    """Give a strategy :class:`WatchedLauncher` unless its processes are there already."""
    environment = strategy.cluster_environment
    if not environment.creates_processes_externally:
        strategy._launcher = WatchedLauncher(environment, strategy.num_processes, strategy.num_nodes)
    else:
        _end_with_the_first()


def _end_with_the_first() -> None:
    """In a process that :class:`WatchedLauncher` started: end when the first process is gone, also out of a collective."""
    if outside_launch() is not None or int(os.environ.get("LOCAL_RANK", 0)) == 0:
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        time.sleep(_GRACE_SECONDS)
        os._exit(_EXIT_LOST)

    threading.Thread(target=watch, daemon=True).start()


_done_under_a_launcher: list[str] = []


@contextmanager
def process_group(n_devices: int) -> Iterator[None]:
    """Around one run's training: what its processes share is gone afterwards, so that a next run starts its own.

    Raises:
        UserError: a second run in processes that torchrun or Slurm started (the others ended with the first run), or
            another process of this run was lost.
    """
    launch = outside_launch()
    if launch is not None and n_devices > 1 and _done_under_a_launcher:
        raise UserError(
            f"{launch.launcher} starts the processes of one run only, and that one is done; give the same command again "
            f"for the next run, or leave {launch.launcher} out and let trainer.devices= start them"
        )
    before = {name: os.environ.get(name) for name in _OWN_VARIABLES}
    try:
        yield
    except RuntimeError as error:
        if n_devices > 1 and _is_lost(error):
            raise UserError(
                f"another process of this run ended or hangs ({(str(error).strip().splitlines() or ['no reason'])[0][:200]}); "
                "what it said stands above, and the same command goes on from the last checkpoint"
            ) from error
        raise
    finally:
        if n_devices > 1 and launch is not None:
            _done_under_a_launcher.append(launch.launcher)
        elif torch.distributed.is_available() and torch.distributed.is_initialized():
            with suppress(RuntimeError):
                torch.distributed.destroy_process_group()
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def _is_lost(error: BaseException) -> bool:
    return isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in _LOST)


def same_everywhere(values: Mapping[str, Any], *, what: str) -> None:
    """
    Raises:
        UserError: the processes differ in a value (their folders are not the same, or not the same configuration).
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, dict(values))
    for rank, theirs in enumerate(found):
        if theirs != found[0]:
            key = next(key for key in found[0] if found[0][key] != theirs.get(key))
            raise UserError(
                f"the processes of this run do not see the same {what} ({key}: {found[0][key]} in the first, {theirs[key]} in "
                f"number {rank}); output_dir= and cache_dir= have to be folders that all of them share"
            )
