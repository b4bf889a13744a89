"""A written date moved by a number of days, in the form it had: numeric, with a month's name, in words, a range.

A span is read as a row of dates. What one of them lacks it takes from the next ("12 au 15 mars 2019": the first has the
month of the second), else from the one before, else from the document. Everything is a function of the text and the
shift: no clock.
"""

from __future__ import annotations

import datetime
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from shards.reports.identity.dates import distance, value_of
from shards.reports.identity.gazetteers import LISTS, MONTHS, NUMBERS, plain

WRITTEN = tomllib.loads((LISTS / "surrogates.toml").read_text("utf-8"))
# Two digits are a year from 1937 to 2036. Another century would give the same day and month: leap years agree.
LAST_TWO_DIGIT_YEAR = 2036
YEAR_WITHOUT_ONE = 2001  # of "12 mars" in a document without any year
_MIDDLE_DAY, _MIDDLE_MONTH = 15, 6  # of dates that lack them: "mars 2019", "2019"
_ROMAN = ("i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix", "x", "xi", "xii")
_WEEKDAY = {plain(name): number for tongue in WRITTEN.values() for number, name in enumerate(tongue["weekdays"])}
_WEEKDAY |= {name[:3]: number for name, number in _WEEKDAY.items() if name != "mardi"}  # "mar" is March

_ENGLISH = "|".join(
    sorted({plain(name)[:length] for name in WRITTEN["en"]["months"] for length in (3, 4, 9)}, key=len, reverse=True)
)
_SEPARATOR = r" ?[./|\-\\,_ ]{1,2} ?"
_NAMES = f"(?:{'|'.join(sorted(MONTHS, key=len, reverse=True))})(?![a-z])"
_NAME = f"(?P<name>(?<![a-z]){_NAMES})"
_SUFFIX = r"(?: ?(?P<suffix>er|ere|st|nd|rd|th)(?![a-z]))?"
_OF = r"[ ,\-/._\n]{0,3}(?:of |de |du mois de )?"
_YEAR = rf"'?(?P<year>\d{{4}}|\d\d(?!\d| ?[./]\d|(?: ?er)?{_OF}{_NAMES}))"
_ROMANS = "|".join(sorted(_ROMAN, key=len, reverse=True))
# In this order; numbers `first` and `second` are day and month in one order or the other.
_FORMS = tuple(
    re.compile(form)
    for form in (
        rf"(?P<year>\d{{4}}){_SEPARATOR}(?P<month>[01]?\d){_SEPARATOR}(?P<day>[0-3]?\d)(?!\d)",
        rf"(?P<first>\d\d?){_SEPARATOR}(?P<second>\d\d?){_SEPARATOR}{_YEAR}",
        rf"(?P<day>[0-3]?\d){_SUFFIX}{_OF}{_NAME}(?:\.?{_OF}{_YEAR})?",
        rf"(?P<day>[0-3]?\d)[ ./\-](?P<roman>{_ROMANS})[ ./\-](?P<year>\d{{4}})",
        rf"{_NAME}\.?[ \-]{{0,2}}(?:the )?(?P<day>[0-3]?\d)(?!\d){_SUFFIX}[ ,./\-]{{1,3}}(?P<year>\d{{4}}|(?<=')\d\d)",
        rf"(?P<name>{_ENGLISH})\.?[ \-]{{0,2}}(?:the )?(?P<day>[0-3]?\d)(?!\d){_SUFFIX}",
        rf"{_NAME}(?:\.?{_OF}{_YEAR})?",
        r"s(?:em(?:aine)?\.?)? ?(?P<week>\d\d?)[ /\-.,]{0,2}(?:de )?(?P<year>\d{4})(?!\d)",
        r"(?P<month>0?[1-9]|1[0-2])(?: ?[/.\-|_] ?| )(?P<year>\d{4})(?!\d)",
        rf"(?P<year>\d{{4}}){_SEPARATOR}(?P<month>0[1-9]|1[0-2])(?!\d)",
        r"(?P<first>\d\d?) ?[./\-] ?(?P<second>\d\d?)(?!\d| ?[./\-]\d)",
        r"(?P<day>[0-3]?\d)(?:st|nd|rd|th)?, (?P<year>\d{4})(?!\d)",
        r"(?P<year>\d{4})(?!\d)",
        r"(?P<year>[4-9]\d|(?<=')\d\d)(?!\d)",
        rf"(?<![:t])(?P<day>[0-3]?\d)(?![\d:h]){_SUFFIX}",
    )
)  # fmt: skip
_START = re.compile(r"(?<![a-z])[a-z]|(?<!\d)\d")
_ATOM = re.compile(r"[a-z]+|\d+")
_LEFT_OVER = re.compile(r"(?<![:\dt])\d+(?![\d:h])")
_MISSPELT = re.compile(r"(?<=\d) ?([^\W\d_]{3,10})(?=\.?,? \d{4})")
_NUMBER_WORDS = re.compile(
    rf"(?<![a-z])(?:{'|'.join(sorted(NUMBERS, key=len, reverse=True))})(?![a-z])"
    rf"(?:(?:[ \-]+(?:et |and )?)(?:{'|'.join(sorted(NUMBERS, key=len, reverse=True))})(?![a-z]))*"
)


