"""Structured reports: per disease a definition, its appearance, what was observed, and a verdict (arXiv 2507.21794).

One schema for every maker of them, a check against the report's text, the tables and templates of their words, and the
choice of what of them is read in a training step. Definition and appearance depend on the disease alone and must never
say where one patient's finding lies. No function here puts words of a report into an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from shards import keyed
from shards.errors import ConfigError, DataError
from shards.reports.entities import Entity
from shards.reports.language import Span, within
from shards.reports.lexicon.diseases import DISEASE_OF_CONCEPT, DISEASES, LOOKED_FOR, OF_THE_LUNG, BodyPart

Exist = Literal["yes", "no", "unsure"]
Verdict = Literal["present", "absent", "uncertain"]

# What a token belongs to, `section_ids` of a batch; a raw report is all observation.
DEFINITION, APPEARANCE, OBSERVATION, VERDICT = 1, 2, 3, 4
Part = tuple[int, str]  # section, its text


_Text = Annotated[str, Field(min_length=1)]
_STRICT = ConfigDict(extra="forbid")


# Plain classes, since most objects are made here, by the million; what comes from elsewhere goes through `parse`.
@dataclass(frozen=True)
class Observation:
    """One thing looked for. `span` [start, end) in characters of `source_text`; None if nothing was said of it."""

    __pydantic_config__ = _STRICT

    entity: _Text
    position: str
    exist: Exist
    question: _Text
    answer: _Text
    span: Span | None = None


def _said_or_absent(one: Observation) -> Observation:
    if one.span is None and one.exist != "no":
        raise ValueError(f"exist {one.exist!r} needs the span that says so; only what is absent may go unsaid")
    if one.span is not None and not 0 <= one.span[0] < one.span[1]:
        raise ValueError(f"span {list(one.span)} is empty or starts before the report")
    return one


@dataclass(frozen=True)
class Item:
    """All about one disease."""

    __pydantic_config__ = _STRICT

    disease: _Text
    definition: _Text
    appearance: _Text
    observations: list[Annotated[Observation, AfterValidator(_said_or_absent)]]
    verdict: Verdict
    verdict_text: _Text


@dataclass(frozen=True)
class StructuredReport:
    """`StudyRecord.structured_report`. A disease that neither an item nor `unsaid` names was not looked for.

    `unsaid`: diseases of the table that were looked for and are not spoken of, by name only; `complete` makes items
    of them.
    """

    __pydantic_config__ = _STRICT

    study: str
    items: list[Item]
    unsaid: list[str] = field(default_factory=list)


def _each_disease_once(report: StructuredReport) -> StructuredReport:
    names = [item.disease for item in report.items] + report.unsaid
    if not names:
        raise ValueError("no disease is named")
    if len(set(names)) != len(names):
        raise ValueError("a disease stands there twice")
    if not DISEASES.keys() >= set(report.unsaid):
        raise ValueError("a disease that goes unsaid is none of the table")
    return report


Validated = Annotated[StructuredReport, AfterValidator(_each_disease_once)]
_REPORT = TypeAdapter(Validated)
_MEMBERS = {one.name for form in (StructuredReport, Item, Observation) for one in fields(form)}


def complete(report: StructuredReport) -> StructuredReport:
    """The report with an item of every disease that was looked for; these in the order of the table."""
    if not report.unsaid:
        return report
    items = {item.disease: item for item in report.items} | {name: _unsaid(name) for name in report.unsaid}
    ordered = [items.pop(name) for name in DISEASES if name in items]
    return StructuredReport(study=report.study, items=[*ordered, *items.values()])


def parse(data: Mapping[str, Any]) -> StructuredReport:
    """From a record's `structured_report`, with an item of every disease. Raises DataError that names the first fault
    and none of the words."""
    try:
        return complete(_REPORT.validate_python(data))
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(str(part) if isinstance(part, int) or part in _MEMBERS else "?" for part in fault["loc"])
        raise DataError(f"structured report: {fault['type']} at {place or 'its top'}; see shards/README.md") from None


def source_text(sections: Mapping[str, str]) -> str:
    """The text that spans count in: the report's sections in alphabetical order, a line break between them."""
    return "\n".join(sections[name] for name in sorted(sections))


