"""The reader: members tables, member checks, records, image headers; every fault named by shard, key and cause."""

from __future__ import annotations

import hashlib
import io
import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from awscrt.checksums import crc32c as crc32c_of
from PIL import Image

from shards import reader
from shards.errors import BadSampleError, DataError
from shards.image_header import probe_image
from shards.manifest import Manifest, Shard
from shards.members import MembersTable
from shards.reader import check_member, parse_study, read_members, read_samples, verify
from shards.store import Store, open_store
from shards.writer import WriterConfig, write_shards
from tests.shards.sources import TinySource, encoded, make_sample


@pytest.fixture
def packed(tmp_path: Path) -> tuple[Store, Manifest]:
    manifest = write_shards(
        TinySource(count=12), str(tmp_path), WriterConfig(shard_samples=6, fractions={"train": 1.0})
    )
    return open_store(str(tmp_path)), manifest


def damage(store: Store, name: str, offset: int, data: bytes) -> None:
    body = bytearray(store.get(name))
    body[offset : offset + len(data)] = data
    store.put(name, bytes(body))


def first_image(store: Store, shard: Shard, sample: int = 0) -> tuple[str, int, int]:
    table = read_members(store, shard)
    row = table.images(sample)[0]
    return table.keys[sample], int(table.offset[row]), int(table.size[row])


class TestMembersTable:
    def test_round_trip(self, packed: tuple[Store, Manifest]) -> None:
        store, manifest = packed
        data = store.get(manifest.shards[0].members)
        table = MembersTable.from_parquet(data, "x")
        assert table.to_parquet() == data
        assert len(table) == 6 and table.sample_index.tolist() == sorted(table.sample_index.tolist())
        for sample in range(6):
            assert [table.member[row] for row in table.records(sample)] == ["json"]
            views = [table.member[row] for row in table.images(sample)]
            assert views == [f"{i}.jpg" for i in range(len(views))] and views

    def test_members_without_checksums(self) -> None:
        first, offset, size = np.array([0, 1]), np.array([512]), np.array([3])
        table = MembersTable(keys=("a",), first=first, member=("jpg",), offset=offset, size=size, crc32c=None)
        assert MembersTable.from_parquet(table.to_parquet(), "x").crc32c is None

    def test_views_go_by_number_not_by_text(self) -> None:
        members = ("10.png", "2.png", "0.png", "0.mask.1.png", "json")
        table = MembersTable(
            keys=("a",),
            first=np.array([0, 5]),
            member=members,
            offset=np.arange(5) * 1024,
            size=np.ones(5, np.int64),
            crc32c=None,
        )
        assert [table.member[row] for row in table.images(0)] == ["0.png", "2.png", "10.png"]

    @pytest.mark.parametrize("extension", ["pkl", "npy", "pt", "pth", "PKL", "pickle.gz"])
    def test_pickle_member_is_refused_by_name(self, extension: str) -> None:
        table = MembersTable(
            keys=("a",),
            first=np.array([0, 1]),
            member=(f"0.{extension}",),
            offset=np.array([512]),
            size=np.array([3]),
            crc32c=None,
        )
        with pytest.raises(DataError, match=rf"evil\.members.*0\.{extension} is in a pickle format"):
            MembersTable.from_parquet(table.to_parquet(), "evil.members.parquet")

    @pytest.mark.parametrize("data", [b"", b"PAR1", b"not parquet at all"])
    def test_broken_table(self, data: bytes) -> None:
        with pytest.raises(DataError, match="x: not a members table"):
            MembersTable.from_parquet(data, "x")


