"""What the notebooks need beside tables and figures: where the records are, and outputs small enough to commit."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from numbers import Integral
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from PIL import Image
from tabulate import tabulate

from flowhn.errors import UserError

_DPI = 110
_COLORS = 64  # of a picture's palette; plots have few


class Picture:
    """A figure as a small PNG; notebooks show it."""

    def __init__(self, figure: Figure, *, dpi: int = _DPI) -> None:
        raw = io.BytesIO()
        figure.savefig(raw, format="png", dpi=dpi)
        small = io.BytesIO()
        Image.open(raw).convert("RGB").quantize(_COLORS, dither=Image.Dither.NONE).save(
            small, format="png", optimize=True
        )
        self.png = small.getvalue()

    def _repr_png_(self) -> bytes:
        return self.png

    def __repr__(self) -> str:
        return "a figure"


class Text:
    """Markdown; notebooks and GitHub show it."""

    def __init__(self, text: str) -> None:
        self.text = text

    def _repr_markdown_(self) -> str:
        return self.text

    def __repr__(self) -> str:
        return self.text


def table(frame: pd.DataFrame, form: str | Mapping[str, str] = ".4g") -> Text:
    """A frame as a Markdown table: its texts as they are, a dash where a number is missing.

    Args:
        frame: what to show.
        form: of its floats, one for all or by column (``.4g`` for the others); whole numbers get thousands separators.
    """
    forms = dict.fromkeys(frame.columns, form) if isinstance(form, str) else form
    columns = {name: [_cell(value, forms.get(name, ".4g")) for value in frame[name]] for name in frame.columns}
    numeric = [
        pd.api.types.is_numeric_dtype(frame[name]) and not pd.api.types.is_bool_dtype(frame[name]) for name in frame
    ]
    aligned = ["right" if number else "left" for number in numeric]
    return Text(tabulate(columns, headers="keys", tablefmt="pipe", disable_numparse=True, colalign=aligned))


def _cell(value: object, form: str) -> str:
    if isinstance(value, str | bool):
        return str(value)
    if value is None or pd.isna(value):
        return "–"
    whole = isinstance(value, Integral)
    return format(int(value), ",") if whole else format(value, form)


def repository(start: Path | None = None) -> Path:
    """The checkout that a notebook stands in.

    Raises:
        UserError: there is no ``experiments`` folder here or above.
    """
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "experiments").is_dir() and (folder / "configs").is_dir():
            return folder
    raise UserError(f"{start} is not inside a flowhn checkout: start the notebook in its folder notebooks/")


def settings(artefact: str, *, having: str = "records") -> list[Path]:
    """The committed settings of an artefact that have a folder of this name, sorted."""
    return sorted(
        path.parent for path in (repository() / "experiments" / artefact).glob(f"*/{having}") if any(path.iterdir())
    )


def not_yet(artefacts: Iterable[str]) -> Text:
    """One line for artefacts without committed records."""
    names = list(artefacts)
    commands = ", ".join(f"`./reproduce.sh {name} --keep`" for name in names)
    return Text(f"No committed records yet: {', '.join(names)} ({commands} makes them)." if names else "")
