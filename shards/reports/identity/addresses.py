"""Street addresses of French, Belgian, Swiss, Canadian, English, Spanish and German letters; boxes, houses."""

from __future__ import annotations

import re

from shards.reports.identity.gazetteers import Word, table
from shards.reports.identity.view import LOWER, View

_REPEATED = r"(?: ?(?:bis|ter|quater|[a-d])(?!\w))?"
_NUMBER_BEFORE = re.compile(  # an l and an O of a scanner among its digits
    rf"(?:n° ?|no\.? )?(?<![\d.,/\w])((?:\d|[li](?=\d))[\dlo]{{0,4}}(?:(?:[\-/]| (?:a|et|&) )\d{{1,5}})?{_REPEATED})"
    r" ?,? ?(?:\d{1,3}(?:e|eme) |grande? |de la |de l')?$"
)
_FLAT_BEFORE = re.compile(
    r"(?<!\w)(?:appt?|appartement|apt|bat|batiment|esc|escalier|etage|bte|boite)\.? ?\w{1,4}[ ,\-]{1,3}$"
)
_LIVES = re.compile(r"(?<!\w)(?:habit|demeur|resid|domicili|adresse|sis)\w{0,5}[^\n.\0]{0,12}$")
_NUMBER_BEHIND = re.compile(
    r",? \d{1,4}(?: ?[a-d](?!\w)| bis| ter)?(?:[\-/]\d{1,4})?(?![\d\w]|[.,:/]\d| \d(?!\d{3,4} ?-? ?[a-z]))"
)
# What may follow a number behind a square, which is no street otherwise: a code and its town.
_SMALL_CODE_AHEAD = re.compile(r"[ ,\n]{1,3}(?:(?:ch|b|l|f)[ \-]?)?\d{4,5} [^\W\d_]")
_ADDRESS_TAIL = re.compile(
    r"(?: 1er(?!\w)"
    r"|[ ,\n]{0,2}(?:appt?|appartement|apt|apartment|suite|ste|unit|bat|batiment|etage|bte|boite|box|escalier"
    r"|esc|flat|floor|room|piso|puerta|bureau|porte|local|km)"
    r"\.? ?#?(?:no )?[a-z]?\d{0,5}[a-z]?(?!\w))+|[ ,]{1,2}#\d+"
)
_STREET_NUMBER_FIRST = table("street_number_first")
_STREET_NAME_AFTER = table("street_name_after")
_SHORTENED_STREETS = frozenset(("ave", "bld", "blvd", "rte"))
_STREET_WITH_CAPITAL = table("street_with_capital")
_FLAT_WORDS = table("flat_words")
_NUMBER_BEHIND_ONLY = table("number_behind_only")
_WITHOUT_NUMBER = _NUMBER_BEHIND_ONLY | table("without_number")
_SHORT_STREETS = "|".join(sorted(table("street_abbreviations"), key=len, reverse=True))
# "14 imp. des Cerisiers": abbreviations that are words elsewhere, so only behind a number and before a capital.
_SHORT_STREET = re.compile(
    rf"(?<![\d.,/\w])\d{{1,4}}{_REPEATED} ?,? ?(?:{_SHORT_STREETS}|rond point)(?:\. ?| )(?=[^\W\d_])"
)
_GREAT_STREET = re.compile(
    r"(?:(?<![\d.,/\w])\d{1,4}(?: ?(?:bis|ter|quater|[a-d])(?!\w))? ?,? ?(?i:grand)|(?<!\w)(?:Grand|GRAND))"
    r"(?i:e[ \-]?|'? ?)(?i:rue)(?!\w)"
)
_BOX = re.compile(r"(?<![\w.])(?:b\.? ?p|c\.?s|t\.?s\.?a)\.? ?(?:n[°o] ?)?\d{1,3}(?: ?\d{2,3})?(?![\w/]|[.,]\d)")
_CODE_AHEAD = re.compile(r"[ ,\-–\n]{1,4}(?:\d{5}|\d\d \d{3}|\d{4}) ?-? ?[^\W\d_]")
# Places to live by their name; the second group only where an address follows.
_LIVED_IN = re.compile(
    r"(?<!\w)(?:(?P<sure>(?i:quartier [^\W\d_]+ d[eu]s?|lieu[ \-]?dit|r[ée]sidence|lotissement|hameau)"
    r"|Z\.?A\.?C?\.?|Z\.?I\.?|(?i:zone (?:artisanale|industrielle|d['’]activit[ée]s?)))"
    r"|(?i:r[ée]s|lot|cit[ée]|immeuble|imm|domaine|ferme"
    r"|ch[âa]teau|villa|parc|hlm|foyer|tour|b[âa]timent|b[âa]t)\.?) ?[\"«]? ?"
    r"(?i:(?:d[eu]|des|la|le|les|aux?) |[dl]['’])*[A-ZÀ-Ý][\w'’\-]*"
    r"(?:[ \-](?:(?i:d[eu]|des|la|les?|sur|sous|en) |[dl]['’])*[A-ZÀ-Ý][\w'’\-]*){0,4}"
    r"(?:,? ?(?i:b[âa]t(?:iment)?|app?t|esc|apt|entrée|étage)\.? ?\w{1,4}(?!\w)){0,3}"
)
_LIVED_IN_WORDS = table("lived_in")
_BOX_WORDS = frozenset(["bp", "cs", "tsa"])
_ADDRESS_AHEAD = re.compile(
    r"[ ,\-–\n]{1,4}\0|[^\0:]{0,60}?(?:(?<!\d)\d{5} ?-? ?[^\W\d_]"
    r"|\d ?,? (?:rue|avenue|av|boulevard|bd|place|chemin|route|rte|allee)(?!\w))"
)
# The line above a code and its town, whatever its street is called: a number first, or last.
_LINE_ABOVE = re.compile(
    r"(?:^|[\n:;|()\0]|(?:,| [\-–]|(?<!\w)(?:au|a|sis|habite|demeurant)) ) ?"
    rf"(?P<line>\d{{1,5}}{_REPEATED}[ ,]{{1,3}}(?!ans|kg|cm|mm|mg|ml|mois|jours)[^\W\d_][^\n\0:|;()]{{2,45}}?"
    r"|[^\W\d_][^\n\0:|;(),\d]{3,40} \d{1,4} ?[a-z]?(?:/\d{1,4})?(?: ?(?:bte|boite|appt?)\.? ?\d{1,4})?"
    r"(?=[ ,]*\n|, )|(?P<place>(?:les? |la |l'|au |aux )[^\W\d_][^\n\0:|;(),\d]{2,40}))[ ,\-–]*\n?[ ,]*$"
)
_GERMANIC = re.compile(
    r"(?<!\w)(?:[A-ZÀ-Ý][^\W\d_]+[ \-]){0,3}(?:[A-ZÀ-Ý][^\W\d_]*|(?<=-))(?i:strasse|straße|str\.|straat|laan"
    r"|gasse|platz|weg|(?<=-)ring|allee|steenweg|plein|(?<=-)lei|dreef) ?\d{1,4} ?[a-z]?(?:[\-/]\d{1,4})?(?!\w)"
)
_MILITARY_PARTS = (" box ", "unit ", "psc ", "uss ", "usns", "usnv", "uscgc")
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
_STREET_LINES = re.compile(
    r"(?:^|[\n,:;|)(]) ?((?:(?:flat|studio|unit|apt"
    r"|apartment) \d+[a-z]?[,\n ]{1,2})?(?:\d{1,6}[a-z]? )?[^\W\d_][^\n\0:|]{2,40}?)[, ]*\n?[, ]*$"
)
# A sentence's end, or a preposition that leads to the town: no line of an address.
_PROSE = re.compile(r"(?:[a-z]{5}|\d)\. [^\W\d_]+ [^\W\d_]+ |(?<!\w)(?:at|in|from|to|near)$")
_FIELD = re.compile(
    r"(?<!\w)(?:address|adresse|domicile|home address|residence)(?: du patient| patient)?[ ]?: ?(?=[^\W_])"
)
_FIELD_WORDS = frozenset(("address", "adresse", "domicile", "residence"))
_FIELD_END = re.compile(r"\n|\0|[|;]|\b(?:tel|phone|fax|email|mail|mobile|dob|mrn)\b|[a-z)] {2,}|\. [A-Z]")
_MILITARY = re.compile(
    r"(?<!\w)(?:PSC|Unit|USNS|USS|USCGC|USNV) [\w ,]{1,30}\n?(?:FPO|DPO|APO) A[AEP] \d{5}(?!\d)|(?<!\w)P\.?O\.? Box \d+"
)
_CODE_BEGINS = re.compile(r"(?:[bdfl]|ch)[ \-]?\d{4}|[a-z]\d[a-z] ?\d[a-z]\d|cedex")
_NAME_WORDS_MAX = 9
_JOINS = (" ", "-", "'", "’", "  ")


