"""Whether a report says that something is there: present, absent or possible, English and French.

A sentence is cut into clauses of one finite verb each; a cue ("no", "is not seen", "cannot exclude") reaches the words
before or behind it inside of its clause. The cues are tables, `lexicon/cues.toml`; here is what they do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress
from typing import Literal, NamedTuple

from shards.reports.lexicon.terms import HARD, Match, Tokens

Status = Literal["present", "absent", "possible"]
_CLAUSE_MARKS = HARD | {","}
# Articles that begin what is said anew; "de" goes on with a French denial.
_ARTICLES: Mapping[str, frozenset[str]] = {
    article: kind
    for kind in (frozenset(("a", "an", "un", "une")), frozenset(("the", "le", "la", "les", "l'")))
    for article in kind
}


class Clause(NamedTuple):
    """Tokens [first, end) of a sentence; `asked`: it ends with a question mark."""

    first: int
    end: int
    asked: bool


class Reach(NamedTuple):
    """A cue in tokens [cue, cue_end) and the tokens [first, end) it speaks of."""

    says: Literal["absent", "possible", "purpose", "history"]
    before: bool  # the cue stands before what it speaks of
    cue: int
    cue_end: int
    first: int
    end: int


class Marks(NamedTuple):
    """Where in a sentence the words stand that part clauses and lists; made once per sentence."""

    verbs: frozenset[int]  # tokens that are, or are part of, a finite verb
    commas: tuple[int, ...]
    joins: Mapping[int, int]  # first token of a joining word -> the token after it
    alternatives: tuple[int, ...]  # of these the ones of an open choice, "or"
    partings: tuple[int, ...]
    articles: Mapping[int, frozenset[str]]  # comma, or "and" -> articles of the kind that follows it
    affirmed: frozenset[int]
    behind: frozenset[int]
    cuts: Mapping[int, int]  # token a clause ends at -> token the next one begins at
    starts: frozenset[int]


def marks(tokens: Tokens, matches: Sequence[Match]) -> Marks:
    """Verbs inside of a longer cue ("is not seen") count too."""
    verbs: list[int] = []
    commas: list[int] = []
    joins: dict[int, int] = {}
    articles: dict[int, frozenset[str]] = {}
    kinds = ("alternative", "parting", "affirmed", "behind", "starts")
    places: dict[str, list[int]] = {kind: [] for kind in kinds}
    cuts: dict[int, int] = {}
    for i in compress(range(len(tokens.stems)), map(_CLAUSE_MARKS.__contains__, tokens.stems)):
        if tokens.stems[i] == ",":
            commas.append(i)
            _note_article(tokens, i, i, articles)
        else:
            cuts[i] = i + 1
    for first, last, term in matches:
        for i in term.verbs:
            verbs.append(first + i)
        for mark in term.marks:
            if mark == "join":
                joins[first] = last + 1
            elif mark == "boundary":
                cuts[first] = last + 1
            elif mark == "adding":
                _note_article(tokens, first, last, articles)
            elif mark in places:
                places[mark].append(first)
    return Marks(
        frozenset(verbs), tuple(commas), joins, tuple(places["alternative"]), tuple(places["parting"]), articles,
        frozenset(places["affirmed"]), frozenset(places["behind"]), cuts, frozenset(places["starts"]),
    )  # fmt: skip


def _note_article(tokens: Tokens, first: int, last: int, articles: dict[int, frozenset[str]]) -> None:
    """Notes the article that follows tokens [first, last]."""
    if last + 1 < len(tokens.stems):
        kind = _ARTICLES.get(tokens.between(last, last + 1).strip())
        if kind is not None:
            articles[first] = kind


def clauses(tokens: Tokens, known: Marks) -> list[Clause]:
    """The sentence in clauses, in order; boundary words and closing marks belong to none.

    A second finite verb shows that a new clause began at the last comma since the first verb, or failing that at the
    last joining word but "or" ("the heart is enlarged and no mass or nodule is seen").
    """
    found: list[Clause] = []
    count = len(tokens.stems)
    first, verb, comma, join = 0, -1, -1, -1
    events = {*known.cuts, *known.starts, count}
    if known.commas or known.joins:  # without one, no verb begins a clause
        events.update(known.commas, known.joins, known.verbs)
    for place in sorted(events):
        if place < first:
            continue
        if place == count or place in known.cuts:
            if place > first:
                found.append(Clause(first, place, place < count and tokens.stems[place] == "?"))
            first = known.cuts.get(place, count)
            verb = comma = join = -1
            continue
        if place in known.starts and place > first:
            found.append(Clause(first, place, False))
            first, verb, comma, join = place, -1, -1, -1
        if tokens.stems[place] == ",":
            comma = place
        elif place in known.joins and place not in known.alternatives:  # "or" hardly ever joins clauses
            join = place
        if place in known.verbs and place - 1 not in known.verbs:
            cut = comma if comma > verb else join
            if verb >= first and cut > verb:
                found.append(Clause(first, cut, False))
                first = cut + 1
            if verb < first or cut > verb:
                comma = join = -1
            verb = place
    return [clause for clause in found if clause.end > clause.first]


def _behind(first: int, clause: Clause, known: Marks, commas_end: bool) -> int:
    """Where the reach of a cue ends that speaks of what follows it from token `first` on."""
    for comma in known.commas:
        if first <= comma < clause.end:
            if comma + 1 in known.affirmed and not _open_list(comma, clause.end, known):
                return comma
            if commas_end and not _open_list(comma, clause.end, known):
                return comma
    return clause.end


def _before_article(tokens: Tokens, first: int, mentions: Sequence[int], end: int, known: Marks) -> int:
    """Where the reach [first, end) of a cue ends when it has named a finding and the next one has an article that the
    first had not ("no opacity, and a small effusion"; not "no sign of a tear and a fracture"). `mentions`: tokens in
    the reach where findings begin."""
    for place, kind in sorted(known.articles.items()):
        if mentions[0] < place < min(end, mentions[-1]) and not _open_list(place, end, known):
            gaps = (tokens.between(i - 1, i).strip() for i in range(max(first, 1), place))
            if kind.isdisjoint(gaps):
                return place
    return end


def _open_list(first: int, end: int, known: Marks) -> bool:
    """An "or" follows: the comma at `first` stands inside of a list."""
    return any(first < place < end for place in known.alternatives)


def reaches(
    tokens: Tokens, matches: Sequence[Match], clause: Clause, known: Marks, mentions: Sequence[int]
) -> list[Reach]:
    """What the cues of one clause speak of. `matches`: those in it; `mentions`: tokens where a finding begins."""
    found: list[Reach] = []
    for match in matches:
        cue, cue_end = match.first, match.last + 1
        for entry in match.term.cues:
            if entry.kind == "before":
                absent = entry.name == "absent"
                end = _behind(cue_end, clause, known, commas_end=not absent)
                inside = [mention for mention in mentions if cue_end <= mention < end]
                if absent and inside:
                    end = min(end, next((i for i in known.partings if inside[0] < i), end))
                if known.articles and len(inside) > 1:
                    end = _before_article(tokens, cue_end, inside, end, known)
                if end > cue_end and any(word.isalnum() for word in tokens.stems[cue_end:end]):
                    name = entry.name if entry.name != "attributed" else _attributed(clause, cue, found, known)
                    found.append(Reach(name, True, cue, cue_end, cue_end, end))  # type: ignore[arg-type]
                elif absent:  # "Pneumothorax: no"
                    found.append(Reach("absent", False, cue, cue_end, clause.first, cue))
            elif entry.kind == "history":
                found.append(Reach("history", True, cue, cue_end, cue_end, _behind(cue_end, clause, known, True)))
            elif entry.kind == "after":
                first = clause.first
                if not known.verbs.intersection(range(cue, cue_end)) or entry.name == "possible":
                    for comma in known.commas:
                        if clause.first <= comma < cue and not _open_list(comma, cue, known):
                            first = comma + 1
                found.append(Reach("absent" if entry.name == "absent" else "possible", False, cue, cue_end, first, cue))
    if clause.asked:
        first = max(
            (i + 1 for i in range(clause.first, clause.end) if tokens.stems[i] in (",", "(")), default=clause.first
        )
        found.append(Reach("possible", False, clause.end, clause.end, first, clause.end))
    return found


def _attributed(clause: Clause, cue: int, found: Sequence[Reach], known: Marks) -> Literal["possible", "purpose"]:
    """What doubt about the finding before it says: where no comma or "and" parts that finding from a denial, nothing
    more than the denial does ("no consolidation or opacity in favor of pneumonia")."""
    first = max((reach.cue_end for reach in found if reach.says == "absent"), default=clause.first)
    parted = any(first <= comma < cue for comma in known.commas) or any(
        first <= join < cue and join not in known.alternatives for join in known.joins
    )
    return "possible" if parted else "purpose"


def status_of(first: int, last: int, cues: Sequence[Reach], mentions: Sequence[int]) -> Status | Literal["history"]:
    """Status of what stands in tokens [first, last]. `mentions`: tokens at which any finding begins, ascending.

    Of cues before it the nearest one counts, except that doubt which is itself denied ("no evidence to suggest") is
    denial; of cues on both sides denial outweighs doubt, unless the doubt is about the denial ("absence of X is not
    certain" is too rare to be told apart).
    """
    before: Reach | None = None
    denied: Reach | None = None
    after: Reach | None = None
    for cue in cues:
        if not (cue.first <= first and last < cue.end):
            continue
        if cue.says == "history":
            return "history"
        if cue.before:
            if cue.says == "absent" and (denied is None or cue.cue > denied.cue):
                denied = cue
            if before is None or cue.cue > before.cue:
                before = cue
        elif after is None or cue.cue < after.cue:
            after = cue
    if before is not None and before.says != "absent" and denied is not None:
        between = any(denied.cue_end <= mention < before.cue for mention in mentions)
        if before.says == "purpose" or not between:
            before = denied
    if before is not None and before.says == "absent":
        return "absent"
    if after is not None and after.says == "absent":
        return "absent"
    if before is not None or after is not None:
        return "possible"
    return "present"
