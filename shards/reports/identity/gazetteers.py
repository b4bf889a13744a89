"""Words the detector knows: names, places, institutions, titles, months, and the medical and common words it must keep.

One dictionary maps the plain form of a word to a set of flags, so that a report costs one look-up per word. Lists are
made by `python -m ci.data.identity_lists`; the short tables below are ours.
"""

from __future__ import annotations

import re
import tomllib
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

LISTS = Path(__file__).with_name("lists")
LEXICON = Path(__file__).parents[1] / "lexicon"
_TABLES = tomllib.loads((LISTS / "context.toml").read_text("utf-8"))


def table(name: str) -> frozenset[str]:
    """The words of one table of context.toml."""
    return frozenset(_TABLES[name].split())


# Full-width, mathematical, circled and letter-like forms of Latin letters and digits.
_LOOK_ALIKES = (*range(0xFF01, 0xFF5F), *range(0x1D400, 0x1D800), *range(0x2460, 0x24EB), *range(0x2100, 0x2150))


def _plain_table() -> dict[int, str]:
    """Code point -> its lower-case base letter, always one character, so that offsets survive."""
    table: dict[int, str] = {ord("’"): "'", ord("‘"): "'", ord("ʼ"): "'", ord("`"): "'", ord("´"): "'"}
    table |= dict.fromkeys((ord(c) for c in "‐‑‒–—−"), "-") | dict.fromkeys((0xA0, 0x202F, 0x2009, 0x2007, 0x09), " ")
    for code in (*range(0x41, 0x250), *range(0x1E00, 0x1F00)):
        character = chr(code)
        base = unicodedata.normalize("NFD", character)[0].lower()
        if character.isalpha() and len(base) == 1:
            table[code] = {"ø": "o", "ł": "l", "đ": "d", "ð": "d", "ı": "i"}.get(base, base)
    for code in _LOOK_ALIKES:
        folded = unicodedata.normalize("NFKC", chr(code)).lower()
        if len(folded) == 1 and folded.isascii() and folded.isalnum():
            table[code] = folded
    return table


_PLAIN = _plain_table()


def plain(text: str) -> str:
    """Lower case without accents, apostrophes and dashes made one kind; as long as `text`, position by position."""
    return text.translate(_PLAIN)


class Word:
    """What a word may be, as bits of an int (an IntFlag costs ten times as much to test).

    Several may hold ("Rose", "Tours", "Avril"): context decides.
    """

    COMMON = 1  # a word of the language or of medicine
    FIRST = 2
    LAST = 4
    TITLE = 8  # Dr, Mme, Monsieur: a name follows
    ROLE = 16  # radiologue, interne, signed, patient: a name may follow, after a colon even in lower case
    PARTICLE = 32  # de, van, el: inside names
    MONTH = 64
    NUMBER = 128  # vingt, twelve
    STREET = 256  # rue, avenue, Street
    HOSPITAL = 512  # hôpital, CHU, Hospital: a name follows or comes before
    CITY_START = 1024  # first word of a place name
    EPONYM = 2048  # Paget, Carpentier: kept in eponym contexts
    EPONYM_HEAD = 4096  # maladie, signe, ring: makes the name beside it an eponym
    STOP = 8192  # ends a name even where it could be one: RDV, DATE, TEL
    WEEKDAY = 16384
    KIN = 32768  # père, fille, frère: a name may follow
    DEMONYM = 65536  # lyonnais
    USUAL_FIRST = 131072  # a first name of the surrogates' languages: known even in lower case
    CALL = 262144  # rappeler, contacter: a name follows at once
    FINDING = 524288  # a word of the finding or anatomy vocabulary: a known name only where it stands as one
    AUTHOR = 1048576  # validé, reviewed: a name may follow behind "par" or "by"
    BORN = 2097152  # née, ép.: another surname of the person before
    CLOSING = 4194304  # cordialement, sincerely: a signature may stand below


