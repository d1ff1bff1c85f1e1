"""``eval=ruler``: the tasks of RULER (Hsieh et al. 2024), made and scored by lm-eval's own code at the lengths that are asked.

lm-eval makes all lengths of a task as one list, of which ``limit`` would take the first length alone, so every length is a
task of its own here: ``niah_single_1_4096``. The questions are written as JSON lines, and lm-eval's YAML of the task reads
them: prompt, generation and scoring are lm-eval's. Three things differ from ``lm_eval --tasks ruler``, and none changes what
is asked: lengths are counted by the model's own tokenizer, the random numbers are seeded for each task, and no more
questions are made than are asked.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np

from flowhn.errors import UserError
from flowhn.evaluation.lm import Tokenizer

QUESTIONS = 500  # of each task and length, lm-eval's number
METRIC = "string_match"  # RULER's name; lm-eval calls it by the length
ROOM = 256  # beyond the length: lm-eval counts niah's answer prefix and fwe's 50 generated tokens on top of it
_PACKAGE = "lm_eval.tasks.ruler"
_SLACK = 10  # tokens by which two questions of one size may differ
_VT_EXAMPLE = 500  # tokens that lm-eval gives the worked example of ruler_vt


@dataclass(frozen=True)
class RulerTask:
    """A task of RULER.

    Args:
        yaml: lm-eval's file below ``lm_eval/tasks/ruler``.
        words: whether it draws from the word lists of the package wonderwords.
        download: what it takes from the network, in words; empty: nothing.
    """

    yaml: str
    words: bool = False
    download: str = ""


_ESSAYS = "Paul Graham's essays from the Hugging Face hub (baber/paul_graham_essays) and nltk's punkt_tab"
RULER_TASKS = {
    "niah_single_1": RulerTask("niah_single_1.yaml", words=True),
    "niah_single_2": RulerTask("niah_single_2.yaml", words=True, download=_ESSAYS),
    "niah_single_3": RulerTask("niah_single_3.yaml", words=True, download=_ESSAYS),
    "niah_multikey_1": RulerTask("niah_multikey_1.yaml", words=True, download=_ESSAYS),
    "niah_multikey_2": RulerTask("niah_multikey_2.yaml", words=True),
    "niah_multikey_3": RulerTask("niah_multikey_3.yaml", words=True),
    "niah_multivalue": RulerTask("niah_multivalue.yaml", words=True, download=_ESSAYS),
    "niah_multiquery": RulerTask("niah_multiquery.yaml", words=True, download=_ESSAYS),
    "ruler_vt": RulerTask("vt.yaml"),
    "ruler_cwe": RulerTask("cwe.yaml", words=True),
    "ruler_fwe": RulerTask("fwe.yaml"),
    "ruler_qa_squad": RulerTask("qa_squad.yaml", download="SQuAD from rajpurkar.github.io"),
    "ruler_qa_hotpot": RulerTask("qa_hotpot.yaml", download="HotpotQA from the Hugging Face hub"),
}
# Of lm-eval's YAML; its functions are named apart, since reading niah_single_1.yaml with them imports all that it may need.
_KEPT = (
    "output_type",
    "doc_to_text",
    "doc_to_target",
    "gen_prefix",
    "target_delimiter",
    "generation_kwargs",
    "repeats",
)
_LOCAL = [name for name, task in RULER_TASKS.items() if not task.download]


def at_lengths(suite: Mapping[str, Any]) -> list[str]:
    """The suite's tasks, each RULER task once for each of ``lengths``, as ``<task>_<length>``.

    Raises:
        UserError: ``lengths`` is missing or empty.
    """
    names = []
    for task in suite["tasks"]:
        if task in RULER_TASKS:
            if not suite.get("lengths"):
                raise UserError(f"{task} needs lengths in tokens; choose eval=ruler and set eval.lengths=[4096]")
            names += [f"{task}_{length}" for length in sorted(set(suite["lengths"]))]
        else:
            names.append(task)
    return names


def ruler_length(name: str) -> int | None:
    """Tokens of a task ``<task>_<length>``, None for a task of another kind."""
    task, _, length = name.rpartition("_")
    return int(length) if task in RULER_TASKS and length.isdecimal() else None


def our_name(metric: str, length: int) -> str:
    """``4096_stderr`` -> ``string_match_stderr``, and empty for another length than the task's.

    lm-eval names RULER's numbers by the length, and gives every task one for 4096, -1 where that was not asked.
    """
    number, _, error = metric.partition("_")
    return "" if number != str(length) else f"{METRIC}_{error}" if error else METRIC


def write_ruler_tasks(
    names: Sequence[str], folder: Path, *, tokenizer: Tokenizer, seed: int, n_questions: int | None
) -> None:
    """Write tasks, their questions and YAML files, into ``folder``.

    Args:
        names: as :func:`at_lengths` gives them.
        tokenizer: the model's; lengths are counted with it.
        seed: decides the questions, with the task's name.
        n_questions: how many in each task; None: ``QUESTIONS``.

    Raises:
        UserError: a package or data cannot be had, or a length is too short for a task.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        task, _, length = name.rpartition("_")
        settings = _settings(task)
        rows = _questions(task, settings, int(length), tokenizer, f"{seed} {name}", n_questions or QUESTIONS)
        path = (folder / f"{name}.jsonl").absolute()
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        data = {"data_files": {"test": str(path)}, "cache_dir": str((folder / "arrow").absolute())}
        content = {key: settings[key] for key in _KEPT} | {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": data,
            "test_split": "test",
            "metric_list": [{"metric": length, "aggregation": "mean", "higher_is_better": True}],
            "metadata": settings["metadata"] | {"length": int(length)},
        }
        lines = [f"{key}: {json.dumps(value)}" for key, value in content.items()]  # JSON is YAML
        lines.append(f"process_results: !function {_PACKAGE}.{_function(settings, 'process_results')}")
        (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _settings(task: str) -> dict[str, Any]:
    """lm-eval's YAML of a task with those that it includes; functions as the text ``<folder>/<module>.<name>``."""
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(str(files("lm_eval") / "tasks" / "ruler" / RULER_TASKS[task].yaml), resolve_func=False)


def _function(settings: Mapping[str, Any], key: str) -> str:
    return Path(settings[key]).name


def _questions(
    task: str, settings: Mapping[str, Any], length: int, tokenizer: Tokenizer, seed: str, n_questions: int
) -> list[dict[str, Any]]:
    """Rows ``{index, input, outputs, length, max_length, gen_prefix}``, made by lm-eval."""
    module, _, make = _function(settings, "custom_dataset").rpartition(".")
    maker = _lm_eval(task, module)
    sampler = importlib.import_module(f"{_PACKAGE}.prepare_niah") if module == "niah_utils" else maker

    def counted(text: str) -> SimpleNamespace:  # what lm-eval asks of a Hugging Face tokenizer
        return SimpleNamespace(input_ids=tokenizer.encode(text))

    with (
        _seeded(seed, maker),
        patch.object(maker, "get_tokenizer", lambda *names: counted),
        patch.object(sampler, "tqdm", lambda rows, **options: islice(rows, n_questions)),
    ):
        _check_room(task, maker, length, tokenizer)
        try:
            rows = list(getattr(maker, make)(max_seq_lengths=[length])["test"])
        except (
            Exception
        ) as error:  # requests, datasets, the hub and nltk raise many classes for data that cannot be had
            if isinstance(error, ValueError) and "max_seq_length" in str(error):
                raise _too_short(task, length) from error
            raise _cannot(task, error) from error
    for row in rows:
        whole = module == "qa_utils" or all(answer in row["input"] for answer in row["outputs"])
        if not (row["outputs"] and whole):
            raise _too_short(task, length)
    return rows


def _lm_eval(task: str, module: str) -> ModuleType:
    """lm-eval's module for a task, imported without the network, which it would ask for punkt_tab whether needed or not."""
    spec = RULER_TASKS[task]
    if spec.words and find_spec("wonderwords") is None:
        without = ", ".join(name for name in _LOCAL if not RULER_TASKS[name].words)
        raise UserError(
            f"{task} needs the package wonderwords; run FLOWHN_EXTRAS=ruler ./reproduce.sh --list once or pip install "
            f"wonderwords, or ask those that do without: eval.tasks=[{without}]"
        )
    import nltk

    with patch.object(nltk, "download", lambda *names, **options: False):
        found = importlib.import_module(f"{_PACKAGE}.{module}")
    if spec.download == _ESSAYS:
        try:
            nltk.data.find("tokenizers/punkt_tab")
        except LookupError as error:
            if not nltk.download("punkt_tab", quiet=True):
                raise _cannot(task, RuntimeError("punkt_tab cannot be downloaded")) from error
    return found


def _check_room(task: str, maker: ModuleType, length: int, tokenizer: Tokenizer) -> None:
    """Refuse a length for which lm-eval would shorten its question for ever, or to one without an answer."""

    def size(*parts: object) -> int:
        return len(tokenizer.encode(" ".join(map(str, parts)))) + _SLACK

    draws = range(8)
    if task == "ruler_vt":
        example = max(size(*maker.generate_input_output(5, 1, 4, is_icl=True)) for _ in draws) + 30
        if example > _VT_EXAMPLE:
            raise UserError(
                f"lm-eval gives the worked example of ruler_vt {_VT_EXAMPLE} tokens, and the model's tokenizer needs {example}; "
                "leave ruler_vt out of eval.tasks, or train with a larger vocab_size"
            )
        least = _VT_EXAMPLE + max(size(*maker.generate_input_output(10, 1, 4)) for _ in draws) + 30
    elif task == "ruler_cwe":
        example, question, answer = maker.generate_input_output(10, length)
        least = size(example, question, *(f"{place}. {word}" for place, word in enumerate(answer, 1))) + 120
    elif task == "ruler_fwe":
        least = max(size(maker.TEMPLATE), 256)
    else:
        return  # lm-eval says so itself
    if length < least:
        raise _too_short(task, length, least)


def _too_short(task: str, length: int, least: int | None = None) -> UserError:
    needed = f"about {least}" if least else "more"
    enough = 1 << (least - 1 if least else length).bit_length()  # the next power of two
    return UserError(
        f"eval.lengths={length} is too short for {task}, which needs {needed} with the model's tokenizer; set "
        f"eval.lengths=[{enough}] or leave {task} out of eval.tasks"
    )


def _cannot(task: str, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [""])[0].split("(")[0].strip() or type(error).__name__
    if isinstance(error, OSError):  # of requests and the hub: its text is their whole stack of causes
        reason = type(error).__name__
    download = RULER_TASKS[task].download
    if not download:
        return UserError(f"lm-eval could not make {task} ({reason}); leave it out of eval.tasks")
    return UserError(
        f"{task} needs {download}, which cannot be had ({reason}); use a machine with a network, or ask those that are made "
        f"locally: eval.tasks=[{', '.join(_LOCAL)}]"
    )


@contextlib.contextmanager
def _seeded(seed: str, maker: ModuleType) -> Iterator[None]:
    """Seed the random numbers that lm-eval draws from, and give everybody else's back."""
    before, numbers = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(random.getrandbits(32))
    if hasattr(maker, "RNG"):  # cwe's own, which would go on where the last length left it
        maker.RNG.seed(seed)
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(numbers)
