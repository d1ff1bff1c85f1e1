"""Documents of one file, streamed: plain text, JSON lines and Parquet, behind gzip, xz or Zstandard."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from flowhn.errors import UserError

COMPRESSIONS = (".gz", ".xz", ".zst")
TEXT = (".txt", ".text", ".md")
JSON_LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet",)
SUFFIXES = (*TEXT, *JSON_LINES, *PARQUET, *(f"(.txt|.jsonl){suffix}" for suffix in COMPRESSIONS))


def _kind(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    inner = suffixes[-2:-1] if compressed else suffixes[-1:]
    if inner and inner[0] in TEXT:
        return "text"
    if inner and inner[0] in JSON_LINES:
        return "jsonl"
    return "parquet" if inner and inner[0] in PARQUET and not compressed else ""


def is_supported(path: Path) -> bool:
    """Whether the file's name says that it can be read."""
    return bool(_kind(path))


def read_documents(path: Path, *, key: str, text_key: str, separator: str) -> Iterator[tuple[str, str]]:
    """Pairs (id, text) of a file's documents in order; blank documents are left out.

    Args:
        path: the file.
        key: the config key that named it, for messages (``data.path``).
        text_key: field of JSON lines or column of Parquet that holds the text.
        separator: a line of a text file that contains only this ends a document.

    Raises:
        UserError: binary content, bad UTF-8, a damaged archive, a missing field or column, no document at all.
    """
    kind = _kind(path)
    if kind == "parquet":
        texts = _parquet(path, key, text_key)
    elif kind == "jsonl":
        texts = _json_lines(path, key, text_key)
    else:
        texts = _text(path, key, separator)
    count = 0
    for text in texts:
        if text.strip():
            yield f"{path.name}#{count}", text
            count += 1
    if not count:
        raise UserError(f"{key}={path} holds no document with text in it; give a file with text")


def _open(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rb")
    if suffix == ".xz":
        return lzma.open(path, "rb")
    if suffix == ".zst":
        # Arrow's reader notices a truncated file, which the stream reader of `zstandard` takes for its end.
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path), "rb"), "zstd"), 2**20)
    return path.open("rb")


def _lines(path: Path, key: str) -> Iterator[str]:
    """Lines of a UTF-8 file without their ends, cut at ``\\n`` only: texts may hold other Unicode line separators."""
    number = 0
    try:
        with _open(path) as stream:
            for number, line in enumerate(stream, start=1):
                if b"\0" in line:
                    raise _not_text(path, key, line if number == 1 else b"")
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield text.removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise UserError(f"{key}={path} is not UTF-8 (line {number}); convert it, for example with iconv") from error
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{key}={path} is damaged or cut short ({error}); fetch or pack it again") from error


def _not_text(path: Path, key: str, beginning: bytes) -> UserError:
    """What a file with NUL bytes is: UTF-32 or UTF-16, by its mark or its every other byte, or binary."""
    marks = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16"}
    marks[codecs.BOM_UTF16_BE] = "UTF-16"
    found = next((name for mark, name in marks.items() if beginning.startswith(mark)), None)
    head = beginning[:200]
    if found is None and head:
        is_half = [part.count(0) > 0.9 * len(part) and part is not head for part in (head[::2], head[1::2])]
        found = "UTF-16" if any(is_half) and head.count(0) < 0.6 * len(head) else None
    if found:
        return UserError(f"{key}={path} is {found}, not UTF-8; convert it: iconv -f {found} -t UTF-8")
    return UserError(f"{key}={path} is a binary file; give text, JSON lines or Parquet")


def _text(path: Path, key: str, separator: str) -> Iterator[str]:
    lines: list[str] = []
    for line in _lines(path, key):
        if line.strip() == separator:
            yield "\n".join(lines).strip("\n")
            lines = []
        else:
            lines.append(line)
    yield "\n".join(lines).strip("\n")


def _json_lines(path: Path, key: str, text_key: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path, key), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{key}={path} line {number} is not JSON ({error}); mend or remove that line") from error
        if not isinstance(row, dict) or not isinstance(row.get(text_key), str):
            keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise UserError(
                f"{key}={path} line {number} has no text under {text_key!r} (it has: {keys}); set data.text_key"
            )
        yield row[text_key].encode("utf-8", "replace").decode("utf-8")  # a lone surrogate escape cannot be tokenised


def _parquet(path: Path, key: str, text_key: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if text_key not in schema.names:
                names = ", ".join(schema.names)
                raise UserError(f"{key}={path} has no column {text_key!r} (it has: {names}); set data.text_key")
            kind = schema.field(text_key).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise UserError(f"{key}={path} has numbers, not text, in column {text_key!r}; set data.text_key")
            for batch in file.iter_batches(batch_size=256, columns=[text_key]):
                yield from (text for text in batch.column(0).to_pylist() if text)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{key}={path} is not a readable Parquet file ({str(error).splitlines()[0]})") from error
