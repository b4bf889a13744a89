"""Postal codes and towns: a code before its town, a town by what stands before it, then by the list of places."""

from __future__ import annotations

import re
from collections.abc import Iterator

from shards.reports.identity.addresses import claim_line_above, claim_lines_before_code, touches_address
from shards.reports.identity.eponyms import eponym
from shards.reports.identity.gazetteers import Word, gazetteer, table
from shards.reports.identity.view import INITIAL, LOWER, TITLE_CASE, UPPER, View

_US_PLACE = re.compile(r"(?<!\w)((?:[A-Z][\w.'\-]+ ){0,3}[A-Z][\w.'\-]+),? ([A-Z]{2}) (\d{5}(?:-\d{4})?)(?!\d)")
_UK_CODE = re.compile(
    r"[A-Z](?<!\w[A-Z])(?:[A-Z]?\d[A-Z\d]? \d[A-Z]{2}|(?<=[ABCEGHJ-NPRSTVXY])\d[A-Z] ?\d[A-Z]\d)(?!\w)"
)
_STAGE = re.compile(r"[TLCS]\d[A-Z]\d[A-Z]\d")  # tumour stages look like Canadian codes
_CODE = re.compile(
    r"(?<![\d.,/\-\w])(?:(?:f|b|ch|l|d)-? ?)?(\d{4,6}(?:-\d{3,4})?|\d\d \d{3})(?![\d\w]|[.,]\d"
    r"| ?(?:mg|ml|ui|g/|/mm|elements|mm|leuco|cases|cas ))"
)
_FIVE = re.compile(r"\d{5}|\d\d \d{3}")
_BETWEEN = re.compile(r"[ ,\-–]{0,3}\n?[ ]?")
_ALONE_AFTER = re.compile(r" ?(?:[.;)\]–|\n]|$|- |, ?[a-z])")
# Behind a street: "Girona, 46895".
_TOWN_BEFORE_CODE = re.compile(r"(?<=\n)([A-ZÀ-Ý][^\W\d_]+(?:[ \-][A-ZÀ-Ý][^\W\d_]+){0,3}), ?(\d{5})(?!\d)")
_HEAD_OF_LETTER = re.compile(
    r"(?:(?<=\n)|^) {0,3}(?:a |fait a )?(?P<town>[^\W\d_]{2,}(?:[ '\-]{1,2}[^\W\d_]+){0,4}?)"
    r"(?:, (?P<le>le )?|,? (?:le )?)(?=\0)",
    re.MULTILINE,
)
_AMOUNT_BEFORE = re.compile(r"(?:[=<>~≈±:/x*+]|n°|\ba|\bde|\bet|\bou|\bgb|\bgr|\bof|\bto|\bwas|\d) ?$")
_CODE_BEHIND = re.compile(r"(?<=\0)(?: ?[,(] ?| )(\d{4,5}|\d\d(?=\)))(?![\d\w]|[.,]\d)")
_CODE_CUE = re.compile(
    r"(?<!\w)(?:cp|c\.p\.|code postal|codes postaux|zip(?: code)?|postal code|postcode"
    r"|cedex)[ :.]{0,3}(\d{2,6}(?: \d{3})?)(?!\w|[.,/]\d|/)"
)
_CITY_CUES = table("city_cues")
_SCALE_TOWNS = table("scale_towns")
_SCALE_BEHIND = re.compile(
    r" (?:[<>=] ?)?\d{1,2}(?![\d/]|[ .]\d)| ?\(?[+\-]+(?=[\s,.;)])| (?:i{1,3}|iv|[a-f]\d?)(?!\w)"
    r"| (?:modifie|revise|simplifie|positif|negatif|rule)"
)
_CITY_VERB_ENDS = frozenset(["de", "a", "au", "dans", "d", "du", "en", "in", "of", "to", "from"])
_CITY_VERBS = re.compile(
    r"(?:ville de|commune de|residant (?:a|au)|reside a|habit\w{1,3} (?:a|au)|demeurant a|domicilie\w? a"
    r"|nee? (?:a|au|dans)|natif d[eu]|native d[eu]|"
    r"originaire d[eu]|maire de|retour\w* (?:chez (?:lui|elle) )?a|region de|periph\w+ de|banlieue de|lives? in"
    r"|living in|resident of|resides in|"
    r"nee? (?:le|en) [^\n.]{4,45} (?:a|au|dans)|born in|native of|city of|town of|moved (?:to|from)|chu de"
    r"|chu d'|ch de|chr de|hopital de|hopitaux de|site de|clinique de|centre anti-poison de|imprime en|fait a"
    r"|(?:viv(?:ant|ait)|vit|suivi\w{0,2}|opere\w{0,2}|hospitalise\w{0,2}|transfere\w{0,2}|adresse\w{0,2}|vue?s?|parti\w{0,2}"
    r"|consult\w{1,4}|travaill?\w{0,4}|retourn\w{1,4}|examen|scanner|irm) a) ?$"
)
_MAX_WORDS = 6
_CITY_WORDS_MAX = 7  # of a listed place


