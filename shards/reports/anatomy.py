"""What a report says of each anatomy: its sentences and clauses by place, normal or abnormal (arXiv 2501.14548, 5.2).

Rules, no model. A sentence is cut into clauses where they speak of different places and can each stand alone; a clause
belongs to every place that it names. One that names none goes on with the place of the one before. Places outside of
the 36 anatomies are kept apart, so that nothing said of a lymph node makes an artery abnormal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import chain
from typing import Literal, NamedTuple

from shards.reports.entities import Entity, Said, by_sentence
from shards.reports.language import Language, Span
from shards.reports.lexicon.anatomy import (
    ANATOMIES,
    ELSEWHERE,
    GIVES_WAY_TO,
    GROUP,
    GROUPS,
    LOOSE,
    NO_PLACE,
    SKELETON,
    SPINE,
    SPINES,
    WEAK,
    Cue,
    Hit,
    Words,
    find_phrases,
    folded,
)
from shards.reports.lexicon.terms import cut, lower
from shards.reports.sections import Section

REFERENCE_REACH = 5  # tokens after "adjacent to" in which a place only says where something else lies
_DEVICES = frozenset({"support_device", "surgical_material", "orthopedic_hardware", "joint_prosthesis"})

Status = Literal["normal", "abnormal"]
Use = Literal["named", "carried", "elsewhere", "report", "technique", "none"]
Part = tuple[int, int, Status | None]  # span in the sentence, what it says
Clause = tuple[int, int, bool, tuple[str, ...]]  # span in the sentence, whether it is abnormal, places


class AnatomyText(NamedTuple):
    """What findings and impression say of one place, as spans of the document in its order."""

    anatomy: str
    status: Status
    findings: tuple[Span, ...] = ()
    impression: tuple[Span, ...] = ()


class Statement(NamedTuple):
    """What one sentence says by place, whatever stands around it; spans count in the sentence.

    `parts`: stretches between separators with what each says. `open`: among the places are a vertebra of no level or
    "bones", of which the document tells more. `named`: of the places those that tell which bones are meant. `spine`:
    the last vertebral level named.
    """

    parts: Sequence[Part] = ()
    clauses: Sequence[Clause] = ()
    cues: int = 0
    open: bool = False
    named: frozenset[str] = frozenset()
    spine: str | None = None


class SentenceUse(NamedTuple):
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

    `negatives`: statements on the report as a whole that deny or call it normal.
    """

    anatomies: tuple[AnatomyText, ...]
    elsewhere: tuple[AnatomyText, ...]
    sentences: tuple[SentenceUse, ...]
    negatives: tuple[Span, ...]


# Plain numbers, since operations on an IntFlag make an object each.
_VERB, _NEGATION, _NORMAL, _ABNORMAL = Cue.VERB.value, Cue.NEGATION.value, Cue.NORMAL.value, Cue.ABNORMAL.value
_FINDING, _SEEN, _MEASURE, _CHANGE = Cue.FINDING.value, Cue.SEEN.value, Cue.MEASURE.value, Cue.CHANGE.value
_SPLIT, _TURN, _MARK = Cue.SPLIT.value, Cue.TURN.value, Cue.MARK.value
_PREPOSITION, _RELATIVE, _REGULAR = Cue.PREPOSITION.value, Cue.RELATIVE.value, Cue.REGULAR.value
_REFERENCE, _REFERENCE_AFTER = Cue.REFERENCE.value, Cue.REFERENCE_AFTER.value
_STUDY, _TECHNIQUE, _LIMIT = Cue.STUDY.value, Cue.TECHNIQUE.value, Cue.LIMIT.value
_STEERING = _REFERENCE | _REFERENCE_AFTER | _VERB
_ADVICE, _BACK = Cue.ADVICE.value, Cue.BACK.value


_CHEST = frozenset({"lung", "heart"})
_BONES = SKELETON - {SPINE}
_TELLING = _BONES | _CHEST
_OPEN = frozenset({SPINE, "bones"})


