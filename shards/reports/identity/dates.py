"""Dates in French and English, in digits and in words: found, read, and written again in the format they had.

Day-month order is read from the numbers where they tell, otherwise from the language; a date that is only partly given
(month and year, a year, day and month) stays partial.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass

from shards.reports.identity.gazetteers import MONTHS, NUMBERS, WEEKDAYS, Word, table
from shards.reports.identity.view import LOWER, View

YEAR = r"(?:19|20)\d\d"
_SEPARATOR = r" ?[./|\-\\,_]{1,2} ?"
_DIGITS_BEFORE, _DIGITS_AFTER = r"(?<!\w)(?<!\d[.,/])", r"(?![\d\w]|[.,/]\d)"
NUMERIC = re.compile(
    rf"{_DIGITS_BEFORE}(?:"
    rf"(?P<iso>{YEAR}{_SEPARATOR}[01]?\d{_SEPARATOR}[0-3]?\d(?:t\d\d:\d\d(?::\d\d(?:\.\d+)?)?z?)?)"
    rf"|(?P<full>\d\d?{_SEPARATOR}\d\d?{_SEPARATOR}{YEAR}\d?|\d\d?:\d\d?:{YEAR}"
    rf"|[0-3]?\d(?:{_SEPARATOR}| )[0-3]?\d(?:{_SEPARATOR}| ){YEAR}(?! \d{{3}}))"
    rf"|(?P<short>[0-3]?\d(?P<s1>[./|\-])[0-3]?\d(?P=s1)\d\d(?!-\d\d-\d))"
    rf"|(?P<month_year>(?:0?[1-9]|1[0-2]) ?[/.\-] ?{YEAR}|{YEAR}[/.\-](?:0[1-9]|1[0-2])"
    rf"|(?:0[1-9]|1[0-2]) {YEAR}(?! \d\d?(?!:)))"
    rf"|(?P<years>{YEAR} ?[/\-] ?(?:{YEAR}|\d\d))"
    rf"|(?P<spaced>\d ?\d ?\d ?\d ?(?:1 ?9|2 ?0) ?\d ?\d|(?:1 ?9|2 ?0) ?\d ?\d ?\d ?\d ?\d ?\d)"
    rf"|(?P<tight>[0-3]\d[01]\d\d\d|[0-3]\d [01]\d \d\d(?! \d))"
    rf"|(?P<day_month>0[1-9]/[1-9]\d|[0-3]?\d ?[./] ?[01]?\d|[0-3]\d-[01]\d)"
    rf"|(?P<year>{YEAR}s?(?!-\d{{3}}))"
    rf"){_DIGITS_AFTER}"
)
_MONTH = f"(?:{'|'.join(sorted(MONTHS, key=len, reverse=True))})"
_GLUED = re.compile(
    rf"(?<!\w)(?:[0-3]?\d ?(?:er)?-?|(?=[a-z]+[.\-]?{YEAR}|[a-z]{{3,9}}-\d\d(?!\d)|[a-z]{{4,9}}\d\d(?!\d)))"
    rf"{_MONTH}\.?-?(\d{{4}}|\d\d)?(?![a-z\d])"
)
# Text taken out of PDF files loses spaces: "le12/03/2019à".
_LETTERS_AROUND = re.compile(
    rf"(?<!\d)(?<!\d[./\-])(?:\d\d?[./\-]\d\d?[./\-]{YEAR}(?!\d)"
    rf"|[0-3]?\d[ ./\-](?:i{{1,3}}|i?v|vi{{1,3}}|ix|xi{{0,2}})[ ./\-]{YEAR}(?!\d))"
)
_WEEK = re.compile(rf"(?<!\w)(?:(?:s|sem\.?|semaine|week) ?\d\d?|[tq][1-4])[ /\-]{{1,2}}(?:(?:de|of) )?{YEAR}(?!\d)")
# "années 90", "the 90s", "fin 98", "'98": before and behind two digits.
_SHORT_YEAR_BEFORE = re.compile(
    r"(?P<apostrophe>(?<![\w'])')$|(?<!\w)(?:(?P<decade>annees?)|(?P<the>the)|fin|debut|depuis|ete|hiver|en|in) $"
)
_ENDS = re.compile(r"\s*(?:[).,;:\n]|$)")
_DAY_BEFORE = re.compile(r"(?<![\d.,])([0-3]?\d)(?: ?(?:er|ere|st|nd|rd|th))?[ ,\-/._]{0,3}(?:of |de |du mois de )?$")
_YEAR_AFTER = re.compile(r"[ ,.\-/_]{0,3}(?:of |de )?('?\d\d(?!\d|[,.]\d|:\d| \d{3}(?!\d)| ?(?:mm|cm|h))|\d{4})(?!\d)")
_DAY_AFTER = re.compile(r"\.? ?([0-3]?\d)(?: ?(?:st|nd|rd|th))?(?!\d|:\d|[.,]\d)(?:[ ,]{1,2}('\d\d|\d{4})(?!\d))?")
_MISSPELT = re.compile(rf"(?<![\d.,])([0-3]?\d)(?:er|st|nd|rd|th)? ([^\W\d_]{{3,10}})\.?,? ({YEAR})(?!\d)")
_YEAR_CUE = re.compile(
    r"(?:^|[\s('’])(?:en|depuis|in|since|fin|debut|mi|annee|annees|ete|printemps|automne|hiver|from|until|de|a|to|vers"
    r"|circa|dated|year|years|courant|avant|apres|before|after|between|entre|et|and|or|ou|of|early|late|mid|summer|winter"
    r"|spring|fall|jusqu'en|the)[\s\-]*\(?$"
)
_WEEKDAYS = "|".join(sorted(WEEKDAYS))
_WEEKDAYS_SHORT = "|".join(sorted({day[:3] for day in WEEKDAYS} - {"mar"}))  # "mar" is March
_EXTENDS = re.compile(
    r"(?<!\w)(?:(?:fin|debut|mi|courant|early|late|mid|ete|printemps|automne|hiver|noel|paques|toussaint|rentree|summer"
    r"|winter|spring|fall|autumn)(?: (?:de|of))?[ \-]+"
    rf"|(?:{_WEEKDAYS}),? |(?:{_WEEKDAYS_SHORT})\.?,? "
    r"|(?<![\d.,/])(?<!\d )[0-3]?\d(?:er|st|nd|rd|th)?(?:/[01]\d)? ?(?:(?:au|et|and|to|,|&|-|–|/) ?|(?:et|ou|au) le ))$"
)
_WEEKDAY_DAY = re.compile(rf"(?<!\w)(?:{_WEEKDAYS}) (?:[0-3]?\d)(?![\d:h]|[.,/]\d)")
_FIELD = re.compile(r"(?:^|[|(,;¦\0]) ?$"), re.compile(r" ?(?:$|[|),;.¦\0])")
_UNIT_AFTER = re.compile(
    r" ?(?:mg|ml|g|kg|mcg|ui|u|iu|mm|cm|hu|uh|ms|ng|pg|µg|μg|%|/mm|/ml|cc|kcal|cal|gy|cgy|mgy|bq|mbq|volts?|hz"
    r"|j|cases|cas"
    r"|patients?|elements|leucocytes|copies|x|×|fois)(?![a-z])|\^"
)
_DATE_CUE = re.compile(
    r"(?:^|[\s(\[])(?:le|du|au|on|dated|date|since|depuis|rdv|from|until|jusqu'au)[\s:,]*\(?$"
    r"|(?:date|rdv|rendez-vous)[^\n:]{0,40}: ?$|(?:^|\n)\s*[-•*]\s+$|[a-z] - $"
)
_DATED = re.compile(r"(?<!\w)(?:dated|date|since|depuis|jusqu'au|comparaison avec|compared (?:to|with))[ :,]*\(?$")
_ON_THE_DAY = re.compile(r"(?:^|\s)(?:le|du|on) $")
_OPENS_LINE = re.compile(r"(?:^|\n) ?$")
_PART_OF_BONE = re.compile(r" (?:sup|inf|moy|mo|prox|dis)")
_BIRTH_CUE = re.compile(
    r"(?:\bnee?\b[^.\n]{0,12}|naiss\w*\.?|\bnais\b\.?|\bddn\b|\bdob\b|d\.o\.b\.?|\bborn\b|birth\w*"
    r"|mise au monde|birthdate)"
    r"[^\d\n]{0,25}$"
)
_NO_YEAR = re.compile(r"(?:[=<>~≈±°º#*x×]|\d|\bn|\ba|\bde|\bdes|\bles|\bou|\btaux|\w-|[a-z]:) ?$")
# Two numbers with a stroke that are a measure: blood pressure, visual acuity, scores.
_NO_DATE = re.compile(
    r"(?:\bta|\bpa|tension\w*|pression\w*|\bbp|\bav|acuit[ey]\w*|\bod|\bog|\boeil \w+"
    r"|\bglasgow|\bscores?|\bev[as]|\bapgar|grade|\bstade"
    r"|\bgcs|\bratio|rapport|\bpas|\d)[\s:=a]{0,6}$|[x×*]\s?$"
)
_MONTH_SHORT_YEAR = re.compile(r"0[1-9]/(?:1[3-9]|2\d|[4-9]\d)")
_TWO_DIGITS_EACH = re.compile(r"[0-3]\d ?[./] ?[01]\d")
_LIST_BEFORE = re.compile(r"(?:^|\n|\s)\s*[-•*:]\s+$|(?:^|\n)\s*[-•*]\s*$|\d{4}\)?\s?[-–/]\s?$|\(\s*$")
_DATED_DASH = re.compile(r"(?:^|\s)(?:le|du|on|dated|exam(?:en|ination)? of|date(?: d'examen)?)[ :]*$")
_NOTED = re.compile(r" ?:(?!\d)")  # "12-03 : patient vu", at the beginning of a line
_RANGE_AFTER = re.compile(r"\s?[-–/)]\s?(?:\d{4}|juil)")
_LABEL_BEFORE = re.compile(r"(?<!\w)[a-z]\d{1,2} $")  # "S2 12/05, S3 20mar": a cycle's number, no measure
_DIGIT_RUN = re.compile(r"\d+")
_LOOK_BACK = 24  # characters
_EXTENSIONS_MAX = 3


@dataclass(frozen=True, kw_only=True)
class Found:
    """A date at [start, end) of the document."""

    start: int
    end: int
    birth: bool


def find(view: View) -> list[Found]:
    """Every date of the document; spans may touch but do not overlap."""
    spans, weak = _numeric(view) if view.numbers else ([], [])
    if view.seen & (Word.MONTH | Word.NUMBER):
        spans += _in_words(view)
    if weak:
        spans += _certain_of(view, weak, spans)
    return _joined(view, spans) if spans else []


def _numeric(view: View) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Dates in digits, and those that are dates only where the context says so: day and month, a year."""
    text = view.masked
    spans: list[tuple[int, int]] = []
    weak: list[tuple[int, int]] = []
    read_up_to = 0
    for run in view.at_numbers(_DIGIT_RUN):
        if run.end() - run.start() == 2 and _short_year(text, run.start(), run.end()):
            spans.append(run.span())
        match = NUMERIC.match(text, run.start()) if run.start() >= read_up_to else None
        if match is None:
            continue
        start, end = match.span()
        read_up_to = end
        kind = match.lastgroup
        if kind in ("day_month", "year", "years", "tight"):
            weak.append((start, end))
        elif kind == "full" and " " not in match.group():
            spans.append((start, end))  # also a mistyped one: 31/02/2019 is no quantity
        elif kind == "month_year":
            if not _UNIT_AFTER.match(text, end):
                spans.append((_number_words_before(view, start), end))
        elif _is_date(match.group(), spaced=kind == "spaced") and not (
            kind == "short" and _UNIT_AFTER.match(text, end)
        ):
            spans.append((start, end))
    if view.seen & Word.WEEKDAY:
        spans += [match.span() for match in view.at_numbers(_WEEKDAY_DAY, 12)]
    if view.seen & Word.MONTH or "1er" in text:
        spans += [match.span() for match in view.at_numbers(_GLUED, 12)]
    if view.longest_number >= 4:
        spans += [match.span() for match in view.at_numbers(_LETTERS_AROUND)]
        spans += [match.span() for match in view.at_numbers(_WEEK, 12)]
        spans += [m.span() for m in view.at_numbers(_MISSPELT) if m[2] not in MONTHS and _near_month(m[2])]
    return spans, weak