def find_codes(view: View) -> None:
    """Claim postal codes with the towns beside them and the street lines before them."""
    if view.longest_number >= 5:
        for match in _US_PLACE.finditer(view.text):
            if view.masked[match.start(3)] != "\0":
                view.claim(match.start(3), match.end(3), "zip")
                view.claim(match.start(1), match.end(2), "city")
                claim_lines_before_code(view, match.start(1))
        for match in _TOWN_BEFORE_CODE.finditer(view.text):
            if touches_address(view, match.start(1)) and "\0" not in view.masked[match.start() : match.end()]:
                view.claim(match.start(1), match.end(1), "city")
                view.claim(match.start(2), match.end(2), "zip")
    if view.numbers:
        for match in _uk_codes(view):
            if view.masked[match.start()] != "\0" and not _STAGE.fullmatch(match.group()):
                view.claim(match.start(), match.end(), "zip")
                claim_lines_before_code(view, _city_before(view, match.start()))
    if view.longest_number >= 3:
        for match in view.at_numbers(_CODE, 4):
            _code(view, match)


def _uk_codes(view: View) -> Iterator[re.Match[str]]:
    """British and Canadian codes: one or two letters before a number, in the capitals of the text."""
    for number in tuple(view.numbers):
        for place in range(max(0, number - 2), number + 1):
            match = _UK_CODE.match(view.text, place)
            if match is not None:
                yield match


def _code(view: View, match: re.Match[str]) -> None:
    """Claim a code and the town behind it, or a code that stands alone where only codes do."""
    start, end = match.span()
    written = match[1]
    following = view.first_word_from(end)
    between = view.text[end : view.starts[following]] if following < len(view.words) else "\n\n\n"
    beside_address = touches_address(view, start)
    if following < len(view.words) and _BETWEEN.fullmatch(between) and view.shapes[following] in (UPPER, TITLE_CASE):
        beside_address = beside_address or view.masked[max(0, start - 3) : start] in ("\0, ", "\0 ", "\0 , ")
        listed = city_match(view, following) is not None
        usual = len(written) == 5 and written.isdigit() and not _no_town(view, following)
        if beside_address or listed or usual:
            _code_and_town(view, match, following, beside_address, listed)
            return
    if between == " " and len(written) == 5 and not view.flags[following] & Word.COMMON:
        last = city_match(view, following, any_case=True)
        if last is not None:
            view.claim(start, end, "zip")
            view.claim(view.starts[following], view.ends[last], "city")
            claim_line_above(view, start)
            return
    alone = (
        len(written) == 5
        and not _AMOUNT_BEFORE.search(view.masked, max(0, start - 12), start)
        and _ALONE_AFTER.match(view.masked, end, end + 4) is not None
    )
    if beside_address or alone or (len(written) == 5 and _beside_identifier(view, start, end)):
        view.claim(start, end, "zip")
        if alone:
            _unknown_town_before(view, start)


