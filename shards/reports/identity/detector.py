"""All layers over one document, and the union of what they found. Recall comes before precision."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import shards.reports.identity.known_patient as known_patient
import shards.reports.identity.mentions as mentions
import shards.reports.identity.names_by_cue as names_by_cue
import shards.reports.identity.names_by_shape as names_by_shape
import shards.reports.identity.patterns as patterns
import shards.reports.identity.places as places
import shards.reports.identity.tagger as tagger
from shards.reports.identity.known_patient import KnownPatient
from shards.reports.identity.plugin import Recogniser
from shards.reports.identity.view import Identifier, View, view_of

_CHUNK = 6_000  # characters; few reports are as long
_MARGIN = 200  # characters that a part reads beyond its bounds: what a bound cuts is seen whole, longer than a name
_SENTENCE_END = re.compile(r"[^\W\d_]{4}[.!?] ")


@dataclass(frozen=True, kw_only=True)
class Detector:
    """Finds identifiers; holds no state, so one instance serves all threads and documents.

    `recognisers` are optional models that may add spans, never remove any.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`learned` may add to what rules found, and take from it; None is rules alone. `recognisers` run last."""

        learned: Callable[[View, str], None] | None = field(default=tagger.find, compare=False)
        recognisers: tuple[Recogniser, ...] = field(default=(), compare=False)

    config: Config = field(default_factory=Config)

    def find(self, text: str, language: str = "unknown", patient: KnownPatient | None = None) -> tuple[Identifier, ...]:
        """Identifiers in the order of the text, without overlap.

        Long documents are read part by part, since the rules' cost grows with the square of length; names told in one
        part are found in all.
        """
        parts = [
            (begin, start, end, view_of(text[begin:stop]))
            for start, end in _parts(text)
            for begin, stop in (_with_margin(text, start, end),)
        ]
        told: set[str] = set()
        for *_, view in parts:
            if patient is not None:
                known_patient.find(view, patient)
            patterns.find_addresses_of_mail(view)
            places.find_addresses(view)
            patterns.find(view)
            places.find_addressed(view)
            told |= names_by_cue.find(view)  # before cities: many towns are surnames
        for *_, view in parts:
            places.find_cities(view)
            told |= names_by_shape.find(view)
        found: list[Identifier] = []
        for begin, start, end, view in parts:
            mentions.find(view, told)
            if self.config.learned is not None:
                self.config.learned(view, language)
            of_part = list(view.identifiers)
            for recogniser in self.config.recognisers:
                of_part += recogniser(view.text, language)
            found += (
                [
                    Identifier(start=one.start + begin, end=one.end + begin, kind=one.kind, layer=one.layer)
                    for one in of_part
                    if one.start + begin < end and one.end + begin > start
                ]
                if len(parts) > 1
                else of_part
            )
        return union(found)


def _parts(text: str) -> Iterator[tuple[int, int]]:
    """Bounds of the document's parts, cut behind a line, else a sentence ("Dr. " ends none), else a word."""
    start = 0
    while start < len(text):
        end = min(start + _CHUNK, len(text))
        if end < len(text):
            half = start + _CHUNK // 2
            sentences = [match.end() for match in _SENTENCE_END.finditer(text, half, end)]
            line, space = text.rfind("\n", half, end), text.rfind(" ", half, end)
            end = line + 1 if line > 0 else sentences[-1] if sentences else space + 1 if space > 0 else end
        yield start, end
        start = end


def _with_margin(text: str, start: int, end: int) -> tuple[int, int]:
    """The bounds of a part and some more on both sides, to where a word begins or ends."""
    begin = text.find(" ", max(0, start - _MARGIN), start) + 1 if start else 0
    stop = text.rfind(" ", end, end + _MARGIN) if end < len(text) else len(text)
    return begin or max(0, start - _MARGIN), stop if stop > 0 else min(len(text), end + _MARGIN)


def union(found: Sequence[Identifier]) -> tuple[Identifier, ...]:
    """Overlapping spans become one, with the kind and layer of the longest; touching spans stay apart."""
    merged: list[Identifier] = []
    for one in sorted(found, key=lambda identifier: (identifier.start, -identifier.end)):
        if merged and one.start < merged[-1].end:
            last = merged[-1]
            widest = last if last.end - last.start >= one.end - one.start else one
            end = max(last.end, one.end)
            merged[-1] = Identifier(start=last.start, end=end, kind=widest.kind, layer=widest.layer)
        elif one.start < one.end:
            merged.append(one)
    return tuple(merged)
