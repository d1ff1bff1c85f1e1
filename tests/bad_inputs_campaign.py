"""Throws broken inputs at the commands and judges what they say: one sentence and exit code 2, or unharmed."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import math
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bad_inputs import Bad, Stage, draw, train_argv

LIMIT_SECONDS = 20
PROCESS_LIMIT_SECONDS = 180  # with the start of Python and the import of torch and Lightning on a busy machine
LONGEST_SENTENCE = 900  # characters
_MODULES = {"eval": "evaluate"}


class Hang(BaseException):
    """The command ran past the limit."""


@dataclass(frozen=True)
class Outcome:
    """How a command ended: ``code`` (None: it did not end by itself), what it printed, and the fault found (or None)."""

    code: int | None
    said: str
    seconds: float
    fault: str | None


def entry(command: str):
    """The body of an entry: ``flowhn.train._main`` for ``train``."""
    return importlib.import_module(f"flowhn.{_MODULES.get(command, command)}")._main


def _alarm(number, frame) -> None:
    raise Hang


def call(command: str, argv: tuple[str, ...], limit: int = LIMIT_SECONDS) -> tuple[int | None, str, float]:
    """Run an entry in this process; returns exit code (None: hang or traceback), its output, and seconds."""
    import torch

    from flowhn.cli import run_entry

    out, err = io.StringIO(), io.StringIO()
    old = signal.signal(signal.SIGALRM, _alarm)
    code: int | None = None
    begun = time.monotonic()
    signal.alarm(limit)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run_entry(entry(command), list(argv))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except Hang:
        err.write(f"\nno end within {limit} s\n{traceback.format_exc(limit=-6)}")
    except BaseException:
        err.write(traceback.format_exc(limit=-8))
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
        torch.use_deterministic_algorithms(False)
    return code, err.getvalue(), time.monotonic() - begun


def call_process(command: str, argv: tuple[str, ...]) -> tuple[int | None, str, float]:
    """The same as a process of its own."""
    begun = time.monotonic()
    words = [sys.executable, "-m", f"flowhn.{_MODULES.get(command, command)}", *argv]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=PROCESS_LIMIT_SECONDS)
    except subprocess.TimeoutExpired:
        return None, f"no end within {PROCESS_LIMIT_SECONDS} s", time.monotonic() - begun
    return done.returncode, done.stderr, time.monotonic() - begun


def sentences(said: str) -> list[str]:
    """The lines of an output that say why a command ended."""
    return [line for line in said.splitlines() if re.match(r"([\w.\-]+: )?error: ", line)]


def fault_of(bad: Bad, code: int | None, said: str) -> str | None:
    """What is wrong with the way a command ended; None when nothing is."""
    if code is None or "Traceback" in said:
        return f"a traceback or a hang: {said.strip()[-1500:]}"
    if code == 0:
        return "it went on, and the input is wrong" if bad.must_refuse else None
    found = sentences(said)
    if code != 2:
        return f"exit code {code}: {said.strip()[-500:]}"
    if len(found) != 1:
        return f"{len(found)} sentences: {said.strip()[-500:]}"
    if len(found[0]) > LONGEST_SENTENCE:
        return f"a sentence of {len(found[0])} characters: {found[0][:300]}"
    if bad.names and not any(name in found[0] for name in bad.names):
        return f"the sentence names none of {bad.names}: {found[0]}"
    return None


def records_below(folder: Path) -> dict[str, str]:
    """Hash of every record below a folder."""
    paths = [*folder.rglob("record.json"), *folder.rglob("records/*.json")]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()}


def _fault_of_files(stage: Stage, before: dict[str, str], code: int | None) -> str | None:
    from flowhn.reporting.record import read_record

    after = records_below(stage.root)
    lost = [path for path, digest in before.items() if after.get(path) != digest]
    if lost:
        return f"the record {lost[0]} is lost or changed"
    for path in set(after) - set(before):
        loss = read_record(Path(path)).losses["final_val"] if path.endswith("record.json") else 0.0
        if code == 0 and (loss is None or not math.isfinite(loss)):
            return f"the new record {path} has no finite loss"
    if any(stage.root.rglob("owned")):
        return "code of the input was run"
    return None


def throw(bad: Bad, stage: Stage, *, as_process: bool = False) -> Outcome:
    """Throw one input at its command; what it wrote is deleted afterwards."""
    before = records_below(stage.root)
    with contextlib.chdir(stage.root), bad.around():
        code, said, seconds = (call_process if as_process else call)(bad.command, bad.argv)
    fault = fault_of(bad, code, said) or _fault_of_files(stage, before, code)
    if fault is None and seconds > (PROCESS_LIMIT_SECONDS if as_process else LIMIT_SECONDS):
        fault = f"it took {seconds:.0f} s"
    shutil.rmtree(stage.root / "thrown", ignore_errors=True)
    return Outcome(code, said, seconds, fault)


def campaign(
    stage: Stage, *, seed: int, numbers: range, processes: int = 0
) -> Iterator[tuple[int, Bad, bool, Outcome]]:
    """Throw the inputs ``numbers`` of ``seed``; of each share of them one is a process, ``processes`` in all."""
    stride = max(1, len(numbers) // processes) if processes else 0
    for number in numbers:
        bad = draw(stage, seed, number)
        in_call = not stride or number % stride or bad.around is not contextlib.nullcontext
        yield number, bad, not in_call, throw(bad, stage, as_process=not in_call)


def _train(stage_root: Path, place: Path, *words: str) -> Path:
    stage = Stage(stage_root, place, place, place, place, "")
    code, said, _ = call("train", train_argv(stage, place, *words), limit=600)
    if code != 0:  # also None: it did not end
        raise RuntimeError(f"the stage cannot be made: {said}")
    return next((place / "out" / "runs").iterdir())


def make_stage(root: Path) -> Stage:
    """Train the runs that inputs are cut from, in ``root``."""
    import flowhn.experiment
    from flowhn.errors import UserError

    text = "<|endoftext|>\n".join(
        f"document {number}\n" + "some words stand here and make a line of text\n" * 20 for number in range(30)
    )
    root.mkdir(parents=True, exist_ok=True)
    (root / "good.txt").write_text(text, encoding="utf-8")
    files = ("data=files", f"data.path={root / 'good.txt'}", "data.val_fraction=0.2")
    random_run = _train(root, root / "random")
    text_run = _train(root, root / "text", *files)
    write = flowhn.experiment.write_record

    def refuse(path: Path, record: object) -> None:
        raise UserError("stopped")

    flowhn.experiment.write_record = refuse
    try:
        with contextlib.suppress(RuntimeError):
            _train(root, root / "stopped", "trainer.checkpoint.every_n_steps=2")
    finally:
        flowhn.experiment.write_record = write
    stopped = next((root / "stopped" / "out" / "runs").iterdir())
    for name in ("trained.json", "model.safetensors"):
        (stopped / name).unlink()
    return Stage(root, random_run, text_run, stopped, _published(root / "published"), text)


def _published(folder: Path) -> Path:
    import json

    import torch
    from safetensors.torch import save_file

    from flowhn.config import build_model
    from flowhn.convert import _run_config
    from flowhn.models.convert.published import PublishedConfig, published_names

    folder.mkdir()
    content = {
        "mode": "D", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 16, "rms_norm_eps": 1e-6, "mamba_d_state": 2, "mamba_d_conv": 2,
        "mamba_expand": 2, "mamba_dt_rank": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    own = build_model(_run_config(PublishedConfig.read(content), folder / "w.safetensors")).state_dict()
    names = published_names(own)
    weights = {names[name]: tensor.detach().clone() for name, tensor in own.items() if name in names}
    save_file(weights, folder / "w.safetensors")
    torch.save(weights, folder / "w.pth")
    return folder
