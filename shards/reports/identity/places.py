"""Addresses, postal codes, cities and hospitals: by the words around them, then by the list of places."""

from __future__ import annotations

import re

from shards.reports.identity.eponyms import eponym
from shards.reports.identity.gazetteers import Word, gazetteer, read_list, table
from shards.reports.identity.view import INITIAL, LOWER, TITLE_CASE, UPPER, View

_NUMBER_BEFORE = re.compile(
    r"(?:n° ?|no\.? )?(?<![\d.,/])(\d{1,5}(?:[\-/]\d{1,5})?(?: ?(?:bis|ter|quater|[a-d])(?!\w))?) ?,? ?$"
)
_ADDRESS_TAIL = re.compile(
    r"[ ,\n]{0,2}(?:(?:appt?|appartement|apt|apartment|suite|ste|unit|bat|batiment|etage|bte|boite|box|escalier"
    r"|esc|flat|floor|room|piso|puerta)"
    r"\.? ?#?(?:no )?[a-z]?\d{0,5}[a-z]?(?!\w))+|[ ,]{1,2}#\d+"
)
_STREET_NUMBER_FIRST = table("street_number_first")
_STREET_NAME_AFTER = table("street_name_after")
_FLAT_WORDS = table("flat_words")
_NUMBER_BEHIND_ONLY = table("number_behind_only")
_WITHOUT_NUMBER = _NUMBER_BEHIND_ONLY | table("without_number")
_GERMANIC = re.compile(
    r"(?<!\w)(?:[A-ZÀ-Ý][^\W\d_]+[ \-]){0,3}(?:[A-ZÀ-Ý][^\W\d_]*|(?<=-))(?i:strasse|straße|str\.|straat|laan"
    r"|gasse|platz|weg|(?<=-)ring|allee|steenweg|plein|(?<=-)lei|dreef) ?\d{1,4} ?[a-z]?(?:[\-/]\d{1,4})?(?!\w)"
)
_GERMANIC_PARTS = (
    "stras",
    "straß",
    "str.",
    "laan",
    "gasse",
    "platz",
    "weg",
    "-ring",
    "allee",
    "plein",
    "-lei",
    "dreef",
    "steen",
)
_US_PLACE = re.compile(r"(?<!\w)((?:[A-Z][\w.'\-]+ ){0,3}[A-Z][\w.'\-]+),? ([A-Z]{2}) (\d{5}(?:-\d{4})?)(?!\d)")
_UK_CODE = re.compile(r"(?<!\w)(?:[A-Z]{1,2}\d[A-Z\d]? \d[A-Z]{2}|[ABCEGHJ-NPRSTVXY]\d[A-Z] ?\d[A-Z]\d)(?!\w)")
_STAGE = re.compile(r"[TLCS]\d[A-Z]\d[A-Z]\d")  # tumour stages look like Canadian codes
_STREET_LINES = re.compile(
    r"(?:^|[\n,:;|)(]) ?((?:(?:flat|studio|unit|apt"
    r"|apartment) \d+[a-z]?[,\n ]{1,2})?(?:\d{1,6}[a-z]? )?[^\W\d_][^\n\0:|]{2,40}?)[, ]*\n?[, ]*$"
)
_FIELD = re.compile(
    r"(?<!\w)(?:address|adresse|domicile|home address|residence)(?: du patient| patient)?[ ]?: ?(?=[^\W_])"
)
_FIELD_END = re.compile(r"\n|\0|[|;]|\b(?:tel|phone|fax|email|mail|mobile|dob|mrn)\b|[a-z)] {2,}|\. [A-Z]")
_MILITARY = re.compile(
    r"(?<!\w)(?:PSC|Unit|USNS|USS|USCGC|USNV) [\w ,]{1,30}\n?(?:FPO|DPO|APO) A[AEP] \d{5}(?!\d)|(?<!\w)P\.?O\.? Box \d+"
)
_CODE = re.compile(
    r"(?<![\d.,/\-\w])(?:(?:f|b|ch|l|d)-? ?)?(\d{4,6}(?:-\d{3,4})?|\d\d \d{3})(?![\d\w]|[.,]\d"
    r"| ?(?:mg|ml|ui|g/|/mm|elements|mm|leuco|cases|cas ))"
)
_AMOUNT_BEFORE = re.compile(r"(?:[=<>~≈±:/x*+]|\ba|\bde|\bet|\bou|\bgb|\bgr|\bof|\bto|\bwas|\d) ?$")
_CODE_BEHIND = re.compile(r"(?<=\0)(?: ?[,(] ?| )(\d{4,5}|\d\d(?=\)))(?![\d\w]|[.,]\d)")
_CODE_CUE = re.compile(
    r"(?<!\w)(?:cp|c\.p\.|code postal|codes postaux|zip(?: code)?|postal code|postcode|bp|b\.p\.|cs"
    r"|cedex)[ :.]{0,3}(\d{2,6}(?: \d{3})?)(?!\w|[.,/]\d|/)"
)
_CITY_CUES = table("city_cues")
_CITY_VERB_ENDS = frozenset(["de", "a", "au", "dans", "d", "du", "en", "in", "of", "to", "from"])
_CITY_VERBS = re.compile(
    r"(?:ville de|commune de|residant (?:a|au)|reside a|habit\w{1,3} (?:a|au)|demeurant a|domicilie\w? a"
    r"|nee? (?:a|au|dans)|natif d[eu]|native d[eu]|"
    r"originaire d[eu]|maire de|retour\w* (?:chez (?:lui|elle) )?a|region de|periph\w+ de|banlieue de|lives? in"
    r"|living in|resident of|resides in|"
    r"nee? (?:le|en) [^\n.]{4,45} (?:a|au|dans)|born in|native of|city of|town of|moved (?:to|from)|chu de"
    r"|chu d'|ch de|chr de|hopital de|hopitaux de|clinique de|centre anti-poison de|imprime en|fait a) ?$"
)
_GENERIC = table("generic")
_ENGLISH_TAILS = frozenset(["hospital", "hospitals", "infirmary", "clinic", "clinics"])
_CENTER_WORDS = frozenset(["center", "centre", "institute", "sanatorium"])
_CENTER_KINDS = frozenset(
    ["medical", "health", "imaging", "cancer", "trauma", "healthcare", "radiology", "veterans", "surgery", "heart"]
)
_NOT_BEFORE_HOSPITAL = table("not_before_hospital")
KNOWN_HOSPITALS = frozenset(read_list("hospitals.txt"))
_BEFORE_HOSPITAL = frozenset(["a", "au", "la", "at", "from", "vers", "sur", "in", "de", "d"])
_SPECIALITY = re.compile(r"(?:logie|logique|logy|trie|rurgie|aires?|iques?|ions?|cine|gie|thesie|scopie)$")
_MAX_WORDS = 6
_CITY_WORDS_MAX = 7  # of a listed place


