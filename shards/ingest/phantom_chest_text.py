"""Words of the chest phantom: what a finding is called, how a report states, hedges or denies it; prompts.

Every sentence is chosen by numbers passed in, so a report is a pure function of its scene. Nothing here draws an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from shards.reports.structured import (
    Config,
    Exist,
    Observation,
    Part,
    StructuredReport,
    checked,
    make_item,
    observe,
    serialise,
    source_text,
)

HEDGED_FROM, HEDGED_TO = 0.15, 0.85  # probability of truth between which a report hedges


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What there is to say about one finding. Templates know {side} {zone} {size}; sizes go from faint to strong."""

    organ: str
    sides: tuple[str, ...]
    zones: tuple[str, ...]
    sizes: tuple[str, ...]
    stated: tuple[str, ...]
    hedged: tuple[str, ...]
    concluded: tuple[str, ...]  # for the impression
    denied: tuple[str, ...]


ZONES = ("upper", "mid", "lower")
FINDINGS: dict[str, Kind] = {
    "atelectasis": Kind(
        organ="lungs", sides=("left", "right"), zones=("lower", "mid"), sizes=("minimal", "mild", "marked"),
        stated=(
            "There is {size} linear atelectasis in the {side} {zone} zone.",
            "Plate-like atelectasis in the {side} {zone} lung, {size}, with elevation of the hemidiaphragm.",
            "{size} {side} {zone} zone atelectasis with volume loss.",
            "A band of {size} subsegmental atelectasis crosses the {side} {zone} zone.",
        ),
        hedged=(
            "A faint linear density in the {side} {zone} zone may be atelectasis.",
            "Possible minor atelectasis in the {side} {zone} lung.",
        ),
        concluded=("{size} {side} {zone} zone atelectasis.", "{side} {zone} zone linear atelectasis."),
        denied=("No atelectasis.", "No linear opacity or volume loss.", "The hemidiaphragms are at normal height."),
    ),
    "cardiomegaly": Kind(
        organ="heart", sides=("central",), zones=("lower",), sizes=("mildly", "moderately", "severely"),
        stated=(
            "The heart is {size} enlarged.",
            "The cardiac silhouette is {size} enlarged.",
            "There is cardiomegaly, {size} increased heart size.",
            "Heart size is {size} increased.",
        ),
        hedged=("The heart is borderline in size.", "Heart size is at the upper limit of normal."),
        concluded=("Cardiomegaly.", "{size} enlarged heart.", "Enlarged cardiac silhouette."),
        denied=(
            "The heart is normal in size.", "Heart size is within normal limits.", "The cardiac silhouette is normal.",
            "No cardiomegaly.",
        ),
    ),
    "consolidation": Kind(
        organ="lungs", sides=("left", "right"), zones=ZONES, sizes=("small", "moderate", "extensive"),
        stated=(
            "There is {size} consolidation in the {side} {zone} zone.",
            "{size} airspace consolidation in the {side} {zone} lung.",
            "Patchy opacity in the {side} {zone} zone consistent with {size} consolidation.",
            "The {side} {zone} lung shows {size} airspace opacity.",
        ),
        hedged=(
            "A vague opacity in the {side} {zone} zone could be early consolidation.",
            "Questionable airspace opacity in the {side} {zone} lung.",
        ),
        concluded=(
            "{size} {side} {zone} zone consolidation.", "{side} {zone} lung consolidation, likely pneumonia.",
        ),
        denied=("No consolidation.", "No focal airspace opacity.", "The lungs are free of consolidation."),
    ),
    "edema": Kind(
        organ="lungs", sides=("bilateral",), zones=("mid",), sizes=("mild", "moderate", "severe"),
        stated=(
            "There is {size} interstitial pulmonary edema.",
            "Bilateral perihilar haze and thickened septal lines, {size} pulmonary edema.",
            "{size} pulmonary vascular congestion with interstitial edema.",
            "Perihilar opacities on both sides indicate {size} edema.",
        ),
        hedged=("Possible minimal interstitial edema.",
            "The vessels are slightly indistinct, early edema is not excluded.",
        ),
        concluded=("{size} pulmonary edema.", "{size} interstitial edema."),
        denied=("No pulmonary edema.", "The pulmonary vessels are normal.", "No vascular congestion."),
    ),
    "effusion": Kind(
        organ="pleura", sides=("left", "right", "left", "right", "bilateral"), zones=("lower",),
        sizes=("small", "moderate", "large"),
        stated=(
            "There is a {size} {side} pleural effusion.",
            "{size} {side} pleural effusion with blunting of the costophrenic angle.",
            "{side} pleural fluid is {size} in amount.",
            "A {size} {side} effusion obscures the hemidiaphragm.",
        ),
        hedged=(
            "Slight blunting of the {side} costophrenic angle may be a trace effusion.",
            "A tiny {side} pleural effusion cannot be excluded.",
        ),
        concluded=("{size} {side} pleural effusion.", "{side} effusion, {size}."),
        denied=("No pleural effusion.", "The costophrenic angles are sharp.", "No pleural fluid is seen."),
    ),
    "hernia": Kind(
        organ="mediastinum", sides=("central",), zones=("lower",), sizes=("small", "moderate", "large"),
        stated=(
            "There is a {size} hiatal hernia behind the heart.",
            "A retrocardiac air-fluid level indicates a {size} hiatal hernia.",
            "{size} hiatal hernia.",
        ),
        hedged=("A faint retrocardiac lucency may be a small hiatal hernia.",),
        concluded=("{size} hiatal hernia.", "Hiatal hernia."),
        denied=("No hiatal hernia.", "The mediastinum is unremarkable.", "No retrocardiac mass."),
    ),
    "nodule": Kind(
        organ="lungs", sides=("left", "right"), zones=ZONES, sizes=("",),
        stated=(
            "There is a {size} nodule in the {side} {zone} zone.",
            "A {size} round nodule projects over the {side} {zone} lung.",
            "Solitary pulmonary nodule of {size} in the {side} {zone} zone.",
            "{size} nodular opacity in the {side} {zone} lung.",
        ),
        hedged=(
            "A questionable {size} nodule in the {side} {zone} zone.",
            "Possible {size} nodular density over the {side} {zone} lung.",
        ),
        concluded=("{size} {side} {zone} zone nodule.", "Nodule in the {side} {zone} lung."),
        denied=("No pulmonary nodule.", "No suspicious nodule or mass.", "No nodular opacity."),
    ),
    "pneumothorax": Kind(
        organ="pleura", sides=("left", "right"), zones=("upper",), sizes=("small", "moderate", "large"),
        stated=(
            "There is a {size} {side} pneumothorax.",
            "{size} {side} apical pneumothorax with a visible pleural line.",
            "A {side} pleural line without lung markings beyond it indicates a {size} pneumothorax.",
            "{side} pneumothorax, {size} in size.",
        ),
        hedged=(
            "A faint {side} apical line, a tiny pneumothorax is not excluded.",
            "Possible tiny {side} pneumothorax.",
        ),
        concluded=("{size} {side} pneumothorax.", "{side} pneumothorax, {size}."),
        denied=("No pneumothorax.", "No pleural line is seen.", "The lungs are fully expanded without pneumothorax."),
    ),
}  # fmt: skip
LABELS = tuple(FINDINGS)

