"""Names of persons, by context first: a title, a role, kinship, a known first name, an initial, capitals side by side.

A word of medicine after a title is a name ("Dr Avril", "Mme Côte"); a name beside "maladie de" or "ring" is not. Names
found by strong evidence are looked for again in the whole document.
"""

from __future__ import annotations

import re

from shards.reports.identity.eponyms import eponym
from shards.reports.identity.gazetteers import SHORT_TITLES, Word, table
from shards.reports.identity.view import INITIAL, LOWER, TITLE_CASE, UPPER, Kind, View

_NAME = Word.FIRST | Word.LAST
_PATIENT_TITLES = table("patient_titles")
_PATIENT_ROLES = table("patient_roles")
_FIELD_ROLES = frozenset(["nom", "noms", "prenom", "prenoms", "name", "surname", "firstname", "lastname"])
_TITLES_MAX = 4  # titles or initials in a row
_WORDS_MAX = 7  # a name of more words is a sentence in capitals
_VERBS = frozenset(
    ["est", "a", "dit", "vit", "habite", "presente", "says", "has", "lives", "was", "is", "vient", "va", "se", "quant"]
)
_PREPOSITIONS = frozenset(["de", "d", "du", "des", "of", "par", "l", "la", "le", "les", "the"])
_ROLE_GAP = re.compile(
    r"(?:\([^)\n]{1,12}\))?(?: \d{1,2})?(?: (?:by|par|de|du|le|le docteur))?\s{0,2}[:\-]?\s{0,3}(?:by|par)?[: ]{0,2}\Z"
)
_SPECIES = frozenset(
    ["coli", "aureus", "pneumoniae", "albicans", "fumigatus", "tuberculosis", "influenzae", "pylori", "faecalis"]
)


def find_by_cue(view: View) -> set[str]:
    """Claim the names that a title, a role or kinship announces; returns their words, in plain form."""
    strong: set[str] = set()
    cues = Word.TITLE | Word.ROLE | Word.KIN | Word.CALL
    for index in view.marked:
        if view.flags[index] & cues and view.free(index):
            _after_cue(view, index, strong)
    for index in view.capitalised:
        if view.words[index] in SHORT_TITLES and view.free(index):
            _after_cue(view, index, strong)
    return strong


def find_by_shape(view: View) -> set[str]:
    """Claim the names that no word announces; returns the words of the sure ones, in plain form."""
    strong: set[str] = set()
    for index in view.capitalised:
        if view.free(index):
            _by_shape(view, index, strong)
    for index in view.small_names:
        if view.flags[index] & Word.FIRST and view.free(index):
            _in_lower_case(view, index)
    return strong


def _claim(view: View, first: int, last: int, kind: Kind, strong: set[str] | None) -> None:
    start, end = view.starts[first], view.ends[last]
    if shape_is_initial(view, last) and view.text[end : end + 1] == ".":
        end += 1
    view.claim(start, end, kind, "gazetteer")
    if strong is not None:
        for index in range(first, last + 1):
            if view.ends[index] - view.starts[index] > 2 and not view.flags[index] & (Word.STOP | Word.PARTICLE):
                strong.add(view.words[index])


def shape_is_initial(view: View, index: int) -> bool:
    """One capital letter, or two with a hyphen or dot between them seen as two words."""
    return view.shapes[index] == INITIAL


