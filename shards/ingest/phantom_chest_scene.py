"""The scene graph of a chest phantom, drawn from a key: anatomy, up to eight findings, and how sure each is.

Lengths are in units of half the image (image x and y in [-1, 1], y downwards, the patient's right on the left).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from shards.ingest.phantom_chest_text import FINDINGS, LABELS, Finding
from shards.keyed import uniform

ORGANS = ("right lung", "left lung", "heart")
MASKS: dict[str, int] = {name: number for number, name in enumerate((*ORGANS, *LABELS), start=1)}
FIELD_OF_VIEW_MM = 400.0


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """How hard a phantom is. `EASY` and `STANDARD` are fixed: what needs another one changes itself."""

    prevalence: Mapping[str, float]  # chance that a finding is drawn in a study that is not normal by decree
    normal: float  # share of studies that are normal by decree
    weakest: float  # smallest strength drawn
    decision: float  # strength at which the truth is an even coin
    blur: float  # width in strength over which the coin goes from sure to sure
    contrast: float  # factor on the attenuation of findings
    bulk: float  # factor on the size of focal findings
    noise: float  # standard deviation of the detector's noise at mid grey
    variation: float  # factor on the spread of anatomy, pose and exposure
    clutter: float  # chance of each look-alike: skin fold, nipple shadow, line, fat pad


EASY = Difficulty(
    prevalence={
        "effusion": 0.30, "cardiomegaly": 0.28, "consolidation": 0.28, "edema": 0.24, "atelectasis": 0.26,
        "nodule": 0.26, "pneumothorax": 0.20, "hernia": 0.12,
    },
    normal=0.25, weakest=0.40, decision=0.40, blur=0.10, contrast=1.8, bulk=1.8, noise=0.02, variation=0.5, clutter=0.0,
)  # fmt: skip
STANDARD = Difficulty(
    prevalence={
        "effusion": 0.26, "cardiomegaly": 0.22, "consolidation": 0.20, "edema": 0.14, "atelectasis": 0.12,
        "nodule": 0.10, "pneumothorax": 0.07, "hernia": 0.04,
    },
    normal=0.35, weakest=0.05, decision=0.25, blur=0.40, contrast=0.75, bulk=1.0, noise=0.06, variation=1.0,
    clutter=0.35,
)  # fmt: skip
DIFFICULTIES: dict[str, Difficulty] = {"easy": EASY, "standard": STANDARD}


@dataclass(frozen=True, kw_only=True)
class Anatomy:
    """One patient in one pose. Lengths in half images; see the module's head for axes."""

    tilt: float  # tangent of the rotation in the image plane
    scale: float
    shift_x: float
    shift_y: float
    turn: float  # rotation about the long axis: moves the mediastinum against the cage
    cage: float  # half width of the thorax
    apex: float  # y of the lung apices
    diaphragm: float  # y of the right dome; the left one is lower
    heart_ratio: float  # heart's width over the thorax's (cardiothoracic ratio)
    rib_spacing: float
    rib_phase: float
    rib_slope: float
    bone: float  # mineralisation: factor on bone attenuation
    tissue: float  # soft tissue in front of the lungs
    breast: float
    vessels: float
    exposure: float
    latitude: float  # attenuation from black to white


@dataclass(frozen=True, kw_only=True)
class Scene:
    """All that is known about one phantom: what the image and the report are made from."""

    seed: int
    index: int
    patient: int
    sex: Literal["F", "M"]
    age_years: int
    anatomy: Anatomy
    findings: tuple[Finding, ...]
    clutter: tuple[str, ...]


class Draws:
    """Uniform numbers in [0, 1) of one key, taken one after the other."""

    def __init__(self, seed: int, purpose: str, identifier: int, count: int) -> None:
        self._values = iter(uniform(seed, purpose, identifier, draws=count).tolist())

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * next(self._values)

    def bell(self, mean: float, spread: float) -> float:
        """About normal (sum of four uniforms), never beyond 3.5 spreads: no anatomy leaves the image."""
        return mean + spread * 1.7320508 * (sum(next(self._values) for _ in range(4)) - 2.0)

    def chance(self, probability: float) -> bool:
        return next(self._values) < probability

    def pick(self, options: tuple[str, ...]) -> str:
        return options[int(next(self._values) * len(options))]


def patient_of(index: int) -> int:
    """Patient of study `index`: every other patient has two studies."""
    return (2 * index) // 3


