"""The scene of a bone phantom, drawn from a key: which limb of which patient, how mature it is, and what is wrong.

Wrists follow the joint counts of a published set (phantom_bone_wrists.csv); everything else is made up. The patient
decides the limb and what is chronic, the study the pose, the fracture and the views.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from shards.ingest.phantom_chest_scene import Draws, patient_of
from shards.keyed import uniform

Part = Literal["WRIST", "HAND", "KNEE", "LEG", "FOREARM", "TIBIA"]
Sex = Literal["F", "M"]
Side = Literal["L", "R"]
Habit = Literal["FR", "BE", "CH"]  # where the reader learned to write
Kind = Literal["torus", "epiphyseal", "complete"]
Implant = Literal["", "wires", "plate", "nail", "prosthesis"]

LABELS = ("fracture", "anomaly", "implant", "cast", "osteoarthritis")
MEASUREMENTS = ("kl_grade", "bone_age_months", "axis_angle_degrees")
SHARES: dict[Part, float] = {
    "WRIST": 0.32, "HAND": 0.16, "KNEE": 0.24, "LEG": 0.10, "FOREARM": 0.09, "TIBIA": 0.09,
}  # fmt: skip
# Height and width of the film; a leg's is squeezed to a square, as whole films are before training.
FIELD_OF_VIEW_MM: dict[Part, tuple[float, float]] = {
    "WRIST": (100.0, 100.0), "HAND": (200.0, 200.0), "KNEE": (120.0, 120.0), "LEG": (900.0, 450.0),
    "FOREARM": (280.0, 280.0), "TIBIA": (400.0, 400.0),
}  # fmt: skip
CLOSURE_YEARS: dict[Sex, float] = {"F": 15.5, "M": 17.5}  # growth plates of hand and wrist are gone
HEDGED_FROM, HEDGED_TO = 0.2, 0.8  # between these chances of being called, a report leaves a fracture open
KL_DEFINITE = 2  # osteoarthritis from this Kellgren-Lawrence grade on
AXIS_NORMAL_DEGREES = 3.0
BONE_AGE_NORMAL_MONTHS = 24.0
PLACES: dict[Part, tuple[str, ...]] = {
    "WRIST": ("radius",), "HAND": ("metacarpal 5", "metacarpal 2", "phalanx 3", "phalanx 4"),
    "KNEE": ("tibial plateau",), "LEG": (), "FOREARM": ("radius", "ulna"), "TIBIA": ("tibia", "fibula"),
}  # fmt: skip
CAST_PARTS: tuple[Part, ...] = ("FOREARM", "TIBIA", "HAND")  # wrists have theirs from the published set
_FRACTURE_SHARE: dict[Part, float] = {"HAND": 0.12, "KNEE": 0.08, "LEG": 0.0, "FOREARM": 0.55, "TIBIA": 0.50}
IMPLANTS: dict[Part, tuple[Implant, ...]] = {
    "WRIST": ("wires", "plate"), "HAND": ("wires",), "KNEE": ("prosthesis",), "LEG": ("prosthesis",),
    "FOREARM": ("plate",), "TIBIA": ("nail", "plate"),
}  # fmt: skip
_IMPLANT_SHARE: dict[Part, float] = {"HAND": 0.04, "KNEE": 0.12, "LEG": 0.15, "FOREARM": 0.22, "TIBIA": 0.25}
_LESION_SHARE: dict[Part, float] = {"WRIST": 0.03, "HAND": 0.06, "KNEE": 0.05, "LEG": 0.0, "FOREARM": 0.06,
                                    "TIBIA": 0.08}  # fmt: skip
_SECOND_VIEW: dict[Part, str] = {
    "WRIST": "LATERAL", "HAND": "OBLIQUE", "KNEE": "LATERAL", "FOREARM": "LATERAL", "TIBIA": "LATERAL",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """How hard a phantom is. `EASY` and `STANDARD` are fixed: what needs another one changes itself."""

    weakest: float  # smallest strength of a fracture
    decision: float  # strength at which the truth is an even coin
    blur: float  # width in strength over which the coin goes from sure to sure
    contrast: float  # factor on what a finding changes
    noise: float  # standard deviation of the detector's noise at mid grey
    variation: float  # factor on the spread of anatomy, pose, exposure and maturity
    clutter: float  # chance of each look-alike: nutrient canal, skin fold
    one_view: float  # chance that a fracture is all but hidden in all views but one


EASY = Difficulty(
    weakest=0.45, decision=0.35, blur=0.10, contrast=1.5, noise=0.02, variation=0.5, clutter=0.0, one_view=0.2
)
STANDARD = Difficulty(
    weakest=0.10, decision=0.30, blur=0.35, contrast=1.0, noise=0.05, variation=1.0, clutter=0.35, one_view=0.5
)
DIFFICULTIES: dict[str, Difficulty] = {"easy": EASY, "standard": STANDARD}


@dataclass(frozen=True, kw_only=True)
class Wrist:
    """One cell of the published counts."""

    age_years: int
    sex: Sex
    side: Side
    fracture: Literal["none", "torus", "epiphyseal", "complete"]
    cast: bool
    metal: bool
    views: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Fracture:
    """A fracture, or what looks like one: `present`, its truth, was thrown with `probability`."""

    kind: Kind
    place: str  # the bone
    strength: float  # (0, 1]
    probability: float
    present: bool
    along: float  # 0 .. 1, where on its stretch of the bone
    slant: float  # -1 .. 1
    shift: float  # -1 .. 1, the sign of the displacement
    shown: tuple[float, ...]  # by view: 1 as it is, near 0 where it hides

    @property
    def hedged(self) -> bool:
        """Whether a report leaves it open."""
        return HEDGED_FROM <= self.probability <= HEDGED_TO

    @property
    def displacement(self) -> float:
        """0 none .. 1 by a bone's width."""
        return 0.0 if self.kind == "torus" else max(0.0, self.strength - 0.35) / 0.65


