"""Names that a word before them announces: a title, a role, kinship, a field, who signed, a closing formula.

A word of medicine after a title is a name ("Dr Avril", "Mme Côte"). The weaker the cue, the more the word behind it
must look like a name.
"""

from __future__ import annotations

import re

from shards.reports.identity.gazetteers import SHORT_TITLES, Word, table
from shards.reports.identity.names import DEGREES, LEADING_PARTICLES, NAME, TITLES_MAX, claim_around, claim_from
from shards.reports.identity.view import LOWER, TITLE_CASE, UPPER, Kind, View

_PATIENT_TITLES = table("patient_titles")
_PATIENT_ROLES = table("patient_roles")
_FIELDS = table("name_fields")
_ONE_PERSON = table("one_person")
# Preposition -> the words it joins to a person; None: all authors.
_PERSON_BEHIND = {
    **dict.fromkeys(("par", "by")),
    **dict.fromkeys(("avec", "with"), table("talked_over")),
    **dict.fromkeys(("a", "to"), table("handed_over")),
}
_DOUBTFUL_CAPITALS = table("titles_doubtful_in_capitals")
_DOUBTFUL_TITLES = table("doubtful_titles")
_BETWEEN_TITLES = table("between_titles")  # "Monsieur l'interne", "Mr le Docteur"
_WROTE = table("wrote")
_MAY_SIGN = Word.FIRST | Word.LAST | Word.USUAL_FIRST | Word.CITY_START
_CUES = Word.TITLE | Word.ROLE | Word.KIN | Word.CALL | Word.AUTHOR | Word.BORN | Word.CLOSING
_TITLE_GAP = re.compile(r"\.? {0,3}(?:\n ?)?|\.?\s?:\s?|\.,? ?")
_BETWEEN_TITLES_GAP = re.compile(r"\.? ?")
# "(sénior) 2 par le docteur : ", in the plain text from the role's end to the name.
_ROLE_GAP = re.compile(
    r"(?:\([^)\n]{1,12}\))?(?: \d{1,2})?(?: (?:by|par|de|du|le|le docteur))?\s{0,2}[:\-]?\s{0,3}(?:by|par)?[: ]{0,2}\Z"
)
# "Nom de jeune fille : ": what a field of a form may add to its first word.
_FIELD_GAP = re.compile(
    r" (?:de|d'|du|of)? ?(?:naissance|usage|jeune fille|famille|epouse|marital|patronymique|usuel|complet|patiente?"
    r"|et prenoms?|prenoms?)(?: \([^)\n]{1,12}\))? {0,2}: {0,3}"
)
# "Aide opératoire : ", "Interne de garde : ".
_QUALIFIED_GAP = re.compile(r"(?: (?:de |d'|du )?[^\W\d_]{3,14}){1,2} {0,2}: {0,3}")
_BORN_GAP = re.compile(r"(?:\(e\))?[. :]{1,3}")
_CLOSING_GAP = re.compile(r"[ ,.!]{0,3}\n\s{0,8}")
_LOGIN = re.compile(r"[a-z]{3,20}[._\-]?[a-z]{0,20}\d{1,4}(?!\w)")
_SIGNED_MAX = 4  # words of a signature's line


def find(view: View) -> set[str]:
    """Claim the names that are announced; returns their words, in plain form."""
    told: set[str] = set()
    before = len(view.identifiers)
    for index in view.marked:
        if view.flags[index] & _CUES and view.free(index) and index + 1 < len(view.words):
            _behind_cue(view, index, told)
    for index in view.capitalised:
        if view.words[index] in SHORT_TITLES and view.free(index) and index + 1 < len(view.words):
            _behind_title(view, index, told)
    view.announced.update(one.start for one in view.identifiers[before:])
    return told


def _behind_cue(view: View, index: int, told: set[str]) -> None:
    flag = view.flags[index]
    if flag & Word.TITLE:
        _behind_title(view, index, told)
    elif flag & Word.CALL:
        _behind_call(view, index, told)
    elif flag & Word.BORN:
        _behind_born(view, index, told)
    elif flag & Word.CLOSING:
        _behind_closing(view, index, told)
    elif flag & Word.AUTHOR and (name := _behind_preposition(view, index)) is not None:
        _claim_author(view, name, told, wrote=view.words[index] in _WROTE)
    elif flag & (Word.ROLE | Word.KIN):
        _behind_role(view, index, told)


# --- titles ---


