"""Frontal chest radiographs that never were: a scene graph drawn from a key, then rendered as an image with its truth.

The scene holds the patient's anatomy and up to eight findings, each with side, zone, size and a strength in (0, 1]. A
finding's truth is a coin thrown with a probability that rises with its strength, so that faint ones are ambiguous
even to someone who knows the scene: `ceiling` says how far any reader can get. The report (phantom_chest_text.py)
states the truth in words and hedges where the coin was undecided.

Pixels use only + - * /, square roots, floor and comparisons on float32, and random numbers of shards/keyed.py, so that
they are the same on every machine. Lengths are in units of half the image (image x and y in [-1, 1], y downwards, the
patient's right on the left). Attenuation is relative to the mediastinum's, 1.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Literal

import numpy as np
from PIL import Image

from shards.batch import Box, EncodedImage, LabelValue, Sample, StudyRecord, ViewRecord
from shards.errors import ConfigError
from shards.ingest import PUBLIC_SECRET, Item, Loaded, Plan, hashed_key
from shards.ingest.phantom_chest_text import FINDINGS, LABELS, Finding, write_report
from shards.keyed import hash_u64, uniform

ORGANS = ("right lung", "left lung", "heart")
MASKS: dict[str, int] = {name: number for number, name in enumerate((*ORGANS, *LABELS), start=1)}
FIELD_OF_VIEW_MM = 400.0
SPLITS = ("train", "validation", "test")

Array = np.ndarray


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


class _Draws:
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
    body = _Draws(seed, "chest phantom: patient", patient, 96)
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

    study = _Draws(seed, "chest phantom: study", index, 160)
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


def _draw_finding(name: str, draws: _Draws, difficulty: Difficulty) -> Finding:
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


# --- shapes: S = size of the square image in pixels; every map is float32 [S, S] ---


def _step(distance: Array, width: float) -> Array:
    """0 below -width/2, 1 above width/2, smooth between."""
    t = distance * np.float32(1.0 / width)
    t += np.float32(0.5)
    np.maximum(t, np.float32(0.0), out=t)
    np.minimum(t, np.float32(1.0), out=t)
    slope = np.float32(3.0) - t - t
    slope *= t
    slope *= t
    return slope


def _bump(square: Array) -> Array:
    """Smooth hill of a squared distance: 1 at 0, 0 from 1 on."""
    t = np.maximum(np.float32(1.0) - square, 0.0)
    return t * t


def _square(x: Array) -> Array:
    return x * x


def _wave(phase: Array) -> Array:
    """Distance of each phase from the nearest whole number, in [0, 0.5]."""
    return np.abs(phase - np.floor(phase + np.float32(0.5)))


def _pixel_noise(seed: int, index: int, size: int) -> Array:
    """About normal, standard deviation 1: four 16-bit uniforms of one hash a pixel, summed."""
    words = hash_u64(seed, "chest phantom: pixel noise", index, np.arange(size * size, dtype=np.uint64))
    total = np.zeros(words.shape, dtype=np.float32)
    for shift in (0, 16, 32, 48):
        total += ((words >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.float32)
    return ((total * np.float32(1.0 / 65536.0) - np.float32(2.0)) * np.float32(1.7320508)).reshape(size, size)


def _cloud(seed: int, purpose: str, index: int, size: int, cells: int) -> Array:
    """Smooth noise in [-1, 1]: uniform values on a grid of `cells`, interpolated with a smooth step."""
    grid = uniform(seed, purpose, index, draws=(cells + 1) ** 2).astype(np.float32).reshape(cells + 1, cells + 1)
    place = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(cells / size)
    cell = place.astype(np.int64)
    part = place - cell
    part = part * part * (3 - part - part)
    rows = grid[cell] * (1 - part)[:, None] + grid[cell + 1] * part[:, None]  # [cells+1, cells+1] -> [S, cells+1]
    columns = np.ascontiguousarray(rows.T)  # gathering rows is fast, gathering columns is not
    return (columns[cell] * (1 - part)[:, None] + columns[cell + 1] * part[:, None]) * 2 - 1  # -> [S, S]


@dataclass(frozen=True)
class _Lungs:
    """Maps of both lungs, folded over the midline: `ax` is |x|, and `left` says on which side a pixel lies.

    `inside` 0..1; `tissue` is `inside` without what fluid or free air has taken; `depth` the distance from the wall;
    `median` and `half_width` the lung's middle and half its width at each height.
    """

    left: Array  # bool
    ax: Array
    y: Array
    inside: Array
    tissue: Array
    depth: Array
    median: Array
    half_width: Array

    def of_side(self, side: str) -> Array | np.float32:
        """1 on the named side ("left", "right", "bilateral"), 0 on the other."""
        if side == "bilateral":
            return np.float32(1.0)
        return (self.left if side == "left" else ~self.left).astype(np.float32)


def _wall(y: Array, anatomy: Anatomy) -> Array:
    """|x| of the rib cage's inner border: narrow at the apex, `cage` from the heart's height downwards."""
    return np.float32(anatomy.cage) * (np.float32(0.72) + np.float32(0.28) * _step(y + np.float32(0.25), 1.2))


def _dome(side: str, anatomy: Anatomy, raised: Mapping[str, float]) -> float:
    """y of a diaphragm's dome: the left one is lower."""
    return anatomy.diaphragm + (0.045 if side == "left" else 0.0) - raised.get(side, 0.0)


