"""The parts of a report by their headings, English and French, under one set of English names.

A heading stands at the start of a line or of a sentence. Sections lie one behind the other and together are the whole
document, headings included; what a section says is its `body`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal, get_args

from shards.reports.language import Span

SectionName = Literal["header", "history", "indication", "technique", "comparison", "findings", "impression", "other"]
SECTION_NAMES: tuple[SectionName, ...] = get_args(SectionName)

_HEADINGS: dict[SectionName, tuple[str, ...]] = {
    "history": (
        "clinical history", "past medical history", "medical history", "surgical history", "patient history",
        "history of present illness", "history", "antécédents", "antécédent", "histoire de la maladie",
        "antécédents médicaux", "antécédents chirurgicaux",
    ),
    "indication": (
        "indication", "indications", "clinical indication", "clinical information", "clinical data",
        "clinical details", "clinical question", "clinical context", "reason for exam", "reason for examination",
        "reason for study", "reason for this examination", "reason for the exam", "reason for test",
        "indication clinique", "indication de l'examen", "motif", "motif de l'examen", "motif de la demande",
        "renseignements cliniques", "renseignement clinique", "données cliniques", "contexte clinique", "contexte",
        "question posée", "renseignements",
    ),
    "technique": (
        "technique", "techniques", "procedure", "protocol", "exam", "examination", "type of exam", "study", "method",
        "technical information", "technical quality", "technique d'examen", "protocole", "modalités", "incidences",
        "examen", "examen réalisé", "type d'examen", "procédure", "réalisation", "technique de l'examen",
    ),
    "comparison": (
        "comparison", "comparisons", "comparison study", "comparison studies", "prior studies", "prior study",
        "comparaison", "comparatif", "examens antérieurs", "examen antérieur", "examen de référence",
        "examens de comparaison", "étude comparative",
    ),
    "findings": (
        "findings", "finding", "observations", "description", "report", "radiological findings", "imaging findings",
        "radiographic findings", "résultats", "résultat", "constatations", "observation", "interprétation", "analyse",
        "compte rendu", "compte-rendu", "description des lésions",
    ),
    "impression": (
        "impression", "impressions", "conclusion", "conclusions", "opinion", "summary", "diagnosis",
        "final diagnosis", "assessment", "impression and recommendation", "impression and recommendations",
        "findings and impression", "synthèse", "au total", "en conclusion", "avis", "diagnostic",
        "conclusion et recommandations",
    ),
    "other": (
        "recommendation", "recommendations", "recommandations", "recommandation", "notification", "addendum",
        "signature", "conduite à tenir",
    ),
}  # fmt: skip
# Inside a line these are rather prose with a colon ("Examen: abdomen souple") than the heading of a report's part.
_AT_LINE_START = frozenset(
    {
        "exam", "examination", "study", "report", "method", "procedure", "protocol", "summary", "history",
        "description", "observation", "observations", "diagnosis", "assessment", "opinion", "examen", "analyse",
        "avis", "contexte", "motif", "diagnostic", "interpretation", "modalites", "incidences", "realisation",
        "compte rendu", "compte-rendu", "resultat", "antecedents", "antecedent", "signature", "notification",
    }
)  # fmt: skip
# Openings of a summary that need no colon, and closings of a letter, which are no finding.
_SUMMARY_OPENINGS = ("in conclusion", "in summary", "en conclusion", "au total", "en résumé", "en synthèse")
_CLOSINGS = (
    "electronically signed", "dictated by", "transcribed by", "reviewed by", "signed by", "bien confraternellement",
    "confraternellement", "bien cordialement", "cordialement", "sincerely", "validé", "signé", "dicté",
)  # fmt: skip
_READERS = ("dr", "pr", "docteur", "professeur")  # on the last line: the signature
_FINDINGS_FOLLOW: frozenset[SectionName] = frozenset({"header", "history", "indication", "technique", "comparison"})
_FOLDED = str.maketrans("àâäçèéêëîïôöùûüœ’", "aaaceeeeiioouuuo'")
_ACCENTS = {"a": "[aàâ]", "c": "[cç]", "e": "[eéèêë]", "i": "[iîï]", "o": "[oô]", "u": "[uùû]", "'": "['’]"}


def _fold(words: str) -> str:
    """For comparison: accents are often missing, in capitals nearly always."""
    lowered = words.lower()
    return lowered if lowered.isascii() else lowered.translate(_FOLDED)


def _any_of(phrases: tuple[str, ...]) -> str:
    """Longest first, with or without accents."""
    ordered = sorted({_fold(phrase) for phrase in phrases}, key=len, reverse=True)
    return "|".join("".join(_ACCENTS.get(letter, re.escape(letter)) for letter in phrase) for phrase in ordered)


_NAMES: dict[str, SectionName] = {_fold(phrase): name for name, phrases in _HEADINGS.items() for phrase in phrases}
_NAMES |= {_fold(phrase): "impression" for phrase in _SUMMARY_OPENINGS}
_NAMES |= {_fold(phrase): "other" for phrase in (*_CLOSINGS, *_READERS)}
# Where a heading may stand: at the start of a line, behind a mark or number, or with a capital at that of a sentence.
# Looking there first, and at the first word, keeps the long alternation below away from most of the text.
_LEAD = r"(?P<lead>[#*_>•\- ]{0,6}(?:\d{1,2}[.)/] ?)?)"
_FIRST_PLACE = re.compile(_LEAD)
_PLACE = re.compile(rf"[.!?;:\])\"»*\n](?:(?<=\n)\n*{_LEAD}|(?<!\n) (?=[A-ZÀ-Ý]))")
_FIRST_WORDS = frozenset(re.split("[ '-]", phrase)[0] for phrase in _NAMES)
_FIRST_WORD = re.compile(r"[^\W\d_]+")
_HEADING = re.compile(
    rf"""
    (?P<heading>{_any_of(tuple(phrase for phrases in _HEADINGS.values() for phrase in phrases))})
    (?:\ ?\([^()\n]{{0,60}}\)|\ ?[/&]\ ?[^\W\d_]{{3,20}}(?:\ [^\W\d_]{{3,20}})?)?
    (?P<mark>[*_]{{0,3}}\ ?:[*_]{{0,3}}|[*_]{{0,3}}\.?[*_]{{0,3}}$|\ ?[-–—]\ |\.\ |\ (?-i:(?=[A-ZÀ-Ý0-9])))
  | (?P<summary>{_any_of(_SUMMARY_OPENINGS)})\ ?[,:]
  | (?P<closing>{_any_of(_CLOSINGS)})\b[^\n]*$
  | (?P<reader>(?:{_any_of(_READERS)})\.?\ [^\n]{{1,60}}\Z)
    """,
    re.VERBOSE | re.IGNORECASE | re.MULTILINE,
)
# A mark and a blank, or a quotation mark that no other one closes.
# Its first character decides first, since a search for one is fast.
_LIST_AFTER_PROSE = re.compile(r"""["“•·](?<=[.!?] .)(?: (?=[^\W_])|(?<=["“])(?=[A-ZÀ-Ý])(?![^"”]*\S["”]))""")
# From the start of a word and never back into one, or every letter would be tried as a start.
_SENTENCE = r"(?<![^\W\d_])(?:[^\W\d_]++[ ,;'’-]++){%s,12}[^\W\d_]++ ?\."
_PROSE = re.compile(rf"{_SENTENCE % 3}|{_SENTENCE % 1}\s+{_SENTENCE % 1}")  # one long sentence or two short ones


@dataclass(frozen=True, kw_only=True)
class Section:
    """Characters [start, end) of the document under one heading; `heading` is None where the text has none."""

    name: SectionName
    start: int
    end: int
    heading: Span | None

    @property
    def body(self) -> Span:
        """What the section says, after its heading."""
        return (self.heading[1] if self.heading else self.start), self.end


def sections(text: str) -> tuple[Section, ...]:
    """Sections of a document, in order; together they are all of it. Text with no heading is one "findings"."""
    if not text:
        return ()
    found = list(_headings(text))
    if not found:
        return _without_headings(text)
    ends = [span[0] for _, span in found[1:]] + [len(text)]
    parts = [
        Section(name=name, start=span[0], end=end, heading=span) for (name, span), end in zip(found, ends, strict=True)
    ]
    if (first := parts[0].start) > 0:
        parts.insert(0, Section(name="header", start=0, end=first, heading=None))
    if not any(part.name == "findings" for part in parts):
        parts = _with_unnamed_findings(text, parts)
    return tuple(parts)


def _without_headings(text: str) -> tuple[Section, ...]:
    """Findings; where list marks follow prose in its own line, as in exports that lost their headings, they begin the
    impression. A quotation mark that quotes nothing is such a mark."""
    mark = _LIST_AFTER_PROSE.search(text)
    if mark is None or text[0] in '"“•·*-' or not _PROSE.search(text, 0, mark.start()):
        return (Section(name="findings", start=0, end=len(text), heading=None),)
    start, end = mark.span()
    return (
        Section(name="findings", start=0, end=start, heading=None),
        Section(name="impression", start=start, end=len(text), heading=(start, end)),
    )


def _headings(text: str) -> Iterator[tuple[SectionName, Span]]:
    """Names and spans, each with its number, colon and marks."""
    done = 0
    first = _FIRST_PLACE.match(text)
    assert first is not None
    for place in chain([first], _PLACE.finditer(text)):
        if place.start() < done or not (word := _FIRST_WORD.match(text, place.end())):
            continue
        if _fold(word[0]) not in _FIRST_WORDS or not (match := _HEADING.match(text, place.end())):
            continue
        at_line_start = place["lead"] is not None
        if name := _name(text, match, at_line_start):
            start = place.start("lead") if at_line_start else match.start()
            done = (
                start if match["closing"] or match["reader"] else match.end()
            )  # a closing is content from its first word
            yield name, (start, done)


def _name(text: str, match: re.Match[str], at_line_start: bool) -> SectionName | None:
    """Whether these words are a heading here: prose may start with each of them ("Impression of a mass", "Study was
    limited"), so that, short of a colon or a line of its own, capitals or the start of a line must speak for it."""
    if match["closing"] or match["reader"]:
        return "other" if at_line_start else None
    if match["summary"]:  # inside a line only where it is the shorter part; what comes before a summary is longer
        return "impression" if at_line_start or match.start() > len(text) / 2 else None
    heading, mark = match["heading"], match["mark"]
    capital = heading[0].isupper()
    if not at_line_start and (not capital or _fold(heading) in _AT_LINE_START):
        return None
    if mark == " ":
        accepted = heading.isupper() and _mixed_case(text, match.end())
    else:  # a colon; else a line of its own, a dash or a stop
        accepted = ":" in mark or (at_line_start and capital)
    return _NAMES.get(_fold(heading)) if accepted else None


def _mixed_case(text: str, start: int) -> bool:
    """Whether the line goes on in small letters; in a line all in capitals they single out nothing."""
    end = text.find("\n", start)
    return any(letter.islower() for letter in text[start : min(start + 200, end if end >= 0 else len(text))])


def _with_unnamed_findings(text: str, parts: list[Section]) -> list[Section]:
    """Findings without heading: prose before the first heading, or the paragraphs after the first one of the last
    section before the impression ("TECHNIQUE: two views.", empty line, the findings, "IMPRESSION: ...")."""
    before = 0
    while before < len(parts) and parts[before].name in _FINDINGS_FOLLOW:
        before += 1
    if before == 0:
        return parts
    last = parts[before - 1]
    gap = text.find("\n\n", last.body[0] if last.heading else last.start, last.end)
    if last.heading is not None and gap >= 0 and _PROSE.search(text, gap, last.end):
        start = gap + 2
        kept = replace(last, end=start)
        return [
            *parts[: before - 1],
            kept,
            Section(name="findings", start=start, end=last.end, heading=None),
            *parts[before:],
        ]
    if parts[0].name == "header" and _PROSE.search(text, 0, parts[0].end):
        return [replace(parts[0], name="findings"), *parts[1:]]
    return parts