@dataclass(slots=True)
class _Part:
    """Tokens [first, last) of a sentence between two separators."""

    first: int
    last: int
    hits: list[Hit]  # that name places, or decide on them
    cues: int = 0
    turned: bool = False  # after "but" and the like
    listed: bool = False  # after a mark between entries of a list
    level: int = NO_PLACE  # of the firmest place it names
    nodes: bool = False  # it names lymph nodes
    denies: bool = False  # a denial stands before any finding
    preposition: bool = False  # it begins with one
    predicate: bool = False  # it begins with a verb or a relative, whose subject stands before


def statement(words: Words, entities: Sequence[Said], language: Language, *, placed: bool = True) -> Statement:
    """What one sentence says by place. `entities`: those of it, spans in the sentence; they say what is there and what
    is not, and cues of the clause do where no entity was found. `placed`: False where only `named` is wanted."""
    hits = find_phrases(words.words, language)
    strong = [places for _, _, (level, places, _) in hits if level < GROUP]
    named = _TELLING.intersection(chain.from_iterable(strong))
    if not placed or not words.words:
        return Statement(named=named)
    parts = _parts(hits, len(words.words))
    verdicts = _verdicts(parts, words, entities)
    told = []
    cues = 0
    for part, verdict in zip(parts, verdicts, strict=True):
        told.append((words.starts[part.first], words.ends[part.last - 1], verdict))
        cues |= part.cues
    clauses = []
    spine = None
    is_open = False
    for first, last in _runs(parts):
        names = _places([hit for part in parts[first:last] for hit in part.hits])
        for name in names:
            if name in SPINES:
                spine = name
            elif name in _OPEN:
                is_open = True
        start = told[first][0] if first else 0
        end = told[last - 1][1] if last < len(parts) else words.length
        clauses.append((start, end, "abnormal" in verdicts[first:last], names))
    return Statement(
        parts=told, clauses=clauses if is_open else _merged(clauses, GROUPS), cues=cues, open=is_open, named=named,
        spine=spine,
    )  # fmt: skip


def _parts(hits: Sequence[Hit], last: int) -> list[_Part]:
    """The sentence of tokens [0, last) cut at its separators."""
    part = _Part(0, last, [])
    parts = [part]
    for hit in hits:
        begin, end, (level, places, cues) = hit
        if level == NO_PLACE and cues & (_SPLIT | _TURN):
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
        if places or cues & _STEERING:
            part.hits.append(hit)
        part.cues |= cues
        if places:
            part.level = min(part.level, level)
            part.nodes |= "lymph nodes" in places
    if part.first >= part.last:  # nothing follows the last separator
        if len(parts) > 1:
            parts.pop()
        else:
            part.first = 0
    return parts


def _places(hits: Sequence[Hit]) -> tuple[str, ...]:
    """Places that a clause is about, those that only locate another left out unless there is no other."""
    found: tuple[list[str], list[str], list[str], list[str]] = ([], [], [], [])
    references: list[str] = []
    reach = 0
    for number, (begin, end, (level, places, cues)) in enumerate(hits):
        if level == NO_PLACE:
            if cues & _REFERENCE:
                reach = end + REFERENCE_REACH
            elif cues & _VERB:
                reach = 0
            continue
        located = begin < reach
        if not located and number + 1 < len(hits):
            following = hits[number + 1]
            located = following[0] == end and bool(following[2][2] & _REFERENCE_AFTER)
        (references if located and level < GROUP else found[level]).extend(places)
    strong, loose, groups, weak = found
    if "lymph nodes" not in strong:
        strong += loose
    kept = strong + [name for name in groups if not GIVES_WAY_TO[name].intersection(strong)]
    kept = kept or weak or references or loose
    if SPINE in kept:
        level_named = any(name in SPINES for name in kept)
        kept = [name for name in kept if name != SPINE] + ([] if level_named else [SPINE])
    return tuple(kept)


