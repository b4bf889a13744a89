"""A volume and its label maps as members of a study: encoded parts, and the record of the view."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from shards.batch import EncodedImage, EncodedVolume, ViewRecord
from shards.ingest.volume import Volume, anatomy_boxes
from shards.volume_codec import encode_labels, encode_volume


@dataclass(frozen=True, kw_only=True)
class VolumeMembers:
    """What a Sample takes of one volume."""

    view: ViewRecord
    image: EncodedVolume
    masks: dict[tuple[str, int], EncodedImage | EncodedVolume]


def volume_members(
    view_id: str, volume: Volume, names: Mapping[str, int], *, body_part: str | None = None
) -> VolumeMembers:
    """Encode a volume; `names`: structure -> id in its label maps."""
    depth, height, width = volume.hu.shape
    masks: dict[tuple[str, int], EncodedImage | EncodedVolume] = {
        (view_id, number): EncodedVolume(parts=tuple(encode_labels(np.ascontiguousarray(label_map))))
        for number, label_map in enumerate(volume.label_maps)
    }
    view = ViewRecord(
        id=view_id, depth=depth, height=height, width=width, bits=16, body_part=body_part,
        spacing_mm=volume.spacing_mm, mask_maps=len(volume.label_maps),
        anatomy_boxes=anatomy_boxes(volume.label_maps, names) if volume.label_maps else None,
    )  # fmt: skip
    return VolumeMembers(view=view, image=EncodedVolume(parts=tuple(encode_volume(volume.hu))), masks=masks)
