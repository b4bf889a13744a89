"""Written dates moved: every form keeps its look, ranges and partial dates are moved too, no clock is read."""

from __future__ import annotations

import ast
import datetime
import inspect

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.reports.identity import Surrogates, date_shift, surrogates
from shards.reports.identity.date_shift import WRITTEN, moved
from shards.reports.identity.view import Identifier

FRENCH, ENGLISH = WRITTEN["fr"], WRITTEN["en"]
# Form of a date -> the same form of any other day. `t` is the day.
FORMS = {
    "fr": [
        lambda t: f"{t:%d/%m/%Y}", lambda t: f"{t:%d.%m.%y}", lambda t: f"{t:%Y-%m-%d}", lambda t: f"{t:%d %m %Y}",
        lambda t: f"{t:%d%m%Y}",
        lambda t: f"{t.day} {FRENCH['months'][t.month - 1]} {t.year}", lambda t: f"{t:%Y-%m-%d}T10:20:30Z",
        lambda t: f"{FRENCH['weekdays'][t.weekday()]} {t.day} {FRENCH['months'][t.month - 1]} {t.year}",
        lambda t: f"{t.day} {FRENCH['months'][t.month - 1].upper()} {t:%Y}",
    ],
    "en": [
        lambda t: f"{t:%m/%d/%Y}", lambda t: f"{t:%B} {t.day}, {t.year}", lambda t: f"{t.day} {t:%b} {t.year}",
        lambda t: f"{t:%A}, {t:%B} {t.day}, {t.year}", lambda t: f"{t:%d-%b-%Y}", lambda t: f"{t:%Y/%m/%d}",
    ],
}  # fmt: skip
DAYS = st.dates(datetime.date(1937, 1, 1), datetime.date(2030, 12, 31))
SHIFTS = st.sampled_from([sign * days for days in surrogates.SHIFTS_DAYS for sign in (1, -1)])


@settings(max_examples=80, deadline=None)
@given(DAYS, SHIFTS, st.sampled_from(["fr", "en"]), st.integers(0, 99))
def test_a_date_moves_by_the_shift_in_its_form(day: datetime.date, days: int, language: str, number: int) -> None:
    forms = FORMS[language]
    form, shift = forms[number % len(forms)], datetime.timedelta(days=days)
    written = form(day)
    if language == "en" and day.month == 5:
        return  # "May" is a name and an abbreviation
    assert moved(written, shift, language) == form(day + shift)


@settings(max_examples=50, deadline=None)
@given(DAYS, SHIFTS, st.integers(1, 20), st.booleans())
def test_both_days_of_a_range_move(day: datetime.date, days: int, length: int, numeric: bool) -> None:
    """Read back: what the range lacks, its second date says."""
    last = day + datetime.timedelta(days=length)
    if (day.month, day.year) != (last.month, last.year):
        return
    shift = datetime.timedelta(days=days)
    name = FRENCH["months"][last.month - 1]
    written = f"{day:%d}-{last:%d/%m/%Y}" if numeric else f"{day.day} au {last.day} {name} {last.year}"
    made = moved(written, shift, "fr") or ""
    first, end = day + shift, last + shift
    joined = "-" if numeric else " au "
    head, _, tail = made.partition(joined)
    assert tail == (f"{end:%d/%m/%Y}" if numeric else f"{end.day} {FRENCH['months'][end.month - 1]} {end.year}")
    fields = [f"{first.day:02d}" if numeric else str(first.day)]
    if first.month != end.month:
        fields.append(f"{first.month:02d}" if numeric else FRENCH["months"][first.month - 1])
    if first.year != end.year:
        fields.append(str(first.year))
    assert head == ("/" if numeric else " ").join(fields)


@pytest.mark.parametrize(
    ("written", "language", "made"),
    [
        ("2019-03-03, mars 2019", "fr", "2018-05-07, mai 2018"),
        ("12 mars, 15 avril 2019", "fr", "16 mai, 19 juin 2018"),
        ("28 décembre au 3 janvier 2020", "fr", "3 mars au 9 mars 2019"),
        ("March 12-15, 2019", "en", "May 16-19, 2018"),
        ("12/03 - 15/03/2019", "fr", "16/05 - 19/05/2018"),
        ("mars-avril 2018", "fr", "mai-juin 2017"),
        ("S12 2020", "fr", "S21 2019"),
        ("1er janvier", "fr", "7 mars"),
        ("douze mars deux mille dix-neuf", "fr", "seize mai deux mille dix-huit"),
        ("third of March two thousand nineteen", "en", "seventh of May two thousand eighteen"),
        ("12/III/2019", "fr", "16/V/2018"),
        ("12 fevirer 2019", "fr", "18 avril 2018"),
        ("mardi 12 mars", "fr", "mercredi 16 mai"),
        ("Mon 25 Mar 2019", "en", "Tue 29 May 2018"),
        ("12/3/2019", "fr", "16/5/2018"),
        ("31/02/2019", "fr", "04/05/2018"),
        ("0 5 0 8 2 0 1 4", "fr", "0 9 1 0 2 0 1 3"),
        ("12th of March 2019", "en", "16th of May 2018"),
        ("2018-2019", "fr", "2017-2018"),
        ("l'été 2003", "fr", "l'été 2002"),
    ],
)
def test_forms_by_example(written: str, language: str, made: str) -> None:
    assert moved(written, datetime.timedelta(days=-300), language, 2019) == made


def test_a_range_over_the_end_of_a_month_says_its_month() -> None:
    shift = datetime.timedelta(days=245)
    assert moved("28 au 31 mars 2019", shift, "fr") == "28 novembre au 1 décembre 2019"
    assert moved("March 29-31, 2019", shift, "en") == "November 29-December 1, 2019"


def test_what_is_no_date_is_told() -> None:
    shift = datetime.timedelta(days=245)
    assert [moved(text, shift, "fr") for text in ("", "abc", "45", "99/99/9999", "77 mars 12 345")] == [
        None, None, "46", None, None,
    ]  # fmt: skip


def test_a_date_without_a_year_has_that_of_its_document() -> None:
    """29 February lies between: the year decides the day."""
    shift = datetime.timedelta(days=300)
    assert moved("1 juin", shift, "fr", 2019) != moved("1 juin", shift, "fr", 2020)
    made_by = Surrogates(secret=b"s")
    text = "le 1 juin, le 1 juin 2020"
    spans = [Identifier(start=s, end=e, kind="date", layer="pattern") for s, e in ((3, 9), (14, 25))]
    made, _ = made_by.replace(text, spans, patient="p", language="fr")
    short, long = (part.removeprefix("le ").strip() for part in made.split(","))
    assert long.removeprefix("le ").startswith(short)


def test_two_digit_years_are_read_without_a_clock() -> None:
    for module in (date_shift, surrogates):
        names = {
            node.attr for node in ast.walk(ast.parse(inspect.getsource(module))) if isinstance(node, ast.Attribute)
        }
        assert not names & {"today", "now", "utcnow", "time", "monotonic"}
    # Either century gives the same day and month, so the window's edge decides nothing but the century.
    for year in range(1937, 2037):
        shift = datetime.timedelta(days=777)
        short, long = moved(f"05/11/{year % 100:02d}", shift, "fr"), moved(f"05/11/{year}", shift, "fr")
        assert short is not None
        assert long is not None
        assert (short[:6], short[6:]) == (long[:6], long[8:])
