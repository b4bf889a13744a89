"""ECAMP's side of a report: one sentence a word of its list, boilerplate, and the words that describe a finding.

Distilled sentences are rendered from entities, not written by a model, so that none says what the report does not
(arXiv 2312.13316; masking and weights are made of these spans later).
"""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import compress
from pathlib import Path
from typing import Literal, NamedTuple

from shards.batch import Distilled
from shards.reports.anatomy import Part, Statement
from shards.reports.entities import Said
from shards.reports.language import Language, Span, within
from shards.reports.lexicon.anatomy import Words, fold
from shards.reports.lexicon.terms import lower

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

_LETTERS = re.compile(r"[^\W\d_]+")
_BOILERPLATE = {
    # Letters first: a search for them is fast, one for the start of a word is not.
    "en": re.compile(r"there(?<!\wthere) (?:is|are) no(?: evidence of)?\b"),
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


def boilerplate(lowered: str, language: Language) -> tuple[Span, ...]:
    """Words that every report uses alike: "there is no", "there is no evidence of" and their French like.

    `lowered`: see `lexicon.terms.lower`.
    """
    patterns = _BOILERPLATE.values() if language == "unknown" else (_BOILERPLATE[language],)
    return tuple(sorted(match.span() for pattern in patterns for match in pattern.finditer(lowered)))


def marks(text: str, language: Language) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
    """Words of the list and boilerplate in a distilled sentence, which has no descriptors."""
    forms = _tables()[1]
    entities = tuple(word.span() for word in _LETTERS.finditer(text) if fold(word[0].lower()) in forms)
    return entities, boilerplate(lower(text), language)


class Mentions(NamedTuple):
    """What one sentence says of the words of the list: (word, status, span), and spans, all in the sentence."""

    told: Sequence[tuple[str, Status, Span]] = ()
    boilerplate: Sequence[Span] = ()
    descriptors: Sequence[Span] = ()


def mentions(lowered: str, words: Words, said: Statement, entities: Sequence[Said], language: Language) -> Mentions:
    """What a sentence says of the words of the list; `words` and `said` are those of the sentence.

    An entity's status is its own; a word of the list outside of all entities takes that of its part of the sentence,
    and none where that does not say. `language`: of which boilerplate is looked for.
    """
    words_of_list, forms, concepts = _tables()
    told: list[tuple[str, Status, Span]] = []
    covered: dict[Span, Said] = {}
    for entity in entities:
        span = (entity.start, entity.end)
        if _part(said.parts, entity.start) is None:  # on a word between two parts
            continue
        covered[span] = entity
        if (name := concepts.get(entity.concept)) is not None:
            told.append((name, entity.status, span))
    spans = set(covered)
    for number in compress(range(len(words.words)), map(forms.__contains__, words.words)):
        name, span = forms[words.words[number]], (words.starts[number], words.ends[number])
        before = max((one for one in covered if one[0] <= span[0]), default=None)
        if before is not None and span[1] <= before[1]:
            entity = covered[before]
            if concepts.get(entity.concept) != name and not words_of_list[name].structure:
                told.append((name, entity.status, span))
        elif (part := _part(said.parts, span[0])) is not None and part[2] is not None:
            told.append((name, "present" if part[2] == "abnormal" else "absent", span))
            spans.add(span)
    common = tuple(span for span in boilerplate(lowered, language) if within(span, (part[:2] for part in said.parts)))
    return Mentions(told, common, _descriptors(words, said, sorted(spans)))


def _part(parts: Sequence[Part], place: int) -> Part | None:
    """The part of a sentence that character `place` stands in."""
    for part in parts:
        if part[0] <= place < part[1]:
            return part
    return None


def _descriptors(words: Words, said: Statement, spans: Iterable[Span]) -> tuple[Span, ...]:
    """The up to DESCRIPTOR_WORDS words right before each mention, none of another mention or part of a sentence."""
    found: list[Span] = []
    reached = 0
    for start, end in spans:
        part = _part(said.parts, start)
        lowest = max(reached, 0 if part is None else part[0])
        place = bisect_left(words.starts, start)
        first = place
        while first > 0 and place - first < DESCRIPTOR_WORDS and words.starts[first - 1] >= lowest:
            first -= 1
        if first < place:
            found.append((words.starts[first], words.ends[place - 1]))
        reached = max(reached, end)
    return tuple(found)


def context(sentences: Sequence[Span], found: Sequence[Mentions], language: Language) -> Context:
    """Distilled sentences, boilerplate and descriptors of the sentences of findings and impression.

    `sentences`: their spans, `found`: the mentions of each. Distilled sentences are in `language`. Where mentions
    differ, a present one decides, then a possible one.
    """
    told: dict[str, set[Span]] = {}
    said: set[tuple[str, Status]] = set()
    for (start, _), one in zip(sentences, found, strict=True):
        for name, status, (first, last) in one.told:
            said.add((name, status))
            told.setdefault(name, set()).add((start + first, start + last))
    distilled = []
    for name in filter(told.__contains__, ENTITIES):
        status = next(one for one in _FIRST if (name, one) in said)
        spans = tuple(sorted(told[name]))
        distilled.append(Distilled(entity=name, status=status, sentence=sentence(name, status, language), spans=spans))
    return Context(
        distilled=tuple(distilled),
        boilerplate=moved(sentences, [one.boilerplate for one in found]),
        descriptors=moved(sentences, [one.descriptors for one in found]),
    )


def moved(sentences: Iterable[Span], spans: Iterable[Iterable[Span]]) -> tuple[Span, ...]:
    """Spans of sentences as spans of their document."""
    return tuple(
        (start + first, start + last)
        for (start, _), inside in zip(sentences, spans, strict=True)
        for first, last in inside
    )
