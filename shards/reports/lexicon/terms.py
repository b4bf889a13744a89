"""Search of a report for the words of the tables beside this file: findings, the cues around them, places."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, compress, product
from pathlib import Path
from typing import Any, Literal, NamedTuple

from shards.errors import ConfigError
from shards.reports.lexicon.trie import END, Node, frozen, search

Language = Literal["en", "fr"]

FOLDER = Path(__file__).parent

# A word with its digits ("L1", "12mm"), a decimal number, or a mark that may end a clause or part a list. Hyphens
# inside of words are no token: "ground-glass" is two words.
_TOKEN = re.compile(r"(\d+(?:[.,]\d+)+|\w+|[.,;:()?!/\"“”•·\[\]]|(?<=\s)[-–—]+(?=\s)|\n[ \t]*\n)")

PARAGRAPH = "\n\n"
HARD = frozenset('.;?!"“”•') | {PARAGRAPH}
SOFT = frozenset(",:()/[]-")

_ARTICLES: Mapping[str, frozenset[str]] = {
    "en": frozenset(("the", "a", "an", "s")),
    "fr": frozenset(("le", "la", "les", "l", "un", "une", "des", "du", "de", "d", "ce", "cette", "qu", "que")),
}
_IRREGULAR: Mapping[str, Mapping[str, str]] = {
    "en": {
        "atelectases": "atelectasis", "metastases": "metastasis", "bronchiectases": "bronchiectasis",
        "pneumothoraces": "pneumothorax", "pneumothoraxes": "pneumothorax", "vertebrae": "vertebra", "hila": "hilum",
        "hili": "hilum", "hilus": "hilum", "bronchi": "bronchus", "septa": "septum", "bullae": "bulla",
        "apices": "apex", "foci": "focus", "emboli": "embolus", "thrombi": "thrombus", "calculi": "calculus",
        "sequelae": "sequela", "sequels": "sequela", "bases": "base", "pleurae": "pleura", "diagnoses": "diagnosis",
        "tumour": "tumor", "tumours": "tumor", "colour": "color", "cannot": "cannot", "oedematous": "edematous",
        "atheromata": "atheroma", "carcinomata": "carcinoma", "was": "was", "has": "has", "is": "is",
        "indices": "index", "fibroses": "fibrosis", "stenoses": "stenosis", "haemothorax": "hemothorax",
    },
    "fr": {
        # The accent alone parts the rib from the side, and the preposition from the verb.
        "côte": "côte", "côtes": "côte", "cote": "cote", "côté": "cote", "côtés": "cote", "cotes": "côte", "à": "à",
        "base": "base", "bases": "base", "mais": "mais", "dans": "dans", "sans": "sans", "culs": "cul", "sacs": "sac",
        "os": "os", "ou": "ou", "où": "où", "dès": "dès", "est": "est", "plus": "plus", "hors": "hors",
    },
}  # fmt: skip
_FOLD = str.maketrans("àâäáãåçéèêëíìîïñóòôöõúùûüýÿ", "aaaaaaceeeeiiiinooooouuuuyy")


def stem(word: str, language: Language) -> str:
    """The form under which a lower-case word is looked up; '' for articles, which are not looked up at all.

    Light on purpose: plural and, in French, feminine endings. It need not give words that exist, only the same for
    forms of one word.
    """
    if word in _ARTICLES[language]:
        return ""
    regular = _IRREGULAR[language].get(word)
    if regular is not None:
        return regular
    word = word.translate(_FOLD).replace("œ", "oe").replace("æ", "ae").replace("oe", "e").replace("ae", "e")
    if len(word) <= 3 or not word[-1].isalpha():
        return word
    if language == "fr":
        if word.endswith("aux") and len(word) > 5:
            return word[:-3] + "al"
        if word[-1] in "sx":
            word = word[:-1]
        return word.rstrip("e") if len(word) > 3 else word
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("sses", "xes", "ches", "shes")):
        return word[:-2]
    if word[-1] == "s" and word[-2] not in "sui":
        return word[:-1]
    return word


class Pieces(NamedTuple):
    """Words and marks of one stretch of text in lower case, and their characters [start, end) in it.

    Cut once for all word lists, each of which looks them up in its own form.
    """

    text: str
    tokens: list[str]
    starts: list[int]
    ends: list[int]


def cut(lowered: str) -> Pieces:
    """`lowered`: see `lower`."""
    pieces = _TOKEN.split(lowered)  # what lies between tokens, and tokens, in turn
    bounds = list(accumulate(map(len, pieces)))
    return Pieces(lowered, pieces[1::2], bounds[:-1:2], bounds[1::2])


class Tokens(NamedTuple):
    """Pieces as the lists of this module look them up; articles, and "·", are none."""

    stems: list[str]
    starts: list[int]
    ends: list[int]
    text: str

    def between(self, first: int, last: int) -> str:
        """What stands between two tokens, articles and blanks among it."""
        return self.text[self.ends[first] : self.starts[last]]


_MARKS = {"-": "-", "–": "-", "—": "-", "·": ""}


class _Stems(dict[str, str]):
    """Token -> what it is looked up as, remembered: a lookup costs less than a call, and reports repeat their words."""

    LIMIT = 65_536

    def __init__(self, language: Language) -> None:
        super().__init__()
        self.language = language

    def __missing__(self, word: str) -> str:
        if word[0].isalnum():
            found = stem(word, self.language)
        elif word[0] == "\n":
            found = PARAGRAPH
        else:
            found = _MARKS.get(word[0], word)
        if len(self) >= self.LIMIT:  # names and numbers never end
            self.clear()
        self[word] = found
        return found


_STEMS: Mapping[str, _Stems] = {"en": _Stems("en"), "fr": _Stems("fr")}


def stemmed(pieces: Pieces, language: Language) -> Tokens:
    """The tokens of pieces."""
    stems = list(map(_STEMS[language].__getitem__, pieces.tokens))
    starts, ends = compress(pieces.starts, stems), compress(pieces.ends, stems)
    return Tokens(list(filter(None, stems)), list(starts), list(ends), pieces.text)


def lower(document: str) -> str:
    """Lower case with every character in its place; the few that would grow (İ) stay as they are."""
    lowered = document.lower().replace("’", "'")
    if len(lowered) == len(document):
        return lowered
    return "".join(small if len(small := letter.lower()) == 1 else letter for letter in document)


class Entry(NamedTuple):
    """What a phrase stands for: ("finding", "pneumothorax"), ("part", "heart"), ("before", "absent"), ..."""

    kind: str
    name: str


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change that means a finding with a part: `of` part -> concept, `default` without one; `normal`: absent."""

    of: Mapping[str, str] = field(default_factory=dict)
    default: str | None = None
    normal: bool = False
    also_part: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Term:
    """All that one phrase stands for.

    `cues` are (kind, name) of before, after and history; `marks` the kinds that part clauses and lists; `verbs` places
    of finite verbs within the phrase. `plain`: it may stand among the words that describe a finding. `head`: it is a
    finding or a change.
    """

    finding: str | None
    change: Change | None
    part: str | None
    cues: tuple[Entry, ...]
    marks: frozenset[str]
    verbs: tuple[int, ...]
    plain: bool
    sides: tuple[str, ...]
    positions: tuple[str, ...]
    head: bool


