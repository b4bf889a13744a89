"""Sentences of clinical prose, English and French: notes, lists and dictated lines rather than edited text.

A span has no white space around it and no bullet or number of a list before it. Between the spans of one call lie only
white space, list marks and stray punctuation.
"""

from __future__ import annotations

import re

from shards.reports.language import Language, Span

MAX_BRACKET = 200  # characters; an opening bracket without its end within these was never closed
MAX_TOKEN = 40  # characters looked at before a stop
MIN_WRAP_WIDTH = 40  # characters; shorter lines are a list, not wrapped prose

# After these a sentence goes on whatever follows.
_TITLES = frozenset(
    {
        "dr", "drs", "pr", "prof", "mr", "mrs", "mme", "mmes", "mlle", "mlles", "st", "ste", "me", "cf", "vs", "e.g",
        "i.e", "eg", "ie", "viz", "ca", "approx", "env", "n°", "nr", "fig", "figs", "ref", "réf", "tel", "tél",
        "dept", "resp", "incl", "excl",
    }
)  # fmt: skip
# After these it goes on before a small letter or a figure, and ends before a capital.
_SHORTENED = frozenset(
    {
        "etc", "al", "max", "min", "moy", "vol", "no", "nos", "num", "art", "ch", "chap", "p", "pp", "pt", "pts",
        "sup", "inf", "ant", "post", "lat", "med", "méd", "dist", "prox", "int", "ext", "transv", "longit", "bilat",
        "segm", "diam", "exam", "abdo", "thor", "radiol", "ortho", "hosp", "serv", "conf", "ex", "a.m", "p.m",
        "b.i.d", "t.i.d", "q.d", "p.o", "i.v", "y.o", "p.a", "a.p", "jan", "feb", "mar", "apr", "jun", "jul", "aug",
        "sept", "sep", "oct", "nov", "dec", "janv", "févr", "avr", "juil", "déc",
    }
)  # fmt: skip
_BY_LANGUAGE: dict[Language, frozenset[str]] = {
    "en": frozenset({"in", "ft", "est"}),
    "fr": frozenset({"qq", "qqs", "cad", "c.-à-d", "c.à.d", "càd", "hab", "gche", "dte", "éch", "suiv", "préc"}),
}
_BY_LANGUAGE = {name: words | _SHORTENED for name, words in _BY_LANGUAGE.items()}
_BY_LANGUAGE["unknown"] = _BY_LANGUAGE["en"] | _BY_LANGUAGE["fr"]
# One capital and a stop are an initial before a name, but the end of a sentence ("vitamin D. The ...") before these.
_STARTERS = frozenset(
    {
        "the", "there", "this", "these", "those", "no", "not", "it", "its", "in", "on", "at", "as", "and", "an",
        "with", "without", "both", "bilateral", "left", "right", "mild", "normal", "also", "heart", "lungs", "lung",
        "pleural", "bones", "otherwise", "stable", "unchanged", "le", "la", "les", "il", "elle", "pas", "absence",
        "un", "une", "des", "aucun", "aucune", "sans", "ce", "cette", "au", "aux", "en", "dans", "par", "sur",
        "présence",
    }
)  # fmt: skip
# A line that ends in one of these goes on in the next.
_CONNECTING = frozenset(
    {
        "the", "a", "an", "of", "in", "on", "at", "with", "without", "and", "or", "to", "for", "from", "by", "is",
        "are", "was", "were", "than", "no", "measuring", "le", "la", "les", "l'", "un", "une", "de", "du", "des",
        "d'", "et", "ou", "à", "au", "aux", "en", "dans", "avec", "sans", "sur", "sous", "par", "pour", "est", "sont",
        "mesurant",
    }
)  # fmt: skip

_CANDIDATE = re.compile(
    r"""(?P<stop>[.!?…]+)[)\]"'»”’]*\.?(?=\s|$|(?P<joined>[A-ZÀ-Ý][A-Za-zÀ-ÿ' ]))
      | (?P<lines>\n+)
      | (?P<number>\d+)[.)](?=\s|$)""",
    re.VERBOSE,
)
# What may stand before a sentence: white space, stray punctuation, a bullet, a number or a letter of a list.
_MARK = re.compile(
    r"""\s+ | [,;:|]+(?=\s|$) | ["”»'’]+(?=\s) | [-–—•*·▪◦●■►→>+#_]+(?=\s|$) | [•▪◦●■►]
      | \(?(?P<number>\d{1,2})(?:[.)/]|\ ?-)(?=\s+[^\d\s]) | \(?[a-hA-H]\)(?=\s)""",
    re.VERBOSE,
)
_LIST_ITEM = re.compile(r"[-–—•*·▪◦●■►→>+]+\s|[•▪◦●■►]|\(?\d{1,2}[.)/]\s|\(?[a-hA-H]\)\s")
_BLANK_DECIMAL = re.compile(r"\s\d{1,2} ?(?:mm|cm|m|ml|cc|%|x)\b")  # "1. 5 cm", as OCR and dictation leave it
_INITIALS = re.compile(r"(?:[A-ZÀ-Ý][.-])*[A-ZÀ-Ý]$")
_NEXT_WORD = re.compile(r"\s*([^\W\d_]+)")
_WORD = re.compile(r"[^\W_]")


