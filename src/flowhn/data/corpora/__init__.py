"""Where documents come from. Each corpus is one file; :func:`open_corpus` picks it by ``data.name``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowhn.data.corpora.base import Corpus, Document
from flowhn.data.corpora.docs import DocsCorpus
from flowhn.data.corpora.files import FilesCorpus
from flowhn.data.corpora.slimpajama import SlimPajamaCorpus
from flowhn.errors import UserError

__all__ = ["CORPORA", "Corpus", "Document", "open_corpus"]

CORPORA: dict[str, type] = {"docs": DocsCorpus, "files": FilesCorpus, "slimpajama": SlimPajamaCorpus}


def open_corpus(spec: Mapping[str, Any]) -> Corpus:
    """The corpus that a data config names.

    Raises:
        UserError: there is no such corpus, or its options do not fit (see each corpus).
    """
    if spec.get("name") not in CORPORA:
        raise UserError(f"data.name={spec.get('name')} does not exist; choose one of {', '.join(CORPORA)}, random")
    return CORPORA[spec["name"]](spec)
