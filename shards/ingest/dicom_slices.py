"""Slices of a DICOM series -> a stack on one grid: in order, gaps and doubles found, distances made even.

Letters: S slices as stored, D evenly spaced ones, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shards.ingest.dicom_file import (
    FileDataset,
    RefusedError,
    element_of,
    number_of,
    numbers_of,
    stored_pixels,
    text_of,
)
from shards.ingest.hounsfield import Hounsfield, Rescale, hounsfield
from shards.ingest.volume import VOXELS_MAX, Array, Grid, turned, whole_hu

SAME_PLACE_MM = 1e-3
# A distance this many times those beside it is a missing slice, and so is a longer one where distances differ.
GAP, UNEVEN_GAP_MM = 1.5, 10.0
# Of the median distance: what still counts as even.
UNEVEN = 0.1
# Evenly spaced slices lie as close as the closest of the stored ones, up to this share of the median distance.
CLOSEST = 0.25
# Of a pixel: slices that lie farther from the line through the first and the last are no one volume.
OUT_OF_LINE = 0.1
_TO_RIGHT_AND_FRONT = np.diag([-1.0, -1.0, 1.0])  # DICOM counts mm to the left and the back


@dataclass(frozen=True, kw_only=True, eq=False)
class Slice:
    """One image: places in mm as DICOM counts them, and the rescale to HU."""

    dataset: FileDataset
    instance: str  # SOPInstanceUID
    position: Array  # [3], of the first pixel
    along_row: Array  # [3], unit length
    along_column: Array
    spacing: tuple[float, float]  # between rows, between columns
    shape: tuple[int, int]
    rescale: Rescale


def slice_of(dataset: FileDataset) -> Slice:
    """What a header says of its slice. Raises RefusedError."""
    position, cosines = numbers_of(dataset, "ImagePositionPatient"), numbers_of(dataset, "ImageOrientationPatient")
    if len(position) != 3 or len(cosines) != 6:
        raise RefusedError("slice without position or orientation")
    spacing = numbers_of(dataset, "PixelSpacing")
    if len(spacing) != 2 or min(spacing) <= 0:
        raise RefusedError("slice without pixel spacing")
    along_row, along_column = np.asarray(cosines[:3]), np.asarray(cosines[3:])
    lengths = np.linalg.norm(along_row), np.linalg.norm(along_column)
    if abs(lengths[0] - 1) > 0.01 or abs(lengths[1] - 1) > 0.01 or abs(float(along_row @ along_column)) > 0.01:
        raise RefusedError("orientation that is none: its axes are not square")
    if element_of(dataset, "ModalityLUTSequence"):
        raise RefusedError("values by a modality look-up table")
    kind = text_of(dataset, "RescaleType").upper()
    if kind not in ("", "HU"):
        raise RefusedError("values are no HU by RescaleType")
    rows, columns = (int(number_of(dataset, name) or 0) for name in ("Rows", "Columns"))
    slope = number_of(dataset, "RescaleSlope")
    if not slope and "RescaleSlope" in dataset:
        raise RefusedError("RescaleSlope is 0 or no number")
    return Slice(
        dataset=dataset, instance=text_of(dataset, "SOPInstanceUID"), position=np.asarray(position),
        along_row=along_row / lengths[0], along_column=along_column / lengths[1], spacing=(spacing[0], spacing[1]),
        shape=(rows, columns), rescale=(slope or 1.0, number_of(dataset, "RescaleIntercept") or 0.0),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Stack:
    """Slices of one orientation, size and spacing in their order along the normal."""

    slices: tuple[Slice, ...]
    heights: Array  # [S] mm along the normal from the first slice
    places: Array  # [D] where evenly spaced slices lie, as an index among the stored ones
    affine: Array  # [4, 4] index (column, row, even slice) -> mm (right, front, head)

    @property
    def first(self) -> Slice:
        return self.slices[0]

    @property
    def normal(self) -> Array:
        return np.cross(self.first.along_row, self.first.along_column)

    @property
    def shape(self) -> tuple[int, int, int]:
        """S, R, C"""
        return len(self.slices), *self.first.shape

    @property
    def even(self) -> bool:
        return np.array_equal(self.places, np.arange(len(self.slices)))

    @property
    def largest_distance_mm(self) -> float:
        return float(np.diff(self.heights).max(initial=0.0))

    def at_height(self, height_mm: float) -> int | None:
        """The slice next to a height, none where that is farther than half the way to the next slice."""
        number = int(np.abs(self.heights - height_mm).argmin())
        beside = np.diff(self.heights)[max(0, number - 1) : number + 1]
        reach = beside.max() / 2 if len(beside) else np.linalg.norm(self.affine[:3, 2]) / 2
        return number if abs(self.heights[number] - height_mm) <= reach + SAME_PLACE_MM else None

    def image(self, values: Array) -> tuple[Array, Grid]:
        """HU [S, R, C] int16 -> [D, R, C], linear between slices, turned to (z, y, x)."""
        if self.even:
            return turned(values.transpose(2, 1, 0), self.affine)
        low = np.minimum(np.floor(self.places), len(values) - 2).astype(int)
        part = (self.places - low).astype(np.float32)
        made = np.empty((len(low), *values.shape[1:]), np.int16)
        for number, (start, share) in enumerate(zip(low, part, strict=True)):
            made[number] = whole_hu(values[start] * (1 - share) + values[start + 1] * share)
        return turned(made.transpose(2, 1, 0), self.affine)

    def labels(self, values: Array) -> tuple[Array, Grid]:
        """Labels [S, R, C] -> [D, R, C] of the nearest slice, turned to (z, y, x)."""
        if not self.even:
            values = values[np.floor(self.places + 0.5).astype(int)]
        return turned(values.transpose(2, 1, 0), self.affine)


def stack_of(datasets: Sequence[FileDataset]) -> tuple[Stack, Hounsfield, int]:
    """A series' files, in no order, as a stack, HU [S, R, C], and how many slices stood there twice.

    Raises RefusedError where they make no volume.
    """
    slices = [slice_of(dataset) for dataset in datasets]
    _check_alike(slices)
    normal = np.cross(slices[0].along_row, slices[0].along_column)
    slices.sort(key=lambda one: float(one.position @ normal))
    stored = [_narrow(stored_pixels(one.dataset)) for one in slices]
    kept, pixels = _without_doubles(slices, stored, normal)
    return _placed(kept, normal), _hounsfield(np.stack(pixels), kept), len(slices) - len(kept)


def _narrow(values: Array) -> Array:
    """As few bytes a voxel as hold it: hundreds of slices are in memory at once."""
    fits = -32768 <= values.min() and values.max() <= 32767
    return values.astype(np.int16 if fits else np.int32)


def _check_alike(slices: Sequence[Slice]) -> None:
    first = slices[0]
    for one in slices[1:]:
        turned_away = max(
            np.abs(one.along_row - first.along_row).max(), np.abs(one.along_column - first.along_column).max()
        )
        if turned_away > 1e-3:
            raise RefusedError("slices of different orientation in one series")
        if one.shape != first.shape:
            raise RefusedError("slices of different size in one series")
        if not np.allclose(one.spacing, first.spacing, rtol=1e-3):
            raise RefusedError("slices of different pixel spacing in one series")


def _without_doubles(
    slices: Sequence[Slice], stored: Sequence[Array], normal: Array
) -> tuple[list[Slice], list[Array]]:
    """Slices in order, those left out that repeat the one before voxel for voxel. Raises RefusedError for others."""
    kept, pixels = [slices[0]], [stored[0]]
    for one, values in zip(slices[1:], stored[1:], strict=True):
        if abs(float((one.position - kept[-1].position) @ normal)) > SAME_PLACE_MM:
            kept.append(one)
            pixels.append(values)
        elif not np.array_equal(values, pixels[-1]) or one.rescale != kept[-1].rescale:
            raise RefusedError("different slices in one place of a series")
    return kept, pixels


def _placed(slices: Sequence[Slice], normal: Array) -> Stack:
    """Where slices in order lie. Raises RefusedError for slices that make no grid."""
    first, positions = slices[0], np.stack([one.position for one in slices])
    heights = (positions - positions[0]) @ normal
    if len(slices) == 1:
        places, step = np.zeros(1), normal * _thickness(first)
    else:
        places = _even_places(heights)
        way = positions[-1] - positions[0]
        away = positions - positions[0] - (heights / heights[-1])[:, None] * way
        if np.abs(away).max() > OUT_OF_LINE * max(*first.spacing, float(np.median(np.diff(heights)))):
            raise RefusedError("slices out of line")
        step = way / (len(places) - 1)
    if len(places) * first.shape[0] * first.shape[1] > VOXELS_MAX:
        raise RefusedError(f"more than {VOXELS_MAX} voxels")
    matrix = np.stack([first.along_row * first.spacing[1], first.along_column * first.spacing[0], step], axis=1)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = _TO_RIGHT_AND_FRONT @ matrix, _TO_RIGHT_AND_FRONT @ first.position
    return Stack(slices=tuple(slices), heights=heights, places=places, affine=affine)


def _thickness(one: Slice) -> float:
    for name in ("SpacingBetweenSlices", "SliceThickness"):
        size = number_of(one.dataset, name)
        if size and size > 0:
            return size
    raise RefusedError("one slice of unknown thickness")


def _even_places(heights: Array) -> Array:
    """[D] indices among the slices [S] that are evenly spaced in mm; the first and the last slice stay in place."""
    distances = np.diff(heights)
    usual = float(np.median(distances))
    if (np.abs(distances - usual) <= UNEVEN * usual).all():
        return np.arange(len(heights), dtype=np.float64)
    beside = np.pad(distances, 1)  # a zone may have distances of its own: what counts is the larger neighbour
    if (distances > GAP * np.maximum(beside[:-2], beside[2:])).any() or distances.max() > UNEVEN_GAP_MM:
        raise RefusedError("missing slices: a gap in the series")
    closest = max(float(distances.min()), CLOSEST * usual)
    count = round(float(heights[-1]) / closest) + 1
    return np.interp(np.linspace(0.0, heights[-1], count), heights, np.arange(len(heights)))


def _hounsfield(stored: Array, slices: Sequence[Slice]) -> Hounsfield:
    """HU [S, R, C]. Where slices differ in their rescale each gets its own."""
    if len({one.rescale for one in slices}) == 1:
        return hounsfield(stored, slices[0].rescale)
    slope, intercept = (np.array(part)[:, None, None] for part in zip(*(one.rescale for one in slices), strict=True))
    return hounsfield(stored * slope + intercept, (1.0, 0.0))
