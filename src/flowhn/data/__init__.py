"""Text to token rows: corpora, tokenisers, packing, the on-disk cache and the Lightning data module.

``TokenDataModule`` is imported on first use, because it brings torch and Lightning with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowhn.data.cache import prepare
from flowhn.data.prepared import PreparedData
from flowhn.data.tokenization import TextTokenizer, load_tokenizer

if TYPE_CHECKING:
    from flowhn.data.datamodule import TokenDataModule

__all__ = ["PreparedData", "TextTokenizer", "TokenDataModule", "load_tokenizer", "prepare"]


def __getattr__(name: str) -> Any:
    if name == "TokenDataModule":
        from flowhn.data.datamodule import TokenDataModule

        return TokenDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
