"""Optional models beside the rules: spaCy's through Presidio, EDS-NLP's for French. Imported only when asked for.

They may add spans and remove none. What they take for a name is left where every word of it is one of medicine: small
models see persons in "Fracture" and "Swan-Ganz".
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from shards.errors import ConfigError
from shards.reports.identity.gazetteers import Word
from shards.reports.identity.view import Identifier, Kind, View, view_of

Recogniser = Callable[[str, str], Sequence[Identifier]]  # (text, language) -> spans it adds

_EDS_KINDS: dict[str, Kind] = {
    "ADRESSE": "address", "DATE": "date", "DATE_NAISSANCE": "birth_date", "HOPITAL": "hospital", "IPP": "id",
    "NDA": "id", "MAIL": "mail", "NOM": "person_name", "PRENOM": "person_name", "SECU": "social_security",
    "TEL": "phone", "VILLE": "city", "ZIP": "zip",
}  # fmt: skip
# Not its dates, which are ages and durations as well ("45-year-old", "three weeks"), nor its mail addresses and URLs,
# for which it looks up a list in the net: the rules find all of these.
_PRESIDIO_KINDS: dict[str, Kind] = {
    "PERSON": "person_name", "LOCATION": "city", "PHONE_NUMBER": "phone", "US_SSN": "social_security", "UK_NHS": "id",
    "MEDICAL_LICENSE": "id",
}  # fmt: skip
_OF_MEDICINE = Word.COMMON | Word.FINDING | Word.EPONYM | Word.EPONYM_HEAD | Word.PARTICLE


@dataclass(frozen=True, kw_only=True)
class Models:
    """Which models run beside the rules; goes to worker processes, where they are loaded once.

    `spacy`: language ("en", "fr") -> installed spaCy pipeline, run by Presidio; `edsnlp`: folder of a trained pipeline.
    """

    spacy: tuple[tuple[str, str], ...] = ()
    edsnlp: Path | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """All that changes what they find."""
        packages = [*(name for _, name in self.spacy), *(["presidio-analyzer"] if self.spacy else [])]
        return {
            "spacy": dict(self.spacy),
            "edsnlp": str(self.edsnlp) if self.edsnlp else None,
            "versions": {name: _version(name) for name in packages + (["edsnlp"] if self.edsnlp else [])},
        }

    def check(self) -> None:
        """Raises ConfigError for what is not installed, without loading anything."""
        if self.spacy and not find_spec("presidio_analyzer"):
            raise ConfigError("--ner-presidio: needs presidio-analyzer; pip install it, or leave the option out")
        for language, name in self.spacy:
            if not name.isidentifier() or not find_spec(name):
                raise ConfigError(
                    f"--ner-presidio {language}={name}: no such spaCy pipeline is installed; shards/reports/README.md "
                    "says how to"
                )
        if self.edsnlp and not find_spec("edsnlp"):
            raise ConfigError("--ner-edsnlp: needs edsnlp; pip install it, or leave the option out")
        if self.edsnlp and not self.edsnlp.is_dir():
            raise ConfigError(f"--ner-edsnlp {self.edsnlp}: no such folder")

    def recognisers(self) -> tuple[Recogniser, ...]:
        """Loads the models. Raises ConfigError for what is not installed."""
        self.check()
        found: list[Recogniser] = [presidio_recogniser(dict(self.spacy))] if self.spacy else []
        return (*found, edsnlp_recogniser(self.edsnlp)) if self.edsnlp else tuple(found)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def edsnlp_recogniser(model: Path) -> Recogniser:
    """The EDS-NLP pipeline in a folder, on French (and unknown) documents."""
    import edsnlp

    pipeline = edsnlp.load(model)

    def recognise(text: str, language: str) -> Sequence[Identifier]:
        if language == "en":
            return ()
        spans = ((one.start_char, one.end_char, _EDS_KINDS.get(one.label_)) for one in pipeline(text).ents)
        return _identifiers(text, spans)

    return recognise


def presidio_recogniser(models: Mapping[str, str], score_min: float = 0.5) -> Recogniser:
    """Presidio's analyzer over installed spaCy pipelines, language -> name; nothing is downloaded.

    Documents of unknown language are read by all of them.
    """
    from presidio_analyzer import AnalyzerEngine
    from presidio_analyzer.nlp_engine import NlpEngineProvider

    logging.getLogger("presidio-analyzer").setLevel(logging.CRITICAL + 1)  # it tells how it decided, with the words
    rows = [{"lang_code": language, "model_name": name} for language, name in models.items()]
    engine = NlpEngineProvider(nlp_configuration={"nlp_engine_name": "spacy", "models": rows}).create_engine()
    analyzer = AnalyzerEngine(nlp_engine=engine, supported_languages=list(models))
    kinds = {one: sorted({*_PRESIDIO_KINDS} & {*analyzer.get_supported_entities(one)}) for one in models}

    def recognise(text: str, language: str) -> Sequence[Identifier]:
        return _identifiers(
            text,
            (
                (one.start, one.end, _PRESIDIO_KINDS[one.entity_type])
                for spoken in (models if language == "unknown" else {language} & set(models))
                for one in analyzer.analyze(text=text, language=spoken, entities=kinds[spoken])
                if one.score >= score_min
            ),
        )

    return recognise


def _identifiers(text: str, spans: Iterable[tuple[int, int, Kind | None]]) -> list[Identifier]:
    view = view_of(text)
    return [
        Identifier(start=start, end=end, kind=kind, layer="plugin")
        for start, end, kind in spans
        if kind is not None and not _of_medicine(view, start, end)
    ]


def _of_medicine(view: View, start: int, end: int) -> bool:
    words = [
        flags
        for flags, first, last in zip(view.flags, view.starts, view.ends, strict=True)
        if first < end and last > start
    ]
    return bool(words) and all(flags & _OF_MEDICINE for flags in words)