def _after_cue(view: View, index: int, strong: set[str]) -> None:
    word, flag, shape = view.words[index], view.flags[index], view.shapes[index]
    if index + 1 >= len(view.words):
        return
    gap = view.gap(index)
    if flag & Word.TITLE or word in SHORT_TITLES:
        if not re.fullmatch(r"\.? {0,3}(?:\n ?)?|\.?\s?:\s?|\.,? ?", gap):
            return
        if view.plain[view.starts[index] - 1 : view.starts[index]] in ("'", "-") and word not in ("dr", "docteur"):
            return
        following = index + 1
        while (
            following < min(len(view.words), index + _TITLES_MAX)
            and view.flags[following] & Word.TITLE
            and re.fullmatch(r"\.? ?", view.gap(following))
        ):
            following += 1
        while (
            following + 1 < len(view.words)
            and view.words[following] in ("le", "la", "the", "interne", "radiologue")
            and view.shapes[following] != TITLE_CASE
            and view.flags[following + 1] & (Word.TITLE | Word.ROLE)
        ):
            following += 1
        if following >= len(view.words) or view.flags[following] & Word.HOSPITAL:
            return
        doubtful = (
            shape == UPPER and word in ("mr", "ms", "pr", "me", "mm", "prs") and not view.in_capitals(index)
        ) or word in ("me", "m", "mm", "miss", "sir")
        abbreviated = word in SHORT_TITLES and gap.startswith(".") and view.shapes[following] != LOWER
        abbreviated = abbreviated and not view.flags[following] & Word.STOP
        if doubtful and not abbreviated and (view.flags[following] & Word.COMMON or view.shapes[following] == LOWER):
            return
        if shape == LOWER and len(word) < 3 and word not in ("dr", "pr", "mr"):
            return
        kind: Kind = "patient_name" if word in _PATIENT_TITLES else "person_name"
        _names_from(view, following, kind, strong, sure=True)
        return
    if flag & Word.CALL:
        unknown = not view.flags[index + 1] & (Word.COMMON | Word.TITLE) and view.shapes[index + 1] in (
            TITLE_CASE,
            UPPER,
        )
        if gap == " " and unknown and not view.in_capitals(index):
            _names_from(view, index + 1, "person_name", strong, sure=False)
        return
    # A role or a relative: the name follows at once, or after a colon.
    if not _ROLE_GAP.match(gap):
        return
    colon = ":" in gap
    following = index + 1
    if view.flags[following] & (Word.TITLE | Word.ROLE):
        return
    if "\n" in gap and not colon:
        return
    kind = "patient_name" if word in _PATIENT_ROLES else "person_name"
    if flag & Word.KIN and not colon and view.shapes[following] == LOWER:
        return
    if not colon and (
        view.flags[following] & Word.COMMON
        and not (view.flags[following] & Word.FIRST and view.shapes[following] == TITLE_CASE)
    ):
        return
    if (
        not colon
        and not view.flags[following] & Word.FIRST
        and not (
            following + 1 < len(view.words)
            and view.gap(following) in (" ", "-", ". ", ".")
            and view.shapes[following + 1] != LOWER
            and not view.flags[following + 1] & Word.COMMON
        )
    ):
        return
    if not colon and view.flags[following] & Word.EPONYM and not view.flags[following] & Word.FIRST:
        return
    if not colon and view.in_capitals(index) and not view.flags[following] & _NAME:
        return
    if (
        not colon
        and view.shapes[following] == UPPER
        and len(view.words[following]) < 4
        and not view.flags[following] & _NAME
    ):
        return
    field = colon and word in _FIELD_ROLES
    _names_from(view, following, kind, strong, sure=field, listed=colon)


def _names_from(view: View, index: int, kind: Kind, strong: set[str], *, sure: bool, listed: bool = False) -> None:
    """Claim the name that begins at word `index`, and further ones joined by a comma, "et" or "and".

    `sure`: even a common word is a name here. `listed`: after a colon, where names may be written in lower case.
    """
    last = _name_end(view, index, sure=sure, lower=listed or sure)
    if last is None:
        return
    _claim(view, index, last, kind, strong)
    _continue_list(view, last, kind, strong, listed=listed, sure=sure)


def _continue_list(view: View, last: int, kind: Kind, strong: set[str], *, listed: bool, sure: bool) -> None:
    """Further names after word `last`."""
    while last + 1 < len(view.words):
        gap = view.gap(last)
        following = last + 1
        if view.words[following] in ("et", "and") and gap == " " and following + 1 < len(view.words):
            gap, following = ",", following + 1
        if not re.fullmatch(r"\s?[,;/&]\s{0,2}", gap) or view.flags[following] & (Word.TITLE | Word.ROLE | Word.STOP):
            return
        known = view.flags[following] & Word.FIRST and (
            not view.flags[following] & Word.COMMON
            or (listed and following + 1 < len(view.words) and view.flags[following + 1] & _NAME)
        )
        name_like = (
            view.shapes[following] != LOWER
            and not view.flags[following] & Word.COMMON
            and not view.in_capitals(following)
        )
        if not (known or name_like or view.shapes[following] == INITIAL):
            return
        end = _name_end(view, following, sure=False, lower=listed)
        if end is None or (end == following and not known and view.shapes[following] == INITIAL):
            return
        if end == following and not known and not view.flags[following] & _NAME and not listed and not sure:
            return
        _claim(view, following, end, kind, strong)
        last = end