@dataclass(frozen=True, kw_only=True)
class Arthritis:
    """Osteoarthritis of a knee: `severity` [0, 5) is the grade and how far it has come to the next."""

    severity: float
    compartment: Literal["medial", "lateral"]
    narrowing: float  # share of the joint space that is gone; rises with severity
    osteophytes: float  # their size, 0 .. 1

    @property
    def grade(self) -> int:
        """Kellgren and Lawrence, 0 to 4."""
        return int(self.severity)


@dataclass(frozen=True, kw_only=True)
class Pose:
    """One patient before one film. Lengths in half images."""

    tilt: float  # tangent of the rotation in the image plane
    scale: float
    shift_x: float
    shift_y: float
    exposure: float
    latitude: float
    mineral: float  # factor on bone
    tissue: float  # factor on the width of soft parts


@dataclass(frozen=True, kw_only=True)
class Scene:
    """All that is known about one phantom: what its images and its report are made from."""

    seed: int
    index: int
    patient: int
    habit: Habit
    sex: Sex
    age_years: float
    part: Part
    side: Side
    views: tuple[str, ...]
    poses: tuple[Pose, ...]  # by view
    clutter: tuple[str, ...]
    bone_age_months: float | None  # of hands and wrists that grow
    fracture: Fracture | None
    arthritis: Arthritis | None  # of knees without a prosthesis
    axis_angle_degrees: float | None  # of legs: the knee's deviation from the line hip - ankle, varus positive
    implant: Implant
    cast: bool
    lesion: float  # strength of a cyst of bone, 0 none

    @property
    def maturity(self) -> float:
        """0 at birth, 1 when growth plates are gone: what the picture shows of a skeleton's age."""
        months = self.age_years * 12.0 if self.bone_age_months is None else self.bone_age_months
        return min(1.1, months / 12.0 / CLOSURE_YEARS[self.sex])

    @property
    def plate_mm(self) -> float:
        """Width of the growth plates of hand and wrist; 0 once they are closed."""
        return 2.6 * max(0.0, 1.0 - self.maturity) ** 0.75

    @property
    def labels(self) -> dict[str, Literal[0, 1, -1]]:
        """As `StudyRecord.labels` holds them. Osteoarthritis is asked of knees only, of those that are there."""
        found: dict[str, bool] = {
            "fracture": self.fracture is not None and self.fracture.present,
            "implant": bool(self.implant), "cast": self.cast,
        }  # fmt: skip
        if self.arthritis is not None:
            found["osteoarthritis"] = self.arthritis.grade >= KL_DEFINITE
        found["anomaly"] = (
            found["fracture"] or found["implant"] or found.get("osteoarthritis", False) or self.lesion > 0
            or abs(self.axis_angle_degrees or 0.0) > AXIS_NORMAL_DEGREES or self.bone_age_is_off
        )  # fmt: skip
        return {name: 1 if found[name] else 0 for name in LABELS if name in found}

    @property
    def bone_age_is_off(self) -> bool:
        """Two years or more from the age: looked for in hands only."""
        if self.part != "HAND" or self.bone_age_months is None:
            return False
        return abs(self.bone_age_months - 12.0 * self.age_years) >= BONE_AGE_NORMAL_MONTHS

    @property
    def measurements(self) -> dict[str, float]:
        """As `StudyRecord.measurements` holds them."""
        found = {
            "kl_grade": None if self.arthritis is None else float(self.arthritis.grade),
            "bone_age_months": self.bone_age_months, "axis_angle_degrees": self.axis_angle_degrees,
        }  # fmt: skip
        return {name: value for name, value in found.items() if value is not None}


