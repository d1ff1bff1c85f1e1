"""Tokenisers: byte-level BPE trained on the corpus, a ``tokenizer.json``, or a Hugging Face tokeniser."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowhn.data.corpora.files import file_hash
from flowhn.data.hub import require_hub
from flowhn.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from flowhn.data.prepared import PreparedData

END_OF_TEXT = "<|endoftext|>"
# Other families' names for it, for a tokenizer.json that says no more about itself.
_END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "<|eos|>", "</s>", "<eos>", "[EOS]")
MIN_VOCAB_SIZE = 257  # 256 bytes and the end of text


class TextTokenizer:
    """Encodes and decodes text; adds no special tokens of its own.

    Attributes:
        vocab_size: one more than the tokeniser's largest id (a model's vocabulary may be larger).
        eos_id: the token that ends a document.
        pad_id: the token that fills padded rows.
    """

    def __init__(self, *, backend: Tokenizer, eos_id: int, pad_id: int | None = None) -> None:
        # Text that spells a special token is text: a document must not be able to end itself.
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.eos_id = eos_id
        self.pad_id = eos_id if pad_id is None else pad_id
        # Not their number: ids may have gaps, and the largest has to fit into the model's vocabulary.
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the tokens, as hex."""
        return hashlib.sha256(self._backend.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of many texts; the library spreads them over threads."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids; special tokens are left out."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)


def train_bpe(texts: Iterator[str], *, vocab_size: int) -> Tokenizer:
    """Byte-level BPE with at most ``vocab_size`` tokens (fewer where the text gives no more), ``<|endoftext|>`` first.

    Raises:
        UserError: the vocabulary has no room for the 256 bytes.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(f"vocab_size={vocab_size} is too small for data.tokenizer=train; at least {MIN_VOCAB_SIZE}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer_fingerprint(source: str) -> str:
    """What identifies a tokeniser before it is loaded: file contents for a local one, the name for the others."""
    path = Path(source).expanduser()
    if path.is_file():
        return file_hash(path)
    if path.is_dir():
        return "|".join(file_hash(file) for file in sorted(path.glob("*token*.json")))
    return source


def import_tokenizer(source: str, folder: Path) -> None:
    """Copy the tokeniser ``source`` (a tokenizer.json, a folder with one, or a hub name) into a cache folder.

    Raises:
        UserError: it cannot be found or read.
    """
    path = Path(source).expanduser()
    if path.is_dir() and not (path / "tokenizer_config.json").is_file():
        path = path / "tokenizer.json"
    if path.suffix == ".json":
        _read_json_tokenizer(path, source)
        (folder / "tokenizer.json").write_bytes(path.read_bytes())
        return
    tokenizer = _read_hf_tokenizer(str(path) if path.is_dir() else source, is_local=path.is_dir())
    if not tokenizer.is_fast:
        raise UserError(f"data.tokenizer={source} has no fast (tokenizers) form; give another, or data.tokenizer=train")
    tokenizer.save_pretrained(folder / "tokenizer")


def _read_json_tokenizer(path: Path, source: str) -> Tokenizer:
    from tokenizers import Tokenizer

    if not path.is_file():
        raise UserError(f"data.tokenizer={source} does not exist; give train, a tokenizer.json, a folder or a hub name")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust binding raises plain Exception
        raise UserError(f"data.tokenizer={source} is not a tokenizers JSON file ({error})") from error


def _read_hf_tokenizer(source: str, *, is_local: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=True)
    except Exception as error:  # not in the local hub cache, or broken; the library has no common class for these
        if is_local:
            raise UserError(f"data.tokenizer={source} cannot be read ({str(error).splitlines()[0]})") from error
    require_hub(source, "model")
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:
        raise UserError(f"data.tokenizer={source} cannot be loaded ({str(error).splitlines()[0]})") from error


def open_tokenizer(path: Path) -> TextTokenizer:
    """Open a cached tokeniser: a ``tokenizer.json``, or a folder of Hugging Face files.

    Raises:
        UserError: it has no token that ends a document.
    """
    folder = path if path.is_dir() else path.parent
    backend = _read_json_tokenizer(folder / "tokenizer.json", str(path))
    special: Mapping[str, Any] = {}
    if path.is_dir():
        special = json.loads((path / "tokenizer_config.json").read_text(encoding="utf-8"))

    def token_id(name: str) -> int | None:
        value = special.get(name)
        value = value.get("content") if isinstance(value, Mapping) else value
        return backend.token_to_id(value) if value else None

    ids = [token_id("eos_token"), *(backend.token_to_id(token) for token in _END_TOKENS)]
    eos_id = next((i for i in ids if i is not None), None)
    if eos_id is None:
        raise UserError(f"data.tokenizer={path} has no end-of-text token; add one of {', '.join(_END_TOKENS)}")
    return TextTokenizer(backend=backend, eos_id=eos_id, pad_id=token_id("pad_token"))


def load_tokenizer(prepared: PreparedData) -> TextTokenizer:
    """The tokeniser of a prepared data set.

    Raises:
        UserError: the set has none (``data=random``).
    """
    if prepared.tokenizer_file is None:
        raise UserError("data=random has no tokenizer and no text; choose data=docs, files or slimpajama")
    return open_tokenizer(prepared.tokenizer_file)