def _joins(gap: str, initial: bool) -> bool:
    """Whether two words on both sides of `gap` may belong to one name."""
    return gap in (" ", "-", "'", "’", "  ", " -", "- ", " - ") or (
        initial and gap in (".", ". ", ".-", ".\n", "\n", ". - ")
    )


def _name_end(view: View, index: int, *, sure: bool, lower: bool) -> int | None:
    """Last word of the name that begins at `index`, or None when no name does."""
    flags, shapes, words = view.flags, view.shapes, view.words
    capitals = view.in_capitals(index)
    last: int | None = None
    position = index
    firsts_only = True
    while position < len(words) and position - index < _WORDS_MAX:
        if not view.free(position):
            break
        if position > index:
            gap = view.gap(position - 1)
            if not _joins(gap, shapes[position - 1] == INITIAL):
                comma = (
                    gap in (", ", ",")
                    and last == index
                    and shapes[index] in (UPPER, TITLE_CASE)
                    and (
                        flags[position] & Word.FIRST and not flags[position] & Word.COMMON and shapes[position] != LOWER
                    )
                )
                if not comma:
                    break
        flag, shape = flags[position], shapes[position]
        hyphen = position > index and view.gap(position - 1) in ("-", "'", "’")
        if shape == LOWER:
            if flag & Word.PARTICLE and position + 1 < len(words) and _joins(view.gap(position), False):
                following = shapes[position + 1]
                if (
                    last is not None
                    or sure
                    or view.words[position] in ("de", "van", "von", "el", "al", "d", "l", "ben")
                ) and (
                    following in (TITLE_CASE, UPPER)
                    or (lower and flags[position + 1] & _NAME and not flags[position + 1] & Word.COMMON)
                    or (
                        flags[position + 1] & Word.PARTICLE
                        and position + 2 < len(words)
                        and shapes[position + 2] in (TITLE_CASE, UPPER)
                    )
                ):
                    position += 1
                    continue
            if hyphen and last is not None and not flag & Word.STOP:
                last, position = position, position + 1
                continue
            if not lower:
                break
            dotted = (
                view.ends[position] - view.starts[position] == 1
                and view.text[view.ends[position] : view.ends[position] + 1] == "."
            )
            if (
                dotted
                and position + 1 < len(words)
                and view.gap(position) in (".", ". ")
                and not flags[position + 1] & Word.COMMON
            ):
                last, position = position + 1, position + 2  # "r. poumonet"
                continue
            in_mixed = last is not None and shapes[last] != LOWER
            if in_mixed or (flag & Word.COMMON and not (last is not None and flag & _NAME)) or flag & Word.STOP:
                break
            if not flag & _NAME and (last is None and not sure):
                break
            if last is not None and not flag & _NAME and position - index > 1:
                break
            last, position = position, position + 1
            continue
        if (
            shape == INITIAL
            and flag & Word.STOP
            and view.text[view.ends[position] : view.ends[position] + 1] != "."
            and position > index
        ):
            break
        if flag & Word.PARTICLE and position > index and shape in (TITLE_CASE, UPPER) and position + 1 < len(words):
            after = position + 1  # "Durègne Le Martelleur"
            if (
                _joins(view.gap(position), False)
                and shapes[after] != LOWER
                and (not flags[after] & Word.COMMON or flags[after] & _NAME)
            ):
                last, position = after, after + 1
                firsts_only = False
                continue
        if (
            flag & Word.STOP
            and shape != INITIAL
            and not (flag & _NAME and not capitals and shape == TITLE_CASE and flag & Word.FIRST)
        ):
            break
        if flag & (Word.TITLE | Word.ROLE) and position > index and not hyphen and not flag & _NAME:
            break
        if flag & Word.COMMON and not hyphen and shape != INITIAL:
            if position == index:
                if not sure and not flag & _NAME:
                    break
                if not sure and (
                    capitals
                    or not (
                        position + 1 < len(words)
                        and _joins(view.gap(position), False)
                        and shapes[position + 1] not in (LOWER,)
                        and not (flags[position + 1] & Word.COMMON and not flags[position + 1] & _NAME)
                    )
                ):
                    break
            else:
                named = flag & _NAME
                if capitals:
                    if not named:
                        break
                elif (
                    not named
                    and not (firsts_only and shape in (TITLE_CASE, UPPER) and not flag & Word.MONTH)
                    and not (
                        shape == UPPER
                        and last is not None
                        and shapes[last] == TITLE_CASE
                        and len(words[position]) > 3
                        and not _medical_upper(view, position)
                    )
                ):
                    break
                if not named and position - index >= 3:
                    break
        if (
            shape == UPPER
            and position > index
            and not flag & _NAME
            and len(words[position]) < 4
            and not flag & Word.PARTICLE
            and not hyphen
            and shapes[position - 1] == TITLE_CASE
            and not firsts_only
        ):
            break
        if flag & Word.STREET and not flag & _NAME:
            break
        if shape != INITIAL and not flag & Word.FIRST:
            firsts_only = False
        last, position = position, position + 1
    if last is None:
        return None
    # Initials alone are what published cases leave of a name: they point at nobody.
    if all(
        len(words[i]) == 1 or (shapes[i] == UPPER and len(words[i]) == 2 and not flags[i] & _NAME)
        for i in range(index, last + 1)
    ):
        return None
    return last