@cache
def wrist_table() -> tuple[tuple[Wrist, ...], np.ndarray]:
    """The published cells, and their cumulated shares of all studies, float64 [cells]."""
    path = Path(__file__).with_name("phantom_bone_wrists.csv")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    cells = tuple(
        Wrist(
            age_years=int(row["age_years"]), sex="F" if row["sex"] == "F" else "M",
            side="L" if row["side"] == "L" else "R", fracture=row["fracture"],  # type: ignore[arg-type]
            cast=row["cast"] == "1", metal=row["metal"] == "1", views=tuple(row["views"].split()),
        )
        for row in rows
    )  # fmt: skip
    total = np.cumsum([int(row["studies"]) for row in rows], dtype=np.float64)
    return cells, total / total[-1]


def _draw_wrist(draws: Draws) -> Wrist:
    cells, cumulated = wrist_table()
    return cells[min(len(cells) - 1, int(np.searchsorted(cumulated, draws.between(0.0, 1.0), "right")))]


def _draw_part(draws: Draws) -> Part:
    at, total = draws.between(0.0, 1.0), 0.0
    for part, share in SHARES.items():
        total += share
        if at < total:
            return part
    return "TIBIA"


def _draw_age(part: Part, draws: Draws) -> float:
    if part == "HAND":  # as for bone age, with some adults for their fractures
        return draws.between(1.0, 18.0) if draws.chance(0.85) else draws.between(18.0, 70.0)
    low, high = {"KNEE": (38.0, 88.0), "LEG": (35.0, 85.0), "FOREARM": (4.0, 75.0), "TIBIA": (6.0, 80.0)}[part]
    return draws.between(low, high)


def _bone_age(part: Part, age_years: float, sex: Sex, draws: Draws, spread: float) -> float | None:
    """In months: around the age, now and then far from it; None for what does not grow."""
    offset = draws.bell(0.0, 8.0 * (0.5 + 0.5 * spread)) * (2.6 if draws.chance(0.25) else 1.0)
    if part not in ("WRIST", "HAND") or age_years >= CLOSURE_YEARS[sex] + 1.0:
        return None
    return round(max(3.0, min(CLOSURE_YEARS[sex] * 12.0, age_years * 12.0 + offset)), 1)


