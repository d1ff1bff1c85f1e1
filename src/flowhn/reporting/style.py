"""Names, order and looks of the ten models, the same in every table and figure.

Colours are Okabe and Ito's, told apart with the common forms of colour blindness; a family shares a colour and its
members differ in marker and line style, so that a figure also reads in grey.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 7.0  # of a figure, inches: a full text column of two
DPI = 200

# The order of the paper's table 1.
CELLS = ("llama", "mamba1", "mamba2", "jamba", "shm", "hymba", "flowhn_no", "flowhn_ae", "flowhn_fa", "flowhn_fac")


@dataclass(frozen=True)
class Look:
    """How one model is drawn: its name, matplotlib colour, marker and line style."""

    name: str
    color: str
    marker: str
    linestyle: Any


_BLACK, _SKY, _GREEN, _ORANGE, _BLUE, _RED = "#000000", "#56B4E9", "#009E73", "#E69F00", "#0072B2", "#D55E00"
_PURPLE, _GREY, _OLIVE, _WINE, _BROWN = "#CC79A7", "#7F7F7F", "#999933", "#882255", "#8C564B"
_LOOKS = {
    "llama": Look("Llama", _BLACK, "o", "-"),
    "mamba1": Look("Mamba-1", _BLUE, "^", "-"),
    "mamba2": Look("Mamba-2", _BLUE, "v", (0, (4, 1.5))),
    "jamba": Look("Jamba", _GREEN, "s", "-"),
    "shm": Look("SHM", _GREEN, "D", (0, (4, 1.5))),
    "hymba": Look("Hymba", _ORANGE, "P", "-"),
    "flowhn_no": Look("No_Split", _RED, "o", (0, (1, 1))),
    "flowhn_ae": Look("AE_Split", _RED, "^", (0, (4, 1.5))),
    "flowhn_fa": Look("FA_Split", _RED, "s", (0, (4, 1, 1, 1))),
    "flowhn_fac": Look("FAC_Split", _RED, "*", "-"),
    "flowhn_fac_mamba2": Look("FAC_Split, Mamba-2 branch", _PURPLE, "p", "-"),
    # Beyond the paper: variants of FAC_Split, drawn beside No_Split and SHM.
    "fac_keys": Look("FAC, all keys", _BLUE, "^", "-"),
    "fac_rope": Look("FAC, RoPE", _ORANGE, "v", "-"),
    "fac_keys_rope": Look("FAC, all keys, RoPE", _SKY, "o", "-"),
    "fac_window": Look("FAC, four rings", _OLIVE, "<", (0, (4, 1.5))),
    "fac_keys_rope_window": Look("FAC, all keys, RoPE, four rings", _BLACK, ">", (0, (4, 1.5))),
    "fac_keys_rope_cross": Look("FAC, all keys, RoPE, cross fusion", _PURPLE, "P", (0, (4, 1, 1, 1))),
    "fac_thin": Look("FAC, all keys, RoPE, twice the blocks", _WINE, "X", "-"),
    "fac_rope_thin": Look("FAC, RoPE, twice the blocks", _WINE, "D", (0, (4, 1.5))),
    "fac_conv": Look("FAC, conv", _GREEN, "h", "-"),
    "fac_rope_conv": Look("FAC, RoPE, conv", _GREEN, "8", (0, (4, 1.5))),
    "fac_keys_rope_conv": Look("FAC, all keys, RoPE, conv", _GREEN, "p", (0, (1, 1))),
    "fac_sum": Look("FAC, sum fusion", _BROWN, "h", (0, (4, 1.5))),
    "fac_keys_rope_sum": Look("FAC, all keys, RoPE, sum fusion", _BROWN, "d", (0, (4, 1, 1, 1))),
    "fac_rope_conv_sum": Look("FAC, RoPE, conv, sum fusion", _BROWN, "8", (0, (4, 1.5))),
    "fac_keys_rope_conv_sum": Look("FAC, all keys, RoPE, conv, sum fusion", _BROWN, "P", "-"),
    "fac_keys_rope_conv_gated": Look("FAC, all keys, RoPE, conv, gated fusion", _BROWN, "X", (0, (1, 1))),
    "fac_keys_rope_conv_gated_bf16": Look("FAC, all keys, RoPE, conv, gated, bf16 residual", _BLUE, "X", "-"),
    "flowhn_no_conv": Look("No_Split, conv", _RED, "h", (0, (1, 1))),
    "flowhn_no_sum": Look("No_Split, sum fusion", _RED, "p", (0, (4, 1.5))),
    "fac_bf16_residual": Look("FAC, residual in bf16", _GREY, "8", (0, (4, 1.5))),
    "fac_gated": Look("FAC, gated fusion", _SKY, "X", (0, (1, 1))),
    "fac_gated_shared": Look("FAC, gated fusion, a quarter of the tokens in both", _SKY, "P", "-"),
    "fac_keys_rope_conv_gated_bf16_shared": Look(
        "FAC, all keys, RoPE, conv, gated, bf16 residual, 1/16 in both", _OLIVE, "P", (0, (1, 1))
    ),
    "fac_mamba2": Look("FAC, Mamba-2 branch", _PURPLE, "p", (0, (4, 1.5))),
    "fac_mamba2_keys_rope_conv_gated_bf16": Look(
        "FAC, Mamba-2, all keys, RoPE, conv, gated, bf16 residual", _PURPLE, "X", "-"
    ),
    "fac_mamba2_keys_rope_conv_gated_bf16_shared": Look(
        "FAC, Mamba-2, all keys, RoPE, conv, gated, bf16 residual, 3/16 in both", _PURPLE, "P", (0, (1, 1))
    ),
    "fac_ratio": Look("FAC, 0.59 to attention", _GREY, "d", (0, (1, 1))),
}
_OTHER_COLORS = (_PURPLE, _GREY, _SKY, _OLIVE, _WINE)
_OTHER_MARKERS = ("X", "h", "<", ">", "p", "d", "8")
_OTHER_LINES = ("-", (0, (4, 1.5)), (0, (1, 1)))
# Sizes of a grouped bar chart, light to dark.
SIZE_ORDER = ("tiny", "135m", "350m", "1b")
SIZE_COLORS = {"tiny": "#A6A6A6", "135m": _SKY, "350m": _BLUE, "1b": _ORANGE}
SIZE_NAMES = {"tiny": "tiny", "135m": "135M", "350m": "350M", "1b": "1B"}
# The two branches of a FlowHN block.
BRANCH_COLORS = {"attention": _BLUE, "ssm": _ORANGE}
SIZE_MARKERS = {"tiny": "o", "135m": "o", "350m": "s", "1b": "^"}
TASK_NAMES = {
    "arc_easy": "ARC-e", "arc_challenge": "ARC-c", "winogrande": "WinoGrande", "piqa": "PIQA", "hellaswag": "HellaSwag",
    "boolq": "BoolQ", "lambada_openai": "LAMBADA", "lambada_standard": "LAMBADA std", "docs_lastword": "docs last word",
}  # fmt: skip
FONT = {"font.size": 8, "axes.labelsize": 8, "xtick.labelsize": 7.5, "ytick.labelsize": 7.5, "legend.fontsize": 7.5}


def name(cell: str) -> str:
    """The name of a cell: FlowHN's variants carry the paper's strategy names."""
    return look(cell).name


def long_name(cell: str) -> str:
    """The name with FlowHN before its variants, for tables."""
    return f"FlowHN {name(cell)}" if cell.startswith("flowhn_") and cell in _LOOKS else name(cell)


def look(cell: str) -> Look:
    """The look of a cell; cells of one's own get their id as name and a look from its letters, always the same.

    Two ids of one's own may have one look: a figure of several takes :func:`looks`.
    """
    return _LOOKS.get(cell) or _own_look(cell, crc32(cell.encode()) % _N_OWN)


_N_OWN = len(_OTHER_COLORS) * len(_OTHER_MARKERS) * len(_OTHER_LINES)


def _own_look(cell: str, number: int) -> Look:
    color, rest = number % len(_OTHER_COLORS), number // len(_OTHER_COLORS)
    marker, line = rest % len(_OTHER_MARKERS), rest // len(_OTHER_MARKERS)
    return Look(cell, _OTHER_COLORS[color], _OTHER_MARKERS[marker], _OTHER_LINES[line])


def looks(cells: Iterable[str]) -> dict[str, Look]:
    """The look of each cell of one figure, all different (up to a hundred cells of one's own): where two ids of one's own
    would have the same, the later one by name takes the next that is free."""
    found: dict[str, Look] = {}
    taken: set[tuple[Any, ...]] = set()
    for cell in in_order(cells):
        drawn, number = look(cell), crc32(cell.encode()) % _N_OWN
        for step in range(_N_OWN):
            if cell in _LOOKS or drawn_as(drawn) not in taken:
                break
            drawn = _own_look(cell, (number + step + 1) % _N_OWN)
        taken.add(drawn_as(drawn))
        found[cell] = drawn
    return found


def drawn_as(look: Look) -> tuple[Any, ...]:
    """What a reader tells two curves apart by."""
    return look.color, look.marker, look.linestyle


def in_order(cells: Iterable[str]) -> list[str]:
    """Cells in the paper's order, then the others by name."""
    return sorted(set(cells), key=lambda cell: (CELLS.index(cell) if cell in CELLS else len(CELLS), cell))


def sizes_in_order(sizes: Iterable[str]) -> list[str]:
    """Sizes from small to large, then the others by name."""
    return sorted(
        set(sizes), key=lambda size: (SIZE_ORDER.index(size) if size in SIZE_ORDER else len(SIZE_ORDER), size)
    )


def listed(names: Sequence[str]) -> str:
    """``A``, ``A and B``, ``A, B and C``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def below(rows: int) -> tuple[dict[str, Any], float]:
    """A legend of long names below a figure of full width: how to draw it, and the height of its rows (inches)."""
    columns = 1 if rows <= 8 else 2
    words = {
        "loc": "outside lower center",
        "ncols": columns,
        "fontsize": 6.5 if columns == 1 else 6,
        "columnspacing": 1.0,
    }
    return {**words, "frameon": False, "title_fontsize": 7.5}, 0.16 * -(-rows // columns)


def size_name(size: str) -> str:
    """``135M`` for ``135m``."""
    return SIZE_NAMES.get(size, size)


def task_name(task: str) -> str:
    """A short name of a task for a table's head."""
    return TASK_NAMES.get(task, task.removeprefix("flowhn_").replace("_", " "))


def save(figure: Figure, path: Path | None) -> Figure:
    """Write a figure so that a reader finds the old file or the new one; returns it."""
    if path is not None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.stem}.partial{path.suffix}")
        figure.savefig(partial, dpi=DPI)
        partial.replace(path)
    return figure