MONTHS: dict[str, int] = {
    "janvier": 1, "janv": 1, "jan": 1, "january": 1, "fevrier": 2, "fevr": 2, "fev": 2, "february": 2, "feb": 2,
    "mars": 3, "march": 3, "mar": 3, "avril": 4, "avr": 4, "april": 4, "apr": 4, "mai": 5, "may": 5, "juin": 6,
    "june": 6, "jun": 6, "juillet": 7, "juil": 7, "july": 7, "jul": 7, "aout": 8, "august": 8, "aug": 8,
    "septembre": 9, "september": 9, "sept": 9, "sep": 9, "octobre": 10, "october": 10, "oct": 10, "novembre": 11,
    "november": 11, "nov": 11, "decembre": 12, "december": 12, "dec": 12,
    # Belgium, Switzerland and their neighbours
    "januar": 1, "januari": 1, "enero": 1, "gennaio": 1, "februar": 2, "februari": 2, "febrero": 2, "febbraio": 2,
    "marz": 3, "maart": 3, "marzo": 3, "abril": 4, "aprile": 4, "mayo": 5, "maggio": 5, "juni": 6, "junio": 6,
    "giugno": 6, "juli": 7, "julio": 7, "luglio": 7, "agosto": 8, "augustus": 8, "septiembre": 9, "settembre": 9,
    "oktober": 10, "octubre": 10, "ottobre": 10, "noviembre": 11, "dezember": 12, "diciembre": 12, "dicembre": 12,
}  # fmt: skip

NUMBERS: dict[str, int] = {
    "un": 1, "premier": 1, "deux": 2, "trois": 3, "quatre": 4, "cinq": 5, "six": 6, "sept": 7, "huit": 8, "neuf": 9,
    "dix": 10, "onze": 11, "douze": 12, "treize": 13, "quatorze": 14, "quinze": 15, "seize": 16, "vingt": 20,
    "vingts": 20, "trente": 30, "quarante": 40, "cinquante": 50, "soixante": 60, "septante": 70, "huitante": 80,
    "octante": 80, "nonante": 90, "cent": 100, "cents": 100, "mil": 1000, "mille": 1000, "milles": 1000,
    "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11,
    "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16, "seventeen": 17, "eighteen": 18,
    "nineteen": 19, "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80,
    "ninety": 90, "hundred": 100, "thousand": 1000, "first": 1, "second": 2, "third": 3, "fourth": 4, "fifth": 5,
    "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9, "tenth": 10, "eleventh": 11, "twelfth": 12, "thirteenth": 13,
    "fourteenth": 14, "fifteenth": 15, "sixteenth": 16, "seventeenth": 17, "eighteenth": 18, "nineteenth": 19,
    "twentieth": 20, "thirtieth": 30,
}  # fmt: skip

TITLES = table("titles")
# Titles only with a capital and, where one letter, with a following capitalised word.
SHORT_TITLES = ("m", "mm")

ROLES = table("roles")

KIN = table("kin")
CALLS = table("calls")

AUTHORS = table("authors")

BORN = table("born")

CLOSINGS = table("closings")

PARTICLES = table("particles")

STREETS = table("streets")

HOSPITALS = table("hospitals")

STOPS = table("stops")

# Names of diseases, signs, devices and tests, in plain form. Titles win over them; eponym contexts keep them.
EPONYMS = table("eponyms")

EPONYM_HEADS = table("eponym_heads")

WEEKDAYS = table("weekdays")

DEMONYMS = table("demonyms")

# First names of French-speaking countries that the lists lack.
FIRST_NAMES = table("first_names")

# Words of reports that are also names: they count as names after a title or beside a name only.
MEDICAL = table("medical")
FORM_WORDS = table("form_words")
BRANDS = table("makers") | table("drugs")


# Endings of words of medicine and of the language; a word of some length that no list holds is common by them.
_DERIVED = re.compile(
    r"(?:ments?|[st]ions?|ismes?|log(?:ie|iste|ue|ique)s?|[gr]raph(?:ie|ique|iste)s?|scop(?:ie|ique)s?|tomies?|plasties?"
    r"|path(?:ie|ique)s?|[eu]mies?|uries?|algies?|ectasies?|therap(?:ie|eute|ique)s?|metr(?:ie|ique)s?|aires?|ivites?"
    r"|iques?|oides?|oses|ement|ibles?|ables?|culture|ites?|istes?|eries?|ures|atoires?|isees?|elles|grammes?)$"
)
_DERIVED_LETTERS_MIN = 9
# Stems of the international names of drugs (WHO), and their French forms.
_SUBSTANCE = re.compile(
    r"(?:[mx]abe?|tinib|parib|ciclib|prazole|conazole|nidazole|sartan|vastatine?|cilline?|cycline|mycine?|oxacine|caine"
    r"|curium|flurane|parine|gliptine|gliflozine|glutide|glinide|zepam|zolam|barbital|platine?|taxel|rubicine"
    r"|dronate|dronique|f[ae]ntanil|triptan|setron|lukast|semide|thiazide|formine|thyroxine|ciclovir|navir|buvir|asvir"
    r"|tegravir|xaban|gatran|grel|teplase|poetine|grastim|cept|olol|dipine|tidine|profene|coxib|sone|solone|trexate"
    r"|mustine|poside|bicine|fungine|penem|azoline|axone|dopa|peridone|apine|piprazole|triptyline|oxetine"
    r"|trozole|ximine|timox|racetam|gabaline|trigine|pramine|citabine|glitazone|lactone|sterone|fibrate|tropium)$"
)
_SUBSTANCE_LETTERS_MIN = 7