def find_addresses(view: View) -> None:
    """Claim street addresses; before dates, which many streets are named after."""
    _addresses(view)


def find_addressed(view: View) -> None:
    """Claim codes with their cities, then hospitals."""
    _codes(view)
    _hospitals(view)


def find_cities(view: View) -> None:
    """Claim the cities left, and the codes behind them."""
    _cities(view)
    if view.longest_number < 2:
        return
    for match in _CODE_CUE.finditer(view.masked):
        view.claim(match.start(1), match.end(1), "zip")
    for match in _CODE_BEHIND.finditer(view.masked) if "\0" in view.masked else ():
        if any(one.kind == "city" and one.end == match.start() for one in view.identifiers):
            view.claim(match.start(1), match.end(1), "zip")


# --- addresses ---


def _addresses(view: View) -> None:
    for index in view.marked:
        if not view.flags[index] & Word.STREET or not view.free(index):
            continue
        word = view.words[index]
        if word in _STREET_NAME_AFTER and _french_address(view, index):
            continue
        if word in _STREET_NUMBER_FIRST:
            _english_address(view, index)
    if view.longest_number and any(word in view.plain for word in ("adress", "address", "domicile", "residence")):
        for match in _FIELD.finditer(view.masked):
            _field(view, match.end())
    if view.longest_number and any(part in view.plain for part in _GERMANIC_PARTS):
        for match in _GERMANIC.finditer(view.text):
            view.claim(match.start(), match.end(), "address")
    if view.longest_number and any(
        word in view.plain for word in (" box ", "unit ", "psc ", "uss ", "usns", "usnv", "uscgc")
    ):
        for match in _MILITARY.finditer(view.text):
            view.claim(match.start(), match.end(), "address")


