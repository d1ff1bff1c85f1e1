"""The process that scripts/fault_injection.py kills: ``flowhn-reproduce`` that also says, on a pipe, what it is doing.

Nothing of the run is changed: functions are wrapped, a byte string goes out before and after, and that is all. ``+x`` is
"x begins", ``-x`` "x ended", ``step n`` "n optimiser steps are done and a micro-batch of the next one begins".
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any


def _around(fd: int, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        os.write(fd, f"+{name}\n".encode())
        result = function(*args, **kwargs)  # no "finally": what was left by an exception did not end
        os.write(fd, f"-{name}\n".encode())
        return result

    return wrapped


def import_all() -> None:
    """Import what a run imports (seconds), so that forked children need not."""
    for name in ("lm_eval.evaluator", *(f"flowhn.{room}" for room in ("data", "models", "training", "evaluation"))):
        importlib.import_module(name)
    for entry in ("experiment", "run_training", "reproduce"):
        importlib.import_module(f"flowhn.{entry}")


def announce(fd: int) -> None:
    """Wrap the stations of a run."""
    import flowhn.data
    import flowhn.experiment
    import flowhn.reproduce
    import flowhn.run_training
    import flowhn.training
    from flowhn.training.checkpoints import AtomicCheckpointIO
    from flowhn.training.lit_lm import LitLM
    from flowhn.training.resume import CheckpointKeeper

    for owner, attribute, name in (
        (flowhn.data, "prepare", "data"),
        (flowhn.experiment.Workshop, "run", "run"),
        (flowhn.training, "fit", "training"),
        (AtomicCheckpointIO, "save_checkpoint", "checkpoint"),
        (CheckpointKeeper, "on_load_checkpoint", "resume"),
        (flowhn.run_training, "save_weights", "weights"),
        (flowhn.experiment.Workshop, "evaluate", "evaluation"),
        (flowhn.experiment, "write_record", "record"),
        (flowhn.reproduce, "_write", "table"),
    ):
        setattr(owner, attribute, _around(fd, name, getattr(owner, attribute)))
    training_step = LitLM.training_step

    @functools.wraps(training_step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        os.write(fd, f"step {self.trainer.global_step}\n".encode())
        return training_step(self, *args, **kwargs)

    LitLM.training_step = step
    LitLM.on_validation_epoch_start = _around_hook(fd, "+validation", LitLM.on_validation_epoch_start)
    LitLM.on_validation_epoch_end = _around_hook(fd, "-validation", LitLM.on_validation_epoch_end)


def _around_hook(fd: int, text: str, hook: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(hook)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        os.write(fd, f"{text}\n".encode())
        return hook(*args, **kwargs)

    return wrapped


def run(fd: int, words: list[str]) -> None:
    """Be ``flowhn-reproduce <words>``; ends the process as that command does."""
    announce(fd)
    sys.argv = ["flowhn-reproduce", *words]
    import flowhn.reproduce

    flowhn.reproduce.main()


if __name__ == "__main__":
    run(int(sys.argv[1]), sys.argv[2:])
