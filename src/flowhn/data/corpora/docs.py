"""``data=docs``: the technical English that every Python carries, so that the project runs without a network.

The docstrings of the standard library (read with ``ast``, nothing is imported) and the language reference topics behind
``help()`` (``pydoc_data.topics``), about 2.1 million characters. One document per module or topic. Which documents are
held out depends on the module's name alone, so two Python versions hold out the same modules.
"""

from __future__ import annotations

import ast
import os
import platform
import re
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flowhn.data.corpora.base import Document, read_fraction, uniform_hash
from flowhn.errors import UserError

# Tests and bundled third-party code are not documentation; the codec tables of `encodings` carry one generated sentence
# each; the reference topics are read separately.
SKIPPED_FOLDERS = frozenset(
    [
        "__pycache__",
        "dist-packages",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    ]
)
MIN_CHARS = 24  # shorter docstrings are labels such as "Return a copy."
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


class DocsCorpus:
    """Standard library docstrings and reference topics.

    Args:
        spec: ``val_fraction``, the share of modules held out.
        root: folder of the standard library; the running Python's by default.
    """

    def __init__(self, spec: Mapping[str, Any], *, root: Path | None = None) -> None:
        self.val_fraction = read_fraction(spec)
        self.root = root or Path(sysconfig.get_path("stdlib"))

    def fingerprint(self) -> dict[str, Any]:
        """The corpus is the same for one Python version."""
        return {"python": platform.python_version(), "implementation": platform.python_implementation()}

    def documents(self) -> Iterator[Document]:
        """Modules in path order, then topics in name order.

        A docstring seen before is left out, and so is every paragraph of a training document that also stands in a
        held-out one: the library's modules repeat each other.

        Raises:
            UserError: this Python has no readable standard library sources.
        """
        seen: set[str] = set()
        found: list[Document] = []
        for name, texts in self._modules():
            kept = []
            for text in map(clean, texts):
                key = _folded(text)
                if len(text) >= MIN_CHARS and key not in seen:
                    seen.add(key)
                    kept.append(text)
            if kept:
                found.append(Document(name, "\n\n".join(kept), uniform_hash(name) < self.val_fraction))
        if not found:
            raise UserError(f"data=docs found no docstrings under {self.root}; use data=files data.path=FILE instead")
        heldout = {_folded(part) for document in found if document.held_out for part in document.text.split("\n\n")}
        for document in found:
            text = document.text if document.held_out else _without(document.text, heldout)
            if text:
                yield Document(document.id, text, document.held_out)

    def _modules(self) -> Iterator[tuple[str, list[str]]]:
        for path in _source_files(self.root):
            parts = list(path.relative_to(self.root).with_suffix("").parts)
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            yield name, docstrings(path)
        topics = self.root / "pydoc_data" / "topics.py"
        for name, text in sorted(reference_topics(topics).items()):
            yield f"topics.{name}", [text]


def _folded(text: str) -> str:
    return " ".join(text.split()).lower()


def _without(text: str, unwanted: set[str]) -> str:
    """The text without those of its paragraphs whose folded form is unwanted; very short ones stay (headings, "Example:")."""
    parts = text.split("\n\n")
    return "\n\n".join(part for part in parts if len(part) < MIN_CHARS or _folded(part) not in unwanted)


def _source_files(root: Path) -> Iterator[Path]:
    for folder, names, files in os.walk(root):
        # Pruning here keeps the walk out of site-packages; sorting makes the order the same on every file system.
        names[:] = sorted(name for name in names if name not in SKIPPED_FOLDERS)
        yield from (Path(folder, file) for file in sorted(files) if file.endswith(".py"))


def docstrings(path: Path) -> list[str]:
    """Docstrings of a source file in the order in which they stand; empty for a file that does not parse."""
    try:
        source = path.read_bytes()
        tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):
        return []
    found: list[str] = []
    _collect(tree, found)
    return found


def _collect(node: ast.AST, found: list[str]) -> None:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node, clean=True)
        if text:
            found.append(text)
    # Definitions stand in statement lists; walking those alone is several times faster than walking every expression.
    for field in ("body", "orelse", "handlers", "finalbody"):
        for child in getattr(node, field, ()):
            if isinstance(child, ast.stmt | ast.ExceptHandler):
                _collect(child, found)


def reference_topics(path: Path) -> dict[str, str]:
    """The ``topics`` dictionary of a ``pydoc_data/topics.py``, read as a literal; empty where the file is missing."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "topics" for t in node.targets):
            return ast.literal_eval(node.value)
    return {}


def clean(text: str) -> str:
    """Spaces for tabs, no control characters, no trailing blanks, at most one empty line in a row."""
    text = _CONTROL.sub("", text.expandtabs(4)).encode("utf-8", "ignore").decode("utf-8")
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")
