"""Crops around anatomies: all of each is inside, few crops, no larger than need be."""

from __future__ import annotations

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as some

from shards.anatomy_crops import crops_of_study
from shards.batch import ViewRecord
from shards.decode_volume import VolumeDecoder

CONFIG = VolumeDecoder.Config(size=(16, 24, 32), patch_size=(4, 4, 4), anatomies=("lung", "adrenal_gland", "heart"))
MULTIPLE = (8, 8, 16)  # an encoder's patch, of several places that shares are counted in


@some.composite
def views(draw: some.DrawFn) -> ViewRecord:
    stored = [draw(some.integers(1, 90)) for _ in range(3)]
    boxes = {}
    for name in draw(some.sets(some.sampled_from(["lung", "adrenal gland", "heart", "liver"]))):
        first = [draw(some.integers(0, side - 1)) for side in stored]
        end = [draw(some.integers(low + 1, side)) for low, side in zip(first, stored, strict=True)]
        boxes[name] = (*first, *end)
    depth, height, width = stored
    return ViewRecord(id="0", depth=depth, height=height, width=width, anatomy_boxes=boxes)  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None)
@given(some.lists(views(), min_size=1, max_size=2))
def test_every_anatomy_is_whole_in_one_crop(of_study: list[ViewRecord]) -> None:
    size, crops = crops_of_study(CONFIG, of_study, MULTIPLE)
    needed = list(CONFIG.size)
    for view, placed in zip(of_study, crops, strict=True):
        stored = (view.depth or 1, view.height, view.width)
        wanted = {name: box for name, box in (view.anatomy_boxes or {}).items() if name != "liver"}
        shown = [name for crop in placed for name in crop.shows or ()]
        assert sorted(shown) == sorted(wanted) and 1 <= len(placed) <= max(1, len(wanted))
        for crop, axis in product(placed, range(3)):
            spare = stored[axis] - size[axis]
            assert min(spare // 2, 0) <= crop.start[axis] <= max(spare, 0)  # no padding where the volume goes on
            for box in (wanted[name] for name in crop.shows or ()):
                first, end = crop.start[axis], crop.start[axis] + size[axis]
                assert first <= box[axis] and box[3 + axis] <= end
                # Not at a face behind which the volume goes on, which would count as cut.
                assert first <= 0 or first < box[axis]
                assert end >= stored[axis] or end > box[3 + axis]
        for box, axis in product(wanted.values(), range(3)):
            rim = min(stored[axis], box[3 + axis] + 1) - max(0, box[axis] - 1)
            needed[axis] = max(needed[axis], -(-rim // MULTIPLE[axis]) * MULTIPLE[axis])
    assert size == tuple(needed)


def test_neighbours_share_a_crop_and_volumes_without_boxes_are_cropped_at_their_centre() -> None:
    boxes = {"heart": (20, 30, 30, 30, 40, 44), "lung": (18, 28, 40, 31, 46, 55), "adrenal_gland": (60, 5, 5, 63, 8, 9)}
    view = ViewRecord(id="0", depth=70, height=80, width=90, anatomy_boxes=boxes)
    size, ((chest, gland),) = crops_of_study(CONFIG, [view], MULTIPLE)
    assert size == CONFIG.size and chest.shows == {"heart", "lung"} and gland.shows == {"adrenal gland"}
    assert chest.start == (16, 25, 26) and gland.start == (53, 0, 0)
    for known, shows in ((None, None), ({}, frozenset())):
        view = ViewRecord(id="0", depth=70, height=80, width=10, anatomy_boxes=known)
        _, ((crop,),) = crops_of_study(CONFIG, [view], MULTIPLE)
        assert crop.start == (27, 28, -11) and crop.shows == shows
