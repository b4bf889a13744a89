"""Everything that is read out of one report, by rules or by a model: one form, one check of every span.

The form is versioned, holds spans and words of our own lists, and no text of the report but through its spans.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from shards.batch import LabelValue
from shards.errors import DataError
from shards.reports.anatomy import READ, AnatomyText, join
from shards.reports.distil import ENTITIES, Context, context
from shards.reports.distil import sentence as distilled_sentence
from shards.reports.entities import Entity, by_sentence, placed
from shards.reports.labels import ONTOLOGIES, all_labels, label_names
from shards.reports.language import Language, Span, detect, languages_of, within
from shards.reports.lexicon.anatomy import ANATOMIES, ELSEWHERE
from shards.reports.lexicon.terms import cut, lower
from shards.reports.reading import Reading, read, reading
from shards.reports.sections import Section, sections
from shards.reports.sentences import sentences
from shards.reports.structured import Observation, StructuredReport, Validated, checked, structured_by_rules

SCHEMA_VERSION: Literal[2] = 2


class Extraction(BaseModel):
    """What a report says. Spans are [start, end) in characters of the de-identified document.

    `sentences` are those of all sections; an entity's `sentence` counts in them. `anatomy` holds the 36 anatomies that
    findings or impression speak of, `elsewhere` the places outside of them. `labels`: ontology -> label -> value.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1, 2] = SCHEMA_VERSION  # 1: every disease that goes unsaid has an item
    language: Language
    sections: tuple[Section, ...] = ()
    sentences: tuple[Span, ...] = ()
    entities: tuple[Entity, ...] = ()
    labels: dict[str, dict[str, LabelValue]] = Field(default_factory=dict)
    anatomy: tuple[AnatomyText, ...] = ()
    elsewhere: tuple[AnatomyText, ...] = ()
    context: Context = Field(default_factory=Context)
    structured: Validated | None = None


def by_rules(
    document: str, language: Language | None = None, *, study: str = "", ontologies: Iterable[str] = tuple(ONTOLOGIES)
) -> Extraction:
    """The extraction of a document that was cleaned and de-identified, without a model.

    `language`: None to detect it; `study` is the id that the structured report carries; `ontologies`: which labels.
    """
    outline = outlined(document, detect(document) if language is None else language)
    lowered = lower(document)
    readings = [
        read(lowered[start:end], spoken, outline.places, section.name in READ)
        for (start, end), spoken, section in zip(outline.spans, outline.languages, outline.sited, strict=True)
    ]
    found = [
        placed(one, number, start)
        for number, ((start, _), its) in enumerate(zip(outline.spans, readings, strict=True))
        for one in its.entities
    ]
    return _joined(outline, readings, found, study=study, ontologies=ontologies)


def with_entities(
    document: str, outline: Outline, found: Sequence[Entity], anatomy: Sequence[AnatomyText], *, study: str = ""
) -> Extraction:
    """All that follows from entities and the 36 anatomies that a model found."""
    lowered = lower(document)
    readings = [
        reading(cut(lowered[start:end]), inside, outline.places, section.name in READ)
        for (start, end), inside, section in zip(
            outline.spans, by_sentence(found, outline.spans), outline.sited, strict=True
        )
    ]
    return _joined(outline, readings, found, anatomy=anatomy, study=study)


class Outline(NamedTuple):
    """Sections and sentences of a document; of each sentence its language and the section it stands in.

    `places`: the language in which words of place are looked for, both where sentences are in more than one.
    """

    language: Language
    sections: Sequence[Section]
    spans: Sequence[Span]
    languages: Sequence[Language]
    sited: Sequence[Section]
    places: Language


def outlined(document: str, language: Language) -> Outline:
    """The outline of a document in `language`."""
    parts = sections(document)
    spans: list[Span] = []
    sited: list[Section] = []
    for part in parts:
        inside = sentences(document, *part.body, language)
        spans += inside
        sited += [part] * len(inside)
    languages = languages_of(document, spans, language)
    places = "unknown" if len(set(languages)) > 1 else language
    return Outline(language, parts, spans, languages, sited, places)


