"""The words of `anatomy.toml`: places of the body and the cues around them, and where a document says them."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from enum import IntFlag, auto
from functools import cache
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

from shards.reports.language import Language
from shards.reports.lexicon.terms import Pieces, lower
from shards.reports.lexicon.trie import END, Node, frozen, search

# What a segmentation of the whole body gives, sides and lobes fused.
ANATOMIES = (
    "adrenal gland", "aorta", "bladder", "brain", "cervical vertebrae", "clavicle", "duodenum", "erector spinae",
    "esophagus", "face", "femur", "gallbladder", "gluteus", "heart", "hip", "humerus", "iliac artery", "iliac vein",
    "iliopsoas", "inferior vena cava", "kidney", "large bowel", "liver", "lumbar vertebrae", "lung", "pancreas",
    "portal vein", "pulmonary artery", "rib", "sacrum", "scapula", "small bowel", "spleen", "stomach",
    "thoracic vertebrae", "trachea",
)  # fmt: skip
# What reports speak of besides.
ELSEWHERE = (
    "abdominal cavity", "breast", "devices", "limb bones", "lymph nodes", "mediastinum", "neck", "pelvic organs",
    "soft tissue", "sternum", "thyroid", "vessels",
)  # fmt: skip

GROUPS = {
    "bones": ("rib", "thoracic vertebrae", "scapula", "clavicle"),
    "upper abdomen": ("liver", "gallbladder", "spleen", "pancreas", "adrenal gland", "kidney", "stomach"),
}
SPINE = "spine"  # a vertebra of no named level: that of the last level named, thoracic where there was none
SPINES = ("cervical vertebrae", "thoracic vertebrae", "lumbar vertebrae")
SKELETON = frozenset(
    {*SPINES, "rib", "scapula", "clavicle", "sternum", "humerus", "femur", "hip", "sacrum", "limb bones", SPINE}
)
# A group gives way to any of these in its clause.
GIVES_WAY_TO = {"bones": SKELETON, "upper abdomen": frozenset((*GROUPS["upper abdomen"], "abdominal cavity"))}

COMPOUND_MIN = 8  # letters of a word whose root is looked at
_PREFIXES = "peri|para|intra|retro|sub|pre|post|inter|supra|infra|endo|epi|juxta|trans|extra|bi|hydro|hemo|hemi|poly"
_DISEASED = re.compile("ectom|megal|stom[iy]|plast|(?:it[ie]s?|os[ei]s?)$")  # of a root: operated, enlarged, inflamed


class Cue(IntFlag):
    """What words that name no place do in their sentence."""

    VERB = auto()  # a predicate: in a sentence that has one, a part without is no clause
    NEGATION = auto()
    NORMAL = auto()
    REGULAR = auto()  # normal of an organ, but as often the shape of a lesion
    ABNORMAL = auto()
    FINDING = auto()  # something that can be there or not
    SEEN = auto()  # a predicate of being there: a denial before it reaches it
    MEASURE = auto()  # a size, by itself neither normal nor abnormal
    CHANGE = auto()  # a comparison with an earlier examination
    SPLIT = auto()  # between clauses
    TURN = auto()  # between clauses, and what was denied before is not denied after
    MARK = auto()  # between entries of a list, whatever they hold
    REFERENCE = auto()  # the place that follows only says where something else lies
    REFERENCE_AFTER = auto()  # the place before does
    STUDY = auto()  # the examination as such
    TECHNIQUE = auto()  # how it was made
    LIMIT = auto()  # what it cannot show
    ADVICE = auto()  # what to do next
    BACK = auto()  # points to what was said before
    RELATIVE = auto()  # at the start of a part: it belongs to what stands before
    PREPOSITION = auto()  # at the start of a part: it belongs to what follows


STRONG, LOOSE, GROUP, WEAK, NO_PLACE = range(5)  # how firmly words stand for a place
_FINDING, _ABNORMAL = Cue.FINDING.value, Cue.ABNORMAL.value  # operations on an IntFlag make an object each
_SPLIT, _TURN, _MARK = Cue.SPLIT.value, Cue.TURN.value, Cue.MARK.value

Entry = tuple[int, tuple[str, ...], int]  # level, places, cues
Hit = tuple[int, int, Entry]  # tokens [first, last) and what they stand for

_FOLDED = str.maketrans("àâäáãåçèéêëìîïíñòôöóõùûüúÿ’İ", "aaaaaaceeeeiiiinooooouuuuy'i")
_TOKEN = re.compile(r"(\d+(?:[.,]\d+)+|[a-z0-9œæ]+|[,;\"•·])")


def fold(text: str) -> str:
    """Lower case without accents, character for character: offsets stay those of `text`."""
    lowered = lower(text)
    if lowered.isascii():
        return lowered
    # Without its accents, side ("côté") would read as rib ("côte").
    return lowered.replace("côté", "____").translate(_FOLDED)


def _forms(word: str) -> set[str]:
    """The word and its plural."""
    forms = {word}
    if len(word) > 3 and word.isalpha():
        if word[-1] not in "sxz":
            forms.add(word + "s")
        if word.endswith("y"):
            forms.add(word[:-1] + "ies")
        if word.endswith("al"):
            forms.add(word[:-1] + "ux")
    return forms


def _insert(trie: dict[str, Any], phrase: str, entry: Entry) -> None:
    """Put a phrase and its plurals in; an entry that stands there already keeps its places and gets the cues."""
    nodes = [trie]
    for word in _TOKEN.findall(fold(phrase)):
        nodes = [node.setdefault(form, {}) for node in nodes for form in _forms(word)]
    for node in nodes:
        node[END] = _joined(node.get(END), entry)


def _joined(there: Entry | None, entry: Entry) -> Entry:
    """One entry of two under the same words: the place of the first, the cues of both."""
    if there is None:
        return entry
    level, places = there[:2] if there[0] != NO_PLACE else entry[:2]
    return level, places, there[2] | entry[2]


def _levels() -> Iterable[tuple[str, str]]:
    """(vertebral level as written, its place)."""
    for letters, count, place in (
        (("c",), 7, "cervical vertebrae"),
        (("t", "th", "d"), 12, "thoracic vertebrae"),
        (("l",), 6, "lumbar vertebrae"),
        (("s",), 2, "sacrum"),
    ):
        for number in range(1, count + 1):
            for letter in letters:
                yield f"{letter}{number}", place


def _phrases(terms: str) -> Iterable[str]:
    return (phrase for part in terms.split(",") if (phrase := " ".join(part.split())))


@cache
def _tables() -> dict[str, dict[str, Any]]:
    with open(Path(__file__).with_name("anatomy.toml"), "rb") as file:
        return tomllib.load(file)


@cache
def lexicon(language: Language) -> Node:
    """The trie of all phrases, each with its Entry; of both languages where it is unknown."""
    tables = _tables()
    languages = ("en", "fr") if language == "unknown" else (language,)
    cues: dict[str, Any] = {}
    for mark in ",;":
        _insert(cues, mark, (NO_PLACE, (), _SPLIT))
    for mark in '"•·':
        _insert(cues, mark, (NO_PLACE, (), _TURN | _MARK))
    for spoken in languages:
        for names, terms in tables["cues"][spoken].items():
            kinds = sum(Cue[name.upper()].value for name in names.split("+"))
            for phrase in _phrases(terms):
                _insert(cues, phrase, (NO_PLACE, (), kinds))
    trie: dict[str, Any] = {}
    for spoken in languages:
        for phrase in _phrases(tables["not_a_place"][spoken]["none"]):
            _insert(trie, phrase, (NO_PLACE, (), 0))
        for level, table in ((STRONG, "places"), (LOOSE, "loose"), (GROUP, "groups"), (WEAK, "weak")):
            for names, terms in tables[table][spoken].items():
                for phrase in _phrases(terms):
                    _insert(trie, phrase, (level, tuple(names.split("+")), _found_in(cues, phrase)))
    for name, place in _levels():
        _insert(trie, name, (STRONG, (place,), 0))
    _merge(trie, cues)
    return frozen(trie)


def _found_in(cues: Mapping[str, Any], phrase: str) -> int:
    """What the words of a phrase say of a finding: "pleural effusion" is a place and a finding, too."""
    kinds = 0
    for word in _TOKEN.findall(fold(phrase)):
        entry: Entry | None = cues.get(word, {}).get(END)
        kinds |= entry[2] if entry else 0
    return kinds & (_FINDING | _ABNORMAL)


def _merge(trie: dict[str, Any], other: Mapping[str, Any]) -> None:
    for word, node in other.items():
        if word == END:
            trie[END] = _joined(trie.get(END), node)
        else:
            _merge(trie.setdefault(word, {}), node)


class _Folds(dict[str, str]):
    """Piece of a text -> the word that is looked up, '' for other marks than those between clauses; remembered."""

    LIMIT = 65_536

    def __missing__(self, piece: str) -> str:
        words = _TOKEN.findall(fold(piece))
        if len(self) >= self.LIMIT:  # names and numbers never end
            self.clear()
        self[piece] = found = words[0] if len(words) == 1 else ""
        return found


_FOLDS = _Folds()


class Words(NamedTuple):
    """Words of a stretch of text, folded, and where they stand; numbers and marks between clauses are words, too."""

    words: list[str]
    starts: list[int]
    ends: list[int]
    length: int  # characters of the text


def folded(pieces: Pieces) -> Words:
    """The words of pieces."""
    words = list(map(_FOLDS.__getitem__, pieces.tokens))
    starts, ends = compress(pieces.starts, words), compress(pieces.ends, words)
    return Words(list(filter(None, words)), list(starts), list(ends), len(pieces.text))


@cache
def _roots() -> tuple[re.Pattern[str], dict[str, str]]:
    """Compound words by their root, and root -> place."""
    places = {root: place for place, roots in _tables()["roots"].items() for root in _phrases(roots)}
    roots = "|".join(sorted(places, key=len, reverse=True))
    return re.compile(rf"(?:{_PREFIXES})?({roots})"), places


def _compound(word: str) -> Node | None:
    """The node of a compound word that no list holds, by its root ("perigastric", "nephrectomized")."""
    pattern, places = _roots()
    match = pattern.match(word)
    if match is None:
        return None
    return Node((STRONG, (places[match[1]],), _ABNORMAL if _DISEASED.search(word, match.end()) else 0), None)


class _Nodes(dict[str, Node | None]):
    """Word -> the node that phrases beginning with it start from, remembered: one lookup for most words."""

    LIMIT = 65_536

    def __init__(self, language: Language) -> None:
        super().__init__()
        self.begins = lexicon(language).following or {}

    def __missing__(self, word: str) -> Node | None:
        node = self.begins.get(word)
        if node is None and len(word) >= COMPOUND_MIN:
            node = _compound(word)
        if len(self) >= self.LIMIT:  # names and numbers never end
            self.clear()
        self[word] = node
        return node


_nodes = cache(_Nodes)


def find_phrases(words: Sequence[str], language: Language) -> list[Hit]:
    """The longest phrases of the lexicon, from left to right, none within another."""
    return search(words, map(_nodes(language).__getitem__, words))
