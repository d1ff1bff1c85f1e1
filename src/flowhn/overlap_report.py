"""How much of the evaluation questions stands in a run's training text: counted once for all models and kept beside their table.

``./reproduce.sh`` does it by itself for local text (``data=files``) and the paper's tasks; ``scripts/overlap.py`` does it alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flowhn.errors import UserError
from flowhn.reporting.overlap import FILE_NAME
from flowhn.reporting.record import config_hash
from flowhn.run_folder import write_json

N_GRAM = 13  # words, as Brown et al. 2020 (GPT-3), appendix C


def is_counted(config: Mapping[str, Any]) -> bool:
    """Whether a run's configuration has text at hand and questions that were not made from it."""
    from flowhn.evaluation.suites import PAPER_TASKS

    return config["data"]["name"] == "files" and any(task in PAPER_TASKS for task in config["eval"]["tasks"])


def count_overlap(config: Mapping[str, Any], workshop: Any) -> dict[str, Any]:
    """Per task what :class:`flowhn.evaluation.overlap.Overlap` holds, and what was read; kept in ``cache_dir``.

    ``train`` has the files' names, the number of documents and words that were searched, and ``fingerprint`` (a hash over
    the files' hashes, in reading order).

    Args:
        config: a run's resolved configuration.
        workshop: the :class:`flowhn.experiment.Workshop` that may have the questions already.

    Raises:
        UserError: text or questions cannot be read, or there is no training text or no question in them.
    """
    import json

    from flowhn.data.corpora import open_corpus
    from flowhn.evaluation.overlap import ngram_overlap, question_texts

    corpus, suite = open_corpus(config["data"]), config["eval"]
    fingerprint = corpus.fingerprint()
    key = config_hash({"text": fingerprint, "suite": suite, "n": N_GRAM, "format": 2})
    cached = Path(config["cache_dir"]) / "overlap" / f"{key}.json"
    if cached.is_file():
        return json.loads(cached.read_text(encoding="utf-8"))
    evaluator = workshop.evaluator(config, suite=suite, tokenizer=None, heldout_file=None)
    train = (document.text for document in corpus.documents() if not document.held_out)
    found = ngram_overlap(train, question_texts(evaluator.tasks), n=N_GRAM)
    if not found.words:
        raise UserError("there is not one word of training text to look for the questions in; check data.path")
    if not any(one.ngrams for one in found.tasks.values()):
        raise UserError(f"no question has {N_GRAM} words to look for; check eval.tasks and eval.data_dir")
    read = {"files": [path.name for path in corpus.paths], "documents": found.documents, "words": found.words}
    result = {
        "n": N_GRAM,
        "data": config["data"]["name"],
        "train": read | {"fingerprint": config_hash(fingerprint["files"])},
        "tasks": {task: asdict(one) for task, one in found.tasks.items()},
    }
    cached.parent.mkdir(parents=True, exist_ok=True)
    write_json(cached, result)
    return result


def write_overlap(config: Mapping[str, Any], workshop: Any, folder: Path) -> None:
    """Put ``overlap.json`` beside the table that is to say it."""
    result = count_overlap(config, workshop)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FILE_NAME, result)
