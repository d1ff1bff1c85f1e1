"""``data=slimpajama``: the paper's training set, SlimPajama-6B, streamed from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flowhn.data.corpora.base import Document
from flowhn.data.hub import require_hub
from flowhn.errors import UserError


class SlimPajamaCorpus:
    """The training and validation parts of ``DKYoon/SlimPajama-6B``.

    Args:
        spec: ``path`` (the hub's name of the set) and ``text_key``.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self.repo = str(spec.get("path") or "DKYoon/SlimPajama-6B")
        self.text_key = str(spec.get("text_key") or "text")

    def fingerprint(self) -> dict[str, Any]:
        """Only the name: the set is fixed, and an existing cache must open without a network."""
        return {"repo": self.repo}

    def documents(self) -> Iterator[Document]:
        """Training documents, then validation documents, in the set's order.

        Raises:
            UserError: the hub cannot be reached, or reading stops in the middle.
        """
        require_hub(self.repo, "dataset")
        from datasets import load_dataset

        try:
            for split in ("train", "validation"):
                rows = load_dataset(self.repo, split=split, streaming=True)
                for index, row in enumerate(rows):
                    yield Document(f"{split}#{index}", row[self.text_key], split == "validation")
        except Exception as error:  # the hub's clients raise many kinds, none of which a user can act on differently
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
            raise UserError(
                f"data=slimpajama: reading {self.repo} stopped ({reason}); try again with a hub, or use data=files"
            ) from error
