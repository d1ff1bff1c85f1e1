"""What every command-line entry shares: how a failure is said, and with which exit code the process ends."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Sequence

from flowhn.errors import UserError

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT
_MENDS = {
    errno.ENOSPC: "the disk is full: free some space, or set output_dir= and cache_dir= elsewhere; finished runs are kept",
    errno.EDQUOT: "the disk quota is used up: free some space, or set output_dir= and cache_dir= elsewhere",
    errno.EROFS: "the file system is read-only: set output_dir= and cache_dir= to a folder that can be written",
    errno.EACCES: "permission denied: set output_dir= and cache_dir= to a folder that you may write",
}


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
    except OSError as error:
        if debug or error.errno not in _MENDS:
            raise
        where = f" ({error.filename})" if error.filename else ""
        _say(f"error: {_MENDS[error.errno]}{where}")
        code = EXIT_BAD_INPUT
    sys.exit(code)


def _say(text: str) -> None:
    sys.stdout.flush()
    sys.stderr.write(text.rstrip() + "\n")
