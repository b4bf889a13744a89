"""CT volumes and their masks from NIfTI files, brought to the grid and the values that a shard stores.

Order of arXiv 2501.14548, 5.1: HU once, upright, resampled (image linear, masks nearest), cropped to the labelled
anatomies with a margin. Nothing is clipped: the HU window is a choice of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from shards.errors import ConfigError
from shards.ingest.class_map import ANATOMY_IDS, ClassMap, class_map
from shards.ingest.hounsfield import Hounsfield, Rescale, doubts, hounsfield
from shards.ingest.nifti import read_nifti, without_ending
from shards.ingest.segment import TotalSegmentator
from shards.ingest.view_files import Fact, OpenedView, View, path_within
from shards.ingest.volume import (
    Array,
    Grid,
    Triple,
    Volume,
    VolumeRefusedError,
    label_box,
    part_of,
    resample,
    target_grid,
    whole_hu,
    with_margin,
)
from shards.ingest.volume_masks import Masks, Place, label_maps, read_masks
from shards.ingest.volume_members import volume_members
from shards.volume_codec import AIR_HU

CHEST_SPACING_MM: Triple = (3.0, 1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class VolumeOptions:
    """How volumes are brought to one form.

    `spacing_mm` (z, y, x): None leaves upright volumes as they are. `unknown_ids` are labels that the class map does
    not know, `other_grid` a mask whose voxels do not lie where the volume's do.
    """

    spacing_mm: Triple | None = CHEST_SPACING_MM
    crop: bool = True
    class_map: str = "totalseg_v2"
    unknown_ids: Literal["refuse", "drop"] = "refuse"
    other_grid: Literal["refuse", "resample"] = "refuse"

    def check(self) -> None:
        """Raises ConfigError naming the option."""
        class_map(self.class_map)
        if self.spacing_mm is not None and not all(0.1 <= size <= 100.0 for size in self.spacing_mm):
            raise ConfigError(
                f"--spacing {' '.join(map(str, self.spacing_mm))}: three numbers from 0.1 to 100 mm: z y x"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class ReadVolume:
    """A volume as it is stored, and what was done to it in a few numbers and words for the record."""

    volume: Volume
    provenance: dict[str, Fact]
    notes: tuple[str, ...] = ()  # reasons for what was left out of it


@dataclass(frozen=True, kw_only=True)
class VolumeReader:
    """Reads volumes and masks; with a segmenter volumes without masks get its own. It goes to worker processes."""

    options: VolumeOptions = field(default_factory=VolumeOptions)
    segmenter: TotalSegmentator | None = None

    @cached_property
    def _classes(self) -> ClassMap:
        return class_map(self.options.class_map)

    @property
    def settings(self) -> dict[str, Any]:
        """All that changes the output."""
        made = {"segmentation": self.segmenter.settings} if self.segmenter is not None else {}
        return {"volume": vars(self.options), "class map version": self._classes.version} | made

    def read(
        self, path: Path, masks: Path | None = None, *, stated: Rescale | None = None, spacing_mm: Triple | None = None
    ) -> ReadVolume:
        """The volume of a file. Raises VolumeRefusedError with the reason.

        `masks`: a label map, or a folder with one file a structure, named as the class map names it. `stated` and
        `spacing_mm` come from a table beside the files: the rescale to HU, and a spacing that goes before the header's.
        """
        file = read_nifti(path)
        return self.bring(
            hounsfield(file.stored, file.rescale, stated), file.grid, read_masks(masks) if masks is not None else None,
            spacing_mm=spacing_mm,
        )  # fmt: skip

    def bring(
        self, values: Hounsfield, as_stored: Grid, masks: Masks | None = None, *, spacing_mm: Triple | None = None
    ) -> ReadVolume:
        """HU that lie on the grid of their file, to the one form. `spacing_mm` and errors as in `read`."""
        grid = as_stored if spacing_mm is None else _with_spacing(as_stored, spacing_mm)
        notes = doubts(values.hu)
        segmented = masks is None and self.segmenter is not None
        if masks is None and self.segmenter is not None:
            if not grid.aligned:  # models know upright volumes only
                upright = target_grid(grid, None)
                values = replace(values, hu=_resampled_hu(values.hu, grid, upright))
                as_stored = grid = upright
            masks = self.segmenter.label_map(values.hu, grid)
        target = target_grid(grid, self.options.spacing_mm)
        if target.same_as(grid):
            target = grid
        maps: tuple[Array, ...] = ()
        if masks is not None:
            place = self._place(as_stored, grid, target)
            maps = label_maps(masks, self._classes, self.options.unknown_ids, place, target.shape, notes)
        box = label_box(maps)
        if masks is not None and box is None:
            notes.append("mask without any anatomy")
        if box is not None and self.options.crop:
            box = with_margin(box, target.shape)
            within = tuple(slice(box[axis], box[axis + 3]) for axis in range(3))
            maps = tuple(np.ascontiguousarray(label_map[within]) for label_map in maps)
            hu = values.hu[within] if target is grid else _resampled_hu(values.hu, grid, part_of(target, box))
        else:
            hu = values.hu if target is grid else _resampled_hu(values.hu, grid, target)
        provenance: dict[str, Fact] = {
            "values": values.how, "voxels rounded": values.rounded, "voxels not a number": values.not_a_number,
            "resampled": target is not grid, "cropped": box is not None and self.options.crop,
        }  # fmt: skip
        if masks is not None:
            provenance["class map"] = f"{self._classes.name} {self._classes.version}"
        if segmented and self.segmenter is not None:
            provenance["masks"] = self.segmenter.name
        volume = Volume(hu=np.ascontiguousarray(hu), spacing_mm=target.spacing_mm, label_maps=maps)
        return ReadVolume(volume=volume, provenance=provenance, notes=tuple(notes))

    def _place(self, as_stored: Grid, grid: Grid, target: Grid) -> Place:
        """Labels on the volume's grid, as its header or a table beside it states that, -> on `target`."""

        def place(labels: Array, own: Grid) -> Array:
            if own.same_as(as_stored) or own.same_as(grid):
                own = grid
            elif self.options.other_grid == "refuse":
                raise VolumeRefusedError("mask of another grid")
            return labels if target is own else resample(labels, own, target, nearest=True, outside=0)

        return place


