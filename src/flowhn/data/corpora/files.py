"""``data=files``: a user's own text, as plain text, JSON lines or Parquet, compressed or not."""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowhn.data.corpora.base import Document, read_fraction, uniform_hash
from flowhn.data.corpora.readers import SUFFIXES, is_supported, read_documents
from flowhn.errors import UserError

# A hash below the fraction holds out about that share of many documents. Of a small corpus, which fits into memory, the
# documents with the lowest hashes are taken, so that the share is met; of fewer documents than this, each one's end.
FEW_DOCUMENTS = 10
SMALL_DOCUMENTS = 1000
SMALL_CHARS = 100_000_000
WHOLE_HASH_BYTES = 256 * 2**20


class FilesCorpus:
    """Documents of one or more local files.

    Args:
        spec: ``path`` (file, folder, glob or a list of these), ``val_path`` (the same, or null; its files are no part of
            ``path``, though they lie in that folder), ``val_fraction`` (used where there is no ``val_path``), ``text_key`` (field
            or column of JSON lines and Parquet), ``separator`` (the line between documents of a text file).

    Raises:
        UserError: a path that is missing, empty or of unknown type, no text but the validation text, or a fraction out of
            range.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        if not spec.get("path"):
            raise UserError("data=files needs data.path=FILE (a file, a folder, a glob or a list of these)")
        self.text_key = str(spec.get("text_key") or "text")
        self.separator = str(spec.get("separator") or "<|endoftext|>")
        self.paths = resolve_paths(spec["path"], "data.path")
        self.val_paths = resolve_paths(spec["val_path"], "data.val_path") if spec.get("val_path") else []
        if self.val_paths:  # they may lie in the same folder, or be meant by the same glob
            held_out = {path.resolve() for path in self.val_paths}
            self.paths = [path for path in self.paths if path.resolve() not in held_out]
            if not self.paths:
                raise UserError(
                    f"data.path={spec['path']} names no text but that of data.val_path={spec['val_path']}; give text to train "
                    "on, or leave data.val_path away and a share is held out (data.val_fraction)"
                )
        self.val_fraction = 0.0 if self.val_paths else read_fraction(spec)

    def fingerprint(self) -> dict[str, Any]:
        """Hashes of the files, in reading order; where they lie does not matter."""
        return {"files": [file_hash(path) for path in self.paths], "val": [file_hash(path) for path in self.val_paths]}

    def documents(self) -> Iterator[Document]:
        """Documents of ``path`` in file order, then those of ``val_path``; streamed, one in memory at a time."""
        texts = self._read(self.paths, "data.path")
        if self.val_paths:
            yield from (Document(name, text, False) for name, text in texts)
            yield from (Document(name, text, True) for name, text in self._read(self.val_paths, "data.val_path"))
            return
        first, is_small = _read_ahead(texts)
        threshold = self.val_fraction
        if is_small:
            hashes = sorted({uniform_hash(text) for _, text in first})
            if len(hashes) < FEW_DOCUMENTS:
                for name, text in first:
                    yield from _cut_tail(name, text, self.val_fraction)
                return
            held = max(1, round(self.val_fraction * len(hashes)))
            threshold = hashes[min(held, len(hashes) - 1)]  # one document at least is trained on
        for name, text in itertools.chain(first, texts):
            yield Document(name, text, uniform_hash(text) < threshold)

    def _read(self, paths: Sequence[Path], key: str) -> Iterator[tuple[str, str]]:
        for path in paths:
            yield from read_documents(path, key=key, text_key=self.text_key, separator=self.separator)


def _read_ahead(texts: Iterator[tuple[str, str]]) -> tuple[list[tuple[str, str]], bool]:
    """The first documents, and whether they are all there are."""
    first: list[tuple[str, str]] = []
    chars = 0
    for document in texts:
        first.append(document)
        chars += len(document[1])
        if len(first) >= SMALL_DOCUMENTS or (len(first) >= FEW_DOCUMENTS and chars > SMALL_CHARS):
            return first, False
    return first, True


def _cut_tail(name: str, text: str, fraction: float) -> Iterator[Document]:
    cut = int(len(text) * (1 - fraction))
    line_end = text.rfind("\n", 0, cut) + 1
    cut = line_end if line_end > cut // 2 else cut
    if cut:
        yield Document(name, text[:cut], False)
    yield Document(f"{name}:tail", text[cut:], True)


def resolve_paths(value: str | Path | Sequence[str | Path], key: str) -> list[Path]:
    """Files meant by a path, a folder (all readable files below it), a glob, or a list of these, in a fixed order.

    Raises:
        UserError: nothing is there, or a file's type is unknown.
    """
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    found: list[Path] = []
    for item in values:
        path = Path(str(item)).expanduser()
        if path.is_file():
            found.append(path)
        elif path.is_dir():
            inside = sorted(child for child in path.rglob("*") if child.is_file() and is_supported(child))
            if not inside:
                raise UserError(f"{key}={item} holds no readable file; readable are {', '.join(SUFFIXES)}")
            found += inside
        elif glob.has_magic(str(path)):
            matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file())
            if not matches:
                raise UserError(f"{key}={item} matches no file; check the pattern")
            found += matches
        else:
            raise UserError(f"{key}={item} does not exist; give a file, a folder or a glob")
    for path in found:
        if ".parquet" in [suffix.lower() for suffix in path.suffixes] and not is_supported(path):
            raise UserError(
                f"{key}={path} is Parquet in a further compression; unpack it (Parquet is compressed inside)"
            )
        if not is_supported(path):
            raise UserError(f"{key}={path} has an unknown type; readable are {', '.join(SUFFIXES)}")
        if not os.access(path, os.R_OK):
            raise UserError(f"{key}={path} cannot be read by this user; change its permissions")
        if path.stat().st_size == 0:
            raise UserError(f"{key}={path} is empty; give a file with text in it")
    return found


def file_hash(path: Path) -> str:
    """SHA-256 of a file; for a very large one, of its name, size and time of change, which costs nothing to read."""
    status = path.stat()
    if status.st_size > WHOLE_HASH_BYTES:
        return f"{path.name}:{status.st_size}:{status.st_mtime_ns}"
    with path.open("rb") as stream:
        return f"{''.join(path.suffixes[-2:])}:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
