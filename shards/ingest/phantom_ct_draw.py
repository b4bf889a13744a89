"""A CT phantom's scene -> a volume in HU and the label map of its organs.

Voxels use only + - * /, square roots, floor and comparisons, and random numbers of shards/keyed.py, so that they are
the same on every machine. Axes are (z, y, x): z to the head, y to the front, x to the patient's right.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from shards.ingest.phantom_chest_draw import bump, pixel_noise, squared, step, wave
from shards.ingest.phantom_ct_scene import FIELD_OF_VIEW_MM, MASKS, Body, Difficulty, Scene
from shards.keyed import uniform

Array = np.ndarray
Level = np.ndarray | np.float32 | float  # HU, of each voxel or of all
Place = tuple[float, float, float]  # z, y, x in mm from the middle of the trunk

AIR_HU, FAT_HU, MUSCLE_HU, FLUID_HU = -1000.0, -100.0, 50.0, 10.0

# Centre and half axes of the mean patient's organs, in mm; the aorta is a path from below to the heart.
LUNG, LUNG_AXES = (42.0, -5.0, 68.0), (66.0, 68.0, 46.0)
HEART, HEART_AXES = (8.0, 22.0, -14.0), (38.0, 36.0, 42.0)
LIVER, LIVER_AXES = (-38.0, 5.0, 52.0), (42.0, 60.0, 56.0)
LEFT_LOBE, LEFT_LOBE_AXES = (-26.0, 32.0, 0.0), (28.0, 32.0, 48.0)
SPLEEN, SPLEEN_AXES = (-40.0, -38.0, -92.0), (34.0, 32.0, 22.0)
KIDNEY, KIDNEY_AXES = (-78.0, -52.0, 54.0), (34.0, 23.0, 22.0)
AORTA_RADIUS = 12.0
AORTA = ((-106.0, -50.0, -8.0), (60.0, -48.0, -14.0), (84.0, -22.0, -6.0), (66.0, 10.0, 8.0), (40.0, 12.0, 6.0))


def cloud(seed: int, purpose: str, index: int, shape: tuple[int, int, int], cells: int) -> Array:
    """Smooth noise in [-1, 1] of `shape`: uniform values on a grid of `cells` an axis, interpolated smoothly."""
    values = uniform(seed, purpose, index, draws=(cells + 1) ** 3).astype(np.float32) * 2 - 1
    values = values.reshape((cells + 1,) * 3)
    for axis, size in enumerate(shape):
        place = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(cells / size)
        cell = place.astype(np.int64)
        part = place - cell
        part = (part * part * (3 - part - part)).reshape([-1 if a == axis else 1 for a in range(3)])
        values = values.take(cell, axis) * (1 - part) + values.take(cell + 1, axis) * part
    return values


@dataclass(frozen=True)
class _Grid:
    """Voxel centres in mm from the middle of the trunk, upright and of mean size; float32, broadcast to [D, H, W]."""

    z: Array  # [D, 1, 1]
    y: Array  # [1, H, 1]
    x: Array  # [D, 1, W]
    voxel: float  # width of a soft edge, mm

    @classmethod
    def of(cls, shape: tuple[int, int, int], body: Body) -> _Grid:
        spacing = [field / size for field, size in zip(FIELD_OF_VIEW_MM, shape, strict=True)]
        z, y, x = (
            (np.arange(size, dtype=np.float32) + np.float32(0.5 - size / 2)) * np.float32(step_mm)
            for size, step_mm in zip(shape, spacing, strict=True)
        )
        zoom = np.float32(1.0 / body.size)
        z = ((z - np.float32(body.shift[0])) * zoom)[:, None, None]
        y = ((y - np.float32(body.shift[1])) * zoom)[None, :, None]
        x = (x - np.float32(body.shift[2]))[None, None, :] * zoom + np.float32(body.tilt) * z
        return cls(z, y, x, max(spacing))

    def radius(self, centre: Place, axes: Place) -> Array:
        """[D, H, W]: 0 in the centre of an ellipsoid, 1 on its surface."""
        z, y, x = (
            squared((places - np.float32(middle)) * np.float32(1.0 / axis))
            for places, middle, axis in zip((self.z, self.y, self.x), centre, axes, strict=True)
        )
        return np.sqrt(z + y + x)

    def ball(self, centre: Place, radius_mm: float) -> Array:
        """[D, H, W]: mm within the surface of a ball, negative outside."""
        return np.float32(radius_mm) * (np.float32(1.0) - self.radius(centre, (radius_mm,) * 3))

    def soft(self, depth_mm: Array) -> Array:
        """0 outside, 1 inside, over one voxel."""
        return step(depth_mm, self.voxel)

    def to_segment(self, first: Place, last: Place) -> Array:
        """[D, H, W]: mm from the line between two places."""
        offset = [places - np.float32(a) for places, a in zip((self.z, self.y, self.x), first, strict=True)]
        along = [np.float32(b - a) for a, b in zip(first, last, strict=True)]
        length = np.float32(1.0) / (along[0] * along[0] + along[1] * along[1] + along[2] * along[2])
        t = (offset[0] * along[0] + offset[1] * along[1] + offset[2] * along[2]) * length
        np.clip(t, 0.0, 1.0, out=t)
        z, y, x = (squared(o - t * a) for o, a in zip(offset, along, strict=True))
        return np.sqrt(z + y + x)


@dataclass
class Drawing:
    """A rendered scene: `hu` float32 [D, H, W] and `organs` uint8 [D, H, W], 0 or an id of MASKS."""

    hu: Array
    organs: Array


class _Canvas:
    """A volume being drawn: what comes later takes the place of what was there."""

    def __init__(self, scene: Scene, difficulty: Difficulty, shape: tuple[int, int, int]) -> None:
        self.scene, self.body, self.shape = scene, scene.body, shape
        self.contrast = difficulty.contrast
        self.grid = _Grid.of(shape, scene.body)
        self.hu = np.full(shape, AIR_HU, dtype=np.float32)
        self.organs = np.zeros(shape, dtype=np.uint8)
        self.fine, self.ragged, self.coarse = (
            cloud(scene.seed, f"ct phantom: cloud {cells}", scene.index, shape, cells) for cells in (18, 11, 6)
        )

    def fill(self, inside: Array, hu: Level) -> None:
        """Blend `hu` in where `inside` is 1."""
        self.hu += inside * (np.asarray(hu, dtype=np.float32) - self.hu)

    def organ(self, name: str, inside: Array, hu: Level) -> None:
        """Blend an organ in with its patient's HU and texture, and label it."""
        looks = self.body.organs[name]
        self.fill(inside, np.float32(looks.hu) + np.float32(looks.texture_hu) * self.fine + hu)
        self.organs[inside > 0.5] = MASKS[name]

    def placed(self, name: str, centre: Place, axes: Place, factor: float = 1.0) -> tuple[Place, Place]:
        """Centre and half axes of a patient's organ."""
        looks = self.body.organs[name]
        z, y, x = (middle + shift for middle, shift in zip(centre, looks.shift, strict=True))
        depth, height, width = (axis * looks.size * factor for axis in axes)
        return (z, y, x), (depth, height, width)


