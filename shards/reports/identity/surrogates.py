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

from shards.reports.identity.date_shift import WRITTEN, YEAR_WITHOUT_ONE, like, moved, years_of
from shards.reports.identity.gazetteers import HOSPITALS, PARTICLES, plain, read_list
from shards.reports.identity.view import Identifier, Kind

# Days a date may move by, at most 1000 as the Belgian corpus did (bone_xray_french.md 6.2), forward or backward. Near a
# whole number of years "12 mars" would stay what it was, under 200 days "2019" would.
SHIFTS_DAYS = (*range(200, 335), *range(396, 700), *range(761, 1001))
_WORD = re.compile(r"[^\W\d_]+")
_COUNTRY_CODE = re.compile(r"(?:\+|\(\+|00 ?)(?:33|32|41|352|377|49|44|39|34|31|212|213|216|1|\d\d)(?!\d{12})")
_TRUNK_ZERO = re.compile(r"[ .\-/]{0,2}\(0\)|\(?[0oO]")
_PHONE_CHARACTER = re.compile(r"\d|(?<![^\W_])[^\W\d_](?![^\W\d_])|(?<=\d)[oOlIsSB](?![^\W\d_])")
_BOX = re.compile(r"(?:b\.?p|c\.?s|t\.?s\.?a|p\.? ?o)\.?|\bbox\b|\bcase postale\b")


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
        """The patient's offset in days, backward or forward, equal in all documents: one of `SHIFTS_DAYS`."""
        drawn = self._number(patient, "shift", "") % (2 * len(SHIFTS_DAYS))
        days = SHIFTS_DAYS[drawn // 2]
        return days if drawn % 2 else -days

    def replace(
        self, text: str, identifiers: Sequence[Identifier], *, patient: str, language: str
    ) -> tuple[str, tuple[Replaced, ...]]:
        """The text with every identifier replaced, and where the surrogates stand.

        `patient` is any text that is equal for all documents of a person (a hospital id: only its hash is used).
        `identifiers` are in order and without overlap, as `Detector.find` gives them.
        """
        tongue = "fr" if language == "fr" else "en"
        dates = (text[one.start : one.end] for one in identifiers if one.kind == "date")
        year = max(years_of(dates), default=YEAR_WITHOUT_ONE)
        pieces: list[str] = []
        replaced = []
        length = position = 0
        for one in identifiers:
            kept = text[position : one.start]
            written = text[one.start : one.end]
            surrogate = self.surrogate(written, one.kind, patient=patient, language=tongue, year=year)
            pieces += [kept, surrogate]
            start = length + len(kept)
            length = start + len(surrogate)
            replaced.append(Replaced(start=start, end=length, kind=one.kind))
            position = one.end
        return "".join([*pieces, text[position:]]), tuple(replaced)

    def surrogate(
        self,
        written: str,
        kind: Kind,
        *,
        patient: str,
        language: str,
        year: int = YEAR_WITHOUT_ONE,
    ) -> str:
        """What is written instead of one identifier; `year` is that of a date without one."""
        if kind in ("patient_name", "person_name"):
            return _WORD.sub(lambda match: self._name(match.group(), patient, language), written)
        if kind in ("date", "birth_date"):
            return self._date(written, patient, language, year)
        if kind == "age_over_89":
            if written.strip().isdigit():
                return "90"
            return "ninety" if re.search("nine|hundred|nona", plain(written)) else "quatre-vingt-dix"
        if kind == "mail":
            return f"{self._pick('mail', patient, written, _first_names(language, 'u')).lower()}@example.org"
        if kind == "url":
            return "https://example.org"
        if kind == "city":
            return like(written, self._pick("city", patient, plain(written), _cities(language)))
        if kind == "hospital":
            return self._hospital(written, patient, language)
        if kind == "address":
            return self._address(written, patient, language)
        if kind == "phone":
            return self._phone(written, patient)
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
        return like(word, self._pick("name", patient, key, options))

    def _digits(self, written: str, kind: Kind, patient: str) -> str:
        """Other digits and letters in the same places; separators and leading zeros stay."""
        state = self._number(patient, kind, re.sub(r"\W", "", plain(written)))
        zeros = re.search(r"\d", written) is not None and re.search(r"[1-9]", written) is not None
        made = []
        for character in written:
            state = _next_state(state)
            zeros = zeros and (character == "0" or not character.isdigit())
            if character.isdigit():
                made.append(character if zeros else _other_digit(character, state))
            elif character.isalpha():
                letter = chr(ord("a") + (ord(plain(character)) + 1 + (state >> 33) % 25 - ord("a")) % 26)
                made.append(letter.upper() if character.isupper() else letter)
            else:
                made.append(character)
        return "".join(made)

    def _phone(self, written: str, patient: str) -> str:
        """Another number of the same form: country code, leading 0, groups and words (poste, ext.) stay."""
        start = 0
        for prefix in (_COUNTRY_CODE, _TRUNK_ZERO):
            match = prefix.match(written, start)
            if match is not None and len(re.findall(r"\d", written[match.end() :])) >= 4:
                start = match.end()
        state = self._number(patient, "phone", re.sub(r"\W", "", plain(written)))
        least = 1  # a national number does not begin with another 0

        def other(match: re.Match[str]) -> str:
            nonlocal state, least
            state = _next_state(state)
            digit = _other_digit(match.group() if match.group().isdigit() else "0", state, least)
            least = 0
            return digit

        return written[:start] + _PHONE_CHARACTER.sub(other, written[start:])

    def _address(self, written: str, patient: str, language: str) -> str:
        """A street with its number where the written one had it; of a box only the number changes."""
        if _BOX.match(plain(written)):
            return re.sub(r"\d+", lambda match: self._digits(match.group(), "address", patient), written)
        street = like(written, self._pick("street", patient, plain(written), WRITTEN[language]["streets"]))
        number = 1 + self._number(patient, "street number", plain(written)) % 180
        number += re.search(rf"(?<!\d){number}(?!\d)", written) is not None
        if not any(character.isdigit() for character in written):
            return street
        return f"{number} {street}" if written.lstrip()[0].isdigit() else f"{street} {number}"

    def _hospital(self, written: str, patient: str, language: str) -> str:
        """The kind of institution stays, its name goes."""
        name = self._pick("hospital", patient, plain(written), WRITTEN[language]["hospitals"])
        words = written.split()
        generic = ("medical", "universitaire", "university", "regional", "general", "memorial", "hospitalier", "health")
        before = [word for word in words[:3] if plain(word) in HOSPITALS or plain(word) in generic]
        if words and plain(words[0]) in HOSPITALS and before:
            return " ".join([*before, name])
        after = [word for word in words[-2:] if plain(word) in HOSPITALS or plain(word) in generic]
        return " ".join([name, *after])

    # --- dates ---

    def _date(self, written: str, patient: str, language: str, year: int) -> str:
        """The date moved by the patient's offset, in the form it had; other digits where no date can be read."""
        days = self.shift_days(patient)
        for more in (0, 1):  # "lundi 12" can come back to itself, for it has neither month nor year
            shifted = moved(written, datetime.timedelta(days=days + more), language, year)
            if shifted is not None and shifted != written:
                return shifted
        return self._digits(written, "date", patient)


def _next_state(state: int) -> int:
    return (state * 6364136223846793005 + 1442695040888963407) % 2**64


def _other_digit(digit: str, state: int, least: int = 0) -> str:
    """A digit of at least `least` that is not `digit`."""
    if not digit.isascii():
        return "0"
    options = [number for number in range(least, 10) if number != int(digit)]
    return str(options[(state >> 33) % len(options)])


# --- lists ---


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