def observe(
    disease: str, exist: Exist, *, position: str = "", degree: str = "", span: Span | None = None
) -> Observation:
    """An observation of one disease of the table, with its question and answer.

    The question is the same whatever was found: a position in it would give the answer away.
    """
    known = DISEASES[disease]
    place = f", {position}" if position else ""
    if exist == "yes":
        answer = f"Yes, {degree} {known.name}{place}." if degree else f"Yes, {known.name}{place}."
    elif exist == "no":
        answer = f"No, there is no {known.name}."
    else:
        answer = f"Possibly {known.name}{place}."
    return Observation(known.name, position, exist, f"Is there {known.one}?", answer, span)


def verdict_of(observations: Sequence[Observation]) -> Verdict:
    """What observations of one disease add up to: present if seen anywhere, uncertain if doubted or contradicted.

    Yes and no contradict each other at the same position, or where one of them names none.
    """
    said = {observation.exist for observation in observations}
    if said <= {"no"}:
        return "absent"
    if said == {"yes"}:
        return "present"
    seen = {observation.position for observation in observations if observation.exist == "yes"}
    denied = {observation.position for observation in observations if observation.exist == "no"}
    if seen and denied and ("" in seen | denied or seen & denied):
        return "uncertain"
    if seen:
        return "present"
    return "uncertain" if any(observation.exist == "unsure" for observation in observations) else "absent"


def verdict_text(disease: str, verdict: Verdict) -> str:
    """The closing statement on a disease of the table."""
    name = DISEASES[disease].name
    return f"Verdict: {name} {verdict}."


def make_item(disease: str, observations: Sequence[Observation]) -> Item:
    """An item of the tables' words with the verdict that follows from the observations; without any, absent."""
    known, verdict = DISEASES[disease], verdict_of(observations)
    return Item(
        disease=disease, definition=known.definition, appearance=known.appearance, observations=list(observations),
        verdict=verdict, verdict_text=verdict_text(disease, verdict),
    )  # fmt: skip


_EXIST: dict[str, Exist] = {"present": "yes", "absent": "no", "possible": "unsure"}


def structured_by_rules(
    study: str, entities: Sequence[Entity], lung: Sequence[Span] | None = None
) -> StructuredReport | None:
    """An item for every disease of the table that the entities name; those looked for in the same body part go unsaid.

    Spans count in the document of the entities. `lung`: where it speaks of the lung; findings that any organ may
    have ("mass") count only there. None where no disease of the table is named and no part of the body can be told.
    """
    told: dict[str, dict[tuple[Exist, str], Span]] = {}
    for entity in entities:
        disease = DISEASE_OF_CONCEPT.get(entity.concept, entity.concept)
        if disease not in DISEASES:
            continue
        if disease in OF_THE_LUNG and lung is not None and not within((entity.start, entity.end), lung):
            continue
        place = (_EXIST[entity.status], _position(entity))
        told.setdefault(disease, {}).setdefault(place, (entity.start, entity.end))
    # A chest CT that tells of a rib looks for no dislocation, and one that names the lung only calls it normal.
    parts: set[BodyPart] = {"chest"} if lung else {DISEASES[disease].part for disease in told}
    wanted = set(told).union(*(LOOKED_FOR[part] for part in parts))
    if not wanted:
        return None
    items = [
        make_item(
            name, [observe(name, exist, position=place, span=span) for (exist, place), span in told[name].items()]
        )
        for name in filter(told.__contains__, DISEASES)
    ]
    return StructuredReport(
        study=study, items=items, unsaid=[name for name in filter(wanted.__contains__, DISEASES) if name not in told]
    )


@cache
def _unsaid(disease: str) -> Item:
    """The item of a disease that was looked for and is not spoken of. Shared between reports: no one may change it."""
    return make_item(disease, [observe(disease, "no")])


def _position(entity: Entity) -> str:
    side = {"left": "left", "right": "right", "bilateral": "both sides", None: ""}[entity.laterality]
    if not side or not entity.position:
        return entity.position or (f"{side} side" if side in ("left", "right") else side)
    return f"{entity.position}, {side}" if side == "both sides" else f"{side} {entity.position}"


