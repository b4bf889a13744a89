"""What stands in place of an identifier: another of its kind and shape, the same for the same patient, by keyed hash.

Names become names of the same sex, dates move by one number of days per patient and keep their format, numbers keep
their digits' places. Nothing of the original is kept: destroying the key leaves no way back. Only the key's fingerprint
(`shards.ingest.key_fingerprint`) may be written down.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

from shards.reports.identity.dates import value_of
from shards.reports.identity.gazetteers import HOSPITALS, MONTHS, NUMBERS, PARTICLES, plain, read_list
from shards.reports.identity.view import Identifier, Kind

SHIFT_DAYS_MAX = 1000  # as the Belgian corpus did (bone_xray_french.md 6.2)
SHIFT_DAYS_MIN = 30  # a date must not stay what it was
_MONTH_NAMES = {
    "fr": [
        "janvier",
        "février",
        "mars",
        "avril",
        "mai",
        "juin",
        "juillet",
        "août",
        "septembre",
        "octobre",
        "novembre",
        "décembre",
    ],
    "en": [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ],
}
_WEEKDAYS = {
    "fr": ["lundi", "mardi", "mercredi", "jeudi", "vendredi", "samedi", "dimanche"],
    "en": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
}
_HOSPITAL_NAMES = {
    "fr": (
        "Saint-Aubin",
        "Sainte-Odile",
        "des Tilleuls",
        "Belle-Rive",
        "Val-Fleuri",
        "Clairval",
        "Beaulieu",
        "Montclair",
    ),
    "en": (
        "Lakeside",
        "Riverview",
        "Northfield",
        "Saint Alban's",
        "Fairmount",
        "Willowbrook",
        "Highgate",
        "Westbourne",
    ),
}
_STREET_NAMES = {
    "fr": ("rue des Tilleuls", "rue du Moulin", "avenue des Acacias", "rue de la Fontaine", "chemin des Vignes"),
    "en": ("Maple Street", "Orchard Road", "Mill Lane", "Willow Avenue", "Chapel Street"),
}
_WORD = re.compile(r"[^\W\d_]+")
_TOKEN = re.compile(r"[^\W\d_]+|\d+")


@dataclass(frozen=True, kw_only=True)
class Replaced:
    """Characters [start, end) of the new document that stand for an identifier of `kind`; the old text is not kept."""

    start: int
    end: int
    kind: Kind


@dataclass(frozen=True, kw_only=True)
class Surrogates:
    """Surrogates of one secret. Two instances with the same secret give the same text."""

    secret: bytes = field(repr=False)

    def shift_days(self, patient: str) -> int:
        """The patient's offset in days: between 30 and 1000, backward or forward, never 0."""
        drawn = self._number(patient, "shift", "") % (2 * (SHIFT_DAYS_MAX - SHIFT_DAYS_MIN + 1))
        days = SHIFT_DAYS_MIN + drawn // 2
        return days if drawn % 2 else -days

    def replace(
        self, text: str, identifiers: Sequence[Identifier], *, patient: str, language: str
    ) -> tuple[str, tuple[Replaced, ...]]:
        """The text with every identifier replaced, and where the surrogates stand.

        `patient` is any text that is equal for all documents of a person (a hospital id: only its hash is used).
        `identifiers` are in order and without overlap, as `Detector.find` gives them.
        """
        tongue = "fr" if language == "fr" else "en"
        pieces: list[str] = []
        replaced = []
        length = position = 0
        for one in identifiers:
            kept = text[position : one.start]
            surrogate = self.surrogate(text[one.start : one.end], one.kind, patient=patient, language=tongue)
            pieces += [kept, surrogate]
            start = length + len(kept)
            length = start + len(surrogate)
            replaced.append(Replaced(start=start, end=length, kind=one.kind))
            position = one.end
        return "".join([*pieces, text[position:]]), tuple(replaced)

    def surrogate(self, written: str, kind: Kind, *, patient: str, language: str) -> str:
        """What is written instead of one identifier."""
        if kind in ("patient_name", "person_name"):
            return _WORD.sub(lambda match: self._name(match.group(), patient, language), written)
        if kind in ("date", "birth_date"):
            return self._date(written, patient, language)
        if kind == "age_over_89":
            if written.strip().isdigit():
                return "90"
            return "ninety" if re.search("nine|hundred|nona", plain(written)) else "quatre-vingt-dix"
        if kind == "mail":
            return f"{self._pick('mail', patient, written, _first_names(language, 'u')).lower()}@example.org"
        if kind == "url":
            return "https://example.org"
        if kind == "city":
            return _like(written, self._pick("city", patient, plain(written), _cities(language)))
        if kind == "hospital":
            return self._hospital(written, patient, language)
        if kind == "address":
            number = 1 + self._number(patient, "street number", plain(written)) % 180
            street = self._pick("street", patient, plain(written), _STREET_NAMES[language])
            return f"{number} {street}" if any(c.isdigit() for c in written) else street
        return self._digits(written, kind, patient)

    def _number(self, patient: str, purpose: str, text: str) -> int:
        message = "\0".join((purpose, patient, text)).encode("utf-8", "surrogatepass")
        return int.from_bytes(hmac.new(self.secret, message, hashlib.sha256).digest()[:8], "big")

    def _pick(self, purpose: str, patient: str, text: str, options: Sequence[str]) -> str:
        """One of the options, never `text` itself."""
        drawn = self._number(patient, purpose, text)
        chosen = options[drawn % len(options)]
        return chosen if plain(chosen) != plain(text) else options[(drawn + 1) % len(options)]

    def _name(self, word: str, patient: str, language: str) -> str:
        """A name for a name: first for first and of its sex, an initial for an initial, particles stay."""
        key = plain(word)
        if key in PARTICLES and word.islower():
            return word
        if len(word) == 1:
            return (
                chr(ord("A") + (ord(key[0]) - ord("a") + 1 + self._number(patient, "initial", key) % 25) % 26)
                if key.isascii()
                else "A"
            )
        sex = _sexes().get(key)
        options = _last_names(language) if sex is None else _first_names(language, sex)
        return _like(word, self._pick("name", patient, key, options))

    def _digits(self, written: str, kind: Kind, patient: str) -> str:
        """Other digits and letters in the same places; separators stay. The first digit of a phone stays a 0 or +."""
        state = self._number(patient, kind, re.sub(r"\W", "", plain(written)))
        made = []
        for character in written:
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            if character.isdigit():
                made.append(str((int(character) + 1 + (state >> 33) % 9) % 10) if character.isascii() else "0")
            elif character.isalpha():
                letter = chr(ord("a") + (state >> 33) % 26)
                made.append(letter.upper() if character.isupper() else letter)
            else:
                made.append(character)
        return "".join(made)

    def _hospital(self, written: str, patient: str, language: str) -> str:
        """The kind of institution stays, its name goes."""
        name = self._pick("hospital", patient, plain(written), _HOSPITAL_NAMES[language])
        words = written.split()
        generic = ("medical", "universitaire", "university", "regional", "general", "memorial", "hospitalier", "health")
        before = [word for word in words[:3] if plain(word) in HOSPITALS or plain(word) in generic]
        if words and plain(words[0]) in HOSPITALS and before:
            return " ".join([*before, name])
        after = [word for word in words[-2:] if plain(word) in HOSPITALS or plain(word) in generic]
        return " ".join([name, *after])

    # --- dates ---

    def _date(self, written: str, patient: str, language: str) -> str:
        """The date moved by the patient's offset, in the format it had; what cannot be read becomes another year."""
        shift = datetime.timedelta(days=self.shift_days(patient))
        moved = _moved(written, shift, language)
        return moved if moved is not None else self._digits(written, "date", patient)


