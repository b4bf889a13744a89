"""ECAMP's side of a report: one sentence a word of its list, boilerplate, and the words that describe a finding.

Distilled sentences are rendered from entities, not written by a model, so that none says what the report does not
(arXiv 2312.13316; masking and weights are made of these spans later).
"""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from shards.batch import Distilled
from shards.reports.anatomy import Survey
from shards.reports.entities import Entity
from shards.reports.language import Language, Span, within
from shards.reports.lexicon.anatomy import Words, fold

DESCRIPTOR_WORDS = 2  # at most, right before an entity

Status = Literal["present", "possible", "absent"]
_FIRST: tuple[Status, ...] = ("present", "possible", "absent")  # what counts where mentions differ


@dataclass(frozen=True, kw_only=True)
class Context:
    """All of a report that ECAMP's objective reads besides its words; spans in the document's order, none overlap."""

    distilled: tuple[Distilled, ...] = ()
    boilerplate: tuple[Span, ...] = ()
    descriptors: tuple[Span, ...] = ()


@dataclass(frozen=True)
class _Word:
    """How to say a word of the list: with its article, by language."""

    en: str
    fr: str
    structure: bool


@cache
def _tables() -> tuple[dict[str, _Word], dict[str, str], dict[str, str]]:
    """(word of the list -> how to say it, folded form -> word, concept -> word)."""
    with open(Path(__file__).with_name("lexicon") / "distil.toml", "rb") as file:
        table = tomllib.load(file)
    words = {
        name: _Word(en=row["en"], fr=row["fr"], structure=row.get("structure", False)) for name, row in table.items()
    }
    forms = {form.strip(): name for name, row in table.items() for form in row["words"].split(",")}
    concepts = {concept: name for name, row in table.items() for concept in row["concepts"]}
    return words, forms, concepts


# The list of ECAMP, in its order; single English words, whatever the report's language.
ENTITIES = tuple(_tables()[0])

_BOILERPLATE = {
    "en": re.compile(r"\bthere (?:is|are) no(?: evidence of)?\b"),
    "fr": re.compile(
        r"\b(?:il n'y a pas|on ne note pas|absence)"
        r"(?: (?:d'argument (?:pour\b|en faveur (?:d[eu]\b|d'))|(?:de signe |d'image )?(?:d[eu]\b|d')))?"
    ),
}


@cache
def sentence(entity: str, status: Status, language: Language) -> str:
    """The distilled sentence: one of three forms, of structures "normal" and "abnormal" instead of "no" and "is"."""
    word = _tables()[0][entity]
    if language == "fr":
        if word.structure:
            state = {"present": "anormal", "possible": "peut-être anormal", "absent": "normal"}[status]
            return f"{word.fr[0].upper()}{word.fr[1:]} : aspect {state}."
        noun = word.fr.split(" ", 1)[1]
        of = "d'" if fold(noun)[0] in "aeiouœ" else "de "
        return {
            "present": f"Présence d'{word.fr}.",
            "possible": f"Possible présence d'{word.fr}.",
            "absent": f"Il n'y a pas {of}{noun}.",
        }[status]
    if word.structure:
        state = {"present": "is abnormal", "possible": "may be abnormal", "absent": "is normal"}[status]
        noun = word.en[0].upper() + word.en[1:]
        return f"{noun} {state.replace('is', 'are', 1) if entity == 'hilar' else state}."
    bare = word.en.split(" ", 1)[1] if word.en.startswith(("a ", "an ")) else word.en
    return {
        "present": f"There is {word.en}.",
        "possible": f"There may be {word.en}.",
        "absent": f"There is no {bare}.",
    }[status]


def boilerplate(text: str, language: Language) -> tuple[Span, ...]:
    """Words that every report uses alike: "there is no", "there is no evidence of" and their French like."""
    return _boilerplate(fold(text), language)


