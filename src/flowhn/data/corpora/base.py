"""What every corpus offers to the preparation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from flowhn.errors import UserError


@dataclass(frozen=True)
class Document:
    """One document; ``held_out`` ones form the validation part."""

    id: str
    text: str
    held_out: bool


class Corpus(Protocol):
    """A source of documents, built from a data config."""

    def fingerprint(self) -> dict[str, Any]:
        """Everything outside the config that shapes the documents (file hashes, Python version); JSON types only."""

    def documents(self) -> Iterator[Document]:
        """All documents, in an order that is the same on each call."""


def read_fraction(spec: Mapping[str, Any]) -> float:
    """The held-out share of a data config, ``val_fraction``.

    Raises:
        UserError: not a number between 0 and 1.
    """
    value = spec.get("val_fraction")
    try:
        fraction = float(value)
    except (TypeError, ValueError):
        fraction = 0.0
    if not 0 < fraction < 1:
        raise UserError(f"data.val_fraction={value} must lie between 0 and 1, for example 0.05")
    return fraction


def uniform_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone; the same in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
