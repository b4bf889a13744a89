"""Foreign WebDataset tars: indexed in one pass, never rewritten; names hashed in logs; every oddity counted."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import logging
import tarfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from shards.adopt import adopt, expand_urls
from shards.batch import StudyRecord, ViewRecord
from shards.collate import _view_records
from shards.dataset import DataSet, Members, read_units
from shards.errors import BadSampleError, ConfigError, DataError
from shards.reader import check_member, read_members, read_samples, verify
from shards.store import open_store
from shards.tar_index import StoreStream, index_tar
from tests.shards.sources import encoded

LONG = "patient name " * 12


def write_tar(path: Path, members: Sequence[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size, header.mtime = len(data), 12345
            tar.addfile(header, io.BytesIO(data))
    return path


def captions(count: int, start: int = 0) -> list[tuple[str, bytes]]:
    members = []
    for i in range(start, start + count):
        members += [(f"cc/{i:05d}.jpg", encoded(i)), (f"cc/{i:05d}.txt", f"Caption {i}".encode())]
    return members


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    folder = tmp_path / "foreign"
    folder.mkdir()
    for number in range(3):
        write_tar(folder / f"{number:03d}.tar", captions(4, 10 * number))
    return folder


def test_adopted_set_reads_as_samples(foreign: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in foreign.iterdir()}
    manifest = adopt({"train": [f"{foreign}/{{000..001}}.tar"], "test": [f"{foreign}/002.tar"]}, str(tmp_path / "out"))
    assert manifest.adopted and manifest.samples == 12
    assert manifest.splits == ("test", "train")
    assert manifest.sections == {"text": 12}
    assert {path.name: path.read_bytes() for path in foreign.iterdir()} == before
    store = open_store(str(tmp_path / "out"))
    for shard in manifest.shards:
        assert verify(store, manifest, shard) == []
        assert shard.sha256 == hashlib.sha256(Path(str(shard.url)).read_bytes()).hexdigest()
    samples = list(read_samples(store, manifest, manifest.of_split("test").shards[0]))
    assert not isinstance(samples[1], BadSampleError)
    assert samples[1].record.report == {"text": "Caption 21"}
    assert samples[1].record.views[0].height == 40 and samples[1].record.views[0].width == 36
    assert "00021" not in samples[1].record.model_dump_json()


def test_webdataset_groups_alike(foreign: Path, tmp_path: Path) -> None:
    import webdataset

    manifest = adopt({"train": [f"{foreign}/*.tar"]}, str(tmp_path / "out"))
    store = open_store(str(tmp_path / "out"))
    keys = [key for shard in manifest.shards for key in read_members(store, shard).keys]
    urls = sorted(str(path) for path in foreign.glob("*.tar"))
    assert keys == [sample["__key__"] for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_offsets_hold_for_every_tar_format(tmp_path: Path, form: int) -> None:
    folder = "" if form == tarfile.USTAR_FORMAT else LONG
    members = [(f"{folder}{name}", data) for name, data in captions(5)]
    path = write_tar(tmp_path / "a.tar", members, form)
    store = open_store(str(tmp_path))
    index = index_tar(StoreStream(store, "a.tar"), "a.tar")
    body = path.read_bytes()
    with tarfile.open(path) as tar:
        expected = [(member.offset_data, member.size) for member in tar]
    assert list(zip(index.table.offset.tolist(), index.table.size.tolist(), strict=True)) == expected
    assert [body[o : o + s] for o, s in expected] == [data for _, data in members]
    assert index.start[0] == 0 and (index.start[1:] == index.end[:-1]).all()
    bare = index_tar(StoreStream(store, "a.tar", digest=False), "a.tar", checksums=False)
    assert bare.table.offset.tolist() == index.table.offset.tolist()
    assert bare.table.crc32c is None and bare.sha256 is None


def test_headers_only_reads_little_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    big = [("a.jpg", encoded(0) + bytes(3_000_000)), ("a.txt", b"x"), ("b.jpg", encoded(1) + bytes(3_000_000))]
    write_tar(tmp_path / "a.tar", big)
    store = open_store(str(tmp_path))
    index_tar(StoreStream(store, "a.tar", digest=False), "a.tar", checksums=False)
    assert store.stats.bytes_read < 500_000
    with caplog.at_level(logging.WARNING):
        manifest = adopt({"train": [str(tmp_path / "a.tar")]}, str(tmp_path / "out"), headers_only=True)
    assert "carry no checksum" in caplog.text
    assert manifest.shards[0].sha256 is None
    assert verify(open_store(str(tmp_path / "out")), manifest, manifest.shards[0]) == []


def test_oddities_are_counted_by_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = [
        ("README", b"hello"),
        ("a.jpg", encoded(0)),
        ("a.txt", b"A"),
        ("a.features.npy", b"\x93NUMPY"),
        ("b.txt", b"no image"),
        ("c.jpg", encoded(1)),
        ("c.jpg", encoded(2)),
        ("c.json", json.dumps({"caption": "C", "url": "x"}).encode()),
    ]
    write_tar(tmp_path / "a.tar", members)
    with caplog.at_level(logging.INFO):
        manifest = adopt({"train": [str(tmp_path / "a.tar")]}, str(tmp_path / "out"))
    assert manifest.refused == {
        "file without key or extension": 1,
        "member in pickle format .npy": 1,
        "member twice in one sample": 1,
        "no image in sample": 1,
    }
    assert "left out 1: member in pickle format .npy" in caplog.text
    store = open_store(str(tmp_path / "out"))
    a, c = read_samples(store, manifest, manifest.shards[0])
    assert not isinstance(a, BadSampleError) and a.record.report == {"text": "A"}
    assert not isinstance(c, BadSampleError) and c.record.report == {"text": "C"}
    assert c.images[0].data == encoded(1)


@pytest.mark.parametrize(
    ("members", "cause"),
    [
        ([("Jane Doe.jpg", b"not an image"), ("Jane Doe.txt", b"x")], "no image header"),
        ([("Jane Doe.jpg", b""), ("Jane Doe.txt", b"x")], "has 0 bytes"),
        ([("Jane Doe.jpg", encoded(0)), ("Jane Doe.txt", b"\xff\xfe")], "not UTF-8"),
        ([("Jane Doe.jpg", encoded(0)), ("Jane Doe.json", b"{")], "is not JSON"),
    ],
)
def test_bad_foreign_sample_is_named_by_a_hash(tmp_path: Path, members: list[tuple[str, bytes]], cause: str) -> None:
    write_tar(tmp_path / "a.tar", members)
    manifest = adopt({"train": [str(tmp_path / "a.tar")]}, str(tmp_path / "out"))
    (error,) = read_samples(open_store(str(tmp_path / "out")), manifest, manifest.shards[0])
    assert isinstance(error, BadSampleError)
    assert cause in error.cause and error.key.startswith("#")
    assert "Jane" not in str(error)


def test_image_without_text_has_an_empty_report(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.left.jpg", encoded(0)), ("a.right.jpg", encoded(1)), ("a.seg.png", b"x")])
    manifest = adopt({"train": [str(tmp_path / "a.tar")]}, str(tmp_path / "out"))
    (sample,) = read_samples(open_store(str(tmp_path / "out")), manifest, manifest.shards[0])
    assert not isinstance(sample, BadSampleError)
    assert sample.record.report == {} and [view.id for view in sample.record.views] == ["0", "1"]
    assert manifest.shards[0].images == 2


class TestBrokenTars:
    def index(self, path: Path, data: bytes, *, checksums: bool = True) -> str:
        path.write_bytes(data)
        store = open_store(str(path.parent))
        with pytest.raises(DataError) as error:
            index_tar(StoreStream(store, path.name, digest=checksums), path.name, checksums=checksums)
        assert "\n" not in str(error.value)
        return str(error.value)

    @pytest.fixture
    def body(self, tmp_path: Path) -> bytes:
        return write_tar(tmp_path / "whole.tar", captions(3)).read_bytes()

    @pytest.mark.parametrize("checksums", [True, False])
    def test_truncated_in_a_member(self, tmp_path: Path, body: bytes, checksums: bool) -> None:
        message = self.index(tmp_path / "x.tar", body[:700], checksums=checksums)
        assert message.startswith("x.tar: truncated at byte 700 inside a member")

    def test_truncated_in_a_header(self, tmp_path: Path, body: bytes) -> None:
        assert "truncated in a header at byte 0" in self.index(tmp_path / "x.tar", body[:300])

    def test_damaged_header_is_not_taken_for_the_end(self, tmp_path: Path, body: bytes) -> None:
        with tarfile.open(fileobj=io.BytesIO(body)) as tar:
            second = tar.getmembers()[2].offset
        damaged = body[:second] + b"\x55" * 512 + body[second + 512 :]
        assert f"not a tar at byte {second}" in self.index(tmp_path / "x.tar", damaged)

    def test_bytes_behind_the_end(self, tmp_path: Path, body: bytes) -> None:
        assert "bytes after the end" in self.index(tmp_path / "x.tar", body + body)

    def test_compressed(self, tmp_path: Path, body: bytes) -> None:
        assert "compressed; unpack it" in self.index(tmp_path / "x.tar", gzip.compress(body))

    def test_empty_file(self, tmp_path: Path) -> None:
        assert "empty file, not a tar" in self.index(tmp_path / "x.tar", b"")

    def test_duplicate_key_is_named_by_a_hash(self, tmp_path: Path) -> None:
        members = [("Jane.jpg", encoded(0)), ("b.jpg", encoded(1)), ("Jane.jpg", encoded(2))]
        message = self.index(tmp_path / "x.tar", write_tar(tmp_path / "y.tar", members).read_bytes())
        assert "duplicate key (sha256 " in message and "Jane" not in message

    def test_without_end_blocks_is_taken(self, tmp_path: Path, body: bytes) -> None:
        path = tmp_path / "x.tar"
        path.write_bytes(body.rstrip(b"\0") + b"\0" * (-len(body.rstrip(b"\0")) % 512))
        assert len(index_tar(StoreStream(open_store(str(tmp_path)), "x.tar"), "x.tar").table) == 3


def test_adopts_from_a_bucket(bucket: str, tmp_path: Path) -> None:
    store = open_store(bucket)
    for number in range(2):
        store.put(f"cc/{number}.tar", write_tar(tmp_path / f"{number}.tar", captions(3, 10 * number)).read_bytes())
    manifest = adopt({"train": [f"{bucket}/cc/*.tar"]}, f"{bucket}/adopted")
    assert manifest.samples == 6
    own = open_store(f"{bucket}/adopted")
    assert all(verify(own, manifest, shard) == [] for shard in manifest.shards)


def test_patterns(foreign: Path) -> None:
    assert len(expand_urls([f"{foreign}/*.tar"])) == 3
    with pytest.raises(ConfigError, match="matches no object"):
        expand_urls([f"{foreign}/*.tgz"])
    with pytest.raises(ConfigError, match="pipe: URLs run a shell"):
        expand_urls(["pipe:cat x.tar"])
    with pytest.raises(ConfigError, match="names a tar twice"):
        expand_urls([f"{foreign}/000.tar", f"{foreign}/*.tar"])


def test_relative_paths_become_absolute(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(foreign)
    assert expand_urls(["000.tar", "./00[12].tar"]) == [str(foreign / f"{i:03d}.tar") for i in range(3)]


def test_no_sample_at_all(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.txt", b"x")])
    with pytest.raises(DataError, match="no sample in any of the adopted tars"):
        adopt({"train": [str(tmp_path / "a.tar")]}, str(tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_shards_of_ours_adopted_keep_the_window_of_each_view(tmp_path: Path) -> None:
    views = [ViewRecord(id="0", height=40, width=36), ViewRecord(id="1", height=40, width=36, window=(10.0, 90.0))]
    record = StudyRecord(study="s", patient="p", report={"findings": "Clear."}, views=views)
    members = [
        ("s.0.jpg", encoded(0)),
        ("s.1.jpg", encoded(1)),
        ("s.json", record.model_dump_json().encode()),
    ]
    write_tar(tmp_path / "ours.tar", members)
    adopt({"train": [str(tmp_path / "ours.tar")]}, str(tmp_path / "out"))
    for number, window in ((0, None), (1, (10.0, 90.0))):
        found = chosen_view(tmp_path / "out", number)
        (view,) = _view_records(found.record(adopted=True), found)
        assert view.window == window
    # One image more than the record lists.
    write_tar(tmp_path / "more.tar", [*members[:2], ("s.2.jpg", encoded(2)), members[2]])
    adopt({"train": [str(tmp_path / "more.tar")]}, str(tmp_path / "out2"))
    found = chosen_view(tmp_path / "out2", 2)
    with pytest.raises(BadSampleError, match="does not list"):
        _view_records(found.record(adopted=True), found)


def chosen_view(folder: Path, number: int) -> Members:
    """The first sample of an adopted set, read with one of its views."""
    with closing(DataSet(f"{folder}/manifest.json", "train")) as data:
        found = read_units(data, 0, [0], lambda unit, views: [number])[0]
    assert isinstance(found, Members)
    return found


def test_member_names_of_adopted_tars_stay_out_of_messages() -> None:
    arguments: dict[str, Any] = {"shard": "s", "key": "#1", "size": 3, "crc32c": 1, "adopted": True}
    with pytest.raises(BadSampleError) as wrong:
        check_member(b"abc", member="DOE_JOHN.jpg", **arguments)
    assert "DOE" not in str(wrong.value) and "member .jpg does not match" in str(wrong.value)
    with pytest.raises(BadSampleError, match=r"member \.gz is in a pickle format"):
        check_member(b"abc", member="DOE_JOHN.pkl.gz", **arguments)


def test_adopting_and_verifying_leave_no_descriptor_open(foreign: Path, tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    manifest = adopt({"train": [f"{foreign}/*.tar"]}, str(tmp_path / "out"))
    with open_store(tmp_path / "out") as store:
        for shard in manifest.shards:
            assert verify(store, manifest, shard) == []
            assert len(list(read_samples(store, manifest, shard))) == 4
    assert len(list(Path("/proc/self/fd").iterdir())) == before
