"""One report seen word by word: what every layer of the detector reads, made once. Holds no rule."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, reduce
from itertools import accumulate, chain, compress, count, repeat
from operator import itemgetter, ne, or_
from typing import Literal

from shards.reports.identity.gazetteers import Word, gazetteer, is_derived, plain

Kind = Literal[
    "patient_name", "person_name", "birth_date", "date", "age_over_89", "phone", "mail", "url", "id",
    "social_security", "address", "zip", "city", "hospital",
]  # fmt: skip
Layer = Literal["patient", "pattern", "gazetteer", "tagger", "plugin"]

_WORD = re.compile(r"([^\W\d_]+)")
_WORD_ASCII = re.compile(r"([a-z]+)")  # the same in plain ASCII, in half the time
LOWER, TITLE_CASE, UPPER, INITIAL = 0, 1, 2, 3
PLACEHOLDER = "~"  # stands in the masked text for what points at nobody
_TAKEN = ("\0", PLACEHOLDER)
# Letters that a scanner reads for digits, where digits surround them; patterns see the digit.
# The letter comes first and looks back, so that the search runs over letters and not over every position.
_MISREAD = re.compile(
    r"[olisb](?:(?<=\d.)(?=\d)|(?<=\d{3}[olsb])(?!\w)|(?<=\d[./ \-][ol])(?=\d)|(?<=\d [olsb])(?= \d)"
    r"|(?<=[ol])(?<![\w.].)(?=\d[ .]\d\d[ .]\d\d))"
)
_DIGITS = str.maketrans("olisb", "01158")
_NAMES = Word.FIRST | Word.CITY_START
_ANY_NAME = Word.FIRST | Word.LAST | Word.CITY_START
_NAME_LEADS = Word.TITLE | Word.ROLE | Word.KIN
# Letters of no other language here: "Lê", "Vũ" and "Đỗ" would be read as words without their marks.
# One set of letters comes first: the engine then skips to one of them.
_VIETNAMESE = re.compile(
    r"[\u0102\u0103\u0128\u0129\u0168\u0169\u01a0\u01a1\u01af\u01b0\u1ea0-\u1ef9êÊ]"
    r"(?:(?<![êÊ])|(?:(?<=\b[Ll]ê)|(?<=\bLÊ))\b)"
)
_DIGIT_RUN = re.compile(r"\d+")
_CLOSE, _DENSE = 4, 6  # characters between digits; digits that make a phone number possible
_TRIGGERS = (
    Word.TITLE | Word.ROLE | Word.KIN | Word.MONTH | Word.NUMBER | Word.STREET | Word.HOSPITAL | Word.DEMONYM
    | Word.WEEKDAY | Word.CALL | Word.AUTHOR | Word.BORN | Word.CLOSING
)  # fmt: skip
# A line is in capitals when this share of its words of three letters or more is.
_CAPITALS_SHARE = 0.7
_COMMON_IN_CAPITALS = 2  # and this many of them are common words: a line of names alone says nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class Identifier:
    """Characters [start, end) of the document that point at a person; `layer` is the part of the detector that knew."""

    start: int
    end: int
    kind: Kind
    layer: Layer


@dataclass(kw_only=True, slots=True)
class View:
    """Words of one document. Lists run over words; `plain` has the length of `text`, so offsets serve both.

    `masked` is `plain` with what earlier rules claimed blanked out; `claim` keeps it so. Most documents lack most of
    what rules look for, so `seen`, `numbers` and the lists of words tell which of them need not be tried.
    """

    text: str
    plain: str
    starts: list[int]
    ends: list[int]
    words: list[str]  # plain forms
    flags: list[int]
    shapes: list[int]
    masked: str
    marked: list[int]  # words that start a rule: titles, roles, months, numbers, streets, hospitals
    seen: int  # flags of all marked words together
    capitalised: list[int]  # words that begin with a capital
    small_names: list[int]  # words in lower case that are names and no common words
    numbers: list[int]  # where runs of digits begin in `masked`, those that are claimed among them
    longest_number: int  # digits in the longest run; patterns that need more are not tried
    dense: bool  # whether six digits stand close together anywhere, as in phone numbers and ids
    identifiers: list[Identifier] = field(default_factory=list)
    announced: set[int] = field(default_factory=set)  # where names begin that a word before them tells
    _capital_lines: dict[int, bool] = field(default_factory=dict)

    def gap(self, index: int) -> str:
        """What stands between word `index` and the next one."""
        return self.text[self.ends[index] : self.starts[index + 1]] if index + 1 < len(self.starts) else "\n\n"

    def free(self, index: int) -> bool:
        """Whether no rule has claimed word `index` yet, and none has hidden it."""
        return self.masked[self.starts[index]] not in _TAKEN

    def hide(self, start: int, end: int) -> None:
        """Hide what points at nobody from the rules that follow."""
        self.masked = self.masked[:start] + PLACEHOLDER * (end - start) + self.masked[end:]

    def first_word_from(self, position: int) -> int:
        """Index of the first word that starts at `position` or later; the number of words when there is none."""
        return bisect_left(self.starts, position)

    def note(self, start: int, end: int, kind: Kind, layer: Layer) -> None:
        """Note one identifier and hide nothing: other rules may find a longer one around it."""
        self.identifiers.append(Identifier(start=start, end=end, kind=kind, layer=layer))

    def at_numbers(self, pattern: re.Pattern[str], before: int = 0) -> Iterator[re.Match[str]]:
        """Matches in `masked` of a pattern that begins with a run of digits, or with a word at most `before` characters
        ahead of its first digit: in order, without overlap.

        They are what `pattern.finditer(masked)` finds with a digit in it; that tries every character of the text.
        """
        text, starts, read_up_to = self.masked, self.starts, 0
        words: Sequence[int] = ()
        for number in tuple(self.numbers):
            if number < read_up_to or text[number] == "\0":
                continue
            if before:
                first = bisect_left(starts, max(read_up_to, number - before))
                words = starts[first : bisect_left(starts, number, first)]
            read_up_to = number
            for place in (*words, number):
                match = pattern.match(text, place)
                if match is not None and match.end() > number:
                    yield match
                    read_up_to = match.end()
                    break

    def claim(self, start: int, end: int, kind: Kind, layer: Layer = "pattern") -> None:
        """Note one identifier and hide it from the rules that follow."""
        if self.masked[end - 1 : end + 1].isdecimal() and end < len(self.masked):
            insort(self.numbers, end)  # what is left of a number begins there
        self.masked = self.masked[:start] + "\0" * (end - start) + self.masked[end:]
        self.identifiers.append(Identifier(start=start, end=end, kind=kind, layer=layer))

    def is_common(self, word: str) -> bool:
        """Whether a plain word that the document may not hold is a common one."""
        return bool(gazetteer().flags.get(word, 0) & Word.COMMON)

    def in_capitals(self, index: int) -> bool:
        """Whether word `index` stands in a line written in capitals, where a capital says nothing."""
        line_start = self.text.rfind("\n", 0, self.starts[index]) + 1
        known = self._capital_lines.get(line_start)
        if known is None:
            known = self._capital_lines[line_start] = self._is_in_capitals(line_start)
        return known

    def _is_in_capitals(self, line_start: int) -> bool:
        line_end = self.text.find("\n", line_start)
        first = self.first_word_from(line_start)
        stop = self.first_word_from(line_end if line_end >= 0 else len(self.text))
        words = [i for i in range(first, stop) if self.ends[i] - self.starts[i] > 2]
        upper = [i for i in words if self.shapes[i] == UPPER]
        if len(upper) < _CAPITALS_SHARE * max(1, len(words)):
            return False
        return sum(self.flags[i] & Word.COMMON for i in upper) >= _COMMON_IN_CAPITALS


def view_of(text: str) -> View:
    """Words, plain forms, flags and shapes of a document."""
    plain_text = plain(text)
    pieces = (_WORD_ASCII if plain_text.isascii() else _WORD).split(plain_text)  # gap, word, gap, ..., word, gap
    edges = list(accumulate(map(len, pieces)))
    words, starts, ends = pieces[1::2], edges[:-1:2], edges[1::2]
    flags = list(map(gazetteer().flags.get, words, repeat(0)))
    if not text.isascii():
        for match in _VIETNAMESE.finditer(text):
            flags[bisect_right(starts, match.start()) - 1] = Word.LAST
    shapes = [LOWER] * len(words)
    for index in compress(count(), map(ne, map(text.__getitem__, starts), map(itemgetter(0), words))):
        shapes[index] = _shape(text[starts[index] : ends[index]])
    capitalised = [index for index, shape in enumerate(shapes) if shape]
    for index in capitalised:
        if not flags[index] and is_derived(words[index]):
            flags[index] = Word.COMMON
    if text == plain_text or not text.isupper():
        _raise_lower_lines(text, starts, ends, flags, shapes)
    runs = _digit_runs(pieces[::2], chain((0,), ends))
    dense = _is_dense(runs)
    masked = _MISREAD.sub(lambda match: match.group().translate(_DIGITS), plain_text) if dense else plain_text
    triggers, names = _listed_words()
    marked = [index for index in compress(count(), map(triggers.__contains__, words)) if flags[index] & _TRIGGERS]
    return View(
        text=text, plain=plain_text, masked=masked, starts=starts, ends=ends, words=words, flags=flags, shapes=shapes,
        marked=marked, seen=reduce(or_, map(flags.__getitem__, marked), 0),
        small_names=[
            index for index in compress(count(), map(names.__contains__, words))
            if flags[index] & _NAMES and not shapes[index]
        ],
        numbers=[start for start, _ in runs] if masked == plain_text else [
            run.start() for run in _DIGIT_RUN.finditer(masked)
        ],
        longest_number=max((end - start for start, end in runs), default=0), dense=dense,
        capitalised=list(compress(count(), shapes)),
    )  # fmt: skip


@cache
def _listed_words() -> tuple[frozenset[str], frozenset[str]]:
    """Words of the lists that start a rule, and those that are names and no common words."""
    flags = gazetteer().flags.items()
    return (
        frozenset(word for word, flag in flags if flag & _TRIGGERS),
        frozenset(word for word, flag in flags if flag & _NAMES and not flag & Word.COMMON),
    )


def _raise_lower_lines(text: str, starts: list[int], ends: list[int], flags: list[int], shapes: list[int]) -> None:
    """In a line without any capital, give names the shape they would have had, and unknown words beside them."""
    line_start = 0
    for line in text.split("\n"):
        line_end = line_start + len(line)
        first, stop = bisect_left(starts, line_start), bisect_left(starts, line_end)
        if not any(shapes[first:stop]):
            for index in range(first, stop):
                if not flags[index] & Word.COMMON or ends[index] - starts[index] == 1:
                    shapes[index] = (
                        _raised_shape(index, first, stop, flags, shapes)
                        if ends[index] - starts[index] > 1
                        else _raised_letter(text, ends[index], flags[index + 1] if index + 1 < stop else Word.COMMON)
                    )
        line_start = line_end + 1


def _raised_letter(text: str, end: int, flags_behind: int) -> int:
    """Shape of a single letter: with a dot, before a word that is no common one, an initial."""
    return INITIAL if text[end : end + 1] == "." and not flags_behind & Word.COMMON else LOWER


def _raised_shape(index: int, first: int, stop: int, flags: list[int], shapes: list[int]) -> int:
    """Shape of an uncommon word of a line in small letters, the words [first, stop)."""
    if flags[index] & Word.PARTICLE:
        return LOWER
    beside = [flags[other] for other in (index - 1, index + 1) if first <= other < stop]
    cued = any(one & _NAME_LEADS or (one & _ANY_NAME and not one & Word.COMMON) for one in beside)
    behind_initial = index > first and shapes[index - 1] == INITIAL
    known = flags[index] & _ANY_NAME and not flags[index] & Word.FINDING
    return TITLE_CASE if known or cued or behind_initial else LOWER


def _digit_runs(gaps: Sequence[str], starts: Iterable[int]) -> list[tuple[int, int]]:
    """Where runs of digits begin and end, from what stands between the words; most gaps are a blank."""
    numbered = {gap for gap in set(gaps) if _DIGIT_RUN.search(gap)}
    if not numbered:
        return []
    return [
        (start + run.start(), start + run.end())
        for start, gap in zip(starts, gaps, strict=True) if gap in numbered
        for run in _DIGIT_RUN.finditer(gap)
    ]  # fmt: skip


def _is_dense(runs: Sequence[tuple[int, int]]) -> bool:
    """Whether six digits stand close together, a letter or two between them allowed."""
    count = last = 0
    for start, end in runs:
        count = end - start + (count if start - last <= _CLOSE else 0)
        if count >= _DENSE:
            return True
        last = end
    return False


def _shape(written: str) -> int:
    """How a word is written whose first letter is not its plain form."""
    if not written[0].isupper():
        return LOWER
    if len(written) == 1:
        return INITIAL
    return UPPER if written.isupper() else TITLE_CASE
