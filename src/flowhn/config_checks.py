"""What values the keys of ``configs/train.yaml`` may have, checked right after composition and before anything starts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from typing import Any

from flowhn.errors import UserError

Check = tuple[Callable[[Any], bool], str]


def _whole(least: int) -> Check:
    def fits(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    return fits, f"a whole number of at least {least}"


def _number(low: float, high: float = math.inf, *, open_low: bool = False) -> Check:
    def fits(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return False
        return low <= value <= high and not (open_low and value == low)

    above = f"above {low:g}" if open_low else f"of at least {low:g}"
    return fits, f"a number {above}" if high == math.inf else f"a number from {low:g} to {high:g}"


def _or_null(check: Check) -> Check:
    return (lambda value: value is None or check[0](value)), f"{check[1]}, or null"


def _either(word: str, check: Check) -> Check:
    return (lambda value: value == word or check[0](value)), f"{word} or {check[1]}"


_TRUTH: Check = (lambda value: isinstance(value, bool), "true or false")
_TEXT: Check = (lambda value: isinstance(value, str) and bool(value.strip()), "a text")
_FOLDER: Check = (lambda value: isinstance(value, str) and bool(value.strip()), "the path of a folder")
_GROUP: Check = (lambda value: isinstance(value, Mapping), "one of the files in its folder of configs/")
_NAME: Check = (
    lambda value: isinstance(value, str) and re.fullmatch(r"\w[\w.\-]*", value) is not None,
    "letters, digits, - and _",
)
_NAMES: Check = (
    lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    "a list of names",
)
_LENGTHS: Check = (
    lambda value: isinstance(value, list) and bool(value) and all(_whole(1)[0](length) for length in value),
    "a list of lengths in tokens, such as [2048,4096]",
)
_BETAS: Check = (
    lambda value: (
        isinstance(value, list) and len(value) == 2 and all(_number(0, 1)[0](beta) and beta < 1 for beta in value)
    ),
    "two numbers from 0 up to, not including, 1",
)

# Key (with * for any part) -> what it must be. The first that matches counts; keys that are absent are not checked.
CHECKS: dict[str, Check] = {
    **dict.fromkeys(("size", "model", "data", "eval", "trainer", "optimizer", "schedule"), _GROUP),
    "seed": _whole(0),
    **dict.fromkeys(("tokens", "seq_len", "global_batch_tokens"), _whole(1)),
    "vocab_size": _whole(2),
    **dict.fromkeys(("micro_batch_size", "val_rows"), _or_null(_whole(1))),
    "val_points": _whole(0),
    "lr": _number(0, open_low=True),
    "clip_grad_norm": _or_null(_number(0)),
    **dict.fromkeys(("schedule.warmup_fraction", "schedule.min_lr_ratio"), _number(0, 1)),
    "optimizer.lr": _number(0, open_low=True),
    "optimizer.weight_decay": _number(0),
    "optimizer.eps": _number(0, open_low=True),
    "optimizer.betas": _BETAS,
    **dict.fromkeys(("kernels", "attention", "device", "precision"), _TEXT),
    "compile": _either("auto", _TRUTH),
    "debug": _TRUTH,
    "deterministic": _TRUTH,
    "cell": _or_null(_NAME),
    "artefact": _or_null(_NAME),
    **dict.fromkeys(("cache_dir", "output_dir"), _FOLDER),
    "trainer.devices": _either("auto", _whole(1)),
    "trainer.num_nodes": _whole(1),
    "trainer.strategy": (lambda value: value in ("auto", "ddp", "fsdp"), "auto, ddp or fsdp"),
    "trainer.timeout_minutes": _number(0, open_low=True),
    **dict.fromkeys(("trainer.deterministic", "trainer.progress_bar"), _TRUTH),
    **dict.fromkeys(("trainer.log_every", "trainer.checkpoint.every_n_steps"), _or_null(_whole(1))),
    "trainer.checkpoint.seconds": _or_null(_number(0, open_low=True)),
    "trainer.checkpoint.keep": _whole(1),
    "trainer.throughput.warmup_steps": _whole(0),
    "trainer.throughput.window_steps": _whole(1),
    "trainer.throughput.peak_flops": _or_null(_number(0, open_low=True)),
    "data.seed": _whole(0),
    "data.loss_on_padding": _TRUTH,
    "eval.limit": _or_null(_whole(1)),
    "eval.tasks": _NAMES,
    "eval.lengths": _LENGTHS,
    "size.d_model": _whole(1),
    "size.n_*heads": _whole(1),
    "size.n_layers.*": _whole(1),
    "size.d_ff.*": _whole(1),
    "size.hymba.n_meta_tokens": _whole(0),
    "size.hymba.sliding_window": _or_null(_whole(1)),
    "size.mamba2.*": _whole(1),
}

BENCH_CHECKS: dict[str, Check] = {
    "seq_len": _or_null(_whole(1)),
    **dict.fromkeys(("windows", "steps_per_window"), _whole(1)),
    **dict.fromkeys(("warmup_steps", "prepare", "repeat", "seed"), _whole(0)),
    "cell_timeout_s": _number(0, open_low=True),
    "max_minutes": _or_null(_number(0)),
    **dict.fromkeys(("profile", "debug"), _TRUTH),
    "output_dir": _FOLDER,
}
"""The same for ``configs/bench.yaml``."""


def check_values(config: Mapping[str, Any], prefix: str = "", checks: Mapping[str, Check] = CHECKS) -> None:
    """Check every key of a resolved config that ``checks`` knows.

    Raises:
        UserError: the first value that cannot be; the sentence names the key, the value and what it must be.
    """
    if not prefix:
        for key in checks:
            if key.isidentifier() and key not in config:
                raise UserError(f"{key} was removed, and a run needs it; set it to a value instead")
    # Single values first: where a group takes one over, the sentence names the key that the user wrote.
    for name, value in sorted(config.items(), key=lambda item: isinstance(item[1], Mapping)):
        key = f"{prefix}{name}"
        check = next((check for pattern, check in checks.items() if fnmatch(key, pattern)), None)
        if check is not None and not check[0](value):
            shown = repr(value) if isinstance(value, str) else "null" if value is None else value
            raise UserError(f"{key}={shown} must be {check[1]}")
        if isinstance(value, Mapping) and key != "model":
            check_values(value, f"{key}.", checks)