def render(scene: Scene, difficulty: Difficulty, shape: tuple[int, int, int]) -> Drawing:
    """Draw the scene as `shape` (z, y, x) voxels of FIELD_OF_VIEW_MM."""
    canvas = _Canvas(scene, difficulty, shape)
    _trunk(canvas)
    for side in ("right", "left"):
        _lung(canvas, side)
    _heart(canvas)
    _aorta(canvas)
    _liver(canvas)
    _spleen(canvas)
    for side in ("right", "left"):
        _kidney(canvas, side)
    noise = pixel_noise(scene.seed, "ct phantom: noise", scene.index, shape)
    canvas.hu += np.float32(difficulty.noise_hu) * noise
    return Drawing(np.maximum(canvas.hu, np.float32(-1024.0)), canvas.organs)


def _trunk(canvas: _Canvas) -> None:
    """Skin and fat, muscle, viscera without a name, ribs and spine."""
    grid, body = canvas.grid, canvas.body
    flat = grid.z * np.float32(0.0)
    radius = np.sqrt(squared(grid.y * np.float32(1 / 108.0)) + squared(grid.x * np.float32(1 / 148.0))) + flat
    depth = (np.float32(1.0) - radius) * np.float32(108.0)
    canvas.fill(grid.soft(depth), FAT_HU)
    canvas.fill(grid.soft(depth - np.float32(body.fat_mm)), MUSCLE_HU)
    canvas.fill(grid.soft(depth - np.float32(body.fat_mm + 12.0)), canvas.ragged * np.float32(60.0) - np.float32(20.0))
    bowel = step(canvas.coarse - np.float32(0.35), 0.3) * step(np.float32(-50.0) - grid.z, 10.0)
    canvas.fill(bowel * grid.soft(depth - np.float32(body.fat_mm + 14.0)), canvas.ragged * 160.0)
    ring = bump(squared((depth - np.float32(body.fat_mm + 7.0)) * np.float32(1 / 9.0)))
    slope = grid.z + np.float32(0.35) * grid.y
    rib = step(np.float32(0.27) - wave(slope * np.float32(1 / 28.0)), 0.2) * step(grid.z + np.float32(30.0), 10.0)
    canvas.fill(ring * rib, body.bone_hu)
    spine = np.float32(18.0) - np.sqrt(squared(grid.y + np.float32(76.0)) + squared(grid.x)) + flat
    disc = step(np.float32(0.14) - wave(grid.z * np.float32(1 / 32.0)), 0.1)
    canvas.fill(grid.soft(spine), np.float32(body.bone_hu) * (np.float32(1.0) - np.float32(0.6) * disc))


