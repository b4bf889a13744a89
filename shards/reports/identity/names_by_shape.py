"""Names that no word announces: known first names, initials, capitals beside small letters, lines of names."""

from __future__ import annotations

import re
from collections.abc import Callable

from shards.reports.identity.eponyms import eponym, measured
from shards.reports.identity.gazetteers import Word, gazetteer, plain, table
from shards.reports.identity.mentions import PERSON_VERBS
from shards.reports.identity.names import NAME, TITLES_MAX, claim, claim_around, claim_list, joined_next, name_end
from shards.reports.identity.view import INITIAL, LOWER, TITLE_CASE, UPPER, View

_ACTS = table("acts")
_SURNAME_ACTS = PERSON_VERBS | {"is", "was", "has"}  # "est" and "a" say as much of things
_PREPOSITIONS = table("prepositions")
_PERSON_PREPOSITIONS = table("person_prepositions")
_SPECIES = table("species")
_LOWER_CASE_MIN = 4  # letters of a first name in lower case
_BESIDE = (" ", ", ", "-", ",", "^", "/", "\n")
_INITIAL_GAPS = (".", "-", ".-", ". ")
_SURNAME_GAPS = (". ", ".", ".\n", "-", ".  ")
_LINE_CLOSES = re.compile(r"\s*(?:\n|$|[,(|]|\0)")
_TABLE_CELL = re.compile(r"^[¦|]|[¦|] $")
_CREDENTIALS = re.compile(r",? ?(?:M\.?D\.?|Ph\.? ?D\.?|R\.?N\.?|D\.?O\.?|FRCR|FACR|MBBS|MBChB|FRCPC)(?!\w)")
_INITIAL_CLOSES = re.compile(r"\.?(?:[,;)/\n]|\Z)")
_CAPITALS, _TITLE = r"([^\W\d_a-zß-ÿ]{3,})", r"([^\W\d_a-zß-ÿ][a-zß-ÿ]{2,})"
_GLUED = re.compile(f"{_CAPITALS}{_TITLE}|{_TITLE}{_CAPITALS}")
_INNER_CAPITAL = re.compile(r"(?!(?:Mc|Mac|Le|La|De|Du|Di|Da|Van|Fitz)[A-ZÀ-Ý])\w*[a-zß-ÿ][A-ZÀ-Ý]")
_VOWEL = re.compile("[aeiouy]")
_NO_INITIAL = frozenset(("a", "i", "o", "y"))  # words of their own


def find(view: View) -> set[str]:
    """Claim the names that no word announces; returns the words of the sure ones, in plain form."""
    told: set[str] = set()
    flags, shapes, last = view.flags, view.shapes, len(view.flags) - 1
    for index in view.capitalised:
        # Most capitals of a report open a sentence: a common word before another one.
        common = flags[index] & (Word.COMMON | Word.FIRST) == Word.COMMON and shapes[index] != INITIAL
        if common and (index == last or flags[index + 1] & Word.COMMON):
            continue
        if view.free(index):
            _by_shape(view, index, told)
    for index in view.small_names:
        if view.flags[index] & Word.FIRST and view.free(index):
            _in_lower_case(view, index)
    return told


def _by_shape(view: View, index: int, told: set[str]) -> None:
    flag = view.flags[index]
    if view.shapes[index] == INITIAL:
        if not eponym(view, index):
            _by_initial(view, index, told)
        return
    if not flag and _is_glued(view, index):
        claim(view, index, index, "person_name", told)
        return
    if flag & Word.COMMON and not flag & Word.FIRST and not _unknown_follows(view, index):
        return
    if flag & Word.STOP or eponym(view, index) or _may_be_acronym(view, index):
        return
    if measured(view, index) or _is_brand(view, index):
        return
    if view.ends[index] - view.starts[index] < 3:
        if _is_surname_behind_two_letters(view, index):
            claim(view, index, index + 1, "person_name", told)
        return
    if _is_line_of_a_name(view, index):
        claim(view, index, index + 1, "person_name", told)
        return
    if any(shows(view, index) for shows in _SURE):
        claim_around(view, index, told)
    elif not flag & Word.COMMON:
        if any(shows(view, index) for shows in _LIKELY):
            claim_around(view, index, None)
        else:
            _surname_and_initial(view, index)


