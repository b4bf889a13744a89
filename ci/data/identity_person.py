"""Draws identifiers and what stands beside them: names of the lists, names made up by a letter chain, words and towns
as names; numbers, dates and addresses in French, Belgian, Swiss and Canadian habits; and what is easily taken for one.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path

from ci.data.identity_pieces import UNKNOWN, Pieces
from ci.data.identity_prose import sentences, words_of_prose
from shards.reports.identity.gazetteers import EPONYMS, Word, gazetteer, plain, read_list

_KEEP_WRITTEN = 0.08  # share of tags left as they are written
_SLOTS = Path(__file__).with_name("identity_slots.toml")
_TENS = {20: "vingt", 30: "trente", 40: "quarante", 50: "cinquante", 60: "soixante"}


@cache
def _words(name: str) -> tuple[str, ...]:
    """What one table of identity_slots.toml lists."""
    return tuple(_slots()[name])


@cache
def _slots() -> dict[str, list[str]]:
    return tomllib.loads(_SLOTS.read_text("utf-8"))


@cache
def _chain(name: str) -> dict[str, tuple[str, ...]]:
    """Three letters -> the letters that follow in a list of names."""
    following: dict[str, list[str]] = defaultdict(list)
    for line in read_list(name):
        written = f"^^^{line.split(chr(9))[0].lower()}$"
        for place in range(3, len(written)):
            following[written[place - 3 : place]].append(written[place])
    return {start: tuple(letters) for start, letters in following.items()}


@cache
def _rows(name: str) -> tuple[str, ...]:
    return tuple(line.split("\t")[0] for line in read_list(name))


@cache
def _french_first_names() -> tuple[str, ...]:
    rows = (line.split("\t") for line in read_list("first_names.txt"))
    return tuple(name for name, about in rows if " fr" in about)


@cache
def _common_words() -> tuple[str, ...]:
    """Words that are no names, for speech without sense and for names that are words."""
    flags = gazetteer().flags
    return tuple(word for word in read_list("words.txt") if flags[word] == Word.COMMON and 3 < len(word) < 10)


class Person:
    """Draws identifiers; one written name gets one other name throughout a document."""

    def __init__(self, choose: random.Random) -> None:
        self.choose = choose
        self.known: dict[tuple[str, str], str] = {}
        self.style = choose.choice(("title", "title", "upper", "mixed"))

    def slot(self, name: str) -> Pieces:
        """The pieces that stand for one slot of a letter."""
        choose = self.choose
        plain_values: dict[str, Callable[[], str]] = {
            "titre": lambda: choose.choice(_words("titles")), "service": lambda: choose.choice(_words("services")),
            "prose": self._prose, "mots": self._speech, "mot": self._eponym,
            "marque": self._brand, "sigle": self._acronym,
            "n": lambda: str(choose.randrange(1, choose.choice((9, 99, 999)))),
            "age": lambda: str(choose.randrange(1, 89)), "poids": lambda: str(choose.randrange(40, 110)),
            "heure": self._hour, "medicament": lambda: choose.choice(_words("drugs")),
            "mesure": lambda: choose.choice(_words("measures")),
        }  # fmt: skip
        if name in plain_values:
            return [(plain_values[name](), "")]
        if name == "personne":
            return self._person()
        if name == "hopitalentier":
            return [
                (choose.choice(_words("hospitals")) + choose.choice((" ", " ", " de ", " de la ")), ""),
                (self.hospital(), "HOPITAL"),
            ]
        values: dict[str, tuple[Callable[[], str], str]] = {
            "nom": (self.last_name, "NOM"), "prenom": (self.first_name, "PRENOM"), "date": (self.date, "DATE"),
            "ne": (self.date, "DATE_NAISSANCE"), "tel": (self.phone, "TEL"), "mail": (self.mail, "MAIL"),
            "ipp": (self.number, "IPP"), "nda": (self.number, "NDA"), "nir": (self.social_security, "SECU"),
            "rue": (self.address, "ADRESSE"), "cp": (self.zip_code, "ZIP"), "ville": (self.city, "VILLE"),
            "hop": (self.hospital, "HOPITAL"), "annee": (self.year, "DATE"),
            "mois": (lambda: choose.choice(_words("months")), "DATE"),
        }  # fmt: skip
        make, label = values[name]
        return [(make(), label)]

    def like(self, written: str, label: str) -> str:
        """Another identifier for a tagged one; same text, same name. What has no label stays."""
        if not label or label == UNKNOWN or self.choose.random() < _KEEP_WRITTEN:
            return written
        makers: dict[str, Callable[[], str]] = {
            "DATE": self.date, "DATE_NAISSANCE": self.date, "TEL": self.phone, "MAIL": self.mail, "IPP": self.number,
            "NDA": self.number, "SECU": self.social_security, "ADRESSE": self.address, "ZIP": self.zip_code,
            "HOPITAL": self.hospital, "VILLE": self.city,
        }  # fmt: skip
        key = (label, written.lower())
        if label in ("NOM", "PRENOM"):
            if len(re.sub(r"\W", "", written)) < 3:
                return self._initial(written)
            if key not in self.known:
                self.known[key] = self.last_name(own_case=True) if label == "NOM" else self.first_name(own_case=True)
            made = self.known[key]
            return made.upper() if written.isupper() else made.lower() if written.islower() else made
        if label == "DATE" and re.fullmatch(r"(?:19|20)\d\d", written):
            return self.year()
        if key not in self.known:
            self.known[key] = makers[label]()
        return self.known[key]

    def _person(self) -> Pieces:
        choose = self.choose
        first = (self.first_name() if choose.random() < 0.7 else self._initial("X."), "PRENOM")
        last = (self.last_name(), "NOM")
        drawn = choose.random()
        if drawn < 0.5:
            return [first, (" ", ""), last]
        if drawn < 0.8:
            return [last, (choose.choice((" ", " ", ", ")), ""), first]
        return [last] if drawn < 0.95 else [(first[0], "PRENOM")]

    def _initial(self, written: str) -> str:
        made = "".join(self.choose.choice("ABCDEFGHJKLMNPRSTVY") if c.isalpha() else c for c in written)
        return made if self.choose.random() < 0.8 else made.replace(".", "")

    def _cased(self, name: str, upper: float) -> str:
        drawn = self.choose.random()
        if self.style == "upper" or (self.style == "mixed" and drawn < upper):
            return name.upper()
        return name.lower() if drawn > 0.97 else name

    def first_name(self, *, own_case: bool = False) -> str:
        """A first name, at times of two parts."""
        choose = self.choose
        drawn = choose.random()
        if drawn < 0.65:
            name = choose.choice(_french_first_names() if drawn < 0.35 else _rows("first_names.txt"))
        elif drawn < 0.95:
            name = self._chained("first_names.txt")
        else:
            name = choose.choice(_common_words()).title()
        if choose.random() < 0.1:
            name += choose.choice(("-", "-", " ")) + choose.choice(_rows("first_names.txt"))
        return name if own_case else self._cased(name, 0.1)

    def last_name(self, *, own_case: bool = False) -> str:
        """A last name: listed, made up, a word, a town, a first name; with particles, of two parts."""
        choose = self.choose
        drawn = choose.random()
        if drawn < 0.35:
            name = choose.choice(_rows("last_names.txt"))
        elif drawn < 0.75:
            name = self._chained("last_names.txt")
        elif drawn < 0.87:
            name = choose.choice(_common_words()).title()
        elif drawn < 0.93:
            name = choose.choice(_rows("cities.txt"))
        else:
            name = choose.choice(_rows("first_names.txt"))
        drawn = choose.random()
        if drawn < 0.06:
            name = (
                choose.choice(
                    ("de ", "Le ", "El ", "Ben ", "van ", "Van der ", "du ", "d'", "D'", "de la ", "Al ", "Da ")
                )
                + name
            )
        elif drawn < 0.14:
            name += choose.choice(("-", "-", " ", " - ")) + self._chained("last_names.txt")
        return name if own_case else self._cased(name, 0.8)

    def _chained(self, source: str) -> str:
        chain = _chain(source)
        for _ in range(20):
            made = "^^^"
            while not made.endswith("$") and len(made) < 17:
                made += self.choose.choice(chain[made[-3:]])
            name = made[3:].rstrip("$").strip(" -'")
            if len(name) > 3 and re.fullmatch(r"[^\W\d_][\w' \-]*", name):
                return name.title()
        return "Tabourel"

    def city(self) -> str:
        """A town, listed or composed, at times with CEDEX or a district."""
        choose = self.choose
        drawn = choose.random()
        if drawn < 0.55:
            name = choose.choice(_rows("cities.txt"))
        elif drawn < 0.7:
            name = self._chained("cities.txt")
        elif drawn < 0.85:
            joint = choose.choice(
                ("-sur-", " sur ", "-en-", "-lès-", " les ", "-sous-", " s/ ", "-la-", " le ", "\nsur ")
            )
            name = self._chained("cities.txt") + joint + self._chained("cities.txt")
        else:
            name = choose.choice(("Saint-", "Saint ", "St ", "St-", "Sainte-", "La ", "Le ", "Les ")) + self.first_name(
                own_case=True
            )
        if choose.random() < 0.1:
            name += choose.choice(
                (" CEDEX", " Cedex", f" cedex {choose.randrange(1, 20)}", f" {choose.randrange(1, 20)}", "e")
            )
        return self._cased(name, 0.3)

    def hospital(self) -> str:
        """The name of a hospital without the word hospital."""
        choose = self.choose
        drawn = choose.random()
        if drawn < 0.3:
            name = choose.choice(("Saint ", "St ", "St-", "Saint-", "Sainte-", "Ste ")) + self.first_name(own_case=True)
        elif drawn < 0.5:
            name = self.first_name(own_case=True) + choose.choice((" ", "-")) + self.last_name(own_case=True)
        elif drawn < 0.75:
            name = self.last_name(own_case=True)
        elif drawn < 0.9:
            name = choose.choice(
                ("la ", "La ", "les ", "Les ", "Val d'", "Notre-Dame de ", "du ", "des ")
            ) + choose.choice((self._chained("cities.txt"), choose.choice(_common_words()).title()))
        else:
            name = "".join(choose.choice("ABCDEFGHILMNOPRSTUV") for _ in range(choose.randrange(2, 5)))
        return self._cased(name, 0.2)

    def year(self) -> str:
        """A year."""
        return str(self.choose.randrange(1940, 2035))

    def date(self) -> str:
        """A date, whole or in part, in one of the ways it is written."""
        choose = self.choose
        day, month, year = choose.randrange(1, 32), choose.randrange(1, 13), choose.randrange(1925, 2040)
        if choose.random() < 0.6:
            year = choose.randrange(1990, 2030)
        drawn = choose.random()
        if drawn < 0.45:
            mark = choose.choice(("/", "/", "/", ".", "-", " ", " / ", "|", "", " . "))
            return (
                f"{day:02d}{mark}{month:02d}{mark}{year}"
                if choose.random() < 0.85
                else f"{day}{mark}{month}{mark}{year}"
            )
        if drawn < 0.75:
            whole, short = _words("months")[month - 1], _words("months_short")[month - 1]
            name = choose.choice((whole, whole.title(), f"{short}.", short, whole.upper()))
            front = choose.choice((
                f"{day} ", f"{day} ", f"{day:02d} ", f"{choose.choice(_words('weekdays'))} {day} ", "", "1er ",
                f"{day}, ", f"{self._in_words(day)} ",
            ))  # fmt: skip
            back = choose.choice((f" {year}", f" {year}", f" {year}", f", {year}", "", f" {year % 100:02d}"))
            return front + name + back
        return choose.choice((
            lambda: f"{day:02d}/{month:02d}/{year % 100:02d}", lambda: f"{day:02d}/{month:02d}",
            lambda: f"{month:02d}/{year}", lambda: f"{month:02d} {year}", lambda: f"{year}-{month:02d}-{day:02d}",
            lambda: f"{day:02d}{choose.choice(_words('months_three'))}{choose.choice(('', year))}",
            lambda: f"{day:02d}.{month:02d}.{year % 100:02d}", lambda: f"{day:02d}{month:02d}{year % 100:02d}",
            lambda: " ".join(f"{day:02d}{month:02d}{year}"), lambda: f"{day:02d} {' '.join(f'{month:02d}{year}')}",
            lambda: f"{choose.choice(('fin', 'début', 'courant', 'mi', 'été', 'printemps'))} {year}",
            lambda: "deux mille " + self._in_words(choose.randrange(1, 40)),
            lambda: "mille neuf cent " + self._in_words(choose.randrange(30, 70)),
            lambda: f"{year}/{month:02d}/{day:02d}", lambda: f"{day} {month} {year % 100:02d}",
            lambda: f"{year % 100:02d}-{month:02d}-{day:02d}",
        ))()  # fmt: skip

    def _in_words(self, number: int) -> str:
        if number < 20:
            return _words("units")[number]
        tens, unit = number // 10 * 10, number % 10
        tens_name = _TENS.get(tens, "soixante")
        return (
            tens_name
            if not unit
            else tens_name + (" et " if unit == 1 else self.choose.choice(("-", " "))) + _words("units")[unit]
        )

    def _hour(self) -> str:
        hour, minute = self.choose.randrange(24), self.choose.randrange(60)
        return self.choose.choice(
            (f"{hour}h{minute:02d}", f"{hour:02d}:{minute:02d}", f"{hour} h {minute:02d}", f"{hour}h")
        )

    def _digits(self, count: int) -> str:
        return "".join(self.choose.choice("0123456789") for _ in range(count))

    def phone(self) -> str:
        """A phone number of France, Belgium, Switzerland or Canada."""
        choose, some = self.choose, self._digits
        mark = choose.choice((" ", " ", " ", ".", "-", "", "/", "  "))
        pairs = [some(2) for _ in range(4)]
        french = mark.join((f"0{choose.randrange(1, 10)}", *pairs))
        return choose.choice((
            french, french, french, french, french, mark.join((f"+33 {choose.randrange(1, 10)}", *pairs)),
            mark.join((f"+33 (0){choose.randrange(1, 10)}", *pairs)), f"+33{some(9)}",
            f"0033 {some(1)} {' '.join(pairs)}",
            f"01 {some(4)} {some(4)}", f"({some(2)}) {some(2)}.{some(2)}.{some(2)}.{some(2)}",
            f"0{some(3)}/{some(2)}.{some(2)}.{some(2)}",
            f"+32 2 {some(3)} {some(2)} {some(2)}", f"+41 22 {some(3)} {some(2)} {some(2)}",
            f"0{some(2)} {some(3)} {some(2)} {some(2)}",
            f"({some(3)}) {some(3)}-{some(4)}", f"{some(3)}-{some(3)}-{some(4)}", f"({some(3)})-{some(3)}-{some(4)}",
            f"{some(2)} {some(2)} {some(2)}.{some(2)} {some(2)}",
            f"{choose.choice('ETP')}{some(2)} {pairs[0]} {pairs[1]} {pairs[2]}",
        ))  # fmt: skip

    def mail(self) -> str:
        """An address of mail."""
        choose = self.choose
        first, last = plain(self.first_name(own_case=True)), plain(self.last_name(own_case=True))
        first, last = (re.sub(r"\W", choose.choice(("", "-", ".")), name) for name in (first, last))
        box = choose.choice((f"{first}.{last}", f"{first[:1]}.{last}", f"{last}", f"{first}{last}", f"{last}_{first}",
        f"secr.{last}",
                             f"{first}-{last}", f"{first}{choose.randrange(1, 99)}",
                             f"secretariat.{last}"))  # fmt: skip
        host = choose.choice(
            (
                f"ch-{last}",
                "gmail",
                "orange",
                "aphp",
                "yahoo",
                "chu-ville",
                "hopital",
                f"clinique{last}",
                "free",
                "hcuge",
            )
        )
        made = f"{box}@{host}.{choose.choice(('fr', 'fr', 'com', 'be', 'ch', 'ca', 'org', 'net'))}"
        return choose.choice((made, made, made, made.upper(), made.title(), made.replace("@", " @ ")))

    def number(self) -> str:
        """A number of a patient, a stay or a dossier."""
        choose, some = self.choose, self._digits
        return choose.choice((
            some(7), some(8), some(9), some(10), some(10), some(11), some(8), f"{choose.choice('ABCHPN')}{some(7)}",
            f"{some(3)}.{some(3)}.{some(3)}", f"{some(2)}-{some(6)}", f"{some(4)} {some(3)} {some(3)}", f"800{some(7)}",
            f"{choose.randrange(2005, 2026)}{some(6)}", f"{choose.choice('HKR')}-{some(6)}", " ".join(some(9)),
            some(12),
        ))  # fmt: skip

    def social_security(self) -> str:
        """A number of social security."""
        choose, some = self.choose, self._digits
        sex = choose.choice("12")
        return choose.choice((
            f"{sex} {some(2)} {some(2)} {some(2)} {some(3)} {some(3)} {some(2)}", f"{sex}{some(12)} {some(2)}",
            f"{sex}{some(14)}",
            " ".join(sex + some(14)), f"{sex}{some(12)}", f"{sex} {some(6)} {some(8)}",
            f"{sex} {some(4)} {some(5)} {some(3)} {some(2)}",
            f"{some(2)}.{some(2)}.{some(2)}-{some(3)}.{some(2)}", f"756.{some(4)}.{some(4)}.{some(2)}",
            f"{''.join(choose.choice('ABCDEFGHLMNOPRST') for _ in range(4))} {some(4)} {some(4)}",
            " ".join(sex + some(12)),
        ))  # fmt: skip

    def zip_code(self) -> str:
        """A post code."""
        choose, some = self.choose, self._digits
        return choose.choice((
            some(5), some(5), some(5), some(5), f"{some(2)} {some(3)}", some(4), f"F-{some(5)}", f"CH-{some(4)}",
            f"{choose.choice('GHJ')}{some(1)}{choose.choice('ABXLK')} {some(1)}{choose.choice('ABXLK')}{some(1)}",
            f"{some(2)}000",
        ))  # fmt: skip

    def address(self) -> str:
        """Number and street."""
        choose = self.choose
        street = choose.choice(_words("streets"))
        kind = choose.random()
        if kind < 0.35:
            name = self.first_name(own_case=True) + " " + self.last_name(own_case=True)
        elif kind < 0.6:
            article = choose.choice(("des ", "du ", "de la ", "de l'", "de ", "Des ", "DE "))
            name = article + choose.choice(
                (choose.choice(_common_words()), choose.choice(_common_words()).title(), self._chained("cities.txt"))
            )
        elif kind < 0.8:
            name = choose.choice(
                ("du Général ", "du Dr ", "du Maréchal ", "du Faubourg ", "Saint-", "de ", "du ")
            ) + self.last_name(own_case=True)
        else:
            name = self.last_name(own_case=True)
        number = str(choose.randrange(1, 300)) + choose.choice(("", "", "", " bis", "bis", " ter", "-12", " B"))
        if choose.random() < 0.12:
            number = self._in_words(choose.randrange(1, 60))
        made = choose.choice((
            f"{number} {street} {name}", f"{number} {street} {name}", f"{number}, {street} {name}",
            f"{street} {name}, {number}",
            f"{street} {name} {number}", f"{number} {street} {name}, Apt {choose.randrange(1, 200)}",
            f"{street} {name}",
            f"{number} {street} {name} Bât {choose.choice('ABCD')}", f"BP {choose.randrange(10, 9999)}",
        ))  # fmt: skip
        drawn = choose.random()
        return made.upper() if drawn < 0.2 else made.lower() if drawn < 0.27 else made

    def _prose(self) -> str:
        return self.choose.choice(sentences())

    def _eponym(self) -> str:
        """A name that stands for a sign, a score or a disease."""
        known = self.choose.random() < 0.6
        return self.choose.choice(sorted(EPONYMS)).title() if known else self._chained("last_names.txt")

    def _brand(self) -> str:
        """A maker, a device, a drug: a known one, or the halves of two."""
        choose = self.choose
        name = choose.choice(_words("brands"))
        if choose.random() < 0.5:
            other = choose.choice(_words("brands"))
            name = name[: len(name) // 2 + 1] + other[len(other) // 2 :].lower()
        return name.upper() if choose.random() < 0.2 else name

    def _acronym(self) -> str:
        choose = self.choose
        if choose.random() < 0.6:
            return choose.choice(_words("acronyms"))
        return "".join(choose.choice("ABCDEFGHIKLMNOPRSTUV") for _ in range(choose.randrange(2, 6)))

    def _speech(self) -> str:
        """Words without sense, some with a capital."""
        choose = self.choose
        words = [
            choose.choice(words_of_prose() if choose.random() < 0.5 else _common_words())
            for _ in range(choose.randrange(1, 6))
        ]
        drawn = choose.random()
        if drawn < 0.5:
            words[0] = words[0].title()
        return " ".join(words) + choose.choice(("", "", ",", ".", " :"))