def find(view: View) -> None:
    """Claim street addresses; before dates, which many streets are named after."""
    for index in view.marked if view.seen & Word.STREET else ():
        if not view.flags[index] & Word.STREET or not view.free(index):
            continue
        word = view.words[index]
        if word in _STREET_NAME_AFTER and _french_address(view, index):
            continue
        if word in _STREET_NUMBER_FIRST:
            _english_address(view, index)
    if view.numbers:
        _short_streets(view)
    if not _LIVED_IN_WORDS.isdisjoint(view.words):
        _lived_in(view)
    if view.numbers:
        _fields_and_boxes(view)


def _short_streets(view: View) -> None:
    for match in view.at_numbers(_SHORT_STREET):
        index = view.first_word_from(match.end())
        last = _name_end(view, index - 1, numbered=True)
        if last is None:
            continue
        capitals = [word for word in range(index, last + 1) if view.shapes[word] != LOWER]
        told = not view.in_capitals(index) and any(not view.flags[word] & Word.COMMON for word in capitals)
        if (
            told
            or (capitals and _ADDRESS_AHEAD.match(view.masked, view.ends[last]))
            or (_CODE_AHEAD.match(view.masked, view.ends[last]))
        ):
            tail = _ADDRESS_TAIL.match(view.masked, view.ends[last])
            view.claim(match.start(), tail.end() if tail else view.ends[last], "address")
    if "grand" in view.plain:
        for match in _GREAT_STREET.finditer(view.text):
            view.claim(match.start(), match.end(), "address")