def _is_glued(view: View, index: int) -> bool:
    """ "DUPONTJean", "JeanDUPONT": a first name and a surname, told apart by their capitals."""
    start, end = view.starts[index], view.ends[index]
    match = None if view.text[start + 1 : end].islower() else _GLUED.fullmatch(view.text[start:end])
    if match is None:
        return False
    parts = [gazetteer().flags.get(plain(part), 0) for part in match.groups() if part]
    return any(flag & Word.FIRST for flag in parts) and not any(flag & Word.COMMON for flag in parts)


def _is_brand(view: View, index: int) -> bool:
    """ "TrueBeam", "BiPAP": capitals inside a word in small letters, unless behind a particle ("McBride", "LeGoff")."""
    written = view.text[view.starts[index] : view.ends[index]]
    return _INNER_CAPITAL.match(written) is not None and not view.flags[index] & NAME


def _unknown_follows(view: View, index: int) -> bool:
    following = joined_next(view, index)
    return following is not None and not view.flags[following] & Word.COMMON


def _named_next(view: View, index: int) -> bool:
    """Whether an unknown word with a capital follows that is no eponym."""
    following = joined_next(view, index)
    return (
        following is not None
        and view.shapes[following] in (TITLE_CASE, UPPER)
        and not view.flags[following] & (Word.COMMON | Word.EPONYM)
    )


def _next_has(view: View, index: int, flag: int) -> bool:
    following = joined_next(view, index)
    return following is not None and bool(view.flags[following] & flag)


def _may_be_acronym(view: View, index: int) -> bool:
    """A short first name in capitals with no name beside it: "IRENE", "ELISA"."""
    flag = view.flags[index]
    if not (flag & Word.FIRST and not flag & Word.COMMON and view.shapes[index] == UPPER):
        return False
    behind_capital = (
        index > 0
        and view.shapes[index - 1] != LOWER
        and view.gap(index - 1) in _BESIDE
        and not (view.flags[index - 1] & Word.EPONYM and not view.flags[index - 1] & NAME)
    )
    if len(view.words[index]) > 5 or _named_next(view, index) or behind_capital:
        return False
    following = joined_next(view, index)
    return following is None or not (view.flags[following] & NAME and view.shapes[following] == UPPER)


def _is_line_of_a_name(view: View, index: int) -> bool:
    """ "Bilic, Zoran" alone on its line: two unknown words and a comma."""
    following = index + 1
    if view.gap(index) != ", " or view.flags[index] & (Word.COMMON | Word.EPONYM | Word.CITY_START):
        return False
    if view.flags[following] & (Word.COMMON | Word.EPONYM | Word.CITY_START) or view.in_capitals(index):
        return False
    alone = (not index or "\n" in view.gap(index - 1)) and "\n" in view.gap(following)
    return alone and view.shapes[following] == TITLE_CASE and len(view.words[following]) > 2


# --- sure: what they find is looked for again in the whole document ---


def _first_name(view: View, index: int) -> bool:
    """A first name that is no other word, or a surname beside it says so."""
    flag = view.flags[index]
    if flag & (Word.FIRST | Word.COMMON) != Word.FIRST:
        return False
    if index and view.gap(index - 1) == "-" and view.flags[index - 1] & (Word.EPONYM | Word.FIRST) == Word.EPONYM:
        return False  # "Salter-Harris"
    beside = _named_next(view, index) or _next_has(view, index, Word.LAST) or _behind_surname(view, index)
    if flag & Word.EPONYM and not beside:
        return False
    return view.shapes[index] == TITLE_CASE or not flag & Word.CITY_START


def _in_capitals_beside_a_name(view: View, index: int) -> bool:
    """In capitals a name shows only by the company of another word that is no common one."""
    flag = view.flags[index]
    if flag & Word.COMMON or len(view.words[index]) <= 3 or not view.in_capitals(index):
        return False
    if not flag & NAME and not _next_has(view, index, NAME):
        return False
    sides = ((index - 1, view.gap(index - 1) if index else ""), (index + 1, view.gap(index)))
    return any(
        0 <= place < len(view.words) and gap in (" ", "-", ", ") and view.free(place) and _is_company(view, place)
        for place, gap in sides
    )


def _is_company(view: View, place: int) -> bool:
    flag = view.flags[place]
    return (
        len(view.words[place]) > 2
        and (not flag & Word.COMMON or bool(flag & Word.FIRST))
        and not flag & (Word.STOP | Word.EPONYM_HEAD | Word.PARTICLE)
    )


