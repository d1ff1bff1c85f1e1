"""One process of scripts/fault_injection.py's sweep, seen from outside: what it is doing, and how it ended."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import fault_child

STUCK = 240.0  # seconds after which a process hangs


class Child:
    """One process of the sweep, with what it says about itself."""

    def __init__(self, words: list[str], log: Path, *, warm: bool) -> None:
        read, write = os.pipe()
        self.fd, self.begun = read, time.monotonic()
        self.open: list[str] = []  # stations that began and did not end
        self.counts: Counter[str] = Counter()
        self.steps_done = 0  # in the run at hand, as far as they were announced
        self.code: int | None = None
        self._rest = b""
        os.set_inheritable(write, True)
        self.pid = self._fork(write, words, log) if warm else self._spawn(write, words, log)
        os.close(write)

    def _spawn(self, write: int, words: list[str], log: Path) -> int:
        command = [sys.executable, str(Path(fault_child.__file__)), str(write), *words]
        with log.open("ab") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, pass_fds=[write], start_new_session=True)
        process.returncode = 0  # waited for below, not by Popen
        return process.pid

    def _fork(self, write: int, words: list[str], log: Path) -> int:
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            os.setsid()
            os.close(self.fd)
            target = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(target, 1)
            os.dup2(target, 2)
            fault_child.run(write, words)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        except KeyboardInterrupt:  # before the command's own handling, as when Python starts
            code = 130
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def listen(self, seconds: float) -> bool:
        """Take in what was said, waiting up to ``seconds`` for something; False when the pipe is closed."""
        if not select.select([self.fd], [], [], max(0.0, seconds))[0]:
            return True
        data = os.read(self.fd, 65536)
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._take(line.decode())
        return bool(data)

    def _take(self, text: str) -> None:
        if text.startswith("step "):
            self.counts["step"] += 1
            self.steps_done = int(text.split()[1])
        elif text.startswith("+"):
            self.counts[text[1:]] += 1
            self.open.append(text[1:])
        elif text[1:] in self.open:
            del self.open[self.open.index(text[1:]) :]
            self.counts[text] += 1

    def phase(self) -> str:
        """What it is doing now."""
        if not self.open:
            return "between" if self.counts else "start"
        return self.open[-1]

    def wait_until(self, phase: str, times: int) -> bool:
        """Until a phase has begun so many times; False when the process ends first."""
        if phase == "start":
            return True
        while self.counts[phase] < times:
            if not self.listen(1.0):
                return False
            self._stuck()
        return True

    def join(self) -> int:
        """Wait for its end; returns its code, negative for a signal."""
        while self.listen(1.0):
            self._stuck()
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        os.close(self.fd)
        return self.code

    def _stuck(self) -> None:
        if time.monotonic() - self.begun > STUCK:
            os.kill(self.pid, signal.SIGKILL)
