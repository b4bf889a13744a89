"""DICOM SEG and RTSTRUCT objects -> structures on the slices of the series that they name.

Names of segments and regions are read only to find their anatomy: none is kept, logged or quoted.

Letters: S slices, R rows, C columns, F frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from shards.ingest.dicom import FoundMasks
from shards.ingest.dicom_file import (
    Dataset,
    FileDataset,
    RefusedError,
    items_of,
    number_of,
    numbers_of,
    pixels_of,
    read_file,
    text_of,
)
from shards.ingest.dicom_slices import SAME_PLACE_MM, Stack
from shards.ingest.nifti import is_nifti
from shards.ingest.volume import ASKEW_MAX_VOXELS, Array, Grid, VolumeRefusedError
from shards.ingest.volume_masks import Structure

SEGMENTATION, STRUCTURE_SET = "SEG", "RTSTRUCT"
# A segment of such a category is a finding at an anatomy, not the anatomy.
_ALTERED = frozenset({"49755003", "M-01000"})


# --- which object belongs to which series ---


def find_masks(folder: Path, frames: Mapping[str, str]) -> FoundMasks:
    """SEG and RTSTRUCT objects under a folder by the series they name.

    `frames`: SeriesInstanceUID -> FrameOfReferenceUID of the series that there are. Names are relative to `folder`.
    """
    of_series: dict[str, list[str]] = {}
    files, refused = set(), []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and not is_nifti(path)):
        name = path.relative_to(folder).as_posix()
        try:
            dataset = read_file(path, pixels=False)
        except RefusedError:
            continue  # whatever it is, no object of masks
        if text_of(dataset, "Modality") not in (SEGMENTATION, STRUCTURE_SET):
            continue
        files.add(path.resolve())
        named = _series_named(dataset)
        here = {series: frame for series, frame in named.items() if series in frames}
        fitting = [series for series, frame in here.items() if not (frame and frames[series] not in ("", frame))]
        for series in fitting:
            of_series.setdefault(series, []).append(name)
        if not named:
            refused.append((name, "mask that names no series"))
        elif not here:
            refused.append((name, "mask of a series that is not here"))
        elif not fitting:
            refused.append((name, "mask in another frame of reference than its series"))
    return FoundMasks(
        of_series={series: tuple(names) for series, names in of_series.items()},
        files=frozenset(files), refused=tuple(refused),
    )  # fmt: skip


def _series_named(dataset: Dataset) -> dict[str, str]:
    """SeriesInstanceUID -> FrameOfReferenceUID, empty where unsaid, of an object's references."""
    if text_of(dataset, "Modality") == SEGMENTATION:
        frame = text_of(dataset, "FrameOfReferenceUID")
        series = (text_of(item, "SeriesInstanceUID") for item in items_of(dataset, "ReferencedSeriesSequence"))
        return {uid: frame for uid in series if uid}
    return {
        uid: text_of(frame, "FrameOfReferenceUID")
        for frame in items_of(dataset, "ReferencedFrameOfReferenceSequence")
        for study in items_of(frame, "RTReferencedStudySequence")
        for series in items_of(study, "RTReferencedSeriesSequence")
        if (uid := text_of(series, "SeriesInstanceUID"))
    }


def structures_of(paths: Sequence[Path], stack: Stack, notes: list[str]) -> list[Structure]:
    """All structures of a series' objects. Raises VolumeRefusedError with a reason that begins with `mask`."""
    structures: list[Structure] = []
    for path in paths:
        try:
            dataset = read_file(path)
            read = _segments if text_of(dataset, "Modality") == SEGMENTATION else _regions
            structures += read(dataset, stack, notes)
        except RefusedError as error:
            raise VolumeRefusedError(f"mask: {error}") from None
    return structures


# --- SEG ---


