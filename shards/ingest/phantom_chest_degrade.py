"""Chest phantoms that were taken badly: one of five degradations, graded from mild to one that destroys findings.

Which studies, which kind, how strong and where are keyed draws of the study. Arithmetic as in phantom_chest_draw.py
(and running sums), so that pixels are the same on every machine. Labels, boxes and masks stay the truth of the scene.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shards.ingest.phantom_chest_draw import Array, Drawing, cloud, pixel_noise, step
from shards.ingest.phantom_chest_scene import MASKS, Scene
from shards.keyed import uniform

Kind = Literal["blur", "contrast", "noise", "crop", "occlusion"]
KINDS: tuple[Kind, ...] = ("blur", "contrast", "noise", "crop", "occlusion")
LUNGS = (MASKS["right lung"], MASKS["left lung"])

# Values at grade 0 and 1; lengths are fractions of the image's side, grey values lie in [0, 1].
BLUR_WIDTH = (0.01, 0.23)  # of each of three boxes; the standard deviation is half of it
CONTRAST = (0.85, 0.03)  # what is left of it
CONTRAST_NOISE = (0.0, 0.04)  # the detector's noise does not fade with the signal
NOISE = (0.02, 0.45)
CROPPED = (0.10, 0.75)  # share of the image that is black
OCCLUDED = (0.35, 1.30)  # covered share of the region's height and width
GRAINS = 40  # cells of the coarse part of the noise, which no shrinking of the image averages away


@dataclass(frozen=True, kw_only=True)
class Degradation:
    """How one study is degraded; `places` are uniform numbers that say where."""

    kind: Kind
    grade: float  # (0, 1]
    places: tuple[float, ...]

    def between(self, ends: tuple[float, float]) -> float:
        """The value at this grade, given the values at grades 0 and 1."""
        return ends[0] + (ends[1] - ends[0]) * self.grade


def draw_degradation(seed: int, index: int, share: float) -> Degradation | None:
    """The degradation of study `index`, or None for the 1 - `share` of the studies that are clean.

    A study that is degraded at one share is degraded alike at every larger one.
    """
    chance, kind, grade, *places = uniform(seed, "chest phantom: degradation", index, draws=8).tolist()
    if chance >= share:
        return None
    return Degradation(kind=KINDS[int(kind * len(KINDS))], grade=1.0 - grade, places=tuple(places))


def degrade(drawing: Drawing, scene: Scene, degradation: Degradation) -> Array:
    """Pixels of the drawing [S, S] in [0, 1], degraded."""
    pixels, size, places = drawing.pixels, len(drawing.pixels), degradation.places
    if degradation.kind == "blur":
        return _blur(pixels, degradation.between(BLUR_WIDTH) * size)
    if degradation.kind == "contrast":
        level = np.float32(0.3 + 0.4 * places[0])
        flat = level + (pixels - level) * np.float32(degradation.between(CONTRAST))
        return _clip(flat + np.float32(degradation.between(CONTRAST_NOISE)) * _grain(scene, size))
    if degradation.kind == "noise":
        return _clip(pixels + np.float32(degradation.between(NOISE)) * _grain(scene, size))
    if degradation.kind == "crop":
        return _crop(pixels, degradation)
    return _occlude(pixels, _occluded_region(drawing, scene, places), degradation)


def _clip(pixels: Array) -> Array:
    return np.minimum(np.maximum(pixels, np.float32(0.0)), np.float32(1.0))


def _grain(scene: Scene, size: int) -> Array:
    """Noise of standard deviation near 1, part fine and part coarse."""
    fine = pixel_noise(scene.seed, "chest phantom: degrading noise", scene.index, (size, size))
    coarse = cloud(scene.seed, "chest phantom: degrading grain", scene.index, size, GRAINS)
    return np.float32(0.7) * fine + np.float32(1.7) * coarse


def _blur(pixels: Array, width: float) -> Array:
    """Three boxes of `width` pixels, down and across; the border goes on outwards."""
    smooth = pixels.astype(np.float64)
    for _ in range(3):
        smooth = _box_rows(_box_rows(smooth, width).T, width).T
    return smooth.astype(np.float32)


def _box_rows(values: Array, width: float) -> Array:
    """Mean over a window of `width` rows; the rows at its two ends count by their covered part."""
    reach = max(0.0, (width - 1.0) / 2.0)
    whole = int(reach)
    part, size = reach - whole, len(values)
    padded = np.concatenate([values[:1].repeat(whole + 1, axis=0), values, values[-1:].repeat(whole + 1, axis=0)])
    sums = np.concatenate([np.zeros_like(values[:1]), np.cumsum(padded, axis=0)])
    inner = sums[2 * whole + 2 : 2 * whole + 2 + size] - sums[1 : 1 + size]
    ends = padded[:size] + padded[2 * whole + 2 :]
    return (inner + part * ends) / (1.0 + 2.0 * reach)


def _crop(pixels: Array, degradation: Degradation) -> Array:
    """One side of the image black, as outside of the exposed field."""
    size, side = len(pixels), int(degradation.places[0] * 4)
    covered = min(size - 1, max(1, round(degradation.between(CROPPED) * size)))
    result = pixels.copy()
    view = result if side < 2 else result.T
    view[slice(None, covered) if side % 2 == 0 else slice(size - covered, None)] = 0.0
    return result


def _occluded_region(drawing: Drawing, scene: Scene, places: tuple[float, ...]) -> tuple[float, float, float, float]:
    """Centre and half sides (row, column, height, width) in pixels of what is covered.

    A random present finding, else a random part of the lungs.
    """
    size = len(drawing.pixels)
    regions = _present_regions(drawing, scene)
    if not regions:
        rows, columns = np.nonzero(np.isin(drawing.organs, LUNGS))
        chosen = int(places[0] * len(rows))
        return float(rows[chosen]), float(columns[chosen]), 0.14 * size, 0.14 * size
    names = sorted(regions)
    rows, columns = np.nonzero(regions[names[int(places[0] * len(names))]])
    least = 0.05 * size
    height = max(least, (float(rows.max()) - float(rows.min()) + 1) / 2)
    width = max(least, (float(columns.max()) - float(columns.min()) + 1) / 2)
    return (float(rows.min()) + float(rows.max())) / 2, (float(columns.min()) + float(columns.max())) / 2, height, width


def _present_regions(drawing: Drawing, scene: Scene) -> Mapping[str, Array]:
    present = {finding.name for finding in scene.findings if finding.present}
    return {name: region for name, region in drawing.regions.items() if name in present and region.any()}


def _occlude(pixels: Array, region: tuple[float, float, float, float], degradation: Degradation) -> Array:
    """A flat patch with soft edges over the region, as an arm or a device would throw."""
    size, share = len(pixels), degradation.between(OCCLUDED)
    row, column, height, width = region
    axis = np.arange(size, dtype=np.float32)
    soft = 0.03 * size
    down = step(np.float32(height * share) - np.abs(axis - np.float32(row)), soft)
    across = step(np.float32(width * share) - np.abs(axis - np.float32(column)), soft)
    cover = down[:, None] * across[None, :]
    level = np.float32(0.35 + 0.6 * degradation.places[1])
    return pixels + cover * (level - pixels)
