"""De-identification of one report: identifiers found by layers, replaced by surrogates of the patient's key.

Order of use: `text.clean`, `language.detect`, then `deidentify`; everything after it works on the text it returns.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field

from shards.reports.identity.detector import Detector
from shards.reports.identity.known_patient import KnownPatient
from shards.reports.identity.surrogates import Replaced, Surrogates
from shards.reports.identity.tagger import WEIGHTS, digest

DEIDENTIFIER = f"roentgen identity rules 6, tagger {digest(WEIGHTS)}"  # other weights give other text

__all__ = ["DEIDENTIFIER", "Deidentified", "Detector", "KnownPatient", "Replaced", "Surrogates", "deidentify"]


@dataclass(frozen=True, kw_only=True)
class Deidentified:
    """`text` may be stored; `spans` say where its surrogates stand; `counts` and `layers` are for the audit."""

    text: str = field(repr=False)
    spans: tuple[Replaced, ...]
    counts: Counter[str]
    layers: Counter[str]


def deidentify(
    document: str,
    language: str,
    detector: Detector,
    surrogates: Surrogates,
    *,
    patient: KnownPatient | None,
) -> Deidentified:
    """Replace every identifier of a cleaned document.

    `patient.key` decides names and date shift, so it must be equal for all documents of a person; its other fields,
    where the hospital has them, are looked for in the text. Without a patient every document is its own.
    """
    found = detector.find(document, language, patient)
    key = patient.key if patient is not None else f"of document {_digest(document)}"
    text, spans = surrogates.replace(document, found, patient=key, language=language)
    return Deidentified(
        text=text, spans=spans, counts=Counter(one.kind for one in found), layers=Counter(one.layer for one in found)
    )


def _digest(document: str) -> str:
    """Stands for the document in the keyed hash of each surrogate, which would read the whole text otherwise."""
    return hashlib.sha256(document.encode("utf-8", "surrogatepass")).hexdigest()