def _draw_arthritis(draws: Draws, spread: float) -> Arthritis:
    """Few knees are free of it, few are destroyed. Space and spurs agree with the grade, but not to the letter."""
    at = draws.between(0.0, 1.0)
    grades = (0.30, 0.52, 0.73, 0.89, 1.0)
    grade = next(number for number, limit in enumerate(grades) if at < limit or number == 4)
    severity = grade + draws.between(0.0, 0.999)
    compartment: Literal["medial", "lateral"] = "medial" if draws.chance(0.75) else "lateral"
    narrowing = 0.20 * (severity + draws.bell(0.0, 0.35 * spread))
    osteophytes = 0.25 * (severity - 1.2 + draws.bell(0.0, 0.4 * spread))
    return Arthritis(
        severity=severity, compartment=compartment, narrowing=max(0.0, min(0.97, narrowing)),
        osteophytes=max(0.0, min(1.0, osteophytes)),
    )  # fmt: skip


def call_probability(strength: float, difficulty: Difficulty) -> float:
    """Chance that what is this strong is called a fracture."""
    return float(min(1.0, max(0.0, 0.5 + (strength - difficulty.decision) / difficulty.blur)))


def _draw_fracture(
    part: Part, kind: Kind | None, present: bool, views: int, draws: Draws, difficulty: Difficulty
) -> Fracture | None:
    """A fracture where there is one; else now and then what was not called one. Always as many draws."""
    doubtful, chosen = draws.chance(0.15), None
    for _ in range(12):  # of those that the coin calls as it must; the last resort is a plain one
        strength = draws.between(difficulty.weakest, 1.0)
        called = draws.chance(call_probability(strength, difficulty))
        if chosen is None and called == present:
            chosen = strength
    guessed: Kind = "torus" if draws.chance(0.2) else "complete"
    place = draws.between(0.0, 1.0)
    along, slant, shift = draws.between(0.0, 1.0), draws.between(-1.0, 1.0), draws.between(-1.0, 1.0)
    hides, seen_in = draws.chance(difficulty.one_view), int(views * draws.between(0.0, 1.0))
    places = PLACES[part]
    if not places or (not present and (chosen is None or not doubtful)):
        return None
    strength = 0.9 if chosen is None else chosen
    return Fracture(
        kind=kind or ("complete" if part != "WRIST" else guessed), place=places[int(place * len(places))],
        strength=strength, probability=call_probability(strength, difficulty), present=present,
        along=along, slant=slant, shift=shift,
        shown=tuple(0.1 if hides and view != seen_in else 1.0 for view in range(views)),
    )  # fmt: skip


def _draw_pose(draws: Draws, mineral: float, tissue: float, spread: float) -> Pose:
    return Pose(
        tilt=draws.bell(0.0, 0.05 * spread), scale=draws.bell(1.0, 0.05 * spread),
        shift_x=draws.bell(0.0, 0.05 * spread), shift_y=draws.bell(0.0, 0.05 * spread),
        exposure=draws.bell(0.0, 0.04 * spread), latitude=draws.bell(1.0, 0.08 * spread),
        mineral=mineral, tissue=tissue,
    )  # fmt: skip