def _segments(dataset: FileDataset, stack: Stack, notes: list[str]) -> Iterator[Structure]:
    """Segments of a binary, fractional or label map segmentation."""
    values = pixels_of(dataset)
    values = values[None] if values.ndim == 2 else values  # [F, R, C]
    if values.shape[1:] != stack.shape[1:]:
        raise VolumeRefusedError("mask of another grid")
    shared = (items_of(dataset, "SharedFunctionalGroupsSequence") or [Dataset()])[0]
    frames = items_of(dataset, "PerFrameFunctionalGroupsSequence")
    if len(frames) != len(values):
        raise RefusedError("frames without a place")
    kind = text_of(dataset, "SegmentationType").upper()
    half = (number_of(dataset, "MaximumFractionalValue") or 1.0) / 2 if kind == "FRACTIONAL" else 0.5
    places = [_slice_of_frame(frame, shared, stack) for frame in frames]
    shown = [_segment_of_frame(frame, shared) for frame in frames]
    for item in items_of(dataset, "SegmentSequence"):
        number = number_of(item, "SegmentNumber")

        def draw(number: float | None = number) -> tuple[Array, Grid]:
            region = np.zeros(stack.shape, np.uint8)
            for frame, place in enumerate(places):
                if kind == "LABELMAP":
                    region[place] |= values[frame] == number
                elif shown[frame] == number:
                    region[place] |= values[frame] >= half
            return stack.labels(region)

        yield Structure(names=_names_of_segment(item), draw=draw)


def _names_of_segment(segment: Dataset) -> tuple[str, ...]:
    """Code and meaning of its type, if that is an anatomy, then its label."""
    category = items_of(segment, "SegmentedPropertyCategoryCodeSequence")
    names = []
    if not any(text_of(code, "CodeValue") in _ALTERED for code in category):
        for code in items_of(segment, "SegmentedPropertyTypeCodeSequence"):
            names += [
                f"{text_of(code, 'CodingSchemeDesignator')}:{text_of(code, 'CodeValue')}",
                text_of(code, "CodeMeaning"),
            ]
    return (*names, text_of(segment, "SegmentLabel"))


def _group(frame: Dataset, shared: Dataset, name: str) -> Dataset:
    """A functional group of a frame, or the one that all frames share."""
    return (items_of(frame, name) or items_of(shared, name) or [Dataset()])[0]


def _segment_of_frame(frame: Dataset, shared: Dataset) -> float | None:
    return number_of(_group(frame, shared, "SegmentIdentificationSequence"), "ReferencedSegmentNumber")


def _slice_of_frame(frame: Dataset, shared: Dataset, stack: Stack) -> int:
    """The slice on which a frame lies, by its plane, else by the image it was drawn on. Raises VolumeRefusedError."""
    first = stack.first
    cosines = numbers_of(_group(frame, shared, "PlaneOrientationSequence"), "ImageOrientationPatient")
    spacing = numbers_of(_group(frame, shared, "PixelMeasuresSequence"), "PixelSpacing")
    along = np.concatenate([first.along_row, first.along_column])
    if cosines and (len(cosines) != 6 or np.abs(np.asarray(cosines) - along).max() > 1e-3):
        raise VolumeRefusedError("mask of another grid")
    if spacing and (len(spacing) != 2 or not np.allclose(spacing, first.spacing, rtol=1e-3)):
        raise VolumeRefusedError("mask of another grid")
    position = numbers_of(_group(frame, shared, "PlanePositionSequence"), "ImagePositionPatient")
    if len(position) == 3:
        return _slice_at(np.asarray(position), stack)
    named = [
        text_of(source, "ReferencedSOPInstanceUID")
        for derivation in items_of(frame, "DerivationImageSequence")
        for source in items_of(derivation, "SourceImageSequence")
    ]
    instances = [one.instance for one in stack.slices]
    number = next((instances.index(uid) for uid in named if uid and uid in instances), None)
    if number is None:
        raise RefusedError("frames without a place")
    return number


def _slice_at(position: Array, stack: Stack) -> int:
    """The slice whose first pixel lies at a position, to ASKEW_MAX_VOXELS. Raises VolumeRefusedError."""
    number = stack.at_height(float((position - stack.first.position) @ stack.normal))
    if number is None:
        raise VolumeRefusedError("mask of another grid")
    away = np.abs(position - stack.slices[number].position)
    if away.max() > max(ASKEW_MAX_VOXELS * min(stack.first.spacing), SAME_PLACE_MM):
        raise VolumeRefusedError("mask of another grid")
    return number


# --- RTSTRUCT ---


