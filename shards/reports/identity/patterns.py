"""Identifiers that have a shape: mail, web addresses, dates, ages over 89, social-security numbers, ids, phones.

Checksums tell the kind where a shape could be several; a number of the right shape with a wrong checksum is hidden all
the same, since a typing error does not make it safe. Whatever has seven digits or more and is no quantity is an id.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import shards.reports.identity.dates as dates
import shards.reports.identity.references as references
from shards.reports.identity.gazetteers import Word
from shards.reports.identity.view import PLACEHOLDER, Kind, View

OLDEST_AGE_YEARS = 89  # HIPAA: ages above it point at persons
_MAIL = re.compile(
    r"(?<![\w.])(?:[\w+'\-]{1,30}[.\-_] )?[\w.+'&\-]{1,64}\s?(?:@|\[at\]|\(at\)|\[@\])\s?[\w\-]+(?:\.[\w\-]+)*"
    r"(?: ?[.,]? ?(?:fr|com|org|net|be|ch|ca|de|uk|eu|lu|edu|gov|info)(?![\w@]))?"
)
_LOGIN_WORDS = frozenset(("login", "user", "username", "userid", "utilisateur", "connexion"))
_LOGIN = re.compile(r"(?<!\w)(?:login|user(?: ?name| ?id)?|utilisateur|connexion) ?[:=] ?(?P<id>[\w.\-]{2,39}\w)")
_URL = re.compile(r"(?:https?://|ftp://|www\.)[^\s<>\"')\]\0]+")
# A page that anyone may read: no number, no query, no user; the site of one hospital or practice tells where it is.
_PUBLIC_PAGE = re.compile(r"(?:https?://)?[\w.\-]+\.[a-z]{2,4}(?:/(?:[a-z]+(?:[.\-][a-z]+)*/?)*)?")
_OF_A_HOUSE = re.compile(
    r"(?<![a-z])(?:chr?u?s?|gh[tu]?)-|hopita|hospita|cliniq|clinic|cabinet|docteur|doctor|(?<![a-z])dr-"
)

# Digits with single separators between them, on one line: a phone number, an id, a social-security number.
_CLUSTER = re.compile(
    r"(?<![\w.,])\d(?:(?: ?[.\-/()_] ?|[ ]| ?\(0\) ?|\) ?[.\-] ?)?\d){3,}(?:\s?(?:x|ext\.?|poste)\s?\d{1,6})?(?!\w)"
)
_CLUSTER_OPENS = re.compile(r"(?<![\w.,])[+(]{1,3} ?\Z")
_CLUSTER_OPENS_WIDTH = 4  # characters
_PHONE_CUE = re.compile(
    r"(?:\btel\b|\btelephone|\bphone|\bfax|\bmobile|\bportable\b|\bgsm\b|\bcell\b|\bjoignables?|\bbip\b|\bposte\b|\bpager"
    r"|\bdect\b|\bcontact\b|\bappel(?:er|ez)?\b|\brappeler|\bcall(?:ed|back)?\b|\bext\b|\bnumero suivant"
    r"|\bbeeper|\bt ?:)"
    r"[^\d\n]{0,30}$"
)
_FRENCH_PHONE = re.compile(r"(?<![\d.,])0[1-9](?:[\s.\-/_]{1,3}\d\d){4}(?!\d)")
# A scanner's O, l, S, B and Z, and its comma for a point.
_MISREAD_PHONE = re.compile(r"(?<!\w)(?<!\d[.,:])[0o][\dlis](?:[ .,:\-]?[\dolisbz]{2}){4}(?![\w:]|[.,]\d)")
_SECOND_PHONE = re.compile(
    r"(?<=\0) ?(?:/|-|–|ou|or|,? ?poste|,? ?ext\.?|,? ?x|,? ?bip|,? ?p\.) ?(\d{1,6}(?:[ .]\d\d){0,4})(?![\d/]|[.,]\d)"
)
# "0000", "00 00 00 00 00", "1111111": what a form or a copy leaves of a number.
_NO_NUMBER = re.compile(
    r"(?<![\w.,/])(?<!\d[ .\-])(?:0(?:[ .\-]?0){3,}|(?P<same>\d)(?:[ .\-]?(?P=same)){6,})(?![ .,/\-]?\d|\w)"
)
# Numbers of laws, procedures and licences.
_LEGAL_BEFORE = re.compile(
    r"\b(?:loi|decret|law|act|cerfa|procedure|norme|iso|agrement(?: ars)?|accreditation)s? ?(?:n[°o] ?)?$"
)
_LETTERED_PHONE = re.compile(r"(?<!\d)(?:[a-z]?\d\d[ .]){3,}[a-z]?\d\d(?!\d)")
_LETTERED_PHONE_NUMBERS_MIN = 4
_ID_CUE = re.compile(
    r"(?<![\w])(?:ipp|iep|nip|nda|ins|mrn|ndossier|accession|acc|dossier|matricule|finess|rpps|adeli|nhs|inami|identifi\w*|"
    r"immatriculation|securite sociale|ssn|social security|niss|avs|ahv|nir|sin|patient id|patient|record|chart"
    r"|visit\w*|visite|venue|passage|admission|hospitalisation|"
    r"sejour|episode|case|order|account|policy|study id|exam id|id|ip|ref|reference|numero|number|n°|nº|no|num)"
    r"[ .:=#°º\-]*(?:(?:no|n°|nº|num|number|numero|id|patient|de dossier|du dossier|is|est le|est)[ .:=#°º]*){0,2}"
    r"(?P<id>(?=[a-z\-]{0,8}[\d])[a-z0-9]+(?:[\-/._][a-z0-9]+)*(?:(?<=\d) \d+(?!\w|[,.]\d))*)"
)
_ID_TAIL = re.compile(r"(?: ?[\-/._] ?[a-z0-9]*\d[a-z0-9]*| [a-z](?![\w'’]))+")
_WEAK_CUES = (
    "patient",
    "no",
    "n°",
    "nº",
    "number",
    "numero",
    "ref",
    "case",
    "visit",
    "visite",
    "study",
    "acc",
    "episode",
    "venue",
    "passage",
    "admission",
    "hospitalisation",
)
_MIXED_ID = re.compile(r"(?<![\w.])(?=[a-z\-/_]*+\d)[a-z0-9]+(?:[\-/_][a-z0-9]+)*(?![\w])")
_COUNTRY_CODE = re.compile(r"(?:f|b|ch|l|d)-? ?\d{4,5} [^\W\d_]")  # "F-25000 Besançon": a postal code, no id
_LONG_DIGITS = re.compile(r"(?<![\w.,])\d{7,}(?!\w|[.,]\d)")
_QUANTITY = re.compile(
    r" ?(?:/ ?(?:mm|µl|ul|l|ml|dl|champ)|mm|ui|iu|u/|u\b|copies|elements|gb\b|leuco|plaquettes|hematies|cfu|ufc"
    r"|kcal|euros?|€|\$"
    r"|cas\b|cases\b|habitants|births|naissances|patients)"
)
_DASHED_ID = re.compile(r"(?<!\w)(?=[a-z]*+(?:[\-/_]?[a-z]*+\d){6})[a-z0-9]+(?:[\-/_][a-z0-9]+)+(?!\w)")
_DOSE = re.compile(
    r"\d(?:mg|ml|g|kg|mcg|ui|cm|mm|x\d|m|s|kv|ma|mas|gy|hu|ans|h|min|cc|l|ppm|mmol|mmhg|bpm|mhz|t|el)(?![a-z])"
    r"|/ ?(?:mm|ml|l|ul|dl|min|h)\d?$"
)
_US_SSN = re.compile(r"(?<![\w.\-])\d{3}-\d\d-\d{4}(?![\w\-])")
_BELGIAN = re.compile(r"(?<![\w.])\d\d[. ]?[01]\d[. ]?[0-3]\d[\-. ]?\d{3}[. \-]?\d\d(?!\d)")
_AVS = re.compile(r"(?<![\w.])756[. ]?\d{4}[. ]?\d{4}[. ]?\d\d(?!\d)")
_SIN = re.compile(r"(?<![\w.\-+(])\d{3}[ \-]\d{3}[ \-]\d{3}(?![\w\-]| ?\d)")
_NIR = re.compile(
    r"(?<![\w.])[1-478] ?\d ?\d ?(?:[0-9] ?\d) ?(?:\d ?\d|2 ?[ab]) ?(?:\d ?){6}(?:[ /\-]*\d ?\d)?(?!\d| \d)"
)
_RAMQ = re.compile(r"(?<!\w)[a-z]{4} ?\d{4} ?\d{4}(?!\w)")  # Québec: name, birth date, rank
_UK_NI = re.compile(r"(?<!\w)[a-z]{2} ?\d\d ?\d\d ?\d\d ?[a-dt](?!\w)")
_NATIONAL_CUE = re.compile(
    r"(?:social security|national insurance|\bssn|\bnino|securite sociale|\bniss|\bnif|\bdni|\bnie|steuer-?id"
    r"|\bsecu)[^\n\d:]{0,25}[: ]{1,3}(?P<id>[a-z]{0,2} ?\d[\d .\-/]{4,20}[a-z]?(?!\w))"
)
_NATIONAL_DIGITS_MIN = 6
_GERMAN_INSURANCE = re.compile(r"(?<!\w)\d\d ?[0-3]\d[01]\d\d\d ?[a-z] ?\d{3}(?!\w)")
_DIGIT_ROW = re.compile(r"(?<![\w.,])\d(?: \d){6,}(?![\w]|[.,]\d| \d)|(?<![\w.,])\d(?: \d{1,2}){7,}(?![\w]|[.,]\d| \d)")

_AGE = re.compile(  # a digit first: the engine then skips to one
    r"((?:9(?<![\d.,/]9)\d|1(?<![\d.,/]1)[0-2]\d))"
    r"(?= ?[\- ]?(?:ans\b|an\b|annees\b|years?\b|yrs?\b|y/?o\b|yo\b|y\.o|j?aehrig"
    r"|[mf] (?:with|w/|s/p|p/w|who|present|here|c/o)))(?<!tc[ \-]99)(?<!ium[ \-]99)"  # "91F with cough", no "Tc 99m"
)
_AGED = re.compile(
    r"(?:\bagee?d?(?: de)?|\bage ?[:=]|\baged) ?(9\d|1[0-2]\d)(?!\d| ?(?:mois|months|jours|days|semaines|weeks))"
)


_OLD_WORDS = frozenset(("ninety", "nineteen", "vingt", "vingts", "nonante", "cent", "cents", "hundred"))
_OLD_STEMS = ("nonagen", "centenar")


def find_addresses_of_mail(view: View) -> None:
    """Claim mail and web addresses and logins: whatever else they hold is part of them."""
    text = view.plain
    if "@" in text or "(at)" in text or "[at]" in text:
        for match in _MAIL.finditer(view.masked):
            view.claim(match.start(), match.end(), "mail")
    if not _LOGIN_WORDS.isdisjoint(view.words):
        for match in _LOGIN.finditer(view.masked):
            view.claim(match.start("id"), match.end("id"), "id")
    if "://" in text or "www." in text:
        for match in _URL.finditer(view.masked):
            written = match.group().rstrip(".,;:")
            if not _is_public(written):
                view.claim(match.start(), match.start() + len(written), "url")


def public_pages(text: str) -> list[tuple[int, int]]:
    """Where a plain text names pages of the web that anyone may read, and no hospital's or practice's own."""
    if "http" not in text and "www." not in text:
        return []
    return [match.span() for match in _URL.finditer(text) if _is_public(match.group().rstrip(".,;:"))]


def _is_public(address: str) -> bool:
    return _PUBLIC_PAGE.fullmatch(address) is not None and _OF_A_HOUSE.search(address) is None


def find(view: View) -> None:
    """Claim everything else with a shape, most telling shapes first."""
    if view.longest_number >= 4 or view.dense:
        view.masked = _NO_NUMBER.sub(lambda match: PLACEHOLDER * len(match.group()), view.masked)
    for start, end in references.find(view):
        view.hide(start, end)
    if view.dense:
        _social_security(view)
    for found in dates.find(view):
        view.claim(found.start, found.end, "birth_date" if found.birth else "date")
    _ages(view)
    if view.longest_number >= 4 or view.dense:
        _phones_and_ids(view)


def _social_security(view: View) -> None:
    for pattern, before in ((_AVS, 0), (_US_SSN, 0), (_UK_NI, 3), (_RAMQ, 5), (_GERMAN_INSURANCE, 0)):
        for match in view.at_numbers(pattern, before):
            view.claim(match.start(), match.end(), "social_security")
    for match in view.at_numbers(_NATIONAL_CUE, 60):
        if sum(character.isdigit() for character in match["id"]) < _NATIONAL_DIGITS_MIN:
            continue
        view.claim(match.start("id"), match.end("id"), "social_security")
    for match in view.at_numbers(_BELGIAN):
        written = match.group()
        if belgian_valid(written) or re.fullmatch(r"\d\d\.\d\d\.\d\d-\d{3}\.\d\d", written):
            view.claim(match.start(), match.end(), "social_security")
    for match in view.at_numbers(_SIN):
        if luhn_valid(match.group()) or "-" in match.group():
            view.claim(match.start(), match.end(), "social_security")
    for match in view.at_numbers(_DIGIT_ROW):
        count = sum(character.isdigit() for character in match.group())
        if dates.NUMERIC.fullmatch(match.group()):
            continue  # a date whose digits stand apart
        if len(set(match.group())) > 3:
            view.claim(match.start(), match.end(), "social_security" if count >= 12 else "id")
    for match in view.at_numbers(_NIR):
        if nir_valid(match.group()) or sum(c.isalnum() for c in match.group()) in (13, 15):
            view.claim(match.start(), match.end(), "social_security")
    for start, end, written in _clusters(view):
        if written[0] in "12" and set(written) <= set("0123456789 ") and 13 <= sum(map(str.isdigit, written)) <= 16:
            view.claim(start, end, "social_security")


def _clusters(view: View) -> Iterator[tuple[int, int, str]]:
    """Rows of digits with what opens them: "+33 ...", "(0) ..."."""
    for match in view.at_numbers(_CLUSTER):
        text, (start, end) = match.string, match.span()
        opens = _CLUSTER_OPENS.search(text, max(0, start - _CLUSTER_OPENS_WIDTH), start)
        start = opens.start() if opens else start
        yield start, end, text[start:end]


def nir_valid(written: str) -> bool:
    """French number with its key: key = 97 - number mod 97, Corsican 2A and 2B read as 19 and 18."""
    digits = re.sub(r"[^\dab]", "", written.lower()).replace("2a", "19").replace("2b", "18")
    return len(digits) == 15 and digits.isdigit() and int(digits[13:]) == 97 - int(digits[:13]) % 97


def belgian_valid(written: str) -> bool:
    """National number: the last two digits are 97 - rest mod 97, with a 2 before it for those born from 2000."""
    digits = re.sub(r"\D", "", written)
    if len(digits) != 11:
        return False
    return int(digits[9:]) in (97 - int(digits[:9]) % 97, 97 - int("2" + digits[:9]) % 97)


def luhn_valid(written: str) -> bool:
    """Canadian social insurance number and others: the sum with every second digit doubled ends in 0."""
    digits = [int(c) for c in written if c.isdigit()]
    doubled = [d if i % 2 == 0 else d * 2 - 9 * (d > 4) for i, d in enumerate(reversed(digits))]
    return len(digits) > 1 and sum(doubled) % 10 == 0


def _ages(view: View) -> None:
    if view.longest_number >= 2:
        for pattern, before in ((_AGE, 0), (_AGED, 12)):
            for match in view.at_numbers(pattern, before):
                if OLDEST_AGE_YEARS < int(match[1]) < 130:
                    view.claim(match.start(1), match.end(1), "age_over_89")
    if (view.seen & Word.NUMBER and not _OLD_WORDS.isdisjoint(view.words)) or any(
        stem in view.plain for stem in _OLD_STEMS
    ):
        _ages_in_words(view)


def _ages_in_words(view: View) -> None:
    for index, word in enumerate(view.words):
        if word in ("ninety", "nonante", "quatre", "cent", "hundred", "one") and (
            index == 0 or not view.flags[index - 1] & Word.NUMBER
        ):
            stop = index
            while (
                stop < len(view.words)
                and view.flags[stop] & Word.NUMBER
                and (stop == index or view.gap(stop - 1) in (" ", "-"))
            ):
                stop += 1
            unit = view.words[stop] if stop < len(view.words) else ""
            value = dates.value_of(view.words[index:stop])
            if unit in ("ans", "year", "years", "yo") and OLDEST_AGE_YEARS < value < 130:
                view.claim(view.starts[index], view.ends[stop - 1], "age_over_89")
        elif word.startswith(_OLD_STEMS):
            view.claim(view.starts[index], view.ends[index], "age_over_89")


def _phones_and_ids(view: View) -> None:
    for match in view.at_numbers(_ID_CUE, 100):
        if _LEGAL_BEFORE.search(view.masked, max(0, match.start() - 16), match.start()):
            continue
        weak = match.group().startswith(_WEAK_CUES)
        written = _row_of_digits(match["id"]) if weak else match["id"]
        count = sum(character.isdigit() for character in written)
        least = 5 if weak else 4
        if count >= least and not _QUANTITY.match(view.masked, match.end()) and not _phone_like(written):
            end = match.start("id") + len(written)
            tail = _ID_TAIL.match(view.masked, end)
            view.claim(match.start("id"), tail.end() if tail else end, "id")
    for match in view.at_numbers(_MISREAD_PHONE, 8):
        written = match.group()
        if re.search("[a-z,:]", written) and sum(character.isdigit() for character in written) >= 7:
            view.claim(match.start(), match.end(), "phone")
    for start, end, written in _clusters(view):
        kind = _cluster_kind(view, start, written)
        if kind is not None and not (kind == "id" and _QUANTITY.match(view.masked, end)):
            view.claim(start, end, kind)
    for match in view.at_numbers(_FRENCH_PHONE):
        view.claim(match.start(), match.end(), "phone")
    for phone in sorted({one.end for one in view.identifiers if one.kind == "phone"}):
        second = _SECOND_PHONE.match(view.masked, phone)
        if second is not None:
            view.claim(second.start(1), second.end(1), "phone")
    if len(view.numbers) >= _LETTERED_PHONE_NUMBERS_MIN:
        for match in _LETTERED_PHONE.finditer(view.masked):
            view.claim(match.start(), match.end(), "phone")
    for pattern, before in ((_LONG_DIGITS, 0), (_DASHED_ID, 100), (_MIXED_ID, 100)):
        for match in view.at_numbers(pattern, before):
            count = sum(character.isdigit() for character in match.group())
            letters = sum(character.isalpha() for character in match.group())
            if _COUNTRY_CODE.match(view.masked, match.start()):
                continue
            if _DOSE.search(match.group()) or _LEGAL_BEFORE.search(
                view.masked, max(0, match.start() - 16), match.start()
            ):
                continue
            if (count >= 7 or (count >= 5 and 0 < letters <= 6)) and not _QUANTITY.match(view.masked, match.end()):
                view.claim(match.start(), match.end(), "id")


def _row_of_digits(written: str) -> str:
    """The number behind a weak cue: its first group, or all groups where only together they are long enough."""
    first = written.split(" ")[0]
    digits = re.sub(r"\D", "", first)
    whole = first.isdigit() and len(digits) < 5 and len(re.sub(r"\D", "", written)) >= 6
    return written if whole else first


def _phone_like(written: str) -> bool:
    digits = re.sub(r"\D", "", written)
    return bool(re.fullmatch(r"0\d(?:[.\-]\d\d){4}|\d{3}[\-.]\d{3}[\-.]\d{4}", written)) or (
        len(digits) == 10 and written.startswith("0") and written.isdigit()
    )


def _cluster_kind(view: View, start: int, written: str) -> Kind | None:
    """What a row of digits with separators is; None for quantities and tables."""
    main = re.split(r"\s?(?:x|ext|poste)", written)[0]
    digits = re.sub(r"\D", "", main)
    groups = re.findall(r"\d+", main)
    before = view.masked[max(0, start - 60) : start]
    cued = _PHONE_CUE.search(before) is not None
    lengths = tuple(map(len, groups))
    if cued and (6 if "/" in main else 4) <= len(digits) <= 15 and not re.search(r"\d[.,]\d$", main[:3]):
        return "phone"
    if written[0] in "+(" and 7 <= len(digits) <= 16 and not re.fullmatch(r"\(\d+\) ?\d", main):
        return "phone"
    if digits.startswith("00") and 10 <= len(digits) <= 16 and len(groups) >= 1:
        return "phone"
    if digits[0] == "0" and 9 <= len(digits) <= 12 and not _decimals(main):
        return "phone"
    if lengths == (2, 1, 2, 2, 2, 2) and digits.startswith("33"):
        return "phone"
    if lengths in ((3, 3, 4), (1, 3, 3, 4), (3, 4), (3, 3, 4, 2), (4, 3, 3), (3, 3, 3), (2, 4, 4)) and not _decimals(
        main
    ):
        if lengths in ((3, 4), (2, 4, 4), (4, 3, 3), (3, 3, 3)) and "-" not in main and "." not in main:
            return "id" if len(digits) >= 9 else None
        return "phone" if lengths != (3, 3, 3) else "id"
    if len(groups) >= 4 and set(lengths) <= {2} and len(digits) in (8, 10, 12) and not _decimals(main):
        return "phone"
    if max(lengths) >= 7:
        return "id"
    if len(digits) >= 9 and len(groups) <= 4 and min(lengths[1:] or lengths) >= 3 and not re.search(r" |\.", main):
        return "id"
    return None


def _decimals(written: str) -> bool:
    """Whether a row of numbers holds decimals ("2.5 3.1 4.0"), which no phone number does."""
    return " " in written and len(re.findall(r"(?<!\d)\d{1,2}\.\d{1,2}(?!\d|\.\d)", written)) >= 2