def draw_scene(seed: int, index: int, difficulty: Difficulty) -> Scene:
    """The scene of study `index`."""
    patient, spread = patient_of(index), difficulty.variation
    body = Draws(seed, "bone phantom: patient", patient, 96)
    part, wrist = _draw_part(body), _draw_wrist(body)
    age_years = round(_draw_age("HAND" if part == "WRIST" else part, body), 1)
    sex: Sex = "F" if body.chance(0.5) else "M"
    side: Side = "L" if body.chance(0.5) else "R"
    if part == "WRIST":
        sex, side, age_years = wrist.sex, wrist.side, round(wrist.age_years + 0.99 * body.between(0.0, 1.0), 1)
    place = body.between(0.0, 1.0)
    habit: Habit = "FR" if place < 0.45 else "BE" if place < 0.80 else "CH"
    mineral, tissue = body.bell(1.0, 0.12 * spread), body.bell(1.0, 0.10 * spread)
    bone_age = _bone_age(part, age_years, sex, body, spread)
    arthritis = _draw_arthritis(body, spread)
    angle = round(body.bell(0.0, 3.2) if body.chance(0.6) else body.bell(4.0, 3.0), 1)
    metal = wrist.metal if part == "WRIST" else body.chance(_IMPLANT_SHARE[part])
    implants = IMPLANTS[part]
    implant: Implant = implants[int(body.between(0.0, 1.0) * len(implants))] if metal else ""
    lesion = body.between(0.4, 1.0) if body.chance(_LESION_SHARE[part]) else 0.0

    study = Draws(seed, "bone phantom: study", index, 160)
    views = _draw_views(part, wrist, study)
    has_fracture = wrist.fracture != "none" if part == "WRIST" else study.chance(_FRACTURE_SHARE[part])
    has_fracture = has_fracture and implant != "prosthesis"
    kind: Kind | None = None
    if part == "WRIST" and wrist.fracture != "none":
        kind = wrist.fracture
    fracture = _draw_fracture(part, kind, has_fracture, len(views), study, difficulty)
    casts = has_fracture and part in CAST_PARTS
    cast = wrist.cast if part == "WRIST" else study.chance(0.35) and casts
    clutter = tuple(name for name in ("canal", "fold") if study.chance(difficulty.clutter))
    poses = tuple(_draw_pose(study, mineral, tissue, spread) for _ in views)
    return Scene(
        seed=seed, index=index, patient=patient, habit=habit, sex=sex, age_years=age_years, part=part,
        side=side, views=views, poses=poses, clutter=clutter, bone_age_months=bone_age, fracture=fracture,
        arthritis=arthritis if part == "KNEE" and not implant else None,
        axis_angle_degrees=angle if part == "LEG" else None, implant=implant, cast=cast, lesion=lesion,
    )  # fmt: skip


def _draw_views(part: Part, wrist: Wrist, draws: Draws) -> tuple[str, ...]:
    alone, third = draws.chance(0.1), draws.chance(0.12)
    if part == "WRIST":
        return wrist.views
    if part == "LEG":
        return ("AP",)
    if part == "HAND":
        return ("AP",) if draws.chance(0.6) else ("AP", _SECOND_VIEW[part])
    views = ("AP",) if alone else ("AP", _SECOND_VIEW[part])
    return (*views, "OBLIQUE") if third and part in ("KNEE", "FOREARM") and not alone else views


def ceiling(seed: int, count: int, difficulty: Difficulty) -> Mapping[str, float]:
    """AUC of fracture for one who knows each one's strength, of studies 0 .. count - 1; the share that is doubtful."""
    scenes = [draw_scene(seed, index, difficulty) for index in range(count)]
    scores = np.array([scene.fracture.strength if scene.fracture else 0.0 for scene in scenes])
    truth = np.array([scene.labels["fracture"] == 1 for scene in scenes])
    ordered, positive = np.sort(scores[~truth]), scores[truth]
    below, or_equal = np.searchsorted(ordered, positive, "left"), np.searchsorted(ordered, positive, "right")
    doubtful = np.mean([scene.fracture is not None and scene.fracture.hedged for scene in scenes])
    auc = float((below + or_equal).mean() / 2.0 / len(ordered)) if len(ordered) and len(positive) else float("nan")
    return {"fracture": auc, "doubtful": float(doubtful)}


def draw_words(scene: Scene, count: int) -> list[float]:
    """Numbers in [0, 1) for the choice of words."""
    return [float(value) for value in uniform(scene.seed, "bone phantom: words", scene.index, draws=count)]
