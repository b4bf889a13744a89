"""What the hospital's own record says about the patient, looked for in the text however it is written.

Names may hold one typing error, be broken at a line end, spelt in spaced letters or glued to another. A name that is
also a word of medicine ("Côte", "Mass", "Paget") goes only where it stands as a name: findings stay.
"""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass, field

from shards.reports.identity.dates import distance
from shards.reports.identity.eponyms import eponym
from shards.reports.identity.gazetteers import MONTHS, Word, plain
from shards.reports.identity.mentions import stands_as_name, titled
from shards.reports.identity.view import LOWER, TITLE_CASE, Kind, View

_FUZZY_FROM = 5  # shorter names must match exactly: one letter more or less makes another word of them
_INSIDE_FROM = 6  # shorter names are parts of too many words
_SPELT_FROM = 4  # letters of a name found inside a row of spaced letters
_ID_CHARACTERS_MIN = 4
# The second word is looked at and not consumed: it may be broken again.
_BROKEN_WORD = re.compile(r"(?<![^\W\d_])([^\W\d_]+)(?:(- {0,2}\n {0,4}|- {1,2})|\n {0,4})(?=([^\W\d_]+))")
_SPACED_LETTERS = re.compile(r"(?<!\w)[^\W\d_](?:[ .\-_]{1,3}[^\W\d_](?!\w)){2,}")
_SEPARATOR = r"[ ./|,\-]{0,3}"
_DAY_FIRST = re.compile(rf"(?<!\d)(?=(\d\d?){_SEPARATOR}(\d\d?){_SEPARATOR}(\d{{4}}|\d\d)(?!\d))")
_YEAR_FIRST = re.compile(rf"(?<!\d)(?=(\d{{4}}){_SEPARATOR}(\d\d?){_SEPARATOR}(\d\d?)(?!\d))")
_COMPACT = re.compile(r"(?<!\d)\d{5,8}(?!\d)")
_MONTH_NAMES = "|".join(sorted(MONTHS, key=len, reverse=True))
_DAY_BEFORE_NAME = re.compile(
    rf"(?<!\d)(\d\d?)(?:er|st|nd|rd|th)?{_SEPARATOR}({_MONTH_NAMES})\.?{_SEPARATOR}(\d{{4}}|\d\d)(?!\d)"
)
_DAY_BEHIND_NAME = re.compile(
    rf"(?<![^\W\d_])({_MONTH_NAMES})\.? ?(\d\d?)(?:st|nd|rd|th)?{_SEPARATOR}(\d{{4}}|\d\d)(?!\d)"
)
_ID_SEPARATORS = str.maketrans("", "", " .-/")


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
    for kind, numbers in (("id", patient.ids), ("phone", patient.phones)):
        _numbers(view, numbers, kind)  # type: ignore[arg-type]
    if patient.birth_date is not None and view.longest_number >= 2:
        _birth_date(view, patient.birth_date)
    _place(view, patient.address, "address")
    _place(view, patient.city, "city")


# --- names ---


def _names(view: View, patient: KnownPatient) -> None:
    parts = [part for name in (*patient.first_names, *patient.last_names) for part in _letters(name)]
    wanted = frozenset(part for part in parts if len(part) > 1)
    if not wanted:
        return
    glued = {
        "".join((*_letters(first), *_letters(last))[::order])
        for first in patient.first_names for last in patient.last_names for order in (1, -1)
    }  # fmt: skip
    known = _written_as(view, wanted, wanted | glued)
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
    if "-" not in view.plain and "\n" not in view.plain:
        return
    for match in _BROKEN_WORD.finditer(view.plain):
        joined = match[1] + match[3]
        if joined in wanted or (match[2] and _misspelt(joined, wanted) and not view.is_common(joined)):
            _note(view, match.start(), match.end(3))


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


def _numbers(view: View, numbers: tuple[str, ...], kind: Kind) -> None:
    """Ids and phones, with or without single separators between their characters."""
    compact = view.plain.translate(_ID_SEPARATORS) if numbers else ""
    for number in numbers:
        characters = re.sub(r"[^a-z0-9]", "", plain(number))
        # A pattern of its own costs more than the whole report's search: only where the characters are.
        if len(characters) >= _ID_CHARACTERS_MIN and characters in compact:
            pattern = r"[ .\-/]?".join(map(re.escape, characters))
            for match in re.finditer(rf"(?<![a-z0-9]){pattern}(?![a-z0-9])", view.plain):
                view.note(match.start(), match.end(), kind, "patient")


def _place(view: View, place: str, kind: Kind) -> None:
    words = re.findall(r"\w+", plain(place))
    if len(place) > 3 and words and all(word in view.plain for word in words):
        for match in re.finditer(r"(?<!\w)" + r"[\W_]+".join(map(re.escape, words)) + r"(?!\w)", view.plain):
            view.note(match.start(), match.end(), kind, "patient")


def _birth_date(view: View, date: datetime.date) -> None:
    """Both orders of day and month, with or without separators, and the month by its name."""
    years = {date.year, date.year % 100}
    days = {(date.day, date.month), (date.month, date.day)}
    found: list[tuple[int, int]] = []
    for match in _DAY_FIRST.finditer(view.plain):
        if int(match[3]) in years and (int(match[1]), int(match[2])) in days:
            found.append((match.start(1), match.end(3)))
    for match in _YEAR_FIRST.finditer(view.plain):
        if (int(match[1]), int(match[2]), int(match[3])) == (date.year, date.month, date.day):
            found.append((match.start(1), match.end(3)))
    compact = {
        f"{a:0{a_width}d}{b:0{b_width}d}{year}"
        for a, b in days for a_width in (1, 2) for b_width in (1, 2) for year in (date.year, f"{date.year % 100:02d}")
    }  # fmt: skip
    for match in _COMPACT.finditer(view.plain):
        if match.group() in compact:
            found.append(match.span())
    for pattern, day, month in ((_DAY_BEFORE_NAME, 1, 2), (_DAY_BEHIND_NAME, 2, 1)):
        for match in pattern.finditer(view.plain):
            if int(match[3]) in years and (int(match[day]), MONTHS[match[month]]) == (date.day, date.month):
                found.append(match.span())
    for start, end in found:
        view.note(start, end, "birth_date", "patient")
