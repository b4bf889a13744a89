"""A learned layer beside the rules, for French: one linear classifier over the words and numbers of a document.

For every token t (a run of letters and digits) and label y the score is s[t, y] = sum over features f of
w[h(f, t), y]: f joins up to three attributes of t and its neighbours (shape, flags of the word lists, what stands
between, endings, common context words, place in the line), h hashes their values into the rows of w. Weights are
int8 and sums int16, so every machine decides alike. Words that the lists know only as names are never attributes
themselves. The weights are made by `python -m ci.data.identity_tagger`; their sources stand in lists/SOURCE.txt.

With m[t] = max over y != "" of s[t, y] - s[t, ""]: a token is found where m reaches `found`, and where it reaches
`joined` beside a token that is found, by this layer or by a rule. Of a number m is taken `digits` lower, since the
rules read numbers well and tables are full of them, of a common word or a single letter `common` lower. Words unlike
names (common ones, or unknown ones in small letters or capitals only) are added for themselves only where
m reaches `unlike` in one of them. Up to three words that a rule took for a name are let go where m of all is below
`ordinary`: prose beyond doubt.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from operator import itemgetter
from pathlib import Path

import numpy as np

from shards.errors import ConfigError
from shards.reports.identity.eponyms import eponym
from shards.reports.identity.gazetteers import LISTS, Word, gazetteer, is_derived
from shards.reports.identity.patterns import public_pages
from shards.reports.identity.view import PLACEHOLDER, Identifier, Kind, View
from shards.reports.language import detect

WEIGHTS = LISTS / "tagger.npz"
KINDS: tuple[Kind, ...] = ("person_name", "date", "phone", "mail", "id", "address", "zip", "city", "hospital")
ROWS_LOG2 = 16
_TOKEN = re.compile(r"[^\W_]+")
_SPACES = re.compile(r"[^\S\n]+")
# A document of unknown language is read when it has this many different words of these.
_FRENCH = frozenset(
    (
        "le", "les", "du", "des", "au", "aux", "et", "une", "est", "dans", "avec", "par", "pour", "sur",
        "chez", "ce", "cette", "monsieur", "madame", "docteur",
    )
)  # fmt: skip
_FRENCH_WORDS_MIN = 2
_SAME = re.compile(r"[^\w\n,;:|()]{0,3}")
_SAME_NAME = re.compile(r"[ .'’\-]{0,2}")  # "A / B" are two persons
_NARROW: dict[Kind, Kind] = {"patient_name": "person_name", "birth_date": "date", "social_security": "id"}
_COLON = re.compile(r" {0,3}:")
# Fields whose values are no persons; "Profession : Maçon" is right behind one.
_OF_NO_PERSON = re.compile(
    r"(?<!\w)(?:professions?|metier|activites?|nationalite|langues?|assurances?|mutuelle|regime|caisse|loisirs|sports?"
    r"|allergies?|traitements?|motif|diagnostic|indication|plan|materiel|vaccins?) ?: ?\Z"
)
_ACRONYM_MAX = 4  # letters
_DOUBTFUL_TOKENS = 3
_SHORT_MAX = 3  # characters: "9L", "J22" and "03" alone tell too little of a number or a day
_INFLECTED_LETTERS_MIN = 6
_WORDY_KINDS = frozenset(("person_name", "city", "hospital", "address"))
_DOSE = re.compile(r" {1,2}\d+(?:[.,]\d+)? ?(?:mg|g|[uµ]g|mcg|ml|m?ui)\b")
_CITATION = re.compile(
    r"(?:[^\W\d_][\w'’\-]+\s[A-Z]{1,2}\.?,\s)+[^\n:;]{0,60}?\bet al\b(?:[^\n]{0,60}?\b(?:19|20)\d\d)?"
)  # "Roy A, Lam B. et al., Lancet 2019"
THRESHOLDS = ("found", "joined", "digits", "common", "unlike", "ordinary")
_MAKE = "make them with `python -m ci.data.identity_tagger`"
_NUMBER_SHAPES, _MIXED_SHAPES = 32, 64
_REACH = 5  # tokens on both sides that a feature may look at
NAMES_ONLY = Word.FIRST | Word.LAST | Word.CITY_START
_COMMON = Word.COMMON | Word.FINDING | Word.EPONYM
_CUES = Word.TITLE | Word.ROLE | Word.KIN | Word.STREET | Word.HOSPITAL

# Attributes of a token, rows of the matrix that `attributes` makes.
WORD, SHAPE, FLAGS, GAP, ENDING, START, PLACE, FIELD, RUN, AGAIN, CUE = range(_ATTRIBUTES := 11)


def _features() -> list[tuple[tuple[int, int], ...]]:
    """Each feature as up to three (attribute, offset)."""
    single = [(WORD, o) for o in range(-4, 5)]
    single += [(SHAPE, o) for o in range(-4, 5)]
    single += [(FLAGS, o) for o in range(-4, 5)]
    single += [(GAP, o) for o in range(-2, 4)]
    single += [
        (ENDING, -1),
        (ENDING, 0),
        (ENDING, 1),
        (START, 0),
        (PLACE, 0),
        (FIELD, 0),
        (RUN, 0),
        (AGAIN, 0),
        (CUE, 0),
    ]
    joined = [
        ((SHAPE, 0), (FLAGS, 0)), ((SHAPE, 0), (GAP, 0), (GAP, 1)), ((FLAGS, 0), (GAP, 0), (GAP, 1)),
        ((FLAGS, -1), (FLAGS, 0)), ((FLAGS, 0), (FLAGS, 1)), ((FLAGS, -1), (FLAGS, 0), (FLAGS, 1)),
        ((SHAPE, -1), (GAP, 0), (SHAPE, 0)), ((SHAPE, 0), (GAP, 1), (SHAPE, 1)), ((SHAPE, -1), (SHAPE, 0), (SHAPE, 1)),
        ((SHAPE, -2), (SHAPE, -1), (SHAPE, 0)), ((SHAPE, 0), (SHAPE, 1), (SHAPE, 2)),
        ((WORD, -1), (SHAPE, 0)), ((WORD, 1), (SHAPE, 0)), ((WORD, -1), (FLAGS, 0)), ((WORD, 1), (FLAGS, 0)),
        ((WORD, -2), (WORD, -1), (SHAPE, 0)), ((WORD, 1), (WORD, 2), (SHAPE, 0)), ((WORD, -1), (GAP, 0), (SHAPE, 0)),
        ((WORD, 0), (SHAPE, 0), (GAP, 1)), ((WORD, 0), (WORD, 1)), ((WORD, -1), (WORD, 0)), ((WORD, 0), (FLAGS, -1)),
        ((FIELD, 0), (SHAPE, 0)), ((FIELD, 0), (FLAGS, 0)), ((RUN, 0), (SHAPE, 0)), ((RUN, 0), (GAP, 0)),
        ((RUN, 0), (WORD, -1)),
        ((PLACE, 0), (SHAPE, 0)), ((PLACE, 0), (FLAGS, 0)), ((PLACE, 0), (SHAPE, 0), (SHAPE, 1)),
        ((ENDING, 0), (SHAPE, 0)), ((ENDING, 0), (FLAGS, 0)), ((START, 0), (SHAPE, 0)),
        ((AGAIN, 0), (SHAPE, 0), (FLAGS, 0)),
        ((CUE, 0), (SHAPE, 0)), ((CUE, 0), (FLAGS, 0)), ((SHAPE, -1), (FLAGS, 0), (SHAPE, 1)),
        ((FLAGS, -2), (FLAGS, -1), (SHAPE, 0)),
    ]  # fmt: skip
    return [(one,) for one in single] + joined


_FEATURES = _features()
FORM = zlib.crc32(repr(_FEATURES).encode())  # weights made for other features are refused
_ORDER = sorted(range(len(_FEATURES)), key=lambda one: -len(_FEATURES[one]))  # those of more parts first
# For each part of a feature: attributes and offsets, [k, 2], of the k features that have it.
_PARTS = [
    np.array([_FEATURES[one][part] for one in _ORDER if len(_FEATURES[one]) > part], dtype=np.int64)
    for part in range(3)
]
_SALT = (np.array(_ORDER, dtype=np.uint64)[:, None] + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xFF51AFD7ED558CCD)


def spans_of(text: str) -> list[tuple[int, int]]:
    """Tokens of a document: runs of letters and digits."""
    return [match.span() for match in _TOKEN.finditer(text)]


def attributes(text: str, plain: str, spans: Sequence[tuple[int, int]], vocabulary: dict[str, int]) -> np.ndarray:
    """[11, tokens] int64; `plain` is the plain form of `text`, `vocabulary` the context words and their numbers."""
    flags_of = gazetteer().flags.get
    written = [text[start:end] for start, end in spans]
    words = [plain[start:end] for start, end in spans]
    flags = [flags_of(word) or (Word.COMMON if is_derived(word) else 0) for word in words]
    numbers = [vocabulary.get(word, 0) for word in words]
    gaps = [text[before[1] : after[0]] for before, after in zip(((0, 0), *spans), spans, strict=False)]
    shapes, endings, starts = zip(*map(_of_word, written, words), strict=True)
    small = {one for one in written if one.islower()}
    again = [1 + (word in small) if one != word else 0 for one, word in zip(written, words, strict=True)]
    rows = [
        numbers, shapes, flags, [_gap(gap) for gap in gaps], endings, starts, _places(gaps),
        _fields(gaps, numbers), _runs(gaps, written), again, _cues(gaps, flags),
    ]  # fmt: skip
    return np.array(rows, dtype=np.int64).reshape(_ATTRIBUTES, len(spans))


def hashed(found: np.ndarray) -> np.ndarray:
    """[F, tokens] rows of the weights from [11, tokens] attributes; beyond the document attributes are -1."""
    padded = np.pad(found, ((0, 0), (_REACH, _REACH)), constant_values=-1).astype(np.uint64)
    at = np.arange(found.shape[1]) + _REACH
    mixed = np.repeat(_SALT, found.shape[1], axis=1)
    for parts in _PARTS:
        mixed[: len(parts)] ^= padded.take(parts[:, :1] * padded.shape[1] + parts[:, 1:] + at)
        mixed *= _MIX
        mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(64 - ROWS_LOG2)).astype(np.int64)


# --- attributes ---


@lru_cache(maxsize=1 << 15)  # most words of a report are of a few thousand
def _of_word(written: str, word: str) -> tuple[int, int, int]:
    """Shape, ending and start; numbers have neither ending nor start."""
    shape = _shape(written)
    if shape >= _NUMBER_SHAPES:
        return shape, 0, 0
    return shape, zlib.crc32(word[-3:].encode()), zlib.crc32(word[:3].encode())


def _shape(written: str) -> int:
    """Letters below 32 by case and length, digits and mixtures from 32."""
    length = len(written)
    if written.isalpha():
        size = length if length < 4 else 4 if length < 6 else 5
        if written.islower():
            return size
        if written.isupper():
            return 6 + size
        return 12 + size if written[0].isupper() and written[1:].islower() else 18 + size
    if not written.isdigit():
        digits = sum(character.isdigit() for character in written)
        return 64 + 8 * written[0].isdigit() + 4 * (2 * digits > length) + min(3, length // 3)
    if length == 4:
        return 36 if written[:2] in ("19", "20") else 37
    if length == 2:
        return 38 + (written <= "12") + (written <= "31") + 3 * (written[0] == "0")
    return 48 + min(length, 15) if length != 1 else 32 + (written == "0")


def _gap(gap: str) -> int:
    """A number for what stands between two tokens; how many spaces, and how long a line is drawn, is all one."""
    if gap == " ":
        return 1
    return zlib.crc32(_SPACES.sub(" ", gap[:3] + gap[-2:] if len(gap) > 5 else gap).encode())


def _places(gaps: Sequence[str]) -> list[int]:
    """Where in its line each token stands: tokens before it up to 3, tokens after it up to 3."""
    found: list[int] = []
    for stop in (*(index for index, gap in enumerate(gaps) if index and "\n" in gap), len(gaps)):
        found += _line(stop - len(found))
    return found


@lru_cache(maxsize=256)
def _line(size: int) -> tuple[int, ...]:
    return tuple(4 * min(3, at) + min(3, size - 1 - at) for at in range(size))


def _fields(gaps: Sequence[str], numbers: Sequence[int]) -> list[int]:
    """The context word before the last colon of the line, with how far away the colon is; 0 without a colon."""
    found, field, away = [], 0, 0
    for index, gap in enumerate(gaps):
        if ":" in gap and index:
            field, away = 1 + numbers[index - 1], 0
        elif "\n" in gap:
            field = 0
        found.append(4 * field + min(3, away) if field else 0)
        away += 1
    return found


def _runs(gaps: Sequence[str], written: Sequence[str]) -> list[int]:
    """Digits in the run of numbers around each number, and which of it the number is; 0 for words."""
    found = [0] * len(gaps)
    index = 0
    while index < len(gaps):
        if not written[index][0].isdigit():
            index += 1
            continue
        stop = index + 1
        while stop < len(gaps) and written[stop][0].isdigit() and len(gaps[stop]) < 4 and "\n" not in gaps[stop]:
            stop += 1
        digits = min(20, sum(len(one) for one in written[index:stop]))
        found[index:stop] = [1 + 8 * digits + min(7, place) for place in range(stop - index)]
        index = stop
    return found


def _cues(gaps: Sequence[str], flags: Sequence[int]) -> list[int]:
    """The last title, role, relative, street or hospital in the line before each token, and how far back."""
    found, cue, away = [], 0, 0
    for gap, flag in zip(gaps, flags, strict=True):
        if "\n" in gap:
            cue = 0
        away += 1
        found.append(cue * 8 + min(7, away) if cue else 0)
        if flag & _CUES:
            cue, away = flag & _CUES, 0
    return found


# --- decisions ---


@dataclass(frozen=True, kw_only=True, eq=False)
class Tagger:
    """`weights` [2**16, 10] int16 of what int8 holds; `vocabulary` the context words; thresholds in their units."""

    weights: np.ndarray
    vocabulary: dict[str, int]
    found: int
    joined: int
    digits: int
    common: int
    unlike: int
    ordinary: int

    def find(self, view: View, language: str) -> None:
        """Add to what the rules found in a French document, and let go of what is prose; others are left alone."""
        if not in_french(view, language):
            return
        spans = spans_of(view.text)
        if spans:
            found = attributes(view.text, view.plain, spans, self.vocabulary)
            self.decide(view, spans, self.scores(found), self._doubts(found))

    def decide(self, view: View, spans: Sequence[tuple[int, int]], scores: np.ndarray, doubts: np.ndarray) -> None:
        """Let go and add by [tokens, 10] scores and [tokens] doubts; a find takes in a rule's of its kind beside it."""
        margin = scores[:, 1:].max(axis=1) - scores[:, 0]
        self._let_go(view, spans, margin)
        kinds = [KINDS[label] for label in scores[:, 1:].argmax(axis=1).tolist()]
        margin = margin - doubts
        by_rules = tuple(view.identifiers)
        for first, last in _runs_of_one_kind(view.text, spans, self._found(view, spans, margin, kinds), kinds):
            kind = kinds[first]
            own = spans[first][0], spans[last][1]
            start, end = _with_neighbours(view.text, *own, kind, by_rules)
            short = end - start <= _SHORT_MAX and not view.text[start:end].isalpha()
            if short and (kind != "date" or first == last):  # "2/5" may be a day
                continue
            if kind == "person_name" and _OF_NO_PERSON.search(view.plain, max(0, start - 24), start):
                continue
            unlike = (start, end) == own and kind in _WORDY_KINDS and _is_unlike_names(view, spans[first : last + 1])
            if not unlike or margin[first : last + 1].max() >= self.unlike:
                view.note(start, end, kind, "tagger")

    def scores(self, found: np.ndarray) -> np.ndarray:
        """[tokens, 10] int32 from [11, tokens] attributes."""
        total: np.ndarray = self.weights.take(hashed(found), axis=0).sum(axis=0, dtype=np.int16)  # 100 times 127 fits
        return total.astype(np.int32)

    def _doubts(self, found: np.ndarray) -> np.ndarray:
        """[tokens] how much lower each margin is taken, from [11, tokens] attributes."""
        shapes, flags = found[SHAPE], found[FLAGS]
        numbers = (shapes >= _NUMBER_SHAPES) & (shapes < _MIXED_SHAPES)
        plain_words = (flags & _COMMON != 0) | ((shapes < _NUMBER_SHAPES) & (shapes % 6 == 1))  # 1: a single letter
        return np.where(numbers, self.digits, np.where(plain_words, self.common, 0))

    def _found(
        self, view: View, spans: Sequence[tuple[int, int]], margin: np.ndarray, kinds: Sequence[Kind]
    ) -> list[int]:
        """Tokens to add, in order: sure ones, and likely ones beside those or beside what a rule found."""
        found = set(np.flatnonzero(margin >= self.found).tolist())
        known = set(found)
        covered: set[int] = set()
        for one in view.identifiers:
            tokens = _tokens_of(one, spans)
            known.update(tokens)
            covered |= {index for index in tokens if one.start <= spans[index][0] and spans[index][1] <= one.end}
        likely = np.flatnonzero(margin >= self.joined).tolist()
        for index, step in [(index, -1) for index in likely] + [(index, 1) for index in reversed(likely)]:
            if index not in known and index + step in known:
                first = min(index, index + step)
                if "\n" not in view.text[spans[first][1] : spans[first + 1][0]]:
                    known.add(index)
                    found.add(index)
        cited, public = _cited(view.text), public_pages(view.plain)
        return sorted(
            index
            for index in found - covered
            if not _lies_in(spans[index], public)
            and not (kinds[index] == "person_name" and _is_no_name(view.text, *spans[index]))
            and not (kinds[index] in _WORDY_KINDS and _is_label(view, *spans[index]))
            and view.masked[spans[index][0]] != PLACEHOLDER
            and (kinds[index] not in _WORDY_KINDS or not _is_of_medicine(view, spans[index], cited))
        )

    def _let_go(self, view: View, spans: Sequence[tuple[int, int]], margin: np.ndarray) -> None:
        """Forget the rules' short names all of whose words stand in ordinary prose."""
        view.identifiers[:] = [
            one
            for one in view.identifiers
            if one.kind != "person_name"
            or one.layer != "gazetteer"
            or one.start in view.announced
            or not 0 < len(tokens := _tokens_of(one, spans)) <= _DOUBTFUL_TOKENS
            or margin[tokens.start : tokens.stop].max() >= self.ordinary
        ]


