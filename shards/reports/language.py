"""English, French or neither, by the words that only one of them uses; no model, and no word of it leaves here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Literal, cast

from shards.batch import Span

Language = Literal["en", "fr", "unknown"]

SAMPLE_CHARACTERS = 20_000  # of a longer document; its language does not change after that

# Function words and the commonest words of reports. Words that both languages write alike (normal, thorax, lesion
# without accent, a, on, son, pour) stand in neither.
_ENGLISH = frozenset(
    {
        "the", "of", "and", "is", "are", "was", "were", "in", "with", "no", "not", "there", "has", "have", "had",
        "been", "be", "to", "for", "from", "at", "by", "or", "as", "an", "this", "that", "which", "it", "its",
        "these", "those", "than", "within", "without", "would", "will", "should", "may", "could", "can", "if", "when",
        "but", "however", "also", "seen", "noted", "evidence", "right", "left", "both", "upper", "lower", "heart",
        "lung", "lungs", "chest", "clear", "size", "bone", "view", "views", "unremarkable", "stable", "unchanged",
        "mild", "moderate", "small", "acute", "active", "disease", "pain", "showing", "shows", "showed", "after",
        "during", "weeks", "years", "year", "radiograph", "scan", "x-ray", "ray", "effusion", "enlarged", "increased",
        "decreased",
    }
)  # fmt: skip
_FRENCH = frozenset(
    {
        "le", "la", "les", "l'", "d'", "du", "des", "de", "un", "une", "et", "est", "sont", "était", "étaient",
        "dans", "avec", "pas", "sans", "ne", "n'", "il", "elle", "au", "aux", "sur", "sous", "par", "qui", "que",
        "qu'", "ce", "cet", "cette", "ces", "se", "s'", "sa", "ses", "ou", "où", "à", "en", "mais", "plus", "aucun",
        "aucune", "absence", "été", "ayant", "chez", "droit", "droite", "gauche", "gauches", "poumon", "poumons",
        "cœur", "coeur", "épanchement", "lésion", "lésions", "discret", "discrète", "radiographie", "compte",
        "examen", "résultats", "ans", "montrant", "coupe", "après", "epanchement", "superieur", "superieure",
        "inferieur", "inferieure", "etait", "mise", "supérieur", "supérieure", "inférieur", "inférieure", "normale",
        "normales", "normaux", "osseuse", "osseux",
    }
)  # fmt: skip
# Neighbours, Dutch, German, Italian and Spanish, share small words with the two (de, la, en, in, is, was): Belgian and
# Swiss archives hold them, and a word here counts as much as one above.
_OTHER = frozenset(
    {
        "het", "een", "van", "niet", "geen", "zijn", "wordt", "werd", "voor", "bij", "naar", "ook", "nog", "rechts",
        "links", "met", "op", "de", "en", "is", "in", "der", "die", "das", "und", "ist", "nicht", "kein", "keine",
        "keinen", "ein", "eine", "einer", "mit", "von", "dem", "den", "zum", "zur", "auf", "im", "rechten", "linken",
        "beidseits", "lo", "gli", "di", "della", "del", "delle", "dei", "non", "con", "per", "sono", "nel", "nella",
        "alla", "il", "la", "un", "destra", "sinistra", "el", "los", "las", "y", "por", "para", "sin", "se", "una",
        "derecho", "izquierdo", "derecha", "izquierda",
    }
)  # fmt: skip
# Word -> the languages it speaks for, one bit each, so that counting runs no Python code per word.
_SPEAKS_FOR = {
    word: 4 * (word in _OTHER) + 2 * (word in _FRENCH) + (word in _ENGLISH) for word in _ENGLISH | _FRENCH | _OTHER
}
_FRENCH_ACCENT = re.compile("[éèêàùçœûîôâëï]")
LEAD = 2  # more words than for the other one: a sentence of a report in two languages tells
ACCENT_WEIGHT = 0.3  # of a word; German and Spanish have accents too, on fewer letters


def within(span: Span, places: Iterable[Span]) -> bool:
    """Whether one of the places holds the span."""
    start, end = span
    for first, last in places:  # noqa: SIM110 - a generator for `any` costs more than all comparisons
        if first <= start and end <= last:
            return True
    return False


def detect(text: str) -> Language:
    """The language most of the document is in; "unknown" where no word tells, or where they tell of a third one."""
    english, french, other = _votes(text[:SAMPLE_CHARACTERS])
    if english > french and english > other:
        return "en"
    if french > english and french > other:
        return "fr"
    return "unknown"


def languages_of(text: str, spans: Sequence[Span], language: Language) -> tuple[Language, ...]:
    """The language of each span of a document in `language`, which a span that does not clearly tell takes.

    Most documents are in one, which is seen at once: nowhere else stand as many words of the other.
    """
    english, french, _ = _votes(text[:SAMPLE_CHARACTERS])
    if min(english, french) < LEAD:
        return (language,) * len(spans)
    return tuple(_language_of(text[start:end], language) for start, end in spans)


def clear_language(text: str) -> Literal["en", "fr", "other"] | None:
    """The language that `LEAD` words or more speak for, and half as many at most for another; None where none is.

    "other" stands for Dutch, German, Italian or Spanish.
    """
    votes = dict(zip(("en", "fr", "other"), _votes(text[:SAMPLE_CHARACTERS]), strict=True))
    second, first = sorted(votes, key=lambda name: votes[name])[1:]
    clear = votes[first] >= LEAD and votes[second] <= votes[first] / 2
    return cast(Literal["en", "fr", "other"], first) if clear else None


def _language_of(text: str, otherwise: Language) -> Language:
    english, french, other = _votes(text)
    if english >= LEAD + french and english > other:
        return "en"
    if french >= LEAD + english and french > other:
        return "fr"
    return otherwise


@lru_cache(maxsize=2)  # a document is asked about again when it has been de-identified, which changes few
def _votes(text: str) -> tuple[float, float, float]:
    """How many words speak for English, for French, for neither of them."""
    sample = text.lower()
    words = sample.replace("’", "'").replace("'", "' ").split()
    votes = Counter(filter(None, map(_SPEAKS_FOR.get, words)))
    english, french, other = (sum(n for bits, n in votes.items() if bits & bit) for bit in (1, 2, 4))
    accents = 0 if sample.isascii() else len(_FRENCH_ACCENT.findall(sample))
    return english, french + ACCENT_WEIGHT * accents, other