@dataclass(kw_only=True)
class _Part:
    """One date of a span: `at` says where each field is written, the numbers what it says (None: not written)."""

    start: int
    end: int
    at: dict[str, tuple[int, int]]
    day: int | None = None
    month: int | None = None
    year: int | None = None
    week: int | None = None
    lent: dict[str, int] = field(default_factory=dict)  # field -> part that it was taken from
    moved: datetime.date = datetime.date.min

    def says(self, role: Literal["month", "year"]) -> bool:
        """Whether the field is written here or was lent."""
        written = ("month", "name", "roman") if role == "month" else ("year",)
        return role in self.lent or any(name in self.at for name in written)


def moved(written: str, shift: datetime.timedelta, language: str, year: int = YEAR_WITHOUT_ONE) -> str | None:
    """`written` with all its dates moved; `year` is that of dates which have none. None when there is no date in it."""
    in_digits = _in_digits(written)
    if in_digits != written:
        made = moved(in_digits, shift, language, year)
        return made if made is None or re.search(r"\d", written) else _in_words(made, written, language)
    text = _spelt(plain(written))
    digits = re.sub(r"\D", "", text)
    if re.fullmatch(r"[\d ]+", text) and len(digits) in (6, 8) and not re.fullmatch(r"\d\d? \d\d? \d{4}", text):
        return _moved_compact(text, digits, shift)
    parts = _parts(text, language)
    if not parts or _digits_left_over(text, parts):
        return None
    for index in reversed(range(len(parts))):
        _borrow(parts, index, year)
    if not all(_move(part, shift) for part in parts):
        return None
    return _rewritten(written, text, parts, shift, language)


def years_of(texts: Iterable[str]) -> list[int]:
    """The four-digit years written in dates."""
    return [int(year) for text in texts for year in re.findall(r"(?<!\d)(?:19|20)\d\d(?!\d)", text)]


def _spelt(text: str) -> str:
    """The plain text with a misspelt month put right where that keeps its length, so that offsets stay."""
    match = _MISSPELT.search(text)
    if match is None or match[1] in MONTHS:
        return text
    near = sorted((distance(match[1], month), month) for month in MONTHS if len(month) == len(match[1]))
    if not near or near[0][0] > 2:
        return text
    return text[: match.start(1)] + near[0][1] + text[match.end(1) :]


# --- reading ---


def _parts(text: str, language: str) -> list[_Part]:
    parts = []
    position = 0
    while (start := _START.search(text, position)) is not None:
        part = _part_at(text, start.start(), language)
        if part is not None:
            parts.append(part)
            position = part.end
        else:
            atom = _ATOM.match(text, start.start())
            position = atom.end() if atom else start.end()
    return parts


def _digits_left_over(text: str, parts: list[_Part]) -> bool:
    """Whether digits stand outside all dates, and are no time of the day."""
    position = 0
    for part in parts:
        if _LEFT_OVER.search(text[position : part.start]):
            return True
        position = part.end
    return _LEFT_OVER.search(text[position:]) is not None


def _part_at(text: str, start: int, language: str) -> _Part | None:
    """The date in the first form that fits at `start`."""
    for form in _FORMS:
        match = form.match(text, start)
        if match is None:
            continue
        fields = {name: value for name, value in match.groupdict().items() if value is not None}
        at = {name: match.span(name) for name in fields}
        if "first" in fields:
            roles = _order(fields, text[at["first"][1] : at["second"][0]], language)
            for name, role in zip(("first", "second"), roles, strict=True):
                fields[role], at[role] = fields.pop(name), at.pop(name)
        month = _month(fields)
        day = int(fields["day"]) if "day" in fields else None
        if (month is not None and not 1 <= month <= 31) or (day is not None and not day <= 31):
            continue
        week = int(fields["week"]) if "week" in fields else None
        year = _full_year(fields["year"].lstrip("'")) if "year" in fields else None
        return _Part(start=start, end=match.end(), at=at, day=day, month=month, year=year, week=week)
    return None