def _runs_of_one_kind(
    text: str, spans: Sequence[tuple[int, int]], found: Sequence[int], kinds: Sequence[Kind]
) -> list[tuple[int, int]]:
    """First and last token of each identifier among the tokens found."""
    runs: list[tuple[int, int]] = []
    for index in found:
        before = index - 1
        goes_on = bool(runs) and runs[-1][1] == before and kinds[before] == kinds[index]
        if goes_on and _is_one(text, spans[before][1], spans[index][0], kinds[index]):
            runs[-1] = (runs[-1][0], index)
        else:
            runs.append((index, index))
    return runs


def _with_neighbours(text: str, start: int, end: int, kind: Kind, by_rules: Sequence[Identifier]) -> tuple[int, int]:
    """Bounds that take in the rules' parts of the same identifier right before and behind."""
    first, last = start, end
    for one in by_rules:
        if _NARROW.get(one.kind, one.kind) != kind:
            continue
        if one.end <= start and _is_one(text, one.end, start, kind):
            first = one.start
        elif end <= one.start and _is_one(text, end, one.start, kind):
            last = one.end
    return first, last


def _is_one(text: str, end: int, start: int, kind: Kind) -> bool:
    """Whether two parts of this kind, one up to `end` and one from `start`, are one identifier."""
    return (_SAME_NAME if kind == "person_name" else _SAME).fullmatch(text, end, start) is not None


