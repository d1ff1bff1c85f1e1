"""Markdown of a table's file as HTML, with every number linked to the record it comes from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

PAPER_ANCHOR = "paper"
_NUMBER = re.compile(r"[≈+\-−]*\d")  # what begins as one; "Mamba-2" does not
_LONGEST_NUMBER = 25


def render(text: str, links: Mapping[str, Any], fallback: str, *, drop_title: bool = True) -> str:
    """HTML of one ``table.md`` or ``verdicts.md``.

    Args:
        text: Markdown; raw HTML in it is shown, not obeyed.
        links: ``rows``, anchors by number of the row, taken where a table has as many rows; ``names``, anchors by the first
            column's text.
        fallback: anchor of numbers whose row is not known.
        drop_title: leave out the first heading, because the page has it.
    """
    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    tokens = parser.parse(text)
    kept: list[Token] = []
    heading = 0  # tokens of the first heading that are still to be dropped
    for number, token in enumerate(tokens):
        if drop_title and token.type == "heading_open" and token.tag == "h1" and number == 0:
            heading = 3
        if heading:
            heading -= 1
            continue
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, int(token.tag[1]) + 2)}"
        kept.append(token)
    for start, stop in _tables(kept):
        kept[start].attrSet("class", "sortable")
        _link_table(kept[start:stop], links, fallback)
    return parser.renderer.render(kept, parser.options, {})


def _tables(tokens: Sequence[Token]) -> list[tuple[int, int]]:
    starts = [number for number, token in enumerate(tokens) if token.type == "table_open"]
    stops = [number + 1 for number, token in enumerate(tokens) if token.type == "table_close"]
    return list(zip(starts, stops, strict=True))


def _link_table(tokens: Sequence[Token], links: Mapping[str, Any], fallback: str) -> None:
    heads = [tokens[n + 1].content for n, token in enumerate(tokens) if token.type == "th_open"]
    rows = [n for n, token in enumerate(tokens) if token.type == "tr_open"][1:]
    for number, start in enumerate(rows):
        cells = _cells(tokens, start)
        known = links["rows"][number] if len(links["rows"]) == len(rows) else None
        anchor = known or (links["names"].get(cells[0].content) if cells else None) or fallback
        for column, cell in enumerate(cells):
            if column and len(cell.content) <= _LONGEST_NUMBER and _NUMBER.match(cell.content):
                _link(cell, PAPER_ANCHOR if "paper" in heads[column].lower() else anchor)


def _cells(tokens: Sequence[Token], start: int) -> list[Token]:
    found = []
    for number in range(start, len(tokens)):
        if tokens[number].type == "tr_close":
            break
        if tokens[number].type == "td_open":
            found.append(tokens[number + 1])
    return found


def _link(cell: Token, anchor: str) -> None:
    opening = Token("link_open", "a", 1, attrs={"href": f"#{anchor}", "class": "source"})
    cell.children = [opening, *(cell.children or ()), Token("link_close", "a", -1)]
