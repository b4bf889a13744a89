"""The writer: same bytes whatever the workers and interruptions, plain WebDataset, patients whole."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shards.batch import EncodedImage
from shards.dataset import open_manifest
from shards.errors import ConfigError, DataError
from shards.ingest import Item, Loaded, Plan, Refusal
from shards.manifest import Manifest
from shards.reader import read_samples, verify
from shards.store import open_store
from shards.writer import WriterConfig, assign_splits, load_in_order, sample_members, split_of_patient, write_shards
from tests.shards.sources import DyingSource, TinySource, encoded, make_sample

ROOT = Path(__file__).parents[2]
SMALL = WriterConfig(shard_samples=6, chunk_bytes=8000)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    write_shards(TinySource(refuse_every=9), str(folder), SMALL)
    return folder


def test_same_bytes_whatever_the_workers(packed: Path, tmp_path: Path) -> None:
    write_shards(TinySource(refuse_every=9), str(tmp_path), replace(SMALL, workers=2))
    assert contents(tmp_path) == contents(packed)


def test_manifest_accounts_for_every_input(packed: Path) -> None:
    manifest = Manifest.from_bytes((packed / "manifest.json").read_bytes())
    assert manifest.samples == 35
    assert manifest.refused == {"does not decode": 5}
    assert manifest.labels == ("nodule",)
    assert manifest.masks == {"lung": 1}
    assert manifest.fields["labels"] == 35
    assert manifest.fields["masks"] == sum(1 for i in range(40) if i % 9 and i % 2)
    assert manifest.sections == {"findings": 35}
    lines = [json.loads(line) for line in (packed / "refused.jsonl").read_text().splitlines()]
    assert {line["input"] for line in lines} == {f"study {i}" for i in range(0, 40, 9)}
    assert not (packed / "receipts").exists() or not list((packed / "receipts").iterdir())


def test_a_set_is_named_by_its_manifest_or_its_folder(packed: Path, bucket: str, tmp_path: Path) -> None:
    digest = Manifest.from_bytes((packed / "manifest.json").read_bytes()).sha256
    with open_store(f"{bucket}/set", create=True) as store:
        store.put("manifest.json", packed / "manifest.json")
    for url in (packed, f"{packed}/", f"file://{packed}", packed / "manifest.json", f"{bucket}/set", f"{bucket}/set/"):
        assert open_manifest(str(url))[1].sha256 == digest, url
    for url in (str(tmp_path), f"{tmp_path}/manifest.json", f"{bucket}/other"):
        with pytest.raises(DataError, match=r"holds no manifest\.json; name the manifest"):
            open_manifest(url)


def test_what_was_written_reads_back(packed: Path) -> None:
    store = open_store(str(packed))
    manifest = Manifest.from_bytes(store.get("manifest.json"))
    source = TinySource()
    expected = {item.key: source.load(item).sample for item in source.plan().items}
    seen = 0
    for shard in manifest.shards:
        assert verify(store, manifest, shard) == []
        previous = ""
        for sample in read_samples(store, manifest, shard):
            assert not isinstance(sample, Exception)
            wanted = expected[sample.key]
            assert wanted is not None
            assert sample == replace(wanted, split=shard.split)
            assert sample.key > previous
            previous, seen = sample.key, seen + 1
    assert seen == manifest.samples


def test_chunk_table_covers_the_samples(packed: Path) -> None:
    manifest = Manifest.from_bytes((packed / "manifest.json").read_bytes())
    assert any(len(shard.chunks) > 1 for shard in manifest.shards)
    for shard in manifest.shards:
        chunks = shard.chunks
        ends = chunks.offset + chunks.bytes
        assert chunks.first_sample[0] == 0 and chunks.offset[0] == 0
        np.testing.assert_array_equal(chunks.first_sample[1:], np.cumsum(chunks.samples)[:-1])
        np.testing.assert_array_equal(chunks.offset[1:], ends[:-1])
        assert ends[-1] == shard.bytes - 1024  # the two closing blocks
        assert all(size <= 8000 or count == 1 for size, count in zip(chunks.bytes, chunks.samples, strict=True))


def test_headers_hold_nothing_variable(packed: Path) -> None:
    for path in packed.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
                assert member.pax_headers == {}


def test_webdataset_reads_it(packed: Path) -> None:
    import webdataset

    manifest = Manifest.from_bytes((packed / "manifest.json").read_bytes())
    urls = [str(packed / shard.tar) for shard in manifest.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert len(samples) == manifest.samples
    assert all(json.loads(sample["json"])["study"] == sample["__key__"] for sample in samples)
    assert all("0.jpg" in sample for sample in samples)


def test_dali_reads_it_with_our_index(packed: Path) -> None:
    fn = pytest.importorskip("nvidia.dali.fn")
    pipeline = pytest.importorskip("nvidia.dali.pipeline")
    manifest = Manifest.from_bytes((packed / "manifest.json").read_bytes())
    shard = manifest.shards[0]

    @pipeline.pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def read() -> tuple[object, ...]:
        outputs = fn.readers.webdataset(
            paths=[str(packed / shard.tar)], index_paths=[str(packed / shard.index)], ext=["0.jpg", "json"]
        )
        return tuple(outputs)

    pipe = read()
    pipe.build()
    expected = list(read_samples(open_store(str(packed)), manifest, shard))
    for sample in expected:
        assert not isinstance(sample, Exception)
        image, record = pipe.run()
        assert bytes(np.asarray(image.at(0))) == sample.images[0].data
        assert json.loads(bytes(np.asarray(record.at(0))))["study"] == sample.key


def test_index_is_what_wds2idx_writes(packed: Path, tmp_path: Path) -> None:
    tool = Path(sys.executable).parent / "wds2idx"
    if not tool.exists():
        pytest.skip("wds2idx of DALI is not installed")
    tar = next(iter(sorted(packed.glob("*.tar"))))
    subprocess.run([tool, tar, tmp_path / "x.idx"], check=True, capture_output=True)
    assert (tmp_path / "x.idx").read_text().split() == tar.with_suffix(".idx").read_text().split()


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_run_continues_to_the_same_bytes(packed: Path, tmp_path: Path, workers: int) -> None:
    before = _shared_memory()
    script = (
        "from shards.writer import *\nfrom tests.shards.sources import TinySource\n"
        "if __name__ == '__main__':\n"
        f"    write_shards(TinySource(refuse_every=9, delay_s=0.05), {str(tmp_path)!r},"
        f" WriterConfig(shard_samples=6, chunk_bytes=8000, workers={workers}))\n"
    )
    (tmp_path.parent / f"run{workers}.py").write_text(script)
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    command = [sys.executable, str(tmp_path.parent / f"run{workers}.py")]
    process = subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True)
    receipts = tmp_path / "receipts"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not receipts.exists() or len(list(receipts.glob("*.json"))) < 2):
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "manifest.json").exists()
    finished = [path for path in tmp_path.glob("*.tar") if (receipts / f"{path.stem}.json").exists()]
    kept = {path.name: path.stat().st_mtime_ns for path in finished}
    assert len(kept) >= 2
    write_shards(TinySource(refuse_every=9, delay_s=0.0), str(tmp_path), SMALL)
    assert contents(tmp_path) == contents(packed)
    for name, written_ns in kept.items():
        assert (tmp_path / name).stat().st_mtime_ns == written_ns  # not done again
    while time.monotonic() < deadline and any(_lives(int(child)) for child in children):
        time.sleep(0.05)
    assert not any(_lives(int(child)) for child in children)
    assert _shared_memory() <= before


def _shared_memory() -> set[str]:
    """Names in /dev/shm, without the semaphores that scikit-learn makes in processes that run tests beside this one."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.loky-")}