def _word_that_is_a_first_name(view: View, index: int) -> bool:
    """ "Rose", "Pierre", "Marine": a first name by its place in the sentence or by what stands beside it."""
    flag = view.flags[index]
    if not (flag & Word.FIRST and flag & Word.COMMON) or flag & Word.KIN:
        return False
    if _behind_surname(view, index) or _before_surname(view, index):
        return True
    if view.in_capitals(index):
        return False
    return (
        _named_next(view, index)
        or _inside_sentence(view, index, Word.EPONYM | Word.MONTH | Word.STREET)
        or _acts(view, index)
        or _before_capital(view, index)
    )


def _behind_surname(view: View, index: int) -> bool:
    """ "GAGNON Camille"; "Gagnon Camille" alone on a line or between identifiers."""
    if not index:
        return False
    before, gap = index - 1, view.gap(index - 1)
    flag, shape = view.flags[before], view.shapes[before]
    if flag & (Word.COMMON | Word.EPONYM):
        return False
    known = shape == UPPER or (shape == TITLE_CASE and flag & Word.LAST)
    if known and gap in (" ", ", ") and len(view.words[before]) > 3:
        return True
    if gap != " " or shape != TITLE_CASE or view.shapes[index] != TITLE_CASE:
        return False
    opens_line = index == 1 or "\n" in view.gap(index - 2) or ":" in view.gap(index - 2)
    return opens_line and _LINE_CLOSES.match(view.masked[view.ends[index] : view.ends[index] + 3]) is not None


def _before_surname(view: View, index: int) -> bool:
    """ "Rose Dupont": a known surname follows that is no other word."""
    following = joined_next(view, index)
    if following is None or view.shapes[following] == LOWER:
        return False
    return view.flags[following] & (Word.LAST | Word.COMMON) == Word.LAST


def _before_capital(view: View, index: int) -> bool:
    """ "Rose Petit": one more word with a capital follows, and no third."""
    following = joined_next(view, index)
    if following is None or len(view.words[following]) <= 3:
        return False
    if view.shapes[index] != TITLE_CASE or view.shapes[following] != TITLE_CASE:
        return False
    if view.flags[following] & (Word.STOP | Word.ROLE | Word.EPONYM | Word.MONTH):
        return False
    third = following + 1
    return third >= len(view.words) or view.shapes[third] != TITLE_CASE or view.gap(following) != " "


def _acts(view: View, index: int) -> bool:
    """ "Rose habite seule"."""
    following = index + 1
    return (
        view.shapes[index] == TITLE_CASE
        and view.gap(index) == " "
        and view.words[following] in _ACTS
        and view.shapes[following] == LOWER
    )


def _beside_identifier(view: View, index: int) -> bool:
    """A word with a capital before an unknown one, beside an identifier or in a table: "..., Perle Defoe, 1985"."""
    flag = view.flags[index]
    other_use = Word.ROLE | Word.TITLE | Word.HOSPITAL | Word.EPONYM_HEAD | Word.MONTH | Word.STREET
    if not flag & Word.COMMON or flag & other_use or view.shapes[index] != TITLE_CASE or not _named_next(view, index):
        return False
    if view.in_capitals(index):
        return False
    before = view.masked[max(0, view.starts[index] - 3) : view.starts[index]]
    after = view.masked[view.ends[index + 1] : view.ends[index + 1] + 3]
    behind_identifier = "\0" in before and "." not in before  # no new sentence
    return behind_identifier or "\0" in after or _TABLE_CELL.search(before) is not None


def _capitals_beside_small_letters(view: View, index: int) -> bool:
    """ "Zoran BILIC", "BILIC Zoran": two unknown words, one in capitals and one not."""
    following = _unknown_next(view, index)
    if following is None or {view.shapes[index], view.shapes[following]} != {UPPER, TITLE_CASE}:
        return False
    capitals = index if view.shapes[index] == UPPER else following
    if (view.flags[index] | view.flags[following]) & NAME:
        return len(view.words[capitals]) > 3
    return len(view.words[capitals]) > 4 and _VOWEL.search(view.words[capitals]) is not None  # "IVSE" is an acronym


def _has_credentials(view: View, index: int) -> bool:
    """ "Okafor, MD": an unknown word before a degree."""
    if view.flags[index] & (Word.COMMON | Word.EPONYM) or view.in_capitals(index):
        return False
    return _CREDENTIALS.match(view.text, view.ends[index]) is not None


# --- likely: enough to hide them, not to look for them elsewhere ---


