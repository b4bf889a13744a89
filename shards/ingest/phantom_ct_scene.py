"""The scene of a CT phantom, drawn from a key: one patient's trunk, and what is wrong with which organ.

Lengths are in millimetres from the middle of the trunk: x to the patient's right, y to the front, z to the head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from shards.ingest.phantom_chest_scene import Draws
from shards.ingest.phantom_ct_text import DISEASES, LABELS, LABELS_OF_ORGAN, ORGANS, Finding
from shards.keyed import uniform
from shards.reports.anatomy import ANATOMIES

MASKS: dict[str, int] = {organ: ANATOMIES.index(organ) + 1 for organ in ORGANS}
FIELD_OF_VIEW_MM = (288.0, 320.0, 320.0)  # z, y, x


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """How hard a phantom is. `EASY` and `STANDARD` are fixed: what needs another one changes itself."""

    weakest: float  # smallest strength drawn
    contrast: float  # factor on what a disease changes in HU and size
    noise_hu: float  # standard deviation of a voxel
    variation: float  # factor on the spread of anatomy, enhancement and texture


EASY = Difficulty(weakest=0.4, contrast=1.2, noise_hu=10.0, variation=0.7)
STANDARD = Difficulty(weakest=0.1, contrast=1.0, noise_hu=20.0, variation=1.0)
DIFFICULTIES: dict[str, Difficulty] = {"easy": EASY, "standard": STANDARD}


@dataclass(frozen=True, kw_only=True)
class Organ:
    """How one organ departs from the mean patient's: factor on its size, place in mm, HU, and texture in HU."""

    size: float
    shift: tuple[float, float, float]  # z, y, x
    hu: float
    texture_hu: float


@dataclass(frozen=True, kw_only=True)
class Body:
    """One patient in one examination."""

    size: float
    fat_mm: float  # under the skin
    bone_hu: float
    arterial: float  # contrast medium in heart and aorta: 0 none, 1 peak
    venous: float  # and in liver, spleen and kidneys
    shift: tuple[float, float, float]  # of the patient on the table, mm
    tilt: float  # tangent of the leaning to one side
    organs: Mapping[str, Organ]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """All that is known about one phantom: what volume and report are made from."""

    seed: int
    index: int
    patient: int
    sex: Literal["F", "M"]
    age_years: int
    body: Body
    findings: tuple[Finding, ...]

    def of(self, organ: str) -> dict[str, Finding]:
        """The diseases of an organ by name."""
        return {finding.name: finding for finding in self.findings if finding.anatomy == organ}


def draw_scene(seed: int, index: int, difficulty: Difficulty, normal: float, patient: int) -> Scene:
    """The scene of study `index`. The patient decides anatomy, the study pose, enhancement and diseases.

    `normal`: share of organs without a disease; the others have one of theirs, seldom two.
    """
    spread = difficulty.variation
    draws = Draws(seed, "ct phantom: patient", patient, 256)
    sex: Literal["F", "M"] = "F" if draws.chance(0.5) else "M"
    age_years = int(draws.between(18, 90))
    size, fat_mm = draws.bell(1.0, 0.03 * spread), draws.between(8.0, 24.0)
    bone_hu = draws.bell(300.0, 50.0 * spread)
    organs = {
        organ: Organ(
            size=draws.bell(1.0, 0.045 * spread),
            shift=(draws.bell(0.0, 3.0 * spread), draws.bell(0.0, 3.0 * spread), draws.bell(0.0, 3.0 * spread)),
            hu=draws.bell(0.0, (25.0 if organ == "lung" else 10.0) * spread),
            texture_hu=draws.between(4.0, 4.0 + 14.0 * spread),
        )
        for organ in ORGANS
    }
    study = Draws(seed, "ct phantom: study", index, 64)
    body = Body(
        size=size, fat_mm=fat_mm, bone_hu=bone_hu, arterial=study.between(0.1, 1.0),
        venous=study.between(0.1, 1.0),
        shift=(study.bell(0.0, 2.0), study.bell(0.0, 4.0 * spread), study.bell(0.0, 4.0 * spread)),
        tilt=study.bell(0.0, 0.02 * spread), organs=organs,
    )  # fmt: skip
    return Scene(
        seed=seed, index=index, patient=patient, sex=sex, age_years=age_years, body=body,
        findings=_draw_findings(seed, index, difficulty, normal),
    )  # fmt: skip


SECOND_SHARE = 0.15  # of abnormal organs have a second disease


def _draw_findings(seed: int, index: int, difficulty: Difficulty, normal: float) -> tuple[Finding, ...]:
    """Diseases in the order of LABELS. What is drawn for one organ does not depend on the others or on `normal`."""
    chosen: set[str] = set()
    for organ, coins in zip(
        ORGANS, uniform(seed, "ct phantom: organs", index, range(len(ORGANS)), draws=3).tolist(), strict=True
    ):
        names = LABELS_OF_ORGAN[organ]
        if coins[0] >= normal:
            first = int(coins[1] * len(names))
            chosen.add(names[first])
            if coins[2] < SECOND_SHARE:
                chosen.add(names[(first + 1) % len(names)])
    return tuple(
        _draw_finding(name, Draws(seed, f"ct phantom: {name}", index, 8), difficulty)
        for name in LABELS
        if name in chosen
    )


def _draw_finding(name: str, draws: Draws, difficulty: Difficulty) -> Finding:
    disease = DISEASES[name]
    return Finding(
        name=name, strength=draws.between(difficulty.weakest, 1.0), side=draws.pick(disease.sides),
        place=draws.pick(disease.places), along=draws.between(-1.0, 1.0), across=draws.between(-1.0, 1.0),
        around=draws.between(-1.0, 1.0),
    )  # fmt: skip