def _field(view: View, start: int) -> None:
    """What stands behind "Address:", up to the end of its line, and the next line when it holds a code."""
    stop = _FIELD_END.search(view.masked, start)
    end = min(stop.start() if stop else len(view.text), start + 90)
    following = re.match(r" ?\n([^\n\0:]{2,50})", view.masked[end:])
    if following and re.search(r"\d{4,5}|[a-z]\d\w? \d[a-z]{2}", following[1]):
        end += following.end()
    written = view.masked[start:end].rstrip(" ,.\n")
    if any(character.isdigit() for character in written):
        view.claim(start, start + len(written), "address")


def _french_address(view: View, index: int) -> bool:
    """A street whose kind comes first: "12 bis, rue des Lilas", "sept allée des roses", "rue de la Paix"."""
    start = view.starts[index]
    before = view.masked[max(0, start - 20) : start]
    number = _NUMBER_BEFORE.search(before)
    if number:
        begin = start - len(before) + number.start(1)
    elif index and view.flags[index - 1] & Word.NUMBER and view.gap(index - 1) in (" ", ", "):
        begin = view.starts[index - 1]
    elif view.words[index] in _WITHOUT_NUMBER:
        begin = start
    else:
        return False
    numbered = begin != start
    last, position, capital, lower_words = None, index + 1, False, 0
    capitals = view.in_capitals(index)
    while position < len(view.words) and position - index < 9:
        gap = view.gap(position - 1)
        if not (
            gap in (" ", "-", "'", "’", "  ")
            or (gap == ". " and view.ends[position - 1] - view.starts[position - 1] < 4)
            or re.fullmatch(r" \d{1,2}(?:er)? ", gap)
        ) or not view.free(position):
            break
        if view.words[position] in _FLAT_WORDS and last is not None:
            break
        flag, shape = view.flags[position], view.shapes[position]
        if shape == LOWER:
            if flag & Word.MONTH and re.search(r"\d", gap):
                last, position, capital = position, position + 1, True
                continue
            if flag & Word.PARTICLE or view.words[position] in ("et", "aux", "au", "sur", "sous"):
                position += 1
                continue
            after_particle = view.flags[position - 1] & Word.PARTICLE
            if capital or not numbered or lower_words > 2 or (lower_words and not after_particle and gap != "-"):
                break
            lower_words += 1
        else:
            if (
                capitals
                and flag & Word.STOP
                and not flag & (Word.TITLE | Word.PARTICLE)
                and view.words[position] not in ("hopital",)
            ):
                break
            capital = True
        last, position = position, position + 1
    if last is None:
        return False
    if not numbered and not capital:
        return False
    end = view.ends[last]
    year = re.match(r" (?:19|20)\d\d(?!\d)", view.masked[end : end + 6])  # "rue du 8 mai 1945"
    if year and view.flags[last] & Word.MONTH:
        end += year.end()
    number_behind = (
        None
        if numbered
        else re.match(
            r",? \d{1,4}(?: ?[a-d](?!\w)| bis| ter)?(?:[\-/]\d{1,4})?(?![\d\w]|[.,:/]\d| \d)",
            view.masked[end : end + 12],
        )
    )
    if number_behind:
        end += number_behind.end()
    elif view.words[index] in _NUMBER_BEHIND_ONLY and not numbered:
        return False
    tail = _ADDRESS_TAIL.match(view.masked, end)
    kind_start = begin if numbered or view.words[index] != "quartier" else view.starts[index + 1]
    if view.words[index] == "quartier":
        kind_start = next(view.starts[i] for i in range(index + 1, last + 1) if view.shapes[i] != LOWER)
    view.claim(kind_start, tail.end() if tail else end, "address")
    return True


def _english_address(view: View, index: int) -> None:
    """A number, up to five capitalised words, a kind of street, perhaps a flat: "123 N. Main St, Apt 4"."""
    if view.shapes[index] == LOWER:
        return
    first = index
    while (
        first > 0
        and index - first < 5
        and view.shapes[first - 1] != LOWER
        and view.gap(first - 1) in (" ", ". ", "-", "'")
    ):
        first -= 1
        before = view.masked[max(0, view.starts[first] - 12) : view.starts[first]]
        number = re.search(r"(?<![\d.,/])(\d{1,6}[a-z]?) ?,? $", before)
        if number:
            end = view.ends[index] + (view.text[view.ends[index] : view.ends[index] + 1] == ".")
            compass = re.match(r" (?:N|S|E|W|NE|NW|SE|SW|North|South|East|West)\b\.?", view.text[end : end + 7])
            end += len(compass.group()) if compass else 0
            tail = _ADDRESS_TAIL.match(view.masked, end)
            view.claim(view.starts[first] - len(before) + number.start(1), tail.end() if tail else end, "address")
            return