def _boilerplate(folded: str, language: Language) -> tuple[Span, ...]:
    patterns = _BOILERPLATE.values() if language == "unknown" else (_BOILERPLATE[language],)
    return tuple(sorted(match.span() for pattern in patterns for match in pattern.finditer(folded)))


def context(
    document: str,
    found: Survey,
    entities: Sequence[Entity],
    language: Language,
    words: Words | None = None,
    *,
    mixed: bool = False,
) -> Context:
    """Distilled sentences, boilerplate and descriptors of findings and impression, which `found` has read.

    Sentences are in `language`; boilerplate of both languages is looked for where the document is `mixed`.

    An entity's status is its own; a word of the list outside of all entities takes that of its part of the sentence,
    and none where that does not say. Where mentions differ, a present one decides, then a possible one.
    """
    words = words or Words(document)
    told, mentions = _mentions(words, found, entities)
    distilled = []
    for name in ENTITIES:
        if name in told:
            status = next(one for one in _FIRST if told[name].get(one))
            spans = tuple(sorted({span for places in told[name].values() for span in places}))
            distilled.append(
                Distilled(entity=name, status=status, sentence=sentence(name, status, language), spans=spans)
            )
    parts = [(start, end) for start, end, _ in found.parts]
    common = _boilerplate(words.folded, "unknown" if mixed else language)
    read = tuple(span for span in common if within(span, parts))
    return Context(distilled=tuple(distilled), boilerplate=read, descriptors=_descriptors(words, found, mentions))


_Told = dict[str, dict[str, list[Span]]]


def _mentions(words: Words, found: Survey, entities: Sequence[Entity]) -> tuple[_Told, list[Span]]:
    """(word of the list -> status -> spans, all spans in order)."""
    _, forms, concepts = _tables()
    parts = found.parts
    first_of_part = [part[0] for part in parts]
    told: _Told = {}
    mentions: set[Span] = set()
    covered: dict[Span, Entity] = {}
    for entity in entities:
        place = bisect_left(first_of_part, entity.start + 1) - 1
        if place < 0 or entity.start >= parts[place][1]:
            continue  # in a section that is not read
        span = (entity.start, entity.end)
        covered[span] = entity
        mentions.add(span)
        name = concepts.get(entity.concept)
        if name is not None:
            told.setdefault(name, {}).setdefault(entity.status, []).append(span)
    spans = sorted(covered)
    starts = [start for start, _ in spans]
    named = [(place, name) for place, word in enumerate(words.words) if (name := forms.get(word)) is not None]
    for number, name in named:
        start, end = words.starts[number], words.ends[number]
        before = bisect_left(starts, start + 1) - 1
        if before >= 0 and end <= spans[before][1]:
            entity = covered[spans[before]]
            if concepts.get(entity.concept) != name and not _tables()[0][name].structure:
                told.setdefault(name, {}).setdefault(entity.status, []).append((start, end))
            continue
        place = bisect_left(first_of_part, start + 1) - 1
        verdict = parts[place][2] if place >= 0 and start < parts[place][1] else None
        if verdict is not None:
            status = "present" if verdict == "abnormal" else "absent"
            told.setdefault(name, {}).setdefault(status, []).append((start, end))
            mentions.add((start, end))
    return told, sorted(mentions)


def _descriptors(words: Words, found: Survey, mentions: Sequence[Span]) -> tuple[Span, ...]:
    """The up to DESCRIPTOR_WORDS words right before each mention, none of another mention or part of a sentence."""
    first_of_part = [part[0] for part in found.parts]
    spans: list[Span] = []
    reached = 0
    for start, end in mentions:
        lowest = found.parts[bisect_left(first_of_part, start + 1) - 1][0]
        place = bisect_left(words.starts, start)
        first = place
        while first > 0 and place - first < DESCRIPTOR_WORDS and words.starts[first - 1] >= max(lowest, reached):
            first -= 1
        if first < place:
            spans.append((words.starts[first], words.ends[place - 1]))
        reached = max(reached, end)
    return tuple(spans)
