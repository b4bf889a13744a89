"""What real CT reports say of each anatomy, by rules: spans exact, sentences placed, two passes compared."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal

from ci.bench.figure import Figure, figure
from ci.bench.reports_data import Report, ct_rate
from shards.reports.anatomy import AnatomyText, Survey, survey
from shards.reports.entities import entities
from shards.reports.language import Span
from shards.reports.sections import Section
from shards.reports.sentences import sentences

QUICK_REPORTS = 40

# CT-RATE's labels of one anatomy: those of a lung, heart or esophagus that is not normal.
LABELS_OF = {
    "lung": (
        "Emphysema", "Atelectasis", "Lung nodule", "Lung opacity", "Pulmonary fibrotic sequela", "Pleural effusion",
        "Mosaic attenuation pattern", "Peribronchial thickening", "Consolidation", "Bronchiectasis",
        "Interlobular septal thickening",
    ),
    "heart": ("Cardiomegaly", "Pericardial effusion", "Coronary artery wall calcification"),
    "esophagus": ("Hiatal hernia",),
}  # fmt: skip

# The set joins findings and impression without a heading: the impression begins at a quotation mark or a bullet.
_IMPRESSION = re.compile('["•“]')


def _sections(text: str) -> tuple[Section, ...]:
    mark = _IMPRESSION.search(text)
    if mark is None:
        return (Section(name="findings", start=0, end=len(text), heading=None),)
    return (
        Section(name="findings", start=0, end=mark.start(), heading=None),
        Section(name="impression", start=mark.start(), end=len(text), heading=mark.span()),
    )


def _read(reports: Sequence[Report]) -> Iterator[tuple[str, Survey]]:
    for report in reports:
        parts = _sections(report.text)
        spans = [span for part in parts for span in sentences(report.text, *part.body, "en")]
        yield report.text, survey(report.text, parts, spans, entities(report.text, spans, "en"), "en")


def _exact(text: str, places: Sequence[AnatomyText]) -> bool:
    """Whether every text of every place is a part of the report that holds a word, within its section."""
    parts = {part.name: part for part in _sections(text)}

    def within(span: Span, section: Literal["findings", "impression"]) -> bool:
        start, end = span
        part = parts.get(section)
        inside = part is not None and part.start <= start < end <= part.end
        return inside and any(map(str.isalnum, text[start:end]))

    return all(
        all(within(span, "findings") for span in one.findings)
        and all(within(span, "impression") for span in one.impression)
        for one in places
    )


def _alone(text: str, span: Span) -> tuple[str, ...]:
    """Places of one sentence that nothing stands before."""
    (whole,) = survey(
        text[slice(*span)], (Section(name="findings", start=0, end=span[1] - span[0], heading=None),),
        [(0, span[1] - span[0])], (), "en",
    ).sentences  # fmt: skip
    return whole.places


def figures_anatomy(quick: bool) -> list[Figure]:
    """Odd reports only: the rules were written while reading even ones."""
    started = time.perf_counter()
    reports = ct_rate()[1::2]
    if quick:
        reports = reports[:QUICK_REPORTS]
    uses: Counter[str] = Counter()
    labelled: Counter[bool] = Counter()
    unlabelled: Counter[bool] = Counter()
    exact = same = compared = concluded_on = described_too = 0
    for report, (text, found) in zip(reports, _read(reports), strict=True):
        abnormal = {one.anatomy for one in found.anatomies if one.status == "abnormal"}
        for anatomy, labels in LABELS_OF.items():
            diseased = any(report.labels[label] for label in labels)
            (labelled if diseased else unlabelled)[anatomy in abnormal] += 1
        exact += _exact(text, found.anatomies + found.elsewhere)
        for sentence in found.sentences:
            uses[sentence.use] += 1
            if sentence.use in ("named", "elsewhere"):
                compared += 1
                same += set(_alone(text, sentence.span)) == set(sentence.places)
        concluded = _by_section(found, "impression")
        described = _by_section(found, "findings")
        concluded_on += len(concluded)
        described_too += len(concluded & described)
    stating = sum(uses[use] for use in ("named", "carried", "elsewhere", "none"))
    wall_s = time.perf_counter() - started

    def note(*counted: str) -> str:
        return ", ".join(f"{use} {uses[use]}" for use in counted)

    return [
        figure("reports.spans_exact", exact / len(reports), wall_s=wall_s, note=f"{len(reports)} reports"),
        figure(
            "reports.sentences_assigned", 1 - uses["none"] / stating, wall_s=wall_s,
            note=f"of sentences that state findings: {note('named', 'carried', 'elsewhere', 'none')}; "
            f"left out: {note('report', 'technique')}",
        ),
        figure(
            "reports.sentences_assigned_36", (uses["named"] + uses["carried"]) / stating, unit="fraction",
            better="higher", note="to one of the 36 anatomies, not to a place outside of them (nodes, mediastinum)",
        ),
        figure(
            "reports.sentences_same_alone", same / compared, unit="fraction", better="higher",
            note="two passes: sentences that name a place, read in the whole report and by themselves, same places",
        ),
        figure(
            "reports.labelled_anatomies_abnormal", labelled[True] / max(labelled.total(), 1), unit="fraction",
            better="higher",
            note=f"{labelled.total()} lungs, hearts, esophagi that a label of CT-RATE calls diseased; of "
            f"{unlabelled.total()} others {unlabelled[True]} are abnormal, which other findings can explain",
        ),
        figure(
            "reports.impression_in_findings", described_too / max(concluded_on, 1), unit="fraction", better="higher",
            note=f"two passes: of {concluded_on} anatomies that the impression names, described in the findings, too",
        ),
    ]  # fmt: skip


def _by_section(found: Survey, section: str) -> set[str]:
    return {one.anatomy for one in found.anatomies if getattr(one, section)}
