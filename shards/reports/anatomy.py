"""What a report says of each anatomy: its sentences and clauses by place, normal or abnormal (arXiv 2501.14548, 5.2).

Rules, no model. A sentence is cut into clauses where they speak of different places and can each stand alone; a clause
belongs to every place that it names. One that names none goes on with the place of the one before. Places outside of
the 36 anatomies are kept apart, so that nothing said of a lymph node makes an artery abnormal.
"""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntFlag, auto
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Protocol

from shards.reports.language import Language, Span
from shards.reports.lexicon.terms import lower
from shards.reports.sections import Section

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
_SKELETON = frozenset(
    {*SPINES, "rib", "scapula", "clavicle", "sternum", "humerus", "femur", "hip", "sacrum", "limb bones", SPINE}
)
# A group gives way to any of these in its clause.
_GIVES_WAY_TO = {"bones": _SKELETON, "upper abdomen": frozenset((*GROUPS["upper abdomen"], "abdominal cavity"))}

COMPOUND_MIN = 8  # letters of a word whose root is looked at
_PREFIXES = "peri|para|intra|retro|sub|pre|post|inter|supra|infra|endo|epi|juxta|trans|extra|bi|hydro|hemo|hemi|poly"
_DISEASED = re.compile("ectom|megal|stom[iy]|plast|(?:it[ie]s?|os[ei]s?)$")  # of a root: operated, enlarged, inflamed
REFERENCE_REACH = 5  # tokens after "adjacent to" in which a place only says where something else lies
_DEVICES = frozenset({"support_device", "surgical_material", "orthopedic_hardware", "joint_prosthesis"})

Status = Literal["normal", "abnormal"]
Use = Literal["named", "carried", "elsewhere", "report", "technique", "none"]