def _surname_inside_sentence(view: View, index: int) -> bool:
    """A known surname inside a sentence, with nothing joined to it."""
    flag = view.flags[index]
    if joined_next(view, index) is not None or not flag & Word.LAST:
        return False
    return _inside_sentence(view, index, Word.EPONYM | Word.CITY_START) and not view.in_capitals(index)


def _surname_acts(view: View, index: int) -> bool:
    """ "Kervadec consulte pour": a known surname before what only persons do."""
    flag = view.flags[index]
    if flag & (Word.LAST | Word.EPONYM) != Word.LAST or len(view.words[index]) <= 3 or view.in_capitals(index):
        return False
    return view.gap(index) == " " and view.shapes[index + 1] == LOWER and view.words[index + 1] in _SURNAME_ACTS


def _two_capitalised(view: View, index: int) -> bool:
    """ "Zoran Bilic": two unknown words with a capital, or two in capitals of which one is a known name."""
    following = _unknown_next(view, index)
    if following is None or view.shapes[index] != view.shapes[following]:
        return False
    if (view.flags[index] | view.flags[following]) & Word.FINDING:
        return False
    if (view.flags[index] | view.flags[following]) & NAME:
        return True
    return view.shapes[index] == TITLE_CASE and view.gap(index) == " "


def _unknown_next(view: View, index: int) -> int | None:
    """The word behind if both are unknown, neither is an eponym and capitals mean something in their line."""
    following = joined_next(view, index)
    if following is None or (view.flags[index] | view.flags[following]) & (Word.COMMON | Word.EPONYM):
        return None
    if len(view.words[following]) < 3 or view.shapes[following] in (LOWER, INITIAL):
        return None
    return None if view.in_capitals(index) or eponym(view, following) else following


def _inside_sentence(view: View, index: int, unless: int) -> bool:
    """A capital behind a word in small letters that announces no noun."""
    return (
        index > 0
        and view.shapes[index] == TITLE_CASE
        and view.shapes[index - 1] == LOWER
        and view.words[index - 1] not in _PREPOSITIONS
        and view.gap(index - 1) in (" ", ", ")
        and not view.flags[index] & unless
    )


_SURE: tuple[Callable[[View, int], bool], ...] = (
    _first_name, _in_capitals_beside_a_name, _word_that_is_a_first_name, _beside_identifier,
    _capitals_beside_small_letters, _has_credentials,
)  # fmt: skip
_LIKELY: tuple[Callable[[View, int], bool], ...] = (_surname_inside_sentence, _surname_acts, _two_capitalised)


# --- initials ---


def _by_initial(view: View, index: int, told: set[str]) -> None:
    """ "C. Carlizian", "P.E. Jilliot", "R-L. BOULEVANT", "J Smith"."""
    if index and view.shapes[index - 1] == INITIAL and view.gap(index - 1) in _INITIAL_GAPS:
        return  # read from its first letter
    last = _last_initial(view, index)
    target = last + 1
    if target >= len(view.words) or view.shapes[target] not in (TITLE_CASE, UPPER):
        return
    if view.gap(last) in _SURNAME_GAPS:
        if view.text[view.ends[index]] in ".-" and _is_surname_behind_dot(view, index, last):
            _claim_initials(view, index, target, told)
    elif view.gap(last) == " " and _is_surname_behind_bare_initial(view, index, last):
        _claim_initials(view, index, target, told)


def _last_initial(view: View, index: int) -> int:
    """Last of the initials in a row that begins at `index`."""
    last = index
    while (
        last + 1 < min(len(view.words), index + TITLES_MAX)
        and view.shapes[last + 1] == INITIAL
        and view.gap(last) in _INITIAL_GAPS
    ):
        last += 1
    return last


def _claim_initials(view: View, index: int, target: int, told: set[str]) -> None:
    last = name_end(view, target, sure=False, lower=False)
    last = target if last is None else last
    claim(view, index, last, "person_name", told)
    claim_list(view, last, "person_name", told)


def _is_surname_behind_dot(view: View, index: int, last: int) -> bool:
    """Whether a surname stands behind the dotted initials [index, last]."""
    target = last + 1
    flag, word = view.flags[target], view.words[target]
    if index and view.gap(index - 1) in ("'", "’", ".", "-"):
        return False
    if word in _SPECIES or view.gap(last) == "-" or (len(word) < 3 and not flag & Word.PARTICLE):
        return False
    if not flag & Word.COMMON:
        return True
    if not flag & NAME or view.in_capitals(index):
        return False
    return last > index or (bool(flag & Word.LAST) and view.shapes[target] == UPPER)