def _behind_title(view: View, index: int, told: set[str]) -> None:
    word = view.words[index]
    if not _TITLE_GAP.fullmatch(view.gap(index)):
        return
    elided = view.plain[view.starts[index] - 1 : view.starts[index]] in ("'", "-")
    if elided and word not in ("dr", "docteur"):
        return
    first = _behind_further_titles(view, index)
    if first is None or _is_no_title(view, index, first):
        return
    claim_from(view, first, "patient_name" if word in _PATIENT_TITLES else "person_name", told, sure=True)


def _behind_further_titles(view: View, index: int) -> int | None:
    """First word of the name behind a row of titles: "Mr le Docteur ...", "Pr Dr ..."; None for a hospital."""
    words, flags, last = view.words, view.flags, len(view.words) - 1
    first = index + 1
    while (
        first < min(last + 1, index + TITLES_MAX)
        and flags[first] & Word.TITLE
        and _BETWEEN_TITLES_GAP.fullmatch(view.gap(first))
    ):
        first += 1
    while (
        first < last
        and words[first] in _BETWEEN_TITLES
        and view.shapes[first] != TITLE_CASE
        and flags[first + 1] & (Word.TITLE | Word.ROLE)
    ):
        first += 1
    if first > last:
        return None
    if _is_function(view, first) or _is_function(view, first - 1):
        return None
    abbreviated = len(words[first]) < 3 and view.gap(first) in (". ", ".")  # "Dr Ch. MORVAN" is no "CH"
    return None if flags[first] & Word.HOSPITAL and not abbreviated else first


def _is_function(view: View, article: int) -> bool:
    """ "Monsieur le Directeur", "Madame la Secrétaire": a small article and a word that is nobody's name."""
    if view.words[article] not in ("le", "la", "l") or view.shapes[article] != LOWER or article + 1 >= len(view.words):
        return False
    return view.flags[article + 1] & (Word.COMMON | Word.TITLE | NAME) == Word.COMMON


def _is_no_title(view: View, index: int, first: int) -> bool:
    """Whether the letters of a title are something else here: "MR CHEST", "me", "M 45 ans"."""
    word, shape = view.words[index], view.shapes[index]
    if shape == LOWER and len(word) < 3 and word not in ("dr", "pr", "mr"):
        return True
    doubtful = word in _DOUBTFUL_TITLES or (
        shape == UPPER and word in _DOUBTFUL_CAPITALS and not view.in_capitals(index)
    )
    if not doubtful:
        return False
    abbreviated = word in SHORT_TITLES and view.gap(index).startswith(".")
    if abbreviated and view.shapes[first] != LOWER and not view.flags[first] & Word.STOP:
        return False
    return bool(view.flags[first] & Word.COMMON) or view.shapes[first] == LOWER


# --- other cues ---


def _behind_call(view: View, index: int, told: set[str]) -> None:
    """ "Rappeler Kervadec": a name follows at once."""
    following = index + 1
    known = view.flags[following] & (Word.COMMON | Word.TITLE)
    capital = view.shapes[following] in (TITLE_CASE, UPPER)
    if view.gap(index) == " " and capital and not known and not view.in_capitals(index):
        claim_from(view, following, "person_name", told, sure=False)


def _behind_born(view: View, index: int, told: set[str]) -> None:
    """ "née Kervadec", "ép. TROADEC": another surname of the person before."""
    following = index + 1
    dotted = view.gap(index).startswith(".")
    if not _BORN_GAP.fullmatch(view.gap(index)) or (view.words[index] in ("ep", "vve") and not dotted):
        return
    if _is_unknown_name(view, following, or_eponym=view.words[index] == "nee"):
        claim_from(view, following, "patient_name", told, sure=False)
        before = index - 1
        if index and view.gap(before) in (" ", ", ") and view.free(before) and _is_unknown_name(view, before):
            claim_around(view, before, told)


def _behind_closing(view: View, index: int, told: set[str]) -> None:
    """The signature below "Cordialement,"."""
    following = index + 1
    if not _CLOSING_GAP.fullmatch(view.gap(index)) or not _is_unknown_name(view, following):
        return
    line_end = view.text.find("\n", view.starts[following])
    stop = view.first_word_from(line_end if line_end >= 0 else len(view.text))
    if stop - following <= _SIGNED_MAX:
        claim_from(view, following, "person_name", told, sure=False)