class Found(Protocol):
    """What is read of an entity: see `shards.reports.entities.Entity`."""

    @property
    def concept(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def status(self) -> str: ...


@dataclass(frozen=True, kw_only=True)
class AnatomyText:
    """What findings and impression say of one place, as spans of the document in its order."""

    anatomy: str
    status: Status
    findings: tuple[Span, ...] = ()
    impression: tuple[Span, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SentenceUse:
    """What became of one sentence of findings or impression.

    "named": it names one of the 36 anatomies; "carried": it goes on with those of the sentence before; "elsewhere": it
    is about places outside of them; "report": about the examination as a whole, or advice; "technique"; "none".
    """

    span: Span
    use: Use
    places: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Survey:
    """A report by place.

    `negatives`: statements on the report as a whole that deny or call it normal. `parts`: stretches between separators
    with what each says, whatever its place.
    """

    anatomies: tuple[AnatomyText, ...]
    elsewhere: tuple[AnatomyText, ...]
    sentences: tuple[SentenceUse, ...]
    negatives: tuple[Span, ...]
    parts: tuple[tuple[int, int, Status | None], ...]


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


# Plain numbers, since operations on an IntFlag make an object each.
_VERB, _NEGATION, _NORMAL, _ABNORMAL = Cue.VERB.value, Cue.NEGATION.value, Cue.NORMAL.value, Cue.ABNORMAL.value
_FINDING, _SEEN, _MEASURE, _CHANGE = Cue.FINDING.value, Cue.SEEN.value, Cue.MEASURE.value, Cue.CHANGE.value
_SPLIT, _TURN, _MARK = Cue.SPLIT.value, Cue.TURN.value, Cue.MARK.value
_PREPOSITION, _RELATIVE, _REGULAR = Cue.PREPOSITION.value, Cue.RELATIVE.value, Cue.REGULAR.value
_REFERENCE, _REFERENCE_AFTER = Cue.REFERENCE.value, Cue.REFERENCE_AFTER.value
_STUDY, _TECHNIQUE, _LIMIT = Cue.STUDY.value, Cue.TECHNIQUE.value, Cue.LIMIT.value
_ADVICE, _BACK = Cue.ADVICE.value, Cue.BACK.value
_STRONG, _LOOSE, _GROUP, _WEAK, _NO_PLACE = range(5)

_Entry = tuple[int, tuple[str, ...], int]  # level, places, cues
_Hit = tuple[int, int, int, tuple[str, ...], int]  # tokens [first, last), then its entry

_FOLDED = str.maketrans("àâäáãåçèéêëìîïíñòôöóõùûüúÿ’İ", "aaaaaaceeeeiiiinooooouuuuy'i")
_TOKEN = re.compile(r"(\d+(?:[.,]\d+)+|[a-z0-9œæ]+|[,;\"•·])")
_END = ""  # key of a node's entry; no token is empty


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


def _insert(trie: dict[str, Any], phrase: str, entry: _Entry) -> None:
    """Put a phrase and its plurals in; an entry that stands there already keeps its places and gets the cues."""
    nodes = [trie]
    for word in _TOKEN.findall(fold(phrase)):
        nodes = [node.setdefault(form, {}) for node in nodes for form in _forms(word)]
    for node in nodes:
        node[_END] = _joined(node.get(_END), entry)


def _joined(there: _Entry | None, entry: _Entry) -> _Entry:
    """One entry of two under the same words: the place of the first, the cues of both."""
    if there is None:
        return entry
    level, places = there[:2] if there[0] != _NO_PLACE else entry[:2]
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
    with open(Path(__file__).with_name("lexicon") / "anatomy.toml", "rb") as file:
        return tomllib.load(file)


@cache
def lexicon(language: Language) -> dict[str, Any]:
    """Trie of words -> node, the entry of a phrase under `_END`; of both languages where it is unknown."""
    tables = _tables()
    languages = ("en", "fr") if language == "unknown" else (language,)
    cues: dict[str, Any] = {}
    for mark in ",;":
        _insert(cues, mark, (_NO_PLACE, (), _SPLIT))
    for mark in '"•·':
        _insert(cues, mark, (_NO_PLACE, (), _TURN | _MARK))
    for spoken in languages:
        for names, terms in tables["cues"][spoken].items():
            kinds = sum(Cue[name.upper()].value for name in names.split("+"))
            for phrase in _phrases(terms):
                _insert(cues, phrase, (_NO_PLACE, (), kinds))
    trie: dict[str, Any] = {}
    for spoken in languages:
        for phrase in _phrases(tables["not_a_place"][spoken]["none"]):
            _insert(trie, phrase, (_NO_PLACE, (), 0))
        for level, table in ((_STRONG, "places"), (_LOOSE, "loose"), (_GROUP, "groups"), (_WEAK, "weak")):
            for names, terms in tables[table][spoken].items():
                for phrase in _phrases(terms):
                    _insert(trie, phrase, (level, tuple(names.split("+")), _found_in(cues, phrase)))
    for name, place in _levels():
        _insert(trie, name, (_STRONG, (place,), 0))
    _merge(trie, cues)
    return trie


def _found_in(cues: Mapping[str, Any], phrase: str) -> int:
    """What the words of a phrase say of a finding: "pleural effusion" is a place and a finding, too."""
    kinds = 0
    for word in _TOKEN.findall(fold(phrase)):
        entry: _Entry | None = cues.get(word, {}).get(_END)
        kinds |= entry[2] if entry else 0
    return kinds & (_FINDING | _ABNORMAL)


def _merge(trie: dict[str, Any], other: Mapping[str, Any]) -> None:
    for word, node in other.items():
        if word == _END:
            trie[_END] = _joined(trie.get(_END), node)
        else:
            _merge(trie.setdefault(word, {}), node)


@dataclass(slots=True)
class _Part:
    """Tokens [first, last) of a sentence between two separators."""

    first: int
    last: int
    hits: list[_Hit]
    cues: int = 0
    turned: bool = False  # after "but" and the like
    listed: bool = False  # after a mark between entries of a list
    level: int = _NO_PLACE  # of the firmest place it names
    nodes: bool = False  # it names lymph nodes
    denies: bool = False  # a denial stands before any finding
    preposition: bool = False  # it begins with one
    predicate: bool = False  # it begins with a verb or a relative, whose subject stands before


class Words:
    """The words of a document, folded, and where they stand; numbers and marks between clauses are words, too."""

    __slots__ = ("ends", "starts", "words")

    def __init__(self, document: str) -> None:
        pieces = _TOKEN.split(fold(document))  # what lies between words, and words, in turn
        bounds = list(accumulate(map(len, pieces)))
        self.words, self.starts, self.ends = pieces[1::2], bounds[:-1:2], bounds[1::2]


@cache
def _roots() -> tuple[re.Pattern[str], dict[str, str]]:
    """Compound words by their root, and root -> place."""
    places = {root: place for place, roots in _tables()["roots"].items() for root in _phrases(roots)}
    roots = "|".join(sorted(places, key=len, reverse=True))
    return re.compile(rf"(?:{_PREFIXES})?({roots})"), places


def _compound(word: str) -> dict[str, _Entry] | None:
    """The node of a compound word that no list holds, by its root ("perigastric", "nephrectomized")."""
    pattern, places = _roots()
    match = pattern.match(word)
    if match is None:
        return None
    return {_END: (_STRONG, (places[match[1]],), _ABNORMAL if _DISEASED.search(word, match.end()) else 0)}


class _Nodes(dict[str, dict[str, Any] | None]):
    """Word -> the node that phrases beginning with it start from, remembered: one lookup for most words."""

    LIMIT = 65_536

    def __init__(self, language: Language) -> None:
        super().__init__()
        self.trie = lexicon(language)

    def __missing__(self, word: str) -> dict[str, Any] | None:
        node = self.trie.get(word)
        if node is None and len(word) >= COMPOUND_MIN:
            node = _compound(word)
        if len(self) >= self.LIMIT:  # names and numbers never end
            self.clear()
        self[word] = node
        return node


_nodes = cache(_Nodes)


def _hits(words: Sequence[str], language: Language) -> list[_Hit]:
    """The longest phrases of the lexicon, from left to right, none within another."""
    found: list[_Hit] = []
    count, free = len(words), 0
    begins = map(_nodes(language).__getitem__, words)
    for place, node in [(place, node) for place, node in enumerate(begins) if node is not None]:
        if place < free:
            continue
        entry, free = node.get(_END), place + 1
        ahead = free
        following: Any = node
        while ahead < count and (following := following.get(words[ahead])) is not None:
            ahead += 1
            if _END in following:
                entry, free = following[_END], ahead
        if entry is not None:
            found.append((place, free, *entry))
    return found


class _Reader:
    """One document read sentence by sentence."""

    def __init__(self, words: Words, entities: Sequence[Found], language: Language) -> None:
        self.starts, self.ends = words.starts, words.ends
        self.hits = _hits(words.words, language)
        self.entities = sorted((one.start, one.status) for one in entities if one.concept not in _DEVICES)
        named = {name for hit in self.hits if hit[2] < _GROUP for name in hit[3]}
        # "No fracture" of a wrist is none of the wrist's bones.
        limbs = tuple(sorted(named & _SKELETON - {SPINE}))
        self.bones = limbs if limbs and not named & {"lung", "heart"} else GROUPS["bones"]
        self.spine = "thoracic vertebrae"
        self._entity = 0

    def parts(self, hits: Sequence[_Hit], first: int, last: int) -> list[_Part]:
        """The sentence of tokens [first, last) cut at its separators."""
        part = _Part(first, last, [])
        parts = [part]
        for hit in hits:
            begin, end, level, places, cues = hit
            if level == _NO_PLACE and cues & (_SPLIT | _TURN):
                if part.first == begin:  # two separators in a row: ", and"
                    part.first = end
                else:
                    part.last = begin
                    part = _Part(end, last, [])
                    parts.append(part)
                part.turned |= bool(cues & _TURN)
                part.listed |= bool(cues & _MARK)
                continue
            if begin == part.first:
                part.preposition = bool(cues & _PREPOSITION)
                part.predicate = bool(cues & _RELATIVE) or cues & (_VERB | _SEEN) == _VERB
            if cues & _NEGATION and not part.cues & (_FINDING | _ABNORMAL):
                part.denies = True
            part.hits.append(hit)
            part.cues |= cues
            if level < part.level:
                part.level = level
            part.nodes |= "lymph nodes" in places
        if part.first >= part.last:  # nothing follows the last separator
            if len(parts) > 1:
                parts.pop()
            else:
                part.first = first
        return parts

    def places(self, hits: Sequence[_Hit]) -> list[str]:
        """Places that a clause is about, those that only locate another left out unless there is no other."""
        found: tuple[list[str], list[str], list[str], list[str]] = ([], [], [], [])
        references: list[str] = []
        reach = 0
        for number, (begin, end, level, places, cues) in enumerate(hits):
            if level == _NO_PLACE:
                if cues & _REFERENCE:
                    reach = end + REFERENCE_REACH
                elif cues & _VERB:
                    reach = 0
                continue
            located = begin < reach
            if not located and number + 1 < len(hits):
                following = hits[number + 1]
                located = following[0] == end and bool(following[4] & _REFERENCE_AFTER)
            (references if located and level < _GROUP else found[level]).extend(places)
        strong, loose, groups, weak = found
        if "lymph nodes" not in strong:
            strong += loose
        kept = strong + [name for name in groups if not _GIVES_WAY_TO[name].intersection(strong)]
        kept = kept or weak or references or loose
        if SPINE in kept:
            level_named = any(name in SPINES for name in kept)
            kept = [name for name in kept if name != SPINE] + ([] if level_named else [self.spine])
        unfolded: list[str] = []
        for name in kept:
            if name in SPINES:
                self.spine = name
            for member in self.bones if name == "bones" else GROUPS.get(name, (name,)):
                if member not in unfolded:
                    unfolded.append(member)
        return unfolded

    def statuses(self, start: int, end: int) -> set[str]:
        """Statuses of the entities that start in characters [start, end), asked for in the order of the document."""
        entities = self.entities
        while self._entity < len(entities) and entities[self._entity][0] < start:
            self._entity += 1
        found = set()
        place = self._entity
        while place < len(entities) and entities[place][0] < end:
            found.add(entities[place][1])
            place += 1
        return found

    def verdicts(self, parts: Sequence[_Part]) -> list[Status | None]:
        """Normal or abnormal of each part of a sentence; None where it does not say."""
        result: list[Status | None] = []
        denied = False  # a denial that reaches on
        for number, part in enumerate(parts):
            cues = part.cues
            negated = bool(cues & _NEGATION)
            if part.turned or (cues & _VERB and not cues & _SEEN):
                denied = False
            if not negated:
                negated = denied
                if not cues & _VERB and not denied:  # the predicate is shared with a later part
                    after = next((later.cues for later in parts[number + 1 :] if later.cues & _VERB), 0)
                    negated = bool(after & _NEGATION)
                    cues |= after & (_LIMIT | _CHANGE)
                    if not cues & (_FINDING | _ABNORMAL):
                        cues |= after & (_NORMAL | _ABNORMAL)
            # "No nodule or mass is seen": up to the predicate; "no nodule is seen, no mass": up to the next one.
            denied = (denied or bool(cues & _NEGATION)) and not (denied and cues & _VERB)
            told = self.statuses(self.starts[part.first], self.ends[part.last - 1]) if self.entities else ()
            if part.denies and not cues & _CHANGE and "absent" not in told:
                told = ()  # an entity of such a part was hardly stated; "a nodule without calcification" is none
            result.append(_verdict(cues, negated, told))
        return result


def _verdict(cues: int, negated: bool, told: Collection[str]) -> Status | None:
    """Normal or abnormal by the cues of one part and the statuses of its entities; None where neither says."""
    if "present" in told or "possible" in told:
        return "abnormal"
    if cues & _LIMIT or (cues & _CHANGE and negated):
        return None
    if negated or "absent" in told:
        return "normal"
    if cues & _ABNORMAL:
        return "abnormal"
    if cues & _NORMAL:
        return "normal"
    if cues & _FINDING:
        return "abnormal"
    if cues & _REGULAR:
        return "normal"
    if cues & (_MEASURE | _TECHNIQUE | _CHANGE | _ADVICE) or not cues & _VERB:
        return None
    return "abnormal"


def _clauses(parts: Sequence[_Part], reader: _Reader) -> list[tuple[int, int, list[str]]]:
    """(first part, after the last, places): runs of parts that stand alone and speak of different places."""
    if len(parts) == 1:
        return [(0, 1, reader.places(parts[0].hits))]
    verbal = any(part.cues & _VERB for part in parts)
    denied = any(part.cues & _NEGATION for part in parts)

    def says(part: _Part) -> bool:
        """Whether it has a predicate, of whatever place."""
        if verbal:
            return bool(part.cues & (_VERB | _NORMAL))
        return bool(part.cues & _NORMAL) or (
            bool(part.cues & (_FINDING | _ABNORMAL)) and (not denied or bool(part.cues & _NEGATION) or part.turned)
        )

    def firm(part: _Part, beside_nodes: bool) -> bool:
        """Whether its place is more than a guess from its finding, or where nodes lie."""
        if part.level == _LOOSE:
            return not beside_nodes
        return part.level < _WEAK or (part.level == _WEAK and bool(part.cues & (_NEGATION | _SEEN)))

    runs: list[list[int]] = [[0, 0]]  # [first part, after the last] of each
    placed = said = nodes = False
    for number, part in enumerate(parts):
        opens = part.listed and part.level != _NO_PLACE
        if not opens and placed and said and not part.predicate and firm(part, nodes):
            following = parts[number + 1] if number + 1 < len(parts) else None
            opens = says(part) or (
                part.preposition and following is not None and following.level == _NO_PLACE and says(following)
            )
        if opens and number:
            runs.append([number, number])
            placed = said = nodes = False
        runs[-1][1] = number + 1
        placed, said, nodes = placed or firm(part, False), said or says(part), nodes or part.nodes
    if not (placed and said) and len(runs) > 1 and not parts[runs[-1][0]].listed:
        last = runs.pop()[1]  # what is left over belongs to the clause before
        runs[-1][1] = last
    clauses: list[tuple[int, int, list[str]]] = []
    for first, last in runs:
        places = reader.places([hit for part in parts[first:last] for hit in part.hits])
        if clauses and (not places or set(places) == set(clauses[-1][2])):
            clauses[-1] = (clauses[-1][0], last, clauses[-1][2])
        else:
            clauses.append((first, last, places))
    return clauses


_READ = ("findings", "impression")


def survey(
    document: str,
    sections: Sequence[Section],
    sentences: Sequence[Span],
    entities: Sequence[Found],
    language: Language,
    words: Words | None = None,
) -> Survey:
    """All sentences of findings and impression by place. Without such a section nothing is read.

    `sentences` and `entities` in the document's order; entities say what is there and what is not, and cues of the
    clause do where no entity was found.
    """
    reader = _Reader(words or Words(document), entities, language)
    texts: dict[str, dict[str, list[Span]]] = {name: {} for name in _READ}
    abnormal: set[str] = set()
    uses: list[SentenceUse] = []
    negatives: list[Span] = []
    read: list[tuple[int, int, Status | None]] = []
    starts, hits = reader.starts, reader.hits
    hit_starts = [hit[0] for hit in hits]
    token = hit = current = 0
    carried: list[str] = []
    read_before = -1
    for start, end in sentences:
        while current < len(sections) - 1 and sections[current].end <= start:
            current += 1
        first = bisect_left(starts, start, token)
        token = bisect_left(starts, end, first)
        first_hit = bisect_left(hit_starts, first, hit)
        hit = bisect_left(hit_starts, token, first_hit)
        if not sections or sections[current].name not in _READ or first == token:
            continue
        if current != read_before:  # a section's first sentence goes on with nothing
            carried, read_before = [], current
        text = texts[sections[current].name]
        parts = reader.parts(hits[first_hit:hit], first, token)
        verdicts = reader.verdicts(parts)
        read += [
            (starts[part.first], reader.ends[part.last - 1], verdict)
            for part, verdict in zip(parts, verdicts, strict=True)
        ]
        cues = 0
        for part in parts:
            cues |= part.cues
        clauses = _clauses(parts, reader)
        places: list[str] = []
        use: Use = "named"
        if clauses[0][2]:
            if cues & _LIMIT and not any(verdicts):
                uses.append(SentenceUse(span=(start, end), use="technique", places=()))
                continue
        else:
            use, places = _unnamed(cues, carried)
            clauses = [(0, len(parts), places)]
            if use == "report" and cues & (_NORMAL | _NEGATION):
                negatives.append((start, end))
        for number, (first_part, last_part, named) in enumerate(clauses):
            span = (
                start if number == 0 else starts[parts[first_part].first],
                end if number == len(clauses) - 1 else reader.ends[parts[last_part - 1].last - 1],
            )
            bad = "abnormal" in verdicts[first_part:last_part]
            for name in named:
                text.setdefault(name, []).append(span)
                if bad and not (use == "carried" and cues & _CHANGE):
                    abnormal.add(name)
            places += [name for name in named if name not in places]
            if named:
                carried = named
        if use == "named" and not any(name in _KNOWN for name in places):
            use = "elsewhere"
        uses.append(SentenceUse(span=(start, end), use=use, places=tuple(places)))
    return Survey(
        anatomies=_by_place(ANATOMIES, texts, abnormal), elsewhere=_by_place(ELSEWHERE, texts, abnormal),
        sentences=tuple(uses), negatives=tuple(negatives), parts=tuple(read),
    )  # fmt: skip


_KNOWN = frozenset(ANATOMIES)


def _unnamed(cues: int, carried: Sequence[str]) -> tuple[Use, list[str]]:
    """What a sentence that names no place is about."""
    if cues & _LIMIT or (cues & _TECHNIQUE and not cues & (_FINDING | _ABNORMAL)):
        return "technique", []
    if carried and cues & _BACK and cues & (_FINDING | _ABNORMAL | _MEASURE):
        return "carried", list(carried)
    if cues & _ADVICE and not cues & (_FINDING | _ABNORMAL):
        return "report", []
    if cues & _STUDY and cues & (_NORMAL | _NEGATION | _CHANGE):
        return "report", []
    if carried:
        return "carried", list(carried)
    return ("report" if cues & (_NORMAL | _NEGATION | _CHANGE | _STUDY | _ADVICE) else "none"), []


def _by_place(
    names: Iterable[str], texts: Mapping[str, Mapping[str, Sequence[Span]]], abnormal: set[str]
) -> tuple[AnatomyText, ...]:
    findings, impression = (texts[name] for name in _READ)
    return tuple(
        AnatomyText(
            anatomy=name, status="abnormal" if name in abnormal else "normal",
            findings=tuple(findings.get(name, ())), impression=tuple(impression.get(name, ())),
        )
        for name in names
        if name in findings or name in impression
    )  # fmt: skip


def decompose(
    document: str,
    sections: Sequence[Section],
    sentences: Sequence[Span],
    entities: Sequence[Found],
    language: Language,
) -> tuple[AnatomyText, ...]:
    """The anatomies that findings or impression speak of, in the order of ANATOMIES."""
    return survey(document, sections, sentences, entities, language).anatomies
