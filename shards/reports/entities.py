"""Findings of a report with their places and their status, by the tables of `lexicon` and no model.

Each sentence is read for itself: words are looked up, changes ("enlarged", "thickening") are joined with the part they
are said of, cues decide the status, and what is left of the words between two findings gives side and position.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Literal, NamedTuple

from shards.reports.language import Span
from shards.reports.lexicon.terms import SOFT, Language, Match, Pieces, Tokens, cut, lower, stemmed, vocabulary
from shards.reports.status import Clause, Marks, Reach, Status, clauses, marks, reaches, status_of

Side = Literal["left", "right", "bilateral"]

MAX_DESCRIPTOR = 3  # words before a finding that are taken to describe it


class Entity(NamedTuple):
    """One mention of a finding. Spans are [start, end) in characters of the document.

    `concept` is one of `lexicon.terms.concepts()`; `position` English whatever the language, '' if none was named,
    several joined by commas; `descriptor` the words right before the mention that describe it ("small left").
    """

    concept: str
    start: int
    end: int
    sentence: int
    laterality: Side | None
    position: str
    status: Status
    descriptor: Span | None


class _Mention(NamedTuple):
    concept: str
    first: int  # token
    last: int
    normal: bool  # said by a word for normal: absent unless that is denied
    part: tuple[int, int] | None = None  # tokens of the part it is said of, where a verb lies between


def entities(document: str, sentences: Sequence[Span], language: str) -> tuple[Entity, ...]:
    """Findings in the order of the text. `sentences`: spans of the document; a language other than fr is read as en.

    Findings that are told as the patient's history are left out.
    """
    spoken: Language = "fr" if language == "fr" else "en"
    lowered = lower(document)
    return tuple(
        placed(one, number, start)
        for number, (start, end) in enumerate(sentences)
        for one in in_sentence(cut(lowered[start:end]), spoken)
    )


class Said(NamedTuple):
    """An entity with spans in its sentence."""

    concept: str
    start: int
    end: int
    laterality: Side | None
    position: str
    status: Status
    descriptor: Span | None


def placed(one: Said, sentence: int, start: int) -> Entity:
    """The entity in its document, where sentence number `sentence` starts at character `start`."""
    concept, first, last, side, position, status, descriptor = one
    if descriptor is not None:
        descriptor = (descriptor[0] + start, descriptor[1] + start)
    return Entity(concept, first + start, last + start, sentence, side, position, status, descriptor)


def by_sentence(found: Sequence[Entity], sentences: Sequence[Span]) -> list[list[Said]]:
    """The entities of each sentence, with spans in it."""
    inside: list[list[Said]] = [[] for _ in sentences]
    for one in found:
        start = sentences[one.sentence][0]
        descriptor = None if one.descriptor is None else (one.descriptor[0] - start, one.descriptor[1] - start)
        inside[one.sentence].append(
            Said(one.concept, one.start - start, one.end - start, one.laterality, one.position, one.status, descriptor)
        )
    return inside


def in_sentence(sentence: Pieces, language: Language) -> Sequence[Said]:
    """Findings of one sentence, in its order."""
    words = vocabulary(language)
    tokens = stemmed(sentence, language)
    matches = words.terms.find(tokens.stems)
    if not [match for match in matches if match[2].head]:
        return ()
    known = marks(tokens, matches)
    places = words.places.find(tokens.stems)
    found: list[Said] = []
    for clause in clauses(tokens, known):
        whole = clause.first <= matches[0].first and matches[-1].first < clause.end
        inside = matches if whole else [match for match in matches if clause.first <= match.first < clause.end]
        mentions = _mentions(tokens, inside, known)
        if not mentions:
            continue
        begins = [mention.first for mention in mentions]
        cues = reaches(tokens, inside, clause, known, begins)
        told = [_status(mention, cues, begins) for mention in mentions]
        _open_choices(mentions, told, known)
        inner = [place for place in places if clause.first <= place.first < clause.end]
        sited = _places(tokens, mentions, inner, known, {cue.cue for cue in cues if cue.before}, words.place_follows)
        for mention, status, (side, position) in zip(mentions, told, sited, strict=True):
            if status != "history":
                found.append(
                    Said(
                        mention.concept, tokens.starts[mention.first], tokens.ends[mention.last], side, position,
                        status, _descriptor(tokens, inside, mention, clause),
                    )
                )  # fmt: skip
    return found


def _status(mention: _Mention, cues: Sequence[Reach], begins: Sequence[int]) -> Status | Literal["history"]:
    if not mention.normal:
        status = status_of(mention.first, mention.last, cues, begins)
        if status == "present" and mention.part is not None:  # "nodes were not seen in pathological size"
            cues = [cue for cue in cues if not cue.before and mention.part[1] < cue.cue < mention.first]
            status = status_of(*mention.part, cues, begins)
        return status
    # "Not normal" says no more than that something may be there; any other cue is about something else.
    denied = any(cue.before and cue.says == "absent" and cue.cue_end == mention.last for cue in cues)
    return "possible" if denied else "absent"


def _open_choices(mentions: Sequence[_Mention], told: list[Status | Literal["history"]], known: Marks) -> None:
    """Two findings joined by "or" are each only possible, since one of them explains what is seen."""
    for place in range(len(mentions) - 1):
        between = range(mentions[place].last + 1, mentions[place + 1].first)
        if told[place] == told[place + 1] == "present" and any(i in known.alternatives for i in between):
            told[place] = told[place + 1] = "possible"


# ---------------------------------------------------------------- changes and their parts


def _mentions(tokens: Tokens, matches: Sequence[Match], known: Marks) -> list[_Mention]:
    """Findings of one clause, changes resolved. `matches`: those inside of it."""
    heads = [i for i, match in enumerate(matches) if match[2].head]
    if not heads:
        return []
    found: list[_Mention] = []
    used: set[int] = set()
    inherited: list[Match] = []
    for order, i in enumerate(heads):
        first, last, term = matches[i]
        if term.finding is not None:
            found.append(_Mention(term.finding, first, last, False))
            inherited = []
            continue
        change = term.change
        if change is None or change.also_part is not None:
            continue  # read after the others, which may have taken it for their part
        low = next((j for j in reversed(heads[:order]) if not matches[j].term.part), -1)
        high = next((j for j in heads[order + 1 :] if not matches[j].term.part), len(matches))
        parts = _parts(tokens, matches, i, low, high, known)
        if not parts and low >= 0 and _adjoins(tokens, matches[low].last, first, known):
            parts = inherited
        inherited = parts
        named = {change.of[str(part.term.part)]: part for part in parts if part.term.part in change.of}
        if not named and change.default is not None:
            found.append(_Mention(change.default, first, last, change.normal))
        for concept, part in named.items():
            if known.verbs.intersection(range(min(part.last, last) + 1, max(part.first, first))):
                found.append(_Mention(concept, first, last, change.normal, (part.first, part.last)))
            else:
                found.append(_Mention(concept, min(first, part.first), max(last, part.last), change.normal))
        used.update(part.first for part in parts if named)
    for i in heads:
        first, last, term = matches[i]
        if term.change is not None and term.change.also_part is not None and first not in used:
            found.append(_Mention(str(term.change.default), first, last, False))
    return sorted(found, key=lambda mention: (mention.first, mention.last))


def _parts(tokens: Tokens, matches: Sequence[Match], place: int, low: int, high: int, known: Marks) -> list[Match]:
    """Parts that the change of match `place` is said of, between the findings of matches `low` and `high`.

    First those right before it ("pleural or pericardial effusion"); then, if it follows the verb, the subject ("the
    heart is enlarged"); then what comes after it, of a noun with its adjectives the last part ("enlarged mediastinal
    node"); then anything before it.
    """
    change, verbs = matches[place], known.verbs
    before = [match for match in matches[low + 1 : place] if match.term.part]
    after = [match for match in matches[place + 1 : high] if match.term.part]
    if before:
        if not verbs.intersection(range(before[-1].last + 1, change.first)):
            return _listed(tokens, before[::-1], known)
        if verbs.intersection(range(change.first - 3, change.first)):
            return before
    if not after:
        return before
    gap = range(change.last + 1, after[0].first)
    if verbs.intersection(gap) or known.behind.intersection(gap) or any(tokens.stems[i] in SOFT for i in gap):
        return after
    chosen = []
    head = after[0]
    for match in after[1:]:
        gap = range(head.last + 1, match.first)
        if verbs.intersection(gap) or known.behind.intersection(gap):
            break
        if _linked(tokens, gap, known):
            chosen.append(head)
        head = match
    return [*chosen, head]


def _linked(tokens: Tokens, gap: range, known: Marks) -> bool:
    """A comma or joining word stands there."""
    return any(i in known.joins or tokens.stems[i] in SOFT for i in gap)


def _listed(tokens: Tokens, parts: Sequence[Match], known: Marks) -> list[Match]:
    """Of parts from the nearest one outwards the nearest, and those a comma or joining word links to it."""
    chosen = [parts[0]]
    inner = parts[0]
    for match in parts[1:]:
        gap = range(match.last + 1, inner.first)
        if known.verbs.intersection(gap):
            break
        if _linked(tokens, gap, known):
            chosen.append(match)
        inner = match
    return chosen


def _adjoins(tokens: Tokens, last: int, first: int, known: Marks) -> bool:
    """Nothing but joining words and commas lie between."""
    place = last + 1
    while place < first:
        if place in known.joins:
            place = known.joins[place]
        elif tokens.stems[place] in SOFT:
            place += 1
        else:
            return False
    return True


# ---------------------------------------------------------------- side, position, descriptor


def _places(
    tokens: Tokens,
    mentions: Sequence[_Mention],
    places: Sequence[Match],
    known: Marks,
    cues: Set[int],
    follows: bool,
) -> list[tuple[Side | None, str]]:
    """Side and position of each mention. `places`: words of place inside of the clause; `cues`: where cues begin.

    Words between two findings belong to the second, unless a preposition leads them ("effusion in the left base") or
    the language puts them behind, in which case they belong to the first up to the last comma, joining word or cue.
    In a list the findings before the last one share what follows it.
    """
    if not places:
        return [(None, "")] * len(mentions)
    own: list[list[Match]] = [[] for _ in mentions]
    trailing: list[list[Match]] = [[] for _ in mentions]
    for place in places:
        left = right = None
        for i, mention in enumerate(mentions):
            if mention.first <= place.first <= mention.last:
                own[i].append(place)
                left = right = None
                break
            if mention.last < place.first:
                left = i
            elif right is None:
                right = i
        if right is not None and (
            left is None or not _trails(tokens, place, mentions[left], mentions[right], known, cues, follows)
        ):
            own[right].append(place)
        elif left is not None:
            trailing[left].append(place)
    found = []
    for i in range(len(mentions)):
        matched = own[i] + trailing[i]
        ahead = i
        while (
            not matched
            and ahead + 1 < len(mentions)
            and _adjoins(tokens, mentions[ahead].last, mentions[ahead + 1].first, known)
        ):
            ahead += 1
            matched = trailing[ahead]
        found.append(_read_places(matched))
    return found


def _trails(
    tokens: Tokens, place: Match, left: _Mention, right: _Mention, known: Marks, cues: Set[int], follows: bool
) -> bool:
    """Whether a place between two findings is told of the first."""
    gap = range(left.last + 1, right.first)
    parting = max((i for i in gap if i in known.joins or i in cues or tokens.stems[i] in SOFT), default=None)
    if parting is not None:
        return place.first < parting
    return follows or not known.behind.isdisjoint(range(gap.start, place.first))


def _read_places(matches: Sequence[Match]) -> tuple[Side | None, str]:
    sides = {side for match in matches for side in match.term.sides}
    positions = dict.fromkeys(position for match in matches for position in match.term.positions)
    side: Side | None = None
    if "bilateral" in sides or len(sides) > 1:
        side = "bilateral"
    elif sides:
        side = "left" if "left" in sides else "right"
    return side, ", ".join(positions)


def _descriptor(tokens: Tokens, matches: Sequence[Match], mention: _Mention, clause: Clause) -> Span | None:
    """Up to MAX_DESCRIPTOR words before the mention, back to the next mark or word with a duty of its own."""
    lowest = max(clause.first, mention.first - MAX_DESCRIPTOR)
    for match in matches:
        if match.first >= mention.first:
            break
        if match.last >= lowest and not match.term.plain:
            lowest = match.last + 1
    first = mention.first
    while first > lowest and tokens.stems[first - 1] not in SOFT:
        first -= 1
    return (tokens.starts[first], tokens.ends[mention.first - 1]) if first < mention.first else None
