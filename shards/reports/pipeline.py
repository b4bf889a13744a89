"""One raw report -> what of it may be stored: cleaned, de-identified, extracted, checked, as members of a StudyRecord.

The order is fixed: nothing but the detector of identifiers sees raw text, a language model and everything that is
written see the de-identified document. A report that fails anywhere gives a cause and its key, never a character.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any
from unicodedata import normalize

from shards.errors import ConfigError, DataError
from shards.ingest import PUBLIC_SECRET, key_fingerprint
from shards.reports import extract, french, llm
from shards.reports.anatomy import READ, AnatomyText
from shards.reports.entities import Entity
from shards.reports.identity import DEIDENTIFIER, Detector, KnownPatient, Surrogates, deidentify
from shards.reports.identity.plugin import Models
from shards.reports.labels import ONTOLOGIES, label_names
from shards.reports.language import Language, Span, detect
from shards.reports.lexicon.anatomy import ANATOMIES
from shards.reports.lexicon.terms import concepts
from shards.reports.prepared import PreparedReport
from shards.reports.sections import SECTION_NAMES
from shards.reports.text import clean

VERSION = 8  # raised with every change that gives other reports: parts of an older run are made anew
RULES = f"rules {VERSION}"
WHOLE = "report"  # name of a text that holds all sections, with or without headings

Cell = str | bytes


@dataclass(frozen=True, kw_only=True)
class RawReport:
    """One report as it came. `study` and `patient` are keyed hashes; `texts`: section, or WHOLE, -> text or bytes.

    `known` is what the record system knows of the patient: looked for in the text, in memory only.
    """

    study: str
    patient: str
    texts: Mapping[str, Cell] = field(repr=False)
    known: KnownPatient | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Failed:
    """A report that gives nothing. `cause` is one of few and holds no text."""

    study: str
    cause: str


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is made of reports. `ontology`: the labels that are read; `model`: who reads, None for rules; `ner`: models
    that look for identifiers beside the rules."""

    ontology: str = "chexpert14"
    model: llm.Config | None = None
    ner: Models | None = None

    def __post_init__(self) -> None:
        if self.ontology not in ONTOLOGIES:
            raise ConfigError(f"--labels {self.ontology}: there is {', '.join(ONTOLOGIES)}")

    @property
    def settings(self) -> dict[str, Any]:
        """All that changes the output for the same reports."""
        settings: dict[str, Any] = {
            "pipeline": VERSION,
            "extraction": extract.SCHEMA_VERSION,
            "deidentifier": DEIDENTIFIER,
            "labels": self.ontology,
        }
        if self.ner is not None:
            settings["ner"] = self.ner.settings
        if self.model is not None:
            settings |= {"model": self.model.model, "prompt": llm.prompt_name(), "schema": self.model.json_schema}
        return settings

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels that a report may give, in their order."""
        return label_names(self.ontology)

    @property
    def vocabulary(self) -> llm.Vocabulary:
        """What a model may answer with."""
        return llm.Vocabulary(concepts=concepts(), anatomies=ANATOMIES)


@dataclass(frozen=True, kw_only=True)
class _Document:
    """A report between its two halves: what may be shown to a model and stored."""

    raw: RawReport = field(repr=False)
    text: str = field(repr=False)
    language: Language


class Pipeline:
    """Prepares reports; built once a process, since its tables are large. `secret` draws the surrogates."""

    def __init__(self, config: Config, secret: bytes | None) -> None:
        self.config, self._secret = config, secret
        recognisers = () if config.ner is None else config.ner.recognisers()
        self._detector = Detector(config=Detector.Config(recognisers=recognisers))
        self._surrogates = Surrogates(secret=PUBLIC_SECRET if secret is None else secret)
        self._reader, self._model = None, ""
        if config.model is not None:
            self._reader = llm.Reader(config.model, config.vocabulary, key_fingerprint(secret))
            self._model = f"{config.model.model}, {llm.prompt_name()}"

    def prepare(self, reports: Sequence[RawReport]) -> tuple[list[PreparedReport | Failed], Counter[str]]:
        """What became of each report, in their order, and counts; see `each`."""
        counts: Counter[str] = Counter()
        return list(self.each(reports, counts)), counts

    def each(self, reports: Sequence[RawReport], counts: Counter[str]) -> Iterator[PreparedReport | Failed]:
        """What becomes of each report, in their order. Adds to `counts`, named `group/member`.

        Never raises for data; raises ConfigError and LLMUnreachableError as `llm.Reader.read` does.
        """
        counts["reports/read"] += len(reports)
        documents: Iterable[_Document | Failed] = (self._document(report, counts) for report in reports)
        readings: Iterator[llm.Read | None] = repeat(None)
        if self._reader is not None:  # it reads many at a time
            documents = list(documents)
            readable = [document.text for document in documents if isinstance(document, _Document)]
            readings = iter(self._read(self._reader, readable, counts))
        for document in documents:
            if isinstance(document, Failed):
                result: PreparedReport | Failed = document
            else:
                result = self._record(document, next(readings))
            if isinstance(result, Failed):
                counts[f"failed/{result.cause}"] += 1
            else:
                counts["reports/prepared"] += 1
            yield result

    def _document(self, raw: RawReport, counts: Counter[str]) -> _Document | Failed:
        """The half that sees raw text."""
        stage = "cleaning"
        try:
            text = _joined(raw.texts, counts)
            if not any(character.isalnum() for character in text):
                return Failed(study=raw.study, cause="no text")
            stage = "language"
            language = detect(text)
            if language == "fr":
                stage = "French cleaning"
                text, removed = french.cleaned(text)
                counts.update(f"repairs/{one.rule}" for one in removed)
            stage = "de-identification"
            known = KnownPatient(key=raw.patient) if raw.known is None else _composed(raw.known, raw.patient)
            found = deidentify(text, language, self._detector, self._surrogates, patient=known)
        except Exception as error:
            return Failed(study=raw.study, cause=_cause(stage, error))
        counts[f"languages/{language}"] += 1
        for kind, count in found.counts.items():
            counts[f"identifiers/{kind}"] += count
        for layer, count in found.layers.items():
            counts[f"layers/{layer}"] += count
        return _Document(raw=raw, text=found.text, language=language)

    @staticmethod
    def _read(reader: llm.Reader, texts: Sequence[str], counts: Counter[str]) -> list[llm.Read]:
        """A model's reading of each text."""
        totals = llm.Totals()
        reads = reader.read(texts, totals.add)
        counts.update({f"llm/{name}": count for name, count in totals.counts().items()})
        return reads

    def _record(self, document: _Document, read: llm.Read | None) -> PreparedReport | Failed:
        """The half that sees de-identified text only."""
        stage, raw, text = "extraction", document.raw, document.text
        try:
            located = None if read is None else read.located
            if located is None:
                found = extract.by_rules(text, document.language, study=raw.study, ontologies=(self.config.ontology,))
            else:
                found = _by_model(located, text, document.language, raw.study)
            stage = "check"
            found = extract.verify(found, text)
            members = extract.record_members(found, text, self.config.ontology)
            return PreparedReport(
                study=raw.study, patient=raw.patient, deidentifier=DEIDENTIFIER,
                extractor=RULES if located is None else self._model, **members,
            )  # fmt: skip
        except Exception as error:
            return Failed(study=document.raw.study, cause=_cause(stage, error))


