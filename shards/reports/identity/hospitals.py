"""Hospitals, clinics and homes by the kind of house and its name, then by the list of known ones."""

from __future__ import annotations

import re

from shards.reports.identity.cities import city_match
from shards.reports.identity.gazetteers import Word, read_list, table
from shards.reports.identity.view import INITIAL, LOWER, TITLE_CASE, UPPER, View

_GENERIC = table("generic")
_ENGLISH_TAILS = frozenset(["hospital", "hospitals", "infirmary", "clinic", "clinics"])
_CENTER_WORDS = frozenset(["center", "centre", "institute", "sanatorium"])
_CENTER_KINDS = frozenset(
    ["medical", "health", "imaging", "cancer", "trauma", "healthcare", "radiology", "veterans", "surgery", "heart"]
)
_NOT_BEFORE_HOSPITAL = table("not_before_hospital")
KNOWN_HOSPITALS = frozenset(read_list("hospitals.txt"))
_BEFORE_HOSPITAL = frozenset(["a", "au", "l", "la", "at", "from", "vers", "sur", "in", "de", "d"])
_ACRONYMS = table("hospital_acronyms")
_VAGUE_HOUSES = frozenset(["centre", "institut", "institute", "groupe", "groupement"])  # unless hospitalier, médical
# "centre de dialyse Diaverum", "cabinet d'imagerie du Parc", "maison de retraite Les Lilas"
_HOUSE_WORDS = frozenset(["centre", "center", "cabinet", "laboratoire", "maison", "institut", "groupe"])
_HOUSE = re.compile(
    r"(?<!\w)(?i:centre|cabinet|laboratoire|maison|institut|groupe) (?:de |d['’]|de l['’]|d[’']analyses de )?"
    r"(?i:dialyse|imagerie|radiologie|r[ée][ée]ducation|r[ée]adaptation|soins|sant[ée]|convalescence|retraite|biologie"
    r"|repos|g[ée]rontologie|canc[ée]rologie|oncologie|m[ée]dical|radioth[ée]rapie)(?i: m[ée]dicale?| fonctionnelle)?"
    r" (?:(?:d[eu]|des|la|les?) |(?:de )?l['’])?(?P<name>[A-ZÀ-Ý][a-zà-ÿ]+"
    r"(?:[ \-](?:(?:d[eu]|des|la|les?) )?[A-ZÀ-Ý][\w'’]+){0,3})"
)
_TOWN_BEHIND = re.compile(r" ?\(([A-ZÀ-Ý][a-zà-ÿ]+(?:[ \-'’][\w]+){0,4})\)")
_ALONE_BEFORE, _ALONE_AFTER = re.compile(r"(?:^|\n|, )$"), re.compile(r" ?(?:[\n,.;)]|$)")
_SPECIALITY = re.compile(r"(?:logie|logique|logy|trie|rurgie|aires?|iques?|ions?|cine|gie|thesie|scopie)$")
_MAX_WORDS = 6


def find(view: View) -> None:
    """Claim every hospital that has a name."""
    for index in view.marked if view.seen & Word.HOSPITAL else ():
        if not view.flags[index] & Word.HOSPITAL or not view.free(index):
            continue
        word = view.words[index]
        if (
            word in ("ch", "chi", "hug", "ghi", "gh", "esat", "ime", "iem", "mas", "had", "msp", "hus", "gcs")
            and view.shapes[index] == LOWER
        ):
            continue
        if (word in _ENGLISH_TAILS or word in _CENTER_WORDS) and _english_hospital(view, index):
            continue
        _french_hospital(view, index)
    if not _HOUSE_WORDS.isdisjoint(view.words):
        for match in _HOUSE.finditer(view.text):
            if not view.flags[view.first_word_from(match.start("name"))] & Word.COMMON or " " in match["name"]:
                view.claim(match.start(), match.end(), "hospital", "gazetteer")
    _known_hospitals(view)
    for one in list(view.identifiers):
        town = _TOWN_BEHIND.match(view.text, one.end) if one.kind == "hospital" else None
        if town and not view.flags[view.first_word_from(town.start(1))] & Word.COMMON:
            view.claim(town.start(1), town.end(1), "city", "gazetteer")


