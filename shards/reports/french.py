"""What is empty goes from French reports, and their sentences are told (bone_xray_french.md 6.4): exact, reversible.

Nothing is rewritten: `removals` names every character that goes and the rule it goes by, `sentences` gives spans. The
tokenizer puts its separator between sentences (`Tokenizer.encode_parts`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from shards.reports.language import Span
from shards.reports.sections import sections as sections_of

Rule = Literal["empty_blocks", "empty_conclusions"]

# Fields of a template that nobody filled in: "[...]", "[ ]", "[___]".
_EMPTY = r"\[[\s.…·_*\-–—]*\]"
_EMPTY_BLOCK = re.compile(rf"^{_EMPTY} ?| ?{_EMPTY}", re.MULTILINE)  # with the blank that would be one too many
# Boxes of a list, one of them ticked: what is beside an empty one is denied, so that it must stay.
_TICKED = re.compile(r"\[ ?[xX✓✔] ?\]")
# A stop before a digit or a stroke is part of a decimal or a date. Marks that close stay with their sentence.
_END = re.compile(r"[.!]+(?![\d/])[)\]»”\"']*|\n{2,}")


class Removal(NamedTuple):
    """Characters [start, end) that go, and why."""

    rule: Rule
    start: int
    end: int


def cleaned(text: str) -> tuple[str, tuple[Removal, ...]]:
    """The report less its `removals`, and them, counted in the text as it came."""
    found = removals(text)
    pieces, position = [], 0
    for one in found:
        pieces.append(text[position : one.start])
        position = one.end
    return "".join([*pieces, text[position:]]), found


def removals(text: str) -> tuple[Removal, ...]:
    """Empty blocks, and conclusions of which nothing but the heading is there, in order and without overlap."""
    blocks = [] if _TICKED.search(text) else [match.span() for match in _EMPTY_BLOCK.finditer(text)]
    blank = text
    for start, end in blocks:
        blank = blank[:start] + " " * (end - start) + blank[end:]
    conclusions = [
        (part.start, part.end)
        for part in sections_of(blank)
        if part.name == "impression" and part.heading and not any(map(str.isalnum, blank[slice(*part.body)]))
    ]
    found = [Removal("empty_conclusions", *span) for span in conclusions]
    found += [
        Removal("empty_blocks", start, end)
        for start, end in blocks
        if not any(first <= start and end <= last for first, last in conclusions)
    ]
    return tuple(sorted(found, key=lambda one: one.start))


def sentences(text: str) -> tuple[Span, ...]:
    """Spans of the sentences, ended by `.`, `!` or an empty line; between them lies white space only.

    A question mark ends none. A piece without a letter or digit belongs to the sentence before it.
    """
    spans: list[Span] = []
    for start, end in _pieces(text):
        if spans and not any(map(str.isalnum, text[start:end])):
            spans[-1] = (spans[-1][0], end)
        else:
            spans.append((start, end))
    return tuple(spans)


def _pieces(text: str) -> Iterator[Span]:
    """What lies between stops, without white space around it."""
    position = 0
    for end in (*(match.end() for match in _END.finditer(text)), len(text)):
        piece = text[position:end]
        if stripped := piece.strip():
            start = position + piece.index(stripped)
            yield start, start + len(stripped)
        position = end