class Match(NamedTuple):
    """A phrase found in tokens [first, last]."""

    first: int
    last: int
    term: Term


_CUES = frozenset(("before", "after", "history"))
_PLAIN = frozenset(("part", "change", "affirmed", "side", "position"))


def _expand(phrase: str) -> Iterator[str]:
    """Every wording of a phrase with its choices spelled out. Raises ConfigError for a choice inside of a choice."""
    if re.search(r"\([^)]*\(", phrase) or phrase.count("(") != phrase.count(")"):
        raise ConfigError(f"lexicon: brackets do not match in {phrase!r}; choices (a|b) cannot be nested")
    pieces = re.split(r"\(([^)]*)\)", phrase)
    for chosen in product(*(piece.split("|") if i % 2 else (piece,) for i, piece in enumerate(pieces))):
        yield " ".join("".join(chosen).split())


class Trie:
    """Phrases by their stems, for longest matches."""

    def __init__(
        self, phrases: Iterable[tuple[str, Entry]], language: Language, changes: Mapping[str, Change],
        verbs: frozenset[str] = frozenset(),
    ) -> None:  # fmt: skip
        """`verbs`: stems of finite verbs. Raises ConfigError for a phrase of which nothing is left without articles."""
        entries: dict[tuple[str, ...], dict[Entry, None]] = {}
        for phrase, entry in phrases:
            for wording in _expand(phrase):
                stems = tuple(stemmed(cut(wording), language).stems)
                if not stems:
                    raise ConfigError(f"lexicon: a {language} phrase of {entry} has no word; write one")
                entries.setdefault(stems, {})[entry] = None
        root: dict[str, Any] = {}
        for stems, found in entries.items():
            node = root
            for word in stems:
                node = node.setdefault(word, {})
            node[END] = self._term(stems, found, changes, verbs)
        self._begins: Mapping[str, Node] = frozen(root).following or {}

    @staticmethod
    def _term(
        stems: Sequence[str], found: Iterable[Entry], changes: Mapping[str, Change], verbs: frozenset[str]
    ) -> Term:
        by_kind: dict[str, list[str]] = {}
        for entry in found:
            by_kind.setdefault(entry.kind, []).append(entry.name)
        finding = by_kind.get("finding", [None])[0]
        change = changes[by_kind["change"][0]] if "change" in by_kind and finding is None else None
        part = by_kind.get("part", [change.also_part if change else None])[0]
        return Term(
            finding=finding, change=change, part=part, cues=tuple(entry for entry in found if entry.kind in _CUES),
            marks=frozenset(by_kind) - _CUES - {"finding", "change", "part", "side", "position"},
            # A verb inside of a finding ("contour is elevated") begins no clause of its own.
            verbs=() if finding or change else tuple(i for i, word in enumerate(stems) if word in verbs),
            plain=_PLAIN.issuperset(by_kind), sides=tuple(by_kind.get("side", ())),
            positions=tuple(by_kind.get("position", ())), head=finding is not None or change is not None,
        )  # fmt: skip

    def find(self, stems: Sequence[str]) -> list[Match]:
        """From left to right the longest phrase at each place; what one has taken begins no other."""
        found = search(stems, map(self._begins.get, stems))
        return [Match(first, end - 1, term) for first, end, term in found]


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """All tables of one language. `places` is searched apart, since "apical scarring" is a finding and a place.

    `place_follows`: words of place stand behind what they are told of, as French adjectives do.
    """

    terms: Trie
    places: Trie
    place_follows: bool


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads((FOLDER / name).read_text("utf-8"))


