"""A prepared data set on disk: what training, evaluation and records read of it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowhn.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

STATS_NAME = "stats.json"
HELDOUT_NAME = "heldout.jsonl"
TOKENIZER_NAMES = ("tokenizer.json", "tokenizer")  # a tokenizers file, or a folder of Hugging Face tokenizer files


@dataclass(frozen=True)
class PreparedData:
    """Token rows of one corpus, tokenised for one vocabulary and sequence length.

    Attributes:
        dir: the cache folder.
        stats: numbers of the set. ``n_train_tokens`` and ``n_val_tokens`` count prediction targets for packed rows, and
            real (unpadded) input tokens for padded ones; ``unigram_entropy_nats`` is the cross-entropy in nats per
            token of the training unigram distribution (add-one smoothing) on the validation targets; ``sha256`` is the
            hash of all rows, training first.
        loss_on_padding: whether targets on padding count in the loss (the published code's way).
    """

    dir: Path
    stats: dict[str, Any] = field(repr=False)
    loss_on_padding: bool = True

    @classmethod
    def open(cls, folder: Path, *, loss_on_padding: bool = True) -> PreparedData:
        """Open a finished cache folder; reads one small file.

        Raises:
            UserError: the folder holds no readable statistics.
        """
        try:
            stats = json.loads((folder / STATS_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"the data cache {folder} cannot be read ({error}); delete that folder") from error
        return cls(folder, stats, loss_on_padding)

    @cached_property
    def train(self) -> Dataset:
        """Training rows, memory mapped: ``input_ids`` of ``seq_len + 1`` tokens; ``n_real`` where rows are padded."""
        return self._rows("train")

    @cached_property
    def val(self) -> Dataset:
        """Validation rows, in the form of :attr:`train`."""
        return self._rows("val")

    @property
    def tokenizer_file(self) -> Path | None:
        """The tokeniser (a tokenizers JSON file or a folder of Hugging Face files); None for random tokens."""
        return next((self.dir / name for name in TOKENIZER_NAMES if (self.dir / name).exists()), None)

    @property
    def heldout_file(self) -> Path | None:
        """Raw text of the held-out documents, one ``{"id", "text"}`` per line; None for random tokens."""
        path = self.dir / HELDOUT_NAME
        return path if path.is_file() else None

    @property
    def tokens_per_row(self) -> float:
        """Tokens of a training row that count toward the budget: ``seq_len`` when packed, fewer when padded."""
        return self.stats["n_train_tokens"] / self.stats["n_train_rows"]

    def _rows(self, part: str) -> Dataset:
        from datasets import load_from_disk

        try:
            return load_from_disk(str(self.dir / part))
        except (OSError, ValueError) as error:
            raise UserError(f"the data cache {self.dir} cannot be read ({error}); delete that folder") from error
