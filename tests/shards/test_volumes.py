"""Volumes through the loader: pixels and shares of a reference, on any ranks, after a restart; bad ones are void."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.engine import split
from shards.adopt import adopt
from shards.anatomy_crops import crops_of_study
from shards.batch import FIELDS, NOT_ANNOTATED, Batch, EncodedImage, EncodedVolume, Sample, StudyRecord, ViewRecord
from shards.collate import ALL_CUT, NONE_THERE, Collator, _read_parts
from shards.dataset import DataSet, Members, read_units
from shards.decode_volume import Crop, VolumeDecoder, parts_to_read, place_crop
from shards.errors import BadSampleError, ConfigError
from shards.ingest import Item, Loaded, Plan, hashed_key
from shards.keyed import integers, text_key
from shards.loader import Loader, evaluation_batches
from shards.tokenizer import train_wordpiece
from shards.transforms.anatomy import anatomy_texts, shares
from shards.volume_codec import PART_SLICES, encode_labels, encode_volume, part_count
from shards.writer import WriterConfig, sample_members, write_shards

ANATOMIES = ("liver", "adrenal_gland", "heart")
IDS = {"heart": 7, "liver": 1, "adrenal_gland": 3, "lung": 9}
FIELDS_READ = (
    "pixel_values", "study_index", "valid", "sample_id", "anatomy_share", "anatomy_intact", "anatomy_text_key",
    "anatomy_key", "anatomy_state",
)  # fmt: skip
CONFIG = VolumeDecoder.Config(
    size=(20, 12, 16),
    windows_hu=((-1000.0, 400.0), (-150.0, 250.0)),
    mean=0.4,
    std=0.5,
    patch_size=(4, 6, 8),
    anatomies=ANATOMIES,
    keep_cut_if_mentioned=False,
)
DEPTHS = (1, 15, 40, 48, 70, 33)


def volume(number: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """HU and two label maps of study `number`; the heart lies in the second, over the liver."""
    shape = (DEPTHS[number % len(DEPTHS)], 14, 19 - number % 5)
    count = int(np.prod(shape))
    hu = integers(-1100, 600, number, "test volume", draws=count).reshape(shape).astype(np.int16)
    first, second = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    first[shape[0] // 4 : shape[0] // 2 + 1, 3:9, 2:9] = IDS["liver"]
    first[:, 10, 12] = IDS["adrenal_gland"]
    second[shape[0] // 3 : shape[0] // 3 + 3, 4:8, 5:9] = IDS["heart"]
    return hu, [first, second]


def study(key: str, number: int) -> Sample:
    hu, maps = volume(number)
    depth, height, width = hu.shape
    boxes = {}
    for name, number_of in IDS.items():
        places = np.argwhere(np.logical_or.reduce([one == number_of for one in maps]))
        if len(places):
            boxes[name] = (*places.min(0).tolist(), *(places.max(0) + 1).tolist())
    view = ViewRecord(
        id="0", depth=depth, height=height, width=width, bits=16, spacing_mm=(3.0, 1.0, 1.0), mask_maps=2,
        anatomy_boxes=boxes if number % 2 else None,
    )  # fmt: skip
    said = {"liver": "Small cyst.", "heart": "Normal heart."} if number % 3 else {}
    record = StudyRecord(
        study=key, patient=key, report={"findings": "Small cyst. Normal heart."}, views=[view],
        anatomy=said, anatomy_status={"liver": "abnormal", "heart": "normal"} if said else {},
    )  # fmt: skip
    return Sample(
        key=key,
        record=record,
        images=(EncodedVolume(parts=tuple(encode_volume(hu))),),
        masks={("0", n): EncodedVolume(parts=tuple(encode_labels(one))) for n, one in enumerate(maps)},
    )


@dataclass(frozen=True)
class Volumes:
    """`count` studies of one volume; `spoil` number -> how it is made bad."""

    count: int = 12
    spoil: Mapping[int, str] = field(default_factory=dict)
    name: str = "volumes"
    labels: tuple[str, ...] = ()
    key_fingerprint: str | None = None

    @property
    def masks(self) -> dict[str, int]:
        return dict(IDS)

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"spoil": dict(self.spoil)}

    def plan(self) -> Plan:
        keys = [hashed_key(None, "study", str(i)) for i in range(self.count)]
        return Plan(items=[Item(key=key, patient=key, split="train", payload=i) for i, key in enumerate(keys)])

    def load(self, item: Item) -> Loaded:
        sample = study(item.key, item.payload)
        return Loaded(sample=spoilt(sample, self.spoil.get(item.payload, "")))


def spoilt(sample: Sample, how: str) -> Sample:
    image, mask = sample.images[0], sample.masks["0", 1]
    assert isinstance(image, EncodedVolume) and isinstance(mask, EncodedVolume)
    first = image.parts[0]
    if how == "truncated":
        return replace(sample, images=(EncodedVolume(parts=(replace(first, data=first.data[:-9]), *image.parts[1:])),))
    if how == "other grid":
        cut = np.zeros((*volume(0)[0].shape[:1], 5, 5), np.uint8)
        small = tuple(encode_labels(cut)) * len(mask.parts)
        return replace(sample, masks={**sample.masks, ("0", 1): EncodedVolume(parts=small)})
    if how == "wrong size":
        view = sample.record.views[0].model_copy(update={"width": 300})
        return replace(sample, record=sample.record.model_copy(update={"views": [view]}))
    if how == "image":
        view = ViewRecord(id="0", height=8, width=8)
        record = sample.record.model_copy(update={"views": [view]})
        return Sample(key=sample.key, record=record, images=(EncodedImage(data=b"x", extension="png"),))
    return sample


def pack(folder: Path, source: Volumes) -> str:
    write_shards(source, str(folder), WriterConfig(shard_samples=4, chunk_bytes=6000))
    return str(folder / "manifest.json")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    return pack(tmp_path_factory.mktemp("volumes"), Volumes())


def loader(manifest: str, config: VolumeDecoder.Config = CONFIG, **other: Any) -> Loader:
    events = other.pop("events", [])
    data = Loader.Config(train=manifest, lanes=2, max_skip_rate=1.0, volume=config, validation_split="train")
    return Loader(data, global_batch_size=4, seed=3, fields=FIELDS_READ, on_event=events.append, **other)


def batches(of: Loader, start: int, steps: int) -> list[Batch]:
    with of.start(start) as run:
        return [next(run) for _ in range(steps)]


def reference(number: int, start: tuple[int, ...], config: VolumeDecoder.Config) -> tuple[np.ndarray, np.ndarray]:
    """(pixels [C, D, H, W], share [A, T]) of a crop, the plain way: pad, cut, window, count."""
    hu, maps = volume(number)
    margin = 64
    padded = np.pad(hu, margin, constant_values=-1024).astype(np.float64)
    window = tuple(slice(margin + at, margin + at + side) for at, side in zip(start, config.size, strict=True))
    cut = padded[window]
    pixels = [(np.clip((cut - low) / (high - low), 0, 1) - config.mean) / config.std for low, high in config.windows_hu]
    share = []
    for name in config.anatomies:
        inside = [(np.pad(one, margin)[window] == IDS[name]).astype(np.float64) for one in maps]
        (d, h, w), (pz, py, px) = config.size, config.patch_size
        by_patch = [one.reshape(d // pz, pz, h // py, py, w // px, px).mean(axis=(1, 3, 5)).ravel() for one in inside]
        share.append(np.maximum(*by_patch))
    return np.stack(pixels), np.stack(share)


def test_batches_are_crops_of_the_stored_volumes(manifest: str) -> None:
    number_of = {item.key: item.payload for item in Volumes().plan().items}
    one = loader(manifest)
    for step, batch in enumerate(batches(one, 0, 3)):
        rows = one.describe(step)
        assert batch["valid"].all() and set(FIELDS_READ) <= batch.keys() <= FIELDS.keys()
        assert batch["pixel_values"].shape == (4, 2, 20, 12, 16)
        for row, described in enumerate(rows):
            number = number_of[described.key]
            view = study(described.key, number).record.views[0]
            parts = parts_to_read(CONFIG, part_count(view.depth or 1), (0, described.epoch, described.unit, 0), 3)
            start, flip = place_crop(CONFIG, view, parts, (described.epoch, described.unit, 0), 3)
            assert not any(flip)
            pixels, share = reference(number, start, CONFIG)
            np.testing.assert_allclose(batch["pixel_values"][row].numpy(), pixels, atol=1e-5)
            np.testing.assert_allclose(batch["anatomy_share"][row].numpy(), share, atol=1e-6)
            heart = volume(number)[1][1] == IDS["heart"]
            low, high = np.argwhere(heart).min(0), np.argwhere(heart).max(0) + 1
            inside = bool((low > start).all() and (high < np.array(start) + CONFIG.size).all())
            if inside:  # surely intact if annotated; beside a face it depends on whether the volume goes on
                assert batch["anatomy_intact"][row, 2] == (number % 3 > 0)
            assert bool(batch["anatomy_intact"][row, 2]) <= bool(share[2].any())
            state = batch["anatomy_state"][row].tolist()
            assert state == ([1, 0, 0] if number % 3 else [NOT_ANNOTATED] * 3)
            liver = text_key("Small cyst.") if number % 3 else 0
            assert batch["anatomy_key"][row].tolist() == [liver, 0, 0]


def test_same_batches_on_any_ranks_and_after_a_restart(manifest: str) -> None:
    flipping = replace(CONFIG, flip_probability=(0.0, 0.5, 0.5), keep_cut_if_mentioned=True)
    whole = batches(loader(manifest, flipping), 0, 4)
    again = batches(loader(manifest, flipping, rank=0, world_size=1), 2, 2)
    ranks = [batches(loader(manifest, flipping, rank=rank, world_size=2), 2, 2) for rank in range(2)]
    threaded = batches(loader(manifest, replace(flipping, threads=3)), 2, 2)
    for step, batch in enumerate(whole[2:]):
        for name in FIELDS_READ:
            joined = torch.cat([of_rank[step][name] for of_rank in ranks])
            if name == "study_index":
                joined[2:] += 2
            for other in (again[step][name], threaded[step][name], joined):
                assert torch.equal(batch[name], other), name
    assert any(not torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in pairwise(whole))


def test_evaluation_takes_the_centre(manifest: str) -> None:
    found = list(loader(manifest).evaluate(batch_size=5))
    order = sorted(Volumes().plan().items, key=lambda item: item.key)
    rows = [(batch, row) for batch in found for row in range(5) if batch["valid"][row]]
    assert len(rows) == len(order)
    for (batch, row), item in zip(rows, order, strict=True):
        shape = volume(item.payload)[0].shape
        start = tuple((stored - side) // 2 for stored, side in zip(shape, CONFIG.size, strict=True))
        pixels, share = reference(item.payload, start, CONFIG)
        np.testing.assert_allclose(batch["pixel_values"][row].numpy(), pixels, atol=1e-5)
        np.testing.assert_allclose(batch["anatomy_share"][row].numpy(), share, atol=1e-6)


def test_evaluation_sees_every_anatomy_whole_where_boxes_are_known(manifest: str) -> None:
    config = Loader.Config(volume=CONFIG, train=manifest)
    fields = ("anatomy_share", "anatomy_intact", "anatomy_labels")
    collate = Collator(config, None, (), 3, fields, around_anatomies=CONFIG.patch_size)
    with closing(DataSet(manifest, "train")) as data:
        found = list(evaluation_batches(data, collate, config, print, 5))
    order = sorted(Volumes().plan().items, key=lambda item: item.key)
    crops, larger = 0, 0
    for item, batch in zip(order, found, strict=True):
        number, size = item.payload, tuple(batch["pixel_values"].shape[2:])
        view = study(item.key, number).record.views[0]
        asked = replace(CONFIG, size=size)
        expected, (placed,) = crops_of_study(CONFIG, [view], CONFIG.patch_size)
        assert len(placed) == len(batch["study_index"]) and size == expected
        for row, crop in enumerate(placed):
            pixels, share = reference(number, crop.start, asked)
            np.testing.assert_allclose(batch["pixel_values"][row].numpy(), pixels, atol=1e-5)
            np.testing.assert_allclose(batch["anatomy_share"][row].numpy(), share, atol=1e-6)
        if view.anatomy_boxes is not None:
            maps = volume(number)[1]
            for column, name in enumerate(ANATOMIES):
                voxels = int(np.logical_or.reduce([one == IDS[name] for one in maps]).sum())
                shown = batch["anatomy_intact"][:, column]
                assert int(shown.sum()) == int(voxels > 0)  # whatever the report says of it
                seen = batch["anatomy_share"][shown, column].sum() * np.prod(CONFIG.patch_size)
                assert round(float(seen)) == voxels
                if voxels and name == "adrenal_gland":
                    assert int((batch["anatomy_labels"][shown] == column + 1).sum()) == voxels
            crops, larger = crops + len(placed), larger + (size != CONFIG.size)
    assert crops >= 6 and larger >= 2


def test_bad_volumes_are_void_with_their_cause(tmp_path: Path) -> None:
    spoil = {1: "truncated", 2: "other grid", 3: "wrong size", 5: "image"}
    events: list[dict[str, Any]] = []
    one = loader(pack(tmp_path, Volumes(spoil=spoil)), events=events)
    rows = [row for batch in one.evaluate(batch_size=4) for row in zip(*(batch[n] for n in FIELDS_READ), strict=True)]
    void = [row for row in rows if not row[2]]
    assert len(rows) == 12 and len(void) == len(spoil)
    for row in void:
        assert not row[0].any() and not row[4].any() and not row[5].any() and not row[6].any()
    causes = sorted(event["cause"] for event in events if event["event"] == "skip")
    assert "bytes where its header says" in " ".join(causes) and "label map" in " ".join(causes)
    assert "an image where the recipe reads volumes" in causes and any("the record's grid" in cause for cause in causes)


def test_only_the_parts_of_a_crop_are_read(manifest: str) -> None:
    with closing(DataSet(manifest, "train")) as data:
        sizes = {}
        for chunk, unit in enumerate(data.table.first_unit.tolist()):
            shard, sample, _ = data.locate(chunk, unit)
            table = data.members(shard)
            sizes[chunk, unit] = {table.member[row]: int(table.size[row]) for row in table.rows(sample)}
        for masks in (False, True):
            for (chunk, unit), size in sizes.items():
                before = data.bytes_read
                found = read_units(
                    data, chunk, [unit], lambda unit, views: [0], choose_parts=lambda *_: range(0, 1), masks=masks
                )[unit]
                assert isinstance(found, Members) and len(found.views[0].masks) == 2 * masks
                names = ["json", "0-0.vol", *(["0-0.mask.0.vol", "0-0.mask.1.vol"] if masks else [])]
                least = sum(size[name] for name in names)
                assert least <= data.bytes_read - before <= least + 2048 * len(names)  # headers and padding between


def test_tokens_of_each_anatomy(manifest: str) -> None:
    texts = ["Small cyst.", "Normal heart.", *(f"{name} shows no significant abnormalities." for name in ANATOMIES)]
    tokenizer = train_wordpiece(texts, 200)
    data = Loader.Config(train=manifest, lanes=2, volume=CONFIG, text_length=9)
    fields = ("anatomy_input_ids", "anatomy_attention_mask", "anatomy_text_key")
    one = Loader(data, global_batch_size=4, seed=3, fields=fields, tokenizer=tokenizer)
    (batch,) = batches(one, 0, 1)
    assert "input_ids" not in batch and "anatomy_share" not in batch
    ids, mask, key = (batch[name] for name in fields)
    assert ids.shape == mask.shape == (4, 3, ids.shape[2]) and ids.shape[2] <= 9
    expected, _ = tokenizer.encode(["Small cyst."], 9)
    liver = key[:, 0] == text_key("Small cyst.")
    assert liver.any()
    for row in liver.nonzero().flatten().tolist():
        assert ids[row, 0][mask[row, 0]].tolist() == expected[0].tolist()
    for a, b in ((0, 1), (1, 2)):  # equal keys, equal tokens
        same = key[:, None, a] == key[None, :, b]
        assert torch.equal((ids[:, None, a] == ids[None, :, b]).all(-1), same)


@pytest.mark.parametrize(
    ("gone", "cause"),
    [
        ("0-1.vol", "a part of the volume is missing"),
        ("0-2.vol", "2 parts of a volume of 40 slices, which need 3"),
        ("0-0.mask.1.vol", "label map 1: a part is missing"),
    ],
)
def test_missing_parts_are_named(tmp_path: Path, gone: str, cause: str) -> None:
    sample = study("a", 2)
    with tarfile.open(tmp_path / "one.tar", "w") as tar:
        for member, data in sample_members(sample):
            header = tarfile.TarInfo(f"a.{member}")
            header.size = len(data)
            if member != gone:
                tar.addfile(header, io.BytesIO(data))
    adopt({"train": [str(tmp_path / "one.tar")]}, str(tmp_path / "set"))
    with closing(DataSet(str(tmp_path / "set" / "manifest.json"), "train")) as data:
        found = read_units(data, 0, [0], lambda unit, views: range(views), masks=True)[0]
    if isinstance(found, BadSampleError):
        assert cause in found.cause
    else:
        view = found.record(adopted=True).views[0]
        with pytest.raises(BadSampleError, match=cause):
            _read_parts(view, found.views[0], view.mask_maps)


def test_no_whole_anatomy_is_told(tmp_path: Path) -> None:
    # The liver alone, in crops of eight rows of a volume of 14: mostly cut.
    events: list[dict[str, Any]] = []
    config = replace(CONFIG, size=(8, 6, 8), anatomies=("liver",))
    one = loader(pack(tmp_path, Volumes()), config, events=events)
    steps = batches(one, 0, 3)
    told = [event for event in events if event["event"] == "no_anatomy" and event["step"] < 3]
    assert len(told) == sum(int((~batch["anatomy_intact"].any(dim=1)).sum()) for batch in steps) > 0
    assert {event["cause"] for event in told} == {ALL_CUT, NONE_THERE}
    assert all(batch["valid"].all() for batch in steps)


def test_configurations_that_cannot_be_read_are_refused(manifest: str) -> None:
    with pytest.raises(ConfigError, match="do not know spleen"):
        loader(manifest, replace(CONFIG, anatomies=("spleen",)))
    with pytest.raises(ConfigError, match="anatomies is empty"):
        loader(manifest, replace(CONFIG, anatomies=()))
    for bad in ({"size": (20, 12, 15)}, {"windows_hu": ((3.0, 3.0),)}, {"std": 0.0}, {"cut": (0, 1, 1)}):
        with pytest.raises(ConfigError):
            replace(CONFIG, **bad)


@pytest.mark.parametrize("parts", [1, 2, 3, 8, 125])
def test_parts_are_enough_for_every_depth(parts: int) -> None:
    for depth in (1, 16, 17, 20, 112):
        config = replace(CONFIG, size=(depth, 12, 16), patch_size=(1, 6, 8))
        for slices in range(PART_SLICES * (parts - 1) + 1, PART_SLICES * parts + 1):
            view = ViewRecord(id="0", depth=slices, height=12, width=16)
            for key in (None, (0, 0, slices, 0)):
                read = parts_to_read(config, parts, key, 1)
                (start, *_), _ = place_crop(config, view, read, None if key is None else key[1:], 1)
                low, high = max(0, start), min(slices, start + depth)
                assert 0 <= read.start <= low // PART_SLICES and -(-high // PART_SLICES) <= read.stop <= parts
                assert high - low == min(depth, slices)
                assert key is None or len(read) <= part_count(depth - 1) + 1


def test_the_graph_gives_the_pixels_of_the_host() -> None:
    hu, maps = volume(4)
    view = ViewRecord(id="0", depth=hu.shape[0], height=hu.shape[1], width=hu.shape[2], mask_maps=2)
    encode = lambda parts: [memoryview(part.data) for part in parts]  # noqa: E731
    crop = Crop(
        view=view, parts=encode(encode_volume(hu)), first_part=0, maps=[encode(encode_labels(one)) for one in maps],
        mask_ids=IDS, start=(9, 1, -1),
    )  # fmt: skip
    host, graph = VolumeDecoder(CONFIG).submit([crop]), VolumeDecoder(CONFIG, whole_graph=True).submit([crop])
    a, b = host.result(), graph.result()
    assert a.ok.all() and b.ok.all()
    np.testing.assert_allclose(a.pixel_values, b.pixel_values, atol=1e-5)
    np.testing.assert_array_equal(host.share, graph.share)
    # Half the size: pixels near the mean of eight neighbours, maps still of the same ids.
    half = replace(CONFIG, cut=(40, 24, 32), windows_hu=((-1100.0, 600.0),), mean=0.0, std=1.0)
    resized = VolumeDecoder(half).submit([replace(crop, start=(0, -5, -6))])
    pixels, ok, causes = resized.result()
    assert ok.all(), causes
    assert pixels.shape == (1, 1, 20, 12, 16) and 0 <= float(pixels.min()) <= float(pixels.max()) <= 1
    assert resized.share[0, [0, 2]].any(axis=1).all()  # the adrenal gland is one voxel wide


def test_a_few_parts_of_two_thousand_slices() -> None:
    hu = (np.arange(2000)[:, None, None] + np.zeros((1, 12, 16))).astype(np.int16)
    view = ViewRecord(id="0", depth=2000, height=12, width=16)
    config = replace(CONFIG, windows_hu=((0.0, 2000.0),), mean=0.0, std=1.0, anatomies=())
    parts = [memoryview(part.data) for part in encode_volume(hu)]
    read = parts_to_read(config, len(parts), None, 0)
    start, _ = place_crop(config, view, read, None, 0)
    assert len(read) <= 3 and start == (990, 0, 0)
    crop = Crop(view=view, parts=parts[read.start : read.stop], first_part=read.start, start=start)
    pixels, ok, _ = VolumeDecoder(config).submit([crop]).result()
    assert ok.all()
    np.testing.assert_allclose(pixels[0, 0, :, 3, 4], np.arange(990, 1010) / 2000, atol=1e-6)


def test_shares_of_patches() -> None:
    labels = np.zeros((4, 4, 8), np.uint8)
    labels[0, :2, :4] = 5  # 8 of the 16 voxels of the first patch, at the first slice
    labels[2:, 3, 7] = 6
    boxes = [((0, 0, 0), (4, 4, 8))] * 2
    open_faces = [(True, True)] * 3
    share, present, whole = shares([labels], [5, 6], (2, 4, 4), open_faces, boxes)
    np.testing.assert_allclose(share, [[8 / 32, 0, 0, 0], [0, 0, 0, 2 / 32]])
    assert present.all() and not whole.any()
    _, _, whole = shares([labels], [5, 6], (2, 4, 4), [(False, True), (False, True), (False, True)], boxes)
    assert whole.tolist() == [True, False]
    share, present, _ = shares([], [5, 6], (2, 4, 4), open_faces, boxes)
    assert not share.any() and not present.any()


def test_texts_by_anatomy() -> None:
    record = study("a", 1).record
    texts = anatomy_texts(record, ("heart", "adrenal_gland", "liver"))
    assert texts.texts == ["Normal heart.", "Adrenal gland shows no significant abnormalities.", "Small cyst."]
    assert texts.state.tolist() == [0, 0, 1] and texts.mentioned.tolist() == [True, False, True]
    silent = anatomy_texts(record.model_copy(update={"anatomy": {}}), ("liver", "heart"))
    assert silent.state.tolist() == [NOT_ANNOTATED, 0]  # abnormal, but not a word to learn from


def test_micro_batches_keep_anatomies_with_their_studies(manifest: str) -> None:
    (batch,) = batches(loader(manifest), 0, 1)
    parts = split(batch, 3)
    for name in FIELDS_READ:
        if name != "study_index":
            assert torch.equal(torch.cat([part[name] for part in parts]), batch[name]), name
