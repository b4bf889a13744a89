"""One report seen word by word: numbers found once serve every pattern as a search of the whole text would."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.reports.identity import addresses, cities, dates, patterns
from shards.reports.identity.gazetteers import Word
from shards.reports.identity.view import view_of

# Pattern -> characters that may stand before its first digit.
AT_NUMBERS = (
    (patterns._AVS, 0), (patterns._US_SSN, 0), (patterns._UK_NI, 3), (patterns._RAMQ, 5), (patterns._SIN, 0),
    (patterns._NATIONAL_CUE, 60), (patterns._BELGIAN, 0), (patterns._DIGIT_ROW, 0), (patterns._NIR, 0),
    (patterns._GERMAN_INSURANCE, 0), (patterns._CLUSTER, 0), (patterns._AGE, 0), (patterns._AGED, 12),
    (patterns._ID_CUE, 100), (patterns._FRENCH_PHONE, 0), (patterns._LONG_DIGITS, 0), (patterns._DASHED_ID, 100),
    (patterns._MIXED_ID, 100), (dates._WEEKDAY_DAY, 12), (dates._GLUED, 12), (dates._LETTERS_AROUND, 0),
    (dates._WEEK, 12), (dates._MISSPELT, 0), (addresses._SHORT_STREET, 0), (cities._CODE, 4), (cities._CODE_CUE, 20),
)  # fmt: skip
PIECES = (
    "1", "06", "12", "756", "2019", "12345", "1234567", "1 85 05 78 006 084 36", "078-05-1120", "46-454-286",
    " ", " ", " ", "-", "/", ".", ":", ", ", "\n", "_", "(", "+", "°", "é", "a", "ab", "qqab", "n", "id", "mrn", "no",
    "ssn: ", "ans", "years", "age", "visit", "s", "semaine ", "lundi ", "mars", "marz", "imp. ", "cp ", "F-",
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=24), claims=st.lists(st.integers(0, 60), max_size=4))
def test_patterns_tried_at_numbers_find_what_a_search_of_the_text_finds(pieces: list[str], claims: list[int]) -> None:
    view = view_of("".join(pieces))
    for start in claims:
        end = start + 3
        if end <= len(view.text) and not re.match(r"[^\W\d_]{2}", view.plain[end - 1 :]):  # claims cut no word
            view.claim(start, end, "id")
    for pattern, before in AT_NUMBERS:
        searched = [match.span() for match in pattern.finditer(view.masked) if re.search(r"\d", match.group())]
        assert [match.span() for match in view.at_numbers(pattern, before)] == searched, pattern.pattern


@pytest.mark.parametrize(
    ("text", "numbers", "longest", "dense"),
    [
        ("no acute disease", [], 0, False),
        ("5 mm and 12 mm, 120/80", [0, 9, 16, 20], 3, False),
        ("tel 01 23 45 67", [4, 7, 10, 13], 2, True),
        ("tel 06 l2 34 56 78", [4, 7, 10, 13, 16], 2, True),  # a scanner's l
        ("٣ mm", [0], 1, False),
    ],
)
def test_numbers_are_found_where_they_begin(text: str, numbers: list[int], longest: int, dense: bool) -> None:
    view = view_of(text)
    assert (view.numbers, view.longest_number, view.dense) == (numbers, longest, dense)


def test_what_a_claim_leaves_of_a_number_begins_behind_it() -> None:
    view = view_of("id 123456 and 78")
    view.claim(3, 6, "id")
    assert [match.group() for match in view.at_numbers(re.compile(r"\d+"))] == ["456", "78"]


def test_words_that_start_a_rule_are_told_apart() -> None:
    view = view_of("Vu par le Dr Zorbu le 5 mars. Zelda, mirella.")
    assert view.seen & Word.TITLE and view.seen & Word.MONTH and not view.seen & Word.HOSPITAL
    assert [view.words[index] for index in view.marked] == ["vu", "dr", "mars"]
    assert [view.words[index] for index in view.capitalised] == ["vu", "dr", "zorbu", "zelda"]
    assert [view.words[index] for index in view.small_names] == ["mirella"]