def _verdicts(parts: Sequence[_Part], words: Words, entities: Sequence[Said]) -> list[Status | None]:
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
        told = _statuses(entities, words.starts[part.first], words.ends[part.last - 1]) if entities else frozenset()
        if part.denies and not cues & _CHANGE and "absent" not in told:
            told = frozenset()  # an entity of such a part was hardly stated; "a nodule without calcification" is none
        result.append(_verdict(cues, negated, told))
    return result


def _statuses(entities: Iterable[Said], start: int, end: int) -> Set[str]:
    """Statuses of the entities that start in characters [start, end), but for devices."""
    return {one.status for one in entities if start <= one.start < end and one.concept not in _DEVICES}


def _verdict(cues: int, negated: bool, told: Set[str]) -> Status | None:
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


def _runs(parts: Sequence[_Part]) -> Sequence[Sequence[int]]:
    """Runs of parts that each can stand alone: the first part, and the one after the last."""
    if len(parts) == 1:
        return [(0, 1)]
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
        if part.level == LOOSE:
            return not beside_nodes
        return part.level < WEAK or (part.level == WEAK and bool(part.cues & (_NEGATION | _SEEN)))

    runs: list[list[int]] = [[0, 0]]  # [first part, after the last] of each
    placed = said = nodes = False
    for number, part in enumerate(parts):
        opens = part.listed and part.level != NO_PLACE
        if not opens and placed and said and not part.predicate and firm(part, nodes):
            following = parts[number + 1] if number + 1 < len(parts) else None
            opens = says(part) or (
                part.preposition and following is not None and following.level == NO_PLACE and says(following)
            )
        if opens and number:
            runs.append([number, number])
            placed = said = nodes = False
        runs[-1][1] = number + 1
        placed, said, nodes = placed or firm(part, False), said or says(part), nodes or part.nodes
    if not (placed and said) and len(runs) > 1 and not parts[runs[-1][0]].listed:
        last = runs.pop()[1]  # what is left over belongs to the clause before
        runs[-1][1] = last
    return runs


def _merged(clauses: Iterable[Clause], members: Mapping[str, Sequence[str]]) -> list[Clause]:
    """Clauses that speak of different places: one that names none, or the same ones, goes on with the one before.

    `members`: of the places that stand for others.
    """
    merged: list[Clause] = []
    for clause in clauses:
        start, end, abnormal, names = clause
        if not members.keys().isdisjoint(names):
            names = tuple(member for name in names for member in members.get(name, (name,)))
        places = tuple(dict.fromkeys(names))
        if merged and (not places or set(places) == set(merged[-1][3])):
            start, _, before, places = merged.pop()
            abnormal = abnormal or before
        merged.append((start, end, abnormal, places))
    return merged


READ = ("findings", "impression")


def survey(
    document: str,
    sections: Sequence[Section],
    sentences: Sequence[Span],
    entities: Sequence[Entity],
    language: Language,
) -> Survey:
    """All sentences of findings and impression by place. Without such a section nothing is read.

    `sentences` and `entities` in the document's order.
    """
    lowered = lower(document)
    statements = [
        statement(folded(cut(lowered[start:end])), inside, language)
        for (start, end), inside in zip(sentences, by_sentence(entities, sentences), strict=True)
    ]
    return join(sections_of(sections, sentences), sentences, statements)


class _Context:
    """What a document tells of places that a sentence leaves open."""

    def __init__(self, statements: Iterable[Statement]) -> None:
        named = frozenset[str]().union(*(said.named for said in statements))
        # "No fracture" of a wrist is none of the wrist's bones.
        limbs = tuple(sorted(named & _BONES))
        self._bones = limbs if limbs and not named & _CHEST else GROUPS["bones"]
        self._spine = "thoracic vertebrae"

    def clauses(self, said: Statement) -> Sequence[Clause]:
        """Clauses of the next sentence, every place named."""
        if not said.open:
            self._spine = said.spine or self._spine
            return said.clauses
        levelled = []
        for start, end, abnormal, names in said.clauses:
            self._spine = next((name for name in reversed(names) if name in SPINES), self._spine)
            places = tuple(self._spine if name == SPINE else name for name in names)
            levelled.append((start, end, abnormal, places))
        return _merged(levelled, GROUPS | {"bones": self._bones})


