"""Whether a name stands for a disease, a sign or a device, and so for nobody: "maladie de Paget", "Garden IV"."""

from __future__ import annotations

import re

from shards.reports.identity.gazetteers import Word, table
from shards.reports.identity.view import LOWER, TITLE_CASE, View

_LINKS = table("eponym_links")  # between the head and the name: "signe de", "classification selon"
_NO_ENGLISH_HEADS = table("no_english_heads")  # words that follow a name without being named after it
_GRADES = frozenset(("a", "b", "c", "d", "e", "f", "i", "ii", "iii", "iv", "v", "vi"))
_LINKS_MAX = 4
_NAMES_BEHIND_MAX = 2  # further names before an English head: "Legg-Calve-Perthes disease"
_PERSON = Word.FIRST | Word.LAST
# Behind a score: no age, no house number, no part of a date or of a longer number.
_FIGURE = re.compile(
    r" (?:[<>=] ?)?(?:\d{1,3}(?:[.,]\d{1,2})?(?: ?/ ?\d{1,3}|[ab])?|(?:i{1,3}|iv|vi{0,3}|i?x)[ab]?)"
    r"(?![\w/]|[.,\-]\w| \d| ?(?:ans|mois|jours|bis|ter|rue|av|avenue|bd|boulevard|place|chemin|route"
    r"|allee|impasse)(?!\w))"
)
_HEAD_DISTANCE_MAX = 24  # characters from the head's end to the name


def eponym(view: View, index: int) -> bool:
    """Whether the word stands in a disease, sign or device: "maladie de X", "X ring", "X's disease", "X-Giemsa"."""
    return (
        _behind_head(view, index)
        or _before_head(view, index)
        or _beside_eponym(view, index)
        or _is_authority(view, index)
    )


def measured(view: View, index: int) -> bool:
    """Whether a name that no list of persons holds, or an eponym, stands before a figure: "Fazekas 2", "Garden IV"."""
    last = index
    while last + 1 < len(view.words) and last - index < _NAMES_BEHIND_MAX and _is_further_name(view, last + 1):
        last += 1
    for word in range(index, last + 1):
        flag = view.flags[word]
        if flag & _PERSON and not flag & (Word.EPONYM | Word.COMMON):
            return False
    return _FIGURE.match(view.masked, view.ends[last]) is not None and not view.in_capitals(index)


def _behind_head(view: View, index: int) -> bool:
    """ "maladie de X", "syndrome de Guillain-X"."""
    if not index or not _is_link_gap(view.gap(index - 1)):
        return False
    before, links = index - 1, 0
    while before >= 0 and links < _LINKS_MAX and _is_link(view, before):
        before, links = before - 1, links + 1
    if before < 0 or not view.flags[before] & Word.EPONYM_HEAD:
        return False
    between = view.text[view.ends[before] : view.starts[index]]
    if len(between) >= _HEAD_DISTANCE_MAX or "." in between:
        return False
    return "\n" not in between or (links > 0 and between.count("\n") == 1)  # "maladie de" at the end of a line


def _is_link_gap(gap: str) -> bool:
    return gap.strip() == "" or gap in ("'", "’", "-")


def _is_link(view: View, index: int) -> bool:
    """A preposition or article, a grade ("classe C de"), or another name of the same eponym ("de Pell et")."""
    if view.words[index] in _LINKS:
        return True
    gap = view.gap(index)
    if view.shapes[index] != TITLE_CASE:
        return view.words[index] in _GRADES
    joined = gap == " " and (view.flags[index] & Word.EPONYM or view.words[index + 1] in ("et", "and"))
    return gap == "-" or bool(joined)


def _is_authority(view: View, index: int) -> bool:
    """ "selon Lichtenstein", "selon Regan et Morrey": whose rule was followed; "selon Marie" is a relative's word."""
    flag, before = view.flags[index], index - 1
    if view.shapes[index] != TITLE_CASE or (flag & Word.FIRST and not flag & Word.EPONYM):
        return False
    if before > 1 and view.words[before] in ("et", "and") and view.shapes[before - 1] == TITLE_CASE:
        before -= 2
    return before >= 0 and view.words[before] == "selon" and view.gap(before) == " "


def _before_head(view: View, index: int) -> bool:
    """ "X ring", "X's disease", "X-Y syndrome": English order."""
    after, last = index + 1, len(view.words)
    if after < last and view.words[after] == "s" and view.gap(index) in ("'", "’"):
        after += 1
    names = 0
    while after < last and names < _NAMES_BEHIND_MAX and _is_further_name(view, after):
        after, names = after + 1, names + 1
    return (
        after < last
        and bool(view.flags[after] & Word.EPONYM_HEAD)
        and view.shapes[after] == LOWER
        and view.gap(after - 1) in (" ", "-")
        and view.words[after] not in _NO_ENGLISH_HEADS
    )


def _beside_eponym(view: View, index: int) -> bool:
    """Whether a hyphen joins the word to one that is an eponym and nobody's name."""
    for step in (-1, 1):
        other = index + step
        while 0 <= other < len(view.words) and view.gap(min(other, other - step)) == "-":
            if view.flags[other] & (Word.EPONYM | _PERSON) == Word.EPONYM and view.shapes[other] != LOWER:
                return True
            other += step
    return False


def _is_further_name(view: View, index: int) -> bool:
    capital = view.shapes[index] != LOWER and not view.flags[index] & Word.EPONYM_HEAD
    return capital and view.gap(index - 1) in (" ", "-", "–")
