"""Places that refuse: full disks, files where folders have to be, a folder in use; and broken published weights."""

from __future__ import annotations

import contextlib
import json
import math
import random
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from bad_inputs import Bad, Stage, kind, train_argv
from bad_inputs_runs import BASE_OF_TABLE, damage


@contextlib.contextmanager
def _small_files(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes: writing fails half-way, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@kind("disk full", 6)
def disk_full(stage: Stage, place: Path, rng: random.Random) -> Bad:
    size = rng.choice((0, 100, 1000, 5000, 8000, 20_000, 40_000))
    run = str(stage.text_run)
    text = ("data=files", f"data.path={stage.root / 'good.txt'}", "data.val_fraction=0.2")
    command, argv = rng.choice((
        ("train", train_argv(stage, place, "trainer.checkpoint.every_n_steps=2")),
        ("train", train_argv(stage, place, "logger=csv", cache=place / "cache")),
        ("train", train_argv(stage, place, *text, cache=place / "cache")),
        ("export", (run, str(place / "exported"))),
        ("convert", _convert_argv(stage.published / "w.safetensors", stage.published / "config.json", place)),
    ))  # fmt: skip
    return Bad("disk full", f"after {size} bytes at {command}", command, argv, (), False, partial(_small_files, size))


@kind("folders in the way", 5)
def in_the_way(stage: Stage, place: Path, rng: random.Random) -> Bad:
    file = place / "file"
    file.write_text("in the way", encoding="utf-8")
    run = str(stage.text_run)
    argv = train_argv(stage, place)
    command, words = rng.choice((
        ("train", (*argv, f"output_dir={file}")), ("train", (*argv, f"output_dir={file / 'below'}")),
        ("train", (*argv, f"cache_dir={file}")), ("train", (*argv, f"cache_dir={file / 'below'}")),
        ("train", (*argv, "output_dir=/proc/flowhn")), ("train", (*argv, "output_dir=/dev/null")),
        ("train", (*argv, f"output_dir={'x' * 300}")),
        ("export", (run, str(file / "below"))), ("export", (run, "/proc/flowhn/x")), ("export", (run, "x" * 300)),
        ("eval", (run, "eval=docs", "eval.limit=2", f"cache_dir={file}")),
        ("reproduce", ("table1", *BASE_OF_TABLE, "models=[llama]", f"output_dir={file}")),
        ("bench", ("sizes=[tiny]", "models=[llama]", f"output_dir={file}")),
        ("convert", _convert_argv(stage.published / "w.pth", stage.published / "config.json", file)),
    ))  # fmt: skip
    words = _last_wins(words) if command == "train" else words
    return Bad("folders in the way", f"{command} {words[-1][:60]}", command, words)


def _last_wins(words: tuple[str, ...]) -> tuple[str, ...]:
    return tuple({word.partition("=")[0]: word for word in words}.values())


@contextlib.contextmanager
def _held(path: Path) -> Iterator[None]:
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path):
        yield


@kind("two in one folder", 2)
def two(stage: Stage, place: Path, rng: random.Random) -> Bad:
    words = train_argv(stage, place)
    lock = place / "out" / "runs" / stage.random_run.name / "lock"
    return Bad(
        "two in one folder", "the run's lock is held", "train", words, (str(lock.parent),), True, partial(_held, lock)
    )


def can_mount() -> bool:
    """Whether this user may mount a tmpfs in a namespace of its own."""
    words = ["unshare", "-Urm", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    return shutil.which("unshare") is not None and subprocess.run(words, capture_output=True).returncode == 0


# What is mounted where output and cache go, and options of the run.
MOUNTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("an output folder that is read-only", "ro", ()),
    ("a tmpfs of 4 kB", "size=4k", ()),
    ("a tmpfs of 64 kB", "size=64k", ("trainer.checkpoint.every_n_steps=2",)),
    ("a tmpfs of 200 kB", "size=200k", ("trainer.checkpoint.every_n_steps=2",)),
    ("a tmpfs of 400 kB and CSV logs", "size=400k", ("trainer.checkpoint.every_n_steps=1", "logger=csv")),
    ("a tmpfs of 16 MB, which is enough", "size=16m", ()),
)


def on_a_mount(stage: Stage, place: Path, number: int) -> tuple[str, int | None, str]:
    """Train as a process whose output folder is number ``number`` of ``MOUNTS``; returns what, exit code and stderr."""
    what, options, more = MOUNTS[number]
    folder = place / "mounted"
    folder.mkdir(parents=True)
    argv = (*train_argv(stage, place, cache=folder / "cache"), f"output_dir={folder / 'out'}", *more)
    command = shlex.join([sys.executable, "-m", "flowhn.train", *_last_wins(argv)])
    words = f"mount -t tmpfs -o {options} tmpfs {shlex.quote(str(folder))} && exec {command}"
    try:
        done = subprocess.run(["unshare", "-Urm", "sh", "-c", words], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return what, None, "no end within 120 s"
    return what, done.returncode, done.stderr


def _convert_argv(weights_file: Path, config_file: Path, place: Path) -> tuple[str, ...]:
    return "published", str(weights_file), "--config", str(config_file), "--out", str(place / "converted")


_INSIDE = ("holds itself", "not a number")


def _change_inside(path: Path, how: str) -> None:
    """A whole file of torch.save whose content cannot be weights."""
    content = torch.load(path, weights_only=True)
    if how == "holds itself":
        content["state_dict"] = content
    else:
        next(iter(content.values())).flatten()[0] = math.nan
    torch.save(content, path)


@kind("published weights", 8)
def published(stage: Stage, place: Path, rng: random.Random) -> Bad:
    shutil.copytree(stage.published, place / "in")
    weights_file, config_file = place / "in" / rng.choice(("w.pth", "w.safetensors")), place / "in" / "config.json"
    how = rng.choice(
        ("cut", "foreign", "pickled code", "torch file with code", "missing", "folder", "torch file", *_INSIDE)
    )
    hit = rng.choice((weights_file, weights_file, config_file, None))
    if how in _INSIDE:
        hit = weights_file = place / "in" / "w.pth"
        _change_inside(weights_file, how)
    elif hit is not None:
        damage(hit, rng, how)
    else:
        content = json.loads(config_file.read_text(encoding="utf-8"))
        key = rng.choice(sorted(content))
        value = rng.choice(
            (None, 0, -1, 10**9, 2**63, "x", [], {}, True, 1e300, float("nan"), content[key] * 2 + content[key])
        )
        how, content[key] = f"{key}={value!r}", value
        config_file.write_text(json.dumps(content), encoding="utf-8")
    argv = _convert_argv(weights_file, config_file, place)
    what = f"{how}: {hit.name if hit else 'config'}"
    may = how == "torch file" or "rms_norm_eps" in how
    return Bad("published weights", what, "convert", argv, ("in/", "config"), not may)
