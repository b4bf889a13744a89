"""Optional models beside the rules: EDS-NLP for French, Presidio for English. Imported only when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from shards.errors import ConfigError
from shards.reports.identity.view import Identifier, Kind

Recogniser = Callable[[str, str], Sequence[Identifier]]  # (text, language) -> spans it adds

_EDS_KINDS: dict[str, Kind] = {
    "ADRESSE": "address", "DATE": "date", "DATE_NAISSANCE": "birth_date", "HOPITAL": "hospital", "IPP": "id",
    "NDA": "id", "MAIL": "mail", "NOM": "person_name", "PRENOM": "person_name", "SECU": "social_security",
    "TEL": "phone", "VILLE": "city", "ZIP": "zip",
}  # fmt: skip
_PRESIDIO_KINDS: dict[str, Kind] = {
    "PERSON": "person_name", "DATE_TIME": "date", "PHONE_NUMBER": "phone", "EMAIL_ADDRESS": "mail", "URL": "url",
    "LOCATION": "city", "US_SSN": "social_security", "UK_NHS": "id", "MEDICAL_LICENSE": "id", "ID": "id",
}  # fmt: skip


def edsnlp_recogniser(model: Path) -> Recogniser:
    """A trained EDS-NLP pipeline on French (and unknown) documents. Raises ConfigError without edsnlp or the folder."""
    try:
        import edsnlp
    except ImportError:
        raise ConfigError("the French NER plug-in needs edsnlp; pip install edsnlp, or leave it out") from None
    if not model.is_dir():
        raise ConfigError(f"NER model {model}: no such folder")
    pipeline = edsnlp.load(model)

    def recognise(text: str, language: str) -> Sequence[Identifier]:
        if language == "en":
            return ()
        return [
            Identifier(start=entity.start_char, end=entity.end_char, kind=_EDS_KINDS[entity.label_], layer="plugin")
            for entity in pipeline(text).ents
            if entity.label_ in _EDS_KINDS
        ]

    return recognise


def presidio_recogniser(score_min: float = 0.5) -> Recogniser:
    """Presidio's analyzer with its default English engine. Raises ConfigError without presidio-analyzer."""
    try:
        from presidio_analyzer import AnalyzerEngine
    except ImportError:
        raise ConfigError("the English NER plug-in needs presidio-analyzer; pip install it, or leave it out") from None
    analyzer = AnalyzerEngine()

    def recognise(text: str, language: str) -> Sequence[Identifier]:
        if language == "fr":
            return ()
        return [
            Identifier(start=one.start, end=one.end, kind=_PRESIDIO_KINDS[one.entity_type], layer="plugin")
            for one in analyzer.analyze(text=text, language="en", entities=list(_PRESIDIO_KINDS))
            if one.score >= score_min
        ]

    return recognise