def _unknown_town_before(view: View, start: int) -> None:
    """Claim the word before a code that stands alone: "Ivrysurbois 75013"."""
    index = view.first_word_from(start) - 1
    if index < 0 or not view.free(index) or view.flags[index] & Word.COMMON:
        return
    if view.shapes[index] in (TITLE_CASE, UPPER) and view.text[view.ends[index] : start] in (" ", ", ", " ("):
        view.claim(view.starts[index], view.ends[index], "city")


def _no_town(view: View, index: int) -> bool:
    """Whether a word is one of the language only, or ends names."""
    flag = view.flags[index]
    return bool(flag & Word.STOP or (flag & Word.COMMON and not flag & (Word.CITY_START | Word.PARTICLE)))


def _code_and_town(view: View, match: re.Match[str], following: int, beside_address: bool, listed: bool) -> None:
    start, end = match.span()
    written = match[1]
    if not beside_address and not (_FIVE.fullmatch(written) or (len(written) == 4 and listed)):
        return
    view.claim(start, end, "zip")
    last = _city_sequence(view, following)
    if last is not None:
        view.claim(view.starts[following], _cedex(view, view.ends[last]), "city")
        if not beside_address:
            claim_line_above(view, start)


def _cedex(view: View, end: int) -> int:
    """End of a city with its "CEDEX 14" or its district "11"."""
    match = re.match(
        r" \([a-z]{2}\)|[ \-](?:cedex(?: \d{1,2}(?!\d))?|\d{1,2}(?:e|er|eme)?(?![\d\w:/.]|,\d|\s\d))",
        view.masked[end : end + 12],
    )
    return end + match.end() if match else end


def _beside_identifier(view: View, start: int, end: int) -> bool:
    """Whether a code stands beside something already claimed, with a dash or a comma between."""
    return bool(
        re.search(r"\0 ?[,–\-|] ?$", view.masked[max(0, start - 4) : start])
        or re.match(r" ?[,–\-|] ?\(?\0", view.masked[end : end + 5])
    )


def _city_before(view: View, start: int) -> int:
    """Claim the capitalised words before a postcode; returns where they begin."""
    index = view.first_word_from(start) - 1
    if index < 0 or not view.free(index) or view.shapes[index] not in (TITLE_CASE, UPPER):
        return start
    if not re.fullmatch(r"[,\s]{1,2}", view.text[view.ends[index] : start]):
        return start
    first = index
    while (
        first > 0
        and view.free(first - 1)
        and view.shapes[first - 1] != LOWER
        and view.gap(first - 1) in (" ", "-", ", ")
    ):
        first -= 1
    view.claim(view.starts[first], view.ends[index], "city")
    return view.starts[first]


def _city_sequence(view: View, index: int) -> int | None:
    """Last word of the city that begins at `index`: capitalised words with particles between, also over a line."""
    last, position = None, index
    while position < len(view.words) and position - index < _MAX_WORDS and view.free(position):
        flag, shape, word = view.flags[position], view.shapes[position], view.words[position]
        if position > index:
            gap = view.gap(position - 1)
            over_line = gap in ("\n", "\n-", "-\n") and (
                view.words[position - 1] in ("la", "le", "les", "l")
                or word in ("sur", "en", "les", "sous", "la", "le", "saint", "aux", "s")
                or "-" in gap
            )
            if not (gap in (" ", "-", "'", "’", " - ", ". ", "/", "/ ") or over_line):
                break
        if shape == LOWER or word == "s":
            if word not in (
                "sur",
                "s",
                "en",
                "les",
                "pres",
                "an",
                "am",
                "der",
                "bei",
                "de",
                "des",
                "du",
                "la",
                "le",
                "l",
                "d",
                "sous",
                "aux",
                "au",
                "et",
                "lez",
                "a",
                "devant",
            ):
                break
            position += 1
            continue
        if (
            last is not None
            and flag & Word.COMMON
            and not flag & (Word.CITY_START | Word.PARTICLE | Word.FIRST | Word.LAST)
            and view.gap(position - 1) == " "
        ):
            break
        if flag & Word.STOP and not flag & Word.PARTICLE and position > index and view.gap(position - 1) != "-":
            break
        if word == "cedex":
            break
        last, position = position, position + 1
    return last