def _medical_upper(view: View, index: int) -> bool:
    """An acronym rather than a name in capitals."""
    return view.ends[index] - view.starts[index] <= 4 and not view.flags[index] & _NAME


def _claim_with_initial(view: View, index: int, strong: set[str]) -> None:
    """An initial without a dot, and the name behind it."""
    _claim_around(view, index + 1, strong)
    if view.free(index):
        view.claim(view.starts[index], view.ends[index], "person_name", "gazetteer")


def _in_lower_case(view: View, index: int) -> None:
    """A known first name in lower case beside another word that is no common one: "mirella rousset"."""
    if len(view.words[index]) < 4 or eponym(view, index):
        return
    for other in (index + 1, index - 1):
        if not 0 <= other < len(view.words) or view.gap(min(index, other)) not in (" ", "-") or not view.free(other):
            continue
        flag = view.flags[other]
        usual = view.flags[index] & Word.USUAL_FIRST and not flag & Word.COMMON
        known = (flag & _NAME or usual) and not flag & Word.STOP
        if view.shapes[other] == LOWER and len(view.words[other]) > 2 and known and not flag & Word.EPONYM_HEAD:
            first, last = min(index, other), max(index, other)
            view.claim(view.starts[first], view.ends[last], "person_name", "gazetteer")
            return


