"""Volumes as parts: lossless, refused when broken, one view of a sample however many parts and masks it has."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.batch import EncodedVolume, Sample, StudyRecord, ViewRecord
from shards.errors import BadSampleError, DataError
from shards.manifest import Manifest
from shards.reader import read_members, read_samples, sample_from_members, verify
from shards.store import open_store
from shards.tar_index import StoreStream, describe_shard, index_tar
from shards.volume_codec import decode_labels, decode_volume, encode_labels, encode_volume, part_count
from shards.writer import ShardBuilder, sample_members


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 35), st.integers(1, 9), st.integers(1, 9)),
    spread=st.sampled_from([0, 1, 127, 128, 129, 3000, 32768]),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip_is_exact(shape: tuple[int, int, int], spread: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    hu = generator.integers(-spread, spread, shape, endpoint=spread < 32768).astype(np.int16)
    parts = encode_volume(hu)
    assert len(parts) == part_count(shape[0])
    np.testing.assert_array_equal(decode_volume(parts), hu)
    labels = generator.integers(0, 256, shape).astype(np.uint8)
    np.testing.assert_array_equal(decode_labels(encode_labels(labels)), labels)


def test_many_slices_and_floats() -> None:
    hu = np.arange(2000 * 2 * 3, dtype=np.int16).reshape(2000, 2, 3)
    assert len(encode_volume(hu)) == 125
    np.testing.assert_array_equal(decode_volume(encode_volume(hu)), hu)
    np.testing.assert_array_equal(decode_volume(encode_volume(np.full((1, 2, 2), -1023.6))), -1024)


@pytest.mark.parametrize(
    ("volume", "said"),
    [
        (np.zeros((0, 2, 2)), "three sides"),
        (np.zeros((2, 2)), "three sides"),
        (np.full((1, 1, 1), np.nan), "not finite"),
        (np.full((1, 1, 1), 1e6), "can be stored"),
        (np.full((1, 1, 1), 40000, np.uint16), "can be stored"),
        (np.zeros((1, 1, 1), bool), "numbers"),
    ],
)
def test_what_cannot_be_stored_is_refused(volume: np.ndarray, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        encode_volume(volume)
    with pytest.raises(ValueError, match="uint8"):
        encode_labels(volume)


def test_broken_parts_are_refused() -> None:
    hu = np.random.default_rng(0).integers(-1000, 1000, (20, 8, 8)).astype(np.int16)
    first, second = (part.data for part in encode_volume(hu))
    for bad in (
        b"",
        first[:10],
        first[:-1],
        first + b"\0",
        b"XXXX" + first[4:],
        first[:200] + bytes(200) + first[400:],
    ):
        with pytest.raises(ValueError, match=r"part|slice"):
            decode_volume([bad, second])
    with pytest.raises(ValueError, match="fewer than 16"):
        decode_volume([second, first])
    with pytest.raises(ValueError, match="different size"):
        decode_volume([first, encode_volume(hu[:, :4])[0]])
    with pytest.raises(ValueError, match="bytes a voxel"):
        decode_labels([first])
    huge = first[:8] + np.array([16, 60000, 60000], "<u4").tobytes() + first[20:]
    with pytest.raises(ValueError, match="60000"):
        decode_volume([huge])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 255), st.booleans())
def test_any_changed_byte_is_refused_or_decodes(place: int, value: int, cut: bool) -> None:
    hu = np.arange(18 * 7 * 5).reshape(18, 7, 5) % 97
    data = bytearray(encode_volume(hu)[0].data)
    data[place % len(data)] = value
    changed = bytes(data[: place % len(data)]) if cut else bytes(data)
    with suppress(ValueError):  # and nothing else
        assert decode_volume([changed]).ndim == 3


def volume_sample(key: str = "a", depth: int = 20, maps: int = 2) -> tuple[Sample, np.ndarray, list[np.ndarray]]:
    """A study of one volume of `depth` x 6 x 5 voxels with `maps` label maps."""
    generator = np.random.default_rng(depth)
    hu = generator.integers(-1000, 1000, (depth, 6, 5)).astype(np.int16)
    labels = [generator.integers(0, 4, hu.shape).astype(np.uint8) for _ in range(maps)]
    view = ViewRecord(id="0", depth=depth, height=6, width=5, bits=16, spacing_mm=(3.0, 1.0, 1.0), mask_maps=maps)
    record = StudyRecord(study="s" + key, patient="p" + key, views=[view])
    sample = Sample(
        key=key,
        record=record,
        images=(EncodedVolume(parts=tuple(encode_volume(hu))),),
        masks={("0", n): EncodedVolume(parts=tuple(encode_labels(one))) for n, one in enumerate(labels)},
    )
    return sample, hu, labels


def test_a_volume_is_one_view_of_a_shard(tmp_path: Path) -> None:
    made = [volume_sample("a"), volume_sample("b", depth=180), volume_sample("c", depth=1, maps=0)]
    builder = ShardBuilder()
    for sample, _, _ in made:
        builder.add(sample)
    data, index = builder.finish()
    store = open_store(str(tmp_path), create=True)
    shard, side_files = describe_shard("train-000000", "train", index, 1 << 20)
    for name, content in {shard.tar: data, **side_files}.items():
        store.put(name, content)
    assert (shard.samples, shard.images) == (3, 3)
    manifest = Manifest(shards=(shard,))
    assert verify(store, manifest, shard) == []
    for (sample, hu, labels), read in zip(made, read_samples(store, manifest, shard), strict=True):
        assert isinstance(read, Sample) and read.record == sample.record
        assert isinstance(read.images[0], EncodedVolume)
        np.testing.assert_array_equal(decode_volume(read.images[0].parts), hu)
        for number, map_ in enumerate(labels):
            mask = read.masks["0", number]
            assert isinstance(mask, EncodedVolume)
            np.testing.assert_array_equal(decode_labels(mask.parts), map_)
    table = read_members(store, shard)
    assert [len(table.images(sample)) for sample in range(3)] == [1, 1, 1]
    assert [len(table.views(sample)[0]) for sample in range(3)] == [2, 12, 1]
    assert sorted(table.mask_parts(0, "0")) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    # Indexed anew, as `adopt` does: the same views.
    again = index_tar(StoreStream(store, shard.tar), shard.tar)
    assert again.images().tolist() == [1, 1, 1]


def test_missing_parts_are_named(tmp_path: Path) -> None:
    sample, _, _ = volume_sample()
    volume = sample.images[0]
    assert isinstance(volume, EncodedVolume)
    with pytest.raises(DataError, match="1 parts of member 0, 20 slices need 2"):
        sample_members(replace(sample, images=(EncodedVolume(parts=volume.parts[:1]),)))
    with pytest.raises(DataError, match=r"no parts of member 0\.mask\.1"):
        sample_members(replace(sample, masks={("0", 0): sample.masks["0", 0]}))
    with pytest.raises(DataError, match="not one of its mask_maps"):
        sample_members(replace(sample, masks={**sample.masks, ("0", 2): sample.masks["0", 0]}))
    members = dict(sample_members(sample))
    for gone in ("0-1.vol", "0-0.mask.1.vol"):
        left = {name: data for name, data in members.items() if name != gone}
        with pytest.raises(BadSampleError, match=f"member .{gone} is missing"):
            sample_from_members(left, shard="s", key="a", split="train")
    with pytest.raises(DataError, match="depth"):
        sample_members(replace(sample, images=(volume.parts[0],), masks={}))
