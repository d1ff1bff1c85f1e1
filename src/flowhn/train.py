"""``flowhn-train``: one run (or, with ``-m``, a Hydra sweep) from a composed configuration to a record."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import hydra
from omegaconf import DictConfig

from flowhn.cli import run_entry
from flowhn.config import compose, config_dir, register_resolvers
from flowhn.display import Display
from flowhn.experiment import Workshop, plan, summary

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


def main() -> None:
    """Entry point of ``flowhn-train``."""
    run_entry(_main)


def _main(argv: Sequence[str]) -> int:
    if any(word.split("=")[0] in _HYDRA_FLAGS for word in argv):
        register_resolvers()
        overrides = [word for word in argv if "=" in word and not word.startswith("-")]
        if not {"-m", "--multirun"} & set(argv):
            compose("train", overrides)
        sys.argv = ["flowhn-train", *argv]
        hydra.main(config_path=str(config_dir()), config_name="train", version_base="1.3")(_job)()
        return 0
    _run(compose("train", argv))
    return 0


def _job(cfg: DictConfig) -> float | None:
    """A job of a Hydra sweep; the final validation loss is what a sweeper minimises."""
    from hydra.core.hydra_config import HydraConfig

    overrides = list(HydraConfig.get().overrides.task)
    return _run(compose("train", overrides))


def _run(cfg: DictConfig) -> float | None:
    run = plan(cfg)
    record = run.record()
    if record is None:
        with Display(title=run.name, n_runs=1) as display:
            record = Workshop().run(run, display.watch(run.name), say=display.say)
    sys.stdout.write(f"{run.name}: {summary(record)}\nrecord: {run.record_path}\n")
    return record.losses["final_val"]


if __name__ == "__main__":
    main()
