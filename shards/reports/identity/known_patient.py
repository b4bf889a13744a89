"""What the hospital's own record says about the patient, looked for in the text however it is written.

Names may hold one typing error, be broken at a line end, spelt in spaced letters or glued to another. A name that is
also a word of medicine ("Côte", "Mass", "Paget") goes only where it stands as a name: findings stay.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import permutations

from shards.reports.identity.dates import distance
from shards.reports.identity.eponyms import eponym
from shards.reports.identity.gazetteers import MONTHS, Word, plain
from shards.reports.identity.mentions import stands_as_name, titled
from shards.reports.identity.view import LOWER, TITLE_CASE, Kind, View

_FUZZY_FROM = 5  # shorter names must match exactly: one letter more or less makes another word of them
_INSIDE_FROM = 6  # shorter names are parts of too many words
_SPELT_FROM = 4  # letters of a name found inside a row of spaced letters
_ID_CHARACTERS_MIN = 4
_LINE_BREAK = re.compile(r"(- {0,2}\n {0,4}|- {1,2})|\n {0,4}")  # the group: with a hyphen
_SPACED_LETTERS = re.compile(r"(?<!\w)[^\W\d_](?:[ .\-_]{1,3}[^\W\d_](?!\w)){2,}")
_SEPARATOR = r"[ ./|,\-]{0,3}"
_NUMBER = re.compile(r"[0-9]+")
_DAY_FIRST = re.compile(rf"(\d\d?){_SEPARATOR}(\d\d?){_SEPARATOR}(\d{{4}}|\d\d)(?!\d)")
_YEAR_FIRST = re.compile(rf"(\d{{4}}){_SEPARATOR}(\d\d?){_SEPARATOR}(\d\d?)(?!\d)")
# Around the month's name, which stands between them.
_DAY_BEFORE_NAME = re.compile(rf"(?<!\d)(\d\d?)(?:er|st|nd|rd|th)?{_SEPARATOR}\Z")
_DAY_BEHIND_NAME = re.compile(rf"\.? ?(\d\d?)(?:st|nd|rd|th)?{_SEPARATOR}(\d{{4}}|\d\d)(?!\d)")
_YEAR_BEHIND_NAME = re.compile(rf"\.?{_SEPARATOR}(\d{{4}}|\d\d)(?!\d)")
_DAY_WIDTH = 8  # characters before the month's name


@dataclass(frozen=True, kw_only=True)
class KnownPatient:
    """Fields of the patient's record; what is not known stays empty. Never shown: repr tells nothing.

    `key` is any text that is equal for all documents of the person, such as the hospital's id.
    """

    key: str = field(repr=False)
    first_names: tuple[str, ...] = field(default=(), repr=False)
    last_names: tuple[str, ...] = field(default=(), repr=False)
    birth_date: datetime.date | None = field(default=None, repr=False)
    ids: tuple[str, ...] = field(default=(), repr=False)
    address: str = field(default="", repr=False)
    city: str = field(default="", repr=False)
    phones: tuple[str, ...] = field(default=(), repr=False)


def find(view: View, patient: KnownPatient) -> None:
    """Claim every mention of the record's fields."""
    _names(view, patient)
    _numbers(view, patient)
    if patient.birth_date is not None and view.longest_number >= 2:
        _birth_date(view, patient.birth_date)
    _place(view, patient.address, "address")
    _place(view, patient.city, "city")


# --- names ---


def _names(view: View, patient: KnownPatient) -> None:
    firsts = [_letters(name) for name in patient.first_names]
    lasts = [_letters(name) for name in patient.last_names]
    wanted = frozenset(part for parts in (*firsts, *lasts) for part in parts if len(part) > 1)
    if not wanted:
        return
    glued = {
        "".join((*pair[0], *pair[1])) for first in firsts for last in lasts for pair in permutations((first, last))
    }
    known = _written_as(view, wanted, wanted | glued)
    if known:
        for index, word in enumerate(view.words):
            if word in known and _is_person(view, index, wanted):
                _note(view, view.starts[index], view.ends[index])
    _broken_names(view, wanted)
    _spaced_names(view, wanted)