def _cited(text: str) -> list[tuple[int, int]]:
    """Lists of authors of publications."""
    return [match.span() for match in _CITATION.finditer(text)] if "et al" in text else []


def _is_of_medicine(view: View, span: tuple[int, int], cited: Sequence[tuple[int, int]]) -> bool:
    """Whether the token's first word stands for a disease or a device, a drug before its dose, or a cited author."""
    if _DOSE.match(view.plain, span[1]) or _lies_in(span, cited):
        return True
    index = view.first_word_from(span[0])
    return index < len(view.starts) and view.starts[index] < span[1] and eponym(view, index)


def _is_no_name(text: str, start: int, end: int) -> bool:
    """Whether a token is a number, a stop word in small letters ("vue") or an article cut to its letter ("c'est")."""
    written = text[start:end]
    if written.isdigit():
        return True
    if not written.islower():
        return False
    flag = gazetteer().flags.get(written, 0)
    stops = flag & Word.AUTHOR or (flag & Word.STOP and not flag & (Word.PARTICLE | Word.FIRST | Word.LAST))
    return bool(stops) or (end - start == 1 and text[end : end + 1] in ("'", "’"))


def _is_unlike_names(view: View, spans: Sequence[tuple[int, int]]) -> bool:
    """Whether no token is a known name or, unknown, begins with its only capital: "Ateliers", "derma", "BELAC"."""
    for start, end in spans:
        word, written = view.plain[start:end], view.text[start:end]
        flag = gazetteer().flags.get(word, 0)
        if flag & NAMES_ONLY or not written.isalpha():
            return False
        common = flag & Word.COMMON or is_derived(word) or _is_inflected(word)
        if not (common or written.islower() or written.isupper()):
            return False
    return True