def _order(fields: dict[str, str], separator: str, language: str) -> tuple[str, str]:
    """Roles of the two short numbers of a date: the numbers tell, else the language."""
    first, second = int(fields["first"]), int(fields["second"])
    month_first = second > 12 or (language == "en" and first <= 12 and "/" in separator)
    return ("month", "day") if month_first else ("day", "month")


def _month(fields: dict[str, str]) -> int | None:
    if "name" in fields:
        return MONTHS[fields["name"]]
    if "roman" in fields:
        return _ROMAN.index(fields["roman"]) + 1
    return int(fields["month"]) if "month" in fields else None


def _full_year(digits: str) -> int:
    year = int(digits)
    if len(digits) > 2:
        return year
    century = LAST_TWO_DIGIT_YEAR // 100 * 100
    return year + (century if year <= LAST_TWO_DIGIT_YEAR % 100 else century - 100)


def _borrow(parts: list[_Part], index: int, year: int) -> None:
    """Fill what a date lacks from its neighbours; a range that runs over a month's or year's end begins before it."""
    part = parts[index]
    if part.week is not None:
        return
    if part.day is not None and part.month is None:
        _lend(parts, index, "month")
    if part.year is None and part.month is not None:
        _lend(parts, index, "year")
    _begin_before(part, parts[index + 1] if index + 1 < len(parts) else None)
    part.year = year if part.year is None else part.year


def _lend(parts: list[_Part], index: int, role: Literal["month", "year"]) -> None:
    """Take a field from the part where a neighbour has it."""
    for other in (index + 1, index + 2, index - 1, index - 2):
        if 0 <= other < len(parts) and parts[other].says(role):
            part = parts[index]
            value = parts[other].month if role == "month" else parts[other].year
            part.lent[role] = parts[other].lent.get(role, other)
            if role == "month":
                part.month = value
            else:
                part.year = value
            return


def _begin_before(part: _Part, following: _Part | None) -> None:
    """ "28 au 3 avril" begins in March, "28 décembre au 3 janvier 2020" in 2019."""
    if following is None or following.month is None or part.month is None:
        return
    if "month" in part.lent and part.day is not None and following.day is not None and part.day > following.day:
        part.month -= 1
        if part.month == 0:
            part.month = 12
            part.year = part.year - 1 if part.year is not None else None
    elif "year" in part.lent and part.year is not None and part.month > following.month:
        part.year -= 1


def _move(part: _Part, shift: datetime.timedelta) -> bool:
    """Set where a date goes; False where it is none."""
    if part.week is not None:
        date = near(part.year or 0, 1, 4)
        date = date and date + datetime.timedelta(weeks=part.week - 1)
    else:
        date = near(part.year or 0, part.month or _MIDDLE_MONTH, _MIDDLE_DAY if part.day is None else part.day)
    if date is None:
        return False
    part.moved = date + shift
    return True


def near(year: int, month: int, day: int) -> datetime.date | None:
    """The date; day and month exchanged or brought into the calendar where the written ones are not."""
    if not 1900 <= year < 2100:
        return None
    if month > 12 >= day:
        month, day = day, month
    month = min(max(month, 1), 12)
    for candidate in (min(max(day, 1), 31), 28):
        try:
            return datetime.date(year, month, candidate)
        except ValueError:
            continue
    return None


# --- writing ---


def _rewritten(written: str, text: str, parts: list[_Part], shift: datetime.timedelta, language: str) -> str:
    changes: dict[tuple[int, int], str] = {}
    for index, part in enumerate(parts):
        padded = not any(end - start == 1 for role, (start, end) in part.at.items() if role in ("day", "month"))
        name = part.at.get("name") or parts[part.lent.get("month", index)].at.get("name")
        named = name is not None and (name[0] == 0 or text[name[0] - 1] in " .")  # "5 mars", but "05-Mar-2019"
        for role, (start, end) in part.at.items():
            changes[start, end] = _field_like(role, written[start:end], part, padded and not named, language)
        changes |= _lent_fields(written, parts, index, language)
    for match in re.finditer(
        r"(?<![a-z])(?:" + "|".join(sorted(_WEEKDAY, key=len, reverse=True)) + r")(?![a-z])", text
    ):
        if not any(start < match.end() and match.start() < end for start, end in changes):
            changes[match.span()] = _weekday_like(match, written, parts, shift)
    pieces, position = [], 0
    for (start, end), new in sorted(changes.items()):
        pieces += [written[position:start], new]
        position = end
    return "".join([*pieces, written[position:]])


