"""One sentence of a report, cut into words once and read for everything that depends on no other sentence.

Reports repeat their sentences, so readings are remembered; `extract.py` puts them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from shards.reports.anatomy import Statement, statement
from shards.reports.distil import Mentions, mentions
from shards.reports.entities import Said, in_sentence
from shards.reports.language import Language
from shards.reports.lexicon.anatomy import folded
from shards.reports.lexicon.terms import Pieces, cut

REMEMBERED = 8_192  # sentences whose readings are kept in memory


class Reading(NamedTuple):
    """What one sentence says; all spans count in it."""

    entities: Sequence[Said]
    statement: Statement
    mentions: Mentions


@lru_cache(maxsize=REMEMBERED)
def read(lowered: str, language: Language, places: Language, placed: bool) -> Reading:
    """A sentence by rules. `lowered`: in lower case; `language`: its own, other than fr read as en; `places`: of which
    words of place are looked for; `placed`: whether it stands where findings are told, or only entities are read."""
    sentence = cut(lowered)
    return reading(sentence, in_sentence(sentence, "fr" if language == "fr" else "en"), places, placed)


def reading(sentence: Pieces, entities: Sequence[Said], places: Language, placed: bool) -> Reading:
    """What follows from the entities of a sentence, whoever found them."""
    words = folded(sentence)
    said = statement(words, entities, places, placed=placed)
    return Reading(entities, said, mentions(sentence.text, words, said, entities, places) if placed else Mentions())
