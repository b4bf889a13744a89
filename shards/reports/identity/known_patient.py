"""What the hospital's own record says about the patient, looked for in the text with one typing error allowed."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass, field

from shards.reports.identity.dates import distance
from shards.reports.identity.gazetteers import MONTHS, Word, plain
from shards.reports.identity.view import LOWER, View

_FUZZY_FROM = 5  # shorter names must match exactly: one letter more or less makes another word of them


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
    for number in (*patient.ids, *patient.phones):
        characters = re.sub(r"[^a-z0-9]", "", plain(number))
        if len(characters) >= 4:
            pattern = r"[ .\-/]?".join(map(re.escape, characters))
            for match in re.finditer(rf"(?<![a-z0-9]){pattern}(?![a-z0-9])", view.plain):
                view.note(match.start(), match.end(), "id" if number in patient.ids else "phone", "patient")
    if patient.birth_date is not None:
        _birth_date(view, patient.birth_date)
    for place, kind in ((patient.address, "address"), (patient.city, "city")):
        words = re.findall(r"\w+", plain(place))
        if words and len(place) > 3:
            for match in re.finditer(r"(?<!\w)" + r"[\W_]+".join(map(re.escape, words)) + r"(?!\w)", view.plain):
                view.note(match.start(), match.end(), kind, "patient")  # type: ignore[arg-type]


def _names(view: View, patient: KnownPatient) -> None:
    wanted = {
        part for name in (*patient.first_names, *patient.last_names) for part in re.findall(r"[^\W\d_]+", plain(name))
        if len(part) > 1
    }  # fmt: skip
    fuzzy = [name for name in wanted if len(name) >= _FUZZY_FROM]
    for index, word in enumerate(view.words):
        common = view.flags[index] & (Word.COMMON | Word.PARTICLE)
        if word in wanted:
            if common and view.shapes[index] == LOWER:
                continue
        elif common or len(word) < _FUZZY_FROM - 1 or not any(distance(word, name, 2) < 2 for name in fuzzy):
            continue
        view.note(view.starts[index], view.ends[index], "patient_name", "patient")


def _birth_date(view: View, date: datetime.date) -> None:
    """Both orders of day and month, with or without separators, and the month by its name."""
    day, month, year = f"0?{date.day}", f"0?{date.month}", f"(?:{date.year}|{date.year % 100:02d})"
    separator = r"[ ./|,\-]{0,3}"
    names = "|".join(name for name, number in MONTHS.items() if number == date.month)
    for pattern in (
        rf"{day}{separator}{month}{separator}{year}", rf"{month}{separator}{day}{separator}{year}",
        rf"{date.year}{separator}{month}{separator}{day}",
        rf"{day}(?:er|st|nd|rd|th)?{separator}(?:{names})\.?{separator}{year}",
        rf"(?:{names})\.? ?{day}(?:st|nd|rd|th)?{separator}{year}",
    ):  # fmt: skip
        for match in re.finditer(rf"(?<!\d){pattern}(?!\d)", view.plain):
            view.note(match.start(), match.end(), "birth_date", "patient")