def _known_after(view: View, index: int) -> tuple[int, int] | None:
    """First and last word of a listed hospital that follows word `index`, in whatever capitals."""
    first = index + 1
    while first < len(view.words) and view.words[first] in _GENERIC and first - index < 4 and _space(view, first - 1):
        if view.words[first] in ("la", "saint"):
            break
        first += 1
    for length in (3, 2, 1):
        last = first + length - 1
        if (
            last < len(view.words)
            and _space(view, first - 1)
            and " ".join(view.words[first : last + 1]) in KNOWN_HOSPITALS
            and all(_space(view, place) for place in range(first, last))
        ):
            return first, last
    return None


def _french_hospital(view: View, index: int) -> None:
    known = _known_after(view, index)
    if known is not None:
        begin = index if view.shapes[index] != LOWER else known[0]
        view.claim(view.starts[begin], view.ends[known[1]], "hospital", "gazetteer")
        return
    position = index + 1
    named_so = view.words[index] == "institut" and view.shapes[index] != LOWER  # "Institut Curie"
    seen_kind = view.words[index] not in _VAGUE_HOUSES or named_so
    while (
        position < len(view.words)
        and view.words[position] in _GENERIC
        and position - index < 6
        and _space(view, position - 1)
    ):
        if view.words[position] == "saint" and view.shapes[position] != LOWER:
            break
        seen_kind = seen_kind or view.words[position] in ("hospitalier", "hospitaliere", "medical", "universitaire")
        if (
            view.words[position] in ("la", "le", "les")
            and position + 1 < len(view.words)
            and view.shapes[position + 1] != LOWER
        ):
            break
        position += 1
    if not seen_kind or position >= len(view.words) or not _space(view, position - 1):
        return
    first = position
    if position == index + 2 and view.words[index + 1] in ("du", "des") and city_match(view, position) is None:
        first = index + 1  # "clinique du Parc"
    elif view.words[first] in ("la", "le", "les", "l"):
        position += 1
    last = None
    capitals = view.in_capitals(index)
    while position < len(view.words) and position - first < _MAX_WORDS and view.free(position):
        flag, shape, word = view.flags[position], view.shapes[position], view.words[position]
        gap = view.gap(position - 1)
        abbreviated = gap == ". " and len(view.words[position - 1]) <= 2  # "St. Luc", but "Percy. Il"
        if position > first and gap not in (" ", "-", "'", "’", " - ") and not abbreviated:
            break
        if shape == LOWER:
            if word in ("de", "du", "d", "la", "le", "les", "l", "des", "en", "et") and last is not None:
                position += 1
                continue
            if word in ("st", "saint", "sainte") or (last is not None and view.gap(position - 1) == "-"):
                last, position = position, position + 1
                continue
            break
        if (
            flag & Word.STOP
            and (position == first or view.gap(position - 1) == " ")
            and word not in ("hopital", "notre")
        ):
            break
        if flag & (Word.ROLE | Word.TITLE) and not flag & (Word.FIRST | Word.LAST):
            break
        if capitals and flag & Word.COMMON and not flag & (Word.FIRST | Word.LAST | Word.CITY_START):
            break
        last, position = position, position + 1
    if last is None or (last == first and _speciality(view, first)):
        return
    place = city_match(view, first) == last and view.words[first - 1] in ("de", "d", "du", "a")
    begin = view.starts[first] if place or view.shapes[index] == LOWER else view.starts[index]
    view.claim(begin, view.ends[last], "city" if place else "hospital", "gazetteer")


def _alone(view: View, index: int) -> bool:
    """Whether a known name that is nothing else fills its line or the end of a list."""
    if view.flags[index] & (Word.COMMON | Word.EPONYM | Word.FIRST | Word.STOP) or view.in_capitals(index):
        return False
    start, end = view.starts[index], view.ends[index]
    return bool(_ALONE_BEFORE.search(view.plain, max(0, start - 3), start) and _ALONE_AFTER.match(view.plain, end))


def _speciality(view: View, index: int) -> bool:
    """Whether a word tells what a house does, not its name: "Clinique Multidisciplinaire"."""
    word = view.words[index]
    known = bool(view.flags[index] & Word.COMMON) or len(word) > 11
    return known and _SPECIALITY.search(word) is not None


