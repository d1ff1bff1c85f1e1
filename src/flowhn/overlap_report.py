"""How much of the evaluation questions stands in a run's training text: counted once for all models and kept beside their table.

``./reproduce.sh`` does it by itself for local text (``data=files``) and the paper's tasks; ``scripts/overlap.py`` does it alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flowhn.reporting.overlap import FILE_NAME
from flowhn.reporting.record import config_hash
from flowhn.run_folder import write_json

N_GRAM = 13  # words, as Brown et al. 2020 (GPT-3), appendix C


def is_counted(config: Mapping[str, Any]) -> bool:
    """Whether a run's configuration has text at hand and questions that were not made from it."""
    from flowhn.evaluation.suites import PAPER_TASKS

    return config["data"]["name"] == "files" and any(task in PAPER_TASKS for task in config["eval"]["tasks"])


def count_overlap(config: Mapping[str, Any], workshop: Any) -> dict[str, Any]:
    """Per task what :class:`flowhn.evaluation.overlap.Overlap` holds; kept in ``cache_dir``.

    Args:
        config: a run's resolved configuration.
        workshop: the :class:`flowhn.experiment.Workshop` that may have the questions already.

    Raises:
        UserError: text or questions cannot be read.
    """
    import json

    from flowhn.data.corpora import open_corpus
    from flowhn.evaluation.overlap import ngram_overlap, question_texts

    corpus, suite = open_corpus(config["data"]), config["eval"]
    key = config_hash({"text": corpus.fingerprint(), "suite": suite, "n": N_GRAM})
    cached = Path(config["cache_dir"]) / "overlap" / f"{key}.json"
    if cached.is_file():
        return json.loads(cached.read_text(encoding="utf-8"))
    evaluator = workshop.evaluator(config, suite=suite, tokenizer=None, heldout_file=None)
    train = (document.text for document in corpus.documents() if not document.held_out)
    found = ngram_overlap(train, question_texts(evaluator.tasks), n=N_GRAM)
    result = {"n": N_GRAM, "data": config["data"]["name"], "tasks": {task: asdict(one) for task, one in found.items()}}
    cached.parent.mkdir(parents=True, exist_ok=True)
    write_json(cached, result)
    return result


def write_overlap(config: Mapping[str, Any], workshop: Any, folder: Path) -> None:
    """Put ``overlap.json`` beside the table that is to say it."""
    result = count_overlap(config, workshop)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE_NAME, result)