def _lungs(x: Array, y: Array, wall: Array, anatomy: Anatomy, raised: Mapping[str, float]) -> _Lungs:
    left, ax = x > 0, np.abs(x)

    def by_side(of_left: float, of_right: float) -> Array:
        return np.where(left, np.float32(of_left), np.float32(of_right))

    outer, inner = wall - np.float32(0.045), by_side(0.13 - anatomy.turn, 0.13 + anatomy.turn)
    median, half_width = (outer + inner) * np.float32(0.5), (outer - inner) * np.float32(0.5)
    u = (ax - median) / half_width
    v = np.maximum((np.float32(-0.20) - y) * np.float32(1.0 / (-0.20 - anatomy.apex)), 0.0)
    radius = np.sqrt(np.sqrt(_square(_square(u)) + _square(_square(v))))
    depth = (np.float32(1.0) - radius) * half_width
    floor = by_side(_dome("left", anatomy, raised), _dome("right", anatomy, raised))
    floor += np.float32(0.62) * _square(ax - np.float32(0.36)) + np.float32(0.9) * np.maximum(
        ax - np.float32(0.62), 0.0
    )
    inside = _step(depth, 0.05) * _step(floor - y, 0.05)
    return _Lungs(left, ax, y, inside, inside, depth, median, half_width)


def _ribs(ax: Array, y: Array, wall: Array, anatomy: Anatomy) -> Array:
    """Attenuation of the posterior (bright, going down outwards) and anterior (faint, going down inwards) ribs."""
    cage = _step(wall + np.float32(0.02) - ax, 0.06) * _step(y - np.float32(anatomy.apex - 0.04), 0.08)
    spacing = np.float32(1.0 / anatomy.rib_spacing)
    outwards = _square(ax * np.float32(1.0 / anatomy.cage))
    posterior = (y - np.float32(anatomy.rib_slope) * ax - np.float32(0.22) * _square(outwards)) * spacing
    distance = _wave(posterior + np.float32(anatomy.rib_phase))
    tube = _step(np.float32(0.24) - distance, 0.14)
    rim = _bump(_square((distance - np.float32(0.20)) * np.float32(1.0 / 0.10)))
    back = (np.float32(0.10) * tube + np.float32(0.05) * rim) * cage * _step(ax - np.float32(0.05), 0.06)
    anterior = (y + np.float32(0.75) * ax - np.float32(0.45) * outwards) * spacing
    front_distance = _wave(anterior + np.float32(anatomy.rib_phase * 1.7))
    front = _step(np.float32(0.22) - front_distance, 0.16) * cage * _step(ax - np.float32(0.34), 0.16)
    return (back + np.float32(0.055) * front) * np.float32(anatomy.bone)


def _vessels(lungs: _Lungs, anatomy: Anatomy, phases: Sequence[Any], stronger: float) -> Array:
    """Branches that leave the hilum and thin outwards. Angles are measured on a diamond: no trigonometry needed."""
    dx, dy = lungs.ax - np.float32(0.18), lungs.y + np.float32(0.02)
    reach = np.abs(dx) + np.abs(dy) + np.float32(1e-3)
    angle = dy / reach
    width = np.maximum(np.float32(0.030) * (np.float32(1.15) - reach), np.float32(0.004))
    total = np.zeros_like(angle)
    for count, bend, first, last, phase in ((3.0, 1.1, 0.02, 0.75, phases[0]), (6.5, -1.6, 0.22, 1.0, phases[1])):
        # distance to the nearest branch, in half images
        distance = _wave(angle * np.float32(count) + np.float32(bend) * reach + phase) * reach
        branch = np.maximum(np.float32(1.0) - distance / (width * np.float32(count)), 0.0)
        total += branch * (_step(reach - np.float32(first), 0.1) * _step(np.float32(last) - reach, 0.5))
    return total * np.float32(0.11 * anatomy.vessels * stronger) * lungs.tissue


