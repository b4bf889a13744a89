"""A DICOM series of CT slices -> one volume, and its masks from label maps or DICOM objects; tilt stays in the grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shards.ingest.class_map import ANATOMY_IDS
from shards.ingest.dicom import FoundMasks
from shards.ingest.dicom_file import FileDataset, RefusedError, element_of, text_of
from shards.ingest.dicom_masks import find_masks, structures_of
from shards.ingest.dicom_slices import Stack, stack_of
from shards.ingest.view_files import OpenedView, path_within
from shards.ingest.volume_file import MaskedVolumes
from shards.ingest.volume_masks import Masks, read_masks
from shards.ingest.volume_members import volume_members
from shards.reports.identity.header import BODY_PARTS

COMPUTED_TOMOGRAPHY = ("CT",)


@dataclass(frozen=True, kw_only=True)
class CtSeries(MaskedVolumes):
    """Reads series as volumes.

    `mask_folder` holds label maps `<SeriesInstanceUID>.nii.gz`, folders of structures of that name, or SEG and RTSTRUCT
    objects of any name, which say themselves which series they belong to; it may be the folder of the series.
    """

    def check(self, dataset: FileDataset) -> None:
        kinds = element_of(dataset, "ImageType") or ()
        if any(str(kind).upper() == "LOCALIZER" for kind in kinds):
            raise RefusedError("localizer, no slice of a volume")

    def find_masks(self, frames: Mapping[str, str]) -> FoundMasks:
        return FoundMasks() if self.mask_folder is None else find_masks(self.mask_folder, frames)

    def open(self, datasets: Sequence[FileDataset], view_id: str, masks: Sequence[str]) -> OpenedView:
        stack, values, doubles = stack_of(datasets)
        notes = ["the same slice twice, left out once"] * doubles
        label_maps = self._masks(text_of(datasets[0], "SeriesInstanceUID"), masks, stack, notes)
        notes += self.missing(label_maps is not None)
        hu, grid = stack.image(values.hu)
        read = self.reader.bring(replace(values, hu=hu), grid, label_maps)
        provenance = read.provenance | {"slices": len(stack.slices)}
        if not stack.even:
            provenance |= {"slices made even": True, "largest distance of slices": stack.largest_distance_mm}
        body_part = text_of(datasets[0], "BodyPartExamined").upper()
        members = volume_members(
            view_id, read.volume, ANATOMY_IDS, body_part=body_part if body_part in BODY_PARTS else None
        )
        return OpenedView(
            record=members.view, image=members.image, masks=members.masks, provenance=provenance,
            notes=(*notes, *read.notes),
        )  # fmt: skip

    def _masks(self, series: str, objects: Sequence[str], stack: Stack, notes: list[str]) -> Masks | None:
        if self.mask_folder is None or not series:
            return None
        paths = [path_within(self.mask_folder, name) for name in (f"{series}.nii.gz", series)]
        path: Path | None = next((path for path in paths if path.exists()), None)
        if path is not None:
            return read_masks(path)
        if objects:
            return structures_of([path_within(self.mask_folder, name) for name in objects], stack, notes)
        return None