def _lung(canvas: _Canvas, side: str) -> None:
    grid, found = canvas.grid, canvas.scene.of("lung")
    sign = 1.0 if side == "right" else -1.0
    centre, axes = canvas.placed("lung", (LUNG[0], LUNG[1], sign * LUNG[2]), LUNG_AXES)
    inside = grid.soft((np.float32(1.0) - grid.radius(centre, axes)) * np.float32(min(axes)))
    vessels = step(canvas.fine - np.float32(0.45), 0.3)
    hu = np.float32(-815.0) + np.float32(220.0) * vessels
    if emphysema := found.get("emphysema"):
        towards = grid.z - np.float32(centre[0])  # centrilobular: above all in the upper parts
        upper = step(towards if emphysema.place == "centrilobular" else -towards, 90.0)
        share = np.float32(0.35 - 0.45 * emphysema.strength) + np.float32(0.5) * (np.float32(1.0) - upper)
        pockets = step(canvas.ragged - share, 0.25)
        hu = hu - pockets * (hu + np.float32(815.0 + 90.0 * canvas.contrast))
    consolidation = found.get("consolidation")
    if consolidation and consolidation.on(side):
        height = 34.0 if consolidation.place == "upper" else -26.0
        place = (
            centre[0] + height + 6.0 * consolidation.along, centre[1] + 24.0 * consolidation.across,
            centre[2] + 10.0 * consolidation.around,
        )  # fmt: skip
        depth = grid.ball(place, 16.0 + 16.0 * consolidation.strength) + np.float32(10.0) * canvas.ragged
        hu = hu + step(depth, 10.0) * (np.float32(30.0) - hu)
    effusion = found.get("pleural effusion")
    if effusion and effusion.on(side):
        level = centre[1] - axes[1] + 14.0 + 38.0 * effusion.strength * (0.75 if effusion.side == "bilateral" else 1.0)
        hu = hu + grid.soft(np.float32(level) - grid.y) * (np.float32(FLUID_HU) - hu)
    canvas.organ("lung", inside, hu)


def _heart(canvas: _Canvas) -> None:
    grid, found = canvas.grid, canvas.scene.of("heart")
    large = found.get("cardiomegaly")
    factor = 1.0 + (0.18 + 0.24 * large.strength) * canvas.contrast if large else 1.0
    centre, axes = canvas.placed("heart", HEART, HEART_AXES, factor)
    radius = grid.radius(centre, axes)
    muscle = (np.float32(1.0) - radius) * np.float32(min(axes))
    chambers = grid.soft(muscle - np.float32(9.0))
    blood = np.float32(45.0 + 130.0 * canvas.body.arterial)
    hu = np.float32(70.0) + chambers * (blood - np.float32(70.0))
    fluid_mm = 0.0
    if effusion := found.get("pericardial effusion"):
        fluid_mm = 5.0 + 9.0 * effusion.strength
        hu = hu + grid.soft(-muscle) * (np.float32(FLUID_HU) - hu)
    canvas.organ("heart", grid.soft(muscle + np.float32(fluid_mm)), hu)


def _aorta(canvas: _Canvas) -> None:
    grid, found, looks = canvas.grid, canvas.scene.of("aorta"), canvas.body.organs["aorta"]
    radius = np.float32(AORTA_RADIUS * looks.size) + grid.z * np.float32(0.0)
    if aneurysm := found.get("aortic aneurysm"):
        height = (26.0 if "thoracic" in aneurysm.place else -66.0) + 10.0 * aneurysm.along
        behind = step(np.float32(-18.0) - grid.y, 12.0)
        bulge = bump(squared((grid.z - np.float32(height)) * np.float32(1 / 36.0)))
        radius = radius + np.float32(8.0 + 10.0 * aneurysm.strength) * bulge * behind
    path = [(z + looks.shift[0], y + looks.shift[1], x + looks.shift[2]) for z, y, x in AORTA]
    distance = grid.to_segment(path[0], path[1])
    for first, last in pairwise(path[1:]):
        np.minimum(distance, grid.to_segment(first, last), out=distance)
    depth = radius - distance
    hu: Level = np.float32(45.0 + 240.0 * canvas.body.arterial)
    if calcification := found.get("aortic calcification"):
        spots = step(canvas.ragged - np.float32(0.40 - 0.45 * calcification.strength), 0.2)
        wall = bump(squared(depth * np.float32(1 / 8.0)))
        hu = hu + spots * wall * np.float32((400.0 + 300.0 * calcification.strength) * canvas.contrast)
    canvas.organ("aorta", grid.soft(depth), hu)