def _joined(
    outline: Outline,
    readings: Sequence[Reading],
    found: Sequence[Entity],
    *,
    anatomy: Sequence[AnatomyText] | None = None,
    study: str = "",
    ontologies: Iterable[str] = tuple(ONTOLOGIES),
) -> Extraction:
    """The report as its sentences say it. `anatomy`: None for the rules' own."""
    surveyed = join(outline.sited, outline.spans, [one.statement for one in readings])
    read_here = [section.name in READ for section in outline.sited]
    counted = [one for one in found if read_here[one.sentence]]
    places = surveyed.anatomies if anatomy is None else tuple(anatomy)
    lung = [span for one in places if one.anatomy == "lung" for span in one.findings + one.impression]
    # Not validated again: all of it was made here, and `verify` reads it against the document.
    return Extraction.model_construct(
        schema_version=SCHEMA_VERSION,
        language=outline.language,
        sections=tuple(outline.sections),
        sentences=tuple(outline.spans),
        entities=tuple(found),
        labels=all_labels(found, outline.sections, ontologies),
        anatomy=places,
        elsewhere=surveyed.elsewhere,
        context=context(outline.spans, [one.mentions for one in readings], outline.language),
        structured=structured_by_rules(study, counted, lung),
    )


def verify(found: Extraction, document: str) -> Extraction:
    """The extraction if it can be true of the document, with verdicts that observations do not bear out made uncertain.

    Every span lies in the document and holds a word; sections cover it in order; entities lie in their sentence;
    anatomies are of the list, each once, with spans in a section of their kind; distilled sentences are the templates'.
    Raises DataError that names place and fault and no character of the document.
    """
    length = len(document)
    previous = 0
    for number, part in enumerate(found.sections):
        if part.start != previous or not part.start < part.end <= length:
            raise DataError(f"sections.{number}: [{part.start}, {part.end}) does not follow the section before")
        if part.heading is not None and not part.start <= part.heading[0] <= part.heading[1] <= part.end:
            raise DataError(f"sections.{number}: its heading lies outside of it")
        previous = part.end
    if found.sections and previous != length:
        raise DataError(f"sections: they end at {previous} of {length} characters")
    _words_in(document, {
        "sentences": found.sentences,
        "entities": [(one.start, one.end) for one in found.entities],
        "entities.descriptor": [one.descriptor for one in found.entities if one.descriptor],
        "anatomy": _spans_of(found.anatomy),
        "elsewhere": _spans_of(found.elsewhere),
        "context.boilerplate": found.context.boilerplate,
        "context.descriptors": found.context.descriptors,
        "context.distilled": [span for one in found.context.distilled for span in one.spans],
    })  # fmt: skip
    for number, entity in enumerate(found.entities):
        if not 0 <= entity.sentence < len(found.sentences):
            raise DataError(f"entities.{number}: sentence {entity.sentence} of {len(found.sentences)}")
        start, end = found.sentences[entity.sentence]
        if not start <= entity.start < entity.end <= end:
            raise DataError(f"entities.{number}: it lies outside of its sentence {entity.sentence}")
    _verify_labels(found.labels)
    _verify_places(found)
    for number, one in enumerate(found.context.distilled):
        if one.entity not in ENTITIES:
            raise DataError(f"context.distilled.{number}: its entity is none of the {len(ENTITIES)}")
        if one.sentence != distilled_sentence(one.entity, one.status, found.language):
            raise DataError(f"context.distilled.{number}: its sentence is not the one of its entity and status")
    if found.structured is None:
        return found
    structured = checked(found.structured, document)
    return found if structured is found.structured else found.model_copy(update={"structured": structured})


def _spans_of(places: Iterable[AnatomyText]) -> list[Span]:
    return [span for one in places for span in one.findings + one.impression]


def _words_in(document: str, spans: Mapping[str, Sequence[Span]]) -> None:
    """Every span lies in the document and holds a word; `spans` by what they are. Many of them are the same."""
    length = len(document)
    for start, end in set(chain.from_iterable(spans.values())):
        inside = 0 <= start < end <= length
        if not inside or not (document[start].isalnum() or any(map(str.isalnum, document[start:end]))):
            place = next(place for place, its in spans.items() if (start, end) in its)
            fault = "holds no word" if inside else f"lies outside of the report of {length} characters"
            raise DataError(f"{place}: span [{start}, {end}) {fault}")


def _verify_labels(told: Mapping[str, Mapping[str, int]]) -> None:
    for ontology, values in told.items():
        if ontology not in ONTOLOGIES:
            raise DataError(f"labels: an ontology is unknown; there are {', '.join(ONTOLOGIES)}")
        if not set(values) <= set(label_names(ontology)):
            raise DataError(f"labels.{ontology}: a label is unknown")