# --- codes ---


def _codes(view: View) -> None:
    if view.longest_number == 0:
        return
    for match in _US_PLACE.finditer(view.text) if view.longest_number >= 5 else ():
        if view.masked[match.start(3)] != "\0":
            view.claim(match.start(3), match.end(3), "zip")
            view.claim(match.start(1), match.end(2), "city")
            _lines_before_code(view, match.start(1))
    for match in _UK_CODE.finditer(view.text):
        if view.masked[match.start()] != "\0" and not _STAGE.fullmatch(match.group()):
            view.claim(match.start(), match.end(), "zip")
            _lines_before_code(view, _city_before(view, match.start()))
    for match in _CODE.finditer(view.masked) if view.longest_number >= 3 else ():
        start, end = match.span()
        written = match[1]
        following = view.first_word_from(end)
        between = view.text[end : view.starts[following]] if following < len(view.words) else "\n\n\n"
        beside_address = _touches_address(view, start)
        if (
            re.fullmatch(r"[ ,\-–]{0,3}\n?[ ]?", between)
            and following < len(view.words)
            and view.shapes[following] in (UPPER, TITLE_CASE)
        ):
            listed = _city_match(view, following) is not None
            common = view.flags[following] & Word.COMMON and not view.flags[following] & (
                Word.CITY_START | Word.PARTICLE
            )
            beside_address = beside_address or view.masked[max(0, start - 3) : start] in ("\0, ", "\0 ", "\0 , ")
            if (
                beside_address
                or listed
                or (written.isdigit() and len(written) == 5 and not common and not view.flags[following] & Word.STOP)
            ):
                if not re.fullmatch(r"\d{5}|\d\d \d{3}|\d{4}", written) and not beside_address:
                    continue
                if len(written) == 4 and not beside_address and not listed:
                    continue
                view.claim(start, end, "zip")
                last = _city_sequence(view, following)
                if last is not None:
                    view.claim(view.starts[following], _cedex(view, view.ends[last]), "city")
                continue
        if between == " " and len(written) == 5 and not view.flags[following] & Word.COMMON:
            last = _city_match(view, following, any_case=True)
            if last is not None:
                view.claim(start, end, "zip")
                view.claim(view.starts[following], view.ends[last], "city")
                continue
        alone = len(written) == 5 and not _AMOUNT_BEFORE.search(view.masked, max(0, start - 12), start)
        if alone:
            alone = re.match(r" ?(?:[.;)\]–|\n]|$|- |, ?[a-z])", view.masked[end : end + 4]) is not None
        if beside_address or alone or (len(written) == 5 and _beside_identifier(view, start, end)):
            view.claim(start, end, "zip")


def _cedex(view: View, end: int) -> int:
    """End of a city with its "CEDEX 14" or its district "11"."""
    match = re.match(
        r" \([a-z]{2}\)|[ \-](?:cedex(?: \d{1,2}(?!\d))?|\d{1,2}(?:e|er|eme)?(?![\d\w:/.,]|\s\d))",
        view.masked[end : end + 12],
    )
    return end + match.end() if match else end


def _touches_address(view: View, start: int) -> bool:
    return any(one.kind == "address" and 0 <= start - one.end <= 6 for one in view.identifiers[-12:])


def _beside_identifier(view: View, start: int, end: int) -> bool:
    """Whether a code stands beside something already claimed, with a dash or a comma between."""
    return bool(
        re.search(r"\0 ?[,–\-|] ?$", view.masked[max(0, start - 4) : start])
        or re.match(r" ?[,–\-|] ?\(?\0", view.masked[end : end + 5])
    )


def _lines_before_code(view: View, start: int) -> None:
    """The street lines above a town and its code, if they begin with a number, a flat or a studio."""
    match = _STREET_LINES.search(view.masked[max(0, start - 100) : start])
    if match:
        offset = max(0, start - 100)
        view.claim(offset + match.start(1), offset + match.end(1), "address")


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


# --- cities ---


def _city_match(view: View, index: int, any_case: bool = False) -> int | None:
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