class TestWholeShard:
    def test_index_older_than_its_tar(self, packed: tuple[Store, Manifest]) -> None:
        store, manifest = packed
        one, two = manifest.shards[:2]
        store.put(one.members, store.get(two.members))
        with pytest.raises(DataError, match=r"train-000000.members.parquet: sha256 .* index is older than its tar"):
            read_members(store, one)
        assert [fault.key for fault in verify(store, manifest, one)] == [None]

    def test_table_that_leaves_the_tar(self, packed: tuple[Store, Manifest]) -> None:
        store, manifest = packed
        shard = replace(manifest.shards[0], bytes=2048)
        with pytest.raises(DataError, match="a member ends after the 2048 bytes of its tar"):
            read_members(store, shard)

    def test_table_with_other_samples(self, packed: tuple[Store, Manifest]) -> None:
        store, manifest = packed
        with pytest.raises(DataError, match="6 samples, the manifest says 7"):
            read_members(store, replace(manifest.shards[0], samples=7))

    def test_verify_names_the_bad_key_only(self, packed: tuple[Store, Manifest]) -> None:
        store, manifest = packed
        shard = manifest.shards[0]
        key, offset, size = first_image(store, shard, 2)
        damage(store, shard.tar, offset + size // 2, b"\x00\x01\x02")
        faults = verify(store, manifest, shard)
        assert [(fault.key, fault.cause) for fault in faults] == [
            (key, "member .0.jpg does not match its crc32c"),
            (None, "train-000000.tar does not match the manifest's sha256"),
        ]
        assert verify(store, manifest, manifest.shards[1]) == []

    def test_verify_sees_damage_between_members(self, packed: tuple[Store, Manifest]) -> None:
        store, manifest = packed
        damage(store, manifest.shards[0].tar, 0, b"X")
        assert [fault.key for fault in verify(store, manifest, manifest.shards[0])] == [None]

    def test_verify_truncated_tar(self, packed: tuple[Store, Manifest]) -> None:
        store, manifest = packed
        shard = manifest.shards[0]
        _, offset, _ = first_image(store, shard, 5)
        store.put(shard.tar, store.get(shard.tar)[: offset + 10])
        faults = verify(store, manifest, shard)
        assert f"has {offset + 10} bytes, the manifest says {shard.bytes}" in faults[0].cause
        assert any("has 10 of" in fault.cause and "truncated tar?" in fault.cause for fault in faults)

    def test_verify_missing_tar_and_index(self, packed: tuple[Store, Manifest]) -> None:
        store, manifest = packed
        shard = manifest.shards[0]
        store.delete(shard.tar)
        store.put(shard.index, b"v1.2 0\n")
        causes = [fault.cause for fault in verify(store, manifest, shard)]
        assert causes[0] == "train-000000.idx does not match the manifest's sha256"
        assert "train-000000.tar" in causes[1]


class TestMember:
    def check(self, data: bytes, **change: object) -> None:
        arguments = {"shard": "s", "key": "k", "member": "0.jpg", "size": 4, "crc32c": crc32c_of(b"abcd")}
        check_member(data, **(arguments | change))  # type: ignore[arg-type]

    def test_good(self) -> None:
        self.check(b"abcd")
        self.check(memoryview(b"abcd"))
        self.check(b"other", size=5, crc32c=None)

    @pytest.mark.parametrize(
        ("data", "change", "cause"),
        [
            (b"abce", {}, "does not match its crc32c"),
            (b"abc", {}, "has 3 of 4 bytes"),
            (b"", {"size": 0}, "has 0 bytes"),
            (b"abcd", {"member": "x.pkl"}, "in a pickle format"),
        ],
    )
    def test_bad(self, data: bytes, change: dict[str, object], cause: str) -> None:
        with pytest.raises(BadSampleError, match=f"^shard s, sample k: member .*{cause}"):
            self.check(data, **change)

    def test_one_bad_sample_leaves_the_others(self, packed: tuple[Store, Manifest]) -> None:
        store, manifest = packed
        shard = manifest.shards[0]
        key, offset, _ = first_image(store, shard, 3)
        damage(store, shard.tar, offset, b"\x00")
        samples = list(read_samples(store, manifest, shard))
        assert [isinstance(sample, BadSampleError) for sample in samples] == [i == 3 for i in range(6)]
        assert isinstance(samples[3], BadSampleError) and samples[3].key == key


class TestRecord:
    def body(self, **change: object) -> bytes:
        record = make_sample("a", "p", 0).record.model_dump(mode="json") | change
        return json.dumps(record).encode()

    def test_good(self) -> None:
        assert parse_study(self.body()).report == {"findings": "Étude 0."}

    @pytest.mark.parametrize(
        ("data", "cause"),
        [
            (b"\xff\xfe{}", "JSON not UTF-8 at byte 0"),
            (b"{", "json_invalid"),
            (b"[]", "record: model"),
            (b"{}", "study: missing"),
        ],
    )
    def test_bad_json(self, data: bytes, cause: str) -> None:
        with pytest.raises(ValueError, match=cause):
            parse_study(data)

    @pytest.mark.parametrize("value", [2, -3, 0.5, "yes"])
    def test_label_outside(self, value: object) -> None:
        with pytest.raises(ValueError, match=r"^labels: a value other than 0, 1, -1$"):
            parse_study(self.body(labels={"nodule": value}))

    @pytest.mark.parametrize(
        "change", [{"views": []}, {"surprise": 1}, {"report": {"findings": 3}}, {"age_years": 900}, {"format": 2}]
    )
    def test_schema_errors_quote_nothing(self, change: dict[str, object]) -> None:
        with pytest.raises(ValueError, match="does not fit the schema") as error:
            parse_study(self.body(**change, patient="SECRET-NAME") if "report" not in change else self.body(**change))
        assert "SECRET" not in str(error.value) and "900" not in str(error.value)

    def test_views_and_images_must_agree(self) -> None:
        members = {"json": self.body(), "0.jpg": encoded(0), "1.jpg": encoded(1)}
        with pytest.raises(BadSampleError, match="shard s, sample k: 2 images for 1 views"):
            reader.sample_from_members(members, shard="s", key="k", split="train")

    def test_json_is_needed(self) -> None:
        with pytest.raises(BadSampleError, match=r"no \.json member"):
            reader.sample_from_members({"0.jpg": encoded(0)}, shard="s", key="k", split="train")


class TestProbe:
    @pytest.mark.parametrize(("form", "mode", "bits"), [
        ("JPEG", "L", 8), ("JPEG", "RGB", 8), ("PNG", "L", 8), ("PNG", "I;16", 16), ("PNG", "RGBA", 8),
        ("TIFF", "L", 8), ("TIFF", "I;16", 16), ("BMP", "L", 8), ("JPEG2000", "L", 8), ("JPEG2000", "I;16", 16),
    ])  # fmt: skip
    def test_size_from_the_header(self, form: str, mode: str, bits: int) -> None:
        buffer = io.BytesIO()
        Image.new(mode, (37, 21)).save(buffer, form)
        assert probe_image(buffer.getvalue()) == (21, 37, bits)

    def test_bare_codestream(self) -> None:
        buffer = io.BytesIO()
        Image.new("L", (64, 48)).save(buffer, "JPEG2000", no_jp2=True)
        assert probe_image(buffer.getvalue()) == (48, 64, 8)

    def test_header_alone_is_enough(self) -> None:
        header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", 20000, 20001, 16, 0, 0, 0, 0)
        assert probe_image(header + b"\0\0\0\0") == (20001, 20000, 16)

    @pytest.mark.parametrize("data", [b"", b"x", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"\x00" * 100])
    def test_no_image(self, data: bytes) -> None:
        with pytest.raises(ValueError, match="header"):
            probe_image(data)

    def test_bytes_of_noise_never_crash(self) -> None:
        for seed in range(200):
            noise = hashlib.sha256(str(seed).encode()).digest() * 4
            for start in (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR", b"\xff\x4f\xff\x51", b""):
                try:
                    height, width, bits = probe_image(start + noise)
                except ValueError:
                    continue
                assert height > 0 and width > 0 and bits in (8, 16)
