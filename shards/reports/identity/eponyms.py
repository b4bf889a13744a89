"""Whether a name stands for a disease, a sign or a device, and so for nobody: "maladie de Paget", "Carpentier ring"."""

from __future__ import annotations

from shards.reports.identity.gazetteers import Word, table
from shards.reports.identity.view import LOWER, TITLE_CASE, View

_LINKS = table("eponym_links")  # between the head and the name: "signe de", "classification selon"
_NO_ENGLISH_HEADS = table("no_english_heads")  # words that follow a name without being named after it
_LINKS_MAX = 4
_NAMES_BEHIND_MAX = 2  # further names before an English head: "Legg-Calve-Perthes disease"
_HEAD_DISTANCE_MAX = 24  # characters from the head's end to the name


def eponym(view: View, index: int) -> bool:
    """Whether the word stands in a disease, sign or device: "maladie de X", "X ring", "X's disease"."""
    return _behind_head(view, index) or _before_head(view, index)


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
    return len(between) < _HEAD_DISTANCE_MAX and "\n" not in between and "." not in between


def _is_link_gap(gap: str) -> bool:
    return gap.strip() == "" or gap in ("'", "’", "-")


def _is_link(view: View, index: int) -> bool:
    """A preposition or article, or another name of the same eponym."""
    if view.words[index] in _LINKS:
        return True
    named = view.shapes[index] == TITLE_CASE and view.flags[index] & Word.EPONYM
    return bool(named) and view.gap(index) in ("-", " ")


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


def _is_further_name(view: View, index: int) -> bool:
    capital = view.shapes[index] != LOWER and not view.flags[index] & Word.EPONYM_HEAD
    return capital and view.gap(index - 1) in (" ", "-", "–")