def _fields_and_boxes(view: View) -> None:
    """What stands behind "Address:", German streets, military post, post-office boxes."""
    if not _FIELD_WORDS.isdisjoint(view.words):
        for match in _FIELD.finditer(view.masked):
            _field(view, match.end())
    for patterns, words in ((_GERMANIC, _GERMANIC_PARTS), (_MILITARY, _MILITARY_PARTS)):
        if any(word in view.plain for word in words):
            for match in patterns.finditer(view.text):
                view.claim(match.start(), match.end(), "address")
    if _BOX_WORDS.isdisjoint(view.words) and "b.p" not in view.plain and "c.s" not in view.plain:
        return
    for match in _BOX.finditer(view.masked):
        beside = "\0" in view.masked[max(0, match.start() - 4) : match.start()]
        if beside or _CODE_AHEAD.match(view.masked, match.end()):
            view.claim(match.start(), match.end(), "address")


def _lived_in(view: View) -> None:
    """ "Lieu-dit Le Moulin", "Résidence Les Acacias, bât. C": in capitals only where a street or a code follows."""
    for match in _LIVED_IN.finditer(view.text):
        start, end = match.span()
        if "\0" in view.masked[start:end]:
            continue
        told = match["sure"] is not None and not match.group().isupper()
        if told or _ADDRESS_AHEAD.match(view.masked, end):
            view.claim(start, end, "address")


def claim_line_above(view: View, start: int) -> None:
    """Claim the street that ends where a code begins, if a number says that it is one."""
    match = _LINE_ABOVE.search(view.masked[max(0, start - 90) : start])
    if match is None:
        return
    begin, end = (max(0, start - 90) + match.start("line"), max(0, start - 90) + match.end("line"))
    if match["place"] is None or view.text[begin + re.match("\\w+[ ']", match["place"]).end()].isupper():  # type: ignore[union-attr]
        view.claim(begin, end, "address")


def claim_lines_before_code(view: View, start: int) -> None:
    """The street lines above an English town and its code, if they begin with a number, a flat or a studio."""
    offset = max(0, start - 100)
    match = _STREET_LINES.search(view.masked[offset:start])
    if match and not _PROSE.search(match[1]):
        view.claim(offset + match.start(1), offset + match.end(1), "address")


