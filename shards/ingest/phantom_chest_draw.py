"""A chest phantom's scene -> pixels and the regions of organs and findings.

Pixels use only + - * /, square roots, floor and comparisons, and random numbers of shards/keyed.py, so that
they are the same on every machine. Attenuation is relative to the mediastinum's, 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from shards.ingest.phantom_chest_scene import FIELD_OF_VIEW_MM, MASKS, Anatomy, Difficulty, Scene
from shards.ingest.phantom_chest_text import Finding
from shards.keyed import hash_u64, uniform

Array = np.ndarray

# --- shapes: S = size of the square image in pixels; every map is float32 [S, S] ---


def step(distance: Array, width: float) -> Array:
    """0 below -width/2, 1 above width/2, smooth between."""
    t = distance * np.float32(1.0 / width)
    t += np.float32(0.5)
    np.maximum(t, np.float32(0.0), out=t)
    np.minimum(t, np.float32(1.0), out=t)
    slope = np.float32(3.0) - t - t
    slope *= t
    slope *= t
    return slope


def bump(square: Array) -> Array:
    """Smooth hill of a squared distance: 1 at 0, 0 from 1 on."""
    t = np.maximum(np.float32(1.0) - square, 0.0)
    return t * t


def squared(x: Array) -> Array:
    """x times x."""
    return x * x


def wave(phase: Array) -> Array:
    """Distance of each phase from the nearest whole number, in [0, 0.5]."""
    return np.abs(phase - np.floor(phase + np.float32(0.5)))


def pixel_noise(seed: int, purpose: str, index: int, shape: tuple[int, ...]) -> Array:
    """About normal, standard deviation 1: four 16-bit uniforms of one hash a pixel, summed."""
    words = hash_u64(seed, purpose, index, np.arange(math.prod(shape), dtype=np.uint64))
    total = np.zeros(words.shape, dtype=np.float32)
    for shift in (0, 16, 32, 48):
        total += ((words >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.float32)
    return ((total * np.float32(1.0 / 65536.0) - np.float32(2.0)) * np.float32(1.7320508)).reshape(shape)


def cloud(seed: int, purpose: str, index: int, size: int, cells: int) -> Array:
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
    return np.float32(anatomy.cage) * (np.float32(0.72) + np.float32(0.28) * step(y + np.float32(0.25), 1.2))


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
    radius = np.sqrt(np.sqrt(squared(squared(u)) + squared(squared(v))))
    depth = (np.float32(1.0) - radius) * half_width
    floor = by_side(_dome("left", anatomy, raised), _dome("right", anatomy, raised))
    floor += np.float32(0.62) * squared(ax - np.float32(0.36)) + np.float32(0.9) * np.maximum(
        ax - np.float32(0.62), 0.0
    )
    inside = step(depth, 0.05) * step(floor - y, 0.05)
    return _Lungs(left, ax, y, inside, inside, depth, median, half_width)


def _ribs(ax: Array, y: Array, wall: Array, anatomy: Anatomy) -> Array:
    """Attenuation of the posterior (bright, going down outwards) and anterior (faint, going down inwards) ribs."""
    cage = step(wall + np.float32(0.02) - ax, 0.06) * step(y - np.float32(anatomy.apex - 0.04), 0.08)
    spacing = np.float32(1.0 / anatomy.rib_spacing)
    outwards = squared(ax * np.float32(1.0 / anatomy.cage))
    posterior = (y - np.float32(anatomy.rib_slope) * ax - np.float32(0.22) * squared(outwards)) * spacing
    distance = wave(posterior + np.float32(anatomy.rib_phase))
    tube = step(np.float32(0.24) - distance, 0.14)
    rim = bump(squared((distance - np.float32(0.20)) * np.float32(1.0 / 0.10)))
    back = (np.float32(0.10) * tube + np.float32(0.05) * rim) * cage * step(ax - np.float32(0.05), 0.06)
    anterior = (y + np.float32(0.75) * ax - np.float32(0.45) * outwards) * spacing
    front_distance = wave(anterior + np.float32(anatomy.rib_phase * 1.7))
    front = step(np.float32(0.22) - front_distance, 0.16) * cage * step(ax - np.float32(0.34), 0.16)
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
        distance = wave(angle * np.float32(count) + np.float32(bend) * reach + phase) * reach
        branch = np.maximum(np.float32(1.0) - distance / (width * np.float32(count)), 0.0)
        total += branch * (step(reach - np.float32(first), 0.1) * step(np.float32(last) - reach, 0.5))
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
    shoulder = np.float32(0.24) + np.float32(1.05) * step(y + np.float32(0.74), 0.55)
    trunk = step(shoulder + np.float32(0.02) - ax, 0.16) * (np.float32(0.98) - np.float32(0.22) * squared(squared(ax)))
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
    haze = cloud(scene.seed, "chest phantom: haze", scene.index, size, 7)
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

    mottle = cloud(scene.seed, "chest phantom: mottle", scene.index, size, max(2, size // 5))
    level = (attenuation - np.float32(0.28 - anatomy.exposure)) * np.float32(1.0 / anatomy.latitude)
    noise = pixel_noise(scene.seed, "chest phantom: pixel noise", scene.index, (size, size)) + np.float32(0.5) * mottle
    level = level + np.float32(difficulty.noise) * noise * (np.float32(0.5) + np.maximum(level, 0.0))
    return Drawing(tone(level), organs, regions)


def tone(level: Array) -> Array:
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
    fluid = step(lungs.y - surface, 0.10)
    return lucency * (np.float32(1.0) - np.float32(min(1.0, 0.72 * contrast)) * fluid), fluid


def _pneumothorax(lungs: _Lungs, finding: Finding, lucency: Array, contrast: float) -> tuple[Array, Array]:
    """Air outside the lung: a rim without vessels, blacker, widest at the apex, edged by the pleural line."""
    higher = np.clip((np.float32(0.35) - lungs.y) * np.float32(1.0 / 0.95), 0.0, 1.0)
    rim = np.float32(0.03 + 0.20 * finding.strength) * (np.float32(0.25) + np.float32(0.75) * higher)
    outer = step(lungs.ax - lungs.median + np.float32(0.16) + np.float32(0.3) * higher, 0.1)
    beyond = step(rim - lungs.depth, 0.03) * outer
    line = bump(squared((lungs.depth - rim) * np.float32(1.0 / 0.022))) * outer
    collapse = np.float32(0.16 * finding.strength * contrast) * (np.float32(1.0) - beyond)
    changed = lucency + np.float32(contrast) * (np.float32(0.13) * beyond - np.float32(0.20) * line) - collapse
    return changed, beyond


_PLEURAL = {"effusion": _effusion, "pneumothorax": _pneumothorax}


def _consolidation(lungs: _Lungs, finding: Finding, anatomy: Anatomy, haze: Array) -> tuple[Array, Array]:
    """Patch with ragged borders, limited by the lungs."""
    centre_x, centre_y = _lesion_centre(finding, anatomy)
    radius = (0.13 + 0.20 * finding.strength) * (0.5 + 0.5 * finding.bulk)
    square = squared((lungs.ax - np.float32(centre_x)) * np.float32(1.15 / radius)) + squared(
        (lungs.y - np.float32(centre_y)) * np.float32(1.0 / radius)
    )
    patch = step(np.float32(0.85) - np.sqrt(square) + np.float32(0.45) * haze, 0.8) * lungs.tissue
    texture = np.float32(1.0) + np.float32(0.25) * haze
    return np.float32(0.26 + 0.26 * finding.strength) * patch * texture, patch > 0.35


def _nodule(lungs: _Lungs, finding: Finding, anatomy: Anatomy, haze: Array) -> tuple[Array, Array]:
    """Ball with a sharp border: attenuation follows its thickness."""
    centre_x, centre_y = _lesion_centre(finding, anatomy)
    radius = finding.radius_mm * 2.0 / FIELD_OF_VIEW_MM
    square = (squared(lungs.ax - np.float32(centre_x)) + squared(lungs.y - np.float32(centre_y))) * np.float32(
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
    offset = offset + np.float32(0.03) * squared(along)
    width = (0.034 + 0.034 * finding.strength) * finding.bulk
    band = bump(squared(offset * np.float32(1.0 / width))) * step(np.float32(1.0) - np.abs(along), 0.3) * lungs.tissue
    return np.float32(0.30 + 0.25 * finding.strength) * band, band > 0.3


def _edema(lungs: _Lungs, finding: Finding, anatomy: Anatomy, haze: Array) -> tuple[Array, Array]:
    """Bat-wing haze around the hilum, thickened vessels, short horizontal septal lines at the wall."""
    strength = finding.strength
    square = squared((lungs.ax - np.float32(0.26)) * np.float32(1.0 / 0.50)) + squared(
        (lungs.y + np.float32(0.02)) * np.float32(1.0 / 0.62)
    )
    wing = bump(square) * lungs.tissue * (np.float32(1.0) + np.float32(0.35) * haze)
    streaks = _vessels(
        lungs, anatomy, [np.float32(finding.extra), np.float32(1.0 - finding.extra)], 0.3 + 0.5 * strength
    )
    septal = bump(squared(wave(lungs.y * np.float32(17.0)) * np.float32(1.0 / 0.16)))
    septal = septal * step(np.float32(0.09) - lungs.depth, 0.03) * step(lungs.y - np.float32(0.05), 0.2) * lungs.tissue
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
    square = squared(offset_x * np.float32(1.0 / width)) + squared(offset_y * np.float32(1.0 / half_height))
    outline = step(np.float32(1.0) - np.sqrt(square), 0.10)
    return outline * np.sqrt(np.maximum(np.float32(1.15) - np.float32(0.55) * square, 0.0)), outline > 0.5


def _mediastinum(x: Array, y: Array, anatomy: Anatomy) -> Array:
    """Great vessels, hila and spine; the trachea as air."""
    middle = x - np.float32(anatomy.turn)
    stem = step(np.float32(0.135) - np.abs(middle - np.float32(0.02)), 0.10) * step(np.float32(0.1) - y, 0.5)
    knob = bump((squared(middle - np.float32(0.12)) + squared(y + np.float32(0.36))) * np.float32(1 / 0.13**2))
    beside = squared(np.abs(middle) - np.float32(0.20)) + squared((y + np.float32(0.02)) * np.float32(0.6))
    hila = bump(beside * np.float32(1 / 0.15**2))
    spine = step(np.float32(0.085) - np.abs(middle), 0.04)
    discs = bump(squared(wave(y * np.float32(6.3) + np.float32(anatomy.rib_phase)) * np.float32(1.0 / 0.14)))
    spine = spine * (np.float32(1.0) - np.float32(0.55) * discs) * np.float32(0.11 * anatomy.bone)
    trachea = step(np.float32(0.05) - np.abs(middle - np.float32(0.01)), 0.05) * step(np.float32(-0.24) - y, 0.12)
    return (
        np.float32(0.22) * stem + np.float32(0.20) * knob + np.float32(0.16) * hila + spine - np.float32(0.20) * trachea
    )


def _hernia(x: Array, y: Array, finding: Finding, anatomy: Anatomy) -> tuple[Array, Array]:
    """Stomach behind the heart: a ball with air above a level fluid surface."""
    radius = (0.15 + 0.11 * finding.strength) * (0.7 + 0.3 * finding.bulk)
    centre_x, centre_y = 0.05 + 0.05 * finding.across, anatomy.diaphragm - 0.04 - 0.3 * radius
    square = (squared(x - np.float32(centre_x)) + squared(y - np.float32(centre_y))) * np.float32(1 / radius**2)
    inside = step(np.float32(1.0) - square, 0.25)
    wall = bump(squared((np.sqrt(square) - np.float32(0.92)) * np.float32(1 / 0.16)))
    air = step(np.float32(0.70) - square, 0.25) * step(np.float32(centre_y - 0.1 * radius) - y, 0.02)
    added = np.float32(0.18) * inside + np.float32(0.12) * wall - np.float32(0.36 + 0.26 * finding.strength) * air
    return added, square < 1.0


def _clavicles(x: Array, y: Array, anatomy: Anatomy) -> Array:
    ax = np.abs(x - np.float32(anatomy.turn * 0.6))
    t = np.clip((ax - np.float32(0.08)) * np.float32(1.0 / 0.72), 0.0, 1.0)
    line = np.float32(anatomy.apex + 0.17) - np.float32(0.17) * t + np.float32(0.10) * (t - t * t * t)
    offset = np.abs(y - line)
    tube = (
        step(np.float32(0.030) - offset, 0.022) * step(ax - np.float32(0.06), 0.04) * step(np.float32(0.84) - ax, 0.06)
    )
    rim = bump(squared((offset - np.float32(0.024)) * np.float32(1.0 / 0.014))) * tube
    return (np.float32(0.12) * tube + np.float32(0.08) * rim) * np.float32(anatomy.bone)


def _soft_tissue(x: Array, ax: Array, y: Array, anatomy: Anatomy, trunk: Array) -> Array:
    """Chest wall, breasts, shoulder blades and the stomach's air bubble."""
    breast = bump(
        squared((ax - np.float32(0.48)) * np.float32(1 / 0.40)) + squared((y - np.float32(0.22)) * np.float32(1 / 0.42))
    )
    edge = step(np.float32(0.44) - y, 0.08)
    blade = step(ax - np.float32(0.70) - np.float32(0.22) * (y + np.float32(0.3)), 0.05) * step(
        np.float32(0.12) - y, 0.2
    )
    bubble = bump(
        squared((x - np.float32(0.40)) * np.float32(1 / 0.20))
        + squared((y - np.float32(anatomy.diaphragm + 0.20)) * np.float32(1 / 0.11))
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
            * step(line, 0.03)
            * step(np.float32(0.14) - line, 0.2)
            * lungs.inside
            * (lungs.left == (places[0] < 0.5))
        )
    if "nipples" in scene.clutter:  # mimics a nodule, but on both sides at one height
        height, radius = 0.20 + 0.15 * places[2], 0.035
        square = (squared(np.abs(x) - np.float32(0.46)) + squared(y - np.float32(height))) * np.float32(1 / radius**2)
        total += np.float32(0.14) * bump(square)
    if "fat pad" in scene.clutter:  # mimics a large heart or a small effusion
        square = squared((x - np.float32(0.44)) * np.float32(1 / 0.20)) + squared(
            (y - np.float32(0.44)) * np.float32(1 / 0.16)
        )
        total += np.float32(0.22) * bump(square)
    if "line" in scene.clutter:  # a tube on the chest
        path = (
            x
            - np.float32(0.5 * places[3] - 0.25)
            - np.float32(0.25) * (y + np.float32(0.4)) * (np.float32(places[4]) - y)
        )
        total += (
            np.float32(0.20) * step(np.float32(0.013) - np.abs(path), 0.012) * step(np.float32(places[5]) - y, 0.02)
        )
    if "marker" in scene.clutter:  # the technician's lead letter, here a bar
        bar = step(np.float32(0.05) - np.abs(x + np.float32(0.80)), 0.01) * step(
            np.float32(0.03) - np.abs(y + np.float32(0.82)), 0.01
        )
        total += np.float32(1.2) * bar
    return total
