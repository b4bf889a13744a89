"""How far a name reaches once one word of it is known, and the claim of it: what all rules for names share.

A name runs over first names, initials, particles and surnames joined by spaces, hyphens or apostrophes. It ends before
words of the language, unless a title or a field makes them a name ("Dr Avril", "Nom : PETIT").
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from shards.reports.identity.gazetteers import Word, table
from shards.reports.identity.view import INITIAL, LOWER, TITLE_CASE, UPPER, Kind, View

NAME = Word.FIRST | Word.LAST
_ACRONYM_MAX = 5  # letters
TITLES_MAX = 4  # titles or initials in a row
_WORDS_MAX = 7  # a name of more words is a sentence in capitals
_WORDS_BEFORE_MAX = 3  # words of a name before the one that showed it
LEADING_PARTICLES = table("leading_particles")
_SHORT_FIRST_NAMES = table("short_first_names")
DEGREES = table("degrees")
_APOSTROPHES = ("'", "’")
_JOINTS = frozenset((" ", "-", "'", "’", "  ", " -", "- ", " - "))
_JOINTS_BEHIND_INITIAL = frozenset((".", ". ", ".-", ".\n", "\n", ". - "))
_LIST_JOINT = re.compile(r"\s?[,;/&]\s{0,2}| - ")


def joins(gap: str, *, behind_initial: bool = False) -> bool:
    """Whether two words on both sides of `gap` may belong to one name."""
    return gap in _JOINTS or (behind_initial and gap in _JOINTS_BEHIND_INITIAL)


def joined_next(view: View, index: int) -> int | None:
    """The word behind `index` if it may belong to the same name."""
    following = index + 1
    if following < len(view.words) and joins(view.gap(index), behind_initial=view.shapes[index] == INITIAL):
        return following
    return None


def claim(view: View, first: int, last: int, kind: Kind, told: set[str] | None) -> None:
    """Claim words [first, last]; their plain forms enter `told` where that is given."""
    end = view.ends[last]
    if view.shapes[last] == INITIAL and view.text[end : end + 1] == ".":
        end += 1
    view.claim(view.starts[first], end, kind, "gazetteer")
    if told is not None:
        told.update(
            view.words[index]
            for index in range(first, last + 1)
            if view.ends[index] - view.starts[index] > 2 and not view.flags[index] & (Word.STOP | Word.PARTICLE)
        )


def claim_from(view: View, index: int, kind: Kind, told: set[str], *, sure: bool, listed: bool = False) -> None:
    """Claim the name that begins at word `index`, and further ones joined by a comma, "et" or "and".

    `sure`: even a common word is a name here. `listed`: after a colon, where names may be written in lower case.
    """
    last = None if is_label(view, index) else name_end(view, index, sure=sure, lower=listed or sure)
    if last is None:
        return
    claim(view, index, last, kind, told)
    claim_list(view, last, kind, told, listed=listed, sure=sure)


def is_label(view: View, index: int) -> bool:
    """Whether a word is the next field of a form, where the one before was left empty: "Prénom : Sexe : M"."""
    flag = view.flags[index]
    return bool(flag & Word.COMMON) and not flag & NAME and view.gap(index).lstrip(" ").startswith(":")


def claim_list(view: View, last: int, kind: Kind, told: set[str], *, listed: bool = False, sure: bool = False) -> None:
    """Claim further names behind the one that ends at word `last`."""
    while True:
        following = _next_in_list(view, last)
        if following is None:
            return
        end = _listed_end(view, following, listed=listed, sure=sure)
        if end is None:
            return
        claim(view, following, end, kind, told)
        last = end


def claim_around(view: View, index: int, told: set[str] | None) -> None:
    """Claim the name that word `index` belongs to, with the surname before it in either order."""
    last = name_end(view, index, sure=True, lower=False)
    if last is not None:
        claim(view, _name_start(view, index), last, "person_name", told)


# --- names in a row ---


def _next_in_list(view: View, last: int) -> int | None:
    """First word of what a comma, a slash, "et" or "and" joins to the name that ends at `last`."""
    following = last + 1
    while following < len(view.words) and view.words[following] in DEGREES and view.shapes[following] == UPPER:
        if view.gap(following - 1) not in (" ", ", "):
            break
        following += 1
    if following >= len(view.words):
        return None
    gap = view.gap(following - 1)
    if view.words[following] in ("et", "and") and gap == " " and following + 1 < len(view.words):
        gap, following = ",", following + 1
    if not _LIST_JOINT.fullmatch(gap) or view.flags[following] & (Word.TITLE | Word.ROLE | Word.STOP):
        return None
    return following


def _listed_end(view: View, index: int, *, listed: bool, sure: bool) -> int | None:
    """Last word of the name at `index` of a list, None where no name is."""
    flag, shape = view.flags[index], view.shapes[index]
    before_name = index + 1 < len(view.words) and view.flags[index + 1] & NAME
    field = listed and sure and shape != LOWER  # "Prénoms : Anne, Rose"
    known = flag & Word.FIRST and (not flag & Word.COMMON or (listed and before_name) or field)
    looks_like_one = shape != LOWER and not flag & Word.COMMON and not view.in_capitals(index)
    acronym = shape == UPPER and len(view.words[index]) <= _ACRONYM_MAX and not flag & NAME and not before_name
    if acronym or not (known or looks_like_one or shape == INITIAL):
        return None
    end = name_end(view, index, sure=field and bool(flag & Word.FIRST), lower=listed)
    if end != index or known:
        return end
    # One word alone: an initial is none, an unknown word one only where names were announced.
    return end if shape != INITIAL and (flag & NAME or listed or sure) else None


# --- forwards ---


def name_end(view: View, index: int, *, sure: bool, lower: bool) -> int | None:
    """Last word of the name that begins at `index`, or None when no name does."""
    reading = _Reading(view=view, begin=index, position=index, sure=sure, lower=lower)
    while reading.position < len(view.words) and reading.position - index < _WORDS_MAX and reading.takes_word():
        pass
    if reading.last is None or all(_is_initials(view, word) for word in range(index, reading.last + 1)):
        return None  # initials alone are what published cases leave of a name: they point at nobody
    return reading.last


def _is_initials(view: View, index: int) -> bool:
    length = len(view.words[index])
    return length == 1 or (length == 2 and view.shapes[index] == UPPER and not view.flags[index] & NAME)


@dataclass(slots=True, kw_only=True)
class _Reading:
    """A name being read word by word: `last` is the last word that belongs to it, `position` the next to look at."""

    view: View
    begin: int
    position: int
    sure: bool  # even a common word is a name here
    lower: bool  # names may be written in lower case
    last: int | None = None
    firsts_only: bool = True  # first names and initials so far: a surname is still to come

    def takes_word(self) -> bool:
        """Take the next word, or the next ones where they go together; False where the name ends before it."""
        if not self.view.free(self.position) or not self._is_joined():
            return False
        return self._takes_small() if self.view.shapes[self.position] == LOWER else self._takes_capitalised()

    def _take(self, count: int = 1) -> bool:
        self.last = self.position + count - 1
        self.position += count
        return True

    def _is_joined(self) -> bool:
        view, position = self.view, self.position
        if position == self.begin:
            return True
        gap, before = view.gap(position - 1), position - 1
        short = gap in (". ", ".") and view.words[before] in _SHORT_FIRST_NAMES and view.shapes[before] == TITLE_CASE
        return joins(gap, behind_initial=view.shapes[before] == INITIAL) or short or self._is_behind_comma(gap)

    def _is_behind_comma(self, gap: str) -> bool:
        """A first name behind a surname of one word and a comma: "KERVADEC, Yann"."""
        view, flag = self.view, self.view.flags[self.position]
        return (
            gap in (", ", ",")
            and self.last == self.begin
            and view.shapes[self.begin] in (UPPER, TITLE_CASE)
            and flag & (Word.FIRST | Word.COMMON) == Word.FIRST
            and view.shapes[self.position] != LOWER
        )

    def _is_hyphened(self) -> bool:
        return self.position > self.begin and self.view.gap(self.position - 1) in ("-", *_APOSTROPHES)

    # Words in lower case.

    def _takes_small(self) -> bool:
        flag = self.view.flags[self.position]
        if flag & Word.PARTICLE and self._particle_leads_on():
            self.position += 1  # it belongs to the name only with what follows
            return True
        if self._is_hyphened() and self.last is not None and not flag & Word.STOP:
            return self._take()
        if not self.lower:
            return False
        if self._is_small_initial():
            return self._take(2)
        return self._may_be_small_name() and self._take()

    def _particle_leads_on(self) -> bool:
        """Whether a name follows the particle at hand: "van der Berg", "de La Tour"."""
        view, after = self.view, self.position + 1
        if after >= len(view.words) or not joins(view.gap(self.position)):
            return False
        if self.last is None and not self.sure and view.words[self.position] not in LEADING_PARTICLES:
            return False
        if view.shapes[after] == LOWER and view.flags[after] & Word.PARTICLE and after + 1 < len(view.words):
            after += 1
        if view.shapes[after] in (TITLE_CASE, UPPER):
            return True
        named = self.sure or view.flags[after] & NAME
        return self.lower and bool(named) and not view.flags[after] & (Word.COMMON | Word.STOP)

    def _is_small_initial(self) -> bool:
        """ "r. poumonet": a letter with a dot, before a word that is no common one."""
        view, position = self.view, self.position
        return (
            len(view.words[position]) == 1
            and view.gap(position) in (".", ". ")
            and position + 1 < len(view.words)
            and not view.flags[position + 1] & Word.COMMON
        )

    def _may_be_small_name(self) -> bool:
        flag = self.view.flags[self.position]
        if flag & Word.STOP:
            return False
        if self.last is None:
            return not flag & Word.COMMON and bool(flag & NAME or self.sure)
        if self.view.shapes[self.last] != LOWER:
            return False  # a name that began with a capital goes on with one
        if flag & NAME:
            return True
        return not flag & Word.COMMON and self.position - self.begin <= 1

    # Words with a capital.

    def _takes_capitalised(self) -> bool:
        view, position = self.view, self.position
        particles = self._particles_in_capitals()
        if particles:
            self.firsts_only = False
            return self._take(particles + 1)
        if not self._may_be_part():
            return False
        if view.shapes[position] != INITIAL and not view.flags[position] & Word.FIRST:
            self.firsts_only = False
        return self._take()

    def _particles_in_capitals(self) -> int:
        """How many particles with a capital stand before a word that may be a name: "Durègne Le Martelleur"."""
        view, after = self.view, self.position
        if self.position == self.begin and not self.sure:
            return 0
        while after - self.position < 2 and self._is_particle_with_capital(after):
            after += 1
        if after == self.position or after >= len(view.words) or view.shapes[after] == LOWER:
            return 0
        named = not view.flags[after] & Word.COMMON or view.flags[after] & NAME
        return after - self.position if named else 0

    def _is_particle_with_capital(self, index: int) -> bool:
        view = self.view
        return (
            index < len(view.words)
            and bool(view.flags[index] & Word.PARTICLE)
            and view.shapes[index] in (TITLE_CASE, UPPER)
            and joins(view.gap(index))
        )

    def _may_be_part(self) -> bool:
        view, position = self.view, self.position
        flag, shape = view.flags[position], view.shapes[position]
        begins = position == self.begin
        if shape == INITIAL:
            return begins or not flag & Word.STOP or view.text[view.ends[position] : view.ends[position] + 1] == "."
        if flag & Word.STOP and not (self._is_first_name_for_sure() or self._is_two_initials()):
            return False
        if flag & Word.STREET and not flag & NAME:
            return False
        if self._is_hyphened():
            return True
        if flag & (Word.TITLE | Word.ROLE) and not begins and not flag & NAME:
            return False
        if flag & Word.COMMON and not (self._common_may_begin() if begins else self._common_may_continue()):
            return False
        return begins or not self._is_acronym()

    def _is_first_name_for_sure(self) -> bool:
        """A first name that is also a stop word ("Marc", "Nina"), as no heading writes it."""
        view, position = self.view, self.position
        capitals = view.in_capitals(position)
        return bool(view.flags[position] & Word.FIRST) and view.shapes[position] == TITLE_CASE and not capitals

    def _is_two_initials(self) -> bool:
        """ "Pr PA Sorensen": two letters right behind a title, before a word with a capital."""
        view, position, after = self.view, self.position, self.position + 1
        return (
            self.sure
            and position == self.begin
            and view.shapes[position] == UPPER
            and len(view.words[position]) == 2
            and after < len(view.words)
            and view.gap(position) == " "
            and view.shapes[after] == TITLE_CASE
            and not view.flags[after] & Word.COMMON
        )

    def _common_may_begin(self) -> bool:
        """A common word opens a name after a title or field, or where it is also a name and a surname follows."""
        view, position, after = self.view, self.position, self.position + 1
        if self.sure:
            return True
        if not view.flags[position] & NAME or view.in_capitals(self.begin) or after >= len(view.words):
            return False
        follows = joins(view.gap(position)) and view.shapes[after] != LOWER
        return follows and not (view.flags[after] & Word.COMMON and not view.flags[after] & NAME)

    def _common_may_continue(self) -> bool:
        """A common word goes on with a name where it is also a name, or is the surname behind first names."""
        view, position = self.view, self.position
        flag, shape = view.flags[position], view.shapes[position]
        if flag & NAME:
            return True
        if view.in_capitals(self.begin) or position - self.begin >= 3:
            return False
        if self.firsts_only and not flag & (Word.MONTH | Word.NUMBER):
            return True
        behind_title_case = self.last is not None and view.shapes[self.last] == TITLE_CASE
        return shape == UPPER and behind_title_case and view.ends[position] - view.starts[position] > 4

    def _is_acronym(self) -> bool:
        """Short, in capitals, unknown, behind a whole name: "Jean Dupont IRM"."""
        view, position = self.view, self.position
        return (
            view.shapes[position] == UPPER
            and len(view.words[position]) < 4
            and not view.flags[position] & (NAME | Word.PARTICLE)
            and view.shapes[position - 1] == TITLE_CASE
            and not self.firsts_only
        )


# --- backwards ---


def _name_start(view: View, index: int) -> int:
    """First word of the name that word `index` belongs to."""
    first = index
    while first > 0 and index - first < _WORDS_BEFORE_MAX and view.free(first - 1):
        if not _may_stand_before(view, first, index):
            break
        first -= 1
    return first


def _may_stand_before(view: View, first: int, index: int) -> bool:
    """Whether the word before `first` belongs to the name that word `index` showed."""
    before = first - 1
    gap, flag, shape = view.gap(before), view.flags[before], view.shapes[before]
    if gap not in (" ", "-", "  ", *_APOSTROPHES) and not _is_surname_with_comma(view, before, gap):
        return False
    hyphen = gap == "-"
    if flag & Word.PARTICLE and (_is_inner_particle(view, before, first, index) or _is_leading(view, before)):
        return True
    if flag & (Word.STOP | Word.TITLE | Word.ROLE | Word.HOSPITAL | Word.STREET) and not hyphen:
        return False
    if shape == LOWER or (shape == INITIAL and gap not in ("-", *_APOSTROPHES)):
        return False
    if flag & Word.COMMON and not hyphen and not _is_surname_of(view, before, index):
        return False
    return shape != UPPER or bool(flag & NAME) or len(view.words[before]) >= 4 or hyphen


def _is_surname_with_comma(view: View, before: int, gap: str) -> bool:
    """ "KERVADEC, Yann" anywhere; "Kervadec, Yann" where a line begins with it."""
    surname = view.shapes[before] == UPPER and view.flags[before] & NAME and not view.in_capitals(before)
    if gap not in (", ", ",") or (view.flags[before] & Word.COMMON and not surname):
        return False
    opens_line = not before or "\n" in view.gap(before - 1) or ":" in view.gap(before - 1)
    unknown = not view.flags[before] & (Word.CITY_START | Word.EPONYM)
    return view.shapes[before] == UPPER or (view.shapes[before] == TITLE_CASE and opens_line and unknown)


def _is_inner_particle(view: View, before: int, first: int, index: int) -> bool:
    """A particle between two words of the name: "Bossche van den Yann"."""
    if first == index or not before or view.flags[before] & Word.STOP:
        return False
    return view.shapes[before - 1] in (UPPER, TITLE_CASE) and not view.flags[before - 1] & Word.COMMON


def _is_leading(view: View, before: int) -> bool:
    """ "LE GOFF Yann", "Van den Bossche": a particle in the capitals of the surname it opens."""
    shape = view.shapes[before]
    if shape == UPPER:
        return view.shapes[before + 1] == UPPER and not view.in_capitals(before)
    return (
        shape == TITLE_CASE and view.words[before] in LEADING_PARTICLES and view.words[before] not in ("de", "d", "l")
    )


def _is_surname_of(view: View, before: int, index: int) -> bool:
    """Whether a common word is the surname before first name `index`: "PETIT Yann", "par Petit Yann"."""
    if view.in_capitals(index):
        return False
    flag, length = view.flags[before], len(view.words[before])
    if view.shapes[before] == UPPER:
        return view.shapes[index] == TITLE_CASE and (length > 4 or (length > 2 and bool(flag & NAME)))
    inside = before > 0 and view.gap(before - 1) not in (". ", "\n")
    return view.shapes[before] == TITLE_CASE and bool(flag & NAME) and inside
