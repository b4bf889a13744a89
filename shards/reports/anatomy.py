"""What a report says of each anatomy: its sentences and clauses by place, normal or abnormal (arXiv 2501.14548, 5.2).

Rules, no model. A sentence is cut into clauses where they speak of different places and can each stand alone; a clause
belongs to every place that it names. One that names none goes on with the place of the one before. Places outside of
the 36 anatomies are kept apart, so that nothing said of a lymph node makes an artery abnormal.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

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
)
from shards.reports.sections import Section

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


# Plain numbers, since operations on an IntFlag make an object each.
_VERB, _NEGATION, _NORMAL, _ABNORMAL = Cue.VERB.value, Cue.NEGATION.value, Cue.NORMAL.value, Cue.ABNORMAL.value
_FINDING, _SEEN, _MEASURE, _CHANGE = Cue.FINDING.value, Cue.SEEN.value, Cue.MEASURE.value, Cue.CHANGE.value
_SPLIT, _TURN, _MARK = Cue.SPLIT.value, Cue.TURN.value, Cue.MARK.value
_PREPOSITION, _RELATIVE, _REGULAR = Cue.PREPOSITION.value, Cue.RELATIVE.value, Cue.REGULAR.value
_REFERENCE, _REFERENCE_AFTER = Cue.REFERENCE.value, Cue.REFERENCE_AFTER.value
_STUDY, _TECHNIQUE, _LIMIT = Cue.STUDY.value, Cue.TECHNIQUE.value, Cue.LIMIT.value
_ADVICE, _BACK = Cue.ADVICE.value, Cue.BACK.value


@dataclass(slots=True)
class _Part:
    """Tokens [first, last) of a sentence between two separators."""

    first: int
    last: int
    hits: list[Hit]
    cues: int = 0
    turned: bool = False  # after "but" and the like
    listed: bool = False  # after a mark between entries of a list
    level: int = NO_PLACE  # of the firmest place it names
    nodes: bool = False  # it names lymph nodes
    denies: bool = False  # a denial stands before any finding
    preposition: bool = False  # it begins with one
    predicate: bool = False  # it begins with a verb or a relative, whose subject stands before


class _Reader:
    """One document read sentence by sentence."""

    def __init__(self, words: Words, entities: Sequence[Found], language: Language) -> None:
        self.starts, self.ends = words.starts, words.ends
        self.hits = find_phrases(words.words, language)
        self.entities = sorted((one.start, one.status) for one in entities if one.concept not in _DEVICES)
        named = {name for _, _, (level, places, _) in self.hits if level < GROUP for name in places}
        # "No fracture" of a wrist is none of the wrist's bones.
        limbs = tuple(sorted(named & SKELETON - {SPINE}))
        self.bones = limbs if limbs and not named & {"lung", "heart"} else GROUPS["bones"]
        self.spine = "thoracic vertebrae"
        self._entity = 0

    def parts(self, hits: Sequence[Hit], first: int, last: int) -> list[_Part]:
        """The sentence of tokens [first, last) cut at its separators."""
        part = _Part(first, last, [])
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
            part.hits.append(hit)
            part.cues |= cues
            if places:
                part.level = min(part.level, level)
                part.nodes |= "lymph nodes" in places
        if part.first >= part.last:  # nothing follows the last separator
            if len(parts) > 1:
                parts.pop()
            else:
                part.first = first
        return parts

    def places(self, hits: Sequence[Hit]) -> list[str]:
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
        entities, count, place = self.entities, len(self.entities), self._entity
        while place < count and entities[place][0] < start:
            place += 1
        self._entity = place
        found = set()
        while place < count and entities[place][0] < end:
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