def _is_inflected(word: str) -> bool:
    """Whether a word is the plural or the feminine of a common one that is nobody's name: "discutés", "excusée"."""
    return len(word) >= _INFLECTED_LETTERS_MIN and any(
        word.endswith(ending)
        and gazetteer().flags.get(word.removesuffix(ending), 0) & (Word.COMMON | NAMES_ONLY) == Word.COMMON
        for ending in ("s", "e", "es")
    )


def _is_label(view: View, start: int, end: int) -> bool:
    """Whether a token is the field of a form: a common word or an acronym before a colon."""
    if _COLON.match(view.text, end) is None:
        return False
    word = view.plain[start:end]
    flag = gazetteer().flags.get(word, 0)
    acronym = end - start <= _ACRONYM_MAX and view.text[start:end].isupper()
    return not flag & NAMES_ONLY and (bool(flag & Word.COMMON) or acronym or is_derived(word))


def _lies_in(span: tuple[int, int], ranges: Sequence[tuple[int, int]]) -> bool:
    return any(start <= span[0] < end for start, end in ranges)


def _tokens_of(one: Identifier, spans: Sequence[tuple[int, int]]) -> range:
    """Indices of the tokens that the identifier touches."""
    return range(bisect_right(spans, one.start, key=itemgetter(1)), bisect_left(spans, one.end, key=itemgetter(0)))


