"""Words of the CT phantom: its organs and diseases, how a report states them or calls an organ normal; prompts.

Every sentence is chosen by numbers passed in, so a report is a pure function of its scene. Nothing here draws a volume.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Any

ORGANS = ("lung", "heart", "aorta", "liver", "spleen", "kidney")  # of shards.reports.anatomy.ANATOMIES


@dataclass(frozen=True, kw_only=True)
class Disease:
    """What there is to say of one disease. Templates know {side} {place} {size}; sizes go from faint to strong."""

    anatomy: str
    sides: tuple[str, ...] = ("",)
    places: tuple[str, ...] = ("",)
    sizes: tuple[str, ...] = ("mild", "moderate", "marked")
    stated: tuple[str, ...]
    concluded: tuple[str, ...]  # for the impression


BOTH_SIDES = ("left", "right")
DISEASES: dict[str, Disease] = {
    "consolidation": Disease(
        anatomy="lung", sides=BOTH_SIDES, places=("upper", "lower"), sizes=("small", "moderate", "extensive"),
        stated=(
            "There is {size} consolidation in the {side} {place} lobe.",
            "{size} airspace consolidation with air bronchograms is seen in the {side} {place} lobe.",
            "The {side} {place} lobe shows {size} consolidation.",
        ),
        concluded=("{side} {place} lobe consolidation.", "{size} pneumonic consolidation of the {side} {place} lobe."),
    ),
    "emphysema": Disease(
        anatomy="lung", places=("centrilobular", "panlobular"), sizes=("mild", "moderate", "severe"),
        stated=(
            "There is {size} {place} emphysema in both lungs.",
            "{size} {place} emphysematous changes are present in both lungs.",
            "Both lungs show {size} emphysema of {place} type.",
        ),
        concluded=("{size} pulmonary emphysema.", "{size} {place} emphysema."),
    ),
    "pleural effusion": Disease(
        anatomy="lung", sides=(*BOTH_SIDES, "bilateral"), sizes=("small", "moderate", "large"),
        stated=(
            "There is a {size} {side} pleural effusion.",
            "{size} {side} pleural effusion is present.",
            "A {size} {side} pleural effusion layers posteriorly.",
        ),
        concluded=("{size} {side} pleural effusion.", "{side} pleural effusion."),
    ),
    "cardiomegaly": Disease(
        anatomy="heart", sizes=("mildly", "moderately", "markedly"),
        stated=(
            "The heart is {size} enlarged.", "Heart size is {size} increased.",
            "The cardiac chambers are {size} dilated.",
        ),
        concluded=("Cardiomegaly.", "{size} enlarged heart."),
    ),
    "pericardial effusion": Disease(
        anatomy="heart", sizes=("small", "moderate", "large"),
        stated=(
            "There is a {size} pericardial effusion.", "{size} pericardial effusion surrounds the heart.",
            "A {size} amount of pericardial fluid is present.",
        ),
        concluded=("{size} pericardial effusion.", "Pericardial effusion."),
    ),
    "aortic aneurysm": Disease(
        anatomy="aorta", places=("descending thoracic", "abdominal"), sizes=("40 mm", "50 mm", "60 mm"),
        stated=(
            "The {place} aorta is dilated to {size}.",
            "There is an aneurysm of the {place} aorta measuring {size}.",
            "Aneurysmal dilatation of the {place} aorta, {size} in diameter.",
        ),
        concluded=("{place} aortic aneurysm.", "Aneurysm of the {place} aorta, {size}."),
    ),
    "aortic calcification": Disease(
        anatomy="aorta",
        stated=(
            "There are {size} calcifications of the aortic wall.",
            "{size} calcified atheromatous plaques are seen along the aorta.",
            "The aorta shows {size} wall calcification.",
        ),
        concluded=("{size} aortic calcification.", "Atherosclerotic calcification of the aorta."),
    ),
    "hepatic steatosis": Disease(
        anatomy="liver", sizes=("mild", "moderate", "severe"),
        stated=(
            "Liver attenuation is diffusely decreased, consistent with {size} hepatic steatosis.",
            "There is {size} diffuse fatty infiltration of the liver.",
            "The liver is diffusely hypodense, indicating {size} steatosis.",
        ),
        concluded=("{size} hepatic steatosis.", "{size} fatty liver."),
    ),
    "liver mass": Disease(
        anatomy="liver", places=("right", "left"), sizes=("40 mm", "50 mm", "60 mm"),
        stated=(
            "There is a {size} hypodense mass in the {place} lobe of the liver.",
            "A hypodense mass measuring {size} is seen in the {place} hepatic lobe.",
            "The {place} hepatic lobe contains a {size} hypodense mass.",
        ),
        concluded=("Hypodense mass in the {place} lobe of the liver.", "{size} liver mass."),
    ),
    "splenomegaly": Disease(
        anatomy="spleen", sizes=("mildly", "moderately", "markedly"),
        stated=(
            "The spleen is {size} enlarged.", "Spleen size is {size} increased.",
            "There is splenomegaly, {size} enlarged spleen.",
        ),
        concluded=("Splenomegaly.", "{size} enlarged spleen."),
    ),
    "splenic infarct": Disease(
        anatomy="spleen", sizes=("small", "moderate", "large"),
        stated=(
            "There is a {size} wedge-shaped hypodense infarct in the spleen.",
            "A {size} peripheral splenic infarct is seen.",
            "The spleen shows a {size} hypodense infarct.",
        ),
        concluded=("{size} hypodense splenic infarct.", "Hypodense infarct of the spleen."),
    ),
    "hydronephrosis": Disease(
        anatomy="kidney", sides=BOTH_SIDES, sizes=("mild", "moderate", "severe"),
        stated=(
            "There is {size} {side} hydronephrosis.",
            "The {side} renal collecting system is dilated, {size} hydronephrosis.",
            "{size} hydronephrosis of the {side} kidney is present.",
        ),
        concluded=("{size} {side} hydronephrosis.", "{side} hydronephrosis."),
    ),
    "kidney stone": Disease(
        anatomy="kidney", sides=BOTH_SIDES, sizes=("14 mm", "18 mm", "22 mm"),
        stated=(
            "There is a {size} stone in the {side} kidney.",
            "A {size} calculus is seen in the {side} renal pelvis.",
            "The {side} kidney contains a {size} calculus.",
        ),
        concluded=("{side} renal stone.", "{size} {side} kidney stone."),
    ),
}  # fmt: skip
LABELS = tuple(DISEASES)
LABELS_OF_ORGAN = {
    organ: tuple(name for name, disease in DISEASES.items() if disease.anatomy == organ) for organ in ORGANS
}

# What reports say of a normal organ, aspect by aspect, each in some wordings. Like reports of CT-RATE, a report names
# most normal organs and words them in many ways; `python -m ci.data.normal_texts` measures both, and the shares below.
NORMAL_ASPECTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "lung": (
        ("The lungs are clear.", "Both lungs are normally aerated.", "Aeration of both lungs is normal."),
        (
            "No focal consolidation or nodule in the lungs.", "No consolidation in either lung.",
            "No infiltration or mass was detected in the lungs.",
        ),
        ("No pleural effusion or pneumothorax.", "Pleural effusion was not detected.", "No pleural effusion."),
        ("No emphysema.", "The lungs show no emphysematous changes."),
    ),
    "heart": (
        ("Heart size is normal.", "The heart is normal in size.", "Heart contour and size are normal."),
        ("No pericardial effusion.", "Pericardial effusion was not observed.", "No fluid in the pericardium."),
        ("The cardiac chambers are of normal size.", "The cardiac chambers are not dilated."),
        ("The heart is unremarkable.",),
    ),
    "aorta": (
        (
            "The aorta is normal in caliber.", "The thoracic and abdominal aorta are of normal diameter.",
            "The diameter of the aorta is normal.",
        ),
        ("No aortic aneurysm.", "No aneurysm or dissection of the aorta.", "The aorta is not dilated."),
        ("No aortic calcification.", "No calcified plaque in the aorta."),
        ("The aorta is unremarkable.",),
    ),
    "liver": (
        ("The liver is normal in size and attenuation.", "Liver size is normal.", "Liver contours are regular."),
        ("The liver is homogeneous.", "Liver attenuation is normal.", "No hepatic steatosis."),
        ("No focal liver lesion.", "No mass in the liver.", "No space-occupying lesion was detected in the liver."),
        ("The liver is unremarkable.",),
    ),
    "spleen": (
        ("The spleen is normal in size.", "Spleen size is within normal limits.", "No splenomegaly."),
        ("No focal splenic lesion.", "No space-occupying lesion in the spleen.", "No splenic infarct."),
        ("The spleen is homogeneous.", "Spleen contours are regular."),
        ("The spleen is unremarkable.",),
    ),
    "kidney": (
        ("Both kidneys are normal in size.", "The size of both kidneys is normal.", "Kidney contours are regular."),
        ("No hydronephrosis.", "Hydronephrosis was not observed on either side."),
        ("No renal stone on either side.", "No calculus in the kidneys.", "No renal calculus was detected."),
        ("The kidneys are unremarkable.",),
    ),
}  # fmt: skip
NORMAL_SENTENCES = {organ: tuple(chain.from_iterable(aspects)) for organ, aspects in NORMAL_ASPECTS.items()}
USUAL_ASPECTS = 2  # of a report that says the usual: the first wordings of the first aspects
USUAL_SHARE = 0.3
# Said of two normal organs at once.
JOINT_NORMAL = {
    ("heart", "aorta"): ("The heart and the aorta are unremarkable.",),
    ("liver", "spleen"): ("The liver and spleen are normal in size.", "Liver and spleen are unremarkable."),
}
JOINT_SHARE = 0.15
# Of the normal organs of a kind, those that a report names.
MENTIONED_SHARE = {"lung": 0.99, "heart": 0.97, "aorta": 0.87, "liver": 0.70, "spleen": 0.62, "kidney": 0.64}
NORMAL_IMPRESSIONS = (
    "No acute abnormality.",
    "No significant abnormality on this examination.",
    "Normal examination.",
)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One disease of a scene."""

    name: str
    strength: float  # (0, 1]
    side: str
    place: str
    along: float  # -1 .. 1, three numbers that place it within its organ
    across: float
    around: float

    @property
    def anatomy(self) -> str:
        return DISEASES[self.name].anatomy

    @property
    def size(self) -> str:
        """Its size or severity in words."""
        sizes = DISEASES[self.name].sizes
        return sizes[min(len(sizes) - 1, int(self.strength * len(sizes)))]

    def on(self, side: str) -> bool:
        """Whether it affects the organ of this side."""
        return self.side in (side, "bilateral")

    def entity(self) -> dict[str, Any]:
        """As `StudyRecord.entities` holds it."""
        return {
            "finding": self.name, "anatomy": self.anatomy, "side": self.side, "place": self.place, "size": self.size,
            "strength": round(self.strength, 6),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Report:
    """`sections` (findings, impression) and what each says by organ."""

    sections: dict[str, str]
    findings: dict[str, str]
    impression: dict[str, str]

    @property
    def anatomy(self) -> dict[str, str]:
        """Organ -> all that is said of it, impression first."""
        return {
            organ: " ".join(text[organ] for text in (self.impression, self.findings) if organ in text)
            for organ in self.findings
        }


def _fill(template: str, side: str, place: str, size: str) -> str:
    text = template.format(side=side, place=place, size=size)
    return text[0].upper() + text[1:]


def write_report(findings: Sequence[Finding], draw: Callable[[int], Any]) -> Report:
    """The report of a scene, organ by organ. `draw(count)` gives `count` numbers in [0, 1): the choice of words.

    Every disease is stated in findings and impression; of the normal organs `MENTIONED_SHARE` are named in findings
    only, by one to all of their aspects, and the rest go unsaid. No report is silent on all of them.
    """
    numbers = iter(draw(96).tolist())

    def pick(options: Sequence[str]) -> str:
        return options[int(next(numbers) * len(options))]

    def normal(organ: str) -> str:
        aspects = NORMAL_ASPECTS[organ]
        if next(numbers) < USUAL_SHARE:
            return " ".join(wordings[0] for wordings in aspects[:USUAL_ASPECTS])
        chosen = 1 + int(next(numbers) * (2 ** len(aspects) - 1))  # a bit for each aspect, never none
        return " ".join(pick(wordings) for place, wordings in enumerate(aspects) if chosen >> place & 1)

    abnormal = {finding.anatomy for finding in findings}
    said: dict[str, str] = {}  # sentence of findings for each organ that is named
    concluded: dict[str, str] = {}
    for finding in findings:
        words = (finding.side, finding.place, finding.size)
        disease = DISEASES[finding.name]
        stated, short = _fill(pick(disease.stated), *words), _fill(pick(disease.concluded), *words)
        said[finding.anatomy] = f"{said[finding.anatomy]} {stated}" if finding.anatomy in said else stated
        concluded[finding.anatomy] = f"{concluded[finding.anatomy]} {short}" if finding.anatomy in concluded else short
    for pair, sentences in JOINT_NORMAL.items():
        if next(numbers) < JOINT_SHARE and not abnormal.intersection(pair):
            said |= dict.fromkeys(pair, pick(sentences))
    for organ in ORGANS:
        if organ not in said and next(numbers) < MENTIONED_SHARE[organ]:
            said[organ] = normal(organ)
    if not said:  # a report without findings would not be annotated by anatomy
        organ = pick(ORGANS)
        said[organ] = normal(organ)
    said = {organ: said[organ] for organ in ORGANS if organ in said}
    concluded = {organ: concluded[organ] for organ in ORGANS if organ in concluded}
    sections = {
        "findings": " ".join(dict.fromkeys(said.values())),  # a sentence on two organs stands once, with the first
        "impression": " ".join(concluded.values()) or pick(NORMAL_IMPRESSIONS),
    }
    return Report(sections=sections, findings=said, impression=concluded)


def stated_diseases(text: str) -> set[str]:
    """Names of the diseases that a report in the phantom's words states, whatever its case and white space.

    Sentence by sentence: one that is not whole, or in other words, states nothing.
    """
    sentences = {_plain(sentence) for sentence in text.split(".")}
    return {name for name, stated in _stated().items() if any(map(stated.fullmatch, sentences))}


@cache
def _stated() -> dict[str, re.Pattern[str]]:
    """Of each disease what all of its sentences match."""
    found = {}
    for name, disease in DISEASES.items():
        words = {"side": disease.sides, "place": disease.places, "size": disease.sizes}
        choices = {kind: f"({'|'.join(map(_plain, options))})" for kind, options in words.items()}
        templates = (*disease.stated, *disease.concluded)
        sentences = [" ".join(template.format(**choices).split()) for template in map(_plain_template, templates)]
        found[name] = re.compile("|".join(sentences))
    return found


def _plain_template(template: str) -> str:
    return re.sub(r"[^\w{}]+", " ", template.lower()).strip()


def _plain(text: str) -> str:
    """Its words in lower case, a space between them."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _prompts(name: str) -> dict[str, list[str]]:
    """What is said of the anatomy with this disease, impression and findings as in a report, or where it is normal."""
    disease = DISEASES[name]
    places = [(side, place) for side in disease.sides for place in disease.places]
    positive = []
    for position, place in enumerate(places):
        for step, template in enumerate(disease.stated):
            words = (*place, disease.sizes[(position + step) % len(disease.sizes)])
            positive.append(
                f"{_fill(disease.concluded[step % len(disease.concluded)], *words)} {_fill(template, *words)}"
            )
    return {"positive": positive, "negative": list(NORMAL_SENTENCES[disease.anatomy])}


# Label -> texts about its anatomy alone, as a study's `anatomy` member holds them.
PROMPTS: dict[str, dict[str, list[str]]] = {name: _prompts(name) for name in LABELS}
