"""One suite of lm-eval tasks, built once and asked of many models."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flowhn.errors import UserError
from flowhn.evaluation.docs_tasks import write_docs_tasks
from flowhn.evaluation.lm import FlowHNLM, Tokenizer
from flowhn.evaluation.long_context import LONG_TASKS, QUESTIONS, write_long_tasks
from flowhn.evaluation.ruler import METRIC, at_lengths, our_name, ruler_length, write_ruler_tasks
from flowhn.evaluation.suites import (
    CODE_TASKS,
    DOCS_TASKS,
    PAPER_TASKS,
    chance,
    needs_heldout,
    task_length,
    write_code_task,
    write_paper_task,
)

_METRICS = (
    METRIC,
    "acc_mutual_info",
    "exact_match",
    "pass@1",
    "pass_at_1",
    "acc",
)  # the first that a task has is the one shown
_BOOTSTRAP = 200  # resamples for the standard error of a perplexity; accuracies have a closed form


class Evaluator:
    """Builds the tasks and their requests at construction; :meth:`run` asks them of a model.

    Building the seven real sets takes longer than answering them with a small model, so ten models share one evaluator.

    Args:
        suite: ``{name, tasks, data_dir, limit}`` of ``configs/eval/*.yaml``.
        heldout_file: held-out documents for the tasks of ``eval=docs`` and ``eval=long_context``.
        work_dir: folder for generated task files; made anew.
        seed: decides the questions of both.
        tokenizer: of the models to come, for ``eval=long_context`` and ``eval=ruler``, whose lengths are in tokens.

    Raises:
        UserError: a task or its data is missing.
    """

    def __init__(
        self,
        *,
        suite: Mapping[str, Any],
        heldout_file: Path | None,
        work_dir: Path,
        seed: int,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.suite = dict(suite)
        limit = self.suite.get("limit")
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise UserError(f"eval.limit={limit} must be null or the number of questions of each task")
        work_dir = Path(work_dir) / str(os.getpid())  # another process may evaluate the same suite
        shutil.rmtree(work_dir, ignore_errors=True)
        names = at_lengths(self.suite)
        with _quiet():
            self._write_tasks(names, work_dir, heldout_file, seed, tokenizer)
            self._limit = limit
            self._tokenizer: Tokenizer | None = None  # whose tokens are in _encoded
            self._encoded: dict[tuple[str, str], tuple[list[int], list[int]]] = {}
            self._tasks = _load_tasks(work_dir, names, self.suite.get("data_dir"), limit)
        shutil.rmtree(work_dir, ignore_errors=True)

    @property
    def tasks(self) -> Mapping[str, Any]:
        """lm-eval's task objects by name; their requests are built (``task.instances``)."""
        return self._tasks

    def encode(self, tokenizer: Tokenizer) -> None:
        """Tokenise the requests now; :meth:`run` does it otherwise, once for all models with this tokenizer object."""
        adapter = FlowHNLM(nn.Identity(), tokenizer, max_length=1, encoded=self._tokens(tokenizer))
        for task in self._tasks.values():
            adapter.encode(task.instances)

    def _tokens(self, tokenizer: Tokenizer) -> dict[tuple[str, str], tuple[list[int], list[int]]]:
        if tokenizer is not self._tokenizer:
            self._tokenizer, self._encoded = tokenizer, {}
        return self._encoded

    def _write_tasks(
        self, names: list[str], folder: Path, heldout_file: Path | None, seed: int, tokenizer: Tokenizer | None
    ) -> None:
        if needs_heldout(names) and heldout_file is None:
            raise UserError(
                f"eval={self.suite['name']} needs held-out text, which this data has not; set eval=none or eval=paper"
            )
        if any(name in DOCS_TASKS for name in names):
            write_docs_tasks(heldout_file, folder, seed=seed)
        counted = [name for name in names if task_length(name)]
        if counted and tokenizer is None:
            raise UserError(f"{counted[0]} counts its length in tokens and the model has no tokenizer; set eval=none")
        limit = self.suite.get("limit")
        if long := [name for name in counted if name in LONG_TASKS]:
            size = limit or QUESTIONS  # made to measure: the first of 50 would all be asked early
            write_long_tasks(long, folder, heldout_file=heldout_file, tokenizer=tokenizer, seed=seed, n_questions=size)
        if ruler := [name for name in counted if name not in LONG_TASKS]:
            write_ruler_tasks(ruler, folder, tokenizer=tokenizer, seed=seed, n_questions=limit)
        data_dir = self.suite.get("data_dir")
        for name in names:
            if name in CODE_TASKS:
                write_code_task(name, folder)
            elif not needs_heldout([name]) and name not in ruler:
                write_paper_task(name, folder, data_dir=Path(data_dir).expanduser() if data_dir else None)

    def run(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        *,
        device: torch.device | str = "cpu",
        max_length: int,
        dtype: torch.dtype | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Any]:
        """Answer every question.

        Args:
            model, tokenizer, device, max_length, dtype: see :class:`~flowhn.evaluation.lm.FlowHNLM`.
            on_progress: called with (requests done, requests).

        Returns:
            ``{"tasks": {task: numbers}, "seconds": s}``. The numbers are lm-eval's (``acc``, ``acc_stderr``, ``acc_norm``,
            ``acc_norm_stderr``, ``perplexity``, ``perplexity_stderr``, where the task has them), with ``n`` questions,
            the accuracy of guessing as ``chance``, ``correct``: for each accuracy, one 0 or 1 per question, ``choice``:
            one digit per question, the likeliest of its answers, the name of
            the accuracy that tables show as ``metric``, and for ``eval=long_context`` and
            ``eval=ruler`` the questions' ``length`` in tokens. RULER's number is ``string_match``.

        Raises:
            UserError: questions longer than ``max_length``, which would be cut.
        """
        from lm_eval.evaluator import evaluate

        for name in self._tasks:
            if (length := task_length(name)) and length > max_length + 1:
                raise UserError(f"eval.max_length={max_length} would cut the questions of {name}; set it to {length}")

        begun = time.monotonic()
        was_training = model.training
        model.eval()
        adapter = FlowHNLM(
            model,
            tokenizer,
            device=device,
            max_length=max_length,
            dtype=dtype,
            encoded=self._tokens(tokenizer),
            on_progress=on_progress,
        )
        with _quiet(), _keep_requests(self._tasks.values()):
            out = evaluate(
                adapter,
                {"tasks": self._tasks, "groups": {}, "group_map": {}},
                limit=self._limit,
                bootstrap_iters=_BOOTSTRAP,
                confirm_run_unsafe_code=any(
                    name in CODE_TASKS for name in self._tasks
                ),  # asked for when they were written
            )
        model.train(was_training)
        tasks = {name: _numbers(name, out["results"][name], out["samples"][name]) for name in self._tasks}
        return {"tasks": tasks, "seconds": time.monotonic() - begun}


def _load_tasks(folder: Path, names: list[str], data_dir: Any, limit: int | None) -> dict[str, Any]:
    """lm-eval's task objects with their requests built."""
    from lm_eval.tasks import TaskManager

    # Indexing all of lm-eval's tasks takes 17 s; the folder holds the few that are asked for.
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    tasks = {}
    for name in names:
        try:
            task = manager.load([name])["tasks"][name]
            documents = task.eval_docs  # once: lm-eval makes them anew (HellaSwag: 3 ms) each time it is asked
            size = min(limit or len(documents), len(documents))
            if any(task.doc_to_target(documents[row]) is None for row in range(size)):
                raise ValueError("a question has no answer")
            task.build_all_requests(limit=size, rank=0, world_size=1)
        except Exception as error:  # datasets and the hub raise many classes for data that cannot be had or read
            raise _unreadable(name, data_dir, error) from error
        tasks[name] = task
    return tasks


def _unreadable(task: str, data_dir: Any, error: Exception) -> UserError:
    reason = (str(error.__cause__ or error).strip().splitlines() or [""])[0] or type(error).__name__
    if data_dir and task in PAPER_TASKS:
        return UserError(
            f"eval.data_dir={data_dir} has a file for {task} that lm-eval cannot read ({reason}); give it one question "
            "per line in the columns of the original"
        )
    if task in CODE_TASKS:
        return UserError(
            f"{task} needs the Hugging Face hub for its questions and for code_eval, which runs the tests, and one of them "
            f"cannot be had ({reason}); use a machine with a network or choose another eval="
        )
    return UserError(
        f"the evaluation data of {task} cannot be had from the hub ({reason}); give a folder with <task>.jsonl files as "
        "eval.data_dir=, or set eval=docs or eval=none"
    )


@contextlib.contextmanager
def _keep_requests(tasks: Any) -> Iterator[None]:
    """Let lm-eval take the requests that are there: each call of ``evaluate`` would build them again."""
    tasks = list(tasks)
    for task in tasks:
        for instance in task.instances:
            instance.resps, instance.filtered_resps = [], {}
        task.build_all_requests = lambda **options: None
    try:
        yield
    finally:
        for task in tasks:
            del task.build_all_requests


def _numbers(name: str, results: Mapping[str, Any], samples: list[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"n": len(samples), "chance": chance(name)}
    if length := task_length(name):
        found["length"] = length
    for key, value in results.items():
        metric, _, answer_filter = key.partition(",")  # "acc,none"; code tasks: "pass@1,create_test"
        if ruler_length(name):
            metric = our_name(metric, length)
        if metric and answer_filter and isinstance(value, int | float):
            found[metric] = float(value)
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    found["correct"] = {
        metric: "".join(str(int(sample[metric])) for sample in ordered)
        for metric in ("acc_norm", *_METRICS)
        if ordered and metric in ordered[0]
    }
    if choices := _choices(ordered, found["correct"]):
        found["choice"] = choices
    known = found if ruler_length(name) else found["correct"]  # RULER's are shares, without a right or wrong
    found["metric"] = next((metric for metric in _METRICS if metric in known), "acc")
    return found


def _choices(samples: list[Mapping[str, Any]], correct: Mapping[str, str]) -> str:
    """Per question the number of the likeliest answer, one digit each; empty for tasks that choose in another way."""
    if "acc" not in correct or "acc_mutual_info" in correct:
        return ""
    answers = [sample["filtered_resps"] for sample in samples]
    if not all(1 < len(scores) <= 10 for scores in answers):
        return ""
    return "".join(str(max(range(len(scores)), key=lambda place: scores[place][0])) for scores in answers)


@contextlib.contextmanager
def _compile_once() -> Iterator[None]:
    """Let lm-eval compile each of its Jinja templates once: it does so for each question, two thirds of its time."""
    from lm_eval.utils import env

    env.from_string = functools.lru_cache(maxsize=256)(env.from_string)  # shadows the class's method
    try:
        yield
    finally:
        del env.from_string


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's, datasets' and the hub's progress bars, prints and logs; what fails raises."""
    import datasets

    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    levels = {name: logging.getLogger(name).level for name in ("lm_eval", "datasets", "huggingface_hub")}
    multiprocessing = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = (
        "1"  # lm-eval's bootstrap starts a process per core for a tenth of a second's work
    )
    for name in levels:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), _compile_once():
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if multiprocessing is None:
            del os.environ["DISABLE_MULTIPROC"]
        if not bars:
            datasets.enable_progress_bars()
