"""Masks of a volume, as a model or a reader gave them -> label maps of the 36 anatomies on the volume's grid."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from shards.ingest.class_map import ANATOMY_IDS, ClassMap
from shards.ingest.nifti import is_nifti, read_nifti, without_ending
from shards.ingest.volume import Array, Grid, VolumeRefusedError, stacked

Place = Callable[[Array, Grid], Array]  # labels on their own grid -> on the volume's


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelMap:
    """`ids` [D, H, W] uint16 of a class map's model."""

    ids: Array
    grid: Grid


@dataclass(frozen=True, kw_only=True, eq=False)
class Structure:
    """One region. `names`: what it is called, in words or as SCHEME:CODE; the first that the class map knows counts.

    `draw` gives uint8 [D, H, W], not 0 inside, and its grid; only structures of use are drawn.
    """

    names: tuple[str, ...]
    draw: Callable[[], tuple[Array, Grid]]


Masks = LabelMap | Iterable[Structure]


def read_masks(path: Path) -> Masks:
    """A label map, or a folder with one file a structure. Raises VolumeRefusedError, the folder's only when drawn."""
    if not path.is_dir():
        ids, grid = read_labels(path)
        return LabelMap(ids=ids, grid=grid)
    return [
        Structure(names=(without_ending(file.name),), draw=partial(read_labels, file))
        for file in sorted(path.iterdir())
        if is_nifti(file)
    ]


def label_maps(
    masks: Masks,
    classes: ClassMap,
    unknown_ids: Literal["refuse", "drop"],
    place: Place,
    shape: tuple[int, int, int],
    notes: list[str],
) -> tuple[Array, ...]:
    """Maps [D, H, W] of ANATOMY_IDS, as many as structures overlap; what is dropped is noted."""
    if isinstance(masks, LabelMap):
        return (place(_anatomies(masks.ids, classes, unknown_ids, notes), masks.grid),)
    regions = ((label, place(drawn, own) != 0) for label, drawn, own in _drawn(masks, classes, unknown_ids, notes))
    return stacked(regions, shape)


def _anatomies(stored: Array, classes: ClassMap, unknown_ids: Literal["refuse", "drop"], notes: list[str]) -> Array:
    """uint8 ids of ANATOMY_IDS of a model's label map."""
    table, known = classes.table(), classes.known()
    present = np.unique(stored)
    unknown = [number for number in present.tolist() if not 0 <= number < len(known) or not known[number]]
    if unknown:
        if unknown_ids == "refuse":
            raise VolumeRefusedError(f"mask ids unknown to the class map {classes.name}")
        notes.append(f"mask ids unknown to the class map {classes.name}, left out")
        stored = np.where(np.isin(stored, unknown), 0, stored)
    return table[stored]


def _drawn(
    structures: Iterable[Structure], classes: ClassMap, unknown_ids: Literal["refuse", "drop"], notes: list[str]
) -> Iterator[tuple[int, Array, Grid]]:
    """(id of ANATOMY_IDS, uint8 region, grid) of each structure that an anatomy takes, in their order."""
    for structure in structures:
        found = classes.find(structure.names)
        if found is None:
            if unknown_ids == "refuse":
                raise VolumeRefusedError(f"structure unknown to the class map {classes.name}")
            notes.append(f"structure unknown to the class map {classes.name}, left out")
        elif found.anatomy is not None:
            region, own = structure.draw()
            if region.any():
                yield ANATOMY_IDS[found.anatomy], (region != 0).astype(np.uint8), own


def read_labels(path: Path) -> tuple[Array, Grid]:
    """A label map's integers, uint16. Raises VolumeRefusedError with a reason that begins with `mask`."""
    try:
        file = read_nifti(path)
    except VolumeRefusedError as error:
        raise VolumeRefusedError(f"mask: {error}") from None
    stored = file.stored
    if stored.dtype.kind == "f":
        whole = np.nan_to_num(stored, nan=-1.0, posinf=-1.0, neginf=-1.0)
        if (whole != np.floor(whole)).any():
            raise VolumeRefusedError("mask: its values are no whole numbers")
        stored = whole
    slope, intercept = file.rescale
    if (slope, intercept) != (1.0, 0.0):
        stored = np.rint(stored * slope + intercept)
    if stored.min() < 0 or stored.max() > 65_535:
        raise VolumeRefusedError("mask: its values are no label ids")
    return stored.astype(np.uint16), file.grid