def _liver(canvas: _Canvas) -> None:
    grid, found = canvas.grid, canvas.scene.of("liver")
    centre, axes = canvas.placed("liver", LIVER, LIVER_AXES)
    lobe, lobe_axes = canvas.placed("liver", LEFT_LOBE, LEFT_LOBE_AXES)
    radius = np.minimum(grid.radius(centre, axes), grid.radius(lobe, lobe_axes))
    hu: Level = np.float32(58.0 + 55.0 * canvas.body.venous)
    if steatosis := found.get("hepatic steatosis"):
        hu = hu - np.float32((20.0 + 45.0 * steatosis.strength) * canvas.contrast)
    if mass := found.get("liver mass"):
        middle, reach = (centre, 12.0) if mass.place == "right" else (lobe, 4.0)
        place = (
            middle[0] + 0.5 * reach * mass.along, middle[1] + 1.5 * reach * mass.across,
            middle[2] + 0.5 * reach * mass.around,
        )  # fmt: skip
        ball = grid.soft(grid.ball(place, 18.0 + 10.0 * mass.strength))
        hu = hu - ball * np.float32((40.0 + 20.0 * mass.strength) * canvas.contrast)
    canvas.organ("liver", grid.soft((np.float32(1.0) - radius) * np.float32(28.0)), hu)


def _spleen(canvas: _Canvas) -> None:
    grid, found = canvas.grid, canvas.scene.of("spleen")
    large = found.get("splenomegaly")
    factor = 1.0 + (0.2 + 0.28 * large.strength) * canvas.contrast if large else 1.0
    centre, axes = canvas.placed("spleen", SPLEEN, SPLEEN_AXES, factor)
    hu: Level = np.float32(50.0 + 70.0 * canvas.body.venous)
    if infarct := found.get("splenic infarct"):  # at the surface, above or below, in front or behind
        place = (
            centre[0] + (0.55 if infarct.along > 0 else -0.55) * axes[0],
            centre[1] + (0.45 if infarct.across > 0 else -0.45) * axes[1], centre[2] - 0.4 * axes[2],
        )  # fmt: skip
        ball = grid.soft(grid.ball(place, 14.0 + 8.0 * infarct.strength))
        hu = hu - ball * np.float32((40.0 + 40.0 * canvas.body.venous) * canvas.contrast)
    canvas.organ("spleen", grid.soft((np.float32(1.0) - grid.radius(centre, axes)) * np.float32(min(axes))), hu)


def _kidney(canvas: _Canvas, side: str) -> None:
    grid, found = canvas.grid, canvas.scene.of("kidney")
    dilated, stone = (
        finding if finding and finding.on(side) else None
        for finding in (found.get("hydronephrosis"), found.get("kidney stone"))
    )
    factor = 1.06 + 0.12 * dilated.strength if dilated else 1.0
    sign = 1.0 if side == "right" else -1.0
    centre, axes = canvas.placed("kidney", (KIDNEY[0], KIDNEY[1], sign * KIDNEY[2]), KIDNEY_AXES, factor)
    radius = grid.radius(centre, axes)
    hu: Level = np.float32(35.0 + 140.0 * canvas.body.venous)
    if dilated:
        cavity = (np.float32(min(1.0, (0.5 + 0.28 * dilated.strength) * canvas.contrast)) - radius) * np.float32(22.0)
        hu = hu + grid.soft(cavity) * (np.float32(FLUID_HU) - hu)
    if stone:
        place = (centre[0] + 9.0 * stone.along, centre[1] + 4.0 * stone.across, centre[2] + 4.0 * stone.around)
        hu = hu + grid.soft(grid.ball(place, 7.0 + 4.0 * stone.strength)) * np.float32(600.0 * canvas.contrast)
    canvas.organ("kidney", grid.soft((np.float32(1.0) - radius) * np.float32(min(axes))), hu)