def draw_scene(seed: int, index: int, difficulty: Difficulty) -> Scene:
    """The scene of study `index`. The patient decides anatomy and the chronic findings, the study pose and the rest."""
    patient = patient_of(index)
    body = Draws(seed, "chest phantom: patient", patient, 96)
    sex: Literal["F", "M"] = "F" if body.chance(0.5) else "M"
    age_years = int(body.between(18, 90))
    spread = difficulty.variation
    anatomy = Anatomy(
        cage=body.bell(0.88, 0.035 * spread), apex=body.bell(-0.76, 0.035 * spread),
        diaphragm=body.bell(0.46, 0.055 * spread), heart_ratio=body.bell(0.44, 0.022 * spread),
        rib_spacing=body.bell(0.165, 0.010 * spread), rib_phase=body.between(0.0, 1.0),
        rib_slope=body.bell(0.26, 0.06 * spread), bone=body.bell(1.0, 0.18 * spread),
        tissue=max(0.0, body.bell(0.06, 0.04 * spread)), vessels=body.bell(1.0, 0.15 * spread),
        breast=max(0.0, body.bell(0.10, 0.05)) * (sex == "F"),
        tilt=0.0, scale=1.0, shift_x=0.0, shift_y=0.0, turn=0.0, exposure=0.0, latitude=1.0,
    )  # fmt: skip
    chronic = {name: _draw_finding(name, body, difficulty) for name in ("cardiomegaly", "hernia")}

    study = Draws(seed, "chest phantom: study", index, 160)
    anatomy = replace(
        anatomy, tilt=study.bell(0.0, 0.035 * spread), scale=study.bell(1.0, 0.04 * spread),
        shift_x=study.bell(0.0, 0.04 * spread), shift_y=study.bell(0.0, 0.04 * spread),
        turn=study.bell(0.0, 0.025 * spread), exposure=study.bell(0.0, 0.05 * spread),
        latitude=study.bell(1.15, 0.10 * spread), diaphragm=anatomy.diaphragm + study.bell(0.0, 0.02 * spread),
    )  # fmt: skip
    normal = study.chance(difficulty.normal)
    drawn = {name: chronic.get(name) or _draw_finding(name, study, difficulty) for name in LABELS}
    shown = uniform(seed, "chest phantom: findings", index, draws=len(LABELS)).tolist()
    chronic_shown = uniform(seed, "chest phantom: chronic findings", patient, draws=len(LABELS)).tolist()
    findings = []
    for position, name in enumerate(LABELS):
        chance = chronic_shown[position] if name in chronic else shown[position]
        if chance < difficulty.prevalence[name] and (name in chronic or not normal):
            findings.append(drawn[name])
    clutter = tuple(
        name for name in ("fold", "nipples", "line", "fat pad", "marker") if study.chance(difficulty.clutter)
    )
    return Scene(
        seed=seed, index=index, patient=patient, sex=sex, age_years=age_years, anatomy=anatomy,
        findings=tuple(findings), clutter=clutter,
    )  # fmt: skip


def _draw_finding(name: str, draws: Draws, difficulty: Difficulty) -> Finding:
    """Strength, truth and place of one finding. Every finding takes the same number of draws."""
    strength = draws.between(difficulty.weakest, 1.0)
    rise = (strength - difficulty.decision) / difficulty.blur
    probability = float(min(1.0, max(0.0, 0.5 + rise)))
    kind = FINDINGS[name]
    return Finding(
        name=name, strength=strength, probability=probability, present=draws.chance(probability),
        side=draws.pick(kind.sides), zone=draws.pick(kind.zones),
        along=draws.between(-1.0, 1.0), across=draws.between(-1.0, 1.0), extra=draws.between(0.0, 1.0),
        bulk=difficulty.bulk,
    )  # fmt: skip


def ceiling(seed: int, count: int, difficulty: Difficulty) -> dict[str, float]:
    """AUC per label of the best possible reader: one who knows each finding's true probability of being called.

    Computed on the scenes of studies 0 .. count - 1. A label with a single class gives NaN.
    """
    scores = np.zeros((count, len(LABELS)))
    truth = np.zeros((count, len(LABELS)), dtype=bool)
    for index in range(count):
        for finding in draw_scene(seed, index, difficulty).findings:
            column = LABELS.index(finding.name)
            scores[index, column] = finding.probability
            truth[index, column] = finding.present
    areas = {}
    for column, name in enumerate(LABELS):
        positive, negative = scores[truth[:, column], column], scores[~truth[:, column], column]
        if not len(positive) or not len(negative):
            areas[name] = float("nan")
            continue
        ordered = np.sort(negative)  # AUC = chance that a positive outscores a negative, ties counting half
        below, below_or_equal = np.searchsorted(ordered, positive, "left"), np.searchsorted(ordered, positive, "right")
        areas[name] = float((below + below_or_equal).mean() / 2.0 / len(negative))
    return areas