def _space(view: View, index: int) -> bool:
    gap = view.gap(index)
    return gap in (" ", "'", "’", " \n", "  ", "-") or (
        gap == ". " and view.words[index] in ("hop", "clin", "hosp", "lab")
    )


def _english_hospital(view: View, index: int) -> bool:
    """Capitalised words before Hospital, Clinic, Medical Center; and "of X" after it."""
    if view.shapes[index] == LOWER:
        return False
    first = index - 1
    if view.words[index] in _CENTER_WORDS and (first < 0 or view.words[first] not in _CENTER_KINDS):
        return False
    named = 0
    while (
        first >= 0 and index - first < 7 and view.gap(first) in (" ", "'", "’", ". ", "-", " & ") and view.free(first)
    ):
        word = view.words[first]
        if view.shapes[first] == LOWER and not (word in ("s", "of", "and") and named):
            break
        if view.shapes[first] != LOWER and word not in _NOT_BEFORE_HOSPITAL and word not in _CENTER_KINDS:
            named += 1
        if view.words[first] in ("the", "this", "at", "from", "in", "outside"):
            break
        first -= 1
    first += 1
    last = index
    of = re.match(
        r" (?:of|at) ((?:[A-Z][\w'\-]+)(?: [A-Z][\w'\-]+){0,3})", view.text[view.ends[index] : view.ends[index] + 60]
    )
    if of:
        end = view.ends[index] + of.end()
        view.claim(view.starts[first], end, "hospital", "gazetteer")
        return True
    if not named:
        return False
    if view.in_capitals(index) and all(view.flags[i] & Word.COMMON for i in range(first, index)):
        return False
    view.claim(view.starts[first], view.ends[last], "hospital", "gazetteer")
    return True


def _known_hospitals(view: View) -> None:
    """Hospitals people name without saying hospital: in brackets, or after "à", "at", "service de"."""
    for index in view.capitalised:
        shape = view.shapes[index]
        if shape == INITIAL or not view.free(index):
            continue
        word = view.words[index]
        if word in _ACRONYMS and shape == UPPER and not view.in_capitals(index):
            view.claim(view.starts[index], view.ends[index], "hospital", "gazetteer")
            continue
        if word in KNOWN_HOSPITALS and _alone(view, index):
            view.claim(view.starts[index], view.ends[index], "hospital", "gazetteer")
            continue
        previous = view.words[index - 1] if index else ""
        if previous not in _BEFORE_HOSPITAL and view.text[view.starts[index] - 1 : view.starts[index]] != "(":
            continue
        before = view.plain[max(0, view.starts[index] - 24) : view.starts[index]]
        at = re.search(r"(?:\( ?|(?<![\w'])(?:(?:a|au|de la|a la|at|from|vers|sur)\s|(?:a|de) l'))$", before)
        if word in ("st", "ste", "saint", "sainte") and re.search(r"(?:\( ?|(?<![\w'])(?:a|au|at|from|in)\s)$", before):
            match = re.match(
                r"\w+\.?[ \-](?:[A-Z][\w'’\-]+)(?:[ \-][A-Z][\w’\-]+)?",
                view.text[view.starts[index] : view.starts[index] + 50],
            )
            if match:
                view.claim(view.starts[index], view.starts[index] + match.end(), "hospital", "gazetteer")
                continue
        if at:
            for length in (3, 2, 1):
                if (
                    index + length <= len(view.words)
                    and " ".join(view.words[index : index + length]) in KNOWN_HOSPITALS
                    and all(view.gap(index + i) in (" ", "-", ". ") for i in range(length - 1))  # "Mt. Sinai"
                    and (length > 1 or view.flags[index] & Word.HOSPITAL or not view.flags[index] & Word.COMMON)
                ):
                    view.claim(view.starts[index], view.ends[index + length - 1], "hospital", "gazetteer")
                    break
        elif (
            re.search(
                r"\bservice(?: d['e]?)? ?[^\n.,]{0,24}(?:\bde |\bd')$",
                view.plain[max(0, view.starts[index] - 40) : view.starts[index]],
            )
            and shape == TITLE_CASE
            and not view.flags[index] & Word.COMMON
            and not _SPECIALITY.search(word)
            and not view.in_capitals(index)
        ):
            view.claim(view.starts[index], view.ends[index], "hospital", "gazetteer")
