"""The cache of prepared data: a folder per hash of everything that shapes the tokens, finished or not there at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flowhn.data.corpora import open_corpus
from flowhn.data.disk import disk_estimate, shown_bytes
from flowhn.data.prepared import STATS_NAME, PreparedData
from flowhn.data.tokenization import tokenizer_fingerprint
from flowhn.errors import UserError

CODE_VERSION = 3  # raise it whenever the same input would give other tokens
_LARGEST = 2**31 - 1  # token ids and places are 32-bit numbers
PACKINGS = ("pack", "pad")
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES)
# These name places or ways of working; what they lead to is in the fingerprints.
_NOT_IN_KEY = {"path", "val_path", "tokenizer", "num_proc", "loss_on_padding"}


def prepare(
    spec: Mapping[str, Any],
    *,
    vocab_size: int,
    seq_len: int,
    cache_dir: Path,
    report: Callable[[str], None] | None = None,
) -> PreparedData:
    """Tokenise a corpus once and return it; a later call with the same arguments opens what is there.

    Args:
        spec: the resolved ``data`` config.
        vocab_size: the model's vocabulary; a trained tokeniser has at most this many tokens.
        seq_len: input tokens of a row.
        cache_dir: folder of all caches. The set is built in a temporary folder there and renamed when it is whole; a
            lock makes a second process wait for the first.
        report: called with one line about each step.

    Raises:
        UserError: bad options, unreadable data, no hub where one is needed, no room or no right to write.
    """
    report = report or (lambda _: None)
    spec = dict(spec)
    _check(spec, vocab_size, seq_len)
    is_random = spec["name"] == "random"
    corpus = None if is_random else open_corpus(spec)
    key = _key(spec, corpus.fingerprint() if corpus else {}, vocab_size, seq_len)
    name = f"{spec['name']}-{key}"
    target = Path(cache_dir) / name
    loss_on_padding = bool(spec.get("loss_on_padding", True))
    if not (target / STATS_NAME).is_file():
        with _disk_errors(cache_dir):
            Path(cache_dir).mkdir(parents=True, exist_ok=True)
            with _locked(Path(cache_dir) / f".{name}.lock", report):
                if not (target / STATS_NAME).is_file():
                    _build(target, corpus, spec, vocab_size=vocab_size, seq_len=seq_len, report=report)
    return PreparedData.open(target, loss_on_padding=loss_on_padding)


def _check(spec: Mapping[str, Any], vocab_size: int, seq_len: int) -> None:
    if seq_len < 1:
        raise UserError(f"seq_len={seq_len} must be at least 1")
    if vocab_size < 2:
        raise UserError(f"vocab_size={vocab_size} must be at least 2")
    for key, value in (("vocab_size", vocab_size), ("seq_len", seq_len)):
        if value > _LARGEST:
            raise UserError(f"{key}={value} is too large; at most {_LARGEST}")
    if (spec.get("packing") or "pack") not in PACKINGS:
        raise UserError(f"data.packing={spec['packing']} does not exist; choose one of {', '.join(PACKINGS)}")
    tokenizer = spec.get("tokenizer")
    if tokenizer is not None and not isinstance(tokenizer, str):
        raise UserError(f"data.tokenizer={tokenizer} must be train, a tokenizer.json, a folder or a hub name")
    num_proc = spec.get("num_proc")
    if num_proc is not None and (not isinstance(num_proc, int) or num_proc < 1):
        raise UserError(f"data.num_proc={num_proc} must be a positive number of processes, or null")
    if "name" not in spec:
        raise UserError("data.name is missing; choose data=docs, files, slimpajama or random")


def _key(spec: Mapping[str, Any], fingerprint: Mapping[str, Any], vocab_size: int, seq_len: int) -> str:
    shaping = {
        "code": CODE_VERSION,
        "spec": {key: value for key, value in spec.items() if key not in _NOT_IN_KEY},
        "fingerprint": fingerprint,
        "tokenizer": tokenizer_fingerprint(str(spec.get("tokenizer") or "train")),
        "vocab_size": vocab_size,
        "seq_len": seq_len,
    }
    return hashlib.sha256(json.dumps(shaping, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _build(target: Path, corpus: Any, spec: Mapping[str, Any], *, vocab_size: int, seq_len: int, report: Any) -> None:
    from flowhn.data.build import build_random, build_text

    # What a killed process left is gone on with; the lock says that nobody works on it.
    partial = target.with_name(f".building-{target.name}")
    is_new = not partial.exists()
    partial.mkdir(exist_ok=True)
    try:
        with _quiet_datasets():
            if corpus is None:
                _check_room(partial, spec, seq_len)
            if is_new:
                _tell_size(target.parent, spec, vocab_size=vocab_size, seq_len=seq_len, report=report)
            if corpus is None:
                build_random(partial, spec, vocab_size=vocab_size, seq_len=seq_len)
            else:
                build_text(partial, corpus, spec, vocab_size=vocab_size, seq_len=seq_len, report=report)
        shutil.rmtree(target, ignore_errors=True)  # a folder without statistics is not a cache
        os.replace(partial, target)
    except Exception as error:
        if not _is_disk_error(error):  # an interruption or a full disk leaves what is done, for the next call
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _is_disk_error(error: BaseException | None) -> bool:
    """Whether the disk refused, and not the data: what is built is good, and the same call may go on from it later."""
    while error is not None:
        if isinstance(error, OSError) and (error.errno in _DISK_ERRORS or "No space left" in str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _tell_size(
    cache_dir: Path, spec: Mapping[str, Any], *, vocab_size: int, seq_len: int, report: Callable[[str], None]
) -> None:
    """Report how much disk the preparation will take; nothing for rows that are no numbers, which the build refuses."""
    if spec["name"] == "random" and not all(isinstance(spec.get(key), int) for key in ("n_rows", "n_val_rows")):
        return
    at_peak, kept = disk_estimate(spec, vocab_size=vocab_size, seq_len=seq_len)
    word = "at least" if spec.get("packing") == "pad" else "at most"
    report(f"preparing data takes {word} {shown_bytes(at_peak)} of disk in {cache_dir}; {shown_bytes(kept)} stay")


def _check_room(folder: Path, spec: Mapping[str, Any], seq_len: int) -> None:
    rows = sum(count for key in ("n_rows", "n_val_rows") if isinstance(count := spec.get(key), int))
    if 2 * rows * (seq_len + 1) > (free := shutil.disk_usage(folder).free):  # 2 bytes a token at least
        raise UserError(
            f"data.n_rows={spec['n_rows']} with data.n_val_rows={spec['n_val_rows']} needs more than the {free / 1e9:,.0f} GB "
            "that are free under cache_dir; lower them or set cache_dir"
        )


@contextlib.contextmanager
def _locked(path: Path, report: Callable[[str], None]) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report("waiting for another process that prepares the same data")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    """No progress bars of `datasets`: the caller has its own display."""
    import datasets

    was_enabled = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if was_enabled:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _disk_errors(cache_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC or "No space left" in str(error):
            raise UserError(
                f"no disk space left under cache_dir={cache_dir}; free some and run again, which goes on from what is "
                "prepared, or set cache_dir"
            ) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"cache_dir={cache_dir} cannot be written ({error.strerror}); set cache_dir") from error
        raise