def sections_of(sections: Sequence[Section], sentences: Iterable[Span]) -> list[Section | None]:
    """The section that each sentence stands in."""
    found: list[Section | None] = []
    current = 0
    for start, _ in sentences:
        while current < len(sections) - 1 and sections[current].end <= start:
            current += 1
        found.append(sections[current] if sections else None)
    return found


def join(sections: Sequence[Section | None], sentences: Sequence[Span], statements: Sequence[Statement]) -> Survey:
    """What the sentences of findings and impression say together. Of each: its section, its span, its `statement`."""
    context = _Context(statements)
    texts: dict[str, dict[str, list[Span]]] = {name: {} for name in READ}
    abnormal: set[str] = set()
    uses: list[SentenceUse] = []
    negatives: list[Span] = []
    carried: tuple[str, ...] = ()
    before: Section | None = None
    for (start, end), section, said in zip(sentences, sections, statements, strict=True):
        if section is None or section.name not in READ or not said.parts:
            continue
        if section is not before:  # a section's first sentence goes on with nothing
            carried, before = (), section
        clauses = context.clauses(said)
        cues = said.cues
        use: Use = "named"
        if clauses[0][3]:
            if cues & _LIMIT and not any(verdict for _, _, verdict in said.parts):
                uses.append(SentenceUse((start, end), "technique", ()))
                continue
            places: tuple[str, ...] = clauses[0][3]
            if len(clauses) > 1:
                places = tuple(dict.fromkeys(chain.from_iterable([clause[3] for clause in clauses])))
            if _KNOWN.isdisjoint(places):
                use = "elsewhere"
        else:
            use, places = _unnamed(cues, carried)
            clauses = [(0, end - start, any(clause[2] for clause in clauses), places)]
            if use == "report" and cues & (_NORMAL | _NEGATION):
                negatives.append((start, end))
        text = texts[section.name]
        for first, last, bad, named in clauses:
            for name in named:
                text.setdefault(name, []).append((start + first, start + last))
            if bad and not (use == "carried" and cues & _CHANGE):
                abnormal.update(named)
            carried = named or carried
        uses.append(SentenceUse((start, end), use, places))
    return Survey(
        anatomies=_by_place(ANATOMIES, texts, abnormal), elsewhere=_by_place(ELSEWHERE, texts, abnormal),
        sentences=tuple(uses), negatives=tuple(negatives),
    )  # fmt: skip


_KNOWN = frozenset(ANATOMIES)


def _unnamed(cues: int, carried: tuple[str, ...]) -> tuple[Use, tuple[str, ...]]:
    """What a sentence that names no place is about."""
    if cues & _LIMIT or (cues & _TECHNIQUE and not cues & (_FINDING | _ABNORMAL)):
        return "technique", ()
    if carried and cues & _BACK and cues & (_FINDING | _ABNORMAL | _MEASURE):
        return "carried", carried
    if cues & _ADVICE and not cues & (_FINDING | _ABNORMAL):
        return "report", ()
    if cues & _STUDY and cues & (_NORMAL | _NEGATION | _CHANGE):
        return "report", ()
    if carried:
        return "carried", carried
    return ("report" if cues & (_NORMAL | _NEGATION | _CHANGE | _STUDY | _ADVICE) else "none"), ()


def _by_place(
    names: Iterable[str], texts: Mapping[str, Mapping[str, Sequence[Span]]], abnormal: set[str]
) -> tuple[AnatomyText, ...]:
    findings, impression = (texts[name] for name in READ)
    told = findings.keys() | impression.keys()
    return tuple(
        [
            AnatomyText(
                name,
                "abnormal" if name in abnormal else "normal",
                tuple(findings.get(name, ())),
                tuple(impression.get(name, ())),
            )
            for name in filter(told.__contains__, names)
        ]
    )
