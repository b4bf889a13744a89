"""What an anatomy-wise objective needs of a crop and a record: each anatomy's share of each patch, and its text.

Letters: A = anatomies of the recipe in its order, M = label maps, T = patches in rows, z slowest, x fastest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shards import keyed
from shards.batch import NOT_ANNOTATED, StudyRecord

Sides = tuple[int, int, int]  # z, y, x
ABNORMAL, NORMAL = 1, 0
# fVLM's words for what a report does not mention, arXiv 2501.14548
TEMPLATE = "{anatomy} shows no significant abnormalities."


def plain_name(name: str) -> str:
    """Label maps write `adrenal_gland`, reports `adrenal gland`: the latter."""
    return name.replace("_", " ")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a crop was taken: voxel `start` of the stored grid [3], negative where it begins outside; its sides."""

    start: Sides
    size: Sides
    stored: Sides

    @property
    def cut_faces(self) -> tuple[tuple[bool, bool], ...]:
        """For each axis: does the volume go on before the first, and after the last voxel of the crop."""
        return tuple(
            (start > 0, start + size < stored)
            for start, size, stored in zip(self.start, self.size, self.stored, strict=True)
        )


def patch_grid(size: Sides, patch: Sides) -> Sides:
    """Patches along each axis."""
    return size[0] // patch[0], size[1] // patch[1], size[2] // patch[2]


def shares(
    maps: Sequence[np.ndarray],
    ids: Sequence[int],
    patch: Sides,
    cut_faces: Sequence[tuple[bool, bool]],
    boxes: Sequence[tuple[Sides, Sides] | None],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(share [A, T] float32, present [A] bool, whole [A] bool) of a crop.

    `maps`: uint8 [D, H, W] each, of sides that are multiples of `patch`; `ids` [A] in them. `share`: of each patch's
    voxels, the largest over the maps where an anatomy lies in several. `whole`: present and touching no face of the
    crop behind which the volume goes on; a face of the volume itself cuts nothing that could be seen. `boxes` [A]:
    (first, end) voxels of the crop outside of which an anatomy cannot lie, None where it is absent from the volume.
    """
    size = maps[0].shape if maps else tuple(patch)
    grid = patch_grid((size[0], size[1], size[2]), patch)
    count = np.zeros((len(ids), *grid), np.int32)
    touching = np.zeros(len(ids), bool)
    for row, (wanted, box) in enumerate(zip(ids, boxes, strict=True)):
        if box is None:
            continue
        first = tuple(max(0, low) // side for low, side in zip(box[0], patch, strict=True))
        end = tuple(min(n, -(-high // side)) for n, high, side in zip(grid, box[1], patch, strict=True))
        if any(low >= high for low, high in zip(first, end, strict=True)):
            continue
        patches = tuple(slice(low, high) for low, high in zip(first, end, strict=True))
        voxels = tuple(slice(low * side, high * side) for low, high, side in zip(first, end, patch, strict=True))
        for one in maps:
            part = count[row][patches]
            np.maximum(part, _count_by_patch(one[voxels], wanted, patch), out=part)
            touching[row] |= _touches(one, wanted, voxels, cut_faces)
    flat = count.reshape(len(ids), -1)
    present = np.asarray(flat.any(axis=1))
    share = np.asarray(flat / np.float32(patch[0] * patch[1] * patch[2]), dtype=np.float32)
    return share, present, present & ~touching


def _count_by_patch(labels: np.ndarray, wanted: int, patch: Sides) -> np.ndarray:
    """uint8 [D, H, W] -> voxels of a label in each patch, int32 [D / pz, H / py, W / px]."""
    depth, height, width = labels.shape
    counts = np.empty((depth // patch[0], height // patch[1], width // patch[2]), np.int32)
    for layer in range(len(counts)):
        slab = labels[layer * patch[0] : (layer + 1) * patch[0]]
        columns = np.zeros((height, width), np.uint16)  # along z first: whole slices are added
        for one in slab:
            columns += one == wanted
        rows = np.add.reduceat(columns, np.arange(0, height, patch[1]), axis=0, dtype=np.int32)
        counts[layer] = np.add.reduceat(rows, np.arange(0, width, patch[2]), axis=1)
    return counts


def _touches(
    labels: np.ndarray, wanted: int, voxels: tuple[slice, ...], cut_faces: Sequence[tuple[bool, bool]]
) -> bool:
    """Does a label, which lies within `voxels`, touch a face of the crop that cuts the volume."""
    for axis, (faces, side) in enumerate(zip(cut_faces, labels.shape, strict=True)):
        for cut, place in zip(faces, (0, side - 1), strict=True):
            if cut and voxels[axis].start <= place < voxels[axis].stop:
                face = labels[(*voxels[:axis], place, *voxels[axis + 1 :])]
                if bool((face == wanted).any()):
                    return True
    return False


@dataclass(frozen=True, kw_only=True)
class AnatomyTexts:
    """Of one study, in the order of the recipe's anatomies [A]."""

    texts: list[str]
    state: np.ndarray  # [A] int8
    mentioned: np.ndarray  # [A] bool


def anatomy_texts(record: StudyRecord, anatomies: Sequence[str]) -> AnatomyTexts:
    """What the report says of each anatomy; the template of a normal one where it says nothing.

    A record that tells nothing by anatomy is not annotated, and so is an abnormal anatomy without a sentence.
    """
    said, status = _by_plain_name(record.anatomy), _by_plain_name(record.anatomy_status)
    texts, state = [], []
    for name in map(plain_name, anatomies):
        text = " ".join(said.get(name, "").split())
        if status.get(name) == "abnormal":
            state.append(ABNORMAL if text else NOT_ANNOTATED)
        else:
            state.append(NORMAL if said or status else NOT_ANNOTATED)
        texts.append(text or TEMPLATE.format(anatomy=name.capitalize()))
    mentioned = np.array([plain_name(name) in said for name in anatomies], dtype=bool)
    return AnatomyTexts(texts=texts, state=np.array(state, dtype=np.int8), mentioned=mentioned)


def _by_plain_name(values: Mapping[str, str]) -> dict[str, str]:
    return {plain_name(name): value for name, value in values.items()}


def text_keys(texts: Sequence[str]) -> np.ndarray:
    """[A] int64: equal for equal texts, never 0, which stands for all normal ones."""
    return np.array([keyed.text_key(text) or 1 for text in texts], dtype=np.int64)