# What most normal studies get, word for word, as from a dictation key.
NORMAL_FINDINGS = (
    {
        "heart": "The heart is normal in size.",
        "lungs": "The lungs are clear.",
        "pleura": "No effusion or pneumothorax.",
    },
    {"heart": "Heart size is within normal limits.", "lungs": "Clear lungs.", "pleura": "No pleural effusion."},
    {"lungs": "The lungs are clear.", "heart": "The cardiac silhouette is normal."},
)
LUNG_FINDINGS = tuple(name for name, kind in FINDINGS.items() if kind.organ == "lungs")
# What each of these sentences denies.
NORMAL_DENIES: dict[str, tuple[str, ...]] = {
    "The heart is normal in size.": ("cardiomegaly",),
    "Heart size is within normal limits.": ("cardiomegaly",),
    "The cardiac silhouette is normal.": ("cardiomegaly",),
    "The lungs are clear.": LUNG_FINDINGS,
    "Clear lungs.": LUNG_FINDINGS,
    "No effusion or pneumothorax.": ("effusion", "pneumothorax"),
    "No pleural effusion.": ("effusion",),
}
NORMAL_SHARE = 0.6
DENIALS_MAX = 2
NORMAL_IMPRESSIONS = (
    "No acute finding.",
    "No acute cardiopulmonary abnormality.",
    "Normal chest radiograph.",
    "No acute disease.",
)
# Said of two findings at once, when both are absent.
JOINT_DENIALS = {
    ("effusion", "pneumothorax"): ("No pleural effusion or pneumothorax.", "No pneumothorax or effusion."),
    ("consolidation", "edema"): ("The lungs are clear.", "No consolidation or edema.", "Clear lungs without edema."),
    ("consolidation", "nodule"): ("No focal consolidation or nodule.",),
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One finding of a scene. Its truth, `present`, was thrown with `probability`."""

    name: str
    strength: float  # (0, 1]
    probability: float
    present: bool
    side: str
    zone: str
    along: float  # -1 .. 1, down the zone
    across: float  # -1 .. 1, from the hilum to the wall
    extra: float  # 0 .. 1
    bulk: float  # factor on its size

    @property
    def hedged(self) -> bool:
        """Whether a report leaves it open."""
        return HEDGED_FROM <= self.probability <= HEDGED_TO

    @property
    def radius_mm(self) -> float:
        """Radius of a nodule."""
        return (7.0 + 12.0 * self.strength) * self.bulk

    @property
    def size(self) -> str:
        """Its size or severity in words."""
        if self.name == "nodule":
            return f"{2 * round(self.radius_mm)} mm"
        sizes = FINDINGS[self.name].sizes
        return sizes[min(len(sizes) - 1, int(self.strength * len(sizes)))]

    def entity(self) -> dict[str, Any]:
        """As `StudyRecord.entities` holds it."""
        return {
            "finding": self.name, "side": self.side, "zone": self.zone, "size": self.size, "present": self.present,
            "certainty": "hedged" if self.hedged else "certain", "strength": round(self.strength, 6),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Statement:
    """One sentence of a report's findings and what it says of which findings. A denial has no side, zone or size."""

    names: tuple[str, ...]
    exist: Exist
    sentence: str
    side: str = ""
    zone: str = ""
    size: str = ""


@dataclass(frozen=True, kw_only=True)
class Report:
    """`sections` (findings, impression) and the same findings by anatomy (lungs, pleura, heart, mediastinum)."""

    sections: dict[str, str]
    anatomy: dict[str, str]
    statements: tuple[Statement, ...]


class Doubt:
    """The reader of a degraded image: hedges each statement with chance `grade`, in the words of any hedge.

    `numbers` are uniform in [0, 1): coins, and the places and sizes of findings that are feared where there are none.
    """

    def __init__(self, grade: float, bulk: float, numbers: Iterable[float]) -> None:
        self._grade, self._bulk, self._numbers = grade, bulk, iter(numbers)

    def strikes(self) -> bool:
        return next(self._numbers) < self._grade

    def coin(self) -> bool:
        return next(self._numbers) < 0.5

    def feared(self, names: tuple[str, ...]) -> Finding:
        """A faint finding of one of `names`, as a denial of them turns into when it is hedged."""
        draws = [next(self._numbers) for _ in range(4)]
        name = names[int(draws[0] * len(names))]
        kind = FINDINGS[name]
        return Finding(
            name=name, strength=0.4 * draws[1], probability=0.5, present=False,
            side=kind.sides[int(draws[2] * len(kind.sides))], zone=kind.zones[int(draws[3] * len(kind.zones))],
            along=0.0, across=0.0, extra=0.0, bulk=self._bulk,
        )  # fmt: skip


def _fill(template: str, side: str, zone: str, size: str) -> str:
    text = template.format(side=side, zone=zone, size=size)
    return text[0].upper() + text[1:]


def write_report(findings: tuple[Finding, ...], draw: Callable[[int], Any], doubt: Doubt | None = None) -> Report:
    """The report of a scene. `draw(count)` gives `count` numbers in [0, 1): the choice of words and of their order.

    Findings that are certain and present are stated, doubtful ones hedged whatever their truth, and those that were
    thrown absent but certain, like some of the absent ones, denied. No report is empty. `doubt` hedges more of the
    statements; a denial that it hedges reads like a doubtful finding, so that no word tells a degraded image.
    """
    numbers = iter(draw(64).tolist())

    def pick(options: tuple[str, ...]) -> str:
        return options[int(next(numbers) * len(options))]

    said: list[tuple[float, str, str]] = []  # place in the report, organ, sentence
    concluded: list[tuple[float, str]] = []
    statements: list[Statement] = []

    def assert_finding(finding: Finding, hedged: bool) -> str:
        words = (finding.side, finding.zone, finding.size)
        kind = FINDINGS[finding.name]
        sentence = _fill(pick(kind.hedged if hedged else kind.stated), *words)
        statements.append(
            Statement(
                names=(finding.name,), exist="unsure" if hedged else "yes", sentence=sentence,
                side=finding.side, zone=finding.zone, size=finding.size,
            )
        )  # fmt: skip
        return sentence

    def conclude(finding: Finding, hedged: bool) -> None:
        prefix = "Possible " if hedged else ""
        text = _fill(pick(FINDINGS[finding.name].concluded), finding.side, finding.zone, finding.size)
        concluded.append((-finding.strength, prefix + text[0].lower() + text[1:] if prefix else text))

    def deny(names: tuple[str, ...], sentence: str) -> str:
        if doubt is None or not doubt.strikes():
            statements.append(Statement(names=names, exist="no", sentence=sentence))
            return sentence
        feared = doubt.feared(names)
        sentence = assert_finding(feared, hedged=True)
        if doubt.coin():
            conclude(feared, hedged=True)
        return sentence

    absent = list(LABELS)
    for finding in findings:
        if not finding.present and not finding.hedged:
            continue
        absent.remove(finding.name)
        hedged = finding.hedged or (doubt is not None and doubt.strikes())
        sentence = assert_finding(finding, hedged)
        said.append((0.6 * next(numbers), FINDINGS[finding.name].organ, sentence))
        if finding.present:
            conclude(finding, hedged)
    if not said and next(numbers) < NORMAL_SHARE:
        anatomy = dict(NORMAL_FINDINGS[int(next(numbers) * len(NORMAL_FINDINGS))])
        impression = pick(NORMAL_IMPRESSIONS[:2])
        anatomy = {organ: deny(NORMAL_DENIES[sentence], sentence) for organ, sentence in anatomy.items()}
        sections = {
            "findings": " ".join(anatomy.values()),
            "impression": " ".join(text for _, text in sorted(concluded)) or impression,
        }
        return Report(sections=sections, anatomy=anatomy, statements=tuple(statements))
    denials = 0
    for pair, sentences in JOINT_DENIALS.items():
        if all(name in absent for name in pair) and denials < DENIALS_MAX and next(numbers) < 0.35:
            absent = [name for name in absent if name not in pair]
            place = 0.3 + 0.7 * next(numbers)
            said.append((place, FINDINGS[pair[0]].organ, deny(pair, pick(sentences))))
            denials += 1
    for name in absent:
        share = 0.35 if name == "cardiomegaly" else 0.08
        if denials < DENIALS_MAX and next(numbers) < share:
            place = 0.3 + 0.7 * next(numbers)
            said.append((place, FINDINGS[name].organ, deny((name,), pick(FINDINGS[name].denied))))
            denials += 1
    if not said:
        said.append((0.0, "lungs", deny(LUNG_FINDINGS, pick(NORMAL_IMPRESSIONS))))
    said.sort()
    concluded.sort()
    anatomy = {}
    for _, organ, sentence in said:
        anatomy[organ] = f"{anatomy[organ]} {sentence}" if organ in anatomy else sentence
    impression = " ".join(text for _, text in concluded) or pick(NORMAL_IMPRESSIONS)
    return Report(
        sections={"findings": " ".join(sentence for _, _, sentence in said), "impression": impression},
        anatomy=anatomy,
        statements=tuple(statements),
    )


def structure(study: str, report: Report) -> StructuredReport:
    """The report with one item for each of `LABELS`: what was stated, hedged or denied; what went unsaid is absent."""
    text = source_text(report.sections)
    items = []
    for name in LABELS:
        observations = []
        for statement in report.statements:
            if name in statement.names:
                start = text.index(statement.sentence)
                observations.append(
                    observe(
                        name, statement.exist, position=_position(name, statement.side, statement.zone),
                        degree=statement.size.removesuffix("ly"), span=(start, start + len(statement.sentence)),
                    )
                )  # fmt: skip
        items.append(make_item(name, observations or [observe(name, "no")]))
    return checked(StructuredReport(study=study, items=items), text)


def _position(name: str, side: str, zone: str) -> str:
    if side in ("", "central"):
        return ""
    if side == "bilateral":
        return "both sides"
    return f"{side} {zone} zone" if FINDINGS[name].organ == "lungs" else f"{side} side"


def _sizes(name: str) -> tuple[str, ...]:
    return ("24 mm", "36 mm", "48 mm") if name == "nodule" else FINDINGS[name].sizes


def _prompts(name: str) -> dict[str, list[str]]:
    """Whole small reports, findings and impression, that state one finding with side, zone and size, or deny it.

    Single sentences will not do: a text encoder that has read reports only takes their shortness for their content
    (after 500 steps of the demo 0.65 macro AUC against 0.91).
    """
    kind = FINDINGS[name]
    sizes, positive = _sizes(name), []
    places = [(side, zone) for side in dict.fromkeys(kind.sides) for zone in kind.zones]
    for position, place in enumerate(places):
        for step, template in enumerate(kind.stated):
            words = (*place, sizes[(position + step) % len(sizes)])
            positive.append(f"{_fill(template, *words)} {_fill(kind.concluded[step % len(kind.concluded)], *words)}")
    negative = [f"{denial} {impression}" for denial in kind.denied for impression in NORMAL_IMPRESSIONS[:2]]
    for findings in NORMAL_FINDINGS:
        negative += [f"{' '.join(findings.values())} {impression}" for impression in NORMAL_IMPRESSIONS[:2]]
    return {"positive": positive, "negative": negative}


def _structured_prompts(name: str) -> dict[str, list[tuple[Part, ...]]]:
    """One item of a structured report as evaluation reads it: seen at each place in each size, or denied."""

    def parts(observation: Observation) -> tuple[Part, ...]:
        report = StructuredReport(study="prompt", items=[make_item(name, [observation])])
        return tuple(serialise(report, Config()))

    kind = FINDINGS[name]
    positive = [
        # The span is asked for of what is seen, and read by nobody: there is no report behind a prompt.
        parts(observe(name, "yes", position=position, degree=size.removesuffix("ly"), span=(0, 1)))
        for position in dict.fromkeys(_position(name, side, zone) for side in kind.sides for zone in kind.zones)
        for size in _sizes(name)
    ]
    return {"positive": positive, "negative": [parts(observe(name, "no"))]}


PROMPTS: dict[str, dict[str, list[str]]] = {name: _prompts(name) for name in LABELS}
STRUCTURED_PROMPTS: dict[str, dict[str, list[tuple[Part, ...]]]] = {name: _structured_prompts(name) for name in LABELS}