def city_match(view: View, index: int, any_case: bool = False) -> int | None:
    """Last word of the longest listed place that begins at word `index`, or None."""
    if not view.flags[index] & Word.CITY_START:
        return None
    rests = gazetteer().cities[view.words[index]]
    for more in range(min(_CITY_WORDS_MAX, len(view.words) - index) - 1, -1, -1):
        if tuple(view.words[index + 1 : index + 1 + more]) in rests and all(
            view.gap(place) in (" ", "-", "'", "’") for place in range(index, index + more)
        ):
            last = index + more
            if view.shapes[last] == LOWER and not any_case:
                continue
            # "Tarbes s/ Saone", "Neuilly sur Marne": what a town lies on
            after = re.match(
                r"(?: |-)(?:sur|s/|en|les|lez|sous)[ \-]\s?(?=[^\W\d_])",
                view.plain[view.ends[last] : view.ends[last] + 8],
            )
            if after:
                named = view.first_word_from(view.ends[last] + after.end())
                if named < len(view.words) and view.shapes[named] != LOWER and not view.flags[named] & Word.STOP:
                    return named
            return last
    return None


def _claim_cities(view: View) -> None:
    if "date" in {one.kind for one in view.identifiers}:
        _heads_of_letters(view)
    for index in view.marked if view.seen & Word.DEMONYM else ():
        if view.flags[index] & Word.DEMONYM and view.shapes[index] == LOWER:
            view.claim(view.starts[index], view.ends[index], "city", "gazetteer")
    for index in view.small_names:
        if not view.flags[index] & Word.CITY_START or not index or not view.free(index):
            continue
        if (
            view.words[index - 1] in _CITY_VERB_ENDS
            and len(view.words[index]) > 1
            and not _plural_of_common(view, index)
        ):
            before = view.plain[max(0, view.starts[index] - 60) : view.starts[index]]
            last = city_match(view, index, any_case=True)
            if last is not None and _CITY_VERBS.search(before):
                view.claim(view.starts[index], view.ends[last], "city", "gazetteer")
    with_cedex = "cedex" in view.plain
    for index in view.capitalised:
        told = view.flags[index] & Word.CITY_START or view.words[index - 1] in _CITY_VERB_ENDS or with_cedex
        if told and view.shapes[index] != INITIAL and view.free(index):
            last = _named_city(view, index)
            if last is not None:
                view.claim(view.starts[index], _cedex(view, view.ends[last]), "city", "gazetteer")


def _heads_of_letters(view: View) -> None:
    """Claim "Lyon" of "Lyon, le 6 juin" at the beginning of a line, in whatever capitals."""
    for match in _HEAD_OF_LETTER.finditer(view.masked):
        start, end = match.span("town")
        first, stop = view.first_word_from(start), view.first_word_from(end)
        if not view.text[start].isupper() or not all(view.free(index) for index in range(first, stop)):
            continue
        named = match["le"] is not None and not any(_is_no_part_of_town(view, index) for index in range(first, stop))
        if named or city_match(view, first) == stop - 1:
            view.claim(start, end, "city", "gazetteer")


def _is_no_part_of_town(view: View, index: int) -> bool:
    flag = view.flags[index]
    return bool(flag & (Word.COMMON | Word.STOP)) and not flag & (Word.PARTICLE | Word.CITY_START)


def _plural_of_common(view: View, index: int) -> bool:
    """Whether the word is the plural of a word of the language: "Salles", "bords"."""
    word = view.words[index]
    return word.endswith("s") and bool(gazetteer().flags.get(word[:-1], 0) & Word.COMMON)


