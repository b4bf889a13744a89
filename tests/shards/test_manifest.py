"""manifest.json: the same bytes for the same content, and a one-line refusal of everything that is not one."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from shards.errors import DataError
from shards.manifest import ChunkTable, Manifest, Shard


def make_shard(name: str = "train-000000", split: str = "train") -> Shard:
    columns = {"first_sample": [0, 3], "samples": [3, 2], "images": [4, 2], "offset": [0, 4096], "bytes": [4096, 2048]}
    return Shard(
        name=name,
        split=split,
        bytes=10240,
        sha256="0" * 64,
        samples=5,
        images=6,
        index_sha256="1" * 64,
        members_sha256="2" * 64,
        chunks=ChunkTable.from_json(columns),
        void=(2,),
    )


def make_manifest() -> Manifest:
    return Manifest(
        shards=(make_shard(), make_shard("test-000000", "test")),
        labels=("effusion", "nodule"),
        masks={"heart": 1},
        fields={"labels": 10},
        sections={"findings": 10},
        patients={"train": 4, "test": 3},
        refused={"image missing": 2},
        source="table",
        key_fingerprint="abcd",
    )


def test_written_and_read_back():
    manifest = make_manifest()
    data = manifest.to_bytes()
    again = Manifest.from_bytes(data)
    assert again.to_bytes() == data and again.sha256 == manifest.sha256
    assert again.samples == 10 and again.splits == ("test", "train") and again.shards[0].void == (2,)
    assert again.shards[0].chunks.offset.dtype == np.int64
    assert [shard.name for shard in again.of_split("test").shards] == ["test-000000"]
    assert (again.shards[0].tar, again.shards[0].index) == ("train-000000.tar", "train-000000.idx")


def test_a_missing_split_names_those_there_are():
    with pytest.raises(DataError, match=r"split 'valid' has no shard; this manifest has test, train"):
        make_manifest().of_split("valid")


def spoiled(change: Any) -> bytes:
    body = json.loads(make_manifest().to_bytes())
    change(body)
    return json.dumps(body).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04", r"set/manifest.json: not JSON"),
        (b"[]", r"not a Roentgen manifest; make one with launchers/pack.py"),
        (b'{"format": "other"}', r"not a Roentgen manifest"),
        (spoiled(lambda b: b.update(version=2)), r"manifest version 2, this program reads up to 1; upgrade roentgen"),
        (spoiled(lambda b: b.pop("shards")), r"broken manifest, KeyError at 'shards'"),
        (spoiled(lambda b: b["shards"][0].pop("chunks")), r"broken manifest, KeyError at 'chunks'"),
        (spoiled(lambda b: b["shards"][0].update(samples=9)), r"shard train-000000 does not add up to its 9 samples"),
        (spoiled(lambda b: b["shards"][1].update(name="train-000000")), r"a shard name stands twice"),
    ],
)
def test_what_is_not_a_manifest_is_refused_in_one_line(data: bytes, message: str):
    with pytest.raises(DataError, match=message) as caught:
        Manifest.from_bytes(data, "set/manifest.json")
    assert "\n" not in str(caught.value) and caught.value.exit_code == 3