def touches_address(view: View, start: int) -> bool:
    """Whether an address ends within six characters before `start`."""
    return any(one.kind == "address" and 0 <= start - one.end <= 6 for one in view.identifiers[-12:])


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
    begin = _number_start(view, index)
    numbered = begin is not None
    kind = view.words[index]
    lived_in = _LIVES.search(view.masked, max(0, view.starts[index] - 30), view.starts[index]) is not None
    last = _name_end(view, index, numbered or lived_in)
    if last is None:
        return False
    capital = any(view.shapes[word] != LOWER for word in range(index + 1, last + 1)) or _dated(view, index, last)
    end = view.ends[last]
    sure = capital or lived_in or (numbered and kind not in _STREET_WITH_CAPITAL)
    if not sure and not _CODE_AHEAD.match(view.masked, end):
        return False
    year = re.compile(r" (?:19|20)\d\d(?!\d)").match(view.masked, end)  # "rue du 8 mai 1945"
    if year and view.flags[last] & Word.MONTH:
        end = year.end()
    if not numbered:
        behind = _NUMBER_BEHIND.match(view.masked, end)
        if behind:
            end = behind.end()
        elif kind in _NUMBER_BEHIND_ONLY:
            return False
        if kind not in _WITHOUT_NUMBER and not (behind and _SMALL_CODE_AHEAD.match(view.masked, end)):
            return False
    begin = view.starts[index] if begin is None else begin
    flat = _FLAT_BEFORE.search(view.masked, max(0, begin - 24), begin)
    begin = flat.start() if flat else begin
    if kind == "quartier":  # "le quartier parisien de Ménilmontant": the name alone
        begin = next(view.starts[i] for i in range(index + 1, last + 1) if view.shapes[i] != LOWER)
    tail = _ADDRESS_TAIL.match(view.masked, end)
    view.claim(begin, tail.end() if tail else end, "address")
    return True


def _number_start(view: View, index: int) -> int | None:
    """Where the house number before word `index` begins, in digits or in words; None without one."""
    start = view.starts[index]
    before = view.masked[max(0, start - 20) : start]
    number = _NUMBER_BEFORE.search(before)
    if number:
        return start - len(before) + number.start(1)
    if not index or view.words[index - 1] == "un" or not view.flags[index - 1] & Word.NUMBER:
        return None
    if view.gap(index - 1) not in (" ", ", "):
        return None
    first = index - 1
    while first and view.gap(first - 1) in ("-", " ") and _goes_on(view, first - 1):
        first -= 1
    return view.starts[first]


def _goes_on(view: View, index: int) -> bool:
    """Whether a word belongs to a number in words that goes on behind it: "vingt" and "et" of "vingt et un"."""
    return bool(view.flags[index] & Word.NUMBER) or (
        view.words[index] == "et" and index > 0 and bool(view.flags[index - 1] & Word.NUMBER)
    )


def _dated(view: View, index: int, last: int) -> bool:
    """Whether a street is named after a day: "rue du 8 mai"."""
    return any(view.flags[word] & Word.MONTH for word in range(index + 1, last + 1)) and any(
        character.isdigit() for character in view.text[view.ends[index] : view.ends[last]]
    )


def _name_end(view: View, index: int, numbered: bool) -> int | None:
    """Last word of the street's name behind its kind at word `index`; None where no name follows."""
    last, position, capital, lower_words = None, index + 1, False, 0
    capitals = view.in_capitals(index)
    while position < len(view.words) and position - index < _NAME_WORDS_MAX:
        gap = view.gap(position - 1)
        abbreviated = gap in (". ", ".") and _is_shortened(view, position - 1)
        over_line = gap == "\n" and numbered and position == index + 1
        if not (gap in _JOINS or abbreviated or over_line or re.fullmatch(r" \d{1,2}(?:er)? ", gap)) or not view.free(
            position
        ):
            break
        over = view.words[position] in _FLAT_WORDS or _CODE_BEGINS.match(view.plain, view.starts[position])
        if last is not None and over:
            break
        flag, word = view.flags[position], view.words[position]
        if view.shapes[position] == LOWER:
            if flag & Word.MONTH and re.search(r"\d", gap):
                last, position, capital = position, position + 1, True
                continue
            if flag & Word.PARTICLE or word in ("et", "aux", "au", "sur", "sous"):
                position += 1
                continue
            after_particle = view.flags[position - 1] & Word.PARTICLE
            if capital or not numbered or lower_words > 2 or (lower_words and not after_particle and gap != "-"):
                break
            lower_words += 1
        elif capitals and flag & Word.STOP and not flag & (Word.TITLE | Word.PARTICLE) and word != "hopital":
            break
        else:
            capital = True
        last, position = position, position + 1
    return last


def _is_shortened(view: View, index: int) -> bool:
    """Whether the full stop behind a street's word belongs to it ("bd. Foch", "Gal. Leclerc"), or ends a sentence."""
    word, flag = view.words[index], view.flags[index]
    if flag & Word.STREET or len(word) == 1:
        return len(word) < 3 or word in _SHORTENED_STREETS
    return len(word) < 6 and bool(flag & Word.TITLE or not view.flags[index + 1] & Word.COMMON)


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