def _named_city(view: View, index: int) -> int | None:
    flag = view.flags[index]
    told = None
    if index and view.words[index - 1] in _CITY_VERB_ENDS:
        told = _CITY_VERBS.search(view.plain[max(0, view.starts[index] - 60) : view.starts[index]])
    if told and flag & Word.EPONYM and told.group().startswith("region"):  # of Scarpa
        return None
    if told and not flag & (Word.STOP | Word.HOSPITAL) and (not flag & Word.COMMON or flag & Word.CITY_START):
        listed = city_match(view, index)
        if listed is not None:
            return listed
        if view.shapes[index] == TITLE_CASE or not view.in_capitals(index):
            return _city_sequence(view, index)
        return index if not flag & Word.COMMON else None
    cedex = "cedex" in view.plain and re.match(
        r"(?:[ \-][\w']+){0,5}? cedex\b", view.plain[view.ends[index] : view.ends[index] + 40]
    )
    if cedex and view.shapes[index] != LOWER and not flag & Word.STOP:
        return max(index, view.first_word_from(view.ends[index] + cedex.end()) - 2)
    if not flag & Word.CITY_START or flag & (Word.EPONYM | Word.HOSPITAL):
        return None
    last = city_match(view, index)
    if last is not None and (eponym(view, index) or _names_a_scale(view, index, last)):
        view.hide(view.starts[index], view.ends[last])
        return None
    if last is None or (
        index
        and view.gap(index - 1) in ("-", "'")
        and view.shapes[index - 1] != LOWER
        and view.words[index - 1] not in ("d", "l")
    ):
        return None
    if last > index:
        if all(view.flags[i] & Word.COMMON for i in range(index, last + 1)) and not _city_cue(view, index):
            return None
        return last
    if view.ends[index] - view.starts[index] < 4 or flag & Word.STOP:
        return None
    if flag & (Word.COMMON | Word.FIRST | Word.LAST) or _plural_of_common(view, index):
        if flag & Word.COMMON and view.in_capitals(index):
            return None
        return last if _city_cue(view, index) else None
    return last if view.shapes[index] == TITLE_CASE or not view.in_capitals(index) or _city_cue(view, index) else None


def _names_a_scale(view: View, index: int, last: int) -> bool:
    """Whether a town stands for what was agreed on there: "selon Prague", "Oxford 1", "Ottawa -", "Genève révisé"."""
    according = index > 0 and view.words[index - 1] == "selon" and view.gap(index - 1) == " "
    return according or (
        view.words[index] in _SCALE_TOWNS and _SCALE_BEHIND.match(view.masked, view.ends[last]) is not None
    )


def _city_cue(view: View, index: int) -> bool:
    """A preposition or a bracket before, or a comma and a country, a state or a code after."""
    if eponym(view, index):
        return False
    if touches_address(view, view.starts[index]):
        return True
    if index and view.words[index - 1] in _CITY_CUES and view.gap(index - 1) in (" ", "'", "’"):
        head = view.flags[index - 2] if index > 1 else 0
        return not head & Word.EPONYM_HEAD
    return bool(
        re.match(
            r",? ?\(?(?:\d{5}|france|belgique|suisse|canada|quebec|maroc|algerie|tunisie|usa|uk)\b",
            view.plain[view.ends[index] : view.ends[index] + 14],
        )
    )


def find_cities(view: View) -> None:
    """Claim the cities left, and the codes behind them."""
    _claim_cities(view)
    if view.longest_number < 2:
        return
    for match in view.at_numbers(_CODE_CUE, 20):
        view.claim(match.start(1), match.end(1), "zip")
    for town in sorted({one.end for one in view.identifiers if one.kind == "city"}):
        behind = _CODE_BEHIND.match(view.masked, town)
        if behind is not None:
            view.claim(behind.start(1), behind.end(1), "zip")