def _verify_places(found: Extraction) -> None:
    bodies = {
        name: [(part.start, part.end) for part in found.sections if part.name == name]
        for name in ("findings", "impression")
    }
    for member, known, places in (
        ("anatomy", ANATOMIES, found.anatomy), ("elsewhere", ELSEWHERE, found.elsewhere),
    ):  # fmt: skip
        seen = set()
        for number, one in enumerate(places):
            if one.anatomy not in known or one.anatomy in seen:
                raise DataError(f"{member}.{number}: its name is unknown or stands twice")
            seen.add(one.anatomy)
            if not one.findings and not one.impression:
                raise DataError(f"{member}.{number}: it has no text")
            for name, spans in (("findings", one.findings), ("impression", one.impression)):
                for start, end in spans:
                    if not within((start, end), bodies[name]):
                        raise DataError(f"{member}.{number}.{name}: span [{start}, {end}) lies in no such section")


def record_members(found: Extraction, document: str, ontology: str = "chexpert14") -> dict[str, Any]:
    """What of an extraction a `StudyRecord` holds, as data, from report and anatomy to ECAMP's sentences and spans.

    Sections of one name are joined by a line break, and all spans moved to the `source_text` of them. A letterhead,
    which says who and not what, is left out. An anatomy's text
    is its impression, then its findings. Text stands in the result: no log may take it.
    """
    report, moves = _report([part for part in found.sections if part.name != "header"], document)
    findings, impression = (
        {one.anatomy: _passage(document, spans) for one in found.anatomy if (spans := getattr(one, name))}
        for name in ("findings", "impression")
    )
    return {
        "language": found.language,
        "report": report,
        "anatomy": {
            one.anatomy: " ".join(text[one.anatomy] for text in (impression, findings) if one.anatomy in text)
            for one in found.anatomy
        },
        "anatomy_status": {one.anatomy: one.status for one in found.anatomy},
        "anatomy_findings": findings,
        "anatomy_impression": impression,
        "entities": [
            {
                "concept": one.concept, "text": document[one.start : one.end], "status": one.status,
                "laterality": one.laterality, "position": one.position, "span": moves.span((one.start, one.end)),
            }
            for one in found.entities
        ],
        "distilled": [
            {
                "entity": one.entity, "status": one.status, "sentence": one.sentence,
                "spans": [moves.span(span) for span in one.spans],
            }
            for one in found.context.distilled
        ],
        "boilerplate": [moves.span(span) for span in found.context.boilerplate],
        "descriptors": [moves.span(span) for span in found.context.descriptors],
        "labels": found.labels.get(ontology, {}),
        "structured_report": None if found.structured is None else _moved(found.structured, moves),
    }  # fmt: skip


class _Moves:
    """Where pieces of the document stand in the source text: (start and end there, start here) of each."""

    def __init__(self) -> None:
        self._pieces: list[tuple[int, int, int]] = []

    def add(self, piece: Span, place: int) -> None:
        self._pieces.append((*piece, place))

    def span(self, span: Span) -> list[int] | None:
        """The span as JSON holds it; None where the source text leaves it out, as it does a letterhead."""
        for start, end, place in self._pieces:
            if start <= span[0] and span[1] <= end:
                return [span[0] - start + place, span[1] - start + place]
        return None


def _report(parts: Iterable[Section], document: str) -> tuple[dict[str, str], _Moves]:
    """Text by section, and how spans of the document move to the source text of it."""
    kept: dict[str, list[Span]] = {}
    for part in parts:
        start, end = part.body
        text = document[start:end]
        start, end = start + len(text) - len(text.lstrip()), end - len(text) + len(text.rstrip())
        if start < end:
            kept.setdefault(part.name, []).append((start, end))
    moves = _Moves()
    place = 0
    for name in sorted(kept):
        for start, end in kept[name]:
            moves.add((start, end), place)
            place += end - start + 1
    return {name: "\n".join(document[start:end] for start, end in spans) for name, spans in kept.items()}, moves


def _passage(document: str, spans: Iterable[Span]) -> str:
    """Clauses out of their sentences, each ending like one, or it would run into the next."""
    texts = (document[start:end] for start, end in spans)
    return " ".join(text + "." if text[-1].isalnum() else text for text in texts)


def _moved(report: StructuredReport, moves: _Moves) -> dict[str, Any]:
    """The report as data, its spans moved from the document to the source text."""

    def observed(one: Observation) -> dict[str, Any]:
        return vars(one) | {"span": None if one.span is None else moves.span(one.span)}

    items = [vars(item) | {"observations": [observed(one) for one in item.observations]} for item in report.items]
    return {"study": report.study, "items": items, "unsaid": report.unsaid}