@cache
def concepts() -> tuple[str, ...]:
    """Every finding that `entities` can give, in the order of the tables."""
    tables = _read("findings.toml")
    names = dict.fromkeys(tables["finding"])
    for change in tables["change"].values():
        names.update(
            dict.fromkeys([*change.get("of", {}).values(), *([change["default"]] if "default" in change else [])])
        )
    return tuple(names)


def _cues(tables: Mapping[str, Any]) -> Iterable[tuple[Entry, Mapping[str, Sequence[str]]]]:
    for kind, body in tables.items():
        if "en" in body:
            yield Entry(kind, ""), body
        else:
            for name, table in body.items():
                yield Entry(kind, name), table


@cache
def vocabulary(language: Language) -> Vocabulary:
    """The tables of one language as tries, built once per process (some tenths of a second)."""
    findings, cues, places = _read("findings.toml"), _read("cues.toml"), _read("places.toml")
    changes = {
        name: Change(**{key: value for key, value in table.items() if key not in ("en", "fr")})
        for name, table in findings["change"].items()
    }
    wordings = (wording for phrase in cues["verb"][language] for wording in _expand(phrase))
    verbs = frozenset(word for wording in wordings for word in stemmed(cut(wording), language).stems)
    terms = [
        (phrase, Entry(kind, name))
        for kind in ("finding", "part", "change")
        for name, table in findings[kind].items()
        for phrase in table[language]
    ]
    terms += [(phrase, entry) for entry, table in _cues(cues) for phrase in table[language]]
    place_terms = [
        (phrase, Entry(kind, name))
        for kind, tables in places.items()
        for name, table in tables.items()
        for phrase in table[language]
    ]
    return Vocabulary(
        terms=Trie(terms, language, changes, verbs), places=Trie(place_terms, language, changes),
        place_follows=language == "fr",
    )  # fmt: skip