def _lives(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_damaged_finished_shard_is_written_again(packed: Path, tmp_path: Path) -> None:
    stop = _stop_after(20)
    with pytest.raises(KeyboardInterrupt):
        write_shards(TinySource(refuse_every=9), str(tmp_path), SMALL, on_progress=stop)
    receipt = next(iter(sorted((tmp_path / "receipts").glob("*.json"))))
    tar = tmp_path / f"{receipt.stem}.tar"
    tar.write_bytes(tar.read_bytes()[:-2000])
    write_shards(TinySource(refuse_every=9), str(tmp_path), SMALL)
    assert contents(tmp_path) == contents(packed)


def test_continuing_with_other_options_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_shards(TinySource(), str(tmp_path), SMALL, on_progress=_stop_after(30))
    with pytest.raises(ConfigError, match="other inputs or options"):
        write_shards(TinySource(), str(tmp_path), replace(SMALL, shard_samples=5))
    write_shards(TinySource(), str(tmp_path), replace(SMALL, shard_samples=5, overwrite=True))


def _stop_after(count: int) -> Callable[[object], None]:
    calls = iter(range(count))

    def stop(_: object) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt

    return stop


def test_finished_output_is_not_touched(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"already holds a manifest.json; choose an empty --output"):
        write_shards(TinySource(), str(packed), SMALL)
    write_shards(TinySource(count=30), str(tmp_path), SMALL)
    write_shards(TinySource(refuse_every=9), str(tmp_path), replace(SMALL, overwrite=True))
    assert contents(tmp_path) == contents(packed)


def test_full_disk_is_one_line_and_leaves_no_half_file(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, calls = os.fsync, iter(range(12))

    def full(descriptor: int) -> None:
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="no room left") as error:
        write_shards(TinySource(refuse_every=9), str(tmp_path), SMALL)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "manifest.json").exists()
    whole = contents(packed)
    for name, data in contents(tmp_path).items():
        assert name.startswith("receipts/") or data == whole[name]
    monkeypatch.undo()
    write_shards(TinySource(refuse_every=9), str(tmp_path), SMALL)
    assert contents(tmp_path) == whole


def test_shards_end_at_their_size(tmp_path: Path) -> None:
    manifest = write_shards(TinySource(), str(tmp_path), WriterConfig(shard_bytes=20_000))
    assert len(manifest.shards) > 3
    largest = max(int((shard.chunks.bytes / shard.chunks.samples).max()) for shard in manifest.shards)
    assert all(shard.bytes <= 20_000 + 3 * largest for shard in manifest.shards)