def _claim_author(view: View, index: int, told: set[str], *, wrote: bool) -> None:
    """The name that begins at word `index`, or the login: "by J Smith", "by NP Smith", "par jsmith12".

    `wrote`: it is said who wrote or signed, so that a word in small letters is one, too.
    """
    login = _LOGIN.match(view.plain, view.starts[index])
    if login is not None:
        if not view.flags[index] & (Word.COMMON | Word.FINDING):
            view.claim(login.start(), login.end(), "id")
        return
    bare = index
    while view.words[bare] in LEADING_PARTICLES and bare + 1 < len(view.words) and view.gap(bare) in (" ", "'", "’"):
        bare += 1
    first_name = view.flags[bare] & Word.FIRST and view.shapes[bare] == TITLE_CASE
    small = wrote and view.shapes[bare] == LOWER and not view.flags[bare] & ~_MAY_SIGN and len(view.words[bare]) > 3
    if first_name or small or _is_unknown_name(view, bare):
        claim_from(view, index, "person_name", told, sure=small, listed=bool(small))


def _behind_preposition(view: View, index: int) -> int | None:
    """The first word of whom "Validé par ...", "Signed electronically by ...", "Vu avec ..." names."""
    preposition = index + 2 if view.words[index + 1].endswith(("ment", "ly")) else index + 1
    name = preposition + 1
    if name >= len(view.words):
        return None
    joined = _PERSON_BEHIND.get(view.words[preposition], frozenset())
    if joined is not None and view.words[index] not in joined:
        return None
    if view.gap(index) != " " or view.gap(preposition) not in (" ", " : ", ": "):
        return None
    degree = view.words[name] in DEGREES and view.shapes[name] == UPPER and view.gap(name) == " "
    return name + 1 if degree and name + 1 < len(view.words) else name


def _is_unknown_name(view: View, index: int, *, or_eponym: bool = False) -> bool:
    """A word with a capital that is no common one, no eponym and no acronym."""
    flag, shape = view.flags[index], view.shapes[index]
    if flag & Word.COMMON or shape not in (TITLE_CASE, UPPER) or (flag & Word.EPONYM and not or_eponym):
        return False
    return shape == TITLE_CASE or len(view.words[index]) >= 4 or bool(flag & NAME)


# --- roles, relatives, fields ---


def _behind_role(view: View, index: int, told: set[str]) -> None:
    """The name follows at once, or after a colon."""
    word = view.words[index]
    kind: Kind = "patient_name" if word in _PATIENT_ROLES else "person_name"
    if _behind_field(view, index, kind, told):
        return
    gap, first = view.gap(index), index + 1
    if not _ROLE_GAP.match(gap) or view.flags[first] & (Word.TITLE | Word.ROLE):
        return
    if ":" in gap:
        claim_from(view, first, kind, told, sure=word in _FIELDS, listed=True)
    elif "\n" not in gap and _follows_role(view, index, first):
        claim_from(view, first, kind, told, sure=False)


def _behind_field(view: View, index: int, kind: Kind, told: set[str]) -> bool:
    """ "Nom de jeune fille : Kervadec", "Aide opératoire : Lescop"; whether words stand between role and colon."""
    field = view.words[index] in _FIELDS
    if kind == "patient_name" and not field:
        return False
    match = (_FIELD_GAP if field else _QUALIFIED_GAP).match(view.plain, view.ends[index])
    if match is None:
        return False
    first = view.first_word_from(match.end())
    if first >= len(view.words) or view.starts[first] != match.end() or view.flags[first] & (Word.TITLE | Word.ROLE):
        return False
    if field or view.flags[first] & Word.FIRST or _is_unknown_name(view, first):
        claim_from(view, first, kind, told, sure=field, listed=True)
    return True


def _follows_role(view: View, index: int, first: int) -> bool:
    """Whether the word right behind a role or relative is a name: "son fils Yann", "interne Anne Petit"."""
    flag, shape = view.flags[first], view.shapes[first]
    first_name = bool(flag & Word.FIRST)
    if view.flags[index] & Word.KIN and shape == LOWER:
        return False
    if flag & Word.COMMON and not (first_name and shape == TITLE_CASE):
        return False
    if view.in_capitals(index) and not flag & NAME:
        return False
    if shape == UPPER and len(view.words[first]) < 4 and not flag & NAME:
        return False
    if first_name:
        return True
    if flag & Word.EPONYM:
        return False
    if view.flags[index] & Word.KIN or view.words[index] in _ONE_PERSON:
        place = flag & (Word.CITY_START | Word.LAST) == Word.CITY_START or flag & Word.DEMONYM
        heading = view.gap(first).lstrip(" ")[:1] == ":"
        return _is_unknown_name(view, first) and not place and not heading
    return _has_second_word(view, first)


def _has_second_word(view: View, first: int) -> bool:
    """Whether a word that may be a name stands behind word `first`: "interne Zoran Bilic"."""
    second = first + 1
    return (
        second < len(view.words)
        and view.gap(first) in (" ", "-", ". ", ".")
        and view.shapes[second] != LOWER
        and not view.flags[second] & Word.COMMON
    )