def _moved(written: str, shift: datetime.timedelta, language: str) -> str | None:
    """A date, or several joined ones, moved; None when there is nothing to read.

    Fields are found by their look: a month's name, four digits for a year, else day and month by the language's order
    unless the numbers tell otherwise. What a date lacks is taken from its middle (day 15, month 6, year 2000).
    """
    tokens = [(match.group(), match.start(), match.end()) for match in _TOKEN.finditer(written)]
    compact = re.sub(r"\D", "", written)
    names = [index for index, (token, _, _) in enumerate(tokens) if plain(token) in MONTHS]
    numbers = [index for index, (token, _, _) in enumerate(tokens) if token.isdigit() and token.isascii()]
    if not names and re.fullmatch(r"[\d ]+", written) and len(compact) in (6, 8) and len(numbers) != 3:
        return _moved_compact(written, compact, shift)
    if any(plain(token) in NUMBERS for token, _, _ in tokens) and not any(
        token.isdigit() for token, _, _ in tokens[1:]
    ):
        return _moved_words([plain(token) for token, _, _ in tokens], shift, language)
    roles: dict[str, int] = {}
    if names:
        roles["month"] = names[-1]
        free = list(numbers)
        for index in list(free):
            if len(tokens[index][0]) == 4:
                roles["year"] = index
                free.remove(index)
                break
        before = [index for index in free if index < names[-1]]
        if before:
            roles["day"] = before[-1]
            free.remove(before[-1])
        elif free and ("year" in roles or int(tokens[free[0]][0]) <= 31):
            roles["day"] = free.pop(0)
        if "year" not in roles and free:
            roles["year"] = free[-1]
    else:
        lengths = [len(tokens[index][0]) for index in numbers]
        if 4 in lengths:
            year = numbers[lengths.index(4)]
            roles["year"] = year
            rest = [index for index in numbers if index != year]
        elif len(numbers) >= 3:
            roles["year"] = numbers[-1]
            rest = numbers[:-1]
        else:
            rest = numbers
        if "year" in roles and roles["year"] == numbers[0] and len(rest) >= 2:
            roles["month"], roles["day"] = rest[0], rest[1]
        elif len(rest) >= 2:
            first, second = rest[-2], rest[-1]
            month_first = int(tokens[second][0]) > 12 or (
                language == "en" and int(tokens[first][0]) <= 12 and "/" in written
            )
            roles["day"], roles["month"] = (second, first) if month_first else (first, second)
        elif rest:
            roles["month"] = rest[0]

    def value(role: str, default: int) -> int:
        if role not in roles:
            return default
        token = tokens[roles[role]][0]
        return MONTHS[plain(token)] if plain(token) in MONTHS else int(token)

    year = value("year", 2000)
    short = "year" in roles and year < 100
    full_year = year + (2000 if year <= datetime.date.today().year % 100 + 5 else 1900) if short else year
    date = _near(full_year, value("month", 6), value("day", 15))
    if date is None or not roles:
        return None
    moved = date + shift
    changes = {}
    for role, index in roles.items():
        token = tokens[index][0]
        if role == "month" and plain(token) in MONTHS:
            changes[index] = _month_like(token, moved.month, language)
        else:
            number = {"day": moved.day, "month": moved.month, "year": moved.year % 100 if short else moved.year}[role]
            changes[index] = f"{number:0{len(token)}d}" if token.startswith("0") or short else str(number)
            if role != "year" and len(token) == 2 and not token.startswith("0"):
                changes[index] = f"{number:02d}" if not names else str(number)
    pieces, position = [], 0
    for index, (token, start, end) in enumerate(tokens):
        new = changes.get(index)
        if new is None:
            new = _left_over(token, index, moved, shift, language)
        pieces += [written[position:start], new]
        position = end
    return "".join([*pieces, written[position:]])


