"""Tagged text in pieces, so that identifiers can be drawn anew, and back again as a document with tags."""

from __future__ import annotations

from functools import cache

from ci.bench.reports_deid import Document, Tag
from shards.reports.identity.detector import Detector

Pieces = list[tuple[str, str]]  # (text, label): "" for what stays, UNKNOWN for what nobody tagged
UNKNOWN = "?"


@cache
def rules() -> Detector:
    """The rules alone, without what is learned."""
    return Detector(config=Detector.Config(learned=None))


def pieces_of(document: Document) -> Pieces:
    """A tagged document as pieces. Where rules find an identifier that nobody tagged, the label is UNKNOWN."""
    labels = [""] * len(document.text)
    for one in rules().find(document.text, "fr"):
        labels[one.start : one.end] = [UNKNOWN] * (one.end - one.start)
    pieces: Pieces = []
    position = 0
    for tag in (*document.tags, Tag(start=len(document.text), end=len(document.text), label="")):
        start = position
        for place in range(position + 1, tag.start + 1):
            if place == tag.start or labels[place] != labels[start]:
                pieces.append((document.text[start:place], labels[start]))
                start = place
        if tag.label:
            pieces.append((document.text[tag.start : tag.end], tag.label))
        position = tag.end
    return pieces


def pieces_of_prose(text: str) -> Pieces:
    """Published prose: years, dates and places in it are true ones, so they are UNKNOWN; names are no persons."""
    pieces: Pieces = []
    position = 0
    for one in rules().find(text, "fr"):
        if one.kind not in ("person_name", "patient_name"):
            pieces += [(text[position : one.start], ""), (text[one.start : one.end], UNKNOWN)]
            position = one.end
    return [*pieces, (text[position:], "")]


def document_of(pieces: Pieces) -> Document:
    """The text of pieces with its tags, UNKNOWN ones among them."""
    tags, length = [], 0
    for text, label in pieces:
        if label and text:
            tags.append(Tag(start=length, end=length + len(text), label=label))
        length += len(text)
    return Document(text="".join(text for text, _ in pieces), tags=tuple(tags))