def is_derived(word: str) -> bool:
    """Whether a plain word that no list holds is a common one by its length and ending."""
    if len(word) < _SUBSTANCE_LETTERS_MIN:
        return False
    derived = len(word) >= _DERIVED_LETTERS_MIN and _DERIVED.search(word) is not None
    return derived or _SUBSTANCE.search(word) is not None


@dataclass(frozen=True, kw_only=True)
class Gazetteer:
    """`flags` of plain words; `cities` by first plain word -> the rests of place names that begin so."""

    flags: dict[str, int]
    cities: dict[str, frozenset[tuple[str, ...]]]


@cache
def gazetteer() -> Gazetteer:
    """Read once; about a tenth of a second and 30 MB."""
    flags: dict[str, int] = {}

    def mark(words: Iterable[str], value: int) -> None:
        for word in words:
            flags[word] = flags.get(word, 0) | value

    mark(read_list("words.txt"), Word.COMMON)
    for name_list, flag in (("first_names.txt", Word.FIRST), ("last_names.txt", Word.LAST)):
        particles = frozenset(PARTICLES)
        for line in read_list(name_list):
            parts = plain(line.split("\t")[0]).replace("-", " ").split()
            mark((part for part in parts if len(part) > 1 and part not in particles), flag)
    usual = (line.split("\t") for line in read_list("first_names.txt"))
    mark((plain(name) for name, about in usual if " " in about and len(name) > 3), Word.USUAL_FIRST)
    cities: dict[str, set[tuple[str, ...]]] = {}
    for line in (*read_list("cities.txt"), *table("cities")):
        first, *rest = plain(line.split("\t")[0]).replace("-", " ").replace("'", " ").split()
        cities.setdefault(first, set()).add(tuple(rest))
    mark(cities, Word.CITY_START)
    for entries, flag in (
        (FIRST_NAMES, Word.FIRST | Word.USUAL_FIRST),
        (TITLES, Word.TITLE), (ROLES, Word.ROLE), (KIN, Word.KIN), (CALLS, Word.CALL),
        (AUTHORS, Word.AUTHOR | Word.COMMON), (BORN, Word.BORN | Word.COMMON), (CLOSINGS, Word.CLOSING | Word.COMMON),
        (PARTICLES, Word.PARTICLE), (MONTHS, Word.MONTH),
        (NUMBERS, Word.NUMBER), (STREETS, Word.STREET), (HOSPITALS, Word.HOSPITAL), (EPONYMS, Word.EPONYM),
        (EPONYM_HEADS, Word.EPONYM_HEAD | Word.COMMON), (STOPS, Word.STOP), (WEEKDAYS, Word.WEEKDAY),
        (DEMONYMS, Word.DEMONYM), (MEDICAL, Word.COMMON), (FORM_WORDS | BRANDS, Word.COMMON),
        (MONTHS, Word.COMMON), (ROLES, Word.COMMON),
        (KIN, Word.COMMON), (STREETS, Word.COMMON), (HOSPITALS, Word.COMMON), (WEEKDAYS, Word.COMMON),
        (NUMBERS, Word.COMMON), (STOPS, Word.COMMON), (TITLES, Word.COMMON),
    ):  # fmt: skip
        mark(entries, flag)
    for word in lexicon_words():
        named = flags.get(word, 0) & (Word.FIRST | Word.LAST | Word.CITY_START)
        mark((word,), Word.FINDING if named else Word.FINDING | Word.COMMON)
    return Gazetteer(flags=flags, cities={first: frozenset(rests) for first, rests in cities.items()})


def lexicon_words() -> frozenset[str]:
    """Plain words of the vocabularies that reports are read by; a report's findings are written in them."""
    strings: list[str] = []

    def collect(value: object) -> None:
        if isinstance(value, str):
            strings.append(value)
        elif isinstance(value, dict | list):
            for one in value.values() if isinstance(value, dict) else value:
                collect(one)

    for name in ("anatomy.toml", "findings.toml", "places.toml"):
        collect(tomllib.loads((LEXICON / name).read_text("utf-8")))
    return frozenset(word for word in re.findall(r"[^\W\d_]+", plain(" ".join(strings))) if len(word) > 2)


def read_list(name: str) -> list[str]:
    """The lines of one list."""
    return (LISTS / name).read_text("utf-8").splitlines()
