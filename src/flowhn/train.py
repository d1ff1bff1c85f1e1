"""``flowhn-train``: one run (or, with ``-m``, a Hydra sweep) from a composed configuration to a record."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

from flowhn.child import run_child
from flowhn.cli import run_entry
from flowhn.config import compose, config_dir, register_resolvers
from flowhn.display import Display
from flowhn.errors import UserError
from flowhn.experiment import Workshop, summary
from flowhn.reporting.record import RunRecord
from flowhn.runs import join_submitit_job, plan, process_rank
from flowhn.sweeps import WORST, read_jobs, rotate, run_job, take_device, write_summary

# These belong to Hydra's own command line; a plain run is composed by ours, whose errors are one sentence.
_HYDRA_FLAGS = {
    "-m",
    "--multirun",
    "--help",
    "-h",
    "--hydra-help",
    "--cfg",
    "-c",
    "--info",
    "-i",
    "--resolve",
    "--package",
    "-p",
}


# Value of the groups launcher and sweep -> the plugin of Hydra that it is.
_PLUGINS = {
    "joblib": "hydra_plugins.hydra_joblib_launcher",
    "local": "hydra_plugins.hydra_submitit_launcher",
    "slurm": "hydra_plugins.hydra_submitit_launcher",
    "optuna": "hydra_plugins.hydra_optuna_sweeper",
}


def main() -> None:
    """Entry point of ``flowhn-train``."""
    run_entry(_main)


def _main(argv: Sequence[str]) -> int:
    if {"-m", "--multirun"} & set(argv):
        return _sweep(list(argv))
    if any(word.split("=")[0] in _HYDRA_FLAGS for word in argv):
        register_resolvers()
        compose("train", [word for word in argv if "=" in word and not word.startswith("-")])
        _hydra(argv)
        return 0
    _run(compose("train", argv))
    return 0


def _hydra(argv: Sequence[str]) -> None:
    sys.argv = ["flowhn-train", *argv]
    hydra.main(config_path=str(config_dir()), config_name="train", version_base="1.3")(_job)()


def _sweep(argv: list[str]) -> int:
    """All combinations (or a search), then the table of what they gave; 2 when a run failed."""
    folder = next((word.partition("=")[2] for word in argv if word.startswith("hydra.sweep.dir=")), None)
    if folder is None:
        output_dir = next((word.partition("=")[2] for word in argv if word.startswith("output_dir=")), "outputs")
        folder = str(Path(output_dir).absolute() / "sweeps" / datetime.now().strftime("%Y-%m-%d_%H-%M-%S"))
        argv = [*argv, f"hydra.sweep.dir={folder}"]
    register_resolvers()
    _check_sweep(argv)
    failed = []
    try:
        _hydra(argv)
    finally:  # also where a launcher gives up because a process died
        if read_jobs(Path(folder)):
            text, failed = write_summary(Path(folder))
            sys.stdout.write(f"{text}\nwritten: {folder}\n")
    return 2 if failed else 0


def _check_sweep(argv: Sequence[str]) -> None:
    """Compose the first run, so that a misspelt key is one sentence before anything runs."""
    words = [word for word in argv if "=" in word and not word.startswith(("-", "hydra"))]
    try:
        parsed = OverridesParser.create().parse_overrides(words)
    except HydraException as error:
        raise UserError(
            f"the overrides cannot be read ({str(error).splitlines()[0]}); write key=value,value"
        ) from error
    first = []
    for word, override in zip(words, parsed, strict=True):
        if override.is_choice_sweep() or override.is_range_sweep():
            word = f"{override.input_line.partition('=')[0]}={next(override.sweep_string_iterator())}"
        if not override.is_interval_sweep():
            first.append(word)
    for word in first:
        key, _, value = word.partition("=")
        if key not in ("launcher", "sweep"):
            continue
        if value in _PLUGINS and not _is_installed(_PLUGINS[value]):
            raise UserError(f"{key}={value} needs packages that are not installed; pip install 'flowhn[sweep]'")
        if value == "slurm" and shutil.which("srun") is None:
            raise UserError(
                "launcher=slurm needs Slurm's srun, which is not on this machine's PATH; use launcher=joblib"
            )
    compose("train", first)


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it: no plugin at all is installed
        return False


def _job(cfg: DictConfig) -> float:
    """A job of a Hydra sweep; the final validation loss is what a search minimises."""
    from hydra.core.hydra_config import HydraConfig

    hydra_config = HydraConfig.get()
    overrides = list(hydra_config.overrides.task)
    join_submitit_job()
    if process_rank():  # beside the first process of this run, which alone tells how it went
        with suppress(SystemExit):
            _run(compose("train", overrides))
        return WORST
    folder = Path(hydra_config.sweep.dir) / hydra_config.sweep.subdir
    if hydra_config.runtime.choices.get("launcher") == "joblib":
        take_device(Path(hydra_config.sweep.dir))

    def body() -> tuple[RunRecord, Path]:
        cfg = compose("train", overrides)
        # A process that something else started (submitit, torchrun) has its place among the run's processes already.
        is_placed = cfg.trainer.devices == 1 or "RANK" in os.environ
        return _run(cfg) if is_placed else _run_apart(cfg, overrides, folder)

    return run_job(body, folder=folder, number=hydra_config.job.num, overrides=overrides)


def _run_apart(cfg: DictConfig, overrides: Sequence[str], folder: Path) -> tuple[RunRecord, Path]:
    """A run on several devices, as a command of its own: each further process repeats the command that started the first.

    Its output is added to ``output.log`` of ``folder``.

    Raises:
        UserError: it ended without a record; its own sentence, and where its output is.
        KeyboardInterrupt, SystemExit: it was stopped by a signal (:func:`~flowhn.child.run_child`).
    """
    run = plan(cfg)
    record = run.record()
    if record is None:
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "output.log"
        rotate(log)
        with log.open("ab") as output:
            begun = output.tell()
            code = run_child([sys.executable, "-m", "flowhn.train", *overrides], output)
        record = run.record()
        if record is None:
            lines = log.read_bytes()[begun:].decode("utf-8", errors="replace").splitlines()
            told = [line for line in lines if line.startswith("error: ")]
            reason = told[-1].removeprefix("error: ") if told else f"it ended with exit code {code}"
            raise UserError(f"{reason} (output: {log})")
    sys.stdout.write(f"{run.name}: {summary(record)}\nrecord: {run.record_path}\n")
    return record, run.record_path.absolute()


def _run(cfg: DictConfig) -> tuple[RunRecord, Path]:
    run = plan(cfg)
    record = run.record()
    if record is None:
        with Display(title=run.name, n_runs=1) as display:
            record = Workshop().run(run, display.watch(run.name), say=display.say)
    sys.stdout.write(f"{run.name}: {summary(record)}\nrecord: {run.record_path}\n")
    return record, run.record_path.absolute()


if __name__ == "__main__":
    main()