def _with_spacing(grid: Grid, spacing_mm: Triple) -> Grid:
    """The same directions and first voxel with another spacing."""
    scale = np.asarray(spacing_mm) / np.asarray(grid.spacing_mm)
    return Grid(shape=grid.shape, matrix=grid.matrix * scale, origin=grid.origin)


def _resampled_hu(hu: Array, grid: Grid, target: Grid) -> Array:
    return whole_hu(resample(hu, grid, target, nearest=False, outside=AIR_HU))


@dataclass(frozen=True, kw_only=True)
class MaskedVolumes:
    """How volumes are read, and where masks of anatomies lie beside them, if any do."""

    reader: VolumeReader = field(default_factory=VolumeReader)
    mask_folder: Path | None = None

    def __post_init__(self) -> None:
        self.reader.options.check()
        if self.mask_folder is not None and not self.mask_folder.is_dir():
            raise ConfigError(f"--masks {self.mask_folder}: no such folder")

    @property
    def masks(self) -> dict[str, int]:
        there = self.mask_folder is not None or self.reader.segmenter is not None
        return dict(ANATOMY_IDS) if there else {}

    @property
    def settings(self) -> dict[str, Any]:
        return self.reader.settings | {"masks": self.mask_folder is not None}

    def missing(self, there: bool) -> tuple[str, ...]:
        """The note on a volume without masks, where others have some: it is taken all the same."""
        complete = there or self.mask_folder is None or self.reader.segmenter is not None
        return () if complete else ("volume without a mask",)


@dataclass(frozen=True, kw_only=True)
class VolumeFiles(MaskedVolumes):
    """Volumes under a folder. In `mask_folder` a label map or a folder of structures has its volume's relative path."""

    folder: Path
    body_part: str | None = None

    def open(self, view: View, view_id: str) -> OpenedView:
        """A volume and its masks."""
        path = path_within(self.folder, view.file)
        numbers = dict(view.numbers)
        stated = None
        if {"rescale_slope", "rescale_intercept"} <= set(numbers):
            stated = numbers["rescale_slope"], numbers["rescale_intercept"]
        masks = self._masks_of(view.file)
        read = self.reader.read(path, masks, stated=stated, spacing_mm=_stated_spacing(numbers))
        notes = (*read.notes, *self.missing(masks is not None))
        members = volume_members(view_id, read.volume, ANATOMY_IDS, body_part=view.body_part or self.body_part)
        return OpenedView(
            record=members.view, image=members.image, masks=members.masks, provenance=read.provenance, notes=notes
        )

    def _masks_of(self, file: str) -> Path | None:
        if self.mask_folder is None:
            return None
        label_map = path_within(self.mask_folder, file)
        structures = label_map.with_name(without_ending(label_map.name))
        return next((path for path in (label_map, structures) if path.exists()), None)


def _stated_spacing(numbers: Mapping[str, float]) -> Triple | None:
    """z, y, x in mm as a table states them. Raises VolumeRefusedError for sizes that no voxel has."""
    if not {"xy_spacing", "z_spacing"} <= set(numbers):
        return None
    spacing = (numbers["z_spacing"], numbers["xy_spacing"], numbers["xy_spacing"])
    if not all(0.0 < size <= 100.0 for size in spacing):
        raise VolumeRefusedError("spacing in the table is none of a voxel")
    return spacing
