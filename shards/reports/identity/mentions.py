"""Further mentions of a told name: surname alone, possessive, capitals; and the digits beside a name.

A told name that is also a word ("Petit", "Brown", "Côte") is a person only where it stands as one.
"""

from __future__ import annotations

import re
from collections.abc import Set

from shards.reports.identity.eponyms import eponym
from shards.reports.identity.gazetteers import SHORT_TITLES, Word, table
from shards.reports.identity.view import INITIAL, LOWER, TITLE_CASE, View

PERSON_VERBS = table("person_verbs")
_PERSON_PREPOSITIONS = table("person_prepositions")
_NOUN_LEADS = table("noun_leads")
_TITLE_GAP = re.compile(r"\.? {0,2}\n?")
_LOWER_CASE_MIN = 4  # letters; a shorter told name in lower case is more often a word
_UNIT = (
    r"(?![\w.,]*\d| ?(?:%|°|€|\$|/|x\b|[mµ]?[gl]\b|[cmk]?m\b|mm|ui\b|iu\b|h\b|ans\b|years|cells|leuco|copies|euros))"
)
_NUMBER_BEHIND = re.compile(
    rf"_?\d+(?![\w.,]*\d)|[ \-_/#:,(]{{1,3}}(?:n° ?|no\.? )?(?!(?:19|20)\d\d(?!\d))"
    rf"(?=(?:\d[ .\-]?){{4}})\d{{2,}}(?:[ .\-]\d{{2,}})*{_UNIT}"
)
_NUMBER_BEFORE = re.compile(r"(?<![\w.,/])(?:\d{5,}[ \-_#:]{1,2}|\d+)\Z")
_BEFORE_WIDTH = 16  # characters looked back for a number
_NUMBER = re.compile(r"[0-9]{4,}(?!\w)")
_NUMBERED_WORD_MIN = 5  # letters before a number; shorter ones are codes of devices and studies


def find(view: View, told: Set[str]) -> None:
    """Claim every other mention of the told names, then the numbers beside all names."""
    if not told.isdisjoint(view.words):
        for index, word in enumerate(view.words):
            if word in told and view.free(index) and _is_person(view, index, told):
                view.claim(view.starts[index], view.ends[index], "person_name", "gazetteer")
    _numbers_beside(view)


def _is_person(view: View, index: int, told: Set[str]) -> bool:
    flag = view.flags[index]
    if view.shapes[index] == LOWER and (
        flag & (Word.COMMON | Word.FINDING | Word.EPONYM) or len(view.words[index]) < _LOWER_CASE_MIN
    ):
        return False
    return not eponym(view, index) and (not flag & (Word.COMMON | Word.FINDING) or stands_as_name(view, index, told))


def titled(view: View, index: int) -> bool:
    """Whether a title stands right before the word."""
    if not index or not (view.flags[index - 1] & Word.TITLE or view.words[index - 1] in SHORT_TITLES):
        return False
    return _TITLE_GAP.fullmatch(view.gap(index - 1)) is not None


def stands_as_name(view: View, index: int, told: Set[str] = frozenset()) -> bool:
    """Whether a word that is also a common one is a person here, by the words beside it."""
    return (
        titled(view, index)
        or _behind_a_name(view, index, told)
        or _before_a_name(view, index, told)
        or _acts(view, index)
        or _inside_a_sentence(view, index)
    )


def _behind_a_name(view: View, index: int, told: Set[str]) -> bool:
    """After an initial, a first name, another told name or a field: "J. Côte", "Anne Petit", "Nom : Mass"."""
    if not index:
        return False
    before, gap = index - 1, view.gap(index - 1)
    if view.shapes[before] == INITIAL and gap in (". ", "."):
        return True
    if view.flags[before] & Word.ROLE and ":" in gap and "\n" not in gap:
        return True
    return gap in (" ", "-", ", ") and _names_beside(view, before, told)


def _before_a_name(view: View, index: int, told: Set[str]) -> bool:
    return index + 1 < len(view.words) and view.gap(index) in (" ", "-", ", ") and _names_beside(view, index + 1, told)


def _names_beside(view: View, other: int, told: Set[str]) -> bool:
    flag = view.flags[other]
    if view.words[other] in told:
        return not flag & Word.PARTICLE
    return bool(flag & Word.FIRST) and not flag & (Word.COMMON | Word.EPONYM) and view.shapes[other] != LOWER


def _acts(view: View, index: int) -> bool:
    """Before what only a person does or has: "Petit vit seul", "Brown's mother"."""
    if view.shapes[index] == LOWER or index + 1 >= len(view.words):
        return False
    gap, following = view.gap(index), view.words[index + 1]
    return (gap == " " and following in PERSON_VERBS) or (gap in ("'", "’") and following == "s")


def _inside_a_sentence(view: View, index: int) -> bool:
    """A capital inside a line in small letters, where no noun is announced: "vu avec Petit", not "la Côte"."""
    if not index or view.shapes[index] != TITLE_CASE or view.shapes[index - 1] != LOWER:
        return False
    before = view.words[index - 1]
    if before in _PERSON_PREPOSITIONS:
        return view.gap(index - 1) == " "
    return view.gap(index - 1) in (" ", ", ") and before not in _NOUN_LEADS and len(before) > 1


# --- digits ---


def _numbers_beside(view: View) -> None:
    """Claim numbers glued to a name or right beside it ("Smith 556677"), and words that only such a number follows."""
    if not view.longest_number:
        return
    for one in tuple(view.identifiers):
        if one.kind in ("patient_name", "person_name"):
            _claim_beside(view, one.start, one.end)
    if view.longest_number >= 4:
        for match in _NUMBER.finditer(view.masked):
            word = view.first_word_from(match.start()) - 1
            if word >= 0 and view.ends[word] == match.start() and _is_numbered_name(view, word):
                view.claim(view.starts[word], match.end(), "id")


def _is_numbered_name(view: View, word: int) -> bool:
    """ "Quintrell12345": an unknown word that is no code."""
    start = view.starts[word]
    glued = start > 0 and (view.masked[start - 1].isalnum() or view.masked[start - 1] == "_")
    long_enough = view.ends[word] - start >= _NUMBERED_WORD_MIN
    return long_enough and not glued and view.free(word) and not view.flags[word] & Word.COMMON


def _claim_beside(view: View, start: int, end: int) -> None:
    behind = _NUMBER_BEHIND.match(view.masked, end)
    if behind is not None:
        first_digit = next(place for place in range(end, behind.end()) if view.masked[place].isdigit())
        view.claim(first_digit, behind.end(), "id")
    before = _NUMBER_BEFORE.search(view.masked[max(0, start - _BEFORE_WIDTH) : start])
    if before is not None:
        number = before.group().rstrip(" -_#:")
        first_digit = max(0, start - _BEFORE_WIDTH) + before.start()
        view.claim(first_digit, first_digit + len(number), "id")