def _is_surname_behind_bare_initial(view: View, index: int, last: int) -> bool:
    """ "J Smith", "J-P Quesnel", "D SAMCHA": initials without a dot."""
    target = last + 1
    flag, word = view.flags[target], view.words[target]
    if flag & Word.COMMON or word in _SPECIES or len(word) < 3 or eponym(view, target):
        return False
    if last > index:
        return True
    capitals = view.in_capitals(index)
    if view.shapes[target] == UPPER and len(word) > 3 and not capitals and not flag & Word.EPONYM:
        return True
    if flag & Word.EPONYM and not flag & Word.LAST:
        return False
    if view.words[index] in _NO_INITIAL:
        return _is_by_letter(view, index, target)
    return _may_open_name(view, index) and (not capitals or bool(flag & Word.LAST))


def _is_by_letter(view: View, index: int, target: int) -> bool:
    """ "by O Noack", "A Galvani reviewed": a letter that is also a word is an initial only where somebody acts."""
    if index and view.gap(index - 1) == " " and view.words[index - 1] in ("by", "par", "with", "avec"):
        return True
    following = target + 1
    if following >= len(view.words) or view.gap(target) != " " or not _may_open_name(view, index):
        return False
    return bool(view.flags[following] & Word.AUTHOR) or view.words[following] in PERSON_VERBS


def _is_surname_behind_two_letters(view: View, index: int) -> bool:
    """ "JB Smith": two initials in one word."""
    target = index + 1
    return (
        view.shapes[index] == UPPER
        and not view.flags[index] & Word.COMMON
        and view.gap(index) == " "
        and view.shapes[target] == TITLE_CASE
        and view.flags[target] & (Word.LAST | Word.COMMON) == Word.LAST
        and not eponym(view, target)
        and _may_open_name(view, index)
    )


def _may_open_name(view: View, index: int) -> bool:
    """Whether a name may begin here: after a stop, a line end, or a word that persons follow ("by", "avec")."""
    if not index:
        return True
    gap = view.gap(index - 1).rstrip(" ")
    if gap:
        return gap[-1] in "\n.:;,(|/"
    return view.words[index - 1] in _PERSON_PREPOSITIONS


def _surname_and_initial(view: View, index: int) -> None:
    """ "BILIC Z.", "Smith J, MD": the initial behind."""
    following = joined_next(view, index)
    if following is None or view.shapes[following] != INITIAL or view.gap(index) != " ":
        return
    flag, shape = view.flags[index], view.shapes[index]
    if (flag & Word.CITY_START and not flag & Word.LAST) or len(view.words[index]) <= 3:
        return
    dotted = view.text[view.ends[following] : view.ends[following] + 1] == "."
    closed = _INITIAL_CLOSES.match(view.text, view.ends[following]) is not None and _may_open_name(view, index)
    opens_line = not index or "\n" in view.gap(index - 1)
    if (
        (shape == UPPER and dotted and not flag & Word.CITY_START and (flag & NAME or len(view.words[index]) > 4))
        or (closed and flag & Word.LAST and not flag & Word.EPONYM)
        or (closed and shape == UPPER and opens_line and not flag & Word.EPONYM)
    ):
        claim(view, index, following, "person_name", None)


# --- lower case ---


def _in_lower_case(view: View, index: int) -> None:
    """A known first name in lower case beside another word that is no common one: "mirella rousset"."""
    if len(view.words[index]) < _LOWER_CASE_MIN or view.flags[index] & Word.FINDING or eponym(view, index):
        return
    for other in (index + 1, index - 1):
        if 0 <= other < len(view.words) and _is_small_company(view, index, other):
            first, last = min(index, other), max(index, other)
            view.claim(view.starts[first], view.ends[last], "person_name", "gazetteer")
            return


def _is_small_company(view: View, index: int, other: int) -> bool:
    flag = view.flags[other]
    if view.shapes[other] != LOWER or len(view.words[other]) <= 2 or not view.free(other):
        return False
    no_name = Word.STOP | Word.EPONYM_HEAD | Word.FINDING | Word.KIN | Word.ROLE | Word.TITLE
    if view.gap(min(index, other)) not in (" ", "-") or flag & no_name:
        return False
    return bool(flag & NAME) or bool(view.flags[index] & Word.USUAL_FIRST and not flag & Word.COMMON)