def _cities(view: View) -> None:
    for index in view.marked:
        if view.flags[index] & Word.DEMONYM and view.shapes[index] == LOWER:
            view.claim(view.starts[index], view.ends[index], "city", "gazetteer")
    for index in view.small_names:
        if (
            view.flags[index] & Word.CITY_START
            and index
            and view.words[index - 1] in _CITY_VERB_ENDS
            and view.free(index)
        ):
            before = view.plain[max(0, view.starts[index] - 60) : view.starts[index]]
            last = _city_match(view, index, any_case=True)
            if last is not None and (_CITY_VERBS.search(before) or view.words[index - 1] == "a"):
                view.claim(view.starts[index], view.ends[last], "city", "gazetteer")
    for index in view.capitalised:
        if view.shapes[index] != INITIAL and view.free(index):
            last = _named_city(view, index)
            if last is not None:
                view.claim(view.starts[index], _cedex(view, view.ends[last]), "city", "gazetteer")


def _named_city(view: View, index: int) -> int | None:
    flag = view.flags[index]
    told = None
    if index and view.words[index - 1] in _CITY_VERB_ENDS:
        told = _CITY_VERBS.search(view.plain[max(0, view.starts[index] - 60) : view.starts[index]])
    if told and not flag & (Word.STOP | Word.HOSPITAL) and (not flag & Word.COMMON or flag & Word.CITY_START):
        listed = _city_match(view, index)
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
    last = _city_match(view, index)
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
    if flag & (Word.COMMON | Word.FIRST | Word.LAST):
        if flag & Word.COMMON and view.in_capitals(index):
            return None
        return last if _city_cue(view, index) else None
    return last if view.shapes[index] == TITLE_CASE or not view.in_capitals(index) or _city_cue(view, index) else None


def _city_cue(view: View, index: int) -> bool:
    """A preposition or a bracket before, or a comma and a country, a state or a code after."""
    if eponym(view, index):
        return False
    if index and view.words[index - 1] in _CITY_CUES and view.gap(index - 1) in (" ", "'", "’"):
        head = view.flags[index - 2] if index > 1 else 0
        return not head & Word.EPONYM_HEAD
    return bool(
        re.match(
            r",? ?\(?(?:\d{5}|france|belgique|suisse|canada|quebec|maroc|algerie|tunisie|usa|uk)\b",
            view.plain[view.ends[index] : view.ends[index] + 14],
        )
    )


# --- hospitals ---


def _hospitals(view: View) -> None:
    for index in view.marked:
        if not view.flags[index] & Word.HOSPITAL or not view.free(index):
            continue
        word = view.words[index]
        if word in ("ch", "chi", "hug", "hop", "ghi", "hosp") and view.shapes[index] == LOWER:
            continue
        if (word in _ENGLISH_TAILS or word in _CENTER_WORDS) and _english_hospital(view, index):
            continue
        _french_hospital(view, index)
    _known_hospitals(view)


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
    seen_kind = view.words[index] not in ("centre", "institut", "institute")
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
    if position == index + 2 and view.words[index + 1] in ("du", "des") and _city_match(view, position) is None:
        first = index + 1  # "clinique du Parc"
    elif view.words[first] in ("la", "le", "les", "l"):
        position += 1
    last = None
    capitals = view.in_capitals(index)
    while position < len(view.words) and position - first < _MAX_WORDS and view.free(position):
        flag, shape, word = view.flags[position], view.shapes[position], view.words[position]
        if position > first and view.gap(position - 1) not in (" ", "-", "'", "’", ". ", " - "):
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
    if last is None or (last == first and view.flags[first] & Word.COMMON and _SPECIALITY.search(view.words[first])):
        return
    place = _city_match(view, first) == last and view.words[first - 1] in ("de", "d", "du", "a")
    begin = view.starts[first] if place or view.shapes[index] == LOWER else view.starts[index]
    view.claim(begin, view.ends[last], "city" if place else "hospital", "gazetteer")


def _space(view: View, index: int) -> bool:
    return view.gap(index) in (" ", "'", "’", " \n", "  ", "-")


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
        previous = view.words[index - 1] if index else ""
        if previous not in _BEFORE_HOSPITAL and view.text[view.starts[index] - 1 : view.starts[index]] != "(":
            continue
        before = view.plain[max(0, view.starts[index] - 24) : view.starts[index]]
        at = re.search(r"(?:\( ?|(?<![\w'])(?:a|au|de la|a la|at|from|vers|sur)\s)$", before)
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
                    and all(view.gap(index + i) in (" ", "-") for i in range(length - 1))
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
