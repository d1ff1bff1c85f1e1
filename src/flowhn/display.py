"""One progress display over all runs of an artefact: what runs now, tokens/s, loss, time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flowhn.runs import Progress as RunProgress

_EVAL_WEIGHT = 0.15  # of a run's work, for the estimate of the time left; training has the rest
_LINE_SECONDS = 20.0  # between two lines when the output is a file or a CI log, at first
_LINES = 500  # a later line waits for this part of the time gone by: a week's log has about 2,500 lines, 0.3 MB


class Display:
    """Context manager; ``watch(name)`` gives the callback that a run reports to.

    On a terminal it draws two live bars (all runs, this run). Elsewhere it writes a plain line when a run begins and ends
    and every 20 seconds in between, less often after three hours, so that logs stay short and still show life.
    """

    def __init__(self, *, title: str, n_runs: int, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stderr)
        self._title, self._n_runs, self._n_done = title, max(n_runs, 1), 0
        self._last_line = 0.0
        self._begun = time.monotonic()
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            refresh_per_second=4,
            speed_estimate_period=600,
        )
        self._all = self._bars.add_task(title, total=self._n_runs, state=f"0/{n_runs} runs")
        self._one: int | None = None

    def __enter__(self) -> Display:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """A line above the bars."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def watch(self, name: str) -> Callable[[RunProgress], None]:
        """Begin run ``name``; returns the callback for its progress."""
        if self._one is not None:
            self._bars.remove_task(self._one)
        self._one = self._bars.add_task(name, total=1.0, state="starting")
        if not self.console.is_terminal:
            self.say(f"[{self._n_done + 1}/{self._n_runs}] {name}")
        self._last_line = time.monotonic()

        def update(progress: RunProgress) -> None:
            share = progress.done / progress.total if progress.total else 0.0
            whole = {"train": share * (1 - _EVAL_WEIGHT), "eval": 1 - _EVAL_WEIGHT * (1 - share)}.get(
                progress.phase, 0.0
            )
            state = _state(progress)
            self._bars.update(self._one, completed=whole, state=state)
            self._bars.update(self._all, completed=self._n_done + whole, state=f"{self._n_done}/{self._n_runs} runs")
            now = time.monotonic()
            pause = max(_LINE_SECONDS, (now - self._begun) / _LINES)
            if not self.console.is_terminal and now - self._last_line > pause:
                self._last_line = now
                done = (self._n_done + whole) / self._n_runs
                left = (now - self._begun) * (1 - done) / done if done > 0.01 else float("nan")
                self.say(
                    f"    {name}: {state}, about {left / 60:.0f} min left for all"
                    if left == left
                    else f"    {name}: {state}"
                )

        return update

    def finish(self, name: str, text: str) -> None:
        """End run ``name`` with a one-line result."""
        self._n_done += 1
        self._bars.update(self._all, completed=self._n_done, state=f"{self._n_done}/{self._n_runs} runs")
        self.say(f"{name}: {text}")


def _state(progress: RunProgress) -> str:
    parts = [progress.text or {"data": "preparing data", "train": "training", "eval": "evaluating"}[progress.phase]]
    if progress.phase == "train" and progress.total:
        parts.append(f"step {progress.done:.0f}/{progress.total:.0f}")
    if progress.tokens_per_second:
        parts.append(f"{progress.tokens_per_second:,.0f} tok/s")
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.3f}")
    return ", ".join(parts)
