"""A CT volume on its way into a shard: one orientation, one spacing, cropped to what is labelled (fVLM, 2501.14548).

Axes are (z, y, x) everywhere, and the index grows with z to the head, y to the front and x to the patient's right: the
axes of NIfTI (RAS+) in reversed order. Grids that stand askew to the patient, by gantry tilt or otherwise, are
resampled onto this one; grids along it are only turned, which changes no value.

Letters: D slices, H, W.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage

from shards.ingest.image_file import ImageRefusedError

# Of a voxel: a grid whose corners lie closer than this to the patient's axes counts as aligned.
ASKEW_MAX_VOXELS = 0.1
MARGIN_SLICES, MARGIN_PIXELS = 5, 20  # kept around the labelled anatomies
LABEL_MAPS_MAX = 8
VOXELS_MAX = 2_000 * 1_024 * 1_024
VOXEL_MM = (0.01, 100.0)  # a header that says otherwise is damaged, or not in mm

Array = np.ndarray
Box = tuple[int, int, int, int, int, int]  # z0, y0, x0, z1, y1, x1, half-open
Triple = tuple[float, float, float]


class VolumeRefusedError(ImageRefusedError):
    """The reason why a file gives no volume; one of few, quoting nothing of the file."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Volume:
    """`hu` [D, H, W] int16 or float32, `label_maps` of the same shape, uint8 ids, as many as structures overlap."""

    hu: Array
    spacing_mm: Triple
    label_maps: tuple[Array, ...] = ()

    def __post_init__(self) -> None:
        if any(label_map.shape != self.hu.shape for label_map in self.label_maps):
            raise VolumeRefusedError("mask of another grid")


# --- orientation ---


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """Where voxels lie: `matrix` [3, 3] takes an index (z, y, x) to mm (z, y, x), `origin` is where the first lies."""

    shape: tuple[int, int, int]
    matrix: Array
    origin: Array

    @property
    def spacing_mm(self) -> Triple:
        z, y, x = np.linalg.norm(self.matrix, axis=0).tolist()
        return z, y, x

    @property
    def aligned(self) -> bool:
        """Whether no voxel is displaced by ASKEW_MAX_VOXELS when the axes are taken for the patient's."""
        away = self.matrix - np.diag(self.spacing_mm)
        corners = np.stack(np.meshgrid(*[[0, size - 1] for size in self.shape], indexing="ij"), -1).reshape(-1, 3)
        return bool((np.abs(corners @ away.T) <= ASKEW_MAX_VOXELS * np.asarray(self.spacing_mm)).all())

    def same_as(self, other: Grid) -> bool:
        """Whether the voxels of both lie at the same places, to ASKEW_MAX_VOXELS."""
        if self.shape != other.shape:
            return False
        corners = np.stack(np.meshgrid(*[[0, size - 1] for size in self.shape], indexing="ij"), -1).reshape(-1, 3)
        away = corners @ (self.matrix - other.matrix).T + self.origin - other.origin
        return bool((np.abs(away) <= ASKEW_MAX_VOXELS * np.asarray(self.spacing_mm)).all())


def turned(voxels: Array, affine: Array) -> tuple[Array, Grid]:
    """A volume [i, j, k] with its NIfTI affine (index -> mm, RAS+) as a view (z, y, x) along the patient, exactly.

    Each axis of the file goes to the patient's axis nearest to it. Raises VolumeRefusedError for a singular affine.
    """
    columns = np.asarray(affine, dtype=np.float64)[:3, :3]
    lengths = np.linalg.norm(columns, axis=0)
    if not np.isfinite(affine).all() or (lengths <= 0).any() or abs(np.linalg.det(columns / lengths)) < 1e-3:
        raise VolumeRefusedError("affine without three axes")
    if lengths.min() < VOXEL_MM[0] or lengths.max() > VOXEL_MM[1]:
        raise VolumeRefusedError(f"voxels outside of {VOXEL_MM[0]} to {VOXEL_MM[1]} mm")
    of_world = _nearest_axes(columns / lengths)
    voxels = voxels.transpose(of_world[::-1])
    matrix, origin = columns[::-1, of_world[::-1]].copy(), np.asarray(affine, dtype=np.float64)[2::-1, 3].copy()
    for axis in range(3):
        if matrix[axis, axis] < 0:
            voxels = np.flip(voxels, axis)
            origin += matrix[:, axis] * (voxels.shape[axis] - 1)
            matrix[:, axis] *= -1
    depth, height, width = voxels.shape
    return voxels, Grid(shape=(depth, height, width), matrix=matrix, origin=origin)