def _short_year(text: str, start: int, end: int) -> bool:
    """Whether two digits are a year or a decade by the word or the apostrophe before them."""
    cue = _SHORT_YEAR_BEFORE.search(text, max(0, start - 9), start)
    if cue is None or text[start] < ("4" if cue.lastgroup is None else "3"):
        return False
    if cue["the"]:
        return text[end : end + 1] == "s" or text[end : end + 2] == "'s"
    if cue["decade"]:
        return not text[end : end + 1].isalnum()
    if cue["apostrophe"]:
        return not (text[end : end + 1].isalnum() or text[end : end + 1] == "_")
    return _ENDS.match(text, end) is not None


def _certain_of(view: View, weak: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those of the weak spans that are dates by what stands around them."""
    text = view.masked
    taken = bytearray(len(text))
    line_ends = [match.start() for match in re.finditer("\n", text)]
    dated_lines = set()
    for start, end in spans:
        taken[start:end] = b"\1" * (end - start)
        dated_lines.add(bisect_left(line_ends, start))
    found = []
    for start, end in weak:
        if _UNIT_AFTER.match(text, end) or 1 in taken[start:end]:
            continue
        before = text[max(0, start - _LOOK_BACK) : start]
        written = text[start:end]
        if end - start >= 6 and written.replace(" ", "").isdigit():
            certain = _six_digits(text, start, end, before)
        elif end - start >= 4 and written.rstrip("s").isdigit():
            certain = _year(text, end, written, _LABEL_BEFORE.sub("", before))
        elif end - start >= 6 and written[:4].isdigit():
            certain = _years(written) and _year(text, end, written, _LABEL_BEFORE.sub("", before))
        else:
            certain = _day_and_month(text, start, end, before, bisect_left(line_ends, start) in dated_lines)
        if certain:
            found.append((start, end))
    return found


def _six_digits(text: str, start: int, end: int, before: str) -> bool:
    """Whether six digits, or three pairs, are day, month and year: behind a cue, or alone in a field."""
    written = text[start:end]
    digits = written.replace(" ", "")
    if not _possible(int(digits[:2]), int(digits[2:4])):
        return False
    if _DATE_CUE.search(before) or before.endswith("("):
        return True
    if _OPENS_LINE.search(before) and _NOTED.match(text, end):
        return True
    if _FIELD[0].search(before.rpartition("\n")[2]) and _FIELD[1].match(text[end : end + 2].partition("\n")[0]):
        return True
    return " " in written and not re.search(r"\d ?$", _LABEL_BEFORE.sub("", before))


def _year(text: str, end: int, written: str, before: str) -> bool:
    """Whether four digits are a year."""
    if _YEAR_CUE.search(before) or _LIST_BEFORE.search(before) or _RANGE_AFTER.match(text, end, end + 8):
        return True
    return 1930 <= int(written[:4]) < 2040 and not _NO_YEAR.search(before)


def _years(written: str) -> bool:
    """Whether the second year of "2018-19" or "2018/2019" follows within a lifetime."""
    first, second = (int(part) for part in re.findall(r"\d+", written))
    return 0 < (second - first if second > 100 else second - first % 100) <= (100 if second > 100 else 5)


def _day_and_month(text: str, start: int, end: int, before: str, dated_line: bool) -> bool:
    """Whether two short numbers are day and month, and no measure, fraction or score."""
    written = text[start:end]
    measure = _NO_DATE.search(before) is not None
    if _MONTH_SHORT_YEAR.fullmatch(written) and not measure:
        return True
    day, month = (int(part) for part in re.findall(r"\d+", written))
    if not _possible(day, month):
        return False
    if "-" in written:  # "12-03" is a range more often than a date
        told = _DATED_DASH.search(before) or (_OPENS_LINE.search(before) and _NOTED.match(text, end))
        return told is not None and re.fullmatch(r"[0-3]\d-(?:0[1-9]|1[0-2])", written) is not None
    if re.fullmatch(r"[0-3]\d ?/ ?(?:0[1-9]|1[12])", written) and not measure:
        return True
    two_digits_each = _TWO_DIGITS_EACH.fullmatch(written) is not None
    if two_digits_each and (_DATE_CUE.search(before) or (dated_line and re.search(r"(?:\w\d+|[,;])\s$|\($", before))):
        return True
    if "." in written:
        return False
    if _ON_THE_DAY.search(before):
        return not _PART_OF_BONE.match(text, end)
    if _DATED.search(before):
        return True
    alone = not before.rpartition("\n")[2].strip() and not text[end : end + 40].partition("\n")[0].strip()
    return alone and re.fullmatch(r"[0-3]\d/[01]\d", written) is not None


def _joined(view: View, spans: list[tuple[int, int]]) -> list[Found]:
    """Overlapping spans as one, with the weekday, season or other days that stand before them."""
    text = view.masked
    merged: list[Found] = []
    for start, end in sorted(set(spans)):
        for _ in range(_EXTENSIONS_MAX):
            extension = _EXTENDS.search(text, max(0, start - _LOOK_BACK), start)
            if extension is None:
                break
            start = extension.start()
        if merged and start < merged[-1].end:
            last = merged.pop()
            start, end = last.start, max(end, last.end)
        birth = _BIRTH_CUE.search(text, max(0, start - 48), start) is not None
        merged.append(Found(start=start, end=end, birth=birth))
    return merged


def _is_date(written: str, spaced: bool = False) -> bool:
    """Whether the three numbers of a numeric date can be one."""
    if spaced:
        digits = re.sub(r"\D", "", written)
        parts = [digits[:2], digits[2:4], digits[4:]]
        if not _possible(int(parts[0]), int(parts[1])) or not 1900 <= int(parts[2]) < 2100:
            parts = [digits[:4], digits[4:6], digits[6:]]
    else:
        parts = re.findall(r"\d+", written.partition("t")[0])
    if len(parts) != 3:
        return False
    first, second, third = (int(part) for part in parts)
    if len(parts[0]) == 4:
        return 1900 <= first < 2100 and 1 <= second <= 12 and 1 <= third <= 31
    return _possible(first, second)


def _possible(first: int, second: int) -> bool:
    return 1 <= min(first, second) <= 12 and max(first, second) <= 31


def _near_month(word: str) -> bool:
    return any(abs(len(word) - len(month)) <= 1 and distance(word, month) <= 2 for month in MONTHS if len(month) > 3)


def distance(first: str, second: str, limit: int = 3) -> int:
    """Edit distance with swaps of neighbours (optimal string alignment), `limit` when it is at least that."""
    if abs(len(first) - len(second)) >= limit:
        return limit
    before, row = [], list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        before, previous, row = row, before, [i]
        for j, b in enumerate(second, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (a != b))
            if i > 1 and j > 1 and a == second[j - 2] and first[i - 2] == b:
                cost = min(cost, previous[j - 2] + 1)
            row.append(cost)
        if min(row) >= limit:
            return limit
    return min(row[-1], limit)


_YEAR_WORDS = frozenset(["mil", "mille", "milles", "thousand", "nineteen", "twenty"])
_FRENCH_MONTHS = table("french_months")
_MONTH_CUES = table("month_cues")
_AMBIGUOUS = table("ambiguous")


def _in_words(view: View) -> list[tuple[int, int]]:
    """Dates with a month's name, and years in words."""
    spans = []
    read_up_to = 0
    for index in view.marked:
        flags = view.flags[index]
        if flags & Word.MONTH and view.free(index):
            span = _around_month(view, index)
            if span is not None:
                spans.append(span)
        if flags & Word.NUMBER and index >= read_up_to:
            read_up_to = _number_run(view, index)
            words = view.words[index:read_up_to]
            if len(words) > 1 and not _YEAR_WORDS.isdisjoint(words) and 1900 <= value_of(words) < 2100:
                spans.append((view.starts[index], view.ends[read_up_to - 1]))
    return spans


def _number_words_before(view: View, start: int) -> int:
    """Start of a day in words that stands before a numeric month ("vingt-six 02 2012"); `start` without one."""
    index = view.first_word_from(start) - 1
    while index >= 0 and view.flags[index] & Word.NUMBER and view.text[view.ends[index] : start].strip(" -") == "":
        start, index = view.starts[index], index - 1
    return start


def _number_run(view: View, index: int) -> int:
    """First index after a run of number words; a misspelt one ("troiss") goes on a run that already has two."""
    stop = index
    while stop < len(view.words) and (stop == index or view.gap(stop - 1).strip(" -\n") in ("", "et", "and")):
        word = view.words[stop]
        known = view.flags[stop] & Word.NUMBER or (
            word in ("et", "and") and stop > index and stop + 1 < len(view.words) and view.flags[stop + 1] & Word.NUMBER
        )
        if not known and not (
            stop >= index + 2 and len(word) > 3 and any(distance(word, n, 2) < 2 for n in NUMBERS if len(n) > 3)
        ):
            break
        stop += 1
    return stop


def value_of(words: list[str]) -> int:
    """Value of a number in words: French, English, and the English "nineteen eighty-four"."""
    total = current = 0
    pairs: list[int] = []
    for word in words:
        if word in ("et", "and"):
            continue
        value = NUMBERS.get(word) or NUMBERS.get(word.rstrip("s")) or 0
        if value == 1000:
            total, current = total + max(1, current) * 1000, 0
        elif value == 100:
            current = max(1, current) * 100
        elif value == 20 and current % 100 == 4:
            current += 76  # quatre-vingt
        else:
            pairs.append(value)
            current += value
    if not total and words and words[0] in ("nineteen", "twenty") and len(pairs) > 1:
        return NUMBERS[words[0]] * 100 + sum(pairs[1:])
    return total + current


def _around_month(view: View, index: int) -> tuple[int, int] | None:
    """The date around a month's name, or None where the name stands for something else ("may", "Dr Avril")."""
    text, word = view.masked, view.words[index]
    start, end = view.starts[index], view.ends[index]
    month_end = end + 1 if text[end : end + 1] == "." and len(word) <= 5 else end
    before = text[max(0, start - 24) : start]
    day = _DAY_BEFORE.search(before)
    year = _YEAR_AFTER.match(text, month_end)
    if day and 1 <= int(day[1]) <= 31 and not re.search(r"\d\s*$", _LABEL_BEFORE.sub("", before[: day.start()])):
        begin = start - (len(before) - day.start(1))
        if year is None:
            words_end = _words_after(view, index)
            return begin, words_end or end
        return begin, year.end()
    in_words = index > 0 and view.flags[index - 1] & Word.NUMBER and view.words[index - 1] not in ("second",)
    if in_words and view.gap(index - 1).strip(" -") == "":
        begin = index - 1
        while (
            begin > 0
            and (
                view.flags[begin - 1] & Word.NUMBER
                or (view.words[begin - 1] == "et" and begin > 1 and view.flags[begin - 2] & Word.NUMBER)
            )
            and view.gap(begin - 1).strip(" -") == ""
        ):
            begin -= 1
        return view.starts[begin], year.end() if year else _words_after(view, index) or end
    if (
        index > 1
        and view.words[index - 1] == "of"
        and view.flags[index - 2] & Word.NUMBER
        and view.words[index - 2] not in ("one", "second")
    ):
        return view.starts[index - 2], year.end() if year else _words_after(view, index) or end
    after = _DAY_AFTER.match(text, month_end)
    upper = view.shapes[index] != LOWER
    if (
        after
        and 1 <= int(after[1]) <= 31
        and (upper or len(word) > 3)
        and (after[2] or word not in ("mai", "mars"))
        and not _UNIT_AFTER.match(text, after.end())
    ):
        return start, after.end()
    if year is not None and len(year[1]) == 4 and 1900 <= int(year[1]) < 2100:
        return start, year.end()
    full = len(word) > 4 and word not in _AMBIGUOUS
    if year is not None and (
        year[1][0] == "'" or (len(year[1]) == 2 and (full or (len(word) > 3 and _DATE_CUE.search(before))))
    ):
        return start, year.end()
    if (
        index + 1 < len(view.words)
        and view.flags[index + 1] & Word.NUMBER
        and view.gap(index).strip(" ,") in ("", "the")
    ):
        stop = _number_run(view, index + 1)
        if upper or stop > index + 2:
            return start, view.ends[stop - 1]
    previous = view.words[index - 1] if index else ""
    following = re.match(r"\.? ?(?:a|au|-|to|et|and|/) ?(?:\d\d? )?([^\W\d_]{3,9})", text[end : end + 24])
    if following and following[1] in MONTHS and (word not in ("may", "sept", "mar") or upper):
        return start, month_end
    if (
        previous in _MONTH_CUES
        and view.gap(index - 1).strip(" -") == ""
        and (upper or word not in ("may", "mar", "sept", "dec", "jan", "sep"))
    ):
        if word in ("may", "jan", "mar") and previous in ("de", "du", "of", "from"):
            return None
        if previous in ("de", "du", "of") and upper and word in _AMBIGUOUS:
            return None
        return start, end
    if (
        full
        and not (index and view.flags[index - 1] & (Word.TITLE | Word.FIRST | Word.STREET))
        and ((view.shapes[index] == LOWER) == (word in _FRENCH_MONTHS))
    ):
        return start, end
    return None


def _words_after(view: View, index: int) -> int | None:
    """End of a year in words after word `index`, if there is one."""
    if index + 1 < len(view.words) and view.flags[index + 1] & Word.NUMBER and view.gap(index).strip(" ,") == "":
        return view.ends[_number_run(view, index + 1) - 1]
    return None