def _lesion_centre(finding: Finding, anatomy: Anatomy) -> tuple[float, float]:
    """(|x|, y) of a focal finding: its zone's height, `along` down the zone, `across` from the hilum to the wall."""
    top, bottom = anatomy.apex + 0.14, anatomy.diaphragm - 0.08
    third = (bottom - top) / 3.0
    zone = ("upper", "mid", "lower").index(finding.zone)
    y = top + third * (zone + 0.5 + 0.35 * finding.along)
    inner, outer = 0.28, (0.56 if zone == 0 else 0.66) * anatomy.cage / 0.88
    return (inner + outer) / 2 + (outer - inner) / 2 * finding.across, y


@dataclass
class Drawing:
    """A rendered scene: `pixels` [S, S] in [0, 1] (0 black), `organs` [S, S] and `regions` name -> bool [S, S]."""

    pixels: Array
    organs: Array
    regions: dict[str, Array]


def render(scene: Scene, difficulty: Difficulty, size: int) -> Drawing:
    """Draw the scene at `size` x `size` pixels. Regions are where a finding changes the image, present or doubtful."""
    anatomy = scene.anatomy
    present = {finding.name: finding for finding in scene.findings}
    axis = (np.arange(size, dtype=np.float32) * 2 + 1) / np.float32(size) - 1
    column, row = np.broadcast_arrays(axis[None, :], axis[:, None])
    zoom = np.float32(1.0 / anatomy.scale)
    x = (column + np.float32(anatomy.tilt) * row - np.float32(anatomy.shift_x)) * zoom
    y = (row - np.float32(anatomy.tilt) * column - np.float32(anatomy.shift_y)) * zoom
    regions: dict[str, Array] = {}

    atelectasis = present.get("atelectasis")
    raised = {atelectasis.side: 0.12 * atelectasis.strength} if atelectasis else {}
    wall = _wall(y, anatomy)
    lungs = _lungs(x, y, wall, anatomy, raised)
    organs = np.where(lungs.left, np.uint8(MASKS["left lung"]), np.uint8(MASKS["right lung"])) * (lungs.inside > 0.5)

    # Soft parts: a trunk with shoulders and neck, then the lungs carved out of it, the heart taking the place of lung.
    ax = lungs.ax
    shoulder = np.float32(0.24) + np.float32(1.05) * _step(y + np.float32(0.74), 0.55)
    trunk = _step(shoulder + np.float32(0.02) - ax, 0.16) * (np.float32(0.98) - np.float32(0.22) * _square(_square(ax)))
    heart, in_heart = _heart(x, y, anatomy, present.get("cardiomegaly"))
    organs[in_heart] = MASKS["heart"]
    if "cardiomegaly" in present:
        regions["cardiomegaly"] = in_heart
    thick = np.clip(lungs.depth * np.float32(1.0 / 0.30), 0.0, 1.0)
    lucency = np.float32(0.52) + np.float32(0.16) * thick * (np.float32(2.0) - thick)
    for name, draw_pleural in _PLEURAL.items():
        if name in present:
            changed, taken = draw_pleural(lungs, present[name], lucency, difficulty.contrast)
            mine = lungs.of_side(present[name].side)
            taken, lucency = taken * mine, lucency + mine * (changed - lucency)
            regions[name] = (taken > 0.5) & (lungs.inside > 0.3)
            lungs = replace(lungs, tissue=lungs.tissue * (np.float32(1.0) - taken))
    phases = uniform(scene.seed, "chest phantom: phases", scene.patient, draws=4).astype(np.float32)
    branches = _vessels(
        lungs, anatomy, [np.where(lungs.left, phases[0], phases[1]), np.where(lungs.left, phases[2], phases[3])], 1.0
    )
    before_heart = np.float32(1.0) - np.float32(0.80) * heart
    attenuation = trunk - (lucency * lungs.inside - branches) * before_heart + np.float32(0.05) * heart

    bones = _ribs(ax, y, wall, anatomy)
    bones[: size // 2] += _clavicles(x[: size // 2], y[: size // 2], anatomy)
    attenuation += bones * trunk + _mediastinum(x, y, anatomy) + _soft_tissue(x, ax, y, anatomy, trunk)
    haze = _cloud(scene.seed, "chest phantom: haze", scene.index, size, 7)
    for name, draw in _PARENCHYMAL.items():
        if name in present:
            added, seen = draw(lungs, present[name], anatomy, haze)
            mine = lungs.of_side(present[name].side)
            attenuation += np.float32(difficulty.contrast) * mine * added
            regions[name] = seen & (mine > 0)
    if "hernia" in present:
        added, regions["hernia"] = _hernia(x, y, present["hernia"], anatomy)
        attenuation += np.float32(difficulty.contrast) * added
    if scene.clutter:
        attenuation += _clutter(x, y, scene, lungs)

    mottle = _cloud(scene.seed, "chest phantom: mottle", scene.index, size, max(2, size // 5))
    level = (attenuation - np.float32(0.28 - anatomy.exposure)) * np.float32(1.0 / anatomy.latitude)
    noise = _pixel_noise(scene.seed, scene.index, size) + np.float32(0.5) * mottle
    level = level + np.float32(difficulty.noise) * noise * (np.float32(0.5) + np.maximum(level, 0.0))
    return Drawing(_tone(level), organs, regions)


def _tone(level: Array) -> Array:
    """Film-like curve: straight in the middle, soft at both ends, [0, 1]."""
    t = (level - np.float32(0.46)) * np.float32(2.7)
    return np.float32(0.5) + np.float32(0.5) * t / np.sqrt(np.float32(1.0) + t * t)


def _effusion(lungs: _Lungs, finding: Finding, lucency: Array, contrast: float) -> tuple[Array, Array]:
    """Fluid fills the lung from below with a meniscus that climbs the wall."""
    height = 0.04 + 0.62 * finding.strength
    if finding.side == "bilateral":
        height *= 0.75
    sink = np.clip((lungs.ax - lungs.median) / lungs.half_width, -1.2, 1.2)
    surface = np.float32(0.66 - height) - np.float32(0.16) * sink * np.abs(sink) * np.float32(0.5 + finding.strength)
    fluid = _step(lungs.y - surface, 0.10)
    return lucency * (np.float32(1.0) - np.float32(min(1.0, 0.72 * contrast)) * fluid), fluid


def _pneumothorax(lungs: _Lungs, finding: Finding, lucency: Array, contrast: float) -> tuple[Array, Array]:
    """Air outside the lung: a rim without vessels, blacker, widest at the apex, edged by the pleural line."""
    higher = np.clip((np.float32(0.35) - lungs.y) * np.float32(1.0 / 0.95), 0.0, 1.0)
    rim = np.float32(0.03 + 0.20 * finding.strength) * (np.float32(0.25) + np.float32(0.75) * higher)
    outer = _step(lungs.ax - lungs.median + np.float32(0.16) + np.float32(0.3) * higher, 0.1)
    beyond = _step(rim - lungs.depth, 0.03) * outer
    line = _bump(_square((lungs.depth - rim) * np.float32(1.0 / 0.022))) * outer
    collapse = np.float32(0.16 * finding.strength * contrast) * (np.float32(1.0) - beyond)
    changed = lucency + np.float32(contrast) * (np.float32(0.13) * beyond - np.float32(0.20) * line) - collapse
    return changed, beyond


_PLEURAL = {"effusion": _effusion, "pneumothorax": _pneumothorax}


def _consolidation(lungs: _Lungs, finding: Finding, anatomy: Anatomy, haze: Array) -> tuple[Array, Array]:
    """Patch with ragged borders, limited by the lungs."""
    centre_x, centre_y = _lesion_centre(finding, anatomy)
    radius = (0.13 + 0.20 * finding.strength) * (0.5 + 0.5 * finding.bulk)
    square = _square((lungs.ax - np.float32(centre_x)) * np.float32(1.15 / radius)) + _square(
        (lungs.y - np.float32(centre_y)) * np.float32(1.0 / radius)
    )
    patch = _step(np.float32(0.85) - np.sqrt(square) + np.float32(0.45) * haze, 0.8) * lungs.tissue
    texture = np.float32(1.0) + np.float32(0.25) * haze
    return np.float32(0.26 + 0.26 * finding.strength) * patch * texture, patch > 0.35


def _nodule(lungs: _Lungs, finding: Finding, anatomy: Anatomy, haze: Array) -> tuple[Array, Array]:
    """Ball with a sharp border: attenuation follows its thickness."""
    centre_x, centre_y = _lesion_centre(finding, anatomy)
    radius = finding.radius_mm * 2.0 / FIELD_OF_VIEW_MM
    square = (_square(lungs.ax - np.float32(centre_x)) + _square(lungs.y - np.float32(centre_y))) * np.float32(
        1 / radius**2
    )
    ball = np.sqrt(np.maximum(np.float32(1.0) - square, 0.0))
    return np.float32(0.26 + 0.26 * finding.strength) * ball * lungs.tissue, square < 1.0


def _atelectasis(lungs: _Lungs, finding: Finding, anatomy: Anatomy, haze: Array) -> tuple[Array, Array]:
    """Plate-like band across the base, above a raised diaphragm."""
    raised = 0.12 * finding.strength
    floor = _dome(finding.side, anatomy, {finding.side: raised})
    above = 0.12 if finding.zone == "lower" else 0.34
    slope = 0.35 * finding.along
    middle, half_length = 0.42 + 0.08 * finding.across, (0.16 + 0.12 * finding.strength) * (0.5 + 0.5 * finding.bulk)
    along = (lungs.ax - np.float32(middle)) * np.float32(1.0 / half_length)
    offset = lungs.y - np.float32(floor - above) - np.float32(slope) * (lungs.ax - np.float32(middle))
    offset = offset + np.float32(0.03) * _square(along)
    width = (0.034 + 0.034 * finding.strength) * finding.bulk
    band = _bump(_square(offset * np.float32(1.0 / width))) * _step(np.float32(1.0) - np.abs(along), 0.3) * lungs.tissue
    return np.float32(0.30 + 0.25 * finding.strength) * band, band > 0.3


def _edema(lungs: _Lungs, finding: Finding, anatomy: Anatomy, haze: Array) -> tuple[Array, Array]:
    """Bat-wing haze around the hilum, thickened vessels, short horizontal septal lines at the wall."""
    strength = finding.strength
    square = _square((lungs.ax - np.float32(0.26)) * np.float32(1.0 / 0.50)) + _square(
        (lungs.y + np.float32(0.02)) * np.float32(1.0 / 0.62)
    )
    wing = _bump(square) * lungs.tissue * (np.float32(1.0) + np.float32(0.35) * haze)
    streaks = _vessels(
        lungs, anatomy, [np.float32(finding.extra), np.float32(1.0 - finding.extra)], 0.3 + 0.5 * strength
    )
    septal = _bump(_square(_wave(lungs.y * np.float32(17.0)) * np.float32(1.0 / 0.16)))
    septal = (
        septal * _step(np.float32(0.09) - lungs.depth, 0.03) * _step(lungs.y - np.float32(0.05), 0.2) * lungs.tissue
    )
    added = np.float32(0.10 + 0.30 * strength) * wing + streaks + np.float32(0.05 + 0.10 * strength) * septal
    return added, wing > 0.25


_PARENCHYMAL = {"consolidation": _consolidation, "nodule": _nodule, "atelectasis": _atelectasis, "edema": _edema}


def _heart(x: Array, y: Array, anatomy: Anatomy, enlarged: Finding | None) -> tuple[Array, Array]:
    """The heart's share of the chest's depth, 0..1, and its outline. It takes the place of lung."""
    ratio = anatomy.heart_ratio + (0.045 + 0.17 * enlarged.strength if enlarged else 0.0)
    width = ratio * anatomy.cage  # half the heart's width
    half_height = 0.33 + 0.35 * (ratio - 0.44)
    offset_y = y - np.float32(anatomy.diaphragm + 0.13 - half_height)
    offset_x = x - np.float32(anatomy.turn + 0.32 * width) - np.float32(0.30) * offset_y
    square = _square(offset_x * np.float32(1.0 / width)) + _square(offset_y * np.float32(1.0 / half_height))
    outline = _step(np.float32(1.0) - np.sqrt(square), 0.10)
    return outline * np.sqrt(np.maximum(np.float32(1.15) - np.float32(0.55) * square, 0.0)), outline > 0.5


def _mediastinum(x: Array, y: Array, anatomy: Anatomy) -> Array:
    """Great vessels, hila and spine; the trachea as air."""
    middle = x - np.float32(anatomy.turn)
    stem = _step(np.float32(0.135) - np.abs(middle - np.float32(0.02)), 0.10) * _step(np.float32(0.1) - y, 0.5)
    knob = _bump((_square(middle - np.float32(0.12)) + _square(y + np.float32(0.36))) * np.float32(1 / 0.13**2))
    beside = _square(np.abs(middle) - np.float32(0.20)) + _square((y + np.float32(0.02)) * np.float32(0.6))
    hila = _bump(beside * np.float32(1 / 0.15**2))
    spine = _step(np.float32(0.085) - np.abs(middle), 0.04)
    discs = _bump(_square(_wave(y * np.float32(6.3) + np.float32(anatomy.rib_phase)) * np.float32(1.0 / 0.14)))
    spine = spine * (np.float32(1.0) - np.float32(0.55) * discs) * np.float32(0.11 * anatomy.bone)
    trachea = _step(np.float32(0.05) - np.abs(middle - np.float32(0.01)), 0.05) * _step(np.float32(-0.24) - y, 0.12)
    return (
        np.float32(0.22) * stem + np.float32(0.20) * knob + np.float32(0.16) * hila + spine - np.float32(0.20) * trachea
    )


def _hernia(x: Array, y: Array, finding: Finding, anatomy: Anatomy) -> tuple[Array, Array]:
    """Stomach behind the heart: a ball with air above a level fluid surface."""
    radius = (0.15 + 0.11 * finding.strength) * (0.7 + 0.3 * finding.bulk)
    centre_x, centre_y = 0.05 + 0.05 * finding.across, anatomy.diaphragm - 0.04 - 0.3 * radius
    square = (_square(x - np.float32(centre_x)) + _square(y - np.float32(centre_y))) * np.float32(1 / radius**2)
    inside = _step(np.float32(1.0) - square, 0.25)
    wall = _bump(_square((np.sqrt(square) - np.float32(0.92)) * np.float32(1 / 0.16)))
    air = _step(np.float32(0.70) - square, 0.25) * _step(np.float32(centre_y - 0.1 * radius) - y, 0.02)
    added = np.float32(0.18) * inside + np.float32(0.12) * wall - np.float32(0.36 + 0.26 * finding.strength) * air
    return added, square < 1.0


def _clavicles(x: Array, y: Array, anatomy: Anatomy) -> Array:
    ax = np.abs(x - np.float32(anatomy.turn * 0.6))
    t = np.clip((ax - np.float32(0.08)) * np.float32(1.0 / 0.72), 0.0, 1.0)
    line = np.float32(anatomy.apex + 0.17) - np.float32(0.17) * t + np.float32(0.10) * (t - t * t * t)
    offset = np.abs(y - line)
    tube = (
        _step(np.float32(0.030) - offset, 0.022)
        * _step(ax - np.float32(0.06), 0.04)
        * _step(np.float32(0.84) - ax, 0.06)
    )
    rim = _bump(_square((offset - np.float32(0.024)) * np.float32(1.0 / 0.014))) * tube
    return (np.float32(0.12) * tube + np.float32(0.08) * rim) * np.float32(anatomy.bone)


def _soft_tissue(x: Array, ax: Array, y: Array, anatomy: Anatomy, trunk: Array) -> Array:
    """Chest wall, breasts, shoulder blades and the stomach's air bubble."""
    breast = _bump(
        _square((ax - np.float32(0.48)) * np.float32(1 / 0.40)) + _square((y - np.float32(0.22)) * np.float32(1 / 0.42))
    )
    edge = _step(np.float32(0.44) - y, 0.08)
    blade = _step(ax - np.float32(0.70) - np.float32(0.22) * (y + np.float32(0.3)), 0.05) * _step(
        np.float32(0.12) - y, 0.2
    )
    bubble = _bump(
        _square((x - np.float32(0.40)) * np.float32(1 / 0.20))
        + _square((y - np.float32(anatomy.diaphragm + 0.20)) * np.float32(1 / 0.11))
    )
    return (
        np.float32(anatomy.tissue) * trunk + np.float32(1.6 * anatomy.breast) * breast * edge
        + np.float32(0.06) * blade * trunk - np.float32(0.22) * bubble
    )  # fmt: skip


def _clutter(x: Array, y: Array, scene: Scene, lungs: _Lungs) -> Array:
    """Look-alikes without a finding: they cost a reader who looks at one sign only."""
    total = np.zeros_like(x)
    places = uniform(scene.seed, "chest phantom: clutter", scene.index, draws=8).tolist()
    if "fold" in scene.clutter:  # mimics the pleural line, but vessels cross it
        line = lungs.ax - np.float32(0.45 + 0.2 * places[1]) - np.float32(0.15) * y
        total += (
            np.float32(0.10)
            * _step(line, 0.03)
            * _step(np.float32(0.14) - line, 0.2)
            * lungs.inside
            * (lungs.left == (places[0] < 0.5))
        )
    if "nipples" in scene.clutter:  # mimics a nodule, but on both sides at one height
        height, radius = 0.20 + 0.15 * places[2], 0.035
        square = (_square(np.abs(x) - np.float32(0.46)) + _square(y - np.float32(height))) * np.float32(1 / radius**2)
        total += np.float32(0.14) * _bump(square)
    if "fat pad" in scene.clutter:  # mimics a large heart or a small effusion
        square = _square((x - np.float32(0.44)) * np.float32(1 / 0.20)) + _square(
            (y - np.float32(0.44)) * np.float32(1 / 0.16)
        )
        total += np.float32(0.22) * _bump(square)
    if "line" in scene.clutter:  # a tube on the chest
        path = (
            x
            - np.float32(0.5 * places[3] - 0.25)
            - np.float32(0.25) * (y + np.float32(0.4)) * (np.float32(places[4]) - y)
        )
        total += (
            np.float32(0.20) * _step(np.float32(0.013) - np.abs(path), 0.012) * _step(np.float32(places[5]) - y, 0.02)
        )
    if "marker" in scene.clutter:  # the technician's lead letter, here a bar
        bar = _step(np.float32(0.05) - np.abs(x + np.float32(0.80)), 0.01) * _step(
            np.float32(0.03) - np.abs(y + np.float32(0.82)), 0.01
        )
        total += np.float32(1.2) * bar
    return total


class ChestPhantom:
    """Source of phantom studies. Study i of a split is a pure function of (seed, split, i)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`train`, `validation` and `test` count studies; each split has its own generator seed and patients."""

        difficulty: str = "easy"
        seed: int = 0
        train: int = 3000
        validation: int = 300
        test: int = 600
        size: int = 128  # pixels a side
        bits: Literal[8, 16] = 8
        encoding: Literal["png", "jpeg"] = "png"
        masks: bool = True

    def __init__(self, config: Config) -> None:
        if config.difficulty not in DIFFICULTIES:
            raise ConfigError(f"difficulty={config.difficulty!r}: this phantom has {', '.join(DIFFICULTIES)}")
        if config.size < 16:
            raise ConfigError(f"size={config.size} is too small for a chest; use 16 pixels or more")
        if config.bits not in (8, 16) or config.encoding not in ("png", "jpeg"):
            raise ConfigError(f"bits={config.bits}, encoding={config.encoding!r}: use 8 or 16 and png or jpeg")
        if config.bits == 16 and config.encoding == "jpeg":
            raise ConfigError("bits=16 needs encoding=png: JPEG holds 8 bits")
        if min(config.train, config.validation, config.test) < 0:
            raise ConfigError("counts of studies must not be negative")
        self.config = config
        self.difficulty = DIFFICULTIES[config.difficulty]
        self.generator = generator_hash()  # here, so that worker processes get it with the pickled source
        self.name = f"phantom chest {config.difficulty} {self.generator}"
        self.labels = LABELS
        self.masks = dict(MASKS) if config.masks else {}
        self.key_fingerprint: str | None = None
        self.settings: Mapping[str, Any] = {"generator": self.generator, **vars(config)}

    def split_seed(self, split: str) -> int:
        """Generator seed of a split."""
        return split_seed(self.config.seed, split)

    def plan(self) -> Plan:
        counts = {split: getattr(self.config, split) for split in SPLITS}
        return Plan(items=[self._item(split, index) for split in SPLITS for index in range(counts[split])])

    def _item(self, split: str, index: int) -> Item:
        name = f"chest/{self.config.difficulty}/{self.config.seed}/{split}"
        return Item(
            key=hashed_key(PUBLIC_SECRET, "study", f"{name}/{index}"),
            patient=hashed_key(PUBLIC_SECRET, "patient", f"{name}/{patient_of(index)}"),
            split=split, payload=index,
        )  # fmt: skip

    def load(self, item: Item) -> Loaded:
        config = self.config
        scene = draw_scene(self.split_seed(item.split or "train"), item.payload, self.difficulty)
        drawing = render(scene, self.difficulty, config.size)
        pixels = np.floor(drawing.pixels * np.float32(2**config.bits - 1) + np.float32(0.5))
        image = _encode(pixels.astype(np.uint8 if config.bits == 8 else np.uint16), config.encoding)
        boxes = [
            _box(name, region) for name, region in drawing.regions.items() if region.any() and _is_present(scene, name)
        ]
        spacing = FIELD_OF_VIEW_MM / config.size
        report = write_report(scene.findings, partial(_words, scene))
        record = StudyRecord(
            study=item.key, patient=item.patient, report=report.sections, anatomy=report.anatomy,
            entities=[finding.entity() for finding in scene.findings],
            labels=_labels(scene),
            boxes=boxes, sex=scene.sex, age_years=scene.age_years, deidentifier="synthetic: no patient exists",
            provenance={
                "generator": self.generator, "difficulty": config.difficulty, "seed": config.seed,
                "index": scene.index,
                **{f"strength of {finding.name}": round(finding.strength, 6) for finding in scene.findings},
            },
            views=[ViewRecord(id="0", height=config.size, width=config.size, bits=config.bits, view="PA",
                              body_part="CHEST", spacing_mm=(spacing, spacing))],
        )  # fmt: skip
        masks = {}
        if config.masks:
            for number, label_map in enumerate(_label_maps(drawing)):
                masks["0", number] = _encode(label_map, "png")
        return Loaded(
            sample=Sample(key=item.key, record=record, images=(image,), masks=masks, split=item.split or "train")
        )


def split_seed(seed: int, split: str) -> int:
    """Seed of a split's generator: studies of two splits share nothing."""
    return int(hash_u64(seed, f"chest phantom: split {split}"))


def _words(scene: Scene, count: int) -> Array:
    return uniform(scene.seed, "chest phantom: words", scene.index, draws=count)


def _labels(scene: Scene) -> dict[str, LabelValue]:
    labels: dict[str, LabelValue] = dict.fromkeys(LABELS, 0)
    for finding in scene.findings:
        labels[finding.name] = 1 if finding.present else 0
    return labels


def _is_present(scene: Scene, name: str) -> bool:
    return any(finding.name == name and finding.present for finding in scene.findings)


def _encode(pixels: Array, encoding: str) -> EncodedImage:
    buffer = io.BytesIO()
    if encoding == "jpeg":
        Image.fromarray(pixels).save(buffer, "JPEG", quality=92)
        return EncodedImage(data=buffer.getvalue(), extension="jpg")
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return EncodedImage(data=buffer.getvalue(), extension="png")


def _box(name: str, region: Array) -> Box:
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    return Box(
        view="0", label=name, left=float(columns[0]), top=float(rows[0]),
        width=float(columns[-1] - columns[0] + 1), height=float(rows[-1] - rows[0] + 1),
    )  # fmt: skip


def _label_maps(drawing: Drawing) -> Iterator[Array]:
    """Organs first, then the findings: each goes to the first map where it covers nothing."""
    maps = [drawing.organs]
    for name, region in drawing.regions.items():
        for label_map in maps[1:]:
            if not label_map[region].any():
                break
        else:
            label_map = np.zeros_like(drawing.organs)
            maps.append(label_map)
        label_map[region] = MASKS[name]
    return iter(maps)


@cache
def generator_hash() -> str:
    """16 hex digits of what the generator gives: pixels, labels and words of 32 small studies of each difficulty."""
    digest = hashlib.sha256()
    for name, difficulty in DIFFICULTIES.items():
        for index in range(32):
            scene = draw_scene(split_seed(0, "train"), index, difficulty)
            drawing = render(scene, difficulty, 48)
            digest.update(np.floor(drawing.pixels * np.float32(255.0) + np.float32(0.5)).astype(np.uint8).tobytes())
            report = write_report(scene.findings, partial(_words, scene))
            digest.update(repr((name, report.sections, [finding.entity() for finding in scene.findings])).encode())
    return digest.hexdigest()[:16]