def _field_like(role: str, token: str, part: _Part, padded: bool, language: str) -> str:
    """One field of a moved date, in the look of the written one."""
    date = part.moved
    if role == "name":
        return month_like(token, date.month, language)
    if role == "roman":
        return like(token, _ROMAN[date.month - 1].upper() if token.isupper() else _ROMAN[date.month - 1])
    if role == "suffix":
        return _suffix_like(token, date.day)
    if role == "week":
        return f"{date.isocalendar().week:0{len(token)}d}"
    if role == "year":
        year = date.isocalendar().year if part.week is not None else date.year
        digits = token.lstrip("'")
        return token[: len(token) - len(digits)] + (f"{year % 100:02d}" if len(digits) == 2 else f"{year:04d}")
    number = date.day if role == "day" else date.month
    zero = token.startswith("0") or (len(token) == 2 and padded)
    return f"{number:0{len(token)}d}" if zero else str(number)


def _suffix_like(token: str, day: int) -> str:
    if plain(token) in ("er", "ere"):
        return token if day == 1 else ""
    ending = "th" if 4 <= day % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return like(token, ending)


def _lent_fields(written: str, parts: list[_Part], index: int, language: str) -> dict[tuple[int, int], str]:
    """Month or year that a date was lent and that the move made another: it must be written now."""
    part = parts[index]
    added = {}
    month_at, year_at = (parts[part.lent[role]] if role in part.lent else None for role in ("month", "year"))
    text = ""
    if month_at is not None and part.moved.month != month_at.moved.month:
        if "name" in month_at.at:
            start, end = month_at.at["name"]
            name = month_like(written[start:end], part.moved.month, language)
            if part.lent["month"] < index:  # "March 29-April 2"
                return {(part.start, part.start): name + " "}
            text = f" {name}"
        else:
            text = f"/{part.moved.month:02d}"
    if year_at is not None and part.moved.year != year_at.moved.year:
        year_written = year_at.at["year"]
        short = year_written[1] - year_written[0] == 2
        separator = "/" if "name" not in part.at and "/" in (text or written[part.start : part.end]) else " "
        text += f"{separator}{part.moved.year % 100:02d}" if short else f"{separator}{part.moved.year}"
    if text:
        added[part.end, part.end] = text
    return added


def _weekday_like(match: re.Match[str], written: str, parts: list[_Part], shift: datetime.timedelta) -> str:
    """The weekday of the date it belongs to; where that has no year, as many weekdays on as the date was moved."""
    token = match.group()
    beside = next((part for part in parts if part.start >= match.end()), parts[-1])
    whole = beside.day is not None and beside.says("year")
    number = beside.moved.weekday() if whole else (_WEEKDAY[token] + shift.days) % 7
    tongue = "en" if token in {plain(name)[: len(token)] for name in WRITTEN["en"]["weekdays"]} else "fr"
    name = WRITTEN[tongue]["weekdays"][number]
    return like(written[match.start() : match.end()], name[:3] if len(token) == 3 else name)


def _moved_compact(text: str, digits: str, shift: datetime.timedelta) -> str | None:
    """Eight or six digits without separators, or standing apart."""
    layouts = ("%Y%m%d", "%d%m%Y") if len(digits) == 8 else ("%d%m%y", "%y%m%d")
    if len(digits) == 8 and 1900 <= int(digits[4:]) < 2100 and _exactly(digits, "%d%m%Y"):
        layouts = layouts[::-1]
    for layout in layouts:
        date = _exactly(digits, layout)
        if date is not None:
            following = iter((date + shift).strftime(layout))
            return "".join(next(following) if character.isdigit() else character for character in text)
    return None


