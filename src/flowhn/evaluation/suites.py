"""Which tasks a suite has and where their questions come from: lm-eval's task files, with local data where given."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from flowhn.errors import UserError
from flowhn.evaluation.long_context import LONG_TASKS
from flowhn.evaluation.ruler import ROOM, RULER_TASKS, at_lengths, ruler_length


@dataclass(frozen=True)
class PaperTask:
    """A task of the paper: lm-eval's YAML (below ``lm_eval/tasks``), the split that is scored, the accuracy of guessing."""

    yaml: str
    split: str
    chance: float


# The six tasks of Table 1 and LAMBADA. BoolQ's chance is a coin's; always answering yes scores 62.2 %.
PAPER_TASKS = {
    "arc_easy": PaperTask("arc/arc_easy.yaml", "test", 0.25),
    "arc_challenge": PaperTask("arc/arc_challenge.yaml", "test", 0.25),
    "winogrande": PaperTask("winogrande/default.yaml", "validation", 0.5),
    "piqa": PaperTask("piqa/piqa.yaml", "validation", 0.5),
    "hellaswag": PaperTask("hellaswag/hellaswag.yaml", "validation", 0.25),
    "boolq": PaperTask("super_glue/boolq/default.yaml", "validation", 0.5),
    "lambada_openai": PaperTask("lambada/lambada_openai.yaml", "test", 0.0),
}
DOCS_TASKS = {"docs_continuation": 0.25, "docs_lastword": 0.0}
CODE_TASKS = {"humaneval": "humaneval/humaneval.yaml", "mbpp": "mbpp/mbpp.yaml"}  # lm-eval's YAML
CONSENT = "HF_ALLOW_CODE_EVAL"  # the environment variable by which code_eval, which runs the programs, is allowed to


def chance(task: str) -> float | None:
    """Accuracy of guessing in a task, None where it is not known."""
    if task in PAPER_TASKS:
        return PAPER_TASKS[task].chance
    generated = task in LONG_TASKS or task in CODE_TASKS or ruler_length(task) is not None
    return 0.0 if generated else DOCS_TASKS.get(task)


def needs_heldout(tasks: Iterable[str]) -> bool:
    """Whether any of these tasks is made from held-out documents."""
    return any(task in DOCS_TASKS or task in LONG_TASKS for task in tasks)


def task_length(task: str) -> int | None:
    """Tokens of a task's questions where that is what it varies (``eval=long_context``, ``eval=ruler``), else None."""
    return LONG_TASKS.get(task) or ruler_length(task)


def needs_length(suite: Mapping[str, Any]) -> int | None:
    """Tokens of the longest input that a suite asks for, whatever was trained at: its ``max_length``, else what RULER needs."""
    lengths = [length + ROOM for name in at_lengths(suite) if (length := ruler_length(name))]
    return suite.get("max_length") or max(lengths, default=None)


def counts_tokens(tasks: Iterable[str]) -> bool:
    """Whether the questions of any of these tasks depend on the tokenizer and on nothing else of a run."""
    return any(task in RULER_TASKS for task in tasks)


def write_code_task(task: str, folder: Path) -> None:
    """Write a YAML that includes lm-eval's own HumanEval or MBPP.

    Raises:
        UserError: the user has not allowed to run what the model writes.
    """
    if os.environ.get(CONSENT) != "1":
        raise UserError(
            f"{task} runs the programs that the model writes on this machine; where that is safe (a container), set "
            f"{CONSENT}=1 in the environment, else leave {task} out of eval.tasks or choose another eval="
        )
    folder.mkdir(parents=True, exist_ok=True)
    text = f"include: {files('lm_eval') / 'tasks' / CODE_TASKS[task]}\ntask: {task}\n"
    (folder / f"{task}.yaml").write_text(text, encoding="utf-8")


def write_paper_task(task: str, folder: Path, *, data_dir: Path | None) -> None:
    """Write a YAML that includes lm-eval's own task file, with its data taken from ``data_dir`` when given.

    Raises:
        UserError: an unknown task, or no ``<task>.jsonl`` or ``<task>.jsonl.gz`` in the folder.
    """
    if task not in PAPER_TASKS:
        known = ", ".join([*PAPER_TASKS, *DOCS_TASKS, *LONG_TASKS, *CODE_TASKS, *RULER_TASKS])
        raise UserError(f"eval.tasks has {task}, which is not one of {known}")
    spec = PAPER_TASKS[task]
    lines = [f"include: {files('lm_eval') / 'tasks' / spec.yaml}", f"task: {task}"]
    if data_dir is not None:
        source = _local_file(task, data_dir)
        kwargs = {"data_files": {spec.split: str(source)}, "cache_dir": str((folder / "arrow").absolute())}
        # The other splits of the original are not there, and few-shot examples would come from them: zero-shot only.
        unused = {"training_split", "validation_split", "test_split"} - {f"{spec.split}_split"}
        lines += ["dataset_path: json", "dataset_name: null", f"dataset_kwargs: {json.dumps(kwargs)}"]
        lines += [f"{split}: null" for split in sorted(unused)] + [f"{spec.split}_split: {spec.split}"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{task}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _local_file(task: str, data_dir: Path) -> Path:
    if not data_dir.is_dir():
        raise UserError(
            f"eval.data_dir={data_dir} is not a folder; give one with <task>.jsonl or <task>.jsonl.gz files"
        )
    for ending in (".jsonl", ".jsonl.gz"):
        path = data_dir / f"{task}{ending}"
        if path.is_file():
            return path.absolute()
    raise UserError(
        f"eval.data_dir={data_dir} has no {task}.jsonl or {task}.jsonl.gz; add it or leave {task} out of eval.tasks"
    )
