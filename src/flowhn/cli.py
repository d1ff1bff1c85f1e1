"""What every command-line entry shares: how a failure is said, and with which exit code the process ends."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from flowhn.errors import UserError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT
_MENDS = {
    errno.ENOSPC: "the disk is full: free some space, or set output_dir= and cache_dir= elsewhere; finished runs are kept",
    errno.EDQUOT: "the disk quota is used up: free some space, or set output_dir= and cache_dir= elsewhere",
    errno.EROFS: "the file system is read-only: set output_dir= and cache_dir= to a folder that can be written",
    errno.EACCES: "permission denied: set output_dir= and cache_dir= to a folder that you may write",
    errno.EPERM: "not permitted: set output_dir= and cache_dir= to a folder that you may write",
    errno.EFBIG: "a file may not grow so large here (ulimit -f, or the file system): set output_dir= and cache_dir= elsewhere",
}
# These speak of the path itself, so they are told only together with it.
_PATH_MENDS = {
    errno.EEXIST: "a file stands where a folder has to be; give another path",
    errno.ENOTDIR: "a part of this path is a file, not a folder; give another path",
    errno.EISDIR: "a folder stands where a file has to be; move it away or give another path",
    errno.ENOTEMPTY: "the folder is not empty; move it away or give another path",
    errno.ENAMETOOLONG: "the path is too long for this file system; give a shorter one",
    errno.ELOOP: "the path is a loop of links; give the file itself",
    errno.ENOENT: "there is no such file or folder; restore it or give another path",
}
_LONGEST_PATH = 200  # characters of a path that are shown


def run_entry(body: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> None:
    """Run an entry's body and end the process: 0 done, 2 bad input (one sentence, no traceback), 130 interrupted.

    ``debug=true`` anywhere in the arguments lets the traceback through.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = any(a.replace(" ", "").lower() in {"debug=true", "++debug=true", "+debug=true"} for a in arguments)
    try:
        code = body(arguments) or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        _say("interrupted; the same command goes on from the last checkpoint")
        code = EXIT_INTERRUPTED
    except UserError as error:
        if debug:
            raise
        _say(f"error: {error}")
        code = EXIT_BAD_INPUT
    except BrokenPipeError:  # the reader of a pipe went away, as in `--list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except (OSError, MemoryError, RuntimeError) as error:
        known = sentence(error)
        if debug or known is None:
            raise
        _say(f"error: {known}")
        code = EXIT_BAD_INPUT
    sys.exit(code)


@contextmanager
def heed_interrupts() -> Iterator[None]:
    """Raise KeyboardInterrupt at the end when Ctrl-C came inside and a library swallowed it (a bare ``except`` in an import)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    seen = False

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal seen
        seen = True
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if previous is None else previous)
    if seen:
        raise KeyboardInterrupt


def sentence(error: Exception) -> str | None:
    """What a failure of the machine means to its user; None for one that is a fault of the program."""
    if not isinstance(error, OSError):
        is_memory = isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error)
        mend = "lower micro_batch_size, seq_len or the model's size"
        return f"the memory is not enough for this run: {mend}" if is_memory else None
    where = error.filename if isinstance(error.filename, str | os.PathLike) else None
    shown = "" if where is None else str(where)
    shown = shown if len(shown) <= _LONGEST_PATH else f"{shown[:_LONGEST_PATH]}..."
    if error.errno in _PATH_MENDS and where is not None:
        return f"{shown}: {_PATH_MENDS[error.errno]}"
    if error.errno in _MENDS:
        return _MENDS[error.errno] + (f" ({shown})" if shown else "")
    return None


def _say(text: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(text.rstrip() + "\n")
