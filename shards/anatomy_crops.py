"""Where an evaluation crops volumes so that every anatomy is seen whole (fvlm.md, 6.1): a few crops for each volume.

A crop has at least the sides that the model was trained with, and more where an anatomy is larger; anatomies whose
boxes fit into one crop share it. Nothing is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shards.batch import ViewRecord
from shards.decode_volume import VolumeDecoder, stored_sides
from shards.transforms.anatomy import Sides, plain_name

Box = tuple[int, int, int, int, int, int]  # z0, y0, x0, z1, y1, x1, the ends outside


@dataclass(frozen=True, kw_only=True)
class AnatomyCrop:
    """A crop from voxel `start` of the stored grid, made for the anatomies that it `shows`; None: for all."""

    start: Sides
    shows: frozenset[str] | None


def crops_of_study(
    config: VolumeDecoder.Config, views: Sequence[ViewRecord], multiple: Sides
) -> tuple[Sides, list[list[AnatomyCrop]]]:
    """(voxels cut for each crop of the study, crops of each view), one crop a view at least.

    Crops larger than the recipe's have sides that are a `multiple` of the encoder's patches.
    A volume without boxes, or with none of the recipe's anatomies, is cropped at its centre. Where the recipe resizes
    its crops (`cut`), they stay of that size, since another would change what a voxel is.
    """
    wanted = [plain_name(name) for name in config.anatomies]
    boxes = [_boxes_with_rim(view, wanted) for view in views]
    size = config.taken
    if config.cut is None:
        for box in (box for of_view in boxes for box in of_view.values()):
            z, y, x = (
                max(least, -(-(end - first) // patch) * patch)
                for least, first, end, patch in zip(size, box[:3], box[3:], multiple, strict=True)
            )
            size = (z, y, x)
    crops = []
    for view, of_view in zip(views, boxes, strict=True):
        stored = stored_sides(view)
        groups = _groups(of_view, size)
        placed = [AnatomyCrop(start=_start(box, size, stored), shows=names) for box, names in groups]
        centre = AnatomyCrop(
            start=_start((0, 0, 0, *stored), size, stored), shows=None if view.anatomy_boxes is None else frozenset()
        )
        crops.append(placed or [centre])
    return size, crops


def _boxes_with_rim(view: ViewRecord, wanted: Sequence[str]) -> dict[str, Box]:
    """Boxes of the anatomies that are wanted, a voxel wider: one at the face of a crop would count as cut by it."""
    found: dict[str, Box] = {}
    for name, (z0, y0, x0, z1, y1, x1) in (view.anatomy_boxes or {}).items():
        if plain_name(name) in wanted:
            z, y, x = stored_sides(view)
            found[plain_name(name)] = (
                max(0, z0 - 1), max(0, y0 - 1), max(0, x0 - 1), min(z, z1 + 1), min(y, y1 + 1), min(x, x1 + 1),
            )  # fmt: skip
    return found


def _groups(boxes: Mapping[str, Box], size: Sides) -> list[tuple[Box, frozenset[str]]]:
    """Boxes joined while one crop holds them, from the feet up, each with the first group that has room."""
    groups: list[tuple[Box, frozenset[str]]] = []
    for name, box in sorted(boxes.items(), key=lambda item: (item[1], item[0])):
        for number, (other, names) in enumerate(groups):
            joined = _joined(box, other)
            if all(joined[3 + axis] - joined[axis] <= size[axis] for axis in range(3)):
                groups[number] = (joined, names | {name})
                break
        else:
            groups.append((box, frozenset({name})))
    return groups


def _joined(a: Box, b: Box) -> Box:
    return (
        min(a[0], b[0]), min(a[1], b[1]), min(a[2], b[2]), max(a[3], b[3]), max(a[4], b[4]), max(a[5], b[5]),
    )  # fmt: skip


def _start(box: Box, size: Sides, stored: Sides) -> Sides:
    """First voxel of the crop around a box: the box in the middle as far as the volume reaches, which is not padded."""
    starts = []
    for axis in range(3):
        spare = stored[axis] - size[axis]
        middle = (box[axis] + box[3 + axis] - size[axis]) // 2
        starts.append(min(max(middle, 0), spare) if spare >= 0 else spare // 2)
    return starts[0], starts[1], starts[2]