def _by_model(located: llm.Located, text: str, language: Language, study: str) -> extract.Extraction:
    """The extraction that follows from a model's findings and anatomies; sections and sentences stay those of rules."""
    outline = extract.outlined(text, language)
    found = []
    for one in located.entities:
        sentence = _within(one.span, outline.spans)
        if sentence is None:  # in a heading, or across two sentences
            continue
        position = "" if one.position is None else " ".join(text[slice(*one.position)].lower().split())
        found.append(
            Entity(
                concept=one.concept, start=one.span[0], end=one.span[1], sentence=sentence, laterality=one.laterality,
                position=position, status=one.status, descriptor=None,
            )
        )  # fmt: skip
    read = {name: [part.body for part in outline.sections if part.name == name] for name in READ}
    anatomy = []
    for place in located.anatomy:
        # A model may take a conclusion for a finding; where a sentence stands says which it is.
        told = sorted({*place.findings, *place.impression})
        sited = {name: _clipped(text, told, bodies) for name, bodies in read.items()}
        if any(sited.values()):
            anatomy.append(AnatomyText(anatomy=place.anatomy, status=place.status, **sited))
    return extract.with_entities(text, outline, found, anatomy, study=study)


def _clipped(text: str, spans: Sequence[Span], bodies: Sequence[Span]) -> tuple[Span, ...]:
    """The spans as far as they lie in a body: a model may copy the heading with the sentence."""
    cut = ((max(span[0], body[0]), min(span[1], body[1])) for span in spans for body in bodies)
    return tuple((start, end) for start, end in cut if any(map(str.isalnum, text[start:end])))


def _within(span: Span, places: Sequence[Span]) -> int | None:
    """Which of the places holds the span."""
    return next((n for n, (start, end) in enumerate(places) if start <= span[0] and span[1] <= end), None)


def _joined(texts: Mapping[str, Cell], counts: Counter[str]) -> str:
    """One document of all texts; sections from columns of their own get their headings."""
    cleaned: list[str] = []
    for name in sorted(texts, key=(WHOLE, *SECTION_NAMES).index):
        part = clean(texts[name])
        for kind, count in part.repairs.items():
            counts[f"repairs/{kind}"] += count
        if part.text:
            cleaned.append(part.text if name == WHOLE else f"{name.upper()}: {part.text}")
    return "\n\n".join(cleaned)


def _composed(known: KnownPatient, key: str) -> KnownPatient:
    """What is known of the patient, in NFC as the document is: an accent that stands apart would part a name in two."""

    def composed(texts: Sequence[str]) -> tuple[str, ...]:
        return tuple(normalize("NFC", text) for text in texts)

    return replace(
        known, key=key, first_names=composed(known.first_names), last_names=composed(known.last_names),
        ids=composed(known.ids), address=normalize("NFC", known.address), city=normalize("NFC", known.city),
    )  # fmt: skip


def _cause(stage: str, error: Exception) -> str:
    """Why a stage failed, without a word of the report: what we say of it, less its numbers, or the kind of error."""
    if isinstance(error, DataError):
        return f"{stage}: {re.sub(r'[0-9][0-9,.]*', 'N', str(error).partition(';')[0])}"
    return f"{stage}: {type(error).__name__}"