def in_french(view: View, language: str) -> bool:
    """Whether the document is French and this part of it not English, or of unknown language with French words."""
    if language == "fr":
        return detect(view.text) != "en"
    return language == "unknown" and len(_FRENCH.intersection(view.words)) >= _FRENCH_WORDS_MIN


def find(view: View, language: str) -> None:
    """`Tagger.find` by the project's weights, which are read when the first French document comes."""
    if in_french(view, language):
        _project().find(view, language)


@cache
def _project() -> Tagger:
    return load(WEIGHTS)


def digest(path: Path) -> str:
    """Twelve digits that name the weights of one file. Raises ConfigError where it is missing."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise ConfigError(f"tagger weights {path}: {type(error).__name__}; {_MAKE}") from None


def load(path: Path) -> Tagger:
    """Weights and words of one file. Raises ConfigError where it is missing, damaged or made for other features."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            weights, numbers = arrays["weights"], [int(number) for number in arrays["numbers"]]
            words = arrays["words"].tobytes().decode("ascii").split()
    except (OSError, EOFError, KeyError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(f"tagger weights {path}: {type(error).__name__}; {_MAKE}") from None
    if (
        weights.shape != (2**ROWS_LOG2, 1 + len(KINDS))
        or weights.dtype != np.int8
        or len(numbers) != 1 + len(THRESHOLDS)
    ):
        raise ConfigError(f"tagger weights {path}: {weights.dtype} {weights.shape}, {len(numbers)} numbers; {_MAKE}")
    if numbers[0] != FORM:
        raise ConfigError(f"tagger weights {path}: made for features {numbers[0]}, these are {FORM}; {_MAKE}")
    vocabulary = {word: number for number, word in enumerate(words, 1)}
    return Tagger(
        weights=weights.astype(np.int16), vocabulary=vocabulary, **dict(zip(THRESHOLDS, numbers[1:], strict=True))
    )


def save(path: Path, made: Tagger) -> None:
    """Write weights and words, the same bytes for the same content."""
    words = np.frombuffer(" ".join(made.vocabulary).encode("ascii"), dtype=np.uint8)
    numbers = np.array([FORM, *(getattr(made, name) for name in THRESHOLDS)], dtype=np.int64)
    np.savez_compressed(path, weights=made.weights.astype(np.int8), words=words, numbers=numbers)
