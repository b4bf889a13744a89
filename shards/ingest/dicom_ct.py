"""A DICOM series of CT slices -> one volume: slices in order, gaps and doubles found, gantry tilt kept in the grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shards.ingest.class_map import ANATOMY_IDS
from shards.ingest.dicom import FileDataset, RefusedError, element_of, number_of, numbers_of, stored_pixels, text_of
from shards.ingest.hounsfield import Hounsfield, Rescale, hounsfield
from shards.ingest.view_files import OpenedView, path_within
from shards.ingest.volume import Array, turned
from shards.ingest.volume_file import MaskedVolumes
from shards.ingest.volume_members import volume_members
from shards.reports.identity.header import BODY_PARTS

COMPUTED_TOMOGRAPHY = ("CT",)
SAME_PLACE_MM = 1e-3
# Of the median distance between slices.
GAP, UNEQUAL = 1.5, 0.1
# Of a pixel: slices that lie farther from the line through the first and the last are no one volume.
OUT_OF_LINE = 0.1
_TO_RIGHT_AND_FRONT = np.diag([-1.0, -1.0, 1.0])  # DICOM counts mm to the left and the back


@dataclass(frozen=True, kw_only=True, eq=False)
class _Slice:
    """One image: places in mm as DICOM counts them, and the rescale to HU."""

    dataset: FileDataset
    position: Array  # [3], of the first pixel
    along_row: Array  # [3], unit length
    along_column: Array
    spacing: tuple[float, float]  # between rows, between columns
    shape: tuple[int, int]
    rescale: Rescale


@dataclass(frozen=True, kw_only=True)
class CtSeries(MaskedVolumes):
    """Reads series as volumes. In `mask_folder` a label map `<SeriesInstanceUID>.nii.gz`, or a folder of that name."""

    def check(self, dataset: FileDataset) -> None:
        kinds = element_of(dataset, "ImageType") or ()
        if any(str(kind).upper() == "LOCALIZER" for kind in kinds):
            raise RefusedError("localizer, no slice of a volume")

    def open(self, datasets: Sequence[FileDataset], view_id: str) -> OpenedView:
        slices = [_slice(dataset) for dataset in datasets]
        _check_alike(slices)
        normal = np.cross(slices[0].along_row, slices[0].along_column)
        slices.sort(key=lambda one: float(one.position @ normal))
        stored = [_narrow(stored_pixels(one.dataset)) for one in slices]
        notes: list[str] = []
        slices, stored = _without_doubles(slices, stored, normal, notes)
        affine = _affine(slices, normal)
        voxels, grid = turned(np.stack(stored).transpose(2, 1, 0), affine)
        series = text_of(datasets[0], "SeriesInstanceUID")
        masks = self._masks_of(series)
        notes += self.missing(masks)
        read = self.reader.bring(_hounsfield(voxels, slices, affine), grid, masks)
        body_part = text_of(datasets[0], "BodyPartExamined").upper()
        members = volume_members(
            view_id, read.volume, ANATOMY_IDS, body_part=body_part if body_part in BODY_PARTS else None
        )
        return OpenedView(
            record=members.view, image=members.image, masks=members.masks,
            provenance=read.provenance | {"slices": len(slices)}, notes=(*notes, *read.notes),
        )  # fmt: skip

    def _masks_of(self, series: str) -> Path | None:
        if self.mask_folder is None or not series:
            return None
        paths = (path_within(self.mask_folder, name) for name in (f"{series}.nii.gz", series))
        return next((path for path in paths if path.exists()), None)


def _slice(dataset: FileDataset) -> _Slice:
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
    return _Slice(
        dataset=dataset, position=np.asarray(position), along_row=along_row / lengths[0],
        along_column=along_column / lengths[1], spacing=(spacing[0], spacing[1]), shape=(rows, columns),
        rescale=(slope or 1.0, number_of(dataset, "RescaleIntercept") or 0.0),
    )  # fmt: skip


def _narrow(values: Array) -> Array:
    """As few bytes a voxel as hold it: hundreds of slices are in memory at once."""
    fits = -32768 <= values.min() and values.max() <= 32767
    return values.astype(np.int16 if fits else np.int32)


def _check_alike(slices: Sequence[_Slice]) -> None:
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
    slices: Sequence[_Slice], stored: Sequence[Array], normal: Array, notes: list[str]
) -> tuple[list[_Slice], list[Array]]:
    """Slices in order, those left out that repeat the one before voxel for voxel. Raises RefusedError for others."""
    kept, pixels = [slices[0]], [stored[0]]
    for one, values in zip(slices[1:], stored[1:], strict=True):
        if abs(float((one.position - kept[-1].position) @ normal)) > SAME_PLACE_MM:
            kept.append(one)
            pixels.append(values)
        elif np.array_equal(values, pixels[-1]) and one.rescale == kept[-1].rescale:
            notes.append("the same slice twice, left out once")
        else:
            raise RefusedError("different slices in one place of a series")
    return kept, pixels


def _affine(slices: Sequence[_Slice], normal: Array) -> Array:
    """Index (column, row, slice) -> mm (right, front, head). Raises RefusedError for slices that make no grid."""
    first, count = slices[0], len(slices)
    if count == 1:
        names = ("SpacingBetweenSlices", "SliceThickness")
        thickness = next((size for name in names if (size := number_of(first.dataset, name)) and size > 0), None)
        if thickness is None:
            raise RefusedError("one slice of unknown thickness")
        step = normal * thickness
    else:
        places = np.stack([one.position for one in slices])
        distances = np.diff(places @ normal)
        usual = float(np.median(distances))
        if (distances > GAP * usual).any() or (distances < usual / GAP).any():
            raise RefusedError("missing slices: a gap in the series")
        if (np.abs(distances - usual) > UNEQUAL * usual).any():
            raise RefusedError("unequal slice spacing")
        step = (places[-1] - places[0]) / (count - 1)
        away = places - places[0] - np.arange(count)[:, None] * step
        if np.abs(away).max() > OUT_OF_LINE * max(*first.spacing, usual):
            raise RefusedError("slices out of line")
    matrix = np.stack([first.along_row * first.spacing[1], first.along_column * first.spacing[0], step], axis=1)
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = _TO_RIGHT_AND_FRONT @ matrix, _TO_RIGHT_AND_FRONT @ first.position
    return affine


def _hounsfield(voxels: Array, slices: Sequence[_Slice], affine: Array) -> Hounsfield:
    """HU of the turned voxels. Where slices differ in their rescale each gets its own."""
    if len({one.rescale for one in slices}) == 1:
        return hounsfield(voxels, slices[0].rescale)
    slope, intercept = (
        np.array(values)[None, None, :] for values in zip(*[one.rescale for one in slices], strict=True)
    )
    shape = slices[0].shape[1], slices[0].shape[0], len(slices)
    each = [turned(np.broadcast_to(values, shape), affine)[0] for values in (slope, intercept)]
    return hounsfield(voxels * each[0] + each[1], (1.0, 0.0))