def sentences(text: str, start: int = 0, end: int | None = None, language: Language = "unknown") -> list[Span]:
    """Spans of the sentences within [start, end) of a document, in order and without overlap."""
    return _Splitter(text, start, len(text) if end is None else end, language).split()


class _Splitter:
    """One pass over the places where a sentence may end; `begin` is where the open one started."""

    def __init__(self, text: str, start: int, end: int, language: Language) -> None:
        self.text, self.start, self.end = text, start, end
        self.shortened = _BY_LANGUAGE[language]
        self.number = 0  # of the last list item
        self.spans: list[Span] = []

    def split(self) -> list[Span]:
        self.begin = self._after_marks(self.start)
        for match in _CANDIDATE.finditer(self.text, self.start, self.end):
            if match.start() < self.begin:
                continue
            if match["lines"]:
                if self._line_ends(match):
                    self._cut(match.start(), match.end())
            elif match["number"] and self._starts_item(match):
                self._cut(match.start(), match.start())
            elif self._stop_ends(match):
                self._cut(match.end(), match.end())
        self._cut(self.end, self.end)
        return self.spans

    def _cut(self, stop: int, following: int) -> None:
        text, begin = self.text, self.begin
        while stop > begin and text[stop - 1].isspace():
            stop -= 1
        if _WORD.search(text, begin, stop):
            self.spans.append((begin, stop))
        self.begin = self._after_marks(following)

    def _after_marks(self, position: int) -> int:
        while position < self.end and (mark := _MARK.match(self.text, position, self.end)):
            if mark["number"]:
                self.number = int(mark["number"])
            position = mark.end()
        return position

    def _starts_item(self, match: re.Match[str]) -> bool:
        """ "1. Clear lungs 2. Normal heart": the next number of a list, with no stop before it."""
        number, before = int(match["number"][:3]), self.text[: match.start()][-2:]
        return before[-1:].isspace() and (number == self.number + 1 if self.number else number == 1 and ":" in before)

    def _stop_ends(self, match: re.Match[str]) -> bool:
        text, position = self.text, match.end()
        stop = match.start("stop") if match["stop"] else match.end("number")
        token_start = max(self.begin, stop - MAX_TOKEN)
        token = re.split(r"[\s(\[\"“«'’/]", text[token_start:stop])[-1]
        following = _following(text, position, self.end)
        if not following:
            return True
        if self._in_bracket(position):
            return False
        mark = match["stop"] or text[stop]
        if mark == ")" or following in ",;:)]":
            return False
        if mark[0] in "?!":
            return not (following.islower() and not token)
        if len(mark) > 1 or mark == "…":
            return not following.islower()
        word = token.lower()
        if word in _TITLES or (token in ("M", "MM") and following.isupper()):
            return False
        if match["joined"] and len(token) < 3:
            return False
        if word in self.shortened:
            return following.isupper()
        if _INITIALS.match(token):
            next_word = _NEXT_WORD.match(text, position)
            return not (following.isdigit() or (next_word and next_word[1].lower() not in _STARTERS))
        if token.isdigit() and len(token) < 4 and _BLANK_DECIMAL.match(text, position):
            return False
        return not following.islower() or len(token) > 3 or not token.isalpha()

    def _in_bracket(self, position: int) -> bool:
        begin = max(self.begin, position - MAX_BRACKET)
        opened = self.text.rfind("(", begin, position)
        if opened < 0 or self.text.find(")", opened, position) >= 0:
            return False
        return self.text.find(")", position, min(opened + MAX_BRACKET, self.end)) >= 0

    def _line_ends(self, match: re.Match[str]) -> bool:
        """Whether the line end is meant; prose wrapped at a width breaks only where the next word had no room."""
        text, stop, following = self.text, match.start(), match.end()
        if following - stop > 1 or following >= self.end or text[stop - 1] == ":" or _LIST_ITEM.match(text, following):
            return True
        if text[stop - 1] in ".!?…,":  # a stop that ends a sentence was taken before
            return False
        if text[following].islower() and self._has_capitals():
            return False
        line_start = text.rfind("\n", max(0, stop - 1000), stop) + 1
        if text[line_start:stop].rsplit(" ", 1)[-1].lower() in _CONNECTING:
            return False
        next_word = re.match(r"\S*", text[following : following + MAX_TOKEN])
        room = self._width() - (stop - line_start) - 1
        return self._width() < MIN_WRAP_WIDTH or (next_word is not None and len(next_word[0]) <= room)

    def _width(self) -> int:
        if not hasattr(self, "width"):
            self.width = max(map(len, self.text[self.start : self.end].split("\n")))
        return self.width

    def _has_capitals(self) -> bool:
        if not hasattr(self, "capitals"):
            self.capitals = any(map(str.isupper, self.text[self.start : self.end]))
        return self.capitals


def _following(text: str, position: int, end: int) -> str:
    """The next character that is no white space; empty at the end."""
    while position < end and text[position].isspace():
        position += 1
    return text[position] if position < end else ""
