"""Sentences of clinical prose, English and French: notes, lists and dictated lines rather than edited text.

A span has no white space around it and no bullet or number of a list before it. Between the spans of one call lie only
white space, list marks and stray punctuation.
"""

from __future__ import annotations

import re

from shards.reports.language import Language, Span

MAX_BRACKET = 200  # characters; an opening bracket without its end within these was never closed
MAX_QUOTATION = 500
MAX_TOKEN = 40  # characters looked at before a stop
MIN_WRAP_WIDTH = 40  # characters; shorter lines are a list, not wrapped prose
# Characters; a longer run without an end is no sentence, and what reads sentences takes time as the square of them.
MAX_SENTENCE = 2000

# After these a sentence goes on whatever follows.
_TITLES = frozenset(
    {
        "dr", "drs", "pr", "prof", "mr", "mrs", "mme", "mmes", "mlle", "mlles", "st", "ste", "me", "cf", "vs", "e.g",
        "i.e", "eg", "ie", "viz", "ca", "approx", "env", "n°", "nr", "fig", "figs", "ref", "réf", "tel", "tél",
        "dept", "assist", "assoc", "resp", "incl", "excl",
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
        "mesurant", "dr", "pr", "prof", "mr", "mrs", "mme",
    }
)  # fmt: skip