def _left_over(token: str, index: int, moved: datetime.date, shift: datetime.timedelta, language: str) -> str:
    """What a date holds besides its main fields: weekdays, ordinals, the other end of a range."""
    word = plain(token)
    for tongue, days in _WEEKDAYS.items():
        plains = [plain(day) for day in days]
        if word in plains:
            return _like(token, _WEEKDAYS[tongue][moved.weekday()])
    if word in MONTHS:
        other = _near(moved.year, MONTHS[word], 15)
        return token if other is None else _month_like(token, (other + shift).month, language)
    if token.isdigit():
        if len(token) == 4:
            return str(int(token) + round(shift.days / 365.25))
        return str((int(token) + shift.days % 28) % 28 + 1).zfill(len(token))
    if word in ("er", "st", "nd", "rd", "th"):
        return _ordinal(moved.day, language) if word != "er" else ("er" if moved.day == 1 else "")
    return token


def _ordinal(day: int, language: str) -> str:
    if 4 <= day % 100 <= 20:
        return "th"
    return {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")


def _moved_compact(written: str, digits: str, shift: datetime.timedelta) -> str | None:
    """Eight or six digits without separators, or standing apart."""
    if len(digits) == 8:
        orders = ((4, 2, 0), (0, 4, 6)) if 1900 <= int(digits[4:]) < 2100 else ((0, 4, 6), (4, 2, 0))
        for year_at, month_at, day_at in orders:
            year, month, day = (
                int(digits[year_at : year_at + 4]),
                int(digits[month_at : month_at + 2]),
                int(digits[day_at : day_at + 2]),
            )
            date = _near(year, month, day) if 1900 <= year < 2100 else None
            if date is not None:
                moved = date + shift
                made = f"{moved:%Y%m%d}" if year_at == 0 else f"{moved:%d%m}{moved.year:04d}"
                break
        else:
            return None
    else:
        date = _near(1900 + int(digits[4:]) + 100 * (int(digits[4:]) < 40), int(digits[2:4]), int(digits[:2]))
        if date is None:
            return None
        made = f"{date + shift:%d%m%y}"
    following = iter(made)
    return "".join(next(following) if character.isdigit() else character for character in written)


def _moved_words(words: list[str], shift: datetime.timedelta, language: str) -> str | None:
    """A date in words, written with digits after the move; None when no year or month can be read."""
    month_at = next((index for index, word in enumerate(words) if word in MONTHS), None)
    year = value_of(words if month_at is None else words[month_at + 1 :])
    if not 1900 <= year < 2100:
        if month_at is None:
            return None
        year = 2000
        with_year = False
    else:
        with_year = True
    if month_at is None:
        return str(year + round(shift.days / 365.25))
    moved = _near(year, MONTHS[words[month_at]], value_of(words[:month_at]) or 15)
    if moved is None:
        return None
    moved += shift
    name = _MONTH_NAMES[language][moved.month - 1]
    return f"{moved.day} {name} {moved.year}" if with_year else f"{moved.day} {name}"


def _near(year: int, month: int, day: int) -> datetime.date | None:
    """The date; day and month exchanged or brought into the calendar where the written ones are not."""
    if not 1 <= year <= 9000:
        return None
    if month > 12 >= day:
        month, day = day, month
    month = min(max(month, 1), 12)
    for candidate in (min(max(day, 1), 31), 28):
        try:
            return datetime.date(max(year, 10), month, candidate)
        except ValueError:
            continue
    return None


def _month_like(token: str, month: int, language: str) -> str:
    """The month's name in the language, length and capitals of the written one."""
    key = plain(token)
    english = key in {plain(name) for name in _MONTH_NAMES["en"]} or (language == "en" and len(key) <= 4)
    name = _MONTH_NAMES["en" if english else "fr"][month - 1]
    if len(key) <= 4 and key not in ("mars", "mai", "may", "juin", "june", "july", "aout"):
        name = name[: 4 if name.startswith("jui") else 3]
    return _like(token, name)


# --- lists ---


def _like(written: str, made: str) -> str:
    """`made` in the capitals of `written`."""
    if written.isupper() and len(written) > 1:
        return made.upper()
    return made.lower() if written.islower() else made


@cache
def _sexes() -> dict[str, str]:
    return {plain(line.split("\t")[0]): line.split("\t")[1][0] for line in read_list("first_names.txt")}


@cache
def _first_names(language: str, sex: str) -> tuple[str, ...]:
    """First names of one word for surrogates; `u` takes both sexes."""
    found = []
    for line in read_list("first_names.txt"):
        name, about = line.split("\t")
        own, *languages = about.split(" ")
        if language in languages and _WORD.fullmatch(name) and (sex == "u" or own == sex):
            found.append(name)
    return tuple(found)


@cache
def _last_names(language: str) -> tuple[str, ...]:
    """Last names of one word that are no first names."""
    first = _sexes()
    names = [line for line in read_list("last_names.txt") if _WORD.fullmatch(line) and len(line) > 3]
    return tuple(name for name in names if name.isascii() and plain(name) not in first)[:: 1 if language == "fr" else 2]


@cache
def _cities(language: str) -> tuple[str, ...]:
    wanted = ("FR", "BE", "CH") if language == "fr" else ("US", "GB", "CA")
    rows = [line.split("\t") for line in read_list("cities.txt")]
    return tuple(name for name, country in rows if country in wanted and _WORD.fullmatch(name))