def _exactly(digits: str, layout: str) -> datetime.date | None:
    """Digits read in a layout of day, month and year, or None where they are no date of these two centuries."""
    fields = {}
    position = 0
    for code in re.findall("%(.)", layout):
        width = 4 if code == "Y" else 2
        fields[code] = digits[position : position + width]
        position += width
    year = int(fields["Y"]) if "Y" in fields else _full_year(fields["y"])
    if not 1900 <= year < 2100:
        return None
    try:
        return datetime.date(year, int(fields["m"]), int(fields["d"]))
    except ValueError:
        return None


def _in_digits(written: str) -> str:
    """Numbers in words written with digits: "douze mars deux mille dix-neuf" is "12 mars 2019"."""
    text = plain(written)

    def digits(match: re.Match[str]) -> str:
        words = re.findall("[a-z]+", match.group())
        if words == ["sept"] and not re.match(f" {_NAMES}", text[match.end() :]):
            return written[match.start() : match.end()]  # the month
        for split in range(len(words)):  # "third two thousand nineteen" is a day and a year
            year, day = value_of(words[split:]), value_of(words[:split])
            if 1900 <= year < 2100 and day <= 31:
                return f"{day} {year}" if split else str(year)
        return str(value_of(words))

    pieces, position = [], 0
    for match in _NUMBER_WORDS.finditer(text):
        pieces += [written[position : match.start()], digits(match)]
        position = match.end()
    return "".join([*pieces, written[position:]])


def _in_words(made: str, written: str, language: str) -> str:
    """The digits of a moved date in words, in the language and the kind of number of the written one."""
    words = set(re.findall("[a-z]+", plain(written)))
    english = language == "en" or bool(words & {"thousand", "twenty", "nineteen", "hundred", "of"})
    ordinal = bool(words & {plain(word) for word in WRITTEN["en"]["ordinals"]} | words & {"thirtieth"})

    def word(match: re.Match[str]) -> str:
        number = int(match.group())
        if number > 31:
            return number_in_words(number, "en" if english else "fr")
        if english:
            return ordinal_in_words(number) if ordinal else number_in_words(number, "en")
        return "premier" if number == 1 else number_in_words(number, "fr")

    spelt = re.sub(r"\d+", word, made)
    return spelt.upper() if written.isupper() else spelt


def number_in_words(number: int, language: str) -> str:
    """A day or a year in words."""
    if number >= 1000:
        thousands, rest = divmod(number, 1000)
        if language == "en" and thousands == 1:
            return f"nineteen {number_in_words(rest % 100, 'en')}" if rest % 100 else "nineteen hundred"
        head = {("fr", 1): "mille", ("fr", 2): "deux mille", ("en", 2): "two thousand"}[language, thousands]
        return f"{head} {number_in_words(rest, language)}" if rest else head
    if number >= 100:
        hundreds, rest = divmod(number, 100)
        head = f"{number_in_words(hundreds, language)} {'cent' if language == 'fr' else 'hundred'}"
        return f"{head} {number_in_words(rest, language)}" if rest else head
    units, tens = WRITTEN[language]["units"], WRITTEN[language]["tens"]
    if number < 20:
        return str(units[number])
    ten = tens[number // 10 - 2]
    if language == "fr":
        rest = number % 20 if number >= 60 else number % 10
        joined = " et " if rest in (1, 11) and number < 80 else "-"
    else:
        rest, joined = number % 10, "-"
    return f"{ten}{joined}{units[rest]}" if rest else ten


def ordinal_in_words(day: int) -> str:
    """An English day: "third", "twenty-first"."""
    ordinals = WRITTEN["en"]["ordinals"]
    if day <= 20:
        return str(ordinals[day])
    return "thirtieth" if day == 30 else f"{number_in_words(day // 10 * 10, 'en')}-{ordinals[day % 10]}"


def month_like(token: str, month: int, language: str) -> str:
    """The month's name in the language, length and capitals of the written one."""
    key = plain(token)
    english = key in {plain(name) for name in WRITTEN["en"]["months"]} or (language == "en" and len(key) <= 4)
    name = WRITTEN["en" if english else "fr"]["months"][month - 1]
    if len(key) <= 4 and key not in ("mars", "mai", "may", "juin", "june", "july", "aout"):
        name = name[: 4 if name.startswith("jui") else 3]
    return like(token, name)


def like(written: str, made: str) -> str:
    """`made` in the capitals of `written`."""
    if written.isupper() and len(written) > 1:
        return made.upper()
    return made.lower() if written.islower() else made[:1].upper() + made[1:] if written[:1].isupper() else made