# One class of characters first, which the regular expression engine scans for at the speed of C.
_CANDIDATE = re.compile(r"""[.!?…)\n•·▪◦●■►"][.!?…)\]"'»”’]*""")
_SEPARATORS = '•·▪◦●■►"'  # between blanks; a quotation mark there is what some exports make of a bullet
_CLOSERS = ")]\"'»”’"
_JOINED = re.compile(r"[A-ZÀ-Ý][A-Za-zÀ-ÿ' ]")  # "clear.No effusion": the blank was forgotten
_OPENERS = "([\"“«'’/"
# What may stand before a sentence: white space, stray punctuation, a bullet, a number or a letter of a list.
_MARK = re.compile(
    r"""\s+ | [,;:|¦]+(?=\s|$) | o(?=\s+[A-ZÀ-Ý\d(]) | ["”»'’]+(?=\s) | [-–—•*·▪◦●■►→>+#_]+(?=\s|$) | [•▪◦●■►]
      | \(?(?P<number>\d{1,2})(?:[.)/]|\ ?-)(?=\s+[^\d\s]|\s*$) | \(?[a-hA-H]\)(?=\s)""",
    re.VERBOSE,
)
_LIST_ITEM = re.compile(r"[|¦]|o\s+[A-ZÀ-Ý\d(]|[-–—•*·▪◦●■►→>+]+\s|[•▪◦●■►]|\(?\d{1,2}[.)/]\s|\(?[a-hA-H]\)\s")
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
        self.brackets = text.find("(", start, end) >= 0
        self.spans: list[Span] = []

    def split(self) -> list[Span]:
        self.begin = self._after_marks(self.start)
        for match in _CANDIDATE.finditer(self.text, self.start, self.end):
            start, end = match.span()
            if start < self.begin:
                continue
            if self.text[start] == "\n":
                if self._line_ends(start):
                    self._cut(start, start)
            elif self.text[start] in _SEPARATORS:
                if end - start == 1 and self._separates(start):
                    self._cut(start if self.text[start - 1].isspace() else end, end)
            elif (number := self._number_before(start)) is not None:
                self._cut(number, number)
            elif self._stop_ends(start, end):
                self._cut(end, end)
        self._cut(self.end, self.end)
        return self.spans

    def _cut(self, stop: int, following: int) -> None:
        text, begin = self.text, self.begin
        while stop - begin > MAX_SENTENCE:
            middle = max(text.rfind(" ", begin, begin + MAX_SENTENCE), text.rfind("\n", begin, begin + MAX_SENTENCE))
            middle = middle if middle > begin else begin + MAX_SENTENCE
            self._add(begin, middle)
            begin = middle
        self._add(begin, stop)
        self.begin = self._after_marks(following)

    def _add(self, begin: int, stop: int) -> None:
        """The span without white space around it, if it holds a word."""
        text = self.text
        said = text[begin:stop].strip()
        if said and _WORD.search(said):
            begin = text.index(said, begin, stop)
            self.spans.append((begin, begin + len(said)))

    def _after_marks(self, position: int) -> int:
        while position < self.end and (mark := _MARK.match(self.text, position, self.end)):
            if mark["number"]:
                self.number = int(mark["number"])
            position = mark.end()
        return position

    def _separates(self, mark: int) -> bool:
        """A bullet within a line, or a quotation mark that no other opened or closes, before a capital or a figure."""
        text = self.text
        if not text[mark + 1 : mark + 2].isspace():
            return False
        following = _following(text, mark + 1, self.end)
        if not (following.isupper() or following.isdecimal()):
            return False
        if text[mark] == '"':
            return text.rfind('"', max(self.begin, mark - MAX_QUOTATION), mark) < 0
        return text[mark - 1].isspace()

    def _number_before(self, stop: int) -> int | None:
        """Where the number stands, if the stop ends the next number of a list: "1. Clear lungs 2. Normal heart"."""
        text, start = self.text, stop
        while stop - start < 3 and text[start - 1 : start].isdecimal():
            start -= 1
        if start == stop or not text[start - 1 : start].isspace() or not text[stop + 1 : stop + 2].isspace():
            return None
        expected = self.number + 1 if self.number or text[start - 2 : start - 1] == ":" else 0
        return start if int(text[start:stop]) == expected else None

    def _stop_ends(self, start: int, end: int) -> bool:
        """Whether the stops and closing marks in [start, end) end the open sentence."""
        text = self.text
        if end >= self.end:
            return True
        spaced = text[end].isspace()
        stops = text[start:end].strip(_CLOSERS)
        if not stops or not (spaced or _JOINED.match(text, end)):
            return False
        following = _following(text, end, self.end)
        if not following:
            return True
        if following in ",;:)]" or (self.brackets and self._in_bracket(end)):
            return False
        if stops != ".":
            return not following.islower()
        if text[start] != ".":  # after a bracket or quotation, which is no shortened word
            return True
        token_start = max(self.begin, start - MAX_TOKEN)
        if text[start - 1].isspace():  # "normal . Heart" ends, "name @ site . com" and "08 . 04 . 1941" do not
            return not following.islower() and not (following.isdecimal() and text[start - 2].isdecimal())
        token = text[token_start:start].rsplit(None, 1)[-1:]
        return self._word_ends(token[0].lstrip(_OPENERS) if token else "", following, end, spaced)

    def _word_ends(self, word: str, following: str, end: int, spaced: bool) -> bool:
        """Whether a single stop after `word` ends the sentence, or only shortens the word or follows a number."""
        lowered = word.lower()
        if lowered in _TITLES or (word in ("M", "MM") and following.isupper()):
            return False
        if lowered in self.shortened:
            return following.isupper()
        if _INITIALS.fullmatch(word):
            next_word = _NEXT_WORD.match(self.text, end)
            return spaced and not following.isdecimal() and (next_word is None or next_word[1].lower() in _STARTERS)
        if not spaced:
            long_enough = len(word) > (3 if self.text[end + 1 : end + 2].isupper() else 2)
            return long_enough and word.isalpha() and "@" not in self.text[end : end + MAX_TOKEN].split(None, 1)[0]
        if word.isdecimal() and len(word) < 4 and _BLANK_DECIMAL.match(self.text, end):
            return False
        return not following.islower() or len(word) > 3 or not word.isalpha()

    def _in_bracket(self, position: int) -> bool:
        begin = max(self.begin, position - MAX_BRACKET)
        opened = self.text.rfind("(", begin, position)
        if opened < 0 or self.text.find(")", opened, position) >= 0:
            return False
        closed = self.text.find(")", position, min(opened + MAX_BRACKET, self.end))
        return closed >= 0 and self.text.find("(", position, closed) < 0

    def _line_ends(self, stop: int) -> bool:
        """Whether the line end is meant; prose wrapped at a width breaks only where the next word had no room."""
        text, following = self.text, stop + 1
        if (
            following >= self.end
            or text[following] == "\n"
            or text[stop - 1] == ":"
            or _LIST_ITEM.match(text, following)
        ):
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