def _letters(name: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", plain(name))


def _note(view: View, start: int, end: int) -> None:
    view.note(start, end, "patient_name", "patient")


def _written_as(view: View, wanted: frozenset[str], whole: frozenset[str]) -> set[str]:
    """Words of the document that write one of the names: whole, with one typing error, or with letters glued to it."""
    common = Word.COMMON | Word.PARTICLE
    found = set()
    for word, flag in set(zip(view.words, view.flags, strict=True)):
        if word in whole or (not flag & common and (_misspelt(word, wanted) or _holds_name(word, wanted))):
            found.add(word)
    return found


def _misspelt(word: str, wanted: frozenset[str]) -> bool:
    return len(word) >= _FUZZY_FROM - 1 and any(
        len(name) >= _FUZZY_FROM and distance(word, name, 2) < 2 for name in wanted
    )


def _holds_name(word: str, wanted: frozenset[str]) -> bool:
    return len(word) > _INSIDE_FROM and any(len(name) >= _INSIDE_FROM and name in word for name in wanted)


def _is_person(view: View, index: int, wanted: frozenset[str]) -> bool:
    """Whether this mention is the person and no finding: not "5EME COTE", "IMPRESSION: Mass." or "maladie de Paget"."""
    flag = view.flags[index]
    if titled(view, index):
        return True
    if eponym(view, index):
        return False
    if not flag & (Word.COMMON | Word.FINDING | Word.PARTICLE):
        return True
    if view.shapes[index] == LOWER:
        return False
    doubt = Word.EPONYM | Word.PARTICLE | Word.FINDING
    first_name = flag & Word.FIRST and view.shapes[index] == TITLE_CASE and not flag & doubt
    return bool(first_name) or stands_as_name(view, index, wanted)


def _broken_names(view: View, wanted: frozenset[str]) -> None:
    """A name that goes on in the next line, with a hyphen or, where nothing is misspelt, without."""
    for match in _LINE_BREAK.finditer(view.plain):
        second = view.first_word_from(match.end())
        first = second - 1
        if first < 0 or second >= len(view.words):
            continue
        if view.ends[first] != match.start() or view.starts[second] != match.end():
            continue
        joined = view.words[first] + view.words[second]
        if joined in wanted or (match[1] and _misspelt(joined, wanted) and not view.is_common(joined)):
            _note(view, view.starts[first], view.ends[second])


def _spaced_names(view: View, wanted: frozenset[str]) -> None:
    """A name in letters that stand apart: "Q U I N T R E L L"."""
    for match in _SPACED_LETTERS.finditer(view.plain):
        places = [place for place in range(match.start(), match.end()) if view.plain[place].isalpha()]
        spelt = "".join(view.plain[place] for place in places)
        if spelt in wanted or _misspelt(spelt, wanted):
            _note(view, match.start(), match.end())
        for name in wanted:
            at = spelt.find(name) if len(name) >= _SPELT_FROM else -1
            while at >= 0:
                _note(view, places[at], places[at + len(name) - 1] + 1)
                at = spelt.find(name, at + len(name))


# --- numbers, dates, places ---


def _numbers(view: View, patient: KnownPatient) -> None:
    """Ids and phones, with or without single separators between their characters."""
    if not patient.ids and not patient.phones:
        return
    compact = view.plain.replace(" ", "").replace(".", "").replace("-", "").replace("/", "")
    kinds: tuple[tuple[Kind, tuple[str, ...]], ...] = (("id", patient.ids), ("phone", patient.phones))
    for kind, number in ((kind, number) for kind, numbers in kinds for number in numbers):
        characters = re.sub(r"[^a-z0-9]", "", plain(number))
        # A pattern of its own costs more than the whole report's search: only where the characters are.
        if len(characters) >= _ID_CHARACTERS_MIN and characters in compact:
            pattern = r"[ .\-/]?".join(map(re.escape, characters))
            for match in re.finditer(rf"(?<![a-z0-9]){pattern}(?![a-z0-9])", view.plain):
                view.note(match.start(), match.end(), kind, "patient")


def _place(view: View, place: str, kind: Kind) -> None:
    if len(place) <= 3:
        return
    words = re.findall(r"\w+", plain(place))
    if words and all(word in view.plain for word in words):
        for match in re.finditer(r"(?<!\w)" + r"[\W_]+".join(map(re.escape, words)) + r"(?!\w)", view.plain):
            view.note(match.start(), match.end(), kind, "patient")


def _birth_date(view: View, date: datetime.date) -> None:
    """Both orders of day and month, with or without separators, and the month by its name."""
    short_year = f"{date.year % 100:02d}"
    if short_year not in view.plain:
        return
    for start, end in (*_in_numbers(view, date, short_year), *_with_month_name(view, date)):
        view.note(start, end, "birth_date", "patient")


def _in_numbers(view: View, date: datetime.date, short_year: str) -> Iterator[tuple[int, int]]:
    """ "03/02/1981", "1981-02-03", "3.2.81", "03021981"."""
    days = {(date.day, date.month), (date.month, date.day)}
    compact = {
        f"{a:0{a_width}d}{b:0{b_width}d}{year}"
        for a, b in days for a_width in (1, 2) for b_width in (1, 2) for year in (date.year, short_year)
    }  # fmt: skip
    for number in _NUMBER.finditer(view.plain):
        match = _DAY_FIRST.match(view.plain, number.start())
        if match and int(match[3]) in (date.year, date.year % 100) and (int(match[1]), int(match[2])) in days:
            yield match.span()
        match = _YEAR_FIRST.match(view.plain, number.start())
        if match and (int(match[1]), int(match[2]), int(match[3])) == (date.year, date.month, date.day):
            yield match.span()
        if number.group() in compact:
            yield number.span()


def _with_month_name(view: View, date: datetime.date) -> Iterator[tuple[int, int]]:
    """ "3 févr. 1981", "February 3rd, 1981"."""
    for index in view.marked:
        if MONTHS.get(view.words[index]) != date.month:
            continue
        start, end = view.starts[index], view.ends[index]
        before = _DAY_BEFORE_NAME.search(view.plain[max(0, start - _DAY_WIDTH) : start])
        year = _YEAR_BEHIND_NAME.match(view.plain, end)
        if before and year and int(before[1]) == date.day and int(year[1]) in (date.year, date.year % 100):
            yield start - min(start, _DAY_WIDTH) + before.start(), year.end()
        behind = _DAY_BEHIND_NAME.match(view.plain, end)
        if behind and int(behind[1]) == date.day and int(behind[2]) in (date.year, date.year % 100):
            yield start, behind.end()