def _by_shape(view: View, index: int, strong: set[str]) -> None:
    """Names without a cue: known first names, initials with a name, a word in capitals beside a capitalised one."""
    flags, shapes = view.flags, view.shapes
    flag, shape = flags[index], shapes[index]
    following = index + 1 if index + 1 < len(view.words) else None
    joined = following is not None and _joins(view.gap(index), shape == INITIAL)
    unknown_next = joined and following is not None and not flags[following] & Word.COMMON
    if flag & Word.COMMON and not flag & Word.FIRST and shape != INITIAL and not unknown_next:
        return  # most capitals of a report: the first word of a sentence
    if eponym(view, index):
        return
    capitals = view.in_capitals(index)
    # "D SAMCHA": an initial without its dot, before capitals that nobody knows.
    if shape == INITIAL and following is not None and shapes[following] == UPPER and view.gap(index) == " ":
        if not capitals and len(view.words[following]) > 3 and not flags[following] & (Word.COMMON | Word.EPONYM):
            _claim_with_initial(view, index, strong)
            return
    elif shape == INITIAL and following is not None and shapes[following] == TITLE_CASE and view.gap(index) == " ":
        around = view.text[max(0, view.starts[index] - 1) : view.starts[index]] + view.gap(following)[:1]
        if around in ("\n", "\n\n") and not flags[following] & (Word.COMMON | Word.EPONYM):
            _claim_with_initial(view, index, strong)
            return
    # An initial and a name: "C. Carlizian", "P.E. Jilliot", "R-L. BOULEVANT".
    if shape == INITIAL:
        dotted = view.text[view.ends[index] : view.ends[index] + 1] in (".", "-")
        if not dotted or (index and view.gap(index - 1) in ("'", "’", ".", "-") and shapes[index - 1] != INITIAL):
            return
        end = index
        while (
            end + 1 < min(len(view.words), index + _TITLES_MAX)
            and shapes[end + 1] == INITIAL
            and view.gap(end) in (".", "-", ".-", ". ")
        ):
            end += 1
        target = end + 1
        if (
            target < len(view.words)
            and view.gap(end) in (". ", ".", ".\n", "-", ".  ")
            and shapes[target] in (TITLE_CASE, UPPER)
        ):
            if flags[target] & Word.COMMON and not flags[target] & _NAME:
                return
            if len(view.words[target]) < 3 and not flags[target] & Word.PARTICLE:
                return
            if view.gap(end) == "-" or (capitals and flags[target] & Word.COMMON) or view.words[target] in _SPECIES:
                return
            if (
                flags[target] & Word.COMMON
                and end == index
                and not (flags[target] & Word.LAST and shapes[target] == UPPER)
            ):
                return
            last = _name_end(view, target, sure=False, lower=False)
            last = last if last is not None else target
            _claim(view, index, last, "person_name", strong)
            _continue_list(view, last, "person_name", strong, listed=False, sure=False)
        return
    if flag & Word.STOP or view.ends[index] - view.starts[index] < 3:
        return
    first_name = flag & Word.FIRST
    common = flag & Word.COMMON
    # A known first name, unless it is also a word and nothing beside it says otherwise.
    named_next = (
        joined
        and following is not None
        and shapes[following] in (TITLE_CASE, UPPER)
        and not flags[following] & (Word.COMMON | Word.EPONYM)
    )
    if (
        first_name
        and not common
        and shape == UPPER
        and len(view.words[index]) <= 5
        and not named_next
        and not (joined and following is not None and flags[following] & _NAME and shapes[following] == UPPER)
        and not (index and shapes[index - 1] != LOWER)
    ):
        return
    if (
        first_name
        and not common
        and (
            not flag & Word.EPONYM or named_next or (joined and following is not None and flags[following] & Word.LAST)
        )
        and (shape == TITLE_CASE or not flag & Word.CITY_START)
    ):
        _claim_around(view, index, strong)
        return
    if capitals and not common and (flag & _NAME or (joined and following is not None and flags[following] & _NAME)):
        # In capitals a name shows only by the company of another word that is no common one.
        beside = [
            place
            for place, gap in ((index - 1, view.gap(index - 1) if index else ""), (index + 1, view.gap(index)))
            if 0 <= place < len(view.words) and gap in (" ", "-", ", ") and view.free(place)
        ]
        if len(view.words[index]) > 3 and any(
            len(view.words[place]) > 2
            and (not flags[place] & Word.COMMON or flags[place] & Word.FIRST)
            and not flags[place] & (Word.STOP | Word.EPONYM_HEAD | Word.PARTICLE)
            for place in beside
        ):
            _claim_around(view, index, strong)
            return
    if first_name and common:
        before_named = (
            index > 0
            and view.gap(index - 1) in (" ", ", ")
            and (shapes[index - 1] == UPPER or (shapes[index - 1] == TITLE_CASE and flags[index - 1] & Word.LAST))
            and len(view.words[index - 1]) > 3
            and not flags[index - 1] & (Word.COMMON | Word.EPONYM)
        )
        surname_next = (
            joined
            and following is not None
            and shapes[following] != LOWER
            and flags[following] & Word.LAST
            and not flags[following] & Word.COMMON
        )
        title_next = (
            joined
            and following is not None
            and not capitals
            and shape == TITLE_CASE
            and shapes[following] == TITLE_CASE
            and len(view.words[following]) > 3
            and not flags[following] & (Word.STOP | Word.ROLE | Word.EPONYM | Word.MONTH)
            and (following + 1 >= len(view.words) or shapes[following + 1] != TITLE_CASE or view.gap(following) != " ")
        )
        # "Gagnon Camille" alone on a line or between identifiers.
        lines = (
            index > 0
            and shape == TITLE_CASE
            and shapes[index - 1] == TITLE_CASE
            and view.gap(index - 1) == " "
            and not flags[index - 1] & (Word.COMMON | Word.EPONYM)
            and (index == 1 or "\n" in view.gap(index - 2) or ":" in view.gap(index - 2))
            and re.match(r"\s*(?:\n|$|[,(|]|\0)", view.masked[view.ends[index] : view.ends[index] + 3]) is not None
        )
        before_named = before_named or lines
        inside = (
            _inside_sentence(view, index)
            and shape == TITLE_CASE
            and not flag & (Word.EPONYM | Word.MONTH | Word.STREET)
        )
        acts = (
            shape == TITLE_CASE
            and not capitals
            and following is not None
            and view.words[following] in _VERBS
            and shapes[following] == LOWER
            and view.gap(index) == " "
        )
        if (
            (inside and not capitals)
            or acts
            or before_named
            or title_next
            or surname_next
            or (named_next and not capitals)
        ):
            _claim_around(view, index, strong)
            return
    # A word with a capital inside a line, or beside an identifier, before one nobody knows: "..., Perle Defoe, 1985".
    if (
        common
        and named_next
        and not capitals
        and shape == TITLE_CASE
        and not flag & (Word.ROLE | Word.TITLE | Word.HOSPITAL | Word.EPONYM_HEAD | Word.MONTH | Word.STREET)
    ):
        before = view.masked[max(0, view.starts[index] - 3) : view.starts[index]]
        after = view.masked[view.ends[index + 1] : view.ends[index + 1] + 3]
        if "\0" in before or "\0" in after or re.search(r"^[¦|]|[¦|] $", before):
            _claim_around(view, index, strong)
            return
    if common or not joined or following is None:
        if (
            not common
            and flag & Word.LAST
            and not flag & (Word.EPONYM | Word.CITY_START)
            and _inside_sentence(view, index)
            and not capitals
        ):
            _claim_around(view, index, None)
        return
    # Two words nobody knows side by side, one in capitals and one not; or both capitalised inside a sentence or a list.
    other, other_shape = flags[following], shapes[following]
    if (
        shape == UPPER
        and other_shape == INITIAL
        and view.text[view.ends[following] : view.ends[following] + 1] == "."
        and len(view.words[index]) > 3
        and not flag & Word.CITY_START
    ):
        _claim(view, index, following, "person_name", None)
        return
    if capitals or other & Word.COMMON or len(view.words[following]) < 3 or other_shape in (LOWER, INITIAL):
        return
    if flag & Word.EPONYM or other & Word.EPONYM or eponym(view, following):
        return
    mixed = {shape, other_shape} == {UPPER, TITLE_CASE}
    upper_length = (
        len(view.words[index] if shape == UPPER else view.words[following]) if UPPER in (shape, other_shape) else 9
    )
    if (
        (mixed and upper_length > 3)
        or (not mixed and (flag | other) & _NAME)
        or (not mixed and shape == TITLE_CASE and view.gap(index) == " ")
    ):
        _claim_around(view, index, None if not mixed else strong)