def checked(report: StructuredReport, text: str) -> StructuredReport:
    """The report with every verdict that its observations do not bear out made uncertain. `text`: see `source_text`.

    Raises DataError naming item and observation by number when a span lies outside of `text` or holds no word.
    """
    items = []
    mended = False
    for place, item in enumerate(report.items):
        for number, observation in enumerate(item.observations):
            if observation.span is None:
                continue
            first, last = observation.span
            if last > len(text) or not (text[first].isalnum() or any(map(str.isalnum, text[first:last]))):
                raise DataError(
                    f"structured report: span [{first}, {last}) of observation {number} of item {place} is no part "
                    f"of the report of {len(text)} characters; give offsets in its sections joined in alphabetical "
                    "order"
                )
        if item.verdict not in (verdict_of(item.observations), "uncertain"):
            # Of a disease outside of the table the statement can only be put in general words.
            known = item.disease in DISEASES
            words = verdict_text(item.disease, "uncertain") if known else f"Verdict: {item.disease} uncertain."
            item = replace(item, verdict="uncertain", verdict_text=words)
            mended = True
        items.append(item)
    return replace(report, items=items) if mended else report


def answers(item: Item) -> list[str]:
    """What was observed, in words, without the questions."""
    return [observation.answer for observation in item.observations]


def finding_key(report: StructuredReport) -> int:
    """Equal for equal sets of diseases that are present or uncertain; "no finding" is one key.

    Doubt makes no set of its own: how sure a report is says as much about the quality of the image as about what it
    shows, and two reports of one finding are no negatives because one of them hedges.
    """
    found = sorted(item.disease for item in report.items if item.verdict != "absent")
    return keyed.text_key("; ".join(found) or "no finding")


@dataclass(frozen=True, kw_only=True)
class Config:
    """What of a structured report a training step reads."""

    diseases: int = 3  # at most; one place is kept for an absent disease
    definition_drop: float = 0.3  # chance, for every disease alike

    def __post_init__(self) -> None:
        if self.diseases < 2:
            raise ConfigError(f"diseases={self.diseases}: use 2 or more, since one place goes to an absent disease")
        if not 0.0 <= self.definition_drop <= 1.0:
            raise ConfigError(f"definition_drop={self.definition_drop} is no probability; use 0 to 1")


def serialise(report: StructuredReport, config: Config, key: tuple[int, int, int] | None = None) -> list[Part]:
    """Sections of up to `diseases` diseases in reading order: definition, appearance, observation, verdict of each.

    `key` (seed, epoch, sample id) draws which diseases, their order, and which definitions are dropped; None, for
    evaluation, takes the first in the record's order and drops none. Present and uncertain diseases come before absent
    ones in the choice, but an absent one is always among them if there is any, and a definition is dropped with the
    same chance whatever the verdict: what the text is about must not tell what was found.
    """
    order = list(range(len(report.items)))
    reading = order
    kept = [True] * len(order)
    if key is not None:
        seed, epoch, sample_id = key
        order = keyed.permutation(len(order), seed, "report/choice", epoch, sample_id).tolist()
        # Another one: by the first, which takes what comes early, the absent would stand before the found.
        reading = keyed.permutation(len(order), seed, "report/order", epoch, sample_id).tolist()
        chance = keyed.uniform(seed, "report/definition", epoch, sample_id, draws=len(order))
        kept = (chance >= config.definition_drop).tolist()
    found = [place for place in order if report.items[place].verdict != "absent"]
    absent = [place for place in order if report.items[place].verdict == "absent"]
    chosen = found[: config.diseases - bool(absent)]
    chosen += absent[: config.diseases - len(chosen)]
    parts: list[Part] = []
    for place in sorted(chosen, key=reading.index):
        item = report.items[place]
        if kept[place]:
            parts.append((DEFINITION, item.definition))
        parts.append((APPEARANCE, item.appearance))
        observed = " ".join(f"{observation.question} {observation.answer}" for observation in item.observations)
        if observed:
            parts.append((OBSERVATION, observed))
        parts.append((VERDICT, item.verdict_text))
    return parts