def _nearest_axes(cosines: Array) -> list[int]:
    """For each axis of the patient (x, y, z) the file's axis that goes with it: the assignment of largest cosines."""
    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    strength = np.abs(cosines)
    return list(max(orders, key=lambda order: sum(strength[world, axis] for world, axis in enumerate(order))))


# --- resampling ---


def target_grid(grid: Grid, spacing_mm: Triple | None) -> Grid:
    """The upright grid of `spacing_mm` (None: the grid's own) that covers what `grid` does, with the same middle.

    Raises VolumeRefusedError for more than VOXELS_MAX voxels.
    """
    spacing = np.asarray(grid.spacing_mm if spacing_mm is None else spacing_mm, dtype=np.float64)
    size = np.asarray(grid.shape, dtype=np.float64)
    extent = np.abs(grid.matrix) @ size  # mm between outer faces along z, y, x
    shape = np.maximum(1, np.floor(extent / spacing + 0.5 - 1e-6)).astype(int)
    middle = grid.origin + grid.matrix @ (size - 1) / 2
    depth, height, width = shape.tolist()
    if depth * height * width > VOXELS_MAX:
        raise VolumeRefusedError(f"more than {VOXELS_MAX} voxels after resampling")
    return Grid(
        shape=(depth, height, width), matrix=np.diag(spacing), origin=middle - spacing * (shape - 1) / 2
    )  # fmt: skip


def part_of(grid: Grid, box: Box) -> Grid:
    """The voxels of a box."""
    depth, height, width = (box[axis + 3] - box[axis] for axis in range(3))
    return replace(
        grid, shape=(depth, height, width), origin=grid.origin + grid.matrix @ np.asarray(box[:3], dtype=np.float64)
    )


def resample(voxels: Array, grid: Grid, target: Grid, *, nearest: bool, outside: float) -> Array:
    """Values of `voxels` at the places of `target`: linear between voxels in float32, or the nearest one unchanged.

    Up to half a voxel beyond the outermost centres the edge's value holds, `outside` beyond.
    """
    inverse = np.linalg.inv(grid.matrix)
    to_index = inverse @ target.matrix
    offset = inverse @ (target.origin - grid.origin)
    order = 0 if nearest else 1
    dtype = voxels.dtype if nearest else np.float32
    upright = np.abs(to_index - np.diag(np.diag(to_index))).max() < 1e-9
    if upright:
        scale = np.diag(to_index)
        values = _along_axes(voxels, target.shape, scale, offset, nearest)
        for axis, size in enumerate(voxels.shape):
            index = np.arange(target.shape[axis]) * scale[axis] + offset[axis]
            beyond = (index < -0.5) | (index > size - 0.5)
            values[(slice(None),) * axis + (beyond,)] = outside
        return values
    values = np.empty(target.shape, dtype=dtype)
    rows, columns = np.meshgrid(*map(np.arange, target.shape[1:]), indexing="ij")
    in_slice = np.tensordot(to_index[:, 1:], np.stack([rows, columns]).astype(np.float64), 1)  # [3, H, W]
    for number in range(target.shape[0]):  # slice by slice: places take 12 times the room of a stored voxel
        index = in_slice + (offset + to_index[:, 0] * number)[:, None, None]
        if nearest:
            index = _nearest(index)
        ndimage.map_coordinates(voxels, index, output=values[number], order=order, mode="nearest")
        for axis, size in enumerate(voxels.shape):
            edge = 0.0 if nearest else 0.5
            values[number][(index[axis] < -edge) | (index[axis] > size - 1 + edge)] = outside
    return values