@dataclass(frozen=True, kw_only=True, eq=False)
class _Contour:
    points: Array  # [N, 3] mm
    height: float  # mm along the normal from the first slice


def _regions(dataset: FileDataset, stack: Stack, notes: list[str]) -> Iterator[Structure]:
    """Regions of interest with the closed planar contours that bound them."""
    frame = text_of(stack.first.dataset, "FrameOfReferenceUID")
    contours = {
        number_of(region, "ReferencedROINumber"): items_of(region, "ContourSequence")
        for region in items_of(dataset, "ROIContourSequence")
    }
    for region in items_of(dataset, "StructureSetROISequence"):
        own = text_of(region, "ReferencedFrameOfReferenceUID")
        if own and frame and own != frame:
            notes.append("structure in another frame of reference, left out")
            continue
        drawn = contours.get(number_of(region, "ROINumber"), [])
        yield Structure(names=(text_of(region, "ROIName"),), draw=partial(_filled, drawn, stack, notes))


def _filled(items: Sequence[Dataset], stack: Stack, notes: list[str]) -> tuple[Array, Grid]:
    """Voxels whose centres lie inside of contours. Raises VolumeRefusedError."""
    region = np.zeros(stack.shape, np.uint8)
    on_slice: dict[int, dict[float, list[_Contour]]] = {}
    for item in items:
        contour = _contour(item, stack, notes)
        if contour is None:
            continue
        number = stack.at_height(contour.height)
        if number is None:
            raise VolumeRefusedError("mask: contour outside of the slices")
        on_slice.setdefault(number, {}).setdefault(round(contour.height, 2), []).append(contour)
    for number, planes in on_slice.items():
        # Contours may be drawn on planes closer than the slices: one plane makes a slice, the nearest.
        nearest = min(planes, key=lambda height: abs(height - stack.heights[number]))
        notes.extend(["contours of a plane between slices, left out"] * (len(planes) - 1))
        polygons = [_pixels(contour.points, stack, number) for contour in planes[nearest]]
        region[number] = inside(polygons, stack.first.shape)
    return stack.labels(region)


def _contour(item: Dataset, stack: Stack, notes: list[str]) -> _Contour | None:
    """A contour that bounds an area in a plane of the slices, None and a note for others. Raises VolumeRefusedError."""
    numbers = numbers_of(item, "ContourData")
    closed = text_of(item, "ContourGeometricType").upper() in ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR")
    if not closed or len(numbers) < 9 or len(numbers) % 3:
        notes.append("contour that bounds no area, left out")
        return None
    points = np.asarray(numbers).reshape(-1, 3)
    heights = (points - stack.first.position) @ stack.normal
    if np.ptp(heights) > max(0.1 * np.linalg.norm(stack.affine[:3, 2]), 0.01):
        raise VolumeRefusedError("mask: contour across slices")
    return _Contour(points=points, height=float(heights.mean()))


def _pixels(points: Array, stack: Stack, number: int) -> Array:
    """[N, 2] (row, column) of places in mm on a slice; pixel centres are whole numbers."""
    first = stack.first
    away = points - stack.slices[number].position
    return np.stack([away @ first.along_column / first.spacing[0], away @ first.along_row / first.spacing[1]], axis=1)


def inside(polygons: Sequence[Array], shape: tuple[int, int]) -> Array:
    """bool [R, C]: which pixel centres lie inside of an odd number of polygons [N, 2] (row, column).

    A pixel counts how many edges cross its row at or before its column. Of centres on an edge those on an upper or left
    one are inside, so that regions with a common edge share no pixel and leave none out.
    """
    rows, columns = shape
    crossings = np.zeros((rows, columns + 1), np.int32)
    for polygon in polygons:
        for (row, column), (next_row, next_column) in zip(polygon, np.roll(polygon, -1, axis=0), strict=True):
            low, high = sorted((row, next_row))
            crossed = np.arange(max(0, int(np.ceil(low))), min(rows, int(np.ceil(high))))
            if len(crossed):
                at = column + (crossed - row) * ((next_column - column) / (next_row - row))
                np.add.at(crossings, (crossed, np.clip(np.ceil(at), 0, columns).astype(int)), 1)
    return np.cumsum(crossings[:, :columns], axis=1) % 2 == 1