def test_packs_to_a_bucket(packed: Path, bucket: str) -> None:
    write_shards(TinySource(refuse_every=9), f"{bucket}/set", SMALL)
    store = open_store(f"{bucket}/set")
    assert {name: store.get(name) for name in store.list("")} == contents(packed)


class TestSplits:
    def test_patients_are_whole_and_shares_hold(self) -> None:
        items = [Item(key=f"{i:05x}", patient=f"p{i // 3}") for i in range(6000)]
        splits = assign_splits(items, {"train": 0.8, "validation": 0.1, "test": 0.1})
        homes: dict[str, set[str]] = {}
        for split, of_split in splits.items():
            for item in of_split:
                homes.setdefault(item.patient, set()).add(split)
        assert all(len(home) == 1 for home in homes.values())
        assert len(splits["test"]) / 6000 == pytest.approx(0.1, abs=0.02)

    def test_share_of_zero_gets_nobody(self) -> None:
        assert {split_of_patient(str(i), {"train": 1.0, "test": 0.0}) for i in range(500)} == {"train"}

    def test_patient_in_two_splits_is_refused(self) -> None:
        items = [Item(key="a", patient="p1", split="train"), Item(key="b", patient="p1", split="test")]
        with pytest.raises(DataError, match=r"patient p1 is in splits test and train \(1 such patients\)"):
            assign_splits(items, {"train": 1.0})

    def test_given_split_takes_the_patients_other_studies_along(self) -> None:
        items = [Item(key="a", patient="p1"), Item(key="b", patient="p1", split="gold")]
        assert list(assign_splits(items, {"train": 1.0})) == ["gold"]

    def test_duplicate_key_is_refused(self) -> None:
        with pytest.raises(DataError, match="duplicate key a: two studies"):
            assign_splits([Item(key="a", patient="p"), Item(key="a", patient="q")], {"train": 1.0})

    @pytest.mark.parametrize("key", ["", "a.b", "a/b", "../a", "x" * 65])
    def test_key_that_no_member_name_can_hold(self, key: str) -> None:
        with pytest.raises(DataError, match="letters and digits"):
            assign_splits([Item(key=key, patient="p")], {"train": 1.0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workers": 0}, "--workers 0"),
        ({"shard_samples": 0}, "--shard-samples 0"),
        ({"shard_bytes": 0}, "--shard-bytes 0"),
        ({"chunk_bytes": 0}, "--chunk-bytes 0"),
        ({"fractions": {"train": 0.5}}, "0.5, not 1"),
    ],
)
def test_bad_options_name_themselves(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        write_shards(TinySource(), str(tmp_path / "out"), replace(SMALL, **change))  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


class Nothing(TinySource):
    def load(self, item: Item) -> Loaded:
        return Loaded(sample=None, refusals=(Refusal("x", "image missing"),))


def test_nothing_left_is_an_error_with_the_reason(tmp_path: Path) -> None:
    message = r"no input of source tiny gave a sample: image missing \(5\); each is named in .*refused.jsonl"
    with pytest.raises(DataError, match=message):
        write_shards(
            Nothing(count=5), str(tmp_path), SMALL, audit=lambda manifest, _: f"{manifest.samples} {manifest.refused}"
        )
    assert not (tmp_path / "manifest.json").exists()
    assert len((tmp_path / "refused.jsonl").read_text().splitlines()) == 5
    assert (tmp_path / "audit.md").read_text() == "0 {'image missing': 5}"
    write_shards(TinySource(), str(tmp_path), SMALL)  # the cause was mended
    assert not (tmp_path / "refused.jsonl").exists()


class Empty(TinySource):
    def plan(self) -> Plan:
        return Plan(items=[])


def test_empty_plan_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the input is empty"):
        write_shards(Empty(), str(tmp_path), SMALL)


class Silent(TinySource):
    def load(self, item: Item) -> Loaded:
        return Loaded(sample=None)


def test_source_that_loses_an_item_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither sample nor refusal"):
        write_shards(Silent(), str(tmp_path), SMALL)


def test_dead_worker_is_one_line() -> None:
    source = DyingSource(count=12)
    with pytest.raises(DataError, match="a worker died while loading sample"):
        list(load_in_order(source, source.plan().items, workers=2))


def test_pickle_member_is_never_written() -> None:
    sample = make_sample("a", "p", 0)
    with pytest.raises(DataError, match=r"member \.0\.npy is in a pickle format"):
        sample_members(replace(sample, images=(EncodedImage(data=b"x", extension="npy"),)))
    with pytest.raises(DataError, match=r"member \.0\.jpg has 0 bytes"):
        sample_members(replace(sample, images=(EncodedImage(data=b"", extension="jpg"),)))
    with pytest.raises(DataError, match="2 images for 1 views"):
        sample_members(replace(sample, images=(EncodedImage(data=encoded(0), extension="jpg"),) * 2))