def _nearest(index: Array) -> Array:
    """The whole number next to each; a half goes up, whatever the last bits say."""
    return np.floor(index + (0.5 + 1e-9))


def _along_axes(voxels: Array, shape: Sequence[int], scale: Array, offset: Array, nearest: bool) -> Array:
    """One axis after the other, the one that shrinks most first."""
    values = voxels
    for axis in sorted(range(3), key=lambda axis: shape[axis] / voxels.shape[axis]):
        index = np.arange(shape[axis]) * scale[axis] + offset[axis]
        top = values.shape[axis] - 1
        if nearest:
            values = values.take(np.clip(_nearest(index), 0, top).astype(np.int64), axis)
            continue
        index = np.clip(index, 0, top)
        low = np.minimum(np.floor(index), max(0, top - 1)).astype(np.int64)
        part = (index - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        first = values.take(low, axis).astype(np.float32, copy=False)
        if part.any():
            last = values.take(np.minimum(low + 1, top), axis).astype(np.float32, copy=False)
            last -= first
            last *= part
            first += last
        values = first
    return values


def whole_hu(hu: Array) -> Array:
    """float -> int16, a half goes up."""
    return np.floor(hu + hu.dtype.type(0.5)).astype(np.int16)


# --- what is kept ---


def label_box(label_maps: Sequence[Array], label: int | None = None) -> Box | None:
    """The smallest box that holds a label, or all of them; None where there is none."""
    box: list[tuple[int, int]] | None = None
    for label_map in label_maps:
        found = label_map != 0 if label is None else label_map == label
        spans = []
        for axis in range(3):
            places = np.flatnonzero(found.any(axis=tuple(other for other in range(3) if other != axis)))
            if not len(places):
                break
            spans.append((int(places[0]), int(places[-1]) + 1))
        else:
            box = spans if box is None else [
                (min(a[0], b[0]), max(a[1], b[1])) for a, b in zip(box, spans, strict=True)
            ]  # fmt: skip
    if box is None:
        return None
    (z0, z1), (y0, y1), (x0, x1) = box
    return z0, y0, x0, z1, y1, x1


def with_margin(box: Box, shape: tuple[int, int, int]) -> Box:
    """The box with 5 slices and 20 pixels around it, as far as the volume goes."""
    margins = (MARGIN_SLICES, MARGIN_PIXELS, MARGIN_PIXELS)
    z0, y0, x0 = (max(0, box[axis] - margins[axis]) for axis in range(3))
    z1, y1, x1 = (min(shape[axis], box[axis + 3] + margins[axis]) for axis in range(3))
    return z0, y0, x0, z1, y1, x1


def anatomy_boxes(label_maps: Sequence[Array], names: Mapping[str, int]) -> dict[str, Box]:
    """Box of every anatomy that some map holds."""
    present = {int(label) for label_map in label_maps for label in np.unique(label_map)}
    boxes = {name: label_box(label_maps, label) for name, label in names.items() if label in present}
    return {name: box for name, box in boxes.items() if box is not None}


def stacked(structures: Iterable[tuple[int, Array]], shape: tuple[int, int, int]) -> tuple[Array, ...]:
    """Label maps of structures (id, bool [D, H, W]): each goes to the first map where it covers no other id.

    Raises VolumeRefusedError for more than LABEL_MAPS_MAX maps.
    """
    maps: list[Array] = []
    for label, region in structures:
        for label_map in maps:
            covered = label_map[region]
            if not (covered[covered != label]).any():
                break
        else:
            if len(maps) == LABEL_MAPS_MAX:
                raise VolumeRefusedError(f"structures overlap in more than {LABEL_MAPS_MAX} label maps")
            label_map = np.zeros(shape, dtype=np.uint8)
            maps.append(label_map)
        label_map[region] = label
    return tuple(maps)