def _inside_sentence(view: View, index: int) -> bool:
    return (
        index > 0
        and view.shapes[index] == TITLE_CASE
        and view.words[index - 1] not in _PREPOSITIONS
        and view.gap(index - 1) in (" ", ", ")
        and view.shapes[index - 1] == LOWER
    )


def _claim_around(view: View, index: int, strong: set[str] | None) -> None:
    """Claim the name that word `index` belongs to, with the last name before it in either order."""
    last = _name_end(view, index, sure=True, lower=False)
    if last is None:
        return
    first = index
    capitals = view.in_capitals(index)
    while first > 0 and index - first < 3 and view.free(first - 1):
        before = first - 1
        gap = view.gap(before)
        flag, shape = view.flags[before], view.shapes[before]
        comma = gap in (", ", ",") and shape == UPPER and not flag & Word.COMMON
        if not comma and gap not in (" ", "-", "  ", "'", "’"):
            break
        if flag & (Word.STOP | Word.TITLE | Word.ROLE | Word.HOSPITAL | Word.STREET) and gap != "-":
            break
        if (
            flag & Word.PARTICLE
            and first < index
            and before > 0
            and view.shapes[before - 1] in (UPPER, TITLE_CASE)
            and not view.flags[before - 1] & Word.COMMON
        ):
            first = before
            continue
        if shape == LOWER or (shape == INITIAL and gap not in ("-", "'", "’")):
            break
        if flag & Word.COMMON and gap != "-":
            named = flag & _NAME
            upper_last = (
                shape == UPPER
                and view.shapes[index] == TITLE_CASE
                and not capitals
                and len(view.words[before]) > 2
                and (named or len(view.words[before]) > 4)
            )
            if not upper_last and not (
                named
                and not capitals
                and shape == TITLE_CASE
                and before > 0
                and view.gap(before - 1) not in (". ", "\n")
            ):
                break
        if shape == UPPER and not flag & _NAME and len(view.words[before]) < 4 and gap != "-":
            break
        first = before
    _claim(view, first, last, "person_name", strong)
